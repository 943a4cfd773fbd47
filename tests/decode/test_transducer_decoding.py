"""Transducer decoding: greedy against a loop, in chunks and whole; beams against the sums over all alignments."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.decode.transducer import UNSAID, Beam, Greedy
from speechjax.decode.types import Hypotheses
from speechjax.errors import UserError
from speechjax.models.transducer import BLANK, TransducerNetwork
from speechjax.tasks import _transducer_loss as tl
from tests.drawing import draw_params

V, J, P, D, T = 6, 6, 5, 4, 11
LENGTHS = np.array([11, 7, 1, 0], np.int32)
B = len(LENGTHS)
DURATIONS = (0, 1, 2, 4)


@functools.cache
def networks(predictor: str = "stateless", durations: tuple[int, ...] = ()) -> tuple[TransducerNetwork, Any]:
    """(network, parameters) whose likeliest symbols are a good mix of all."""
    net = TransducerNetwork(
        classes=V, durations=durations, predictor=predictor, predictor_width=P, predictor_depth=2, width=J
    )

    def everything(net, x, tokens):
        return net.joint()(net.frames(x)[:, :, None], net.texts(tokens)[:, None])

    init = lambda: net.init(jax.random.key(0), noise(1, 2, D), np.zeros((1, 2), np.int32), method=everything)  # noqa: E731
    params = jax.tree.map(lambda p: 4 * np.asarray(p), draw_params(jax.eval_shape(init)["params"]))
    params["bias"] = np.zeros_like(params["bias"])
    params["bias"][BLANK] = 1.5
    return net, params


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@functools.cache
def whole_texts(net: TransducerNetwork) -> Any:
    return jax.jit(functools.partial(net.apply, method="texts"))


def logits_at(net: TransducerNetwork, params: Any, text: list[int]) -> Any:
    """Frames [D] -> logits after `text`, in numpy."""
    padded = np.zeros((1, 40), np.int32)  # one shape for all
    padded[0, : len(text)] = text
    g = np.asarray(whole_texts(net)({"params": params}, padded))[0, len(text)]
    p = params["frame_projection"]
    return lambda x: np.tanh(x @ p["kernel"] + p["bias"] + g) @ params["kernel"] + params["bias"]


# ------------------------------------------------------------------------------------------- greedy


def loops_greedy(net, params, x, tokens: int, symbols: int) -> tuple[list[int], list[int], float]:
    """One row, by the description: (tokens, their frames, score)."""
    text: list[int] = []
    times: list[int] = []
    time, here, score = 0, 0, 0.0
    while time < len(x):
        logits = logits_at(net, params, text)(x[time])
        words, spans = log_softmax(logits[:V]), log_softmax(logits[V:]) if net.durations else ()
        allowed = [s for s in range(V) if s not in UNSAID and (s == BLANK or len(text) < tokens)]
        symbol = max(allowed, key=lambda s: words[s])
        score += words[symbol]
        span = int(symbol == BLANK)
        if net.durations:
            number = int(np.argmax(spans))
            number = net.durations.index(1) if symbol == BLANK and not net.durations[number] else number
            span, score = net.durations[number], score + spans[number]
        if symbol != BLANK:
            text.append(symbol)
            times.append(time)
        here = here + 1 if not span else 0
        if here == symbols:
            span, here = 1, 0
        time += span
    return text, times, score


def check_equal(found: Hypotheses, row: int, text: list[int], times: list[int]) -> None:
    n = int(found.lengths[row, 0])
    assert found.tokens[row, 0, :n].tolist() == text
    assert found.frames[row, 0, :n].tolist() == times
    assert not found.tokens[row, 0, n:].any()
    assert (found.frames[row, 0, n:] == -1).all()


@pytest.mark.parametrize(("predictor", "durations"), [("stateless", ()), ("lstm", ()), ("stateless", DURATIONS)])
@pytest.mark.parametrize(("tokens", "symbols"), [(30, 3), (5, 1)])
def test_greedy_is_a_loop(predictor, durations, tokens, symbols):
    net, params = networks(predictor, durations)
    search, x = Greedy(net, tokens, symbols), noise(B, T, D, seed=4) * 2
    found = jax.tree.map(np.asarray, jax.jit(search)(params, x, LENGTHS))
    said = []
    for row, n in enumerate(LENGTHS):
        text, times, score = loops_greedy(net, params, x[row, :n], tokens, symbols)
        check_equal(found, row, text, times)
        assert found.scores[row, 0] == pytest.approx(score, abs=1e-4)  # float32, up to 40 steps
        said.append(text)
    assert len(said[0]) >= 4, "there is something to say"
    assert len({*itertools.chain(*said)}) > 1
    assert not {BLANK, *UNSAID} & {*itertools.chain(*said)}


def test_a_frame_may_have_many_tokens_but_not_without_end():
    """A network that never says blank: `symbols` a frame, then the next; `tokens` in all, then blanks."""
    net, params = networks()
    params = params | {"bias": np.where(np.arange(V) == BLANK, -100, params["bias"]).astype(np.float32)}
    found = jax.tree.map(np.asarray, jax.jit(Greedy(net, 40, 3))(params, noise(B, T, D), LENGTHS))
    assert found.lengths[:, 0].tolist() == [33, 21, 3, 0]
    assert found.frames[1, 0, :21].tolist() == np.repeat(np.arange(7), 3).tolist()
    assert jax.jit(Greedy(net, 10, 3))(params, noise(B, T, D), LENGTHS).lengths[:, 0].tolist() == [10, 10, 3, 0]


@pytest.mark.parametrize(("predictor", "durations"), [("lstm", ()), ("stateless", DURATIONS)])
def test_a_stream_in_chunks_is_the_whole(predictor, durations):
    """Durations reach over the edges of chunks; rows end in any of them."""
    net, params = networks(predictor, durations)
    search, x = Greedy(net, 30, 3), noise(B, T, D, seed=4) * 2
    whole = jax.jit(search)(params, x, LENGTHS)
    step = jax.jit(search.step)
    for size in (1, 4):
        state = search.init(params, B)
        for begin in range(0, T, size):
            chunk = np.zeros((B, size, D), np.float32)
            chunk[:, : T - begin] = x[:, begin : begin + size]
            state = step(params, state, chunk, np.clip(LENGTHS - begin, 0, size))
        found = search.result(state)
        np.testing.assert_allclose(found.scores, whole.scores, atol=1e-5)  # products in other shapes
        for a, b in zip(found[:2] + found[3:], whole[:2] + whole[3:], strict=True):
            np.testing.assert_array_equal(a, b)
    forgetful = step(params, search.init(params, B), x[:, 4:], np.maximum(LENGTHS - 4, 0))
    assert (search.result(forgetful).tokens != whole.tokens).any(), "negative control"


@pytest.mark.parametrize("kind", ["greedy", "durations", "beam"])
def test_padding_and_neighbours_do_not_matter(kind):
    net, params = networks(durations=DURATIONS if kind == "durations" else ())
    search: Any = Beam(net, beams=4, tokens=8, best=3) if kind == "beam" else Greedy(net, 20, 3)
    x, run = noise(B, T, D, seed=3), jax.jit(search)
    whole = run(params, x, LENGTHS)
    loud = np.where((np.arange(T) < LENGTHS[:, None])[..., None], x, 30 * x[::-1])
    jax.tree.map(np.testing.assert_array_equal, run(params, loud, LENGTHS), whole)
    for row in range(B):
        alone = run(params, x[row : row + 1], LENGTHS[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])
        np.testing.assert_allclose(alone.scores[0], whole.scores[row], rtol=1e-5)
    assert (run(params, loud, np.full(B, T, np.int32)).tokens != whole.tokens).any(), "negative control"


# ------------------------------------------------------------------------------------------- beam search

U, SHORT = 3, np.array([4, 2, 1, 0], np.int32)
WORDS = [s for s in range(V) if s != BLANK and s not in UNSAID]
TEXTS = [text for n in range(U + 1) for text in itertools.product(WORDS, repeat=n)]  # 40


class Table:
    """A random automaton: V states, the last token; forbids some pairs."""

    def __init__(self, forbid: bool = True):
        self.table, self.ends = noise(V, V, seed=8), noise(V, seed=9)
        if forbid:
            self.table[5, 4] = -np.inf

    def start(self, rows, beams):
        return jnp.zeros((rows, beams), jnp.int32)

    def scores(self, state):
        return jnp.where(jnp.arange(V)[None, None] < 3, 0, jnp.asarray(self.table)[state])

    def advance(self, state, tokens):
        return jnp.where(tokens < 0, state, tokens)

    def final(self, state):
        return jnp.asarray(self.ends)[state]

    def of(self, text: Any) -> float:
        return sum(self.table[a, b] for a, b in itertools.pairwise((0, *text))) + self.ends[(0, *text)[-1]]


@functools.cache
def exact(predictor: str) -> np.ndarray:
    """[B, texts]: log-probability of every text of up to U tokens, by the loss, which has an enumeration for test."""
    net, params = networks(predictor)
    tokens = np.zeros((len(TEXTS), U), np.int32)
    for i, text in enumerate(TEXTS):
        tokens[i, : len(text)] = text
    lengths = np.array([len(text) for text in TEXTS], np.int32)

    @jax.jit
    def of(x, frames):
        def part(*args, method):
            return net.apply({"params": params}, *args, method=method)

        f = jnp.broadcast_to(part(x, method="frames"), (len(TEXTS), T, J))
        arcs = tl._arcs(part(method="joint"), f, part(tokens, method="texts"), tokens, (), T)
        return tl.log_likelihood(arcs, jnp.full(len(TEXTS), frames, jnp.int32), lengths)

    return np.stack([of(x[None], frames) for x, frames in zip(beam_frames(), SHORT, strict=True)])


def beam_frames() -> np.ndarray:
    return noise(B, T, D, seed=4)


def said(found: Hypotheses, row: int) -> list[tuple[int, ...]]:
    return [
        tuple(tokens[:n].tolist())
        for tokens, n, score in zip(found.tokens[row], found.lengths[row], found.scores[row], strict=True)
        if score > -np.inf
    ]


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
@pytest.mark.parametrize("steered", [False, True])
def test_a_beam_of_all_is_the_sum_over_all_alignments(predictor, steered):
    net, params = networks(predictor)
    scorer = Table()
    search = Beam(net, beams=40, tokens=U, best=40, scorers=((scorer, 0.7),) if steered else ())
    found = jax.tree.map(np.asarray, jax.jit(search)(params, beam_frames(), SHORT))
    assert np.isfinite(found.scores[0]).sum() == (40 - 7 if steered else 40), "5 then 4 is forbidden"
    for row in range(3):
        of_text = {t: exact(predictor)[row, i] + (0.7 * scorer.of(t) if steered else 0) for i, t in enumerate(TEXTS)}
        ranked = sorted((-score, text) for text, score in of_text.items() if np.isfinite(score))
        expected = [-score for score, _ in ranked]
        np.testing.assert_allclose(found.scores[row, : len(expected)], expected, atol=2e-5)  # float32
        assert (np.diff(found.scores[row, : len(expected)]) <= 0).all()
        assert said(found, row)[:5] == [text for _, text in ranked[:5]]
        assert len({*said(found, row)}) == len(said(found, row)), "no text comes twice"
        for text, score in zip(said(found, row), found.scores[row], strict=False):
            assert score == pytest.approx(of_text[text], abs=2e-5)
    assert said(found, 3) == [()], "no frames, no tokens"
    assert found.scores[3, 0] == 0


def test_where_no_text_may_end_the_best_unfinished_ones_are_given():
    """As within a word of a lexicon; and where one may, no other is found."""
    net, params = networks()

    @jax.jit
    def run(ends):
        scorer: Any = Table(forbid=False)
        scorer.table, scorer.ends = np.zeros((V, V), np.float32), ends
        return Beam(net, beams=8, tokens=U, best=3, scorers=((scorer, 1.0),))(params, beam_frames(), SHORT)

    tables = np.zeros(V), np.full(V, -np.inf), np.where(np.arange(V) == 4, 0, -np.inf)
    free, never, some = (jax.tree.map(np.asarray, run(ends.astype(np.float32))) for ends in tables)
    jax.tree.map(np.testing.assert_array_equal, never, free)
    assert len(said(free, 0)) == 3
    for row in range(3):
        assert said(some, row)
        assert all(text[-1:] == (4,) for text in said(some, row))


def best_alignment(net: TransducerNetwork, params: Any, x: np.ndarray, text: tuple[int, ...]) -> float:
    """Log-probability of the likeliest one, by trying all."""
    words = [log_softmax(np.array([logits_at(net, params, list(text[:u]))(f)[:V] for f in x]))
             for u in range(len(text) + 1)]  # fmt: skip
    best = -np.inf
    for times in itertools.combinations_with_replacement(range(len(x)), len(text)):
        tokens = sum(words[u][frame, text[u]] for u, frame in enumerate(times))
        blanks = sum(words[sum(t <= frame for t in times)][frame, BLANK] for frame in range(len(x)))
        best = max(best, tokens + blanks)
    return best


def test_what_is_merged_counts():
    """The trap: without merging, a text is in the beam once for each of its alignments."""
    net, params = networks()
    wide = jax.jit(Beam(net, beams=40, tokens=U, best=40))(params, beam_frames(), SHORT)
    wide = jax.tree.map(np.asarray, wide)
    x = beam_frames()[0, : SHORT[0]]
    gains = [s - best_alignment(net, params, x, t) for t, s in zip(said(wide, 0), wide.scores[0, :10], strict=False)]
    assert min(gains) > -1e-5
    assert max(gains) > 0.1


def test_narrow_beams_never_score_above():
    net, params = networks()
    exact_of = [dict(zip(TEXTS, exact("stateless")[row], strict=True)) for row in range(B)]
    lost = 0.0
    for beams in (1, 2, 5):
        found = jax.jit(Beam(net, beams=beams, tokens=U, best=2))(params, beam_frames(), SHORT)
        found = jax.tree.map(np.asarray, found)
        for row in range(3):
            assert said(found, row)
            for text, score in zip(said(found, row), found.scores[row], strict=False):
                assert score <= exact_of[row][text] + 2e-5
                lost += exact_of[row][text] - score
    assert lost > 0.1, "negative control: something was pruned"


def test_beams_know_their_frames():
    """Of the one alignment there is where every frame is sure of its symbol, and a said token is not said again."""
    net, shapes = networks()
    params: Any = jax.tree.map(np.zeros_like, shapes)
    params["frame_projection"]["kernel"] = 3 * np.eye(D, J, dtype=np.float32)
    for channel, symbol in enumerate((BLANK, 3, 4, 5)):
        params["kernel"][channel, symbol] = 30
    params["convolution"]["kernel"][P:] = np.eye(P, dtype=np.float32)  # the last token, as it is
    for unit, channel in enumerate((2, 3)):  # tokens 4 and 5 turn their channel off, and that of the blank on
        params["embedding"]["embedding"][4 + unit, unit] = 1
        params["text_projection"]["kernel"][unit, [0, channel]] = 1, -3
    x = np.zeros((1, 5, D), np.float32)
    x[0, np.arange(5), [0, 2, 0, 3, 0]] = 1
    lengths = np.array([5], np.int32)
    beam = jax.tree.map(np.asarray, jax.jit(Beam(net, beams=6, tokens=4, best=2))(params, x, lengths))
    greedy = jax.tree.map(np.asarray, jax.jit(Greedy(net, 4))(params, x, lengths))
    for found in (beam, greedy):
        assert said(found, 0)[0] == (4, 5)
        assert found.frames[0, 0].tolist() == [1, 3, -1, -1]


def test_mistakes_are_named():
    net, _ = networks(durations=DURATIONS)
    with pytest.raises(UserError, match="kind=tdt"):
        Beam(net, beams=2, tokens=3, best=1)
    with pytest.raises(UserError, match="at least 1"):
        Beam(networks()[0], beams=2, tokens=3, best=0)
    with pytest.raises(UserError, match="at least 1"):
        Greedy(net, 3, 0)

"""Searches against the enumeration of all sequences, CTC's prefix scores against that of all paths."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.decode.autoregressive import CTCPrefixScorer, beam_search, greedy, sample
from speechjax.decode.neural_scorer import EOS
from speechjax.errors import UserError
from tests.decode.test_neural_scorer import FRAMES, LENGTHS
from tests.decode.test_neural_scorer import make as make_neural

V, B, M = 7, 3, 4  # three tokens: 4, 5, 6
TOKENS = (4, 5, 6)
ALL = [text for n in range(M + 1) for text in itertools.product(TOKENS, repeat=n)]  # 121
LIMITS = np.array([4, 4, 2], np.int32)


class Bigram(NamedTuple):
    """Scores by the last token, a table a row: [B, V, V]; column 2 is the end, row 1 the start."""

    table: jax.Array

    def start(self, rows: int, beams: int) -> jax.Array:
        return jnp.ones((rows, beams), jnp.int32)

    def scores(self, state: jax.Array) -> jax.Array:
        rows = jnp.arange(state.shape[0])[:, None]
        return self.table[rows, state].at[..., :4].set(0)

    def advance(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.where(tokens < 0, state, tokens)

    def final(self, state: jax.Array) -> jax.Array:
        return self.table[jnp.arange(state.shape[0])[:, None], state, EOS]


def bigram(seed: int = 0, end: float = 0.0) -> Bigram:
    logits = np.random.default_rng(seed).normal(size=(B, V, V)) * 1.5
    logits[:, :, EOS] += end
    return Bigram(jnp.asarray(jax.nn.log_softmax(logits.astype(np.float32), axis=2)))


def by_hand(table: Any, text: tuple[int, ...]) -> float:
    path = [1, *text, EOS]
    return float(sum(np.asarray(table, np.float64)[a, b] for a, b in itertools.pairwise(path)))


def texts(found: Any, row: int) -> list[tuple[int, ...]]:
    pairs = zip(np.asarray(found.tokens[row]), np.asarray(found.lengths[row]), strict=True)
    return [tuple(tokens[:n].tolist()) for tokens, n in pairs]


# ------------------------------------------------------------------------------------------- beam search


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_a_beam_as_wide_as_all_prefixes_finds_the_best_of_all_sequences(alpha):
    scorers, best = [(bigram(0, -2), 0.7), (bigram(1, -2), 0.4)], 12
    options: dict[str, Any] = dict(max_tokens=M, beams=3**M, best=best, alpha=alpha)
    found = jax.jit(lambda: beam_search(scorers, LIMITS, **options))()
    for row in range(B):
        scored = {
            text: sum(w * by_hand(s.table[row], text) for s, w in scorers) / ((6 + len(text)) / 6) ** alpha
            for text in ALL
            if len(text) <= LIMITS[row]
        }
        expected = sorted(scored, key=lambda text: -scored[text])[:best]
        np.testing.assert_allclose(found.scores[row], [scored[t] for t in expected], rtol=1e-5)  # float32
        assert texts(found, row) == expected
        assert len({len(t) for t in expected}) > 1, "of several lengths"
    assert (np.asarray(found.frames) == -1).all()
    outside = np.arange(M) >= np.asarray(found.lengths)[..., None]
    assert not np.asarray(found.tokens)[outside].any()


def test_narrow_beams_never_find_better_and_sometimes_worse():
    @functools.partial(jax.jit, static_argnums=1)
    def score(scorer, beams):
        return beam_search([(scorer, 1.0)], LIMITS, max_tokens=M, beams=beams).scores[:, 0]

    all_, one = (np.concatenate([score(bigram(seed, -2), k) for seed in range(6)]) for k in (81, 1))
    assert (one <= all_ + 1e-5).all()
    assert (one < all_ - 1e-3).any(), "negative control: the search matters"


def test_a_row_is_done_early_without_harm_and_alone_finds_the_same():
    """Row 1 wants to end at once, the others go on; alone, its search stops after a step."""
    scorer = bigram(3, -3)
    scorer = Bigram(scorer.table.at[1, :, EOS].set(-0.01).at[1, :, 4:].set(-6.0))
    run = jax.jit(lambda s, limits: beam_search([(s, 1.0)], limits, max_tokens=M, beams=4, best=2, alpha=0.5))
    found = run(scorer, LIMITS)
    assert texts(found, 1)[0] == ()
    for row in range(B):
        alone = run(Bigram(scorer.table[row : row + 1]), LIMITS[row : row + 1])
        jax.tree.map(lambda a, b, row=row: np.testing.assert_allclose(a[row], b[0], rtol=1e-6), found, alone)


def test_a_search_goes_on_while_length_may_still_make_up_for_the_score():
    """-0.2 for the empty sequence, -0.4 for all others: divided by their lengths, the longest is the best."""
    table = jnp.full((1, V, V), -jnp.inf).at[0, 1, EOS].set(-0.2).at[0, 1, 4].set(-0.4)
    table = table.at[0, 4, 4].set(0.0).at[0, 4, EOS].set(0.0)
    run = jax.jit(lambda alpha: beam_search([(Bigram(table), 1.0)], jnp.array([M]), max_tokens=M, beams=2, alpha=alpha))
    found = run(2.0)
    assert texts(found, 0) == [(4,) * M]
    assert found.scores[0, 0] == pytest.approx(-0.4 / (10 / 6) ** 2)
    assert texts(run(0.0), 0) == [()], "negative control"


def test_fewer_sequences_than_asked_for_and_none_at_all():
    table = jnp.full((1, V, V), -1.0).at[..., 5:].set(-jnp.inf)  # nothing but 4

    @jax.jit
    def run(table, limit):
        return beam_search([(Bigram(table), 1.0)], limit, max_tokens=2, beams=3, best=5)

    found = run(table, jnp.array([2]))
    assert texts(found, 0)[:3] == [(), (4,), (4, 4)]
    assert found.scores[0].tolist() == [-1, -2, -3, -math.inf, -math.inf]
    endless = table.at[..., EOS].set(-jnp.inf)  # as within a word of a lexicon: cut off at the limit
    cut = run(endless, jnp.array([2]))
    assert texts(cut, 0)[0] == (4, 4)
    assert cut.scores[0].tolist() == [-2, *[-math.inf] * 4]
    nothing = run(endless.at[..., 4].set(-jnp.inf), jnp.array([2]))
    assert np.isneginf(np.asarray(nothing.scores)).all()
    assert not np.asarray(nothing.lengths).any()
    empty = run(table, jnp.array([0]))
    assert empty.lengths[0, 0] == 0
    assert np.isneginf(np.asarray(empty.scores)[0, 1:]).all(), "a row without frames says nothing"


def test_weight_0_takes_a_scorer_out_and_vocabularies_must_agree():
    scorer, forbids = bigram(0), Bigram(jnp.full((B, V, V), -jnp.inf))
    options: dict[str, Any] = dict(max_tokens=M, beams=3)
    with_, without = (
        beam_search(s, jnp.asarray(LIMITS), **options) for s in ([(scorer, 1.0), (forbids, 0.0)], [(scorer, 1.0)])
    )
    jax.tree.map(np.testing.assert_array_equal, with_, without)
    wider = Bigram(jnp.zeros((B, 9, 9)))
    with pytest.raises(UserError, match="vocabularies of 7, 9 tokens"):
        beam_search([(scorer, 1.0), (wider, 1.0)], jnp.asarray(LIMITS), **options)
    with pytest.raises(UserError, match="needs a scorer"):
        greedy([(scorer, 0.0)], jnp.asarray(LIMITS), max_tokens=M)


# ------------------------------------------------------------------------------------------- greedy and sampling


def test_greedy_takes_the_best_next_token_until_that_is_the_end():
    for seed in range(3):
        scorer = bigram(seed)
        found = jax.jit(lambda s: greedy([(s, 1.0)], LIMITS, max_tokens=M))(scorer)
        for row in range(B):
            table, text = np.asarray(scorer.table[row]), []
            while len(text) < LIMITS[row]:
                options = [EOS, *TOKENS]
                token = options[int(table[text[-1] if text else 1, options].argmax())]
                if token == EOS:
                    break
                text.append(token)
            assert texts(found, row) == [tuple(text)]
            assert found.scores[row, 0] == pytest.approx(by_hand(table, tuple(text)), rel=1e-5)


def test_samples_are_distributed_as_the_model_says():
    """Sequences of at most two tokens, 4000 samples of one row."""
    table, count = bigram(0).table[:1], 4000

    @functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
    def draw(**options):
        return sample([(Bigram(table), 1.0)], jnp.array([2]), jax.random.key(0), max_tokens=2, samples=count, **options)

    def shares(temperature, kept):
        """Probabilities of all texts when each step's best tokens are those that `kept` leaves."""
        steps = {}
        for a in (1, *TOKENS):
            p = np.exp(np.asarray(table[0, a], np.float64) / temperature) * np.isin(np.arange(V), [EOS, *TOKENS])
            steps[a] = kept(p / p.sum())
        of = {}
        for text in ALL:
            if len(text) <= 2:
                path = [1, *text] + [EOS] * (len(text) < 2)
                of[text] = math.prod(steps[a][b] for a, b in itertools.pairwise(path))
        return of

    def best(count):
        return lambda p: np.where(p >= np.sort(p)[-count], p, 0) / np.sort(p)[-count:].sum()

    def nucleus(share):
        def kept(p):
            order = np.argsort(-p)
            n = int(np.searchsorted(np.cumsum(p[order]), share)) + 1
            return best(n)(p)

        return kept

    cases = [
        (dict(), shares(1.0, lambda p: p)),
        (dict(temperature=0.5), shares(0.5, lambda p: p)),
        (dict(top_k=2), shares(1.0, best(2))),
        (dict(top_p=0.7), shares(1.0, nucleus(0.7))),
    ]
    for options, expected in cases:
        found = draw(**options)
        said = texts(found, 0)
        assert sum(expected.values()) == pytest.approx(1)
        for text, p in expected.items():
            deviation = math.sqrt(p * (1 - p) / count)
            assert abs(said.count(text) / count - p) <= 5 * deviation, (options, text)
        scores = np.asarray(found.scores[0])
        assert (np.diff(scores) <= 0).all()
        logs = [by_hand(table[0], t) for t in said[:5]]
        np.testing.assert_allclose(scores[:5], logs, rtol=1e-5)
    plain = cases[0][1]
    assert all(max(abs(plain[t] - other[t]) for t in plain) > 0.05 for _, other in cases[1:]), "negative control"


def test_a_vanishing_temperature_is_greedy():
    scorers = [(bigram(2), 1.0)]
    cold = sample(scorers, jnp.asarray(LIMITS), jax.random.key(1), max_tokens=M, samples=2, temperature=1e-4)
    first = greedy(scorers, jnp.asarray(LIMITS), max_tokens=M)
    for row in range(B):
        assert texts(cold, row) == texts(first, row) * 2


# ------------------------------------------------------------------------------------------- joint with CTC

T = 5
TIMES = np.array([5, 3, 0], np.int32)


def ctc_log_probs() -> np.ndarray:
    logits = np.random.default_rng(5).normal(size=(B, T, V)).astype(np.float32) * 1.5
    return np.asarray(jax.nn.log_softmax(logits))


def path_sums(log_probs: np.ndarray, frames: int) -> dict[tuple[int, ...], float]:
    """The probability of every labelling of vocabulary tokens, over all paths of blanks and those."""
    sums: dict[tuple[int, ...], float] = {}
    p = np.exp(log_probs.astype(np.float64))
    for path in itertools.product((0, *range(1, V)), repeat=frames):
        text = tuple(s for s, _ in itertools.groupby(path) if s)
        sums[text] = sums.get(text, 0) + math.prod(p[t, s] for t, s in enumerate(path))
    return sums


def test_ctc_prefix_scores_are_sums_over_all_paths():
    """Padding holds noise; repeats need a blank; a row without frames says nothing for certain."""
    log_probs = ctc_log_probs()
    noise = np.where(np.arange(T)[None, :, None] < TIMES[:, None, None], log_probs, 3 * log_probs[::-1])
    scorer = CTCPrefixScorer(jnp.asarray(noise), jnp.asarray(TIMES))
    prefixes = np.array([[4, 4, 5], [5, 6, 4], [4, 4, 4]], np.int32)
    sums = [path_sums(x, n) for x, n in zip(log_probs, TIMES, strict=True)]
    start, advance, score, final = (
        jax.jit(f) for f in (lambda: scorer.start(B, 3), scorer.advance, scorer.scores, scorer.final)
    )
    state, totals = start(), np.zeros((B, 3))
    for u in range(4):
        following, ending = np.asarray(score(state)), np.asarray(final(state))
        assert not following[..., :4].any()
        for b, k in itertools.product(range(B), range(3)):
            text = tuple(prefixes[k, :u].tolist())
            own = sums[b].get(text, 0.0)
            for token in TOKENS:
                longer = (*text, token)
                mass = sum(p for t, p in sums[b].items() if t[: u + 1] == longer)
                got = math.exp(totals[b, k] + following[b, k, token])
                assert got == pytest.approx(mass, rel=2e-5, abs=1e-12), (b, text, token)
            assert math.exp(totals[b, k] + ending[b, k]) == pytest.approx(own, rel=2e-5, abs=1e-12)
        if u < 3:
            token = np.broadcast_to(prefixes[:, u], (B, 3))
            totals += np.take_along_axis(following, token[..., None], axis=2)[..., 0]
            state = advance(state, token)
    waiting = advance(state, np.full((B, 3), -1, np.int32))
    jax.tree.map(np.testing.assert_array_equal, waiting, state)
    ignorant = CTCPrefixScorer(jnp.asarray(noise), jnp.full(B, T, jnp.int32))
    assert abs(float(ignorant.final(ignorant.start(B, 1))[1, 0] - final(start())[1, 0])) > 0.1, "negative control"


def test_joint_decoding_maximises_the_weighted_sum_of_both():
    log_probs, attention, w = ctc_log_probs(), bigram(4, -2), 0.4
    sums = [path_sums(x, n) for x, n in zip(log_probs, TIMES, strict=True)]
    ctc = CTCPrefixScorer(jnp.asarray(log_probs), jnp.asarray(TIMES))
    scorers = [(attention, 1 - w), (ctc, w)]
    found = jax.jit(lambda: beam_search(scorers, TIMES, max_tokens=M, beams=3**M, best=4))()
    for row in range(2):
        scored = {
            text: (1 - w) * by_hand(attention.table[row], text) + w * math.log(sums[row][text])
            for text in ALL
            if len(text) <= TIMES[row] and text in sums[row]
        }
        expected = sorted(scored, key=lambda text: -scored[text])[:4]
        assert texts(found, row) == expected
        np.testing.assert_allclose(found.scores[row], [scored[t] for t in expected], rtol=2e-5)
    assert texts(found, 2)[0] == ()
    alone = beam_search([(attention, 1.0)], jnp.asarray(TIMES), max_tokens=M, beams=3**M, best=4)
    assert any(texts(alone, row) != texts(found, row) for row in range(2)), "negative control: CTC matters"


def test_the_prefix_scores_need_no_array_of_beams_frames_and_vocabulary():
    b, k, t, v = 4, 10, 200, 500
    shapes = jax.eval_shape(lambda: CTCPrefixScorer(jnp.zeros((b, t, v)), jnp.zeros(b, jnp.int32)))
    scores = jax.jit(lambda scorer: scorer.scores(scorer.start(b, k)))
    memory = scores.lower(shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < b * k * t * v * 4 / 4


# ------------------------------------------------------------------------------------------- with a decoder


def test_a_tiny_decoder_is_searched_exactly_and_padding_is_not_heard():
    """Beam of all prefixes, an attention decoder with a language model, against every sequence scored by itself."""
    hears, model = make_neural(True), make_neural(False)
    tokens = (4, 5, 6, 7, 8)
    all_ = [text for n in range(3) for text in itertools.product(tokens, repeat=n)]
    limits = np.array([2, 2], np.int32)
    team = lambda a, b: [(a, 1.0), (b, 0.3)]  # noqa: E731
    run = jax.jit(lambda a, b: beam_search(team(a, b), limits, max_tokens=2, beams=25, best=3))
    found = run(hears, model)
    noise = np.where(np.arange(len(FRAMES[0]))[None, :, None] < LENGTHS[:, None, None], FRAMES, 9 * FRAMES[::-1])
    jax.tree.map(np.testing.assert_array_equal, run(make_neural(True, noise), model), found)

    @jax.jit
    def log_probs(scorer, given):
        """[N, B] of equally long texts [N, U]."""
        state, total = scorer.start(2, len(given)), 0
        for u in range(given.shape[1]):
            token = jnp.broadcast_to(given[None, :, u], (2, len(given)))
            total += jnp.take_along_axis(scorer.scores(state), token[..., None], axis=2)[..., 0]
            state = scorer.advance(state, token)
        return (total + scorer.final(state)).T

    scored = {}
    for n in range(3):
        same = [t for t in all_ if len(t) == n]
        given = np.array(same, np.int32).reshape(len(same), n)
        both = sum(w * np.asarray(log_probs(s, given)) for s, w in team(hears, model))
        scored |= dict(zip(same, both, strict=True))
    for row in range(2):
        expected = sorted(scored, key=lambda text: -scored[text][row])[:3]
        assert texts(found, row) == expected
        np.testing.assert_allclose(found.scores[row], [scored[t][row] for t in expected], atol=1e-5)
    alone = jax.jit(lambda a: beam_search([(a, 1.0)], limits, max_tokens=2, beams=25, best=3))(hears)
    assert np.abs(np.asarray(alone.scores) - np.asarray(found.scores)).max() > 0.1, "negative control"

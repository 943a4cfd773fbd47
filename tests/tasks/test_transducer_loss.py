"""The transducers' losses against the enumeration of all alignments, closed forms, differences, and their memory."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.tasks import _transducer_loss as tl

T, U, V, J = 4, 3, 5, 6
#                  full  short text  few frames  one frame  no text  no frames
LENGTHS = np.array([4, 4, 2, 1, 3, 0], np.int32)
TOKEN_LENGTHS = np.array([3, 1, 3, 2, 0, 2], np.int32)
TOKENS = np.array([[1, 2, 1], [3, 4, 4], [4, 4, 4], [2, 1, 3], [3, 3, 3], [1, 2, 3]], np.int32)
KEPT = [True, True, True, True, False, False]
B = len(LENGTHS)
KINDS = {"rnnt": (), "tdt": (0, 1, 2, 3), "no zero": (1, 2), "plain by durations": (0, 1)}


def networks(durations: tuple[int, ...] = (), seed: int = 0) -> tuple[Any, ...]:
    """(frames, texts, kernel) of noise; chances far from even."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, J), (B, U + 1, J), (J, V + len(durations))
    return tuple(rng.normal(size=shape).astype(np.float32) * 1.5 for shape in shapes)


def joiner(kernel: Any) -> Any:
    return lambda frames, texts: jnp.tanh(frames + texts) @ kernel


@functools.partial(jax.jit, static_argnames=("durations", "chunk", "sigma", "fastemit"))
def losses(x: Any, lengths=LENGTHS, tokens=TOKENS, token_lengths=TOKEN_LENGTHS, *, durations=(), chunk=2, **options):
    frames, texts, kernel = x
    text = lengths, tokens, token_lengths
    return tl.transducer_loss(joiner(kernel), frames, texts, *text, durations=durations, chunk=chunk, **options)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def tables(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [B, T, U + 1, V] of tokens and [B, T, U + 1, R] of durations, in float64."""
    frames, texts, kernel = (a.astype(np.float64) for a in x)
    logits = np.tanh(frames[:, :, None] + texts[:, None]) @ kernel
    return log_softmax(logits[..., :V]), log_softmax(logits[..., V:]) if kernel.shape[1] > V else logits[..., V:]


def alignments(frames: int, text: list[int], durations: tuple[int, ...]) -> Any:
    """All of them as lists of (t, u, symbol, number of the duration), by their definition: one step after another."""

    def walk(t, u, path):
        steps = [(tl.BLANK, (0, 1, None)), *([(text[u], (0, 0, None))] if u < len(text) else [])]
        if durations:
            steps = [(s, (0, d, i)) for s, _ in steps for i, d in enumerate(durations) if d or s != tl.BLANK]
        for symbol, (_, d, i) in steps:
            now = [*path, (t, u, symbol, i)]
            after = t + d, u + (symbol != tl.BLANK)
            if after == (frames, len(text)) and symbol == tl.BLANK:
                yield now
            elif after[0] < frames:
                yield from walk(*after, now)

    return walk(0, 0, []) if frames else iter(())


def enumerated(x: Any, row: int, durations: tuple[int, ...], sigma: float = 0.0) -> float:
    words, spans = tables(x)
    text = TOKENS[row, : TOKEN_LENGTHS[row]].tolist()
    total = 0.0
    for path in alignments(int(LENGTHS[row]), text, durations):
        logs = (words[row, t, u, s] - sigma + (spans[row, t, u, i] if durations else 0) for t, u, s, i in path)
        total += math.exp(sum(logs))
    return -math.log(total)


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 9])
def test_the_loss_is_the_sum_over_all_alignments(kind, chunk):
    durations = KINDS[kind]
    x = networks(durations)
    found = np.asarray(losses(x, durations=durations, chunk=chunk))
    kept = np.asarray(tl.fits(LENGTHS, TOKEN_LENGTHS, durations)).tolist()
    assert kept == ([True, True, False, False, False, False] if kind == "no zero" else KEPT)
    for row, fits in enumerate(kept):
        assert fits == (TOKEN_LENGTHS[row] > 0 and any(alignments(LENGTHS[row], [1] * TOKEN_LENGTHS[row], durations)))
        expected = enumerated(x, row, durations) if fits else 0.0
        assert found[row] == pytest.approx(expected, rel=2e-6), row  # float32, sums of a few terms
    if durations:
        other = np.asarray(losses((*x[:2], x[2][:, :V]), chunk=chunk))
        assert abs(other[0] - found[0]) > 0.1, "negative control: durations count"


def test_rows_without_tokens_are_all_blanks():
    """`log_likelihood` itself knows them; `transducer_loss` leaves them out, because no transcript is no silence."""
    x = networks()
    words, _ = tables(x)
    arcs = tl._arcs(joiner(x[2]), *map(jnp.asarray, (*x[:2], TOKENS)), (), 2)
    none = np.zeros(B, np.int32)
    found = np.asarray(tl.log_likelihood(arcs, LENGTHS, none))
    blanks = [words[row, :n, 0, tl.BLANK].sum() for row, n in enumerate(LENGTHS)]
    np.testing.assert_allclose(found, blanks, rtol=1e-6, atol=1e-6)
    assert not np.asarray(losses(x, token_lengths=none)).any()


@pytest.mark.parametrize(("frames", "size"), [(1, 4), (7, 1), (300, 60)])
def test_even_chances_have_a_closed_form(frames, size):
    """C(T + U - 1, U) alignments of T + U steps, each of probability 1 / V; float32 sums over 360 diagonals."""
    x = jnp.zeros((1, frames, J)), jnp.zeros((1, size + 1, J)), jnp.zeros((J, V))
    row = np.array([frames], np.int32), np.ones((1, size), np.int32), np.array([size], np.int32)
    ways = math.lgamma(frames + size) - math.lgamma(size + 1) - math.lgamma(frames)
    found = float(losses(x, *row, chunk=16)[0])
    assert found == pytest.approx((frames + size) * math.log(V) - ways, rel=1e-5)
    one_duration = (*x[:2], jnp.zeros((J, V + 1)))
    if frames > size:  # T steps, the last a blank
        ways = math.lgamma(frames) - math.lgamma(size + 1) - math.lgamma(frames - size)
        found = float(losses(one_duration, *row, durations=(1,), chunk=16)[0])
        assert found == pytest.approx(frames * math.log(V) - ways, rel=1e-5)


def test_sigma_costs_each_step():
    """Xu et al. take it off tokens and blanks, so that long durations, fewer steps, gain."""
    durations, x = KINDS["tdt"], networks(KINDS["tdt"])
    found = np.asarray(losses(x, durations=durations, sigma=0.3))
    assert found[0] == pytest.approx(enumerated(x, 0, durations, sigma=0.3), rel=2e-6)
    plain = np.asarray(losses(x, durations=durations))
    assert found[3] == pytest.approx(plain[3] + 3 * 0.3, rel=1e-6), "one frame: two tokens and a blank, however"
    assert found[0] - plain[0] > 4 * 0.3, "three tokens and at least a blank"


# ------------------------------------------------------------------------------------------- gradients


def gradient(x: Any, **options: Any) -> Any:
    return jax.tree.map(np.asarray, jax.grad(lambda x: jnp.sum(losses(x, **options)))(x))


@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_gradients_are_those_of_the_enumeration(kind):
    """By differences of the float64 enumeration, step 1e-5: exact to about 1e-9; the rest is float32."""
    durations = KINDS[kind]
    x = networks(durations)
    found = gradient(x, durations=durations)
    exact = [a.astype(np.float64) for a in x]
    rng = np.random.default_rng(1)
    rows = [row for row in range(B) if KEPT[row]]
    for part in range(3):
        for _ in range(5):
            at = tuple(rng.integers(n) for n in x[part].shape)
            ends = []
            for sign in (1, -1):
                moved = [a.copy() for a in exact]
                moved[part][at] += sign * 1e-5
                ends.append(sum(enumerated(moved, row, durations) for row in rows))
            assert found[part][at] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=2e-5), (part, at)
    assert all(np.abs(g).max() > 0.1 for g in found), "negative control"


def test_what_does_not_count_has_no_gradient():
    frames, texts, _ = gradient(networks())
    for row, kept in enumerate(KEPT):
        assert np.isfinite(frames[row]).all()
        assert frames[row, : LENGTHS[row]].any() == texts[row, : TOKEN_LENGTHS[row] + 1].any() == kept
        assert not frames[row, LENGTHS[row] :].any()
        assert not texts[row, TOKEN_LENGTHS[row] + 1 :].any()


@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_padding_is_not_heard(kind):
    x = networks(KINDS[kind])
    inside = np.arange(T) < LENGTHS[:, None], np.arange(U + 1) <= TOKEN_LENGTHS[:, None]
    loud = [np.where(keep[..., None], a, 40 * a[::-1]) for keep, a in zip(inside, x, strict=False)]
    tokens = np.where(np.arange(U) < TOKEN_LENGTHS[:, None], TOKENS, 4)
    run = jax.jit(jax.value_and_grad(lambda x, t: jnp.sum(losses(x, tokens=t, durations=KINDS[kind]))))
    quiet, noisy = run(x, TOKENS), run((*loud, x[2]), tokens)
    jax.tree.map(np.testing.assert_array_equal, noisy, quiet)
    assert run((1.1 * loud[0], loud[1], x[2]), tokens)[0] != quiet[0], "negative control"


def test_long_rows_keep_their_gradient(monkeypatch):
    """Shares of alignments through the frames of a diagonal add up to 1 after 1,200 steps in float32."""
    frames, size = 1000, 200
    rng = np.random.default_rng(0)
    arcs = 3 * np.log(rng.uniform(1e-3, 1, (1, frames, size + 1, 2)).astype(np.float32)) - 2
    lengths = np.array([frames], np.int32), np.array([size], np.int32)
    run = jax.jit(jax.value_and_grad(lambda x: jnp.sum(tl.log_likelihood(x, *lengths))))
    value, shares = run(arcs)
    assert value < -1000
    np.testing.assert_allclose(shares[..., 0].sum(axis=2), 1, rtol=2e-5)  # every frame is left by one blank
    np.testing.assert_allclose(shares[:, :, :-1, 1].sum(axis=1), 1, rtol=2e-5)  # every token is said once
    monkeypatch.setattr(tl, "_add", jnp.logaddexp)  # negative control: its derivatives add up to 1 within 4e-3 here
    _, rough = jax.jit(jax.value_and_grad(lambda x: jnp.sum(tl.log_likelihood(x, *lengths))))(arcs)
    assert np.abs(rough[..., 0].sum(axis=2) - 1).max() > 1e-3


def test_fastemit_is_more_gradient_for_tokens_only():
    x = networks()
    np.testing.assert_allclose(losses(x, fastemit=0.5), losses(x), rtol=1e-6)  # 1.5 x - 0.5 x
    arcs = tl._arcs(joiner(x[2]), *map(jnp.asarray, (*x[:2], TOKENS)), (), 2)
    kept = np.array(KEPT)
    shares = jax.grad(lambda a: jnp.sum(jnp.where(kept, tl.log_likelihood(a, LENGTHS, TOKEN_LENGTHS), 0)))(arcs)

    def surrogate(x, more):
        """A weighted sum of log-probabilities, weights fixed: what Yu et al.'s equations for the gradient say."""
        arcs = tl._arcs(joiner(x[2]), *x[:2], TOKENS, (), 2)
        return -jnp.sum(arcs * shares * jnp.array([1.0, 1 + more])[None, None, None])

    found = gradient(x, fastemit=0.5)
    for more, same in ((0.5, True), (0.0, False)):
        expected = jax.grad(surrogate)(tuple(map(jnp.asarray, x)), more)
        close = [np.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True)]
        assert all(close) == same


# ------------------------------------------------------------------------------------------- memory


def test_the_joint_logits_are_never_in_memory():
    """Temporaries of value and gradient against one [B, T, U + 1, V] of float32, of which autodiff holds several."""
    rows, frames, size, classes = 2, 256, 40, 200
    shapes = (rows, frames, J), (rows, size + 1, J), (J, classes)
    x = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    text = np.full(rows, frames, np.int32), np.ones((rows, size), np.int32), np.full(rows, size, np.int32)

    def temporaries(chunk, durations=()):
        def total(x):
            return jnp.sum(tl.transducer_loss(joiner(x[2]), *x[:2], *text, durations=durations, chunk=chunk))

        memory = jax.jit(jax.value_and_grad(total)).lower(x).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    joint = rows * frames * (size + 1) * classes * 4
    lattice = joint / classes
    # Half a dozen arrays of 8 of the 256 frames; lattices of blank and token, skewed, their gradients, and variables.
    assert temporaries(8) < 6 * joint * 8 / frames + 20 * lattice < joint / 3
    assert temporaries(8, durations=(0, 1, 2)) < joint / 2
    assert temporaries(frames) > 2 * joint, "negative control: in one part"


# ------------------------------------------------------------------------------------------- beside the loss


def test_tokens_are_in_the_frames_most_alignments_say():
    for durations in ((), KINDS["tdt"]):
        x = networks(durations)
        text = LENGTHS, TOKENS, TOKEN_LENGTHS
        found = np.asarray(tl.token_frames(joiner(x[2]), *x[:2], *text, durations=durations, chunk=3))
        words, spans = tables(x)
        for row, kept in enumerate(KEPT):
            n = TOKEN_LENGTHS[row] if kept else 0
            assert (found[row, n:] == -1).all()
            shares = np.zeros((T, U))
            for path in alignments(int(LENGTHS[row]), TOKENS[row, :n].tolist(), durations) if kept else ():
                logs = (words[row, t, u, s] + (spans[row, t, u, i] if durations else 0) for t, u, s, i in path)
                probability = math.exp(sum(logs))
                for t, u, symbol, _ in path:
                    if symbol != tl.BLANK:
                        shares[t, u] += probability
            assert found[row, :n].tolist() == shares.argmax(axis=0)[:n].tolist()


@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_chance_is_the_best_constant_answer(kind):
    """By the loss itself, from constant logits; without durations no other constant is better."""
    rng = np.random.default_rng(3)
    durations = () if kind == "rnnt" else (0, 1, 2)
    rows, frames, size = 6, 30, 12
    tokens = rng.choice(V, (rows, size), p=[0, 0.5, 0.25, 0.15, 0.1]).astype(np.int32)
    lengths, token_lengths = (rng.integers(low, n + 1, rows).astype(np.int32) for low, n in ((15, frames), (3, size)))
    lengths[0], token_lengths[1] = 0, 0
    text = lengths, tokens, token_lengths
    x = jnp.zeros((rows, frames, 1)), jnp.zeros((rows, size + 1, 1))

    @jax.jit
    def of(logits):
        join = lambda frames, texts: (frames + texts) + logits[None, None, None]  # noqa: E731
        return jnp.sum(tl.transducer_loss(join, *x, *text, durations=durations, chunk=8))

    kept = (lengths > 0) & (token_lengths > 0)
    counts = np.zeros(V, np.float32)
    for row in np.flatnonzero(kept):
        counts += np.bincount(tokens[row, : token_lengths[row]], minlength=V).astype(np.float32)
        counts[0] += lengths[row] - (token_lengths[row] if durations else 0)
    best = np.concatenate([np.log(np.maximum(counts, 1e-30)), [-40, 0, -40] if durations else []]).astype(np.float32)
    chance = np.asarray(tl.constant_loss(V, *text, durations=durations))
    assert (chance > 0).tolist() == kept.tolist()
    assert float(of(best)) == pytest.approx(chance.sum(), rel=1e-5)
    for symbol, change in itertools.product(range(3), (-0.2, 0.2)):
        assert float(of(best + change * (np.arange(len(best)) == symbol))) > chance.sum() + 1e-3


def test_chance_of_rows_with_more_tokens_than_frames():
    """With durations: C(T - 1, U) has nothing to say of them; they pay for their tokens."""
    text = np.array([2, 9], np.int32), np.array([[1, 1, 2, 2], [1, 2, 0, 0]], np.int32), np.array([4, 2], np.int32)
    found = np.asarray(tl.constant_loss(V, *text, durations=(0, 1)))
    share = 7 / 9  # of blanks in the other row
    steps = -math.log(math.comb(8, 2)) - 7 * math.log(share) - 2 * math.log(1 - share)
    np.testing.assert_allclose(found, [4 * math.log(2), 2 * math.log(2) + steps], rtol=1e-5)

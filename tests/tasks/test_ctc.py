"""CTC by itself: losses, gradients and decoding against the enumeration of all paths of five frames."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from speechjax.tasks import _ctc

V, T = 3, 5
#                  plain   repeats  too many  none    short    repeat that just fits
TOKENS = np.array([[1, 2, 1], [1, 1, 2], [1, 1, 1], [2, 1, 2], [2, 2, 0], [1, 1, 0]], np.int32)
TOKEN_LENGTHS = np.array([3, 3, 3, 0, 2, 2], np.int32)
TIMES = np.array([5, 5, 4, 5, 2, 3], np.int32)
FITS = [True, True, False, False, False, True]


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(len(TIMES), T, V)).astype(np.float32) * 2


@pytest.fixture(scope="module")
def paths(logits):
    """For every row {transcript: (its probability, [T, V] the part of it through each symbol)}, by enumeration."""
    found: list[dict[tuple[int, ...], Any]] = []
    for x, frames in zip(logits.astype(np.float64), TIMES, strict=True):
        p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
        sums: dict[tuple[int, ...], Any] = {}
        for path in itertools.product(range(V), repeat=int(frames)):
            text = tuple(s for s, _ in itertools.groupby(path) if s != _ctc.BLANK)
            probability, through = sums.setdefault(text, [0.0, np.zeros((T, V))])
            own = math.prod(p[t, s] for t, s in enumerate(path))
            through[np.arange(frames), path] += own
            sums[text][0] = probability + own
        found.append(sums)
    return found


def text_of(row: int) -> tuple[int, ...]:
    return tuple(TOKENS[row, : TOKEN_LENGTHS[row]].tolist())


def test_the_loss_is_the_sum_over_all_paths(logits, paths):
    loss = np.asarray(_ctc.ctc_loss(logits, TIMES, TOKENS, TOKEN_LENGTHS))
    for row, fits in enumerate(FITS):
        expected = -math.log(paths[row][text_of(row)][0]) if fits else 0.0
        assert loss[row] == pytest.approx(expected, rel=1e-5), row  # float32
    other_blank = optax.ctc_loss(logits, np.zeros((6, T)), TOKENS, np.zeros((6, 3)), blank_id=V - 1)
    assert abs(other_blank[0] - loss[0]) > 0.1, "negative control: the blank is 0, <pad> of every vocabulary"


def test_what_does_not_fit_has_neither_loss_nor_gradient(logits):
    """The trap: fewer frames than tokens and blanks between equal ones; PyTorch's zero_infinity."""
    assert np.asarray(_ctc.fits(TIMES, TOKENS, TOKEN_LENGTHS)).tolist() == FITS
    grad = np.asarray(jax.grad(lambda x: jnp.sum(_ctc.ctc_loss(x, TIMES, TOKENS, TOKEN_LENGTHS)))(logits))
    assert np.isfinite(grad).all()
    assert [bool(g.any()) for g in grad] == FITS
    assert not any(g[t:].any() for g, t in zip(grad, TIMES, strict=True)), "padding has no gradient"
    paddings = (np.arange(T) >= TIMES[:, None]).astype(np.float32)
    bare = optax.ctc_loss(logits, paddings, TOKENS, (np.arange(3) >= TOKEN_LENGTHS[:, None]).astype(np.float32))
    assert bare[2] > 1e4, "negative control: unguarded, an impossible transcript outweighs all others"


def test_padding_is_not_heard(logits):
    noise = np.where(np.arange(T)[None, :, None] < TIMES[:, None, None], logits, 50 * logits[::-1])
    for function in (_ctc.ctc_loss, _ctc.greedy_errors, _ctc.alignment):
        quiet, loud = (np.asarray(function(x, TIMES, TOKENS, TOKEN_LENGTHS)) for x in (logits, noise))
        np.testing.assert_array_equal(quiet, loud)


def test_the_loss_is_float32_whatever_the_logits_are(logits):
    coarse = jnp.asarray(logits, jnp.bfloat16)
    loss = _ctc.ctc_loss(coarse, TIMES, TOKENS, TOKEN_LENGTHS)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, _ctc.ctc_loss(coarse.astype(jnp.float32), TIMES, TOKENS, TOKEN_LENGTHS))


def test_the_alignment_is_the_likeliest_symbol_among_the_paths_of_the_transcript(logits, paths):
    found = np.asarray(_ctc.alignment(logits, TIMES, TOKENS, TOKEN_LENGTHS))
    for row, fits in enumerate(FITS):
        frames = TIMES[row]
        assert (found[row, frames:] == -1).all()
        if not fits:
            assert (found[row] == -1).all()
            continue
        _, through = paths[row][text_of(row)]
        np.testing.assert_array_equal(found[row, :frames], through[:frames].argmax(axis=1))
    assert (found[0] != logits[0].argmax(axis=1)).any(), "negative control: it is not the best path"


def test_the_constant_answer_is_the_best_there_is():
    """24 tokens in 100 frames, of 9 kinds: no other constant distribution has a lower loss."""
    rng = np.random.default_rng(1)
    tokens = rng.choice(9, (8, 24), p=rng.dirichlet(np.ones(9))).astype(np.int32) + 1
    lengths, token_lengths = np.full(8, 100, np.int32), np.full(8, 24, np.int32)
    token_lengths[0], lengths[1] = 0, 20  # without transcript; does not fit: neither counts

    @jax.jit
    def of(share):
        log = jnp.broadcast_to(jnp.log(share), (8, 100, 10))
        return jnp.sum(_ctc.ctc_loss(log, lengths, tokens, token_lengths))

    chance = float(jnp.sum(_ctc.constant_loss(10, 100, lengths, tokens, token_lengths)))
    counts = np.bincount(tokens[2:].ravel(), minlength=10).astype(np.float32)
    counts[0] = 6 * (100 - 24)
    share = counts / counts.sum()
    assert chance == pytest.approx(float(of(np.maximum(share, 1e-37))), rel=1e-5)
    for symbol, factor in itertools.product((0, 1, 5), (0.7, 1.4)):
        other = share * np.where(np.arange(10) == symbol, factor, 1)
        # A blank is a little likelier in the optimum than in the counts: 0.1 % of the loss.
        assert float(of(np.maximum(other / other.sum(), 1e-37).astype(np.float32))) > 0.999 * chance


def levenshtein(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def test_errors_are_levenshteins():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(40, 12, 4)).astype(np.float32)
    lengths = rng.integers(0, 13, 40).astype(np.int32)
    tokens = rng.integers(1, 4, (40, 7)).astype(np.int32)
    token_lengths = rng.integers(0, 8, 40).astype(np.int32)
    found = np.asarray(_ctc.greedy_errors(logits, lengths, tokens, token_lengths))
    expected = []
    for x, t, text, u in zip(logits, lengths, tokens, token_lengths, strict=True):
        said = [s for s, _ in itertools.groupby(x[:t].argmax(axis=1).tolist()) if s != _ctc.BLANK]
        expected.append(levenshtein(said, text[:u].tolist()))
    assert found.tolist() == expected
    assert {0, 7} <= {*expected, *token_lengths.tolist()}  # the empty ones are among them

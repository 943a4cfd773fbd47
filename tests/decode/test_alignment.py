"""CTC's forced alignment against the enumeration of all paths, and its times."""

import itertools

import jax
import numpy as np

from speechjax.decode.alignment import ctc_align

V, T = 4, 6
#                  plain   repeats  too few frames  none    held    one frame
TOKENS = np.array([[1, 2, 1], [1, 1, 2], [2, 2, 2], [3, 2, 2], [2, 0, 0], [3, 0, 0]], np.int32)
TOKEN_LENGTHS = np.array([3, 3, 3, 0, 1, 1], np.int32)
LENGTHS = np.array([6, 5, 4, 6, 6, 1], np.int32)


def best_paths(logits):
    """For every row (score, path) of the likeliest path that says the transcript; None where there is none."""
    for row, x in enumerate(np.asarray(jax.nn.log_softmax(logits), np.float64)):
        text = tuple(TOKENS[row, : TOKEN_LENGTHS[row]].tolist())
        found = None
        for path in itertools.product(range(V), repeat=int(LENGTHS[row])):
            if tuple(s for s, _ in itertools.groupby(path) if s) == text:
                score = sum(x[t, s] for t, s in enumerate(path))
                found = max(found or (-np.inf, ()), (score, path))
        yield found


def test_it_is_the_likeliest_path_of_the_transcript():
    logits = np.random.default_rng(0).normal(size=(6, T, V)).astype(np.float32) * 2
    found = jax.jit(ctc_align)(logits, LENGTHS, TOKENS, TOKEN_LENGTHS)
    differs = 0
    for row, best in enumerate(best_paths(logits)):
        starts, ends = np.asarray(found.starts)[row].tolist(), np.asarray(found.ends)[row].tolist()
        if best is None:
            assert (starts, ends) == ([-1] * 3, [-1] * 3)
            assert found.scores[row] == -np.inf
            continue
        score, path = best
        np.testing.assert_allclose(found.scores[row], score, rtol=1e-5)  # float32
        runs, t = [], 0
        for symbol, run in itertools.groupby(path):
            n = len(list(run))
            runs += [(t, t + n)] if symbol else []
            t += n
        runs += [(-1, -1)] * (3 - len(runs))
        assert list(zip(starts, ends, strict=True)) == runs, row
        differs += path != tuple(logits[row, : LENGTHS[row]].argmax(axis=1).tolist())
    assert differs >= 4, "negative control: it is not the best path of any transcript"
    assert [best is None for best in best_paths(logits)] == [False, False, True, False, False, False]


def test_padding_is_not_heard():
    logits = np.random.default_rng(1).normal(size=(6, T, V)).astype(np.float32) * 2
    align = jax.jit(ctc_align)
    quiet = align(logits, LENGTHS, TOKENS, TOKEN_LENGTHS)
    outside = np.arange(T)[None, :, None] >= LENGTHS[:, None, None]
    beyond = np.arange(3)[None] >= TOKEN_LENGTHS[:, None]
    noise = np.where(outside, 50 * logits[::-1], logits)
    loud = align(noise, LENGTHS, np.where(beyond, 3, TOKENS), TOKEN_LENGTHS)
    for ours, its in zip(loud, quiet, strict=True):
        np.testing.assert_array_equal(ours, its)
    heard = align(noise, np.full(6, T, np.int32), TOKENS, TOKEN_LENGTHS)
    assert not np.array_equal(heard.starts, quiet.starts), "negative control"


def test_times_of_a_clear_transcript():
    """Frames 2-3 are one token, 5 the same again, 6-8 another: what a subtitle would show."""
    path = [0, 0, 1, 1, 0, 1, 2, 2, 2, 0]
    logits = (np.eye(V, dtype=np.float32)[path] * 9)[None]
    tokens, one = np.array([[1, 1, 2]], np.int32), lambda n: np.array([n], np.int32)
    found = ctc_align(logits, one(10), tokens, one(3))
    assert found.starts.tolist() == [[2, 5, 6]]
    assert found.ends.tolist() == [[4, 6, 9]]

"""The best path of CTC: merged, without blanks, with times, and the same in pieces."""

import itertools

import jax
import numpy as np
import pytest

from speechjax.decode import ctc

V, A, B, C, UNK, BOS, EOS = 7, 4, 5, 6, 3, 1, 2

greedy = jax.jit(ctc.greedy)


def says(*paths, strength=8.0):
    """Logits [B, T, V] whose best paths these are, noise elsewhere; and their lengths."""
    lengths = np.array([len(path) for path in paths], np.int32)
    logits = np.random.default_rng(0).normal(size=(len(paths), max(lengths) + 2, V)).astype(np.float32)
    for row, path in enumerate(paths):
        logits[row, np.arange(len(path)), list(path)] += strength
    return logits, lengths


def read(hypotheses, row=0, n=0):
    """(token, frame) pairs."""
    length = int(hypotheses.lengths[row, n])
    tokens, frames = np.asarray(hypotheses.tokens)[row, n], np.asarray(hypotheses.frames)[row, n]
    assert not tokens[length:].any()
    assert (frames[length:] == -1).all()
    return list(zip(tokens[:length].tolist(), frames[:length].tolist(), strict=True))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ([A, A, B, B], [(A, 0), (B, 2)]),
        ([A, 0, A, B], [(A, 0), (A, 2), (B, 3)]),  # only a blank makes two of the same token
        ([0, 0, C, 0, 0], [(C, 2)]),
        ([0, 0, 0], []),
        ([], []),
        ([BOS, A, EOS], [(A, 1)]),
        ([A, BOS, A], [(A, 0), (A, 2)]),  # another blank
        ([A, UNK, UNK], [(A, 0), (UNK, 1)]),  # a token like any other
    ],
)
def test_repeats_are_merged_and_blanks_left_out(path, expected):
    assert read(greedy(*says(path))) == expected


def test_rows_do_not_know_of_each_other_nor_of_padding():
    paths = [[A, A, 0, A], [], [0, B, C, C, 0, C], [UNK]]
    logits, lengths = says(*paths)
    together = greedy(logits, lengths)
    for row, path in enumerate(paths):
        alone = greedy(logits[row : row + 1], lengths[row : row + 1])
        assert read(together, row) == read(alone)
        best = jax.nn.log_softmax(logits[row])[np.arange(len(path)), path]
        np.testing.assert_allclose(together.scores[row, 0], best.sum(), rtol=1e-5, atol=1e-6)  # float32 sums
    outside = np.arange(logits.shape[1])[None, :, None] >= lengths[:, None, None]
    noisy = greedy(np.where(outside, 50 * logits[::-1], logits), lengths)
    assert all(read(noisy, row) == read(together, row) for row in range(4))
    np.testing.assert_array_equal(noisy.scores, together.scores)
    heard = greedy(np.where(outside, 50 * logits[::-1], logits), lengths + 1)
    assert any(read(heard, row) != read(together, row) for row in range(4)), "negative control: it is heard if valid"


@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [2, 0, 3, 4]])
def test_chunks_say_what_the_whole_says(cuts):
    """Also where a token is held across the cut, or two of the same are parted by it with a blank."""
    logits, lengths = says([A, A, A, B, 0, B, B, C, C], [A, 0, A, 0, A, 0, A, A, 0], [0, B, B])
    logits = logits[:, :9]
    whole = greedy(logits, lengths)
    decoder, first = ctc.Greedy(tokens=9), 0
    step, state = jax.jit(decoder.step), decoder.init(3)
    forgetful = []
    for cut in cuts:
        inside = np.clip(lengths - first, 0, cut).astype(np.int32)
        chunk = np.full((3, 5, V), 9.0, np.float32)  # longer than the chunk: its end is padding
        chunk[:, :cut] = logits[:, first : first + cut]
        state = step(state, chunk, inside)
        alone = step(decoder.init(3), chunk, inside)
        forgetful += [token for token, _ in read(decoder.result(alone))]
        first += cut
    for ours, its in zip(decoder.result(state), whole, strict=True):
        np.testing.assert_allclose(ours, its, rtol=1e-6)  # one sum over nine frames, or several
    if len(cuts) > 2:
        assert forgetful != [token for token, _ in read(whole)], "negative control: without the state it stutters"


def test_a_row_keeps_its_first_tokens_when_there_are_more_than_fit():
    logits, lengths = says([A, B, C, A, B])
    decoder = ctc.Greedy(tokens=3)
    found = decoder.result(decoder.step(decoder.init(1), logits, lengths))
    assert read(found) == [(A, 0), (B, 1), (C, 2)]


def test_random_paths_agree_with_a_loop():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(20, 15, V)).astype(np.float32)
    lengths = rng.integers(0, 16, 20).astype(np.int32)
    found = greedy(logits, lengths)
    for row in range(20):
        best = logits[row, : lengths[row]].argmax(axis=1).tolist()
        best = [0 if s < 3 else s for s in best]
        assert [token for token, _ in read(found, row)] == [s for s, _ in itertools.groupby(best) if s]

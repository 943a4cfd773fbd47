"""Span masks, slots and negatives against loops over rows and frames."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from speechjax.models.masking import masked_slots, max_masked, sample_negatives, slot_peers, span_mask

ROWS, FRAMES = 8, 61
RECIPES = [(0.65, 10), (0.8, 3), (0.3, 1), (0.05, 10)]  # probability, span
lengths_of_rows = st.lists(st.integers(0, FRAMES), min_size=ROWS, max_size=ROWS)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=25, deadline=None, derandomize=True)

jit_span_mask = jax.jit(span_mask, static_argnames=("frames", "prob", "span", "min_spans"))
jit_slots = jax.jit(masked_slots, static_argnums=1)
jit_peers = jax.jit(slot_peers)
jit_negatives = jax.jit(sample_negatives, static_argnums=2)


def draw_mask(seed: int, lengths, prob: float, span: int, frames: int = FRAMES) -> np.ndarray:
    lengths = jnp.asarray(lengths, jnp.int32)
    return np.asarray(jit_span_mask(jax.random.key(seed), lengths, frames, prob=prob, span=span))


def reference_mask(seed: int, lengths, prob: float, span: int, min_spans: int = 2) -> np.ndarray:
    """The published procedure, row by row, on the same random numbers."""
    count_key, start_key = jax.random.split(jax.random.key(seed))
    u = np.asarray(jax.random.uniform(count_key, (ROWS,)), np.float64)
    score = np.asarray(jax.random.bits(start_key, (ROWS, FRAMES), jnp.uint32)) >> 1
    mask = np.zeros((ROWS, FRAMES), bool)
    for row, t in enumerate(lengths):
        count = max(min_spans, math.floor(prob * t / span + u[row]))
        count = min(count, max(t - 1, 0) // span)
        starts = np.argsort(score[row, : max(t - span + 1, 0)])[:count]
        for start in starts:
            mask[row, start : start + span] = True
    return mask


@pytest.mark.parametrize(("prob", "span"), RECIPES)
@few
@given(lengths=lengths_of_rows, seed=seeds)
def test_span_mask_is_the_published_procedure(prob, span, lengths, seed):
    np.testing.assert_array_equal(draw_mask(seed, lengths, prob, span), reference_mask(seed, lengths, prob, span))


@pytest.mark.parametrize(("prob", "span"), RECIPES)
@few
@given(lengths=lengths_of_rows, seed=seeds)
def test_span_mask_properties(prob, span, lengths, seed):
    for t, row in zip(lengths, draw_mask(seed, lengths, prob, span), strict=True):
        masked = int(row.sum())
        assert not row[t:].any()
        assert masked < t or t == 0, "an utterance masked whole has nothing to predict from"
        if t <= span:
            assert masked == 0
            continue
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        assert (edges[1::2] - edges[::2] >= span).all(), "a span was cut"
        cap = (t - 1) // span
        least, most = (min(max(math.floor(prob * t / span) + extra, 2), cap) for extra in (0, 1))
        # Distinct starts: n spans cover at least span + n - 1 frames.
        assert span + least - 1 <= masked <= most * span
        assert masked <= max_masked(FRAMES, prob=prob, span=span)


@pytest.mark.parametrize("t", [7, 25, 61])
def test_number_of_spans_is_rounded_at_random_without_bias(t):
    """With spans of one frame the masked frames are the spans: distinct starts or the count would fall short."""
    counts = np.concatenate([draw_mask(seed, [t] * ROWS, 0.3, 1).sum(axis=1) for seed in range(150)])
    wanted = 0.3 * t
    assert set(counts) == {math.floor(wanted), math.floor(wanted) + 1}
    # 1200 draws of a coin: standard error 0.0145, four of them.
    assert abs(counts.mean() - wanted) < 0.06


def test_at_least_two_spans():
    """p * t / span is 0.3 here; two spans where they fit without masking everything, else one."""
    rows = draw_mask(3, [61, 61, 61, 61, 20, 20, 21, 21], 0.05, 10)
    assert (rows[:4].sum(axis=1) >= 11).all()
    assert (rows[:4].sum(axis=1) > 10).any()
    assert (rows[4:6].sum(axis=1) == 10).all()
    assert (rows[6:].sum(axis=1) >= 11).all()


def test_every_start_is_equally_likely_and_the_last_frame_is_maskable():
    t, span, draws = 31, 10, 600
    rows = np.concatenate([draw_mask(seed, [t] * ROWS, 0.05, span) for seed in range(draws)])
    # Two distinct starts of 22: frame 0 is masked by the first start only, the last by the last only.
    expected = 2 / (t - span + 1)
    error = 4 * math.sqrt(expected * (1 - expected) / len(rows))
    assert abs(rows[:, 0].mean() - expected) < error
    assert abs(rows[:, t - 1].mean() - expected) < error
    assert not rows[:, t:].any()


def test_share_masked_is_the_published_49_percent():
    mask = np.asarray(jit_span_mask(jax.random.key(0), jnp.full(1000, 781), 781, prob=0.65, span=10))
    assert mask.mean() == pytest.approx(0.49, abs=0.005)  # the recipe's own figure has two digits


@few
@given(lengths=lengths_of_rows, others=lengths_of_rows, row=st.integers(0, ROWS - 1), seed=seeds)
def test_rows_are_independent(lengths, others, row, seed):
    others = [*others[:row], lengths[row], *others[row + 1 :]]
    first, second = (draw_mask(seed, these, 0.65, 10)[row] for these in (lengths, others))
    np.testing.assert_array_equal(first, second)


def test_masks_follow_key_and_length():
    """Negative control of the independence test."""
    base = draw_mask(0, [61] * ROWS, 0.65, 10)
    assert (base != draw_mask(1, [61] * ROWS, 0.65, 10)).any(axis=1).all()
    assert (base != draw_mask(0, [45] * ROWS, 0.65, 10)).any(axis=1).all()
    assert len({row.tobytes() for row in base}) == ROWS


@pytest.mark.parametrize(("prob", "span"), RECIPES)
@pytest.mark.parametrize("frames", [0, 1, 9, 10, 11, 49, 200, 781])
def test_max_masked_is_an_attainable_bound(frames, prob, span):
    most = max_masked(frames, prob=prob, span=span)
    spans = max(math.floor(prob * frames / span) + 1, 2)
    assert most == max(1, min(frames, spans * span))


def test_span_mask_without_room_for_one_span():
    assert not draw_mask(0, [4, 3, 0], 0.65, 10, frames=4).any()


@pytest.mark.parametrize("slots", [1, 5, 20, 30])
@few
@given(seed=seeds, share=st.floats(0, 1))
def test_slots_list_the_masked_frames_in_order(slots, seed, share):
    mask = np.random.default_rng(seed).random((5, 20)) < share
    positions, valid = (np.asarray(a) for a in jit_slots(jnp.asarray(mask), slots))
    assert positions.dtype == np.int32
    assert positions.shape == valid.shape == (5, slots)
    for row in range(5):
        expected = np.flatnonzero(mask[row])[:slots]
        np.testing.assert_array_equal(positions[row][valid[row]], expected)
        np.testing.assert_array_equal(valid[row], np.arange(slots) < mask[row].sum())
        assert (positions[row] < 20).all(), "unused slots must point at a frame"


def draw_negatives(seed: int, counts: list[int], slots: int, negatives: int) -> np.ndarray:
    """For rows of one utterance with `counts` masked slots."""
    peers = np.arange(slots) < np.array(counts)[:, None, None]
    return np.asarray(jit_negatives(jax.random.key(seed), jnp.asarray(peers), negatives))


@few
@given(counts=st.lists(st.integers(0, 30), min_size=4, max_size=4), seed=seeds)
def test_negatives_are_other_masked_slots_of_the_utterance(counts, seed):
    drawn = draw_negatives(seed, counts, 30, 100)
    assert drawn.dtype == np.int32
    assert drawn.shape == (4, 30, 100)
    own = np.arange(30)[:, None]
    for count, row in zip(counts, drawn, strict=True):
        assert (row[: max(count, 0)] != own[: max(count, 0)]).all()
        assert (row >= 0).all()
        assert (row < max(count, 2)).all()


def test_negatives_stay_inside_the_slots():
    """A row of one frame has one slot; the index is unusable, but must not leave the array."""
    np.testing.assert_array_equal(draw_negatives(0, [0, 1], 1, 3), 0)


def chi_square(drawn: np.ndarray, allowed: list[int]) -> float:
    """p-value of `drawn` being uniform over `allowed`; zero if anything else was drawn."""
    seen = np.bincount(drawn.ravel(), minlength=max(allowed) + 1)
    if seen.sum() != seen[allowed].sum():
        return 0.0
    return float(stats.chisquare(seen[allowed]).pvalue) if len(allowed) > 1 else 1.0


def test_negatives_are_uniform():
    counts = [2, 3, 7, 40]
    drawn = draw_negatives(5, counts, 40, 8000)
    for row, count in enumerate(counts):
        for own in range(0, count, 3):
            others = [slot for slot in range(count) if slot != own]
            assert chi_square(drawn[row, own], others) > 1e-4
    # Negative controls: a draw that skips its neighbour, and one that can hit itself.
    others = [slot for slot in range(40) if slot != 3]
    assert chi_square(np.where(drawn[3, 3] == 4, 5, drawn[3, 3]), others) < 1e-9
    assert chi_square(np.where(drawn[3, 3] == 4, 3, drawn[3, 3]), others) == 0


def test_negatives_of_one_row_do_not_depend_on_the_others():
    first, second = (draw_negatives(1, counts, 30, 100) for counts in ([9, 30], [9, 4]))
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1] != second[1]).any()


# ------------------------------------------------------------------------------------------- packed rows


@st.composite
def packed_rows(draw) -> np.ndarray:
    """Segment ids [ROWS, FRAMES]: up to five segments a row, some with gaps between, some without frames."""
    ids = np.zeros((ROWS, FRAMES), np.int32)
    for row in ids:
        cuts = sorted(draw(st.lists(st.integers(0, FRAMES), min_size=10, max_size=10)))
        for i, (start, stop) in enumerate(zip(cuts[::2], cuts[1::2], strict=True)):
            row[start:stop] = i + 1
    return ids


def runs(ids: np.ndarray):
    """(row, first frame, frames) of every segment."""
    for b, row in enumerate(ids):
        for i in sorted(set(row.tolist()) - {0}):
            where = np.flatnonzero(row == i)
            yield b, int(where[0]), len(where)


def packed_reference(seed: int, ids: np.ndarray, prob: float, span: int, min_spans: int = 2) -> np.ndarray:
    """`reference_mask` of each segment; its random numbers are those at its frames, the first one's for the count."""
    count_key, start_key = jax.random.split(jax.random.key(seed))
    u = np.asarray(jax.random.uniform(count_key, ids.shape), np.float64)
    score = np.asarray(jax.random.bits(start_key, ids.shape, jnp.uint32)) >> 1
    mask = np.zeros(ids.shape, bool)
    for b, first, t in runs(ids):
        count = max(min_spans, math.floor(prob * t / span + u[b, first]))
        count = min(count, max(t - 1, 0) // span)
        for start in first + np.argsort(score[b, first : first + max(t - span + 1, 0)])[:count]:
            mask[b, start : start + span] = True
    return mask


@pytest.mark.parametrize(("prob", "span"), RECIPES)
@few
@given(ids=packed_rows(), seed=seeds)
def test_every_segment_gets_the_published_procedure(prob, span, ids, seed):
    mask = draw_mask(seed, ids, prob, span)
    np.testing.assert_array_equal(mask, packed_reference(seed, ids, prob, span))
    assert not mask[ids == 0].any()
    assert mask.sum(axis=1).max() <= max_masked(FRAMES, prob=prob, span=span, segments=5)


def test_spans_of_one_segment_do_not_depend_on_the_others():
    ids = np.repeat([[1] * 30 + [2] * 31], ROWS, axis=0)
    other = np.where(np.arange(FRAMES) < 45, ids, 0)
    base, cut = draw_mask(0, ids, 0.65, 10), draw_mask(0, other, 0.65, 10)
    np.testing.assert_array_equal(base[:, :30], cut[:, :30])
    assert (base[:, 30:] != cut[:, 30:]).any(axis=1).all()
    assert (base != draw_mask(0, np.ones_like(ids), 0.65, 10)).any(), "negative control: no border"


@pytest.mark.parametrize(("prob", "span"), RECIPES)
@pytest.mark.parametrize("segments", [2, 5])
@few
@given(data=st.data())
def test_max_masked_bounds_packed_rows(prob, span, segments, data):
    """The most spans that any draw could give to segments of these lengths."""
    lengths = data.draw(st.lists(st.integers(0, 6 * span + 2), min_size=segments, max_size=segments))
    spans = [min(max(math.ceil(prob * t / span), 2), max(t - 1, 0) // span) for t in lengths]
    assert span * sum(spans) <= max_masked(sum(lengths), prob=prob, span=span, segments=segments)


def test_max_masked_of_packed_rows_is_tight_and_needs_the_number_of_segments():
    """Three segments of 21 frames get two spans of ten each; nothing tells them from one of 63 but their number."""
    assert max_masked(63, prob=0.05, span=10, segments=3) == 60
    assert max_masked(63, prob=0.05, span=10) == 20


@few
@given(ids=packed_rows(), seed=seeds)
def test_peers_and_negatives_are_of_the_same_segment(ids, seed):
    slots = 40
    mask = draw_mask(seed, ids, 0.3, 1)
    positions, valid = jit_slots(jnp.asarray(mask), slots)
    peers = np.asarray(jit_peers(jnp.asarray(ids), positions, valid))
    drawn = np.asarray(jit_negatives(jax.random.key(seed), jnp.asarray(peers), 20))
    assert (drawn >= 0).all()
    assert (drawn < slots).all()
    positions, valid = np.asarray(positions), np.asarray(valid)
    for b, m in np.argwhere(valid):
        own = ids[b, positions[b, m]]
        expected = valid[b] & (ids[b, positions[b]] == own)
        np.testing.assert_array_equal(peers[b, m], expected)
        if expected.sum() > 1:
            assert expected[drawn[b, m]].all()
            assert (drawn[b, m] != m).all()


def test_negatives_of_packed_rows_are_uniform_over_the_segment():
    segment = np.array([0] * 3 + [1] * 7 + [2] * 10)
    peers = jnp.asarray(segment[:, None] == segment)[None]
    drawn = np.asarray(jit_negatives(jax.random.key(5), peers, 8000))
    for own in range(20):
        others = [m for m in range(20) if m != own and segment[m] == segment[own]]
        assert chi_square(drawn[0, own], others) > 1e-4
    assert chi_square(drawn[0, 3], list(range(4, 11))) < 1e-9, "negative control: one slot more"


def test_rows_of_one_utterance_have_one_answer_for_all_their_slots():
    positions, valid = jit_slots(jnp.asarray(np.eye(3, 8, dtype=bool)), 4)
    peers = jit_peers(jnp.array([8, 8, 8], jnp.int32), positions, valid)
    np.testing.assert_array_equal(peers, np.asarray(valid)[:, None])

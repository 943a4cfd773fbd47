"""The shapes of a plan: the least padding, against brute force and published lengths."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from librispeech_lengths import UTTERANCES, librispeech_like

from speechjax.data.plan import Plan, Shape, _least_padding, plan_shapes

quick = settings(deadline=None, max_examples=20)  # no deadline: the machine is shared


def cost(lengths, bounds):
    """Samples that these lengths take in rows of the next larger bound."""
    at = np.searchsorted(bounds, lengths)
    return int(np.asarray(bounds)[at].sum())


def candidates(lengths, crop, quantum, offset):
    """Every length that whole frames can give and some recording needs; written apart from the code."""
    found = set()
    for length in np.minimum(lengths, crop).tolist():
        frames = 1
        while frames * quantum + offset < length:
            frames += 1
        found.add(frames * quantum + offset)
    return sorted(found)


corpora = st.lists(st.integers(1, 400), min_size=1, max_size=40)
layouts = st.fixed_dictionaries(
    dict(
        crop=st.integers(20, 300), shapes=st.integers(1, 4), quantum=st.integers(7, 60), offset=st.integers(0, 15),
        batch_samples=st.integers(50, 5000), row_multiple=st.integers(1, 8),
    )
)  # fmt: skip


@quick
@given(corpora, layouts)
def test_shapes_have_the_least_padding_of_all_choices(corpus, layout):
    lengths = np.array(corpus)
    planned = plan_shapes(lengths, **layout)
    samples = [s.samples for s in planned]
    crop, quantum, offset = layout["crop"], layout["quantum"], layout["offset"]
    cropped = np.minimum(lengths, crop)
    assert samples == sorted(set(samples))
    assert len(samples) <= layout["shapes"]
    assert samples[-1] >= cropped.max()  # everything has a place
    assert all((s - offset) % quantum == 0 and s > offset for s in samples)
    for shape in planned:
        rows = layout["batch_samples"] / shape.samples
        assert shape.rows % layout["row_multiple"] == 0
        assert shape.rows >= layout["row_multiple"]
        assert abs(shape.rows - rows) <= layout["row_multiple"] / 2 or shape.rows == layout["row_multiple"]
    choices = candidates(lengths, crop, quantum, offset)
    subsets = (
        (*part, choices[-1])
        for n in range(min(layout["shapes"], len(choices)))
        for part in itertools.combinations(choices[:-1], n)
    )
    assert cost(cropped, samples) == min(cost(cropped, bounds) for bounds in subsets)


@quick
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=7), st.integers(1, 4))
def test_dynamic_program_equals_brute_force(steps, shapes):
    """Bounds grow by the first number, each holds the second number of examples."""
    bounds = np.cumsum([s for s, _ in steps])
    covered = np.cumsum([n for _, n in steps])
    lengths = np.repeat(bounds, [n for _, n in steps])
    chosen = _least_padding(bounds, covered, shapes)
    brute = min(
        cost(lengths, (*part, bounds[-1]))
        for n in range(min(shapes, len(bounds)))
        for part in itertools.combinations(bounds[:-1], n)
    )
    assert cost(lengths, chosen) == brute
    assert chosen[-1] == bounds[-1]
    assert len(chosen) <= shapes


def test_more_shapes_never_pad_more_and_do_help_here():
    lengths = np.random.default_rng(0).gamma(2, 30_000, 500).astype(int) + 4000
    layout = dict(crop=160_000, batch_samples=10**6, row_multiple=4, quantum=320, offset=80)
    costs = [
        cost(np.minimum(lengths, 160_000), [s.samples for s in plan_shapes(lengths, shapes=n, **layout)])
        for n in range(1, 7)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[3] < 0.7 * costs[0]


def test_a_corpus_of_many_lengths_is_planned_nearly_as_well_as_from_every_length():
    """4000 candidates are thinned to 2000, a step of 80 samples in 60,000; the control, one shape, pads far more."""
    lengths = np.random.default_rng(0).gamma(2, 30_000, 50_000).astype(int) + 4000
    layout = dict(crop=160_000, batch_samples=10**6, row_multiple=4, quantum=40, offset=8)
    cropped = np.minimum(lengths, 160_000)
    bounds = np.unique(-(-(cropped - 8) // 40)) * 40 + 8
    best = cost(cropped, _least_padding(bounds, np.searchsorted(np.sort(cropped), bounds, side="right"), 4))
    found = cost(cropped, [s.samples for s in plan_shapes(lengths, shapes=4, **layout)])
    assert found < 1.002 * best < 0.7 * cost(cropped, [s.samples for s in plan_shapes(lengths, shapes=1, **layout)])


def test_weights_count_examples_as_often_as_they_are_seen():
    rng = np.random.default_rng(0)
    lengths, weights = rng.integers(50, 5000, 300), rng.integers(1, 20, 300)
    layout = dict(crop=4000, batch_samples=10**5, row_multiple=1, quantum=20, offset=8, shapes=4)
    weighted = plan_shapes(lengths, **layout, weights=weights.astype(float))
    assert weighted == plan_shapes(np.repeat(lengths, weights), **layout)
    assert weighted != plan_shapes(lengths, **layout)


def test_librispeech_lengths_are_like_the_published_ones():
    seconds = librispeech_like() / 16000
    assert len(seconds) == UTTERANCES == 281_241
    assert seconds.sum() / 3600 == pytest.approx(960.9, rel=0.005)
    assert seconds.mean() == pytest.approx(12.3, abs=0.05)
    assert np.median(seconds) == pytest.approx(13.8, abs=0.1)
    assert (seconds.min(), seconds.max()) == (pytest.approx(1.3, abs=0.01), pytest.approx(35, abs=0.1))


def test_eight_shapes_waste_little_on_librispeech():
    """In % useful: 36.2, 80.9, 88.5 and 92.5 were measured on lengths simulated otherwise, of mean 12.7 s."""
    lengths = librispeech_like()
    useful = {}
    for shapes in (1, 3, 5, 8):
        planned = plan_shapes(
            lengths, crop=36 * 16000, batch_samples=512 * 16000, shapes=shapes, row_multiple=8, quantum=320, offset=80
        )
        share, kept = Plan(lengths, planned, 0).useful_share()
        assert kept == 1
        useful[shapes] = 100 * share
    assert useful[8] > 92
    for shapes, measured in {1: 36.2, 3: 80.9, 5: 88.5, 8: 92.5}.items():
        assert useful[shapes] == pytest.approx(measured, abs=1.5)


def test_published_front_end_gives_whole_frames():
    """400 samples for the first frame and 320 for every other: n frames take 320 n + 80 samples."""
    (shape,) = plan_shapes(
        np.array([10**6]), crop=250_000, shapes=1, batch_samples=10**6, row_multiple=2, quantum=320, offset=80
    )
    assert shape.samples == 781 * 320 + 80  # 780 frames hold 249,680: too few
    assert shape.rows == 4


def test_useful_share_by_hand():
    shapes, lengths = [Shape(4, 10), Shape(2, 20)], np.array([5, 10, 15, 40])
    useful, kept = Plan(lengths, shapes, 0).useful_share()
    assert useful == pytest.approx((5 + 10 + 15 + 20) / (10 + 10 + 20 + 20))
    assert kept == pytest.approx((5 + 10 + 15 + 20) / (5 + 10 + 15 + 40))
    # the second source, 10 and 40, three times an epoch
    useful, kept = Plan(lengths, shapes, 0, np.array([0, 1, 0, 1]), [1, 3]).useful_share()
    assert useful == pytest.approx((5 + 3 * 10 + 15 + 3 * 20) / (10 + 3 * 10 + 20 + 3 * 20))
    assert kept == pytest.approx((5 + 3 * 10 + 15 + 3 * 20) / (5 + 3 * 10 + 15 + 3 * 40))

"""The plan: shapes against brute force, and the pure function from a batch number to its rows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.data.pipeline import read_rows
from speechjax.data.plan import Plan, Rows, Shape, _least_padding, plan_shapes, useful_share
from speechjax.data.records import Records

quick = settings(deadline=None, max_examples=60)  # no deadline: the machine is shared


def make_records(lengths, seed=0):
    """Recordings of noise one after another, statistics that tell them apart."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int64)
    return Records(
        ids=[f"r{i}" for i in range(len(lengths))],
        lengths=lengths,
        offsets=np.cumsum(lengths) - lengths,
        mean=np.arange(len(lengths), dtype=np.float32),
        std=1 + np.arange(len(lengths), dtype=np.float32),
        meta=[{}] * len(lengths),
        audio=rng.integers(1, 2**15, int(lengths.sum()), np.int16),  # never 0, which is what padding is
    )


def same(a: Rows, b: Rows) -> bool:
    return a.shape == b.shape and all(np.array_equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


# ---- shapes


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
    # At most 40 lengths: the code's quantiles are then all of them, and brute force sees the same choices.
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


def test_a_large_corpus_is_planned_nearly_as_well_as_from_every_length():
    """Only 65 quantiles are tried there; the control is one shape, which pads far more."""
    lengths = np.random.default_rng(0).gamma(2, 30_000, 5000).astype(int) + 4000
    layout = dict(crop=160_000, batch_samples=10**6, row_multiple=4, quantum=320, offset=80)
    cropped = np.minimum(lengths, 160_000)
    bounds = np.array(candidates(np.unique(-(-cropped // 3200) * 3200), 160_000, 320, 80))
    best = cost(cropped, _least_padding(bounds, np.searchsorted(np.sort(cropped), bounds, side="right"), 4))
    found = cost(cropped, [s.samples for s in plan_shapes(lengths, shapes=4, **layout)])
    assert found < 1.02 * best < 0.7 * cost(cropped, [s.samples for s in plan_shapes(lengths, shapes=1, **layout)])


def test_published_front_end_gives_whole_frames():
    """400 samples for the first frame and 320 for every other: n frames take 320 n + 80 samples."""
    (shape,) = plan_shapes(
        np.array([10**6]), crop=250_000, shapes=1, batch_samples=10**6, row_multiple=2, quantum=320, offset=80
    )
    assert shape.samples == 781 * 320 + 80  # 780 frames hold 249,680: too few
    assert shape.rows == 4


def test_useful_share_by_hand():
    shapes = [Shape(4, 10), Shape(2, 20)]
    useful, kept = useful_share(np.array([5, 10, 15, 40]), shapes)
    assert useful == (5 + 10 + 15 + 20) / (10 + 10 + 20 + 20)
    assert kept == (5 + 10 + 15 + 20) / (5 + 10 + 15 + 40)


# ---- batches

SHAPES = [Shape(4, 100), Shape(2, 250)]


def corpus(n=50, seed=3):
    return np.random.default_rng(seed).integers(20, 400, n)


@quick
@given(st.data())
def test_any_order_of_access_gives_the_same_batches(data):
    lengths = corpus()
    first = [Plan(lengths, SHAPES, 7).batch(k) for k in range(60)]
    order = data.draw(st.permutations(range(60)))
    other = Plan(lengths, SHAPES, 7)
    for k in order:
        assert same(other.batch(k), first[k])
    assert same(other.batch(order[0]), first[order[0]])


@quick
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(0, 5), st.integers(0, 2**31 - 1))
def test_rows_stay_inside_their_recordings(corpus, epoch, seed):
    lengths = np.array(corpus)
    plan = Plan(lengths, SHAPES, seed)
    for k in range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch):
        rows = plan.batch(k)
        assert rows.shape in SHAPES
        assert all(len(x) == rows.shape.rows for x in rows[1:])
        assert np.array_equal(rows.count, np.minimum(lengths[rows.example], rows.shape.samples))
        assert np.all(rows.start >= 0)
        assert np.all(rows.start + rows.count <= lengths[rows.example])
        # the smallest shape that holds it, or the last
        smaller = [s.samples for s in SHAPES if s.samples < rows.shape.samples]
        assert np.all(lengths[rows.example] > max(smaller, default=0))


@quick
@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(0, 3))
def test_an_epoch_holds_an_example_at_most_once(corpus, epoch):
    """Except in a shape with fewer examples than rows, where the one batch holds all of them, evenly."""
    lengths = np.array(corpus)
    plan = Plan(lengths, SHAPES, 1)
    n = plan.batches_per_epoch
    batches = [plan.batch(k) for k in range(epoch * n, (epoch + 1) * n)]
    members = np.minimum(np.searchsorted([100, 250], lengths), 1)
    for i, shape in enumerate(SHAPES):
        own = [b.example for b in batches if b.shape == shape]
        held = int((members == i).sum())
        counts = np.bincount(np.concatenate(own), minlength=len(lengths))[members == i] if own else np.zeros(0, int)
        assert sum(map(len, own)) == (counts.sum() if own else 0)  # nothing from the other shape
        if held >= shape.rows:
            assert len(own) == held // shape.rows
            assert counts.max() == 1
        elif held:
            assert len(own) == 1
            assert counts.max() - counts.min() <= 1
            assert counts.min() >= 1
        else:
            assert not own


def test_leftovers_change_from_epoch_to_epoch():
    """Nobody is left out for ever: 51 examples in rows of 4 leave 3 waiting, others every time."""
    plan = Plan(np.full(51, 50), [Shape(4, 100)], 0)
    missing = []
    for epoch in range(40):
        seen = np.concatenate([plan.batch(epoch * 12 + k).example for k in range(12)])
        missing.append(np.setdiff1d(np.arange(51), seen))
    assert all(len(m) == 3 for m in missing)
    # 120 draws of 51: all but a few (51 e^-2.4 = 5 expected) have waited once, none for more than 12 epochs of 40
    counts = np.bincount(np.concatenate(missing), minlength=51)
    assert (counts > 0).sum() > 35
    assert counts.max() <= 12


def test_epochs_and_seeds_differ():
    lengths = corpus(200)
    plan, other = Plan(lengths, SHAPES, 0), Plan(lengths, SHAPES, 1)
    n = plan.batches_per_epoch
    epochs = [[plan.batch(e * n + k) for k in range(n)] for e in range(3)]
    for a, b in itertools.combinations([*epochs, [other.batch(k) for k in range(n)]], 2):
        assert sum(same(x, y) for x, y in zip(a, b, strict=True)) == 0
        orders = [[x.shape.samples for x in part] for part in (a, b)]
        assert orders[0] != orders[1]  # the shapes come in another order, too
    assert same(plan.batch(5), Plan(lengths, SHAPES, 0).batch(5))


def test_shapes_are_mixed_within_an_epoch():
    lengths = np.concatenate([np.full(200, 50), np.full(100, 200)])
    plan = Plan(lengths, SHAPES, 0)
    order = [plan.batch(k).shape.samples for k in range(plan.batches_per_epoch)]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    # 50 + 50 batches in random order change shape 50 times, give or take 5; sorted by shape, once
    assert 30 < changes < 70


def test_crops_are_uniform_over_every_possible_start():
    lengths = np.full(8, 119)  # starts 0 to 19 for crops of 100
    plan = Plan(lengths, [Shape(8, 100)], 0)
    starts = np.concatenate([plan.batch(k).start for k in range(500)])
    counts = np.bincount(starts, minlength=20)
    assert len(counts) == 20
    # 4000 draws, 200 expected at each, 14 standard deviation: chi square of 19 degrees is below 44 in 99.9 %
    assert ((counts - 200) ** 2 / 200).sum() < 44


def test_crops_of_one_example_change_from_epoch_to_epoch():
    plan = Plan(np.full(4, 10_000), [Shape(4, 100)], 0)
    starts = {int(b.start[np.flatnonzero(b.example == 0)[0]]) for b in map(plan.batch, range(10))}
    assert len(starts) == 10


@pytest.mark.parametrize("lengths", [[30], [100], [101], [30, 300], [30, 40, 50, 300]])
def test_tiny_corpora_repeat_to_fill_a_batch(lengths):
    plan = Plan(np.array(lengths), SHAPES, 0)
    seen = [plan.batch(k) for k in range(plan.batches_per_epoch)]
    assert {int(i) for rows in seen for i in rows.example} == set(range(len(lengths)))
    assert all(np.all(rows.count > 0) for rows in seen)


@quick
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_sweep_covers_everything_once(corpus):
    lengths = np.array(corpus)
    batches = Plan(lengths, SHAPES, 0).sweep()
    full = np.concatenate([b.example for b in batches])
    assert np.array_equal(np.sort(full[full >= 0]), np.arange(len(lengths)))
    for rows in batches:
        assert len(rows.example) == rows.shape.rows
        assert rows.example[0] >= 0  # no batch without anything in it
        assert not rows.start.any()
        filled = rows.example >= 0
        assert np.array_equal(filled, np.sort(filled)[::-1])  # empty rows come last
        assert np.array_equal(rows.count[~filled], np.zeros((~filled).sum()))
        assert np.array_equal(rows.count[filled], np.minimum(lengths[rows.example[filled]], rows.shape.samples))


# ---- host slices


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("split", ["train", "sweep"])
def test_host_slices_put_together_are_the_global_batch(hosts, split):
    records = make_records(np.random.default_rng(1).integers(20, 400, 40))
    part = np.arange(3, 40, 2)
    shapes = [Shape(8, 100), Shape(4, 250)]
    plan = Plan(records.lengths[part], shapes, 5)
    for rows in [plan.batch(k) for k in range(2 * plan.batches_per_epoch)] if split == "train" else plan.sweep():
        slices = [read_rows(records, part, rows, host, hosts) for host in range(hosts)]
        assert all(len(s["audio"]) == rows.shape.rows // hosts for s in slices)
        batch = {k: np.concatenate([s[k] for s in slices]) for k in slices[0]}
        for r in range(rows.shape.rows):
            n = int(rows.count[r])
            assert batch["lengths"][r] == n
            assert not batch["audio"][r, n:].any()
            if rows.example[r] >= 0:
                i = part[rows.example[r]]
                at = records.offsets[i] + rows.start[r]
                np.testing.assert_array_equal(batch["audio"][r, :n], records.audio[at : at + n])
                assert (batch["mean"][r], batch["std"][r]) == (records.mean[i], records.std[i])


def test_a_slice_of_another_host_is_other_audio():
    """The control: were every host given the first rows, the test above would not be satisfied."""
    records = make_records(np.random.default_rng(1).integers(120, 400, 40))
    rows = Plan(records.lengths, [Shape(8, 100)], 5).batch(0)
    one, two = (read_rows(records, np.arange(40), rows, host, 2) for host in range(2))
    assert not np.array_equal(one["audio"], two["audio"])

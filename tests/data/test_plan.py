"""The plan: the pure function from a batch number to its rows."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_permutation import assert_even

from speechjax.data.plan import Plan, Rows, Shape, streams

quick = settings(deadline=None, max_examples=20)  # no deadline: the machine is shared


def same(a: Rows, b: Rows) -> bool:
    return a.shape == b.shape and all(np.array_equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


# ---- batches

SHAPES = [Shape(4, 100), Shape(2, 250)]


def corpus(n=50, seed=3):
    return np.random.default_rng(seed).integers(20, 400, n)


def batches_of(plan, epochs, quota=None):
    """How many batches hold this many (a multiple of 4) epochs of a plan with SHAPES, exactly.

    `quota`: entries of either shape in an epoch, if not one an example.
    """
    quota = np.bincount((plan.lengths > 100).astype(int), minlength=2) if quota is None else quota
    return epochs * int(quota[0]) // 4 + epochs * int(quota[1]) // 2


def times_seen(plan, stop, start=0):
    rows = [plan.batch(k).example[:, 0] for k in range(start, stop)]
    return np.bincount(np.concatenate(rows), minlength=len(plan.lengths))


def test_useful_share_is_that_of_the_batches():
    lengths = corpus(60)
    plan = Plan(lengths, SHAPES, 0)
    rows = [plan.batch(k) for k in range(batches_of(plan, 4))]
    audio, room = sum(b.count.sum() for b in rows), sum(b.shape.rows * b.shape.samples for b in rows)
    # after 4 epochs every example has been seen 4 times
    assert plan.useful_share() == (pytest.approx(audio / room), pytest.approx(audio / (4 * lengths.sum())))


@settings(quick, max_examples=8)
@given(st.data())
def test_any_order_of_access_gives_the_same_batches(data):
    lengths = corpus()
    first = [Plan(lengths, SHAPES, 7).batch(k) for k in range(25)]
    order = data.draw(st.permutations(range(25)))
    other = Plan(lengths, SHAPES, 7)
    for k in order:
        assert same(other.batch(k), first[k])
    assert same(other.batch(order[0]), first[order[0]])


@quick
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(0, 10**12), st.integers(0, 2**63 - 1))
def test_rows_stay_inside_their_recordings(corpus, first, seed):
    lengths = np.array(corpus)
    plan = Plan(lengths, SHAPES, seed)
    for k in range(first, first + 20):
        rows = plan.batch(k)
        assert rows.shape in SHAPES
        assert all(x.shape == (rows.shape.rows, 1) and x.dtype == np.int64 for x in rows[1:])
        assert np.array_equal(rows.count, np.minimum(lengths[rows.example], rows.shape.samples))
        assert np.all(rows.start >= 0)
        assert np.all(rows.start + rows.count <= lengths[rows.example])
        assert not rows.at.any()
        # the smallest shape that holds it, or the last
        smaller = [s.samples for s in SHAPES if s.samples < rows.shape.samples]
        assert np.all(lengths[rows.example] > max(smaller, default=0))


@quick
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(0, 2**31))
def test_every_example_is_seen_equally_often(corpus, seed):
    """Nobody waits and nobody repeats: after 4 epochs rows of 4 and of 2 are full, and all were seen 4 times."""
    plan = Plan(np.array(corpus), SHAPES, seed)
    stop = batches_of(plan, 4)
    assert np.all(times_seen(plan, stop) == 4)
    assert np.all(times_seen(plan, 3 * stop, start=stop) == 8)


def test_an_epoch_has_every_example_at_least_once_and_hardly_one_twice():
    lengths = np.full(51, 50)
    plan = Plan(lengths, [Shape(4, 100)], 0)
    first = times_seen(plan, 13)  # 52 rows
    assert np.array_equal(np.sort(first), [1] * 50 + [2])
    assert plan.batches_per_epoch == 13


def test_the_order_of_rows_does_not_depend_on_how_many_make_a_batch():
    """Another batch size, the same sequence of examples and of crops; the control is another seed."""
    lengths = np.full(64, 300)

    def rows(rows, seed=0):
        plan = Plan(lengths, [Shape(rows, 100)], seed)
        batches = [plan.batch(k) for k in range(64 // rows)]
        return {tuple(row) for b in batches for row in zip(b.example[:, 0], b.start[:, 0], strict=True)}

    assert rows(4) == rows(8) == rows(64)
    assert rows(4) != rows(4, seed=1)


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


def test_who_shares_a_batch_is_chance():
    """200 epochs of 20 examples in rows of 4: every pair meets alike, 200 * 5 * 6 / 190 = 32 times."""
    plan = Plan(np.full(20, 50), [Shape(4, 100)], 0)
    met = np.zeros((20, 20))
    for k in range(1000):
        example = plan.batch(k).example[:, 0]
        met[np.ix_(example, example)] += 1
    assert_even(met[np.triu_indices(20, 1)])


def test_shapes_are_mixed_within_an_epoch():
    lengths = np.concatenate([np.full(200, 50), np.full(100, 200)])
    plan = Plan(lengths, SHAPES, 0)
    order = [plan.batch(k).shape.samples for k in range(plan.batches_per_epoch)]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    # 50 + 50 batches in random order change shape 50 times, give or take 5; sorted by shape, once
    assert 30 < changes < 70


def test_crops_are_uniform_over_every_possible_start():
    plan = Plan(np.full(8, 119), [Shape(8, 100)], 0)  # starts 0 to 19
    starts = np.concatenate([plan.batch(k).start[:, 0] for k in range(250)])
    assert_even(np.bincount(starts, minlength=20))


def test_crops_of_one_example_change_from_epoch_to_epoch():
    plan = Plan(np.full(4, 10_000), [Shape(4, 100)], 0)
    starts = {int(b.start[b.example == 0][0]) for b in map(plan.batch, range(10))}
    assert len(starts) == 10


@pytest.mark.parametrize("lengths", [[30], [100], [101], [30, 300], [30, 40, 50, 300]])
def test_tiny_corpora_repeat_to_fill_a_batch(lengths):
    plan = Plan(np.array(lengths), SHAPES, 0)
    seen = [plan.batch(k) for k in range(batches_of(plan, 4))]
    assert {int(i) for rows in seen for i in rows.example.ravel()} == set(range(len(lengths)))
    assert all(np.all(rows.count > 0) for rows in seen)


# ---- mixtures


@quick
@given(st.lists(st.integers(1, 500), min_size=2, max_size=60), st.floats(0.05, 8), st.integers(0, 2**31))
def test_sources_come_at_their_rates_and_their_examples_equally_often(corpus, rate, seed):
    lengths, source = np.array(corpus), np.arange(len(corpus)) % 2
    plan = Plan(lengths, SHAPES, seed, source, [1, rate])
    long = (lengths > 100).astype(int)
    held = np.array([[((long == i) & (source == s)).sum() for s in (0, 1)] for i in (0, 1)])
    quota = np.where(held, np.maximum(np.round(held * [1, rate]), 1), 0).astype(int)
    seen = times_seen(plan, batches_of(plan, 4, quota.sum(axis=1)))
    for i, s in itertools.product((0, 1), (0, 1)):
        own = seen[(long == i) & (source == s)]
        assert own.sum() == 4 * quota[i, s]
        assert not len(own) or np.ptp(own) <= 1


def test_sources_are_mixed_all_the_time():
    """10,000 examples at rate 1 and 1,000 at rate 10: half and half, batch by batch."""
    source = (np.arange(11_000) >= 10_000).astype(np.int8)
    plan = Plan(np.full(11_000, 50), [Shape(100, 100)], 0, source, [1, 10])
    share = np.array([source[plan.batch(k).example].mean() for k in range(200)])
    assert abs(share.mean() - 0.5) < 1e-9  # one epoch: exact
    # 100 rows: standard deviation 0.05, of which 200 batches reach 4.5 once in 700 corpora
    assert abs(share - 0.5).max() < 0.225
    assert 0.04 < share.std() < 0.06


def test_neither_the_places_of_a_source_nor_its_parts_repeat_from_block_to_block():
    """A source at rate 1/2 has another half of itself in every second block, not the same two in turn."""
    source = np.arange(200) % 2
    (stream,) = streams(np.full(200, 50), [Shape(4, 100)], 0, source, [1, 0.5]).values()
    assert stream.block == 150
    examples = stream.examples(np.arange(4 * 150)).reshape(4, 150)
    for a, b in itertools.combinations(examples, 2):
        # one third from the second source: by chance 5/9 of the places agree, of 150 give or take 6
        assert 60 < (source[a] == source[b]).sum() < 107
    halves = [set(block[source[block] == 1].tolist()) for block in examples]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(1, 200, 2))
    assert 13 < len(halves[0] & halves[2]) < 37  # of 50, 25 by chance, deviation 2.5


# ---- cost


def test_a_batch_costs_no_memory_that_grows_with_the_corpus():
    """The control: an array over the 3,000,000 examples, even of bytes, would be seen."""
    plan = Plan(np.full(3_000_000, 50, np.int32), [Shape(16, 100)], 0)
    plan.batch(0)
    tracemalloc.start()
    try:
        for k in (1, 10**3, 10**6, 10**12):
            plan.batch(k)
        sweep = plan.sweep()
        for _ in range(3):
            next(sweep)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # runs of 64 batches, 1,024 rows


@quick
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_sweep_covers_everything_once(corpus):
    lengths = np.array(corpus)
    batches = list(Plan(lengths, SHAPES, 0).sweep())
    full = np.concatenate([b.example for b in batches])
    assert np.array_equal(np.sort(full[full >= 0]), np.arange(len(lengths)))
    for rows in batches:
        assert all(x.shape == (rows.shape.rows, 1) for x in rows[1:])
        assert rows.example[0] >= 0  # no batch without anything in it
        assert not rows.start.any()
        assert not rows.at.any()
        filled = rows.example >= 0
        assert np.array_equal(filled, np.sort(filled, axis=0)[::-1])  # empty rows come last
        assert not rows.count[~filled].any()
        assert np.array_equal(rows.count[filled], np.minimum(lengths[rows.example[filled]], rows.shape.samples))


# ---- host slices


@pytest.mark.parametrize("hosts", [2, 4])
def test_every_host_plans_the_same_batch_and_takes_its_own_rows(hosts):
    """Hosts share nothing but (seed, lengths): their slices put together are what one host alone would have."""
    lengths, shapes = corpus(40), [Shape(8, 100), Shape(4, 250)]
    alone = Plan(lengths, shapes, 5)
    others = [Plan(lengths.copy(), shapes, 5) for _ in range(hosts)]
    for k in range(3 * alone.batches_per_epoch):
        batch = alone.batch(k)
        share = batch.shape.rows // hosts
        for i, whole in enumerate(batch[1:], 1):
            slices = [plan.batch(k)[i][h * share : (h + 1) * share] for h, plan in enumerate(others)]
            assert np.array_equal(np.concatenate(slices), whole)
        assert not same(batch, Plan(lengths, shapes, 6).batch(k))

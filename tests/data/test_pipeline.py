"""The pipeline: what tf.data delivers is what the plan says, from any start, and what is held out stays apart."""

import numpy as np
import pytest
from test_plan import make_records

from speechjax.data import pipeline
from speechjax.data.pipeline import Data, read_rows
from speechjax.data.plan import Plan, Shape
from speechjax.errors import UserError

KINDS = dict(audio=np.int16, lengths=np.int32, mean=np.float32, std=np.float32)
SHAPES = [Shape(4, 100), Shape(4, 250)]
OPTIONS = dict(
    source="memory", seed=1, row_divisor=4, frame_len=(20, 5), crop_seconds=250 / 16000, batch_seconds=1000 / 16000,
    shapes=2, row_multiple=4, min_seconds=0.0, valid_seconds=10.0, include="", exclude="", max_bad_share=0.1,
    cache_dir="",
)  # fmt: skip


def random_lengths(n, seed=0):
    return np.random.default_rng(seed).integers(20, 400, n)


@pytest.fixture
def open_memory(monkeypatch):
    """`open_data` over records made by hand."""

    def opened(records, **changes):
        monkeypatch.setattr(pipeline, "open_records", lambda source, **filters: records)
        return pipeline.open_data(**{**OPTIONS, **changes})

    return opened


@pytest.fixture(scope="module")
def parts():
    """(records, train part, data over them)."""
    records = make_records(random_lengths(41))
    train = np.arange(1, 41)
    return records, train, Data(records, train, np.array([0]), SHAPES, seed=5)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        assert found[name].dtype == kind
        np.testing.assert_array_equal(found[name], wanted[name])


def test_batches_are_bitwise_those_of_the_plan(parts):
    records, train, data = parts
    plan = Plan(records.lengths[train], SHAPES, 5)
    assert data.batches_per_epoch == plan.batches_per_epoch
    stop = 2 * plan.batches_per_epoch + 3
    batches = list(data.train_batches(0, stop))
    assert len(batches) == stop
    for k, batch in enumerate(batches):
        assert_same(batch, read_rows(records, train, plan.batch(k)))
    assert {b["audio"].shape for b in batches} == {(4, 100), (4, 250)}


@pytest.mark.parametrize("start", [0, 1, 7, 18, 19])
def test_opening_at_any_batch_gives_the_rest_of_the_run(parts, start):
    *_, data = parts
    whole = list(data.train_batches(0, 19))
    rest = list(data.train_batches(start, 19))
    assert len(rest) == 19 - start
    for found, wanted in zip(rest, whole[start:], strict=True):
        assert_same(found, wanted)


def test_two_openings_and_two_readers_at_once_agree(parts):
    records, train, data = parts
    other = Data(records, train, np.array([0]), SHAPES, seed=5)
    for one, two, three in zip(
        data.train_batches(0, 12), data.train_batches(0, 12), other.train_batches(0, 12), strict=True
    ):
        assert_same(one, two)
        assert_same(one, three)


def test_another_seed_is_another_run(parts):
    """The control of the two tests above."""
    records, train, data = parts
    other = Data(records, train, np.array([0]), SHAPES, seed=6)
    pairs = zip(data.train_batches(0, 12), other.train_batches(0, 12), strict=True)
    assert not any(np.array_equal(a["audio"], b["audio"]) for a, b in pairs)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_disjoint_rows_of_the_same_batches(parts, hosts):
    *_, data = parts
    streams = [data.train_batches(3, 9, host, hosts) for host in range(hosts)]
    for whole, *slices in zip(data.train_batches(3, 9), *streams, strict=True):
        assert_same({k: np.concatenate([s[k] for s in slices]) for k in KINDS}, whole)


def test_a_reader_may_stop_early(parts):
    """Abandoning an iterator neither hangs nor disturbs the next one."""
    *_, data = parts
    stream = data.train_batches(0, 10**9)
    first = next(stream)
    stream.close()
    assert_same(next(data.train_batches(0, 1)), first)


def test_an_error_while_reading_reaches_the_loop(parts):
    records, train, _ = parts
    plan_knows_more = make_records(np.append(records.lengths[:-1], 10_000))
    data = Data(plan_knows_more, train, np.array([0]), SHAPES, seed=5)
    data.records = records  # its last recording is shorter than planned
    with pytest.raises(Exception, match=r"IndexError.*samples"):
        list(data.train_batches(0, data.batches_per_epoch + 4))


def test_held_out_batches_have_the_same_kinds_and_hold_everything_once(open_memory):
    records = make_records(random_lengths(300))
    data = open_memory(records)
    batches = list(data.valid_batches())
    for batch in batches:
        assert {k: v.dtype for k, v in batch.items()} == KINDS
        assert not batch["audio"][batch["lengths"] == 0].any()
    seen = held_out(data)
    assert len(seen) == len(set(seen)) > 10
    for host in range(2):
        for half, batch in zip(data.valid_batches(host, 2), batches, strict=True):
            assert_same(half, {k: np.split(v, 2)[host] for k, v in batch.items()})


# ---- what is held out


def held_out(data):
    """Indices of the held-out examples; `make_records` gives each its index as mean."""
    return [int(m) for b in data.valid_batches() for m, n in zip(b["mean"], b["lengths"], strict=True) if n]


def trained_on(data):
    """Indices of the examples that the first epochs train on."""
    batches = data.train_batches(0, 6 * data.batches_per_epoch)
    return {int(m) for b in batches for m in b["mean"]}


def with_ids(lengths, ids):
    records = make_records(lengths)
    records.ids[:] = ids
    return records


@pytest.mark.parametrize("seconds", [0.0, 0.1, 1e9])
def test_held_out_share_and_disjointness(open_memory, seconds):
    records = make_records(random_lengths(300))
    data = open_memory(records, valid_seconds=seconds)
    valid, train = set(held_out(data)), trained_on(data)
    assert valid
    assert not valid & train
    assert len(valid | train) > 295  # nothing vanishes; leftovers of six epochs may
    share = records.lengths[sorted(valid)].sum()
    limit = min(seconds * 16000, records.lengths.sum() / 10)
    assert share <= max(limit, 400)  # one recording at least
    assert share >= limit - 400  # and not much less than asked for


def test_held_out_depends_on_ids_alone(open_memory):
    records = make_records(random_lengths(100))
    same = [sorted(held_out(open_memory(records, seed=seed))) for seed in (1, 2)]
    assert same[0] == same[1]
    # The same recordings in another order: the same ids are held out.
    order = np.random.default_rng(0).permutation(100)
    shuffled = with_ids(records.lengths[order], [records.ids[i] for i in order])
    ids = {shuffled.ids[i] for i in held_out(open_memory(shuffled))}
    assert ids == {records.ids[i] for i in same[0]}
    # Other names are another choice.
    renamed = with_ids(records.lengths, [f"other{i}" for i in range(100)])
    assert sorted(held_out(open_memory(renamed))) != same[0]


def test_adding_recordings_moves_few(open_memory):
    lengths = random_lengths(440)
    before = set(held_out(open_memory(make_records(lengths[:400]))))
    after = set(held_out(open_memory(make_records(lengths))))
    assert len(before) > 30
    # A tenth more recordings: a tenth more are held out, of the old ones nearly the same as before.
    assert len({i for i in after if i < 400} ^ before) <= 0.15 * len(before)


def test_segments_of_one_recording_stay_together(open_memory):
    ids = [f"long{i // 5}#{i % 5:04d}" for i in range(300)]
    data = open_memory(with_ids(random_lengths(300), ids))
    valid = {ids[i].split("#")[0] for i in held_out(data)}
    assert valid
    assert not valid & {ids[i].split("#")[0] for i in trained_on(data)}
    assert len(held_out(data)) == 5 * len(valid)


@pytest.mark.parametrize("ids", [["only"], [f"one#{k:04d}" for k in range(20)]])
def test_a_single_recording_cannot_be_split(open_memory, ids):
    with pytest.raises(UserError, match="only one usable recording"):
        open_memory(with_ids(np.full(len(ids), 200), ids))


@pytest.mark.parametrize("short", range(6))
def test_a_very_long_recording_is_not_held_out(open_memory, short):
    """Whatever the hash says: of a long recording and a short one, the short one is held out."""
    ids = [*(f"long#{k:04d}" for k in range(20)), f"short{short}"]
    data = open_memory(with_ids(np.full(21, 200), ids))
    assert held_out(data) == [20]


def test_a_number_sign_in_a_file_name_is_not_a_segment(open_memory):
    """`take #1.wav`, `take #2.wav` are recordings of their own."""
    data = open_memory(with_ids(np.full(100, 200), [f"take #{k}" for k in range(100)]))
    assert 5 <= len(held_out(data)) <= 10


@pytest.mark.parametrize("n", [2, 3, 9])
def test_a_tiny_corpus_holds_one_out(open_memory, n):
    data = open_memory(make_records(np.full(n, 200)))
    assert len(held_out(data)) == 1
    assert len(trained_on(data)) == n - 1


# ---- opening


def test_rows_must_divide_over_the_devices(open_memory):
    records = make_records(random_lengths(50))
    with pytest.raises(UserError, match=r"row_multiple=6 must be a multiple of the 4 devices"):
        open_memory(records, row_multiple=6)
    assert all(s.rows % 8 == 0 for s in open_memory(records, row_multiple=8).shapes)


def test_planned_shapes_hold_whole_frames_and_the_crop(open_memory):
    data = open_memory(make_records(random_lengths(200)), shapes=3)
    samples = [s.samples for s in data.shapes]
    assert samples == sorted(samples)
    assert len(samples) == 3
    assert all((s - 5) % 20 == 0 for s in samples)
    assert 250 <= samples[-1] < 270
    assert all(abs(s.rows * s.samples - 1000) <= 2 * s.samples for s in data.shapes)


def test_the_log_states_what_was_planned(open_memory, caplog):
    records = make_records(random_lengths(200))
    with caplog.at_level("INFO", logger="speechjax"):
        data = open_memory(records)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("batches:")]
    assert f"{data.batches_per_epoch} batches an epoch" in line
    assert f"{len(held_out(data))} recordings" in line


def test_epochs_go_on_for_ever(parts):
    """Far beyond the first epoch: nothing grows, and the cost of opening does not either."""
    *_, data = parts
    far = 10**7
    a, b = (list(data.train_batches(far, far + 2)) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)

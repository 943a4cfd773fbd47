"""The pipeline: what tf.data delivers is what the plan says, from any start, and what is held out stays apart."""

import re

import numpy as np
import pytest
from memory import memory_records as make_records
from memory import random_lengths

from speechjax.data.fill import FillPlan
from speechjax.data.pipeline import Data, batch_spec, read_rows
from speechjax.data.plan import Plan, Shape
from speechjax.errors import UserError

KINDS = dict(audio=np.int16, lengths=np.int32, mean=np.float32, std=np.float32, unread=np.int32)
SHAPES = [Shape(4, 100), Shape(4, 250)]


def make_data(records, train, seed, **more):
    plan = Plan(records.lengths[train], SHAPES, seed)
    return Data(records, train, np.array([0]), plan, Plan(records.lengths[:1], SHAPES, seed), **more)


@pytest.fixture(scope="module")
def parts():
    """(records, train part, data over them)."""
    records = make_records(random_lengths(41))
    train = np.arange(1, 41)
    return records, train, make_data(records, train, 5)


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
    other = make_data(records, train, 5)
    for one, two, three in zip(
        data.train_batches(0, 12), data.train_batches(0, 12), other.train_batches(0, 12), strict=True
    ):
        assert_same(one, two)
        assert_same(one, three)


def test_another_seed_is_another_run(parts):
    """The control of the two tests above."""
    records, train, data = parts
    other = make_data(records, train, 6)
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
    data = make_data(plan_knows_more, train, 5)
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
    shuffled = make_records(records.lengths[order], [records.ids[i] for i in order])
    ids = {shuffled.ids[i] for i in held_out(open_memory(shuffled))}
    assert ids == {records.ids[i] for i in same[0]}
    # Other names are another choice.
    renamed = make_records(records.lengths, [f"other{i}" for i in range(100)])
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
    data = open_memory(make_records(random_lengths(300), ids))
    valid = {ids[i].split("#")[0] for i in held_out(data)}
    assert valid
    assert not valid & {ids[i].split("#")[0] for i in trained_on(data)}
    assert len(held_out(data)) == 5 * len(valid)


@pytest.mark.parametrize("ids", [["only"], [f"one#{k:04d}" for k in range(20)]])
def test_a_single_recording_cannot_be_split(open_memory, ids):
    with pytest.raises(UserError, match="only one usable recording"):
        open_memory(make_records(np.full(len(ids), 200), ids))


@pytest.mark.parametrize("short", range(6))
def test_a_very_long_recording_is_not_held_out(open_memory, short):
    """Whatever the hash says: of a long recording and a short one, the short one is held out."""
    ids = [*(f"long#{k:04d}" for k in range(20)), f"short{short}"]
    data = open_memory(make_records(np.full(21, 200), ids))
    assert held_out(data) == [20]


def test_a_number_sign_in_a_file_name_is_not_a_segment(open_memory):
    """`take #1.wav`, `take #2.wav` are recordings of their own."""
    data = open_memory(make_records(np.full(100, 200), [f"take #{k}" for k in range(100)]))
    assert 5 <= len(held_out(data)) <= 10


@pytest.mark.parametrize("n", [2, 3, 9])
def test_a_tiny_corpus_holds_one_out(open_memory, n):
    data = open_memory(make_records(np.full(n, 200)))
    assert len(held_out(data)) == 1
    assert len(trained_on(data)) == n - 1


# ---- opening


def shapes_of(data):
    return [Shape(*spec["audio"][0]) for spec in data.specs]


def test_rows_must_divide_over_the_devices(open_memory):
    records = make_records(random_lengths(50))
    with pytest.raises(UserError, match=r"row_multiple=6 must be a multiple of the 4 devices"):
        open_memory(records, row_multiple=6)
    assert all(s.rows % 8 == 0 for s in shapes_of(open_memory(records, row_multiple=8)))


def test_planned_shapes_hold_whole_frames_and_the_crop(open_memory):
    data = open_memory(make_records(random_lengths(200)), shapes=3)
    samples = [s.samples for s in shapes_of(data)]
    assert samples == sorted(samples)
    assert len(samples) == 3
    assert all((s - 5) % 20 == 0 for s in samples)
    assert 250 <= samples[-1] < 270
    assert all(abs(s.rows * s.samples - 1000) <= 2 * s.samples for s in shapes_of(data))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(row_multiple=0), "row_multiple=0 must be a multiple"),
        (dict(row_multiple=-4), "row_multiple=-4 must be a multiple"),
        (dict(crop_seconds=0.0), "crop_seconds=0.0: must be above 0"),
        (dict(batch_seconds=-3.0), "batch_seconds=-3.0: must be above 0"),
        (dict(batch_seconds=float("nan")), "batch_seconds=nan: must be above 0"),
        (dict(shapes=0), "shapes=0: must be above 0"),
        (dict(valid_seconds=-5.0), "valid_seconds=-5.0: must not be below 0"),
    ],
)
def test_values_that_make_no_sense(open_memory, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_memory(make_records(random_lengths(50)), **change)


def test_the_digest_knows_which_recordings_there_are(open_memory):
    lengths = random_lengths(50)
    same = [open_memory(make_records(lengths), seed=seed).digest for seed in (1, 2)]
    assert same[0] == same[1]
    longer, renamed = lengths.copy(), [f"x{i}" for i in range(50)]
    longer[3] += 1
    others = [make_records(longer), make_records(lengths[1:]), make_records(lengths, renamed)]
    assert len({same[0], *(open_memory(records).digest for records in others)}) == 4


# ---- rows that are filled


def test_filled_rows_carry_where_every_segment_begins(open_memory):
    records = make_records(random_lengths(300))
    # Two seconds are more than these recordings have, so all are whole, and a row of 3 s holds many.
    data = open_memory(records, fill=True, crop_seconds=3.0, batch_seconds=12.0)
    (spec,) = data.specs
    G = spec["lengths"][0][1]
    assert spec["audio"] == ((4, 48_000), np.int16)
    assert G > 20
    batch = next(data.train_batches(3, 4))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == spec
    starts, lengths = batch["starts"], batch["lengths"]
    assert (starts % 40 == 0).all()
    seen = set()
    for r in range(4):
        for g in np.flatnonzero(lengths[r]):
            i, n = int(batch["mean"][r, g]), lengths[r, g]
            np.testing.assert_array_equal(batch["audio"][r, starts[r, g] : starts[r, g] + n], records.read(i)[:n])
            assert n == records.lengths[i]
            seen.add(i)
    assert len(seen) > 4 * 20
    # Between the segments there is silence.
    assert np.count_nonzero(batch["audio"]) <= lengths.sum()
    # What is held out comes one a row, as ever.
    assert next(data.valid_batches())["lengths"].ndim == 1


def test_a_model_that_cannot_tell_segments_apart_gets_crops(open_memory, caplog):
    records = make_records(random_lengths(300))
    with caplog.at_level("INFO", logger="speechjax"):
        data = open_memory(records, fill=True, segment_align=0)
    assert data.specs == open_memory(records, fill=False).specs
    assert any("norm runs over time and would mix segments" in message for message in caplog.messages)


def test_hosts_share_filled_batches(open_memory):
    data = open_memory(make_records(random_lengths(300)), fill=True, crop_seconds=3.0, batch_seconds=12.0)
    whole = next(data.train_batches(5, 6))
    halves = [next(data.train_batches(5, 6, host, 2)) for host in range(2)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)


# ---- mixtures


def heard(data, records, epochs):
    """How often each part's samples come in some epochs, from the plan."""
    seconds = np.zeros(len(records.parts))
    for batch in data.train_batches(0, epochs * data.batches_per_epoch):
        for mean, length in zip(batch["mean"], batch["lengths"], strict=True):
            seconds[records.part[int(mean)]] += length
    return seconds / seconds.sum()


@pytest.mark.parametrize(
    ("weights", "temperature", "share"),
    [((1.0, 1.0), 1.0, 0.2), ((2.0, 1.0), 1.0, 1 / 3), ((1.0, 1.0), np.inf, 0.5), ((1.0, 1.0), 2.0, 1 / 3)],
)
def test_parts_are_heard_as_their_weights_and_the_temperature_say(open_memory, caplog, weights, temperature, share):
    """One fifth of the corpus is of part 0; all recordings are equally long."""
    records = make_records(np.full(300, 200), part=np.arange(300) >= 60, weights=weights)
    with caplog.at_level("INFO", logger="speechjax"):
        data = open_memory(records, temperature=temperature)
    assert heard(data, records, 8)[0] == pytest.approx(share, abs=0.03)  # what is held out shifts it a little
    assert any(message.startswith("mixture: ") and "memory:1" in message for message in caplog.messages)


def test_a_temperature_that_starves_small_parts_is_refused(open_memory):
    records = make_records(np.full(30, 200), part=np.arange(30) >= 6, weights=(1.0, 1.0))
    with pytest.raises(UserError, match=r"temperature=0\.5"):
        open_memory(records, temperature=0.5)


# ---- transcripts


def spoken(n):
    lengths = random_lengths(n)
    return make_records(lengths, meta=[{"text": "ab" * (1 + i % 7)} if i % 5 else {} for i in range(n)])


def test_transcripts_travel_with_whole_utterances(open_memory, tmp_path):
    records = spoken(200)
    data = open_memory(records, text="characters", text_steps="nfc", crop_seconds=300 / 16_000, workdir=tmp_path)
    tokenizer = data.transcripts.tokenizer
    tokenizer.save(tmp_path)
    some_cropped = False
    for batch in data.train_batches(0, 2 * data.batches_per_epoch):
        spec = next(spec for spec in data.specs if spec["audio"][0] == batch["audio"].shape)
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == spec
        for mean, length, ids, count in zip(
            batch["mean"], batch["lengths"], batch["tokens"], batch["token_lengths"], strict=True
        ):
            i = int(mean)
            cropped = length < records.lengths[i]
            some_cropped |= cropped
            wanted = "" if cropped else records.meta(i).get("text", "")
            assert tokenizer.decode(ids[:count]) == wanted
            assert not ids[count:].any()
    assert some_cropped
    # The workdir's vocabulary stays what it was, whatever the data is now.
    other = make_records(random_lengths(50), meta=[{"text": "abc"}] * 50)
    again = open_memory(other, text="characters", text_steps="nfc", workdir=tmp_path)
    assert again.transcripts.tokenizer.tokens == tokenizer.tokens
    fresh = open_memory(other, text="characters", text_steps="nfc")
    assert fresh.transcripts.tokenizer.tokens != tokenizer.tokens


def test_transcripts_that_are_not_there(open_memory):
    with pytest.raises(UserError, match=r"config.data.text='characters' needs transcripts, and memory:0 has none"):
        open_memory(make_records(random_lengths(50)), text="characters", text_steps="nfc")
    with pytest.raises(UserError, match=r"data.text needs whole utterances"):
        open_memory(spoken(50), text="characters", text_steps="nfc", fill=True, crop_seconds=3.0)


def test_a_spec_is_what_the_batches_are(open_memory):
    data = open_memory(make_records(random_lengths(100)))
    assert data.specs == [batch_spec(shape) for shape in shapes_of(data)]
    assert not isinstance(data._plans["train"], FillPlan)

"""Labels in the batches: every unit stands over the samples it belongs to, and a class follows its recording.

The recordings here say in their samples where they are from: sample s is s // HOP, the number of its unit.
"""

import dataclasses

import numpy as np
import pytest
from counting import CASES, EXTRA, HOP, label_all, make_records, random_lengths, segments_of
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import OPTIONS

from speechjax.data import labels as labels_module
from speechjax.data import pipeline
from speechjax.data.labels import UnitLabels
from speechjax.data.plan import Rows, Shape
from speechjax.data.units import UnitWriter, identities, unit_count
from speechjax.errors import UserError

# ---- where units stand


def check_units(batch, totals, hop=HOP):
    """The unit over j is that of the sample in the middle of its hop; nothing else has one.  How many there are."""
    wanted = np.full((len(batch["audio"]), batch["audio"].shape[1] // hop), -1)
    for r, at, count, mean in segments_of(batch):
        for j in range(wanted.shape[1]):
            unit = int(batch["audio"][r, j * hop + hop // 2])
            whole = at <= j * hop and (j + 1) * hop <= at + count
            if whole and unit < totals[int(mean)]:
                wanted[r, j] = unit
    assert batch["units"].dtype == np.int32
    np.testing.assert_array_equal(batch["units"], wanted)
    return np.count_nonzero(wanted >= 0)


@pytest.mark.parametrize("case", CASES)
def test_units_stand_over_their_samples(open_memory, tmp_path, case):
    more = {}
    lengths = random_lengths(60)
    if case == "filled":
        lengths = random_lengths(60, 35_000, 75_000)
    if case == "segments":  # cut where no unit begins
        more = dict(ids=[f"r{i // 3:04d}#{i % 3:04d}" for i in range(60)])
    if case == "mixture":  # the same ids and lengths in both: told apart by their sound
        lengths = np.tile(lengths[:30], 2)
        more = dict(ids=[f"r{i % 30:04d}" for i in range(60)], part=np.arange(60) // 30, weights=(1.0, 1.0))
    records = make_records(lengths, **more)
    label_all(tmp_path, records)
    data = open_memory(records, units=f"labels:{tmp_path}", **CASES[case])
    assert (data.unit_hop, data.unit_codes) == (HOP, 40_000)
    samples = np.zeros(records.row.max() + 1, int)
    np.add.at(samples, records.row, records.lengths)
    totals = [unit_count(int(n), HOP, EXTRA) for n in samples]
    batches = [*data.train_batches(0, 4 if case == "filled" else 30), *data.valid_batches()]
    seen = between = 0
    for batch in batches:
        seen += check_units(batch, totals)
        spec = data.specs[0] if "starts" in batch else data.spec(Shape(*batch["audio"].shape))
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == spec
        first = [batch["audio"][r, at : at + HOP] for r, at, count, _ in segments_of(batch) if count >= HOP]
        between += sum(samples[0] != samples[-1] for samples in first)
    assert seen > 500
    assert between > 10  # crops do begin between units: else the rounding was not tested
    if case == "filled":
        assert max(at for batch in batches for _, at, *_ in segments_of(batch)) > 0


@settings(max_examples=40, deadline=None)
@given(
    hop=st.sampled_from([1, 2, 7, 20]), align=st.sampled_from([1, 3, 20]), begin=st.integers(0, 60),
    segments=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 70), st.integers(0, 3)), min_size=1, max_size=4),
)  # fmt: skip
def test_a_unit_is_at_most_half_a_hop_off(hop, align, begin, segments):
    """By brute force over samples, with segments anywhere: also where no unit of the row begins."""
    records = make_records([200])
    records = dataclasses.replace(records, begin=np.array([begin]))
    example, start, count, at, end = [], [], [], [], 0
    for first, size, gap in segments:
        place = -(-(end + gap) // align) * align
        example.append(0), start.append(first), count.append(size), at.append(place)
        end = place + size
    rows = Rows(Shape(1, end + 5, len(segments)), *(np.array([x]) for x in (example, start, count, at)))
    source = UnitLabels(hop, 1000, "", lambda i, first, count: np.arange(first, first + count))
    [units] = source.batch(records, np.array([0]), rows, rows.count)["units"]
    assert len(units) == (end + 5) // hop
    for j, unit in enumerate(units.tolist()):
        inside = [g for g in range(len(segments)) if at[g] <= j * hop and (j + 1) * hop <= at[g] + count[g]]
        assert (unit >= 0) == bool(inside)
        if inside:
            sample = begin + start[inside[0]] + j * hop - at[inside[0]]
            assert -hop / 2 < unit * hop - sample <= hop / 2  # of two as near, the later


@pytest.mark.parametrize(("start", "first"), [(0, 0), (159, 0), (160, 1), (161, 1), (320, 1), (479, 1), (480, 2)])
def test_a_crop_that_begins_between_units_takes_the_nearer_one(start, first):
    """Trap: starts of crops are no multiples of 320; cutting the division off would be late by half a unit on
    average, and Python's round would go to even numbers, so to 0 from 160 and to 2 from 480."""
    records = make_records([2000])
    rows = Rows(Shape(1, 960), *(np.array([[x]]) for x in (0, start, 960, 0)))
    source = UnitLabels(320, 1000, "", lambda i, first, count: np.arange(first, first + count))
    assert source.batch(records, np.array([0]), rows, rows.count)["units"].tolist() == [[first, first + 1, first + 2]]


@pytest.mark.parametrize("fill", [False, True])
def test_every_host_has_its_rows_of_the_same_units(open_memory, tmp_path, fill):
    records = make_records(random_lengths(40, 35_000, 75_000) if fill else random_lengths(40))
    label_all(tmp_path, records)
    changes = CASES["filled"] if fill else dict(label=r"id:(?P<label>\d)$")
    data = open_memory(records, units=f"labels:{tmp_path}", **changes)
    names = ["units"] if fill else ["units", "label"]
    hosts = [data.train_batches(1, 4, host, 4) for host in range(4)]
    for whole, *parts in zip(data.train_batches(1, 4), *hosts, strict=True):
        for name in names:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    assert len({tuple(part["units"][0].tolist()) for part in parts}) > 1


def test_what_cannot_be_read_has_neither_units_nor_a_class(open_memory, tmp_path):
    records = make_records(random_lengths(60))
    label_all(tmp_path, records)
    data = open_memory(records, max_bad_share=0.5, units=f"labels:{tmp_path}", label=r"id:(?P<label>\d)$")
    records.parts[0].shards.broken |= set(range(0, 60, 5))
    unread = 0
    for batch in [*data.train_batches(0, data.batches_per_epoch), *data.valid_batches()]:
        lost = batch["lengths"] == 0
        assert (batch["units"][lost] == -1).all()
        assert (batch["label"][lost] == -1).all()
        assert (batch["label"][~lost] >= 0).all()
        assert (batch["units"][~lost].max(axis=1) >= 0)[batch["lengths"][~lost] > 2 * HOP].all()
        unread += batch["unread"].sum()
    assert unread


def test_recordings_without_units_are_refused(open_memory, tmp_path):
    records = make_records(random_lengths(60))
    label_all(tmp_path, records, skip=(3, 4, 50))
    again = r"label them: python -m speechjax\.label --source='memory:0' --codebook=.* --out=ANOTHER_FOLDER$"
    with pytest.raises(UserError, match=rf"^3 of 60 examples have no units in .*, e.g. 'r0003'; {again}"):
        open_memory(records, units=f"labels:{tmp_path}")
    subset = dataclasses.replace(
        records, **{f: getattr(records, f)[5:50] for f in ("part", "row", "begin", "lengths", "piece", "keys", "mean",
                                                          "std")}
    )  # fmt: skip
    open_memory(subset, units=f"labels:{tmp_path}")
    records.parts[0].shards.index["length"][7] += 1
    with pytest.raises(UserError, match=rf"^1 of 45 examples have changed since .* in .*, e.g. 'r0007'; {again}"):
        open_memory(subset, units=f"labels:{tmp_path}")


@pytest.mark.parametrize("spec", ["labels:", "labels", "phone", "phones:x", "folder:x"])
def test_units_that_mean_nothing(open_memory, spec):
    with pytest.raises(UserError, match=r"config.data.units=.*: use labels:DIR .*, or phones, or nothing"):
        open_memory(make_records(random_lengths(20)), units=spec)


def test_other_units_are_other_data(open_memory, tmp_path):
    """What hosts compare, and a run with its continuation."""
    records = make_records(random_lengths(40))
    label_all(tmp_path / "a", records)
    who = identities(records)
    writer = UnitWriter(
        tmp_path / "b", hop=HOP, extra=0, codes=9, codebook_digest="c", source_digest=records.digest, shards=1
    )
    writer.write(0, ((w, np.zeros(unit_count(int(w["samples"]), HOP), int)) for w in who))
    writer.finish()
    plain = open_memory(records)
    assert plain.digest == records.digest
    assert (plain.unit_hop, plain.unit_codes, plain.label_names) == (0, 0, [])
    changes = [dict(units=f"labels:{tmp_path / 'a'}"), dict(units=f"labels:{tmp_path / 'b'}"),
               dict(label=r"id:(?P<label>\d)$"), dict(label=r"id:(?P<label>\d)\d$")]  # fmt: skip
    digests = [open_memory(records, **change).digest for change in changes]
    assert len({*digests, plain.digest}) == 5
    assert [open_memory(records, **change).digest for change in changes] == digests


def test_without_units_nothing_of_them_is_done(open_memory, monkeypatch):
    def never(*_):
        raise AssertionError

    for name in ("identities", "open_units", "_entries"):
        monkeypatch.setattr(labels_module, name, never)
    data = open_memory(make_records(random_lengths(40)))
    assert not {"units", "label"} & next(data.train_batches(0, 1)).keys()
    assert not {"units", "label"} & data.specs[0].keys()


# ---- real files


def test_from_files_to_batches(tmp_path, real_speech):
    """Labelled in one piece and before some were left out, trained in segments: units are those of the samples."""
    soundfile = pytest.importorskip("soundfile")
    folder = tmp_path / "speech"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for path in sorted((real_speech / "fsdd").glob("[01]_jackson_[0-3].wav")):
        (folder / path.name).write_bytes(path.read_bytes())
    for k in range(4):  # up to 40 s
        ramp = np.arange(1000 + 16_000 * 13 * k + int(rng.integers(5000))) // HOP
        soundfile.write(folder / f"2_ramp_{k}.wav", ramp.astype(np.int16), 16_000)
    options = dict(OPTIONS, source=f"folder:{folder}", cache_dir=str(tmp_path / "cache"), valid_seconds=1.0)
    whole = pipeline.open_records(
        options["source"], cache_dir=options["cache_dir"], segment_seconds=1e6, min_seconds=0.0, max_bad_share=0.0
    )
    label_all(tmp_path / "units", whole)
    data = pipeline.open_data(
        **{**options, "crop_seconds": 2.0, "batch_seconds": 8.0, "min_seconds": 0.3},
        units=f"labels:{tmp_path / 'units'}",
        label=r"id:^(?P<label>\d)",
    )
    assert data.label_names == ["0", "1", "2"]
    assert data.records.piece.max() == 1
    furthest = 0
    for batch in data.train_batches(0, 3 * data.batches_per_epoch):
        for r in np.flatnonzero((batch["label"] == 2) & (batch["lengths"] > 0)):
            n = int(batch["lengths"][r]) // HOP
            found, own = batch["units"][r, :n], batch["audio"][r, HOP // 2 :: HOP][:n]
            np.testing.assert_array_equal(found[found >= 0], own[found >= 0])
            assert (found >= 0).sum() >= n - 1
            furthest = max(furthest, found.max())
    assert furthest > 30 * 16_000 / HOP  # in the second piece of the longest

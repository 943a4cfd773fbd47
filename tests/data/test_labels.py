"""Labels in the batches: every unit stands over the samples it belongs to, and a class follows its recording.

The recordings here say in their samples where they are from: sample s is s // HOP, the number of its unit.
"""

import dataclasses
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import memory_records

from speechjax.data import labels as labels_module
from speechjax.data import pipeline
from speechjax.data.labels import UnitLabels, read_classes, read_units
from speechjax.data.plan import Rows, Shape
from speechjax.data.units import UnitWriter, identities, unit_count
from speechjax.errors import UserError

HOP, EXTRA = 20, 5
PHONE_HOP = 160
OPTIONS = dict(
    source="memory", seed=1, row_divisor=4, frame_len=(20, 5), segment_align=40, workdir=None, temperature=1.0,
    crop_seconds=250 / 16000, batch_seconds=1000 / 16000, shapes=2, fill=False, row_multiple=4, min_seconds=0.0,
    valid_seconds=10.0, include="", exclude="", text="", text_steps="", max_bad_share=0.5, cache_dir="",
)  # fmt: skip


def make_records(lengths, hop=HOP, **more):
    """Records whose samples are the numbers of their units; a recording's mean is its row."""
    records = memory_records(lengths, **more)
    for opened in records.parts:
        shards = opened.shards
        shards.index = np.array([(len(audio),) for audio in shards.audio], [("length", "<i8")])
        shards.audio = [(np.arange(len(audio)) // hop).astype(np.int16) for audio in shards.audio]
    return dataclasses.replace(records, mean=records.row.astype(np.float32))


def random_lengths(n, low=20, high=400, seed=0):
    return np.random.default_rng(seed).integers(low, high, n)


def label_all(folder, records, skip=()):
    """A store in which unit j of every recording is j, as the samples have it."""
    who = identities(records)
    first = np.flatnonzero((records.piece <= 0) & ~np.isin(np.arange(len(records)), skip))
    writer = UnitWriter(
        folder, hop=HOP, extra=EXTRA, codes=40_000, codebook_digest="c", source_digest=records.digest, shards=1
    )
    writer.write(0, ((who[i], np.arange(unit_count(int(who["samples"][i]), HOP, EXTRA))) for i in first))
    return writer.finish()


@pytest.fixture
def open_memory(monkeypatch):
    """`open_data` over records made by hand."""

    def opened(records, **changes):
        monkeypatch.setattr(pipeline, "open_records", lambda source, **filters: records)
        return pipeline.open_data(**{**OPTIONS, **changes})

    return opened


def segments_of(batch):
    """(row, first sample, samples, mean) of every segment that holds audio."""
    lengths = batch["lengths"].reshape(len(batch["audio"]), -1)
    starts = batch["starts"] if "starts" in batch else np.zeros_like(lengths)
    for r, g in np.argwhere(lengths > 0).tolist():
        yield r, int(starts[r, g]), int(lengths[r, g]), batch["mean"].reshape(lengths.shape)[r, g]


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


CASES = {
    "crops": dict(),
    "filled": dict(fill=True, crop_seconds=5.0, batch_seconds=20.0, shapes=1),
    "segments": dict(),
    "mixture": dict(),
}


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
    data = open_memory(records, units=f"labels:{tmp_path}", label=r"id:(?P<label>\d)$")
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


# ---- phones


def spoken(n=40, seed=0, low=800, high=8000, **more):
    """Recordings of samples low to high whose phones leave gaps, overlap and end late; the last has none."""
    rng = np.random.default_rng(seed)
    meta, lengths = [], random_lengths(n, low, high, seed)
    for length in lengths.tolist():
        begin = np.sort(rng.uniform(0, length / 16000, 6))
        size = rng.uniform(0.005, 0.15, 6)
        phones = [[str(rng.choice(list("sæɪt"))), *span] for span in zip(begin, begin + size, strict=True)]
        meta.append({"phones": phones, "text": "x"})
    meta[-1] = {}
    return make_records(lengths, hop=PHONE_HOP, meta=meta, **more), [m.get("phones", []) for m in meta]


def phone_at(phones, seconds):
    """The last to begin of those that are on, or None."""
    on = [(start, symbol) for symbol, start, end in phones if round(start * 16e3) <= seconds * 16e3 < round(end * 16e3)]
    return max(on)[1] if on else None


@pytest.mark.parametrize("segments", [False, True])
def test_the_phone_is_that_at_the_centre_of_each_hop(segments):
    ids = [f"r{i // 2:04d}#{i % 2:04d}" for i in range(40)] if segments else None
    records, phones = spoken(ids=ids)
    units = read_units(records, "phones", None)
    assert (units.hop, units.codes, units.symbols) == (PHONE_HOP, 4, ["s", "t", "æ", "ɪ"])
    none = 0
    for i in range(40):
        total = int(records.parts[0].shards.index["length"][records.row[i]]) // PHONE_HOP
        own = phones[2 * int(records.row[i])] if segments else phones[i]
        found = units.read(i, -2, total + 5).tolist()
        assert found[:2] == [-1, -1]
        assert found[total + 2 :] == [-1, -1, -1]
        for j in range(total):
            symbol = phone_at(own, (j + 0.5) / 100)
            assert found[j + 2] == (-1 if symbol is None else units.symbols.index(symbol))
            none += symbol is None
    assert none > 20


def test_a_phone_that_begins_at_a_centre_is_heard_there():
    """Also where 100 · start is not exact in binary: 0.145 s is sample 2320, the centre of frame 14."""
    meta = [{"phones": [["a", 0, 0.145], ["b", 0.145, 0.155], ["c", 0.155, 0.3]]}]
    units = read_units(make_records([4800], hop=PHONE_HOP, meta=meta), "phones", None)
    assert units.read(0, 13, 4).tolist() == [0, 1, 2, 2]


def test_phones_in_batches_and_their_vocabulary_in_the_workdir(open_memory, tmp_path, caplog):
    changes = dict(units="phones", workdir=tmp_path, crop_seconds=0.3, batch_seconds=1.2)
    records, phones = spoken()
    data = open_memory(records, **changes)
    assert (data.unit_hop, data.unit_codes) == (PHONE_HOP, 4)
    data.save(tmp_path)
    data.save(tmp_path)
    assert json.loads((tmp_path / "phones.json").read_text()) == dict(format=1, hop=160, symbols=["s", "t", "æ", "ɪ"])
    seen = 0
    for batch in data.train_batches(0, 4):
        for r, _, count, mean in segments_of(batch):
            for j in range(count // PHONE_HOP):
                frame = int(batch["audio"][r, j * PHONE_HOP + PHONE_HOP // 2])
                symbol = phone_at(phones[int(mean)], (frame + 0.5) / 100)
                assert batch["units"][r, j] == (-1 if symbol is None else "stæɪ".index(symbol))
                seen += symbol is not None
            assert (batch["units"][r, count // PHONE_HOP :] == -1).all()
    assert seen > 50
    # Another corpus in the same workdir: the numbers keep their meaning, and a new phone is nobody's.
    meta = [{"phones": [["t", 0, 0.1], ["ʒ", 0.1, 0.2], ["s", 0.2, 0.3]]}] * 20
    other = make_records([4800] * 20, hop=PHONE_HOP, meta=meta)
    with caplog.at_level(logging.WARNING):
        again = open_memory(other, **changes)
    assert again.unit_codes == 4
    assert again.units.read(0, 0, 30).tolist() == [1] * 10 + [-1] * 10 + [0] * 10
    assert "'ʒ' not in phones.json of" in caplog.text
    again.save(tmp_path)
    fresh = open_memory(other, units="phones")
    assert fresh.unit_codes == 3
    with pytest.raises(UserError, match=r"phones.json is another vocabulary"):
        fresh.save(tmp_path)
    (tmp_path / "phones.json").write_text("[]")
    with pytest.raises(UserError, match=r"phones.json is damaged"):
        open_memory(other, **changes)


@pytest.mark.parametrize(
    ("phones", "message"),
    [
        (["t", "a"], "needs phones .* of the recordings, and memory:0 has none"),  # fairseq's, without times
        ([], "needs phones"),
        ([["t", 0.0]], r"phones of 'r0000' are not \[\[symbol, start s, end s\]"),
        ([["t", "0.0", "0.1"]], "phones of 'r0000' are not"),
        ([["t", -1.0, 0.1]], "phones of 'r0000' are not"),
        ([["t", float("nan"), 0.1]], "phones of 'r0000' are not"),
        ([["t", 0, 100], ["a", 100, 300]], "go on to 300 s, and it has 0.3 s: give start and end in seconds"),
    ],
)
def test_phones_that_are_none(phones, message):
    records = make_records([4800] * 3, meta=[{"phones": phones}] * 3)
    with pytest.raises(UserError, match=message):
        read_units(records, "phones", None)


# ---- classes


@pytest.fixture
def speakers():
    """30 recordings in 60 segments: of speakers b, a, 7 and of nobody, in this order."""
    names = ["b", "a", 7, None]
    meta = [{"speaker": names[i // 2 % 4], "phones": [["x", 0, 1]], "lang": "en"} for i in range(60)]
    ids = [f"{'xyz'[i // 2 % 3]}/r{i // 2:02d}.wav#{i % 2:04d}" for i in range(60)]
    return make_records(random_lengths(60), ids=ids, meta=meta), names


def test_every_segment_and_crop_has_the_class_of_its_recording(open_memory, speakers):
    records, names = speakers
    data = open_memory(records, label="meta:speaker")
    assert data.label_names == ["7", "a", "b"]
    assert data.specs[0]["label"] == ((data.specs[0]["audio"][0][0],), np.int32)
    seen = set()
    for batch in [*data.train_batches(0, data.batches_per_epoch), *data.valid_batches()]:
        assert batch["label"].dtype == np.int32
        for mean, length, label in zip(batch["mean"], batch["lengths"], batch["label"], strict=True):
            name = names[int(mean) % 4] if length else None
            assert label == (-1 if name is None else data.label_names.index(str(name)))
            seen.add((label, bool(length)))
    assert seen >= {(-1, True), (0, True), (1, True), (2, True), (-1, False)}


def test_classes_by_id(speakers):
    records, _ = speakers
    found = read_classes(records, r"id:^(?P<label>[xy])/", None)
    assert found.names == ["x", "y"]
    assert found.codes.tolist() == [[0, 1, -1][i // 2 % 3] for i in range(60)]


def test_class_names_of_the_workdir_stay(open_memory, speakers, tmp_path, caplog):
    records, _ = speakers
    data = open_memory(records, label="meta:speaker", workdir=tmp_path)
    data.save(tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text())["names"] == ["7", "a", "b"]
    other = make_records([100] * 20, meta=[{"speaker": "b"}, {"speaker": "A"}] * 10)
    with caplog.at_level(logging.WARNING):
        again = open_memory(other, label="meta:speaker", workdir=tmp_path)
    assert again.label_names == ["7", "a", "b"]
    assert again.labels.codes.tolist() == [2, -1] * 10
    assert "'A' not in labels.json of" in caplog.text
    with pytest.raises(UserError, match=r"labels.json is another vocabulary"):
        open_memory(other, label="meta:speaker").save(tmp_path)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("meta:accent", "no recording of memory:0 has it; there are lang, speaker$"),
        ("meta:phones", "no recording of memory:0 has it; there are lang, speaker$"),  # a list is no class
        ("meta:lang", "all recordings are 'en'; at least two classes are needed"),
        ("id:(?P<label>q+)", r"no recording of memory:0 has it; e.g. 'x/r00\.wav'"),
        ("id:(x)", r"needs a group label, as in id:\(\?P<label>"),
        ("id:(?P<label>x", "is not a regular expression: missing"),
        ("speaker", "use meta:FIELD, e.g. meta:speaker, or id:REGEX with a group"),
        ("meta:", "use meta:FIELD"),
    ],
)
def test_labels_that_are_not_there(open_memory, speakers, label, message):
    with pytest.raises(UserError, match=message) as error:
        open_memory(speakers[0], label=label)
    assert "\n" not in str(error.value)


def test_filled_rows_have_no_class_of_their_own(open_memory):
    records = make_records(random_lengths(40, 35_000, 75_000))
    with pytest.raises(UserError, match=r"config.data.label needs rows of one utterance: set config.data.fill=False"):
        open_memory(records, label=r"id:(?P<label>\d)$", **CASES["filled"])
    # Asked for in vain: rows of a front end that cannot tell segments apart hold one utterance each.
    open_memory(records, label=r"id:(?P<label>\d)$", **CASES["filled"], segment_align=0)


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


def test_phones_of_the_embedded_corpus(tmp_path):
    pytest.importorskip("espeakng_loader")
    data = pipeline.open_data(
        **{**OPTIONS, "source": "embedded:0.01", "cache_dir": str(tmp_path), "crop_seconds": 4.0, "batch_seconds": 16},
        units="phones",
        label="meta:lang",
    )
    assert "sil" in data.units.symbols
    assert data.units.symbols == sorted(set(data.units.symbols))
    sil, quiet, loud = data.units.symbols.index("sil"), [], []
    for batch in data.train_batches(0, data.batches_per_epoch):
        frames = batch["audio"][:, : batch["units"].shape[1] * 160].reshape(*batch["units"].shape, 160)
        power = (frames.astype(np.float64) ** 2).mean(axis=-1)
        quiet += power[batch["units"] == sil].tolist()
        loud += power[(batch["units"] >= 0) & (batch["units"] != sil)].tolist()
    assert len(loud) > len(quiet) > 50
    assert np.median(quiet) < np.median(loud) / 100  # 20 dB: pauses are pauses only if the times are right

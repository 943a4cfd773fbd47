"""Phones and classes in the batches: what is known of a recording stands where it is heard."""

import json
import logging

import numpy as np
import pytest
from counting import CASES, PHONE_HOP, make_records, random_lengths, segments_of
from memory import OPTIONS

from speechjax.data import pipeline
from speechjax.data.labels import read_labels, read_units
from speechjax.errors import UserError

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
    [found] = read_labels(records, r"id:^(?P<label>[xy])/", None).parts
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
    assert again.labels.parts[0].codes.tolist() == [2, -1] * 10
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

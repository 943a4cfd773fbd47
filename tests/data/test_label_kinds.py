"""Labels of every kind, several at once, and units that say who speaks when: the metadata against the batches."""

import json
import logging

import numpy as np
import pytest
from counting import PHONE_HOP, make_records, random_lengths, segments_of

from speechjax import experiment
from speechjax.data.label_spec import parse_labels
from speechjax.data.labels import read_labels, read_units
from speechjax.errors import UserError

SPEC = r"who=meta:speaker ; odd=id:r\d*(?P<label>[13579])$ ; what=tags:events ; snr=number:snr"


@pytest.fixture
def corpus():
    """60 recordings; everything is unknown of some."""
    rng = np.random.default_rng(0)
    events = [["b", "a"], "c|a", [], None, "b"]
    meta = [
        dict(speaker=["x", "y", None][i % 3], events=events[i % 5], snr=[float(rng.normal(10, 5)), "7.5", None][i % 3])
        for i in range(60)
    ]
    return make_records(random_lengths(60), meta=meta), meta


def test_several_labels_of_several_kinds(open_memory, corpus, tmp_path):
    records, meta = corpus
    data = open_memory(records, label="meta:speaker ; what=tags:events")
    assert data.label_names == ["x", "y"], "one of several may have no name"
    spec = SPEC.replace("[13579]", "[0-9]")
    data = open_memory(records, label=spec)
    assert data.labels.names == {
        "label_who": ["x", "y"], "label_odd": list("0123456789"), "label_what": ["a", "b", "c"], "label_snr": [],
    }  # fmt: skip
    rows = data.specs[0]["audio"][0][0]
    assert {k: v for k, v in data.specs[0].items() if "label" in k} == {
        "label_who": ((rows,), np.int32), "label_odd": ((rows,), np.int32), "label_what": ((rows, 3), np.float32),
        "label_snr": ((rows,), np.float32),
    }  # fmt: skip
    seen = 0
    for batch in [*data.train_batches(0, data.batches_per_epoch), *data.valid_batches()]:
        for key, (shape, dtype) in data.specs[0].items():
            assert batch[key].dtype == dtype
            assert batch[key].shape[1:] == shape[1:] or key == "audio"
        for r in range(len(batch["lengths"])):
            what, snr = batch["label_what"][r].tolist(), batch["label_snr"][r]
            if not batch["lengths"][r]:
                assert batch["label_who"][r] == batch["label_odd"][r] == -1
                assert what == [-1] * 3
                assert np.isnan(snr)
                continue
            i = int(batch["mean"][r])
            assert batch["label_who"][r] == {"x": 0, "y": 1, None: -1}[meta[i]["speaker"]]
            assert batch["label_odd"][r] == i % 10
            tags = [[1, 1, 0], [1, 0, 1], [0, 0, 0], [-1, -1, -1], [0, 1, 0]][i % 5]
            assert what == tags
            number = meta[i]["snr"]
            assert np.isnan(snr) if number is None else snr == np.float32(number)
            seen += 1
    assert seen > 50
    assert open_memory(records, label=spec).digest == data.digest
    assert open_memory(records, label=SPEC).digest != data.digest


def test_other_numbers_and_tags_are_other_data(open_memory, corpus):
    records, _ = corpus
    for field, value in (("snr", 3.25), ("events", "a|b|c")):
        spec = f"{'number' if field == 'snr' else 'tags'}:{field}"
        before = open_memory(records, label=spec).digest
        old = records.parts[0].shards.meta[0]
        records.parts[0].shards.meta[0] = old | {field: value}
        assert open_memory(records, label=spec).digest != before
        records.parts[0].shards.meta[0] = old
        assert open_memory(records, label=spec).digest == before


# ---- vocabularies in the workdir


def test_vocabularies_are_kept_by_label(open_memory, corpus, tmp_path, caplog):
    records, _ = corpus
    data = open_memory(records, label=SPEC, workdir=tmp_path)
    data.save(tmp_path)
    data.save(tmp_path)
    content = json.loads((tmp_path / "labels.json").read_text())
    assert set(content) == {"format", "labels"}
    assert content["labels"]["label_what"] == dict(label="tags:events", names=["a", "b", "c"])
    meta = [dict(speaker="y", events="c", snr=1), dict(speaker="x", events="", snr=2)]
    less = make_records([100] * 20, meta=meta * 10, ids=[f"r{i:03d}1" for i in range(20)])
    again = open_memory(less, label=SPEC, workdir=tmp_path)
    assert again.labels.names == data.labels.names
    again.save(tmp_path)
    who, _, what, _ = again.labels.parts
    assert who.codes.tolist() == [1, 0] * 10
    assert what.table[what.codes].tolist() == [[0, 0, 1], [0, 0, 0]] * 10


@pytest.mark.parametrize("spec", ["meta:speaker", "who=meta:speaker", "tags:speaker"])
def test_a_model_keeps_its_classes(open_memory, tmp_path, caplog, spec):
    """Training on names that the workdir's vocabulary lacks is refused; to evaluate, they only have no label."""
    records = make_records(random_lengths(20), meta=[{"speaker": "ab"[i % 2]} for i in range(20)])
    open_memory(records, label=spec, workdir=tmp_path).save(tmp_path)
    more = make_records(random_lengths(20), meta=[{"speaker": "abcaad"[i % 6]} for i in range(20)])
    with caplog.at_level(logging.WARNING):
        data = open_memory(more, label=spec, workdir=tmp_path)
    assert "'c', 'd' not in labels.json of" in caplog.text
    [label] = data.labels.parts
    values = label.table[label.codes]
    assert (values[2] == (-1 if "tags" not in spec else 0)).all()
    with pytest.raises(UserError, match=r"labels\.json has no 'c' \(3 examples\), 'd' \(3 examples\) for .*--workdir$"):
        data.save(tmp_path)


def test_the_file_of_one_class_reads_as_it_did(open_memory, tmp_path):
    """As earlier versions have written it."""
    (tmp_path / "labels.json").write_text(json.dumps(dict(format=1, label="meta:speaker", names=["b", "a", "q"])))
    records = make_records(random_lengths(20), meta=[{"speaker": "ab"[i % 2]} for i in range(20)])
    data = open_memory(records, label="meta:speaker", workdir=tmp_path)
    assert data.label_names == ["b", "a", "q"]
    data.save(tmp_path)
    with pytest.raises(UserError, match="is another vocabulary"):
        open_memory(records, label="who=meta:speaker", workdir=tmp_path).save(tmp_path)
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        open_memory(records, label="meta:speaker", workdir=tmp_path)


# ---- mistakes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("meta:speaker ; id:(?P<label>.)", "has 'label' twice: give each label a name"),
        ("a=meta:speaker ; a=tags:events", "has 'label_a' twice"),
        ("1=meta:speaker", "use meta:FIELD"),
        ("speaker=", "use meta:FIELD"),
        ("a=meta:speaker ;", "use meta:FIELD"),
        ("number:speaker", "'number:speaker': of 'r0000' it is 'x', and no number"),
        ("number:nothing", "no recording of memory:0 has it; there are snr$"),
        ("tags:nothing", "no recording of memory:0 has it; there are events, snr, speaker$"),
    ],
)
def test_labels_that_mean_nothing(corpus, spec, message):
    with pytest.raises(UserError, match=message) as error:
        read_labels(corpus[0], spec, None)
    assert "\n" not in str(error.value)


def test_a_number_must_be_finite_and_fit():
    read = parse_labels("number:x")[0].read
    assert read({"id": "a", "meta": {"x": float("nan")}}) is None
    assert read({"id": "a", "meta": {}}) is None
    for value in (float("inf"), 1e39, [1.0]):
        with pytest.raises(UserError, match="and no number"):
            read({"id": "a", "meta": {"x": value}})


def test_a_regex_may_hold_what_names_and_kinds_are_written_with():
    [spec] = parse_labels(r"id:a=b:(?P<label>;)")
    assert (spec.key, spec.text) == ("label", r"id:a=b:(?P<label>;)")


class _Task:
    def __init__(self, **sizes):
        self.needs, self._sizes, self.aligns = tuple(sizes), sizes, False

    def sizes(self):
        return {k: (f"config.task.heads.{k}.classes", n) for k, n in self._sizes.items() if n}


def test_a_task_and_its_labels_must_fit(open_memory, corpus):
    data = open_memory(corpus[0], label=SPEC.replace("[13579]", "[0-9]"))
    experiment.check_needs(_Task(label_who=2, label_what=3, label_snr=0), data)
    with pytest.raises(UserError, match=r"--config\.task\.heads\.label_what\.classes to that"):
        experiment.check_needs(_Task(label_what=2), data)
    with pytest.raises(UserError, match=r"from 'label_mood', .*: set config\.data\.label=mood=meta:FIELD, id:REGEX"):
        experiment.check_needs(_Task(label_mood=2), data)
    with pytest.raises(UserError, match=r"from 'label', .*: set config\.data\.label=meta:FIELD, id:REGEX"):
        experiment.check_needs(_Task(label=2), data)
    with pytest.raises(UserError, match=r"set config\.data\.units=.*speech or turns:SPEAKERS"):
        experiment.check_needs(_Task(units=2), data)


# ---- units by time


def test_speech_is_where_segments_or_phones_say_so(open_memory):
    """At the centre of each 10 ms; unknown where nobody says anything, and nonspeech all through where [] does."""
    meta = [
        dict(segments=[[0.055, 0.12], [0.1, 0.2]], phones=[["a", 0, 0.3]]),
        dict(phones=[["sil", 0, 0.1], ["a", 0.1, 0.2], ["SP", 0.2, 0.25]]),
        dict(segments=[]),
        dict(text="x"),
    ]
    units = read_units(make_records([4800] * 4, hop=PHONE_HOP, meta=meta), "speech", None)
    assert (units.hop, units.codes, units.symbols) == (PHONE_HOP, 2, ["nonspeech", "speech"])
    expected = [[0] * 5 + [1] * 15 + [0] * 10, [0] * 10 + [1] * 10 + [0] * 10, [0] * 30, [-1] * 30]
    # 0.055 s is the centre of frame 5: it begins there.
    assert [units.read(i, 0, 30).tolist() for i in range(4)] == expected


def test_turns_are_bits_in_the_order_of_who_begins():
    meta = [
        dict(turns=[["b", 0.1, 0.2], ["a", 0.0, 0.15], ["b", 0.25, 0.3]]),
        dict(turns=[]),
        {},
    ]
    records = make_records([4800] * 3, hop=PHONE_HOP, meta=meta)
    units = read_units(records, "turns:3", None)
    assert (units.codes, units.symbols) == (8, None)
    a, b = 1, 2
    assert units.read(0, 0, 30).tolist() == [a] * 10 + [a | b] * 5 + [b] * 5 + [0] * 5 + [b] * 5
    assert units.read(1, 0, 30).tolist() == [0] * 30
    assert units.read(2, 0, 30).tolist() == [-1] * 30
    assert units.digest != read_units(records, "turns:2", None).digest
    with pytest.raises(UserError, match=r"turns of 'r0000' are of 2 speakers: use config\.data\.units=turns:2"):
        read_units(records, "turns:1", None)
    with pytest.raises(UserError, match="from 1 to 5 speakers"):
        read_units(records, "turns:6", None)


def test_turns_stand_over_their_samples_in_batches(open_memory, tmp_path):
    """Crops too: frame j of a row is what is on at the middle of its samples."""
    rng = np.random.default_rng(0)
    lengths, meta = random_lengths(40, 800, 8000), []
    for n in lengths.tolist():
        turns = [[who, *np.sort(rng.uniform(0, n / 16000, 2)).tolist()] for who in "xyx"]
        meta.append(dict(turns=turns))
    records = make_records(lengths, hop=PHONE_HOP, meta=meta)
    data = open_memory(records, units="turns:2", crop_seconds=0.3, batch_seconds=1.2, workdir=tmp_path)
    data.save(tmp_path)
    assert not (tmp_path / "phones.json").exists()
    seen = set()
    for batch in data.train_batches(0, 4):
        for r, _, count, mean in segments_of(batch):
            turns = meta[int(mean)]["turns"]
            order = list(dict.fromkeys(who for who, *_ in sorted(turns, key=lambda turn: round(turn[1] * 16000))))
            for j in range(count // PHONE_HOP):
                at = (int(batch["audio"][r, j * PHONE_HOP + PHONE_HOP // 2]) + 0.5) * PHONE_HOP
                on = {who for who, start, end in turns if round(start * 16e3) <= at < round(end * 16e3)}
                assert batch["units"][r, j] == sum(1 << order.index(who) for who in on)
                seen.add(int(batch["units"][r, j]))
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("spec", "meta", "message"),
    [
        ("speech", {}, r"'speech' needs segments \[\[start s, end s\], \.\.\.\], or phones .*, and memory:0 has none"),
        ("turns:2", dict(segments=[[0, 1]]), r"needs turns \[\[speaker, start s, end s\], \.\.\.\] of the recordings"),
        ("speech", dict(segments=[["a", 0, 0.1]]), r"segments of 'r0000' are not \[\[start s, end s\], \.\.\.\]"),
        ("speech", dict(segments="0-1"), "segments of 'r0000' are not"),
        ("speech", dict(segments=[[0, 90]]), "segments of 'r0000' go on to 90 s, and it has 0.3 s"),
        ("turns:2", dict(turns=[[0, 0.1]]), r"turns of 'r0000' are not \[\[speaker, start s, end s\], \.\.\.\]"),
    ],
)
def test_times_that_are_none(spec, meta, message):
    with pytest.raises(UserError, match=message) as error:
        read_units(make_records([4800] * 3, meta=[meta] * 3), spec, None)
    assert "\n" not in str(error.value)

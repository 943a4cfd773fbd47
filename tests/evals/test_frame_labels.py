"""The evaluator of frames: counts are those of the frames that have a unit, DER that of the definition."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as reference

from speechjax.errors import UserError
from speechjax.evals.frame_labels import FrameLabels, _median, speaker_time
from speechjax.scoring import bootstrap, classes
from tests.data.memory import memory_records
from tests.evals.judging import table

T, HOP = 40, 160
FRAMES = dict(name="frames", classes=2, unit_hop=HOP, loss="softmax")
LENGTHS = np.array([40, 31, 25, 38]) * HOP


def recordings(meta):
    records = memory_records(LENGTHS, meta=meta)
    shards = records.parts[0].shards
    shards.index = np.array([(len(audio),) for audio in shards.audio], [("length", "<i8")])
    return records


def answering(scores):
    """Frames as many as the batch has samples for; `scores` [N, T, V]."""
    answer = table(scores=scores, lengths=(LENGTHS // HOP).astype(np.int32))

    def cut(batch):
        found = answer(batch)
        return dict(scores=found["scores"][:, : batch["audio"].shape[1] // HOP], lengths=found["lengths"])

    return cut


def scores(rng, units, classes):
    """Logits that are right more often than not, for all T frames."""
    found = rng.normal(size=(len(units), T, classes)).astype(np.float32)
    for row, own in zip(found, units, strict=True):
        row[np.arange(len(own)), own] += 1.0
    return found


def test_speech_is_counted_as_scikit_learn_does(make_job, tmp_path):
    rng = np.random.default_rng(0)
    segments = [[[0.1, 0.25]], [[0.0, 0.12], [0.2, 0.31]], [], [[0.05, 0.3]]]
    units = []
    for length, spans in zip(LENGTHS // HOP, segments, strict=True):
        centre = (np.arange(length) + 0.5) / 100
        units.append(np.array([any(a <= t < b for a, b in spans) for t in centre], int))
    logits = scores(rng, units, 2)
    records = recordings([dict(segments=spans, home="ab"[i % 2]) for i, spans in enumerate(segments)])
    answer = answering(logits)
    job = make_job(records, FRAMES, answer, units="speech")
    found = FrameLabels(job, every=1, group="meta:home")({}, {}, 2, "vad")
    said = [row[: len(own)].argmax(axis=1) for row, own in zip(logits, units, strict=True)]
    true, every = np.concatenate(units), np.concatenate(said)
    assert found["accuracy"] == pytest.approx(np.mean(true == every))
    assert found["speech_f1"] == pytest.approx(reference.f1_score(true, every))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(true, every, average="macro"))
    assert found["miss_rate"] == pytest.approx(np.mean(every[true == 1] == 0))
    assert found["false_alarm_rate"] == pytest.approx(np.mean(every[true == 0] == 1))
    assert found["detection_error"] == pytest.approx(np.sum(true != every) / np.sum(true))
    errors = [np.concatenate(units[k::2]) != np.concatenate(said[k::2]) for k in (0, 1)]
    each = [own.sum() / np.concatenate(units[k::2]).sum() for k, own in enumerate(errors)]
    assert found["detection_error_worst"] == pytest.approx(max(each))
    assert (tmp_path / "report/vad_2.png").exists()


def limits(found, name):
    return [found[name], found[f"{name}_low"], found[f"{name}_high"]]


def test_limits_are_those_of_recordings_drawn_again(make_job):
    rng = np.random.default_rng(4)
    segments = [[[0.1, 0.25]], [[0.0, 0.12], [0.2, 0.31]], [[0.0, 0.02]], [[0.05, 0.3]]]
    job = make_job(
        recordings([dict(segments=spans) for spans in segments]), FRAMES,
        answering(rng.normal(size=(4, T, 2)).astype(np.float32)), units="speech",
    )  # fmt: skip
    judge = FrameLabels(job, every=1)
    rows = []
    judge._judge_units = lambda *pair: rows.append(FrameLabels._judge_units(judge, *pair)) or rows[-1]
    found = judge({}, {}, 0, "vad")
    counts = np.array(rows)
    scores = {
        "macro_f1": classes.macro_f1,
        "speech_f1": lambda table: classes.class_scores(table).f1[1],
        "miss_rate": lambda table: table[1, 0] / table[1].sum(),
        "false_alarm_rate": lambda table: table[0, 1] / table[0].sum(),
        "detection_error": lambda table: (table[1, 0] + table[0, 1]) / table[1].sum(),
    }
    for name, score in scores.items():
        expected = bootstrap.interval_of(lambda drawn: score(counts[drawn].sum(axis=0)), 4)  # noqa: B023
        np.testing.assert_allclose(limits(found, name), expected, rtol=1e-9, err_msg=name)
        assert expected.low < expected.high


def test_a_wrong_group_is_named_before_anything_is_computed(make_job):
    records = recordings([dict(segments=[[0.0, 0.1]])] * 4)
    job = make_job(records, FRAMES, answering(np.zeros((4, T, 2), np.float32)), units="speech")
    for group, message in (
        ("speaker", "write meta:FIELD or id:REGEX"), ("id:(", "is not a regular expression"),
        ("meta:nosuchfield", "fits no held-out recording"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            FrameLabels(job, every=1, group=group)


def test_frames_without_a_unit_do_not_count(make_job):
    rng = np.random.default_rng(1)
    phones = [[["a", 0.0, 0.1], ["b", 0.2, 0.3]], [["b", 0.1, 0.2]], [["a", 0.0, 0.25]], []]
    records = recordings([dict(phones=own) for own in phones])
    logits = rng.normal(size=(4, T, 2)).astype(np.float32)
    job = make_job(records, FRAMES, answering(logits), units="phones")
    found = FrameLabels(job, every=1)({}, {}, 0, "phones")
    said = logits.argmax(axis=2)
    pairs = [
        (said[i, t], "ab".index(phone)) for i, own in enumerate(phones) for phone, start, end in own
        for t in range(round(100 * start), round(100 * end))
    ]  # fmt: skip
    assert found["accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert "speech_f1" not in found


def turns(units, speakers):
    return (np.array(units)[:, None] >> np.arange(speakers)) & 1


def brute_force(units, on, speakers):
    """Wrong speaker time of the best order, frame by frame."""
    best = None
    for order in itertools.permutations(range(speakers)):
        wrong, agreed = 0, 0
        for unit, own in zip(units, on, strict=True):
            if unit < 0:
                continue
            true = {k for k in range(speakers) if unit >> k & 1}
            said = {j for j in range(speakers) if own[order[j]]}
            wrong += max(len(true), len(said)) - len(true & said)
            agreed += len(true & said)
        if best is None or agreed > best[0]:
            best = agreed, wrong
    return best[1]


@pytest.mark.parametrize("seed", range(6))
def test_speaker_time_is_that_of_the_best_order(seed):
    rng = np.random.default_rng(seed)
    units = rng.integers(-1, 8, 50)
    on = rng.uniform(size=(50, 3)) < 0.4
    found = speaker_time(units, on)
    assert found.missed + found.false_alarm + found.confused == brute_force(units, on, 3)
    assert found.speech == turns(units[units >= 0], 3).sum()
    again = speaker_time(units, on[:, [2, 0, 1]])
    assert again == found  # the order of outputs says nothing
    assert speaker_time(units, turns(np.maximum(units, 0), 3)[:, [1, 2, 0]] > 0)[1:] == (0, 0, 0)


def test_the_kinds_of_errors_by_hand():
    units = np.array([0, 1, 1, 1, 3, 2, 2, 0, -1])
    on = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [0, 0], [1, 1]]) > 0
    found = speaker_time(units, on)
    assert (found.speech, found.missed, found.false_alarm, found.confused) == (7, 1, 1, 1)
    # Changes are at frames 1, 4, 5 and 7; to the padding there is none.
    assert speaker_time(units, on, collar=1).speech == 1  # frame 2
    assert speaker_time(np.array([1, 1, 1, -1]), on[:4], collar=1).speech == 3


def test_turns_through_the_evaluator(make_job, tmp_path):
    rng = np.random.default_rng(3)
    spoken = [
        [["x", 0.0, 0.2], ["y", 0.15, 0.4]], [["y", 0.05, 0.3]], [["x", 0.1, 0.2], ["z", 0.2, 0.25]],
        [["q", 0.0, 0.1], ["x", 0.2, 0.3]],
    ]  # fmt: skip
    records = recordings([dict(turns=own) for own in spoken])
    logits = rng.normal(size=(4, T, 2)).astype(np.float32)
    task = dict(FRAMES, loss="turns", classes=4)
    job = make_job(records, task, answering(logits), units="turns:2")
    units = [job.data.units.read(i, 0, n) for i, n in enumerate(LENGTHS // HOP)]
    found = FrameLabels(job, every=1, threshold=0.6)({}, {}, 0, "turns")
    on = [row[: len(own)] > np.log(0.6 / 0.4) for row, own in zip(logits, units, strict=True)]
    wrong = sum(brute_force(u, o, 2) for u, o in zip(units, on, strict=True))
    speech = sum(turns(u, 2).sum() for u in units)
    assert found["der"] == pytest.approx(wrong / speech)
    parts = found["der_missed"] + found["der_false_alarm"] + found["der_confusion"]
    assert parts == pytest.approx(found["der"])
    times = [speaker_time(u, o) for u, o in zip(units, on, strict=True)]
    for name, errors in (
        ("der_missed", [own.missed for own in times]), ("der_false_alarm", [own.false_alarm for own in times]),
        ("der_confusion", [own.confused for own in times]),
    ):  # fmt: skip
        assert limits(found, name) == pytest.approx(bootstrap.interval(errors, [own.speech for own in times]))
    smooth = FrameLabels(job, every=1, threshold=0.6, median=5)({}, {}, 0, "turns")
    assert smooth["der"] != found["der"]


def test_the_median_holds_the_ends():
    x = np.array([[5.0], [0.0], [1.0], [9.0], [1.0]])
    assert _median(x, 3)[:, 0].tolist() == [5, 1, 1, 1, 1]
    assert _median(x, 1) is x


def test_what_cannot_be_judged_is_named(make_job):
    records = recordings([dict(segments=[[0.0, 0.1]])] * 4)
    answer = answering(np.zeros((4, T, 2), np.float32))
    job = make_job(records, FRAMES, answer, units="speech")
    with pytest.raises(UserError, match=r"threshold=1.0 between 0 and 1, median=2 odd"):
        FrameLabels(job, every=1, threshold=1.0, median=2)
    job.config.task.name = "speaker"
    with pytest.raises(UserError, match="frame_labels judges the answers of frames, and this is speaker"):
        FrameLabels(job, every=1)

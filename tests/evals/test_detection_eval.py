"""The wake word evaluator: windows, events and times belong together; mistakes are named."""

import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.evals import detection as module
from speechjax.evals.detection import Detection, _trailing_mean, read_events
from speechjax.scoring import bootstrap
from tests.data.memory import memory_records
from tests.evals.judging import table

TASK = dict(name="classify", label="label", loss="softmax", classes=2)
RATE = 16_000


def streams(seconds, events):
    """Silence, and a loud tone where the keyword is."""
    records = memory_records([round(s * RATE) for s in seconds], meta=[dict(events=own) for own in events])
    for audio, own in zip(records.parts[0].shards.audio, events, strict=True):
        audio[:] = 0
        for _, start, end in own or ():
            audio[round(start * RATE) : round(end * RATE)] = 8000
    return records


def loudness(batch):
    """The likelier the keyword, the more of the tone is in a window."""
    audio = jnp.abs(batch["audio"].astype(jnp.float32))
    share = jnp.sum(audio, axis=1) / jnp.maximum(batch["lengths"], 1).astype(jnp.float32) / 8000
    return dict(scores=jnp.stack([jnp.zeros_like(share), 20 * share - 5], axis=1))


@pytest.fixture
def make(make_job, monkeypatch):
    words = memory_records([2000] * 4, meta=[dict(word=word) for word in ("hey", "other") * 2])

    def made(records, answer=loudness, **options):
        job = make_job(words, TASK, answer, label="meta:word")
        monkeypatch.setattr(module, "open_records", lambda source, **more: records)
        job.data.labels.parts[0].names[:] = ["other", "hey"]
        options = dict(source="folder:/streams", keyword="hey", window=0.5, hop=0.05, smooth=0.0) | options
        return Detection(job, every=1, **options)

    return made


def test_every_event_is_found_without_a_false_alarm(make, tmp_path):
    events = [[["hey", 1.0, 1.4], ["you", 3.0, 3.3], ["hey", 5.0, 5.5]], [["hey", 0.0, 0.4]], []]
    records = streams([7.0, 2.0, 3.0], events)
    records.parts[0].shards.audio[0][3 * RATE : round(3.3 * RATE)] = 0
    found = make(records, per_hour=(0.0,))({}, {}, 4, "wake")
    assert found["false_rejects_0"] == 0
    assert found["events"] == 3
    assert found["hours"] == pytest.approx(12 / 3600, rel=0.15)
    assert (tmp_path / "report/wake_4.png").exists()
    # The other word sounds alike: rejecting nothing now costs an alarm.
    records.parts[0].shards.audio[0][3 * RATE : round(3.45 * RATE)] = 8000
    found = make(records, per_hour=(0.0, 1000.0))({}, {}, 4, "wake")
    assert found["false_rejects_0"] > 0
    assert found["false_rejects_1000"] == 0


def test_limits_and_groups(make, tmp_path):
    """The keyword of every other recording of home b cannot be heard."""
    n = 24
    events = [[["hey", 0.6, 1.1]] if i % 3 else [] for i in range(n)]
    records = streams([2.0] * n, events)
    meta, audio = records.parts[0].shards.meta, records.parts[0].shards.audio
    for i in range(n):
        meta[i]["home"] = "ab"[i % 2]
        if i % 4 == 1:
            audio[i][:] = 0
    found = make(records, per_hour=(0.0, 5.0), group="meta:home")({}, {}, 4, "wake")
    with_event = [i for i in range(n) if i % 3]
    missed = np.array([i % 4 == 1 for i in with_event], float)
    home = np.array([i % 2 for i in with_event])
    assert found["false_rejects_0"] == pytest.approx(missed.mean())
    # Of 24 recordings, some without an event: those are drawn.
    numerators, denominators = np.zeros(n), np.zeros(n)
    numerators[with_event], denominators[with_event] = missed, 1
    expected = bootstrap.interval(numerators, denominators)  # there are no alarms, whatever the threshold
    assert [found["false_rejects_0_low"], found["false_rejects_0_high"]] == pytest.approx(expected[1:])
    assert found["false_rejects_0_worst"] == pytest.approx(missed[home == 1].mean())
    assert found["false_rejects_5_gap"] == pytest.approx(missed[home == 1].mean() - missed[home == 0].mean())
    assert "│ all   │ 16 │ 25.0" in (tmp_path / "report/tables.txt").read_text()
    assert "95 % interval" in (tmp_path / "report/wake.json").read_text()


def test_a_wrong_group_is_named_before_anything_is_computed(make):
    records = streams([2.0, 2.0], [[["hey", 0.5, 1.0]], []])
    records.parts[0].shards.meta[1]["home"] = "a"
    for group, message in (
        ("speaker", "group='speaker': write meta:FIELD or id:REGEX"), ("id:(", "is not a regular expression"),
        ("meta:nosuchfield", "fits no held-out recording"), ("meta:home", "group='meta:home' fits no"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            make(records, group=group)
    with pytest.raises(UserError, match="group='id:r', but there is one recording: leave it empty"):
        make(streams([2.0], [[["hey", 0.5, 1.0]]]), group="id:r")


def test_a_detection_is_at_the_end_of_its_window(make):
    """A tone at 2 s, and an event that is said to be elsewhere."""
    records = streams([6.0], [[["hey", 2.0, 2.4]]])
    exact = dict(tolerance=0.06, per_hour=(0.0,), refractory=10.0)
    # With the threshold so high that only a whole tone counts, it fires when the window first holds all: at 2.4 s.
    sure = lambda batch: dict(scores=jnp.where(loudness(batch)["scores"] > 10.9, 9.0, -9.0))  # noqa: E731
    for at, rejected in ((2.4, 0.0), (2.2, 1.0), (2.6, 1.0)):
        records.parts[0].shards.meta[0]["events"] = [["hey", at, at]]
        found = make(records, sure, **exact)({}, {}, 0, "wake")
        assert found["false_rejects_0"] == rejected, at


def test_windows_of_many_batches_are_those_of_one(make, monkeypatch):
    rng = np.random.default_rng(0)
    records = streams([9.0, 0.3], [[["hey", 1.0, 1.4]], []])
    records.parts[0].shards.audio[0][:] = rng.integers(-9000, 9000, 9 * RATE)
    seen = []
    for seconds in (60, 3):
        monkeypatch.setattr(module, "_BATCH_SECONDS", seconds)
        seen.append(list(make(records)._streams({})))
    assert [len(stream.scores) for stream in seen[0]] == [171, 1]  # one that is shorter than a window has one
    for one, many in zip(*seen, strict=True):
        np.testing.assert_allclose(one.scores, many.scores, rtol=1e-6)
    audio = np.abs(records.parts[0].shards.audio[0][: RATE // 2].astype(float)).mean() / 8000
    assert seen[0][0].scores[0] == pytest.approx(1 / (1 + np.exp(5 - 20 * audio)), rel=1e-4)
    assert seen[0][0].events.tolist() == [[0.5, pytest.approx(0.9)]]


def test_the_trailing_mean_never_looks_ahead():
    assert _trailing_mean(np.array([3.0, 1.0, 2.0, 6.0]), 2).tolist() == [3, 2, 1.5, 4]
    assert _trailing_mean(np.arange(4.0), 1).tolist() == [0, 1, 2, 3]


def test_events_of_a_file(tmp_path, make):
    records = streams([6.0, 2.0], [[], []])
    file = tmp_path / "events.tsv"
    file.write_text("r0001\t0.5\t1.0\n\nr0000\t3\t3.5\nr0000\t1\t1.5\n")
    assert [x.tolist() for x in read_events(str(file), records)] == [[[1, 1.5], [3, 3.5]], [[0.5, 1.0]]]
    assert make(records, events=str(file)).events[1].tolist() == [[0.5, 1.0]]
    for line, message in (
        ("r0000 1 2", r"line 1: want ID<TAB>START<TAB>END"), ("r9\t1\t2", r"line 1: there is no recording 'r9'"),
        ("r0001\t1\t9", r"an event of 'r0001' is not within its 2 s"),
    ):  # fmt: skip
        file.write_text(line)
        with pytest.raises(UserError, match=message):
            read_events(str(file), records)


def test_mistakes_are_named(make, make_job):
    records = streams([2.0], [[["hey", 0.5, 1.0]]])
    with pytest.raises(UserError, match="keyword='hi' is none of the classes other, hey"):
        make(records, keyword="hi")
    with pytest.raises(UserError, match="a window of at least one hop"):
        make(records, window=0.1, hop=0.2)
    with pytest.raises(UserError, match="has no event of 'hey'"):
        make(streams([2.0], [[["you", 0.5, 1.0]]]))
    with pytest.raises(UserError, match=r"are not \[\[keyword, start s, end s\]"):
        make(memory_records([RATE], meta=[dict(events=[[1, 2]])]))
    job = make_job(memory_records([2000] * 4), TASK, table(scores=np.zeros((4, 2))))
    assert Detection(job, every=1)({}, {}, 0, "wake") == {}  # no source: no test

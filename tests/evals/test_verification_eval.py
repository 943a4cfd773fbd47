"""The evaluator of speaker embeddings: trials are those meant, scores those of scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from speechjax.errors import UserError
from speechjax.evals import verification as module
from speechjax.evals.verification import Verification
from speechjax.scoring import verification
from tests.data.memory import memory_records
from tests.evals.judging import table

SPEAKER = dict(name="speaker", label="label")
WHO = np.array([0, 0, 0, 1, 1, 2, 2, 2])


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    found = rng.normal(size=(3, 6))[WHO] + 0.9 * rng.normal(size=(8, 6))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def records(ids=None):
    ids = ids or [f"p{who}/u{i}.wav" for i, who in enumerate(WHO)]
    return memory_records([2000] * len(ids), ids, [dict(speaker=f"p{who}") for who in WHO[: len(ids)]])


def eer(scores, target):
    """By scikit-learn's curve and straight lines between its points."""
    false, true, _ = roc_curve(target, scores, drop_intermediate=False)
    at = np.linspace(0, 1, 200_001)
    return at[np.argmin(np.abs(at - (1 - np.interp(at, false, true))))]


def test_all_pairs_of_the_labels_speakers(make_job, tmp_path, embeddings):
    job = make_job(records(), SPEAKER, table(embedding=embeddings), label="id:^(?P<label>[^/]+)/")
    found = Verification(job, every=1)({}, {}, 5, "voices")
    first, second = np.triu_indices(8, 1)
    scores, target = (embeddings @ embeddings.T)[first, second], WHO[first] == WHO[second]
    assert found["eer"] == pytest.approx(eer(scores, target), abs=1e-4)
    assert 0 < found["eer"] < 0.5
    assert found["min_dcf_05"] <= 1
    assert (tmp_path / "report/voices_5.png").exists()
    assert "7 trials of one speaker, 21 of two, 8 recordings" in (tmp_path / "report/voices.json").read_text()
    # Speakers whom the vocabulary does not have are speakers.
    job.data.labels.parts[0].codes[:] = -1
    assert Verification(job, every=1)({}, {}, 5, "voices") == pytest.approx(found, nan_ok=True)
    other = Verification(job, every=1, speaker="id:^(p[01]).")
    assert other({}, {}, 5, "voices")["eer"] != found["eer"]


def test_a_file_of_trials(make_job, tmp_path, embeddings):
    job = make_job(records(), SPEAKER, table(embedding=embeddings), label="meta:speaker")
    pairs = [(1, 0, 1), (1, 3, 4), (0, 0, 3), (0, 1, 5), (0, 4, 7)]
    names = job.data.records.ids
    file = tmp_path / "trials.txt"
    file.write_text("".join(f"{target} {names[a]} {names[b]}\n" for target, a, b in pairs))
    found = Verification(job, every=1, trials=str(file))({}, {}, 0, "voices")
    scores = [embeddings[a] @ embeddings[b] for _, a, b in pairs]
    assert found["eer"] == pytest.approx(eer(scores, [target for target, *_ in pairs]), abs=1e-4)
    file.write_text("1 p0/u0.wav p9/u9.wav\n")
    with pytest.raises(UserError, match=r"trials.txt, line 1: there is no embedding of 'p9/u9.wav'"):
        Verification(job, every=1, trials=str(file))
    with pytest.raises(UserError, match="there is no such file"):
        Verification(job, every=1, trials=str(tmp_path / "gone"))
    file.write_bytes("1 ä b\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"trials.txt: not UTF-8 at byte 2"):
        Verification(job, every=1, trials=str(file))


def test_limits_are_those_of_speakers_drawn_again(make_job, embeddings, tmp_path):
    job = make_job(records(), SPEAKER, table(embedding=embeddings), label="meta:speaker")
    found = Verification(job, every=1)({}, {}, 0, "voices")
    trials = verification.all_pairs(WHO)
    expected = verification.cost_intervals(verification.cosine_scores(embeddings, trials), trials, WHO)
    for name, own in zip(("eer", "min_dcf_01", "min_dcf_05"), (expected.eer, *expected.min_dcf), strict=True):
        assert [found[name], found[f"{name}_low"], found[f"{name}_high"]] == pytest.approx(own, abs=1e-6)
    assert found["eer_low"] < found["eer"] < found["eer_high"]
    assert "95 % interval" in (tmp_path / "report/voices.json").read_text()
    # Of a file the speakers are those of the label, and recordings that a trial links.
    file = tmp_path / "trials.txt"
    names = job.data.records.ids
    file.write_text("".join(f"{int(WHO[a] == WHO[b])} {names[a]} {names[b]}\n" for a in range(8) for b in range(a)))
    same = Verification(job, every=1, trials=str(file))({}, {}, 0, "voices")
    assert same == pytest.approx(found, abs=1e-6)
    job.data.records.parts[0].shards.meta[:] = [{}] * 8
    assert Verification(job, every=1, trials=str(file))({}, {}, 0, "voices") == pytest.approx(found, abs=1e-6)


def test_groups_have_the_trials_within_them(make_job, tmp_path):
    rng = np.random.default_rng(1)
    who = np.repeat(np.arange(6), 4)
    found = rng.normal(size=(6, 5))[who] + np.where(who < 3, 1.5, 0.5)[:, None] * rng.normal(size=(24, 5))
    unit = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    meta = [dict(speaker=f"p{k}", accent="ab"[k // 3], one=f"q{k}") for k in who]
    made = memory_records([2000] * 24, [f"u{i}" for i in range(24)], meta)
    job = make_job(made, SPEAKER, table(embedding=unit), label="meta:speaker")
    scores = Verification(job, every=1, group="meta:accent")({}, {}, 0, "voices")
    each = []
    for own in (slice(12), slice(12, None)):
        trials = verification.all_pairs(who[own])
        rates = verification.error_rates(verification.cosine_scores(unit[own], trials), trials.target)
        each.append(verification.equal_error_rate(rates).rate)
    assert scores["eer_worst"] == pytest.approx(max(each), abs=1e-6)
    assert scores["eer_gap"] == pytest.approx(abs(each[0] - each[1]), abs=1e-6)
    assert scores["eer_gap"] > 0.1
    shown = (tmp_path / "report/tables.txt").read_text()
    assert "eer, % by group at step 0: gap" in shown
    whole = Verification(job, every=1)({}, {}, 0, "voices")
    assert scores["eer"] == whole["eer"]
    assert "eer_gap" not in whole
    for group, message in (
        ("meta:one", "no group of group='meta:one' has both a trial of one speaker and one of two"),
        ("speaker", "group='speaker': write meta:FIELD or id:REGEX"), ("id:(", "is not a regular expression"),
        ("meta:nosuchfield", "fits no held-out recording"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Verification(job, every=1, group=group)
    with pytest.raises(UserError, match="speaker='who': write meta:FIELD or id:REGEX"):
        Verification(job, every=1, speaker="who")


def test_segments_of_a_recording_are_one(make_job, embeddings):
    ids = ["p0/a#0000", "p0/a#0001", "p0/b", "p1/c", "p1/d", "p2/e#0000", "p2/e#0001", "p2/f"]
    job = make_job(records(ids), SPEAKER, table(embedding=embeddings), label="id:^(?P<label>[^/]+)/")
    found = Verification(job, every=1)({}, {}, 0, "voices")
    means = [embeddings[rows].sum(axis=0) for rows in ([0, 1], [2], [3], [4], [5, 6], [7])]
    unit = np.stack([mean / np.linalg.norm(mean) for mean in means])
    first, second = np.triu_indices(6, 1)
    who = np.array([0, 0, 1, 1, 2, 2])
    assert found["eer"] == pytest.approx(eer((unit @ unit.T)[first, second], who[first] == who[second]), abs=1e-4)


def test_recordings_that_cannot_be_read_have_no_trials(make_job, embeddings, tmp_path):
    made = records()
    made.parts[0].shards.broken.update({0, 3})
    job = make_job(made, SPEAKER, table(embedding=embeddings), label="meta:speaker")
    Verification(job, every=1)({}, {}, 0, "voices")
    assert "4 trials of one speaker, 11 of two, 6 recordings" in (tmp_path / "report/voices.json").read_text()


def test_too_many_recordings_are_a_choice_that_does_not_change(make_job, embeddings, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 6)
    job = make_job(records(), SPEAKER, table(embedding=embeddings), label="meta:speaker")
    one, two = Verification(job, every=1), Verification(job, every=1)
    assert len(one._trials.target) == 15
    assert np.array_equal(one._trials.first, two._trials.first)


def test_without_two_recordings_of_one_speaker_there_is_nothing_to_verify(make_job, embeddings):
    job = make_job(records(), SPEAKER, table(embedding=embeddings), label="meta:speaker")
    with pytest.raises(UserError, match="no trials of one speaker among 28"):
        Verification(job, every=1, speaker=r"id:(\d).wav")
    job.config.task.name = "classify"
    with pytest.raises(UserError, match="verification judges the answers of speaker, and this is classify"):
        Verification(job, every=1)

"""Evaluators of classes and numbers: what they report is what the answers are worth; mistakes are named."""

import json

import numpy as np
import pytest
import scipy.special
from sklearn import metrics as reference

from speechjax.errors import UserError
from speechjax.evals import _answers, _groups
from speechjax.evals.classification import Classification
from speechjax.evals.values import Values
from speechjax.scoring import bootstrap, calibration, classes, numbers, report
from tests.data.memory import memory_records
from tests.evals.judging import table

N = 24
ONE = dict(name="classify", label="label", loss="softmax", classes=3)


def recordings(meta):
    return memory_records(2000 + 37 * np.arange(len(meta)), meta=meta)


def words(labels):
    """Recordings with a word each, None for none."""
    meta = [dict(word=word, home="ab"[i % 2]) for i, word in enumerate(labels)]
    return recordings([{key: value for key, value in own.items() if value is not None} for own in meta])


@pytest.fixture
def silent(make_job):
    """Four recordings of two words, and scores of zero."""
    return make_job(words("xyxy"), ONE, table(scores=np.zeros((4, 3), np.float32)), label="meta:word")


@pytest.fixture
def guesses():
    """(labels, logits): about two thirds are right, and too sure."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, N)
    said = np.where(rng.uniform(size=N) < 0.65, labels, rng.integers(0, 3, N))
    logits = rng.normal(size=(N, 3)).astype(np.float32)
    logits[np.arange(N), said] += 6
    return labels, logits


def test_classification_says_what_scikit_learn_does(make_job, tmp_path, guesses):
    labels, logits = guesses
    job = make_job(words(["xyz"[k] for k in labels]), ONE, table(scores=logits), label="meta:word")
    found = Classification(job, every=1, group="meta:home")({}, {}, 7, "words")
    said = logits.argmax(axis=1)
    right = said == labels
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    assert found["chance_accuracy"] == pytest.approx(np.bincount(labels).max() / N)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(labels, said, average="macro"))
    assert found["uar"] == pytest.approx(reference.balanced_accuracy_score(labels, said))
    assert found["temperature"] > 1.5  # too sure
    assert found["ece_scaled"] < found["ece"]
    each = [right[k::2].mean() for k in (0, 1)]
    assert found["accuracy_worst"] == pytest.approx(min(each))
    assert found["accuracy_gap"] == pytest.approx(abs(each[0] - each[1]))
    listed = json.loads((tmp_path / "report/words_classes.json").read_text())
    recall = [np.mean(said[labels == k] == k) for k in range(3)]
    assert {row[0]: row[2] for row in listed["rows"]} == {"xyz"[k]: f"{100 * recall[k]:.1f}" for k in range(3)}
    assert (tmp_path / "report/words_7.png").exists()
    assert (tmp_path / "report/words_calibration_7.png").exists()


def test_recordings_without_a_label_or_audio_are_not_judged(make_job, tmp_path, guesses, caplog):
    labels, logits = guesses
    records = words(["xyz"[k] if i % 5 else None for i, k in enumerate(labels)])
    job = make_job(records, ONE, table(scores=logits), label="meta:word")
    records.parts[0].shards.broken.update({1, 7})
    found = Classification(job, every=1)({}, {}, 0, "words")
    kept = [i for i in range(N) if i % 5 and i not in (1, 7)]
    assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1)[kept] == labels[kept]))
    assert "2 held-out examples could not be read" in caplog.text


def test_a_model_may_have_room_for_more_classes_than_occur(make_job, tmp_path, guesses):
    labels, logits = guesses
    wide = np.pad(logits, ((0, 0), (0, 4)), constant_values=-9).astype(np.float32)
    wide[0, 5] = 50
    task = dict(ONE, classes=7)
    job = make_job(words(["xyz"[k] for k in labels]), task, table(scores=wide), label="meta:word")
    found = Classification(job, every=1)({}, {}, 0, "words")
    assert found["accuracy"] == pytest.approx(np.mean(wide.argmax(axis=1) == labels))


def test_intents_are_right_where_all_heads_are(make_job):
    rng = np.random.default_rng(1)
    truth, logits = rng.integers(0, 3, (N, 2)), rng.normal(size=(2, N, 3)).astype(np.float32)
    for k in range(2):
        logits[k, np.arange(N), truth[:, k]] += 1.5
    meta = [dict(action="xyz"[a], thing="uvw"[b]) for a, b in truth]
    heads = {name: dict(task="classify", label=f"label_{name}", loss="softmax") for name in ("action", "thing")}
    job = make_job(
        recordings(meta), dict(name="several", heads=heads),
        table(action__scores=logits[0], thing__scores=logits[1]), label="action=meta:action ; thing=meta:thing",
    )  # fmt: skip
    right = logits.argmax(axis=2).T == truth
    found = Classification(job, every=1, head="action, thing")({}, {}, 0, "intents")
    assert found["accuracy"] == pytest.approx(right.all(axis=1).mean())
    assert found["accuracy"] < min(right.mean(axis=0))
    assert found["accuracy_thing"] == pytest.approx(right[:, 1].mean())
    alone = Classification(job, every=1, head="thing")({}, {}, 0, "things")
    assert alone["accuracy"] == found["accuracy_thing"]
    with pytest.raises(UserError, match=r"head='who'; this task has the heads action, thing"):
        Classification(job, every=1, head="who")


def test_tags_say_what_scikit_learn_does(make_job):
    rng = np.random.default_rng(2)
    truth = rng.uniform(size=(N, 4)) < 0.35
    truth[:4] = np.eye(4)  # every tag occurs
    logits = (rng.normal(size=(N, 4)) + 2 * truth - 1).astype(np.float32)
    meta = [dict(tags=["pqrs"[k] for k in np.flatnonzero(row)]) for row in truth]
    wide = np.pad(logits, ((0, 0), (0, 2)), constant_values=3)  # room for more tags
    job = make_job(recordings(meta), dict(ONE, loss="sigmoid"), table(scores=wide), label="tags:tags")
    found = Classification(job, every=1)({}, {}, 0, "tags")
    assert found["map"] == pytest.approx(reference.average_precision_score(truth, logits, average="macro"))
    assert found["f1_macro"] == pytest.approx(reference.f1_score(truth, logits > 0, average="macro"))
    assert found["f1_micro"] == pytest.approx(reference.f1_score(truth, logits > 0, average="micro"))
    assert found["f1_micro_low"] < found["f1_micro"] < found["f1_micro_high"]
    assert found["chance_map"] == pytest.approx(truth.mean())


def test_numbers_agree_with_numpy(make_job):
    rng = np.random.default_rng(3)
    truth = rng.uniform(1, 5, N).astype(np.float32)
    said = (truth + rng.normal(size=N)).astype(np.float32)
    meta = [dict(mos=float(x), home="ab"[i % 2]) if i else {} for i, x in enumerate(truth)]
    job = make_job(recordings(meta), dict(name="regress", label="label"), table(value=said), label="number:mos")
    found = Values(job, every=1, group="meta:home")({}, {}, 0, "mos")
    off = np.abs(said - truth)[1:]
    assert found["mae"] == pytest.approx(off.mean(), rel=1e-5)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-5)
    assert found["pearson"] == pytest.approx(np.corrcoef(truth[1:], said[1:])[0, 1], rel=1e-5)
    assert found["mae"] < found["chance_mae"] or found["pearson"] < 0.8
    assert found["mae_worst"] == pytest.approx(max(off[0::2].mean(), off[1::2].mean()), rel=1e-5)  # 1 is the first
    constant = Values(job, every=1)
    constant._compute = lambda variables, batch: {
        "value": np.full(len(batch["lengths"]), 3.0),
        "heard": batch["lengths"] > 0,
    }
    found = constant({}, {}, 0, "mos")
    assert np.isnan(found["pearson"])
    assert found["ccc"] == 0


# ---- intervals


def segments(meta):
    """Recordings of one to three segments, with what stands in their metadata."""
    of = np.repeat(np.arange(len(meta)), np.arange(len(meta)) % 3 + 1)
    ids = [f"r{i:02d}#{k:04d}" for i in range(len(meta)) for k in range(i % 3 + 1)]
    return of, memory_records(2000 + 37 * np.arange(len(of)), ids, [meta[i] for i in of])


def same_limits(found, name, score, blocks):
    expected = bootstrap.interval_of(score, len(blocks), blocks=blocks)
    np.testing.assert_allclose([found[name], found[f"{name}_low"], found[f"{name}_high"]], expected, rtol=1e-5)
    free = bootstrap.interval_of(score, len(blocks), resamples=300)
    assert abs(free.high - expected.high) + abs(free.low - expected.low) > 1e-3, "negative control: recordings matter"


def test_limits_of_classes_are_those_of_recordings_drawn_again(make_job):
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 3, 16)
    of, records = segments([dict(word="xyz"[k]) for k in labels])
    logits = rng.normal(size=(len(of), 3)).astype(np.float32)
    logits[np.arange(len(of)), labels[of]] += 1.5
    job = make_job(records, ONE, table(scores=logits), label="meta:word")
    found = Classification(job, every=1)({}, {}, 0, "words")
    true, said = labels[of], logits.argmax(axis=1)
    confidence = scipy.special.softmax(logits.astype(np.float64), axis=1).max(axis=1)

    def counts(rows):
        return classes.confusion_matrix(true[rows], said[rows], 3)

    def error(rows):
        own = calibration.reliability(confidence[rows], (said == true)[rows])
        return calibration.expected_calibration_error(own)

    same_limits(found, "macro_f1", lambda rows: classes.macro_f1(counts(rows)), of)
    same_limits(found, "uar", lambda rows: classes.unweighted_average_recall(counts(rows)), of)
    same_limits(found, "ece", error, of)
    assert found["ece_scaled_low"] < found["ece_scaled_high"]


def test_limits_of_tags_are_those_of_recordings_drawn_again(make_job):
    rng = np.random.default_rng(5)
    truth = rng.uniform(size=(16, 3)) < 0.5
    of, records = segments([dict(tags=["pqr"[k] for k in np.flatnonzero(row)]) for row in truth])
    logits = (rng.normal(size=(len(of), 3)) + truth[of] - 0.5).astype(np.float32)
    job = make_job(records, dict(ONE, loss="sigmoid"), table(scores=logits), label="tags:tags")
    found = Classification(job, every=1)({}, {}, 0, "tags")
    same_limits(found, "f1_macro", lambda rows: classes.multi_label_f1(truth[of][rows], logits[rows], 0.0).macro, of)
    assert found["map_low"] < found["map"] < found["map_high"]
    expected = bootstrap.interval_of(
        lambda rows: classes.mean_average_precision(truth[of][rows], logits[rows]), len(of), blocks=of, resamples=200
    )
    # Another number of resamples: the limits of 200 vary by a tenth of the interval.
    width = expected.high - expected.low
    np.testing.assert_allclose([found["map_low"], found["map_high"]], expected[1:], atol=0.25 * width)


def test_limits_of_numbers_are_those_of_recordings_drawn_again(make_job):
    rng = np.random.default_rng(6)
    truth = rng.uniform(1, 5, 16).astype(np.float32)
    of, records = segments([dict(mos=float(x), home="ab"[i % 2]) for i, x in enumerate(truth)])
    said = (truth[of] + rng.normal(size=16)[of] + 0.3 * rng.normal(size=len(of))).astype(np.float32)
    job = make_job(records, dict(name="regress", label="label"), table(value=said), label="number:mos")
    found = Values(job, every=1, group="meta:home")({}, {}, 0, "mos")
    pair = truth[of].astype(np.float64), said.astype(np.float64)
    for name in ("mae", "rmse", "pearson", "spearman", "ccc"):
        same_limits(found, name, lambda rows: getattr(numbers, name)(pair[0][rows], pair[1][rows]), of)  # noqa: B023


def test_limits_of_groups_are_those_of_their_recordings(silent, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "groups", lambda title, found, scale: seen.append(found) or dict(
        title="", columns=["a"], rows=[])
    )  # fmt: skip
    right, of = np.array([1.0] * 6 + [0.0] * 6 + [1, 0, 1, 1]), np.array([0] * 6 + [1] * 6 + [2, 3, 4, 4])
    names, ones = ["a"] * 12 + ["b"] * 4, np.ones(16)
    _groups.show(silent, 0, "accuracy", right, ones, names, blocks=of, higher_is_better=True)
    score = {group.name: group.score for group in seen[0].groups}
    assert score["a"] == bootstrap.interval(right[:12], ones[:12], blocks=of[:12])
    assert score["b"] == bootstrap.interval(right[12:], ones[12:], blocks=of[12:])
    assert score["a"] != bootstrap.interval(right[:12], ones[:12]), "negative control: a is two recordings"


def test_groups_without_a_score_are_not_those_that_are_large_enough(silent):
    names = ["a"] * 25 + ["b"] * 25 + ["c"] * 3
    wrong, there = np.ones(53), np.array([0.0] * 50 + [2.0] * 3)  # nobody speaks in a and b
    found = _groups.show(silent, 0, "der", wrong * (there > 0), there, names)
    assert found == {"der_worst": 0.5, "der_gap": 0.0}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("speaker", "group='speaker': write meta:FIELD or id:REGEX"), ("id:(", r"group='id:\(' is not a regular"),
        ("meta:nosuchfield", "group='meta:nosuchfield' fits no held-out recording, e.g. 'r0000'"),
    ],
)  # fmt: skip
def test_a_wrong_group_is_named_before_anything_is_computed(make_job, silent, group, message):
    with pytest.raises(UserError, match=message) as caught:
        Classification(silent, every=1, group=group)
    assert "\n" not in str(caught.value)
    meta = [dict(mos=float(i)) for i in range(4)]
    job = make_job(recordings(meta), dict(name="regress", label="label"), table(value=np.zeros(4)), label="number:mos")
    with pytest.raises(UserError, match=message):
        Values(job, every=1, group=group)


def test_a_group_must_fit_a_recording_that_is_judged(make_job):
    meta = [dict(word="x"), dict(word="y"), dict(home="a"), dict(home="b")]
    job = make_job(recordings(meta), ONE, table(scores=np.zeros((4, 3))), label="meta:word")
    with pytest.raises(UserError, match="group='meta:home' fits no held-out recording"):
        Classification(job, every=1, group="meta:home")


def test_mistakes_are_named_before_anything_is_computed(silent):
    job = silent
    with pytest.raises(UserError, match="classification: head='a', but the task classify is one head"):
        Classification(job, every=1, head="a")
    with pytest.raises(UserError, match="values judges the answers of regress, and this is classify"):
        Values(job, every=1)
    [label] = job.data.labels.parts
    label.codes[:] = 1
    with pytest.raises(UserError, match="all held-out recordings are 'y': hold out others too"):
        Classification(job, every=1)
    label.codes[:] = -1
    with pytest.raises(UserError, match=r"no held-out recording has a label \(config.data.label='meta:word'\)"):
        Classification(job, every=1)
    label.strangers["q"] = 3
    with pytest.raises(UserError, match=r"does not know 'q' \(3\) of config.data.label='meta:word'"):
        Classification(job, every=1)


# ---- groups


def test_labels_of_groups():
    records = memory_records(
        [100] * 4, ["a_x#0000", "a_x#0001", "b_x", "c"], [dict(n=0), dict(n=0), dict(n="q"), {}], part=[0, 0, 0, 1],
        weights=(1.0, 1.0),
    )  # fmt: skip
    every = range(4)
    assert _groups.labels(records, every, "meta:n") == ["0", "0", "q", ""]
    assert _groups.labels(records, every, "id:^(?P<label>[abc])") == ["a", "a", "b", "c"]
    assert _groups.labels(records, every, "id:(_)(?P<label>x)$") == ["x", "x", "x", ""]
    assert _groups.labels(records, every, "id:_(x)") == ["x", "x", "x", ""]
    assert _groups.blocks(records, np.arange(4)).tolist() == [0, 0, 1, 2]
    assert _groups.read(records, np.array([2, 3]), "meta:n") == {2: "q", 3: ""}
    assert _groups.read(records, np.array([2, 3]), "") == {}
    with pytest.raises(UserError, match="speaker='p': write meta:FIELD or id:REGEX"):
        _groups.labels(records, every, "p", "speaker")
    for spec, message in (
        ("tags:n", "write meta:FIELD or id:REGEX"), ("id:(", "is not a regular expression"),
        ("meta:q", "fits no held-out recording"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            _groups.labels(records, every, spec)


def test_groups_that_are_large_enough_are_compared(silent):
    names = ["a"] * 20 + ["b"] * 20 + ["c"]
    right = np.array([1.0] * 20 + [0.0] * 5 + [1.0] * 15 + [0.0])
    found = _groups.show(silent, 0, "accuracy", right, np.ones(41), names, higher_is_better=True)
    assert found == {"accuracy_worst": 0.75, "accuracy_gap": 0.25}  # c is one utterance
    few = _groups.show(silent, 0, "accuracy", right[15:], np.ones(26), names[15:], higher_is_better=True)
    assert few["accuracy_worst"] == 0  # only b has 20: all are compared


def test_a_table_shows_limits_beside_what_they_limit(silent, tmp_path):
    _answers.show(silent, 3, "words", dict(accuracy=0.5, accuracy_low=0.25, accuracy_high=0.75, ece=0.125))
    text = (tmp_path / "report/tables.txt").read_text()
    assert "25.0% to 75.0%" in text
    assert "words at step 3" in text
    assert "accuracy_low" not in text.lower().replace(" ", "_")

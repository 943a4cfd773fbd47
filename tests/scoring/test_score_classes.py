"""Classification against scikit-learn; calibration against closed forms."""

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.errors import UserError
from speechjax.scoring import calibration, classes

SEEDS = st.integers(0, 10_000)
QUICK = settings(max_examples=25, deadline=None)


def drawn(seed: int, n: int = 60, k: int = 5):
    """Labels of the first k - 1 classes, predictions of all k: a class without references, and perhaps one without."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k - 1, n)
    labels[:2] = 0, 1
    return labels, np.where(rng.random(n) < 0.5, labels, rng.integers(0, k, n))


@QUICK
@given(SEEDS)
def test_scores_are_scikit_learns(seed):
    labels, said = drawn(seed, n=12)
    counts = classes.confusion_matrix(labels, said, 6)
    assert counts.tolist() == sklearn.metrics.confusion_matrix(labels, said, labels=range(6)).tolist()
    assert classes.accuracy(counts) == pytest.approx(sklearn.metrics.accuracy_score(labels, said), rel=1e-12)
    present = np.unique(labels)
    recalls = sklearn.metrics.recall_score(labels, said, labels=present, average=None, zero_division=0)
    assert classes.unweighted_average_recall(counts) == pytest.approx(np.mean(recalls), rel=1e-12)
    if set(said) <= set(labels):  # else it warns
        balanced = sklearn.metrics.balanced_accuracy_score(labels, said)
        assert classes.unweighted_average_recall(counts) == pytest.approx(balanced, rel=1e-12)
    f1 = sklearn.metrics.f1_score(labels, said, average="macro", zero_division=0)
    assert classes.macro_f1(counts) == pytest.approx(f1, rel=1e-12)
    one = classes.class_scores(counts)
    assert np.isnan(one.recall[4:]).all(), "no references of it"
    assert np.isnan(one.f1[5]), "neither referred to nor predicted"


def test_parts_of_a_test_set_add_up():
    labels, said = drawn(0)
    whole = classes.confusion_matrix(labels, said, 5)
    parts = classes.confusion_matrix(labels[:20], said[:20], 5) + classes.confusion_matrix(labels[20:], said[20:], 5)
    assert (whole == parts).all()
    assert classes.macro_f1(2 * whole) == classes.macro_f1(whole)


def test_a_constant_answer_is_seen_through():
    counts = classes.confusion_matrix(np.array([0] * 9 + [1]), np.zeros(10, int), 2)
    assert classes.accuracy(counts) == 0.9
    assert classes.unweighted_average_recall(counts) == 0.5


@QUICK
@given(SEEDS)
def test_several_labels_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels, scores = rng.random((15, 4)) < 0.3, np.round(rng.random((15, 4)), 1)  # ties
    labels[:, 3], scores[:, 3] = False, 0.0  # a class of which there is nothing
    labels[0, 0] = True
    there = labels.any(axis=0)
    expected = sklearn.metrics.average_precision_score(labels[:, there], scores[:, there], average="macro")
    assert classes.mean_average_precision(labels, scores) == pytest.approx(expected, rel=1e-12)
    monotone = np.exp(3 * scores)
    assert classes.mean_average_precision(labels, monotone) == pytest.approx(expected, rel=1e-12)
    for threshold in (0.5, np.array([0.2, 0.5, 0.7, 0.5])):
        found = classes.multi_label_f1(labels, scores, threshold)
        said = scores >= threshold
        either = (labels | said).any(axis=0)
        macro = sklearn.metrics.f1_score(labels[:, either], said[:, either], average="macro", zero_division=0)
        micro = sklearn.metrics.f1_score(labels, said, average="micro", zero_division=0)
        np.testing.assert_allclose(found, (macro, micro), rtol=1e-12)


# ---- calibration


def test_calibration_error_by_hand():
    confidence = np.array([0.55, 0.6, 0.95, 0.9, 1.0])
    correct = np.array([1, 0, 1, 1, 0])
    table = calibration.reliability(confidence, correct, bins=2)
    assert table.count.tolist() == [0, 5]
    assert calibration.expected_calibration_error(table) == pytest.approx(abs(0.8 - 0.6), rel=1e-12)
    table = calibration.reliability(confidence, correct, bins=10)
    # (0.5, 0.6]: confidence 0.575, accuracy 0.5; (0.8, 0.9]: 0.9, 1; (0.9, 1]: 0.975, 0.5: an edge is of the lower bin.
    assert table.count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 1, 2]
    error = (2 * 0.075 + 1 * 0.1 + 2 * 0.475) / 5
    assert calibration.expected_calibration_error(table) == pytest.approx(error, rel=1e-9)


def test_equal_mass_bins_hold_equally_many():
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 1, 1200)
    table = calibration.reliability(confidence, rng.random(1200) < confidence, equal_mass=True)
    assert table.count.tolist() == [80] * 15
    ties = calibration.reliability(np.repeat([0.3, 0.5, 0.9], 10), np.ones(30), bins=6, equal_mass=True)
    assert ties.count.tolist() == [10, 10, 10], "equal confidences stay together"
    assert ties.confidence == pytest.approx([0.3, 0.5, 0.9])


@QUICK
@given(SEEDS, st.booleans())
def test_order_and_doubling_do_not_change_calibration(seed, equal_mass):
    rng = np.random.default_rng(seed)
    confidence, correct = np.round(rng.random(23), 2), rng.random(23) < 0.5

    def error(i):
        table = calibration.reliability(confidence[i], correct[i], equal_mass=equal_mass)
        return calibration.expected_calibration_error(table)

    twice = rng.permutation(np.tile(np.arange(23), 2))
    assert error(twice) == pytest.approx(error(np.arange(23)), rel=1e-9, abs=1e-12)


def test_a_calibrated_classifier_has_little_error_and_an_overconfident_one_has_its_excess():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5, 0.9, 40_000)
    correct = rng.random(40_000) < truth
    for equal_mass in (False, True):
        calibrated = calibration.reliability(truth, correct, equal_mass=equal_mass)
        # Chance alone: |N(0, 0.5 / sqrt(40000 / 15))| a bin, 0.8 % on average.
        assert calibration.expected_calibration_error(calibrated) < 0.015
        over = calibration.reliability(truth + 0.1, correct, equal_mass=equal_mass)
        assert calibration.expected_calibration_error(over) == pytest.approx(0.1, abs=0.01)


def test_brier_and_log_loss_are_scikit_learns():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 4)), rng.integers(0, 4, 30)
    p = scipy.special.softmax(logits, axis=1)
    expected = sklearn.metrics.brier_score_loss(labels, p, labels=range(4), scale_by_half=False)
    assert calibration.brier(p, labels) == pytest.approx(expected, rel=1e-12)
    assert calibration.brier(np.eye(4)[labels], labels) == 0
    assert calibration.brier(np.full((30, 4), 0.25), labels) == pytest.approx(0.75)
    expected = sklearn.metrics.log_loss(labels, p, labels=range(4))
    assert calibration.log_loss(logits, labels) == pytest.approx(expected, rel=1e-12)


def test_the_temperature_is_found_again():
    """Labels drawn from softmax(logits): the logits twice over are too sure by a temperature of 2."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    labels = (scipy.special.softmax(logits, axis=1).cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    found = calibration.fit_temperature(2 * logits, labels)
    assert found == pytest.approx(2.0, rel=0.03)  # of 20,000 labels
    assert calibration.fit_temperature(logits, labels) == pytest.approx(found / 2, rel=1e-4)

    def slope(temperature):
        h = 1e-3
        above, below = (calibration.log_loss(2 * logits / t, labels) for t in (temperature + h, temperature - h))
        return (above - below) / (2 * h)

    assert abs(slope(found)) < 1e-4
    assert abs(slope(1.2 * found)) > 1e-2, "negative control"


def test_without_a_best_temperature_there_is_a_limit():
    logits, labels = np.eye(3), np.arange(3)
    assert calibration.fit_temperature(logits, labels) == pytest.approx(0.01)
    assert calibration.fit_temperature(-logits, labels) == pytest.approx(100)


# ---- many resamples at once


def repeated(weights, score):
    """`score(rows)` of each column of weights, NaN where it raises UserError."""
    found = []
    for column in weights.T:
        try:
            found.append(score(np.repeat(np.arange(len(column)), column.astype(int))))
        except UserError:
            found.append(np.nan)
    return np.array(found)


@QUICK
@given(SEEDS)
def test_weights_are_repetitions(seed):
    labels, said = drawn(seed, n=9, k=4)
    rng = np.random.default_rng(seed)
    weights = rng.poisson(0.4, (9, 40)).astype(np.float64)
    sparse = [classes.indicators(*own) for own in ((labels, 4, labels == said), (labels, 4), (said, 4))]
    found = classes.averages(*sparse, weights)
    for own, score in ((found.macro_f1, classes.macro_f1), (found.uar, classes.unweighted_average_recall)):
        expected = repeated(weights, lambda rows: score(classes.confusion_matrix(labels[rows], said[rows], 4)))  # noqa: B023
        np.testing.assert_allclose(own, expected, rtol=1e-12)
    assert np.isnan(found.uar).any(), "some resamples have one class only"
    confidence = np.round(rng.random(9), 1)
    expected = repeated(
        weights,
        lambda rows: calibration.expected_calibration_error(
            calibration.reliability(confidence[rows], (labels == said)[rows])
        ),
    )
    kept = weights.any(axis=0)
    found = calibration.calibration_errors(confidence, labels == said, weights[:, kept])
    np.testing.assert_allclose(found, expected[kept], rtol=1e-9, atol=1e-12)


@QUICK
@given(SEEDS)
def test_weights_of_tags_are_repetitions(seed):
    rng = np.random.default_rng(seed)
    labels, scores = rng.random((8, 3)) < 0.3, np.round(rng.normal(size=(8, 3)), 1)  # ties
    labels[0, 0] = True
    weights = rng.poisson(0.5, (8, 12)).astype(np.float64)
    weights[:, :2] = np.array([0, 1])
    found = classes.mean_average_precisions(labels, scores, weights)
    expected = repeated(weights, lambda rows: classes.mean_average_precision(labels[rows], scores[rows]))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    found = classes.macro_f1_of_tags(labels, scores >= 0.2, weights)
    expected = repeated(weights, lambda rows: classes.multi_label_f1(labels[rows], scores[rows], 0.2).macro)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_refusals():
    with pytest.raises(UserError, match="is the test set empty"):
        classes.confusion_matrix([], [], 3)
    with pytest.raises(UserError, match="is the test set empty"):
        classes.accuracy(np.zeros((3, 3), int))
    for score in (classes.macro_f1, classes.unweighted_average_recall):
        with pytest.raises(UserError, match=r"one class only \(number 1\)"):
            score(classes.confusion_matrix([1, 1], [0, 1], 3))
        with pytest.raises(UserError, match="is the test set empty"):
            score(np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="classes from -1 to 0"):
        classes.confusion_matrix([0], [-1], 3)
    with pytest.raises(UserError, match="no class has a positive"):
        classes.mean_average_precision(np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(UserError, match="none is predicted"):
        classes.multi_label_f1(np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(UserError, match="contain NaN"):
        classes.mean_average_precision(np.ones((1, 1)), [[np.nan]])
    with pytest.raises(UserError, match="give probabilities"):
        calibration.reliability([2.0], [True])
    with pytest.raises(ValueError, match="labels below K"):
        calibration.brier(np.ones((2, 2)), [0, 2])

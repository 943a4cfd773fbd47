"""Scores of classification: one label an utterance (from counts, so that parts add up), or several.

Shapes: N utterances, K classes, R resamples.
"""

from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.scoring import _checks

# ---- one label


def confusion_matrix(labels: Any, predictions: Any, n_classes: int) -> np.ndarray:
    """int64 [K, K]: utterances of each label (rows) and each prediction (columns); labels, predictions: int [N].

    Raises UserError without utterances, ValueError for a class that is not among 0 ... n_classes - 1.
    """
    labels, predictions = _checks.columns(labels=labels, predictions=predictions)
    low, high = min(labels.min(), predictions.min()), max(labels.max(), predictions.max())
    if low < 0 or high >= n_classes:
        raise ValueError(f"classes from {low} to {high} in a table of {n_classes}")
    pairs = labels.astype(np.int64) * n_classes + predictions.astype(np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def accuracy(counts: np.ndarray) -> float:
    """Share of the utterances that are right.  Raises UserError without any."""
    if not counts.sum():
        raise UserError("nothing to score: no labels; is the test set empty?")
    return float(np.trace(counts) / counts.sum())


def unweighted_average_recall(counts: np.ndarray) -> float:
    """UAR, also called balanced accuracy: recall averaged over the classes that there are references of.

    Raises UserError where that is one class only: then recall is 1 for a constant answer.
    """
    _several(counts)
    return float(np.nanmean(class_scores(counts).recall))


def macro_f1(counts: np.ndarray) -> float:
    """F1 averaged over classes; those that are neither in the references nor predicted are left out.

    Raises UserError where the references are of one class only.
    """
    _several(counts)
    return float(np.nanmean(class_scores(counts).f1))


class ClassScores(NamedTuple):
    """Of every class, float64 [K]; NaN: what would divide by none (references, predictions, either)."""

    recall: np.ndarray
    precision: np.ndarray
    f1: np.ndarray


def class_scores(counts: np.ndarray) -> ClassScores:
    """Recall, precision and F1 of every class of a table [K, K]."""
    return _class_scores(np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0))


def _class_scores(right: np.ndarray, there: np.ndarray, said: np.ndarray) -> ClassScores:
    """Of counts of either shape, [K] or [K, R]: said rightly, in the references, said."""
    return ClassScores(_share(right, there), _share(right, said), _share(2 * right, there + said))


class Averages(NamedTuple):
    """`macro_f1` and `unweighted_average_recall` of many resamples, float64 [R]; NaN where the references of one are of
    fewer than two classes."""

    macro_f1: np.ndarray
    uar: np.ndarray


def averages(right: Any, there: Any, said: Any, weights: np.ndarray) -> Averages:
    """Of utterances or recordings [N, K], arrays or scipy's sparse ones, of which each class is said rightly, in the
    references and said so often; weights [N, R], how often each counts: for `bootstrap.intervals_of`.
    """
    right, there, said = (x.T @ weights for x in (right, there, said))
    scores = _class_scores(right, there, said)
    several = (there > 0).sum(axis=0) > 1
    return Averages(*(_mean_of_known(x, several) for x in (scores.f1, scores.recall)))


def indicators(classes: Any, n_classes: int, counted: Any = None) -> Any:
    """Sparse float64 [N, K], 1 for the class int [N] of each utterance, or 0 where it is not `counted`, bool [N]."""
    from scipy.sparse import csr_array

    N = len(classes)
    ones = np.ones(N) if counted is None else np.asarray(counted, np.float64)
    return csr_array((ones, (np.arange(N), np.asarray(classes))), shape=(N, n_classes))


def _mean_of_known(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mean over classes of [K, R], NaN left out: [R], NaN where it is not `known`."""
    there = ~np.isnan(values)
    total, n = np.where(there, values, 0.0).sum(axis=0), there.sum(axis=0)
    return np.where(known & (n > 0), total, np.nan) / np.maximum(n, 1)


def _several(counts: np.ndarray) -> None:
    present = np.flatnonzero(counts.sum(axis=1))
    if not len(present):
        raise UserError("nothing to score: no labels; is the test set empty?")
    if len(present) == 1:
        raise UserError(f"the references hold one class only (number {present[0]}): an average over classes needs two")


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


# ---- several labels


def mean_average_precision(labels: Any, scores: Any) -> float:
    """mAP: average precision of each class's ranking of the utterances, averaged over classes that have positives.

    labels: bool [N, K]; scores: float [N, K], of any scale.  Average precision is the sum of precision over the steps
    in recall, without interpolation, utterances of one score in one step (scikit-learn's).
    Raises UserError where no class has positives.
    """
    from sklearn.metrics import average_precision_score  # late: a second

    labels, scores = _tables(labels, scores)
    there = np.flatnonzero(labels.any(axis=0))
    if not len(there):
        raise UserError("no class has a positive: average precision needs some; check the labels of the test set")
    return float(np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in there]))


def mean_average_precisions(labels: Any, scores: Any, weights: np.ndarray) -> np.ndarray:
    """`mean_average_precision` of many resamples at once: weights [N, R], how often each utterance counts -> [R].

    NaN where no class has positives in a resample: for `bootstrap.intervals_of`.
    """
    labels, scores = _tables(labels, scores)
    total, known = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for k in np.flatnonzero(labels.any(axis=0)):
        positive, own = labels[:, k], scores[:, k]
        # Precision counts where there are positives: at their scores, from the highest.
        steps = -np.unique(-own[positive])
        step = np.searchsorted(-steps, -own)  # the first of them that accepts the utterance
        accepted = step < len(steps)
        right = indicators(step[positive], len(steps)).T @ weights[positive]
        every = np.cumsum(indicators(step[accepted], len(steps)).T @ weights[accepted], axis=0)
        found, precision = right.sum(axis=0), np.cumsum(right, axis=0) / np.maximum(every, 1)
        total += (right * precision).sum(axis=0) / np.maximum(found, 1)
        known += found > 0
    return np.where(known > 0, total, np.nan) / np.maximum(known, 1)


class F1(NamedTuple):
    """Averaged over classes (those neither in the references nor predicted left out), and of all decisions at once."""

    macro: float
    micro: float


def multi_label_f1(labels: Any, scores: Any, threshold: float | np.ndarray = 0.5) -> F1:
    """labels: bool [N, K]; scores: float [N, K]; a class is said where its score is at least `threshold`, one or [K].

    Raises UserError where nothing is in the references and nothing said.
    """
    labels, scores = _tables(labels, scores)
    said = scores >= np.broadcast_to(threshold, scores.shape[1:])
    right, either = (labels & said).sum(axis=0), labels.sum(axis=0) + said.sum(axis=0)
    if not either.any():
        raise UserError("no class has a positive and none is predicted: F1 needs some; check labels and threshold")
    return F1(float(np.nanmean(_share(2 * right, either))), float(2 * right.sum() / either.sum()))


def macro_f1_of_tags(labels: Any, said: Any, weights: np.ndarray) -> np.ndarray:
    """The macro F1 of many resamples at once: labels, said bool [N, K], weights [N, R], how often each counts -> [R].

    NaN where nothing is in the references and nothing said: for `bootstrap.intervals_of`.
    """
    from scipy.sparse import csr_array

    labels, said = _tables(labels, said)
    tables = (labels & said, labels.astype(np.float64) + said)
    right, either = (csr_array(np.asarray(x, np.float64)).T @ weights for x in tables)
    return _mean_of_known(_share(2 * right, either), either.any(axis=0))


def _tables(labels: Any, scores: Any) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = _checks.columns(labels=labels, scores=scores)
    if labels.ndim != 2 or labels.shape != scores.shape:
        raise ValueError(f"want labels and scores [N, K]; got {labels.shape} and {scores.shape}")
    return labels.astype(bool), scores

"""Do probabilities mean what they say?  Expected calibration error, Brier score, temperature scaling.

Shapes: N utterances, K classes, M bins, R resamples.
"""

from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.scoring import _checks

BINS = 15  # Guo et al. 2017, section 5
_COLDEST, _HOTTEST = 1e-2, 1e2


class Reliability(NamedTuple):
    """A reliability table, float64 [M] each: bins without utterances have a count of 0 and NaN.

    `edges` [M + 1] of the bins, (edge, next edge]; `count` of utterances, their mean `confidence` and `accuracy`.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(confidence: Any, correct: Any, *, bins: int = BINS, equal_mass: bool = False) -> Reliability:
    """Confidence against accuracy in bins: confidence float [N] in [0, 1], of the class said; correct bool [N].

    Bins are of equal width, ((m - 1) / M, m / M] (Guo et al. 2017, "On calibration of modern neural networks", section
    2), or hold equally many utterances (Nguyen and O'Connor 2015), as far as equal confidences, which stay together,
    allow: there may then be fewer.
    Raises UserError without utterances or for a confidence outside of [0, 1].
    """
    confidence, correct = _checks.columns(confidence=confidence, correct=correct)
    if confidence.min() < 0 or confidence.max() > 1:
        raise UserError(
            f"confidence from {confidence.min():.3g} to {confidence.max():.3g}: give probabilities, softmax of logits"
        )
    if equal_mass:
        # Values that occur, so that a test set twice over has the same bins.
        inner = np.quantile(confidence, np.arange(1, bins) / bins, method="inverted_cdf")
        inner = np.unique(inner[inner < confidence.max()])
        edges = np.concatenate([[0.0], inner, [1.0]])
    else:
        edges = np.linspace(0.0, 1.0, bins + 1)
    bin_ = np.searchsorted(edges[1:-1], confidence, side="left")
    count, own, right = (
        np.bincount(bin_, weights, minlength=len(edges) - 1)
        for weights in (np.ones(len(confidence)), confidence.astype(np.float64), correct.astype(np.float64))
    )
    mean = np.maximum(count, 1)
    return Reliability(edges, count, np.where(count > 0, own / mean, np.nan), np.where(count > 0, right / mean, np.nan))


def expected_calibration_error(table: Reliability) -> float:
    """ECE: mean |accuracy - confidence| of the bins, weighted by utterances (Naeini et al. 2015; Guo et al., eq. 3).

    It depends on the bins, and is above 0 for a perfectly calibrated classifier on few utterances.
    """
    gaps = np.abs(table.accuracy - table.confidence)
    return float(np.nansum(gaps * table.count) / table.count.sum())


def calibration_errors(confidence: Any, correct: Any, weights: np.ndarray) -> np.ndarray:
    """ECE in bins of equal width of many resamples at once: weights [N, R], how often each utterance counts -> [R].

    For `bootstrap.intervals_of`.  Resamples have gaps by chance on top of those that chance gave the utterances
    themselves: of a well calibrated classifier the interval is too high, and may even be above its error.
    """
    from scipy.sparse import csr_array

    confidence, correct = _checks.columns(confidence=confidence, correct=correct)
    N = len(confidence)
    bin_ = np.searchsorted(np.linspace(0.0, 1.0, BINS + 1)[1:-1], confidence, side="left")
    gap = csr_array((np.asarray(correct, np.float64) - confidence, (bin_, np.arange(N))), shape=(BINS, N))
    return np.abs(gap @ weights).sum(axis=0) / weights.sum(axis=0)


def brier(probabilities: Any, labels: Any) -> float:
    """Mean over utterances of the sum over classes of (probability - truth) squared (Brier 1950): 0 to 2.

    probabilities: [N, K]; labels: int [N].
    """
    probabilities, labels = _logits(probabilities, labels)
    return float(np.mean(np.sum(np.square(probabilities - np.eye(probabilities.shape[1])[labels]), axis=1)))


def log_loss(logits: Any, labels: Any) -> float:
    """Mean negative log-probability of the labels in nats: logits [N, K], labels int [N]."""
    from scipy.special import log_softmax

    logits, labels = _logits(logits, labels)
    return float(-np.mean(log_softmax(logits, axis=1)[np.arange(len(labels)), labels]))


def fit_temperature(logits: Any, labels: Any) -> float:
    """The temperature T for which softmax(logits / T) has the least log loss (Guo et al. 2017, section 4.2).

    logits: [N, K]; labels: int [N].  Fit on other utterances than are scored.  The loss has one minimum over log T;
    where it has none, as every label is the best guess or guesses are worse than chance, a limit of the search comes
    back, 0.01 or 100.
    """
    from scipy.optimize import minimize_scalar

    logits, labels = _logits(logits, labels)
    limits = float(np.log(_COLDEST)), float(np.log(_HOTTEST))
    found: Any = minimize_scalar(
        lambda log_t: log_loss(logits / np.exp(log_t), labels), bounds=limits, method="bounded",
        options={"xatol": 1e-6},
    )  # fmt: skip
    # The search never looks at its limits themselves.
    at = min((*limits, float(found.x)), key=lambda log_t: log_loss(logits / np.exp(log_t), labels))
    return float(np.exp(at))


def _logits(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = _checks.columns(scores=logits, labels=labels)
    if logits.ndim != 2 or labels.ndim != 1 or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"want scores [N, K] and labels below K; got {logits.shape}, {labels.shape}, {labels.max()}")
    return logits.astype(np.float64), labels.astype(np.int64)

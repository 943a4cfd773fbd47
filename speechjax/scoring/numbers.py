"""Scores of regression, where references and predictions are numbers: float [N] each.  Shapes: N utterances."""

from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.scoring import _checks


class Agreement(NamedTuple):
    """Errors in units of the references, and three correlations."""

    mae: float
    rmse: float
    pearson: float
    spearman: float
    ccc: float


def agreement(references: Any, predictions: Any) -> Agreement:
    """All of them; raises UserError as they do."""
    pair = references, predictions
    return Agreement(mae(*pair), rmse(*pair), pearson(*pair), spearman(*pair), ccc(*pair))


def mae(references: Any, predictions: Any) -> float:
    """Mean absolute error."""
    references, predictions = _pair(references, predictions)
    return float(np.mean(np.abs(predictions - references)))


def rmse(references: Any, predictions: Any) -> float:
    """Square root of the mean squared error."""
    references, predictions = _pair(references, predictions)
    return float(np.sqrt(np.mean(np.square(predictions - references))))


def pearson(references: Any, predictions: Any) -> float:
    """Linear correlation.  Raises UserError where either side is constant, and for fewer than two utterances."""
    references, predictions = _pair(references, predictions)
    _vary(references=references, predictions=predictions)
    return _correlation(references, predictions)


def spearman(references: Any, predictions: Any) -> float:
    """Correlation of ranks, ties at their mean.  Raises UserError where either side is constant."""
    from scipy.stats import rankdata

    references, predictions = _pair(references, predictions)
    _vary(references=references, predictions=predictions)
    return _correlation(rankdata(references), rankdata(predictions))


def ccc(references: Any, predictions: Any) -> float:
    """Concordance correlation coefficient (Lin 1989, eq. 2, with moments over N): 1 only where both are equal.

    Raises UserError where the references are constant; constant predictions have 0.
    """
    references, predictions = _pair(references, predictions)
    _vary(references=references)
    r, p = references - references.mean(), predictions - predictions.mean()
    distance = np.square(references.mean() - predictions.mean())
    return float(2 * np.mean(r * p) / (np.mean(r * r) + np.mean(p * p) + distance))


def _pair(references: Any, predictions: Any) -> tuple[np.ndarray, np.ndarray]:
    references, predictions = _checks.columns(references=references, predictions=predictions)
    if references.ndim != 1 or predictions.ndim != 1:
        raise ValueError(f"want one number an utterance; got {references.shape} and {predictions.shape}")
    return references.astype(np.float64), predictions.astype(np.float64)


def _vary(**named: np.ndarray) -> None:
    for name, values in named.items():
        if not np.ptp(values) > 0:
            raise UserError(f"all {len(values)} {name} are {values[0]:.4g}: a correlation needs them to differ")


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))

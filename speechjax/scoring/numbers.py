"""Scores of regression, where references and predictions are numbers: float [N] each.

Shapes: N utterances, R resamples.
"""

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


def agreements(references: Any, predictions: Any, weights: np.ndarray) -> dict[str, np.ndarray]:
    """`agreement` of many resamples at once, by name: weights [N, R], how often each utterance counts, whole numbers.

    Float64 [R] each, NaN where a resample has no such score: for `bootstrap.intervals_of`.
    """
    from scipy.sparse import csr_array

    references, predictions = _pair(references, predictions)
    off = predictions - references
    total = np.where(weights.any(axis=0), weights.sum(axis=0), np.nan)
    # Moments of small numbers, for the sake of digits.
    references, predictions = references - references.mean(), predictions - references.mean()
    columns = [np.abs(off), off**2, references, predictions, references**2, predictions**2, references * predictions]
    # Sparse for it has no threads: those of numpy's product wait for each other on a machine that is busy.
    absolute, squared, r, p, rr, pp, rp = csr_array(np.stack(columns)) @ weights / total
    covariance, r_variance, p_variance = rp - r * p, rr - r * r, pp - p * p
    r_rank, p_rank = _ranks(references, weights), _ranks(predictions, weights)
    weighted = weights * r_rank
    # Ranks are whole numbers and halves: these are 0, not nearly 0, where all that count are equal.
    r_spread, p_spread = (weighted * r_rank).sum(axis=0), (weights * p_rank * p_rank).sum(axis=0)
    both = (r_spread > 0) & (p_spread > 0)
    return dict(
        mae=absolute,
        rmse=np.sqrt(squared),
        pearson=_ratio(covariance, np.sqrt(np.abs(r_variance * p_variance)), both),
        spearman=_ratio((weighted * p_rank).sum(axis=0), np.sqrt(r_spread * p_spread), both),
        ccc=_ratio(np.where(both, 2 * covariance, 0.0), r_variance + p_variance + np.square(r - p), r_spread > 0),
    )


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rank of every utterance among those that count, ties at their mean, less the mean of all ranks: [N, R]."""
    _, first, same = np.unique(np.sort(values), return_index=True, return_inverse=True)
    order = np.argsort(values, kind="stable")
    tied = np.add.reduceat(weights[order], first, axis=0)
    rank = np.cumsum(tied, axis=0) - tied / 2 - weights.sum(axis=0) / 2
    found = np.empty_like(weights)
    found[order] = rank[same.reshape(-1)]
    return found


def _ratio(top: np.ndarray, bottom: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known, top, np.nan) / np.where(known, bottom, 1.0)


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

"""How sure a score is: intervals, and comparisons of two systems, by resampling the test set.

Percentile bootstrap (Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance
evaluation", sections 2 and 3): draw as many utterances as there are, with replacement, score them, do that often; the
interval holds the middle 95 % of the scores.  Utterances of one speaker, or segments of one recording, are not
independent and make such intervals too narrow: `blocks`, one label an utterance, are then drawn as wholes (Liu and
Peng 2020, "Statistical testing on ASR performance via blockwise bootstrap").

A percentile interval of few blocks is itself too narrow, of m by about sqrt((m - 1) / m), and more where they differ in
size: under some 20 speakers take it for a lower bound of the uncertainty.

Shapes: N utterances, M blocks, R resamples.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.scoring import _checks

RESAMPLES = 2000
_AT_ONCE = 1 << 22  # drawn numbers in memory
_AT_HAND = 1 << 19  # weights in memory, about as many as a cache has room for


class Interval(NamedTuple):
    """A score and the limits of its interval.

    The limits are NaN where there was only one block to draw from, or every second resample had no score.
    """

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The second system's score less the first's, and the probability of improvement.

    `improvement` is the share of resamples in which the second is better, ties not counted (Bisani and Ney 2004,
    section 4): two equal systems have 0, not 0.5.  NaN where the interval has no limits.
    """

    interval: Interval
    improvement: float


def interval(
    numerators: Any, denominators: Any, *, blocks: Any = None, level: float = 0.95, resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:  # fmt: skip
    """Of a ratio of sums over utterances, such as errors / words, or right / 1: numerators and denominators [N].

    Raises UserError without utterances, and where the denominators sum to 0.
    """
    top, bottom = _ratio_columns(numerators, denominators)
    return _limits(_ratio(top, bottom), _ratios(top, bottom, blocks, resamples, seed), level)


def difference(
    first: Any, second: Any, denominators: Any, *, higher_is_better: bool = False, blocks: Any = None,
    level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0,
) -> Difference:  # fmt: skip
    """Of two systems on the same utterances, with the numerators `first` and `second` [N] of a ratio, paired.

    Raises UserError without utterances, and where the denominators sum to 0.
    """
    first, second, _ = _checks.columns(first=first, second=second, denominators=denominators)
    top, bottom = _ratio_columns(second.astype(np.float64) - first.astype(np.float64), denominators)
    found = _ratios(top, bottom, blocks, resamples, seed)
    return Difference(_limits(_ratio(top, bottom), found, level), _improvement(found, higher_is_better))


def interval_of(
    fn: Callable[[np.ndarray], float], n: int, *, blocks: Any = None, level: float = 0.95, resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:  # fmt: skip
    """Of any score: `fn` gets the numbers of the drawn utterances, an int array of 0 ... n - 1, many repeated.

    Resamples for which `fn` returns NaN or raises UserError (one class only, say) have no score and are left out; what
    it raises on the whole test set is raised.
    """
    return _limits(float(fn(np.arange(n))), _scores(fn, n, blocks, resamples, seed), level)


def intervals_of(
    fn: Callable[[np.ndarray], Mapping[str, Any]], n: int, *, blocks: Any = None, level: float = 0.95,
    resamples: int = RESAMPLES, seed: int = 0,
) -> dict[str, Interval]:  # fmt: skip
    """Of several scores at once, {name: interval}, many resamples at a time: `fn` gets how often each utterance was
    drawn, float64 [N, r], a resample a column, and returns {name: scores [r]}, NaN where a resample has none.

    The draws are those of `interval_of`; a score that is a function of sums over utterances, sums that are one product
    with the weights, is far quicker.  The values are those of the weights 1.
    Raises UserError without utterances.
    """
    if n < 1:
        raise UserError("nothing to score: no utterances; is the test set empty?")
    block = _numbered(n, blocks)
    units = int(block.max()) + 1
    size = max(1, _AT_HAND // n)
    found: list[Mapping[str, Any]] = []
    for drawn in _draws(units, resamples, seed):
        for rows in np.split(drawn, range(size, len(drawn), size)):
            counts = np.bincount((rows + units * np.arange(len(rows))[:, None]).ravel(), minlength=units * len(rows))
            found.append(fn(counts.reshape(len(rows), units).T.astype(np.float64, order="C")[block]))
    values = fn(np.ones((n, 1)))
    every = {name: np.concatenate([np.zeros(0), *(part[name] for part in found)]) for name in values}
    return {name: _limits(float(value[0]), every[name], level) for name, value in values.items()}


def difference_of(
    first: Callable[[np.ndarray], float], second: Callable[[np.ndarray], float], n: int, *,
    higher_is_better: bool = False, blocks: Any = None, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0,
) -> Difference:  # fmt: skip
    """Of any score of two systems on the same utterances; see `interval_of`."""

    def both(rows: np.ndarray) -> float:
        return float(second(rows)) - float(first(rows))

    found = _scores(both, n, blocks, resamples, seed)
    return Difference(_limits(both(np.arange(n)), found, level), _improvement(found, higher_is_better))


def _ratio_columns(numerators: Any, denominators: Any) -> tuple[np.ndarray, np.ndarray]:
    top, bottom = _checks.columns(numerators=numerators, denominators=denominators)
    if (bottom < 0).any() or not bottom.sum() > 0:
        raise UserError("the denominators of a ratio must be 0 or more and their sum positive: no references to score?")
    return top.astype(np.float64), bottom.astype(np.float64)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> float:
    return float(top.sum() / bottom.sum())


def _numbered(n: int, blocks: Any) -> np.ndarray:
    """Blocks as numbers 0 ... M - 1: int [N]."""
    if blocks is None:
        return np.arange(n)
    labels = np.asarray(blocks)
    if labels.shape != (n,):
        raise ValueError(f"blocks of shape {labels.shape} for {n} utterances: one label each")
    return np.unique(labels, return_inverse=True)[1]


def _draws(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """`resamples` rows of `units` drawn numbers, some rows at a time; none of a single unit, which cannot vary."""
    if units < 2:
        return
    rng = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // units)
    for done in range(0, resamples, size):
        yield rng.integers(units, size=(min(size, resamples - done), units))


def _ratios(top: np.ndarray, bottom: np.ndarray, blocks: Any, resamples: int, seed: int) -> np.ndarray:
    """The ratio of every resample [R]; NaN where it drew no denominator."""
    block = _numbered(len(top), blocks)
    tops, bottoms = np.bincount(block, top), np.bincount(block, bottom)
    found = []
    for drawn in _draws(len(tops), resamples, seed):
        below = bottoms[drawn].sum(axis=1)
        found.append(np.where(below > 0, tops[drawn].sum(axis=1), np.nan) / np.where(below > 0, below, 1.0))
    return np.concatenate([np.zeros(0), *found])


def _scores(fn: Callable[[np.ndarray], float], n: int, blocks: Any, resamples: int, seed: int) -> np.ndarray:
    """`fn` of every resample [R]; NaN where it has none."""
    if n < 1:
        raise UserError("nothing to score: no utterances; is the test set empty?")
    block = _numbered(n, blocks)
    members = np.split(np.argsort(block, kind="stable"), np.cumsum(np.bincount(block))[:-1])
    found = []
    for drawn in _draws(len(members), resamples, seed):
        for row in drawn:
            try:
                found.append(float(fn(np.concatenate([members[m] for m in row]))))
            except UserError:
                found.append(float("nan"))
    return np.array(found)


def _known(found: np.ndarray) -> np.ndarray:
    """The scores of the resamples that have one; empty where these are too few to stand for all."""
    known = found[~np.isnan(found)]
    return known if 2 * len(known) > len(found) else known[:0]


def _limits(value: float, found: np.ndarray, level: float) -> Interval:
    known = _known(found)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
    return Interval(value, float(low), float(high))


def _improvement(found: np.ndarray, higher_is_better: bool) -> float:
    known = _known(found)
    return float(np.mean(known > 0 if higher_is_better else known < 0)) if len(known) else float("nan")

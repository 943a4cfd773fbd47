"""One score by speaker, accent, gender, language or whatever else is known of the utterances, and the gap between them.

The gap of many small groups is large by chance alone: read it beside the groups' intervals, and leave out groups of
fewer than `min_size` utterances.

Shapes: N utterances.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.scoring import _checks, bootstrap
from speechjax.scoring.bootstrap import RESAMPLES, Interval

UNKNOWN = "(unknown)"
_NO_SCORE = Interval(math.nan, math.nan, math.nan)


class Group(NamedTuple):
    """One group: `n` utterances, its score, and whether it is among those compared."""

    name: str
    n: int
    score: Interval
    compared: bool


class Groups(NamedTuple):
    """All groups, worst first, and then those not compared, by name.

    `gap` is the difference between the worst and the best score, 0 or more; `relative_gap` the same over the score of
    all, NaN where that is 0.
    """

    all: Group
    groups: list[Group]
    worst: Group
    best: Group
    gap: float
    relative_gap: float


def ratio_by_group(
    numerators: Any, denominators: Any, groups: Sequence[Any], *, min_size: int = 20, higher_is_better: bool = False,
    blocks: Any = None, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0,
) -> Groups:  # fmt: skip
    """Of a ratio of sums such as errors / words [N]: see `by_group` and `bootstrap.interval`."""
    top, bottom = _checks.columns(numerators=numerators, denominators=denominators)
    labels = None if blocks is None else np.asarray(blocks)

    def score(rows: np.ndarray) -> Interval:
        return bootstrap.interval(
            top[rows], bottom[rows], blocks=None if labels is None else labels[rows], level=level, resamples=resamples,
            seed=seed,
        )  # fmt: skip

    return scored_by_group(score, len(top), groups, min_size=min_size, higher_is_better=higher_is_better, blocks=labels)


def by_group(
    fn: Callable[[np.ndarray], float], groups: Sequence[Any], *, min_size: int = 20, higher_is_better: bool = False,
    blocks: Any = None, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0,
) -> Groups:  # fmt: skip
    """Of any score: `fn` gets the numbers of the utterances, an int array, as in `bootstrap.interval_of`.

    groups: [N], one label an utterance, None or "" where it is not known.  Groups below `min_size` utterances, of
    unknown label, or without a score (one class only, no words) are in the table but not compared; a group within one
    block (the utterances of a speaker, with speakers as blocks) has no limits.
    Raises UserError where no group can be compared, and ValueError for another number of labels or blocks.
    """
    labels = None if blocks is None else np.asarray(blocks)

    def score(rows: np.ndarray) -> Interval:
        return bootstrap.interval_of(
            lambda drawn: fn(rows[drawn]), len(rows), blocks=None if labels is None else labels[rows], level=level,
            resamples=resamples, seed=seed,
        )  # fmt: skip

    return scored_by_group(
        score, len(groups), groups, min_size=min_size, higher_is_better=higher_is_better, blocks=labels
    )


def scored_by_group(
    score: Callable[[np.ndarray], Interval], n: int, groups: Sequence[Any], *, min_size: int = 20,
    higher_is_better: bool = False, blocks: np.ndarray | None = None,
) -> Groups:  # fmt: skip
    """Of any score with an interval of its own: `score` gets the numbers of a group's utterances, and of all `n` of
    them; it raises UserError for a group that has none.  See `by_group`."""
    if len(groups) != n or (blocks is not None and len(blocks) != n):
        raise ValueError(f"{n} utterances, but {len(groups)} groups and {n if blocks is None else len(blocks)} blocks")
    if not n:
        raise UserError("nothing to score: no utterances; is the test set empty?")
    labels = [UNKNOWN if group is None or group == "" else str(group) for group in groups]
    names, number = np.unique(labels, return_inverse=True)
    members = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
    found = []
    for name, rows in zip(names, members, strict=True):
        try:
            own = score(rows)
        except UserError:
            own = _NO_SCORE
        known = name != UNKNOWN and not math.isnan(own.value)
        found.append(Group(str(name), len(rows), own, known and len(rows) >= min_size))
    compared = [group for group in found if group.compared]
    if not compared:
        largest = max((group.n for group in found if group.name != UNKNOWN), default=0)
        raise UserError(
            f"no group of {min_size} utterances with a score (the largest has {largest}): lower min_size, or check "
            "that the recordings have this label"
        )
    compared.sort(key=lambda group: group.score.value, reverse=not higher_is_better)
    worst, best = compared[0], compared[-1]
    everything = Group("all", n, score(np.arange(n)), False)
    gap = abs(worst.score.value - best.score.value)
    relative = gap / abs(everything.score.value) if everything.score.value else math.nan
    return Groups(everything, [*compared, *(g for g in found if not g.compared)], worst, best, gap, relative)

"""Is it the same speaker?  Trials, cosine scores, adaptive score normalisation, EER, minimum detection cost, DET.

Shapes: N embeddings, D width, P trials (pairs), C cohort, S speakers, K thresholds, R resamples.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.scoring import _checks, bootstrap
from speechjax.scoring.bootstrap import Interval

_AT_ONCE = 1 << 24  # numbers of gathered embeddings in memory
_STEPS = 400  # thresholds of an interval
_COLUMNS = 50  # resamples at a time: at 200 products take twice as long


class Trials(NamedTuple):
    """Pairs of embeddings by number, int64 [P] each, and whether they are of one speaker, bool [P]."""

    first: np.ndarray
    second: np.ndarray
    target: np.ndarray


def all_pairs(speakers: Sequence[Any]) -> Trials:
    """Every pair of different recordings once; `speakers` [N] names.

    Raises UserError where there is no pair of one speaker, or none of two.
    """
    first, second = np.triu_indices(len(speakers), 1)
    number = np.unique(np.asarray(speakers), return_inverse=True)[1]
    trials = Trials(first, second, number[first] == number[second])
    _both_kinds(trials.target)
    return trials


def read_trials(path: str | Path, ids: Sequence[str]) -> Trials:
    """A trial list in the format of VoxCeleb: lines `1 first second` (0: two speakers) of the names in `ids` [N].

    Raises UserError, with the line's number, for lines of another form and names that are not among `ids`, and for a
    file that cannot be read or is no text in UTF-8.
    """
    number = {name: i for i, name in enumerate(ids)}
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; want a text of lines `1 first second`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; want a text of lines `1 first second`") from None
    for n, line in enumerate(lines, 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 3 or parts[0] not in ("0", "1"):
            raise UserError(f"{path}, line {n}: want `1 first second` or `0 first second`, not {line!r}")
        for name in parts[1:]:
            if name not in number:
                raise UserError(f"{path}, line {n}: there is no embedding of {name!r}; check ids and file endings")
        rows.append((number[parts[1]], number[parts[2]], int(parts[0])))
    found = np.array(rows, np.int64).reshape(-1, 3)
    trials = Trials(found[:, 0], found[:, 1], found[:, 2].astype(bool))
    _both_kinds(trials.target)
    return trials


# ---- scores


def cosine_scores(embeddings: Any, trials: Trials) -> np.ndarray:
    """Cosine of the angle of each pair: embeddings float [N, D] -> float64 [P]; 0 where one is the zero vector."""
    unit = _unit(embeddings)
    size = max(1, _AT_ONCE // unit.shape[1])
    parts = [
        np.einsum("pd,pd->p", unit[trials.first[i : i + size]], unit[trials.second[i : i + size]])
        for i in range(0, len(trials.first), size)
    ]
    return np.concatenate([np.zeros(0), *parts])


def adaptive_s_norm(scores: Any, trials: Trials, embeddings: Any, cohort: Any, *, top: int = 300) -> np.ndarray:
    """AS-norm of cosine scores [P]: how far each is above those of either side with its `top` closest of a cohort.

    In standard deviations (over N) of these, averaged over both sides.  embeddings: [N, D]; cohort: [C, D], of other
    speakers than the trials', best one mean embedding a speaker.  Each side chooses its own closest: adaptive S-norm1
    of Matejka et al. (2017, "Analysis of score normalization in multilingual speaker recognition").
    Raises UserError for a cohort smaller than `top`, or where one side is equally far from all of them.
    """
    unit, others = _unit(embeddings), _unit(cohort)
    if len(others) < top:
        raise UserError(f"a cohort of {len(others)} embeddings, but top={top}: give more, or a smaller top")
    size = max(1, _AT_ONCE // len(others))
    closest = [
        -np.partition(-(unit[i : i + size] @ others.T), top - 1, axis=1)[:, :top] for i in range(0, len(unit), size)
    ]
    mean = np.concatenate([part.mean(axis=1) for part in closest])
    deviation = np.concatenate([part.std(axis=1) for part in closest])
    used = np.unique(np.concatenate([trials.first, trials.second]))
    # Equal up to rounding is equal: of one embedding repeated, say.
    if (flat := used[deviation[used] < 1e-9]).size:
        raise UserError(f"embedding {flat[0]} is as close to one as to another of its cohort: is that made of copies?")
    scores = np.asarray(scores, np.float64)
    first, second = ((scores - mean[side]) / deviation[side] for side in (trials.first, trials.second))
    return (first + second) / 2


def _unit(embeddings: Any) -> np.ndarray:
    (embeddings,) = _checks.columns(embeddings=embeddings)
    embeddings = embeddings.astype(np.float64)
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), np.finfo(np.float64).tiny)


# ---- errors


class Errors(NamedTuple):
    """Both error rates where a trial is accepted at `threshold` or above, one step a distinct score, float64.

    From "accept all" (misses 0, false alarms 1) to "reject all" (1 and 0, threshold infinity): the DET curve's points.
    """

    thresholds: np.ndarray
    misses: np.ndarray
    false_alarms: np.ndarray


def error_rates(scores: Any, target: Any) -> Errors:
    """Of trials with `scores` float [P], higher for one speaker, and `target` bool [P].

    Raises UserError without trials of one kind.
    """
    scores, target = _checks.columns(scores=scores, target=target)
    target = target.astype(bool)
    _both_kinds(target)
    thresholds, step = np.unique(scores, return_inverse=True)
    # Counts up to the end: 1 - 2 / 3 is not 1 / 3, and the rates would not be equal where they are.
    rejected, others = (
        np.concatenate([[0], np.cumsum(np.bincount(step[kind], minlength=len(thresholds)))])
        for kind in (target, ~target)
    )
    misses, false_alarms = rejected / rejected[-1], (others[-1] - others) / others[-1]
    return Errors(np.append(thresholds, np.inf), misses, false_alarms)


class EqualErrorRate(NamedTuple):
    """The rate, and the lowest score at which misses are no fewer than false alarms (infinity: above all scores)."""

    rate: float
    threshold: float


def equal_error_rate(errors: Errors) -> EqualErrorRate:
    """Where misses and false alarms are equal, on straight lines between the steps of the ROC.

    Linear interpolation as usual in papers with scikit-learn's `roc_curve`, not the convex hull of the ROC (ROCCH-EER,
    Brümmer 2010), which is never higher.
    """
    [rate], [after] = _equal_rates(errors.misses[:, None], errors.false_alarms[:, None])
    return EqualErrorRate(float(rate), float(errors.thresholds[after]))


def _equal_rates(misses: np.ndarray, false_alarms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rate float [R] of each column of [K, R], and the row int [R] at which misses are no fewer."""
    lead = misses - false_alarms  # rises from -1 to 1
    after, column = np.argmax(lead >= 0, axis=0), np.arange(lead.shape[1])
    share = -lead[after - 1, column] / (lead[after, column] - lead[after - 1, column])
    return misses[after - 1, column] + share * (misses[after, column] - misses[after - 1, column]), after


class DetectionCost(NamedTuple):
    """The cost over that of the better of accepting all and rejecting all, 0 to 1, and where it is reached."""

    cost: float
    threshold: float


def min_detection_cost(
    errors: Errors, *, p_target: float = 0.01, c_miss: float = 1.0, c_false_alarm: float = 1.0
) -> DetectionCost:
    """minDCF: the least c_miss p_target P_miss + c_fa (1 - p_target) P_fa over thresholds, normalised (evaluation plan
    of NIST SRE 2016, primary metric).

    Raises UserError for a `p_target` that is not between 0 and 1 and for costs that are not positive.
    """
    if not 0 < p_target < 1 or c_miss <= 0 or c_false_alarm <= 0:
        raise UserError(
            f"p_target={p_target}, c_miss={c_miss}, c_false_alarm={c_false_alarm}: a probability and positive costs"
        )
    costs = _costs(errors.misses, errors.false_alarms, c_miss * p_target, c_false_alarm * (1 - p_target))
    best = int(np.argmin(costs))
    return DetectionCost(float(costs[best]), float(errors.thresholds[best]))


def _costs(misses: np.ndarray, false_alarms: np.ndarray, miss: float, alarm: float) -> np.ndarray:
    return (miss * misses + alarm * false_alarms) / min(miss, alarm)


# ---- intervals


class CostIntervals(NamedTuple):
    """`eer`, and minDCF with costs of 1 for each prior of a target, in their order."""

    eer: Interval
    min_dcf: tuple[Interval, ...]


def cost_intervals(
    scores: Any, trials: Trials, speakers: Any, *, p_targets: Sequence[float] = (0.01, 0.05), level: float = 0.95,
    resamples: int | None = None, seed: int = 0,
) -> CostIntervals:  # fmt: skip
    """Intervals by bootstrap over speakers: scores float [P]; speakers [N], one label an embedding.

    Every trial of a recording, and every trial of its speaker, is easy or hard together, so what is drawn with
    replacement are speakers: with trials for independent, intervals are too narrow (Wu et al. 2016,
    doi:10.1109/TASLP.2016.2614725).  A trial of two speakers who were drawn a and b times counts a b times, as edges do
    where the nodes of a network are drawn (Snijders and Borgatti 1999, "Non-parametric standard errors and tests for
    network statistics"; consistent by Davezies et al. 2021, "Empirical process results for exchangeable arrays").  A
    trial within a speaker counts a times, not a squared: whoever is drawn twice is two people, between whom there are
    no trials, or a recording would be compared with itself.

    Rates of resamples are taken at 400 thresholds at most, close where either error is rare.  resamples: by default
    1000, of more than a million trials fewer, 200 at least.  Limits are NaN for one speaker.
    Raises UserError without trials of one kind.
    """
    scores, first, second, target = _checks.columns(scores=scores, **trials._asdict())
    _both_kinds(target)
    number = np.unique(np.asarray(speakers), return_inverse=True)[1].reshape(-1)
    used = np.unique(np.concatenate([number[first], number[second]]))
    sides = np.sort([np.searchsorted(used, number[side]) for side in (first, second)], axis=0)
    if resamples is None:
        resamples = int(np.clip(1_000_000_000 // len(scores), 200, 1000))
    # A trial's step is the last threshold that it reaches.
    thresholds = _thresholds(scores, target)
    step = np.searchsorted(thresholds, scores, side="right") - 1
    shape = len(thresholds), len(used)
    own, other = (_Weigher(step[kind], sides[:, kind], *shape) for kind in (target, ~target))
    columns = max(1, min(_COLUMNS, _AT_ONCE // math.prod(shape)))

    def rates(weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = weights.astype(np.float32)
        parts = [np.ascontiguousarray(weights[:, i : i + columns]) for i in range(0, weights.shape[1], columns)]
        found = [_rates(own(part), other(part), p_targets) for part in parts]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    errors = error_rates(scores, target)
    found = bootstrap.intervals_of(rates, len(used), level=level, resamples=resamples, seed=seed)
    costs = (min_detection_cost(errors, p_target=p).cost for p in p_targets)
    return CostIntervals(
        found["eer"]._replace(value=equal_error_rate(errors).rate),
        tuple(found[f"cost {p}"]._replace(value=cost) for p, cost in zip(p_targets, costs, strict=True)),
    )


def linked(trials: Trials, names: Sequence[str]) -> np.ndarray:
    """Who speaks, for `cost_intervals`, int [N]: recordings of one name ("": not known) or linked by a target trial."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    N = len(names)
    _, first, who = np.unique(np.asarray(names, str), return_index=True, return_inverse=True)
    of_name = np.where(np.asarray(names, str) == "", np.arange(N), first[who.reshape(-1)])
    one = np.concatenate([np.arange(N), trials.first[trials.target]])
    other = np.concatenate([of_name, trials.second[trials.target]])
    return connected_components(coo_array((np.ones(len(one)), (one, other)), shape=(N, N)), directed=False)[1]


def _thresholds(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """All distinct scores, or the lowest and `_STEPS` others, ascending: of targets as many between any two, of others
    by rank from the highest, evenly on a logarithmic scale."""
    every = np.unique(scores)
    if len(every) <= _STEPS:
        return every
    own, other = np.sort(scores[target]), np.sort(scores[~target])[::-1]
    evenly = np.linspace(0, len(own) - 1, _STEPS // 2).astype(np.int64)
    rarely = np.geomspace(1, len(other), _STEPS // 2).astype(np.int64) - 1
    return np.unique(np.concatenate([every[:1], own[evenly], other[rarely]]))


class _Weigher:
    """Of trials of one kind: weights of speakers float [S, R] -> what the trials of each step weigh, float64 [K, R].

    step: int [P], below `steps`; sides: int [2, P], the two speakers.
    """

    def __init__(self, step: np.ndarray, sides: np.ndarray, steps: int, speakers: int):
        from scipy.sparse import coo_array

        within, (low, high) = sides[0] == sides[1], sides
        self.shape = steps, speakers
        # Sums of whole numbers, far below 2^24: in float32 they are exact, and take half the time.
        self._within = coo_array(
            (np.ones(within.sum(), np.float32), (step[within], low[within])), shape=self.shape
        ).tocsr()  # fmt: skip
        rows = step[~within] * speakers + low[~within]
        self._across = coo_array(
            (np.ones(len(rows), np.float32), (rows, high[~within])), shape=(steps * speakers, speakers)
        ).tocsr()  # fmt: skip

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        met = (self._across @ weights).reshape(*self.shape, -1)
        return (self._within @ weights).astype(np.float64) + np.einsum("ksr,sr->kr", met, weights)


def _rates(own: np.ndarray, other: np.ndarray, p_targets: Sequence[float]) -> dict[str, np.ndarray]:
    """Scores [R] of what target and other trials of each step weigh, float64 [K, R]; NaN without trials of one kind."""
    known = np.asarray(own.any(axis=0) & other.any(axis=0))
    rejected, others = (np.cumsum(np.pad(x[:, known], ((1, 0), (0, 0))), axis=0) for x in (own, other))
    misses, false_alarms = rejected / rejected[-1], (others[-1] - others) / others[-1]
    scores = {"eer": _equal_rates(misses, false_alarms)[0]}
    scores |= {f"cost {p}": _costs(misses, false_alarms, p, 1 - p).min(axis=0) for p in p_targets}
    found = {name: np.full(len(known), np.nan) for name in scores}
    for name, values in scores.items():
        found[name][known] = values
    return found


def _both_kinds(target: np.ndarray) -> None:
    if not len(target):
        raise UserError("nothing to score: no trials; are there two recordings at least?")
    if target.all() or not target.any():
        kind = "of one speaker" if not target.any() else "of two speakers"
        raise UserError(f"no trials {kind} among {len(target)}: verification needs both kinds")

"""Is it the same speaker?  Trials, cosine scores, adaptive score normalisation, EER, minimum detection cost, DET.

Shapes: N embeddings, D width, P trials (pairs), C cohort.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.scoring import _checks

_AT_ONCE = 1 << 24  # numbers of gathered embeddings in memory


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

    Raises UserError, with the line's number, for lines of another form and names that are not among `ids`.
    """
    number = {name: i for i, name in enumerate(ids)}
    rows = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
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
    lead = errors.misses - errors.false_alarms  # rises from -1 to 1
    after = int(np.argmax(lead >= 0))
    share = -lead[after - 1] / (lead[after] - lead[after - 1])
    rate = errors.misses[after - 1] + share * (errors.misses[after] - errors.misses[after - 1])
    return EqualErrorRate(float(rate), float(errors.thresholds[after]))


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
    miss, alarm = c_miss * p_target, c_false_alarm * (1 - p_target)
    costs = (miss * errors.misses + alarm * errors.false_alarms) / min(miss, alarm)
    best = int(np.argmin(costs))
    return DetectionCost(float(costs[best]), float(errors.thresholds[best]))


def _both_kinds(target: np.ndarray) -> None:
    if not len(target):
        raise UserError("nothing to score: no trials; are there two recordings at least?")
    if target.all() or not target.any():
        kind = "of one speaker" if not target.any() else "of two speakers"
        raise UserError(f"no trials {kind} among {len(target)}: verification needs both kinds")

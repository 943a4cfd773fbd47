"""Scores as tables for `Logs.table`, `Logs.save_json` and the report page: {title, columns, rows}, cells for people."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from speechjax.scoring import bootstrap, classes, detection, verification
from speechjax.scoring.bootstrap import Difference, Interval
from speechjax.scoring.calibration import Reliability
from speechjax.scoring.groups import Group, Groups
from speechjax.scoring.words import Alignment

Table = dict[str, Any]

_MARKS = {"substitute": "taken for", "delete": "left out", "insert": "put in"}


def number(value: float, scale: float = 1.0, digits: int = 1) -> str:
    """A number for a cell, `-` for NaN."""
    return "-" if math.isnan(value) else f"{scale * value:.{digits}f}"


def limits(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """`12.1 to 15.0`; `-` where there are none."""
    low, high = (number(x, scale, digits) for x in interval[1:])
    return "-" if low == "-" else f"{low} to {high}"


# ---- recognition


def error_rates(title: str, alignments: Mapping[str, Alignment], *, blocks: Any = None) -> Table:
    """One row a system, or a unit (words, characters): its error rate in %, with the 95 % interval and its parts."""
    rows = []
    for name, found in alignments.items():
        rate = bootstrap.interval(found.errors, found.lengths, blocks=blocks)
        total = int(found.lengths.sum())
        parts = (int(x.sum()) / total for x in (found.substitutions, found.deletions, found.insertions))
        rows.append([
            name, len(found.references), total, number(rate.value, 100), limits(rate, 100),
            *(number(part, 100) for part in parts), number(found.sentence_rate, 100),
        ])  # fmt: skip
    columns = ["", "utterances", "units", "errors, %", "95 % interval", "substitutions, %", "deletions, %",
               "insertions, %", "utterances with errors, %"]  # fmt: skip
    return dict(title=title, columns=columns, rows=rows)


def confusions(title: str, alignment: Alignment, *, most: int = 20) -> Table:
    """The most frequent errors of any kind."""
    found = alignment.confusions()
    every = [
        *((times, _MARKS["substitute"], *pair) for pair, times in found.substitutions.items()),
        *((times, _MARKS["delete"], unit, "") for unit, times in found.deletions.items()),
        *((times, _MARKS["insert"], "", unit) for unit, times in found.insertions.items()),
    ]
    every.sort(key=lambda row: (-row[0], row[1:]))  # equal ones in the same order every time
    rows = [[reference, error, hypothesis, times] for times, error, reference, hypothesis in every[:most]]
    return dict(title=title, columns=["reference", "error", "recognised", "times"], rows=rows)


def comparison(title: str, differences: Mapping[str, Difference], *, scale: float = 100.0) -> Table:
    """One row a comparison: difference, its 95 % interval, the probability of improvement in %."""
    rows = [
        [name, f"{scale * d.interval.value:+.1f}", limits(d.interval, scale), number(d.improvement, 100)]
        for name, d in differences.items()
    ]
    return dict(title=title, columns=["", "difference", "95 % interval", "probability of improvement, %"], rows=rows)


# ---- classes


def per_class(title: str, counts: np.ndarray, names: Sequence[str]) -> Table:
    """A class a row of a confusion matrix [K, K], with what it is most often taken for."""
    scores = classes.class_scores(counts)
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))
    rows = []
    for k, name in enumerate(names):
        other = int(wrong[k].argmax())
        taken = f"{names[other]} ({wrong[k, other]})" if wrong[k, other] else "-"
        rows.append([name, int(counts[k].sum()), *(number(values[k], 100) for values in scores), taken])
    columns = ["class", "n", "recall, %", "precision, %", "F1, %", "most often taken for"]
    return dict(title=title, columns=columns, rows=rows)


def reliability(title: str, table: Reliability) -> Table:
    """A bin a row; empty ones are left out."""
    rows = [
        [f"{100 * low:.1f} to {100 * high:.1f}", int(n), number(said, 100), number(right, 100)]
        for low, high, n, said, right in zip(table.edges, table.edges[1:], *table[1:], strict=False)
        if n
    ]
    return dict(title=title, columns=["confidence, %", "n", "mean confidence, %", "accuracy, %"], rows=rows)


# ---- detection


def verification_costs(
    title: str, systems: Mapping[str, verification.Errors], *, p_targets: Sequence[float] = (0.01, 0.05),
    intervals: verification.CostIntervals | None = None,
) -> Table:  # fmt: skip
    """A system a row: equal error rate in %, and minDCF with costs of 1 for each prior of a target.

    `intervals`, of the same priors, are a row below the last system.
    """
    rows = []
    for name, errors in systems.items():
        costs = (verification.min_detection_cost(errors, p_target=p).cost for p in p_targets)
        rate = verification.equal_error_rate(errors).rate
        rows.append([name, number(rate, 100, 2), *(number(cost, digits=3) for cost in costs)])
    if intervals:
        costs = (limits(cost, digits=3) for cost in intervals.min_dcf)
        rows.append(["95 % interval", limits(intervals.eer, 100, 2), *costs])
    return dict(title=title, columns=["", "EER, %", *(f"minDCF({p:g})" for p in p_targets)], rows=rows)


def false_rejects(
    title: str, curves: Mapping[str, detection.Curve], *, per_hour: Sequence[float] = (0.1, 0.5, 1.0),
    intervals: Sequence[Interval] = (),
) -> Table:  # fmt: skip
    """A keyword or a system a row: false rejects in % while false alarms are at most so many an hour.

    `intervals`, one of each of `per_hour`, are a row below the last.
    """
    rows = [
        [name, *(number(detection.at_false_alarms(curve, rate).false_rejects, 100) for rate in per_hour)]
        for name, curve in curves.items()
    ]
    if intervals:
        rows.append(["95 % interval", *(limits(own, 100) for own in intervals)])
    columns = ["", *(f"false rejects, % at {rate:g} false alarms/h" for rate in per_hour)]
    return dict(title=title, columns=columns, rows=rows)


# ---- any score


def groups(title: str, found: Groups, *, scale: float = 100.0) -> Table:
    """A group a row, worst first, then all; those not compared are marked.  The gaps are in the title."""

    def row(name: str, group: Group) -> list[Any]:
        return [name, group.n, number(group.score.value, scale), limits(group.score, scale)]

    rows = [row(g.name if g.compared else f"{g.name} (not compared)", g) for g in found.groups]
    gap = f"gap {number(found.gap, scale)} between {found.worst.name} and {found.best.name}"
    if not math.isnan(found.relative_gap):
        gap += f", {found.relative_gap:.0%} of the score of all"
    columns = ["group", "n", "score", "95 % interval"]
    return dict(title=f"{title}: {gap}", columns=columns, rows=[*rows, row("all", found.all)])


def conditions(title: str, scores: Mapping[str, Mapping[str, Interval]], *, scale: float = 100.0) -> Table:
    """A condition a row, a system a column: {system: {condition: score}}, all of the same conditions."""
    systems = list(scores)
    rows = [
        [name, *(f"{number(scores[s][name].value, scale)} ({limits(scores[s][name], scale)})" for s in systems)]
        for name in scores[systems[0]]
    ]
    return dict(title=title, columns=["condition", *systems], rows=rows)

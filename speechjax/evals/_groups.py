"""A score by group of recordings: speaker, accent, language, whatever is known of them."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from speechjax.data.records import Records
from speechjax.data.split import recording_id
from speechjax.errors import UserError
from speechjax.scoring import groups, report
from speechjax.train import Job

_ENOUGH = 20  # utterances of a group, where two groups or more have so many


def labels(records: Records, examples: Sequence[int], spec: str, option: str = "group") -> list[str]:
    """The label of every example by `meta:FIELD` or `id:REGEX` (its group `label`, or the first); "" for none.

    Segments have the label of their recording.  Raises UserError, which names the `option`, for another spec, and where
    no example has a label.
    """
    kind, _, rest = spec.partition(":")
    if kind == "meta" and rest:
        values = [records.meta(i).get(rest) for i in examples]
        found = ["" if value is None else str(value) for value in values]
    elif kind == "id" and rest:
        found = _searched(rest, [name(records, i) for i in examples], option)
    else:
        raise UserError(f"{option}={spec!r}: write meta:FIELD or id:REGEX")
    if not any(found):
        example = f", e.g. {records.id(examples[0])!r}" if len(examples) else ""
        raise UserError(f"{option}={spec!r} fits no held-out recording{example}")
    return found


def read(records: Records, examples: np.ndarray, spec: str) -> dict[int, str]:
    """{example: label} of all that can be judged, {} for an empty `spec`: read when an evaluator is made, so that a
    mistake in it ends the run before it trains.  Raises UserError as `labels` does."""
    every = examples.tolist()
    return dict(zip(every, labels(records, every, spec), strict=True)) if spec else {}


def name(records: Records, i: int) -> str:
    """Id of the recording of example i as its own source has it, without the number of a part of a mixture."""
    found = recording_id(records, i)
    return found if len(records.parts) == 1 else found.partition(":")[2]


def _searched(pattern: str, names: Sequence[str], option: str) -> list[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{option}='id:{pattern}' is not a regular expression: {error}") from None
    group = "label" if "label" in regex.groupindex else 1 if regex.groups else 0
    return [(match[group] or "") if (match := regex.search(own)) else "" for own in names]


def blocks(records: Records, examples: np.ndarray) -> np.ndarray:
    """A number for the recording of every example, for `bootstrap`: segments of one are not independent."""
    rows = np.stack([records.part[examples], records.row[examples]], axis=1)
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def show(
    job: Job, step: int, metric: str, numerators: np.ndarray, denominators: np.ndarray, names: Sequence[str], *,
    blocks: np.ndarray | None = None, higher_is_better: bool = False, scale: float = 100.0,
) -> dict[str, float]:  # fmt: skip
    """A table of the ratio by group, with intervals by bootstrap over `blocks`; {metric_worst, metric_gap}.

    Compared are groups of at least 20 utterances, or all, where fewer than two have as many.
    """
    number = np.unique(names, return_inverse=True)[1].reshape(-1)
    there = (np.bincount(number, denominators) > 0)[number]
    found = groups.ratio_by_group(
        numerators, denominators, names, min_size=enough([own for own, has in zip(names, there, strict=True) if has]),
        higher_is_better=higher_is_better, blocks=blocks,
    )  # fmt: skip
    return table(job, step, metric, found, scale)


def enough(names: Sequence[str]) -> int:
    """How many utterances a group is to have to be compared, of the labels of all in groups with a score."""
    sizes = np.unique([own for own in names if own], return_counts=True)[1]
    return _ENOUGH if np.sum(sizes >= _ENOUGH) > 1 else 1


def table(job: Job, step: int, metric: str, found: groups.Groups, scale: float = 100.0) -> dict[str, float]:
    """Shows the groups; {metric_worst, metric_gap}."""
    unit = ", %" if scale == 100 else ""
    shown: Any = report.groups(f"{metric}{unit} by group at step {step}", found, scale=scale)
    job.logs.table(**shown)
    return {f"{metric}_worst": found.worst.score.value, f"{metric}_gap": found.gap}

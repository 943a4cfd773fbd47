"""A score by group of recordings: speaker, accent, language, whatever is known of them."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from speechjax.data.records import Records
from speechjax.errors import UserError
from speechjax.scoring import groups
from speechjax.train import Job


def labels(records: Records, examples: Sequence[int], spec: str) -> list[str]:
    """The label of every example by `meta:FIELD` or `id:REGEX` (its first group); "" for none.

    Raises UserError for another spec, and where no example has a label.
    """
    kind, _, rest = spec.partition(":")
    if kind == "meta" and rest:
        found = [str(records.meta(i).get(rest) or "") for i in examples]
    elif kind == "id" and rest:
        matches = [re.search(rest, records.id(i)) for i in examples]
        found = [(m[1] if m.re.groups else m[0]) if m else "" for m in matches]
    else:
        raise UserError(f"group={spec!r}: write meta:FIELD or id:REGEX")
    if not any(found):
        raise UserError(f"group={spec!r} fits no held-out recording, e.g. {records.id(examples[0])!r}")
    return found


def show(
    job: Job, step: int, metric: str, numerators: np.ndarray, denominators: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    """A table of the ratio by group; {metric_worst, metric_gap}."""
    found = groups.ratio_by_group(numerators, denominators, names, min_size=1)
    rows: list[list[Any]] = [
        [group.name, group.n, *(f"{100 * x:.1f}" for x in group.score)] for group in (found.all, *found.groups)
    ]
    job.logs.table(f"{metric} by group at step {step}, %", ["group", "utterances", "value", "low", "high"], rows)
    return {f"{metric}_worst": found.worst.score.value, f"{metric}_gap": found.gap}

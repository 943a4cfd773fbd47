"""What a task answers to every held-out example.  Shapes: R global rows, N examples."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from speechjax import sharding
from speechjax.display import display
from speechjax.errors import UserError
from speechjax.scoring import report
from speechjax.train import Job

log = logging.getLogger("speechjax")

_HEARD = "heard"  # which rows have audio, among the answers


def answers(job: Job, compute: Callable[[Any], Any]) -> Iterator[tuple[np.ndarray, Any]]:
    """(numbers of examples in the records int [n], what `compute(batch)` has for them) of every held-out batch.

    `compute` takes a global batch to arrays [R, ...], replicated; those of empty rows are left out.
    """
    batches = job.data.valid_batches(*sharding.host_part(job.mesh))
    for example, batch in zip(job.data.valid_examples(), batches, strict=True):
        found = jax.device_get(compute(sharding.global_batch(job.mesh, batch)))
        there = np.flatnonzero(example >= 0)
        yield example[there], jax.tree.map(lambda x, there=there: np.asarray(x)[there], found)


def held_out(job: Job) -> np.ndarray:
    """Numbers in the records of all held-out examples, ascending; nothing is read."""
    example = np.concatenate([np.zeros(0, np.int64), *job.data.valid_examples()])
    return np.sort(example[example >= 0])


# ---- heads


class Head(NamedTuple):
    """A head whose answers are judged: the `task` it is, its fields, and what the names of its answers begin with."""

    task: str
    fields: Mapping[str, Any]
    prefix: str


def find_head(job: Job, evaluator: str, head: str, tasks: Sequence[str]) -> Head:
    """The run's task, or with `several` the head of that name.

    Raises UserError where there is no such head, or it is none of `tasks`.
    """
    fields = job.config.task.to_dict()
    prefix = ""
    if fields["name"] == "several":
        if head not in fields["heads"]:
            raise UserError(f"{evaluator}: head={head!r}; this task has the heads {', '.join(fields['heads'])}")
        fields, prefix = fields["heads"][head], f"{head}/"
    elif head:
        raise UserError(f"{evaluator}: head={head!r}, but the task {fields['name']} is one head: leave it empty")
    task = fields["task"] if prefix else fields["name"]
    if task not in tasks:
        raise UserError(f"{evaluator} judges the answers of {' and '.join(tasks)}, and this is {task}")
    return Head(task, fields, prefix)


def find_label(job: Job, head: Head) -> Any:
    """The `Label` (speechjax.data.labels) that a head learns from."""
    return next(label for label in job.data.labels.parts if label.key == head.fields["label"])


def answerer(
    job: Job, reduce: Callable[[dict[str, jax.Array], dict[str, jax.Array]], dict[str, jax.Array]] | None = None
) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
    """A program from variables and a global batch to the task's answers, replicated, or what `reduce(answers, batch)`
    makes of them on the device."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(job.mesh))
    def compute(variables, batch):
        found = job.task.apply(variables, batch, method="answer")
        found = reduce(found, batch) if reduce else found
        return {**found, _HEARD: batch["lengths"] > 0}

    return compute


def collect(
    job: Job, compute: Callable[[Any, Any], Any], variables: Any, keep: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(examples int [N] ascending, {answer: [N, ...]}) of all held-out examples that could be read, of those in `keep`.

    Raises UserError where there are none.
    """
    numbers, parts, unread = [], [], 0
    for example, found in answers(job, lambda batch: compute(variables, batch)):
        heard = found.pop(_HEARD)
        unread += int(np.sum(~heard))
        numbers.append(example[heard])
        parts.append({name: found[name][heard] for name in keep})
    if unread:
        log.warning("%d held-out examples could not be read: they are not judged", unread)
    examples = np.concatenate([np.zeros(0, np.int64), *numbers])
    if not len(examples):
        raise UserError("nothing to score: no held-out recording could be read; is the test set empty?")
    order = np.argsort(examples)
    return examples[order], {name: np.concatenate([part[name] for part in parts])[order] for name in keep}


def recognised(job: Job, decode: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
    """(example, its `Hypotheses`) of held-out utterances, as `decode(global batch)` has them, replicated.

    Those that could not be read, or are longer than a row, are left out and counted in the log: of what nobody heard no
    word can be right.
    """
    seen = jax.jit(lambda batch: batch["lengths"], out_shardings=sharding.replicated(job.mesh))
    unread = cut = 0
    for examples, (found, lengths) in answers(job, lambda batch: (decode(batch), seen(batch))):
        whole = lengths == job.data.records.lengths[examples]
        unread, cut = unread + int(np.sum(lengths == 0)), cut + int(np.sum((lengths > 0) & ~whole))
        for row in np.flatnonzero(whole).tolist():
            yield int(examples[row]), jax.tree.map(lambda x, row=row: x[row], found)
    if unread:
        log.warning("%d held-out examples could not be read: they are not judged", unread)
    if cut:
        log.warning("%d held-out utterances are longer than a row and not judged: raise config.data.crop_seconds", cut)


# ---- tables


def show(job: Job, step: int, name: str, metrics: Mapping[str, float]) -> None:
    """The metrics as a table, limits beside what they limit."""
    rows = []
    for key, value in metrics.items():
        if key.endswith(("_low", "_high")) and key.rpartition("_")[0] in metrics:
            continue
        ends = [end for end in (f"{key}_low", f"{key}_high") if end in metrics]
        limits = [display(key).number(metrics[end]) for end in ends]
        rows.append([display(key).title, display(key).number(value), " to ".join(limits)])
    job.logs.table(f"{name} at step {step}", ["metric", "value", "95 % interval"], rows)


def show_table(job: Job, name: str, table: report.Table, rows: int = 10) -> None:
    """The first rows on the console, all of them on the report page."""
    job.logs.table(table["title"], table["columns"], table["rows"][:rows])
    job.logs.save_json(name, table)


def limited(name: str, found: Any) -> dict[str, float]:
    """An `Interval` as metrics: its value, and its limits as _low and _high."""
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}

"""A config becomes a task and its data: what every verb that runs an experiment begins with."""

import json
from pathlib import Path
from typing import Any

import jax

from speechjax import config as configs
from speechjax import distributed
from speechjax.data import pipeline
from speechjax.errors import TooManyRejectedError, UserError


def open_experiment(config: Any, workdir: Path | None) -> tuple[Any, Any]:
    """(task, data) of a config, checked against each other; what was left out and the vocabularies go to `workdir`."""
    task = configs.make_task(config)
    room = workdir if jax.process_index() == 0 else None
    try:
        data = open_data(config, task, workdir)
    except TooManyRejectedError as error:
        if room:
            _write_rejected(room, error.rejected)
        raise
    distributed.agree("the recordings", data.digest)
    if room:
        _write_rejected(room, data.records.rejected)
        data.save(room)
    check_needs(task, data)
    return task, data


def open_data(config: Any, task: Any, workdir: Path | None) -> pipeline.Data:
    """The batches of a config, in frames of the task's encoder; vocabularies in `workdir` are used, none is written."""
    encoder = task.encoder
    return pipeline.open_data(
        seed=config.train.seed, row_divisor=jax.device_count(), frame_len=encoder.frame_len(),
        segment_align=encoder.segment_align() if encoder.packs() else 0, workdir=workdir, **config.data.to_dict(),
    )  # fmt: skip


def check_needs(task: Any, data: Any) -> None:
    """UserError where the batches lack what the task learns from, or have more classes of it than the model."""
    how = {
        "units": "data.units=labels:DIR (made by python -m speechjax.label) or data.units=phones",
        "tokens": "data.text=characters, phonemes:LANGUAGE, ... and a source with transcripts",
        "label": "data.label=meta:FIELD or data.label=id:REGEX",
    }
    for key in task.needs:
        if key not in data.specs[0]:
            raise UserError(f"this task learns from {key!r}, which the batches lack: set config.{how[key]}")
    tokens = data.transcripts.tokenizer.size if data.transcripts else 0
    there = {"units": data.unit_codes, "label": len(data.label_names), "tokens": tokens}
    for key, (name, classes) in task.sizes().items():
        if there[key] > classes:
            raise UserError(f"{name}={classes}, but the data has {there[key]} classes of {key!r}: set --{name} to that")


def _write_rejected(workdir: Path, rejected: list[dict[str, str]]) -> None:
    """`rejected.jsonl`: every recording left out, and why; each host finds the same."""
    lines = [json.dumps(entry) + "\n" for entry in rejected]  # ASCII: names of files need not be UTF-8
    (workdir / "rejected.jsonl").write_text("".join(lines))

"""A config becomes a task and its data: what every verb that runs an experiment begins with."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speechjax import config as configs
from speechjax import distributed, runs
from speechjax.data import pipeline
from speechjax.errors import TooManyRejectedError, UserError

log = logging.getLogger("speechjax")

VOCABULARIES = ("vocab.json", "labels.json", "phones.json")


def open_experiment(config: Any, workdir: Path | None) -> tuple[Any, Any]:
    """(task, data) of a config, checked against each other; what was left out and the vocabularies go to `workdir`."""
    task = configs.make_task(config)
    room = workdir if jax.process_index() == 0 else None
    try:
        data = open_data(config, task, vocabularies(config, workdir))
    except TooManyRejectedError as error:
        if room:
            _write_rejected(room, error.rejected)
        raise
    distributed.agree("the recordings", data.digest)
    if _size(config, task, data):
        task = configs.make_task(config)
    if room:
        _write_rejected(room, data.records.rejected)
        data.save(room)
    check_needs(task, data)
    return task, data


def open_data(config: Any, task: Any, workdir: Path | None) -> pipeline.Data:
    """The batches of a config, in frames of the task's encoder; vocabularies in `workdir` are used, none is written."""
    encoder = task.encoder
    devices, tensor = jax.device_count(), config.mesh.get("tensor", 1)  # which runs from before it lack
    return pipeline.open_data(
        seed=config.train.seed, row_divisor=devices // math.gcd(devices, tensor), frame_len=encoder.frame_len(),
        segment_align=encoder.segment_align() if encoder.packs() else 0, workdir=workdir, **config.data.to_dict(),
    )  # fmt: skip


def vocabularies(config: Any, workdir: Path | None) -> Path | None:
    """Where the vocabularies are: in `workdir`, or, for a head that goes on from one, in the run that it comes from.

    Otherwise the weights of a head would get other classes than they have learnt.
    """
    if workdir is None or not config.init_from or any((workdir / name).exists() for name in VOCABULARIES):
        return workdir
    there = runs.find_checkpoint(config.init_from).parent.parent
    before: Any = runs.read_config(there)
    keys = ("text", "text_steps", "units", "label")
    same = all(before.data.get(key, "") == config.data[key] for key in keys) and before.task.name == config.task.name
    return there if same else workdir


def check_needs(task: Any, data: Any) -> None:
    """UserError where the batches lack what the task learns from, or have more classes of it than the model."""
    how = {
        "units": "data.units=labels:DIR (made by python -m speechjax.label), phones, speech or turns:SPEAKERS",
        "tokens": "data.text=characters, phonemes:LANGUAGE, ... and a source with transcripts",
        "label": "data.label={}meta:FIELD, id:REGEX, tags:FIELD or number:FIELD",
    }
    for key in task.needs:
        if key not in data.specs[0]:
            kind, _, name = key.partition("_") if key.startswith("label_") else (key, "", "")
            fix = how[kind].format(f"{name}=" * bool(name))
            raise UserError(f"this task learns from {key!r}, which the batches lack: set config.{fix}")
    if task.aligns:
        _warn_of_long_transcripts(task, data)
    there = _classes(data)
    for key, (name, classes) in task.sizes().items():
        if there[key] > classes:
            raise UserError(f"{name}={classes}, but the data has {there[key]} classes of {key!r}: set --{name} to that")


def _warn_of_long_transcripts(task: Any, data: Any) -> None:
    """Says before training what cannot teach."""
    hop, extra = task.encoder.frame_len()
    lengths = data.records.lengths
    if len(bad := data.transcripts.too_long(np.maximum(lengths - extra, 0) // hop)):
        log.warning(
            "%d of %d transcripts have more tokens than frames and teach nothing, e.g. %s: larger tokens "
            "(config.data.text) or less subsampling (config.model.frontend) would help", len(bad), len(lengths),
            data.records.id(int(bad[0])),
        )  # fmt: skip


def _classes(data: Any) -> dict[str, int]:
    """How many classes the data has of each batch key."""
    tokens = data.transcripts.tokenizer.size if data.transcripts else 0
    labels = {key: len(names) for key, names in data.labels.names.items()} if data.labels else {}
    return {"units": data.unit_codes, "tokens": tokens, **labels}


def _size(config: Any, task: Any, data: Any) -> bool:
    """Fills in numbers of classes that the config leaves to the data, 0; whether there were any."""
    there = _classes(data)
    open_ = {name: there[key] for key, (name, classes) in task.sizes().items() if not classes and there.get(key)}
    for name, classes in open_.items():
        configs.override(config, f"{name.removeprefix('config.')}={classes}")
    return bool(open_)


def _write_rejected(workdir: Path, rejected: list[dict[str, str]]) -> None:
    """`rejected.jsonl`: every recording left out, and why; each host finds the same."""
    lines = [json.dumps(entry) + "\n" for entry in rejected]  # ASCII: names of files need not be UTF-8
    (workdir / "rejected.jsonl").write_text("".join(lines))

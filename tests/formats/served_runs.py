"""Runs that nobody has trained, of every kind of encoder and head, and what formats have to answer alike."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from speechjax import config as configs
from speechjax.formats.serving import serve
from speechjax.runs import Run
from tests.drawing import draw_params
from tests.tasks.experiments import experiment, make_batch

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", " ", "a", "b", "c", "d"]
# What of the encoder is another than that of the tiny HuBERT: every part that is traced in its own way.
ENCODERS: dict[str, dict[str, Any]] = {
    "post": {},
    "pre": dict(norm="pre", frontend=dict(norm="layer", normalize=True, bias=True)),
    "stacked": dict(layers=2, scan=True, positions=dict(name="conv", kernel=19, groups=4, depth=2)),
    "wavlm": dict(attention=dict(positions="buckets", gated=True, buckets=16, max_distance=20)),
    "alibi": dict(attention=dict(positions="alibi"), positions=dict(name="sinusoidal")),
    "conformer": dict(
        norm="pre", block=dict(name="conformer", kernel=7), positions=dict(name="none"),
        attention=dict(positions="relative"), frontend=dict(name="mel", n_mels=20, factor=4),
    ),
    "chunks": dict(
        norm="pre", block=dict(name="conformer", kernel=7), positions=dict(name="none"),
        attention=dict(positions="rotary", chunk=4, left=2),
        frontend=dict(name="mel", n_mels=20, factor=4, subsample="conv", conv_channels=4, embedding=16,
                      normalize="none"),
    ),
    "grouped": dict(
        norm="pre", block=dict(name="conformer", kernel=7, conv_norm="group"), positions=dict(name="none"),
        attention=dict(positions="rotary"), frontend=dict(name="mfcc"),
    ),
    "patches": dict(frontend=dict(name="patch", n_mels=32, patch=(16, 16), embedding=16), positions=dict(name="none")),
    "whisper": dict(frontend=dict(name="mel", n_mels=20, factor=2, convention="whisper")),
    "lstm": dict(norm="none", block=dict(name="blstm"), positions=dict(name="none")),
    "gru": dict(norm="none", block=dict(name="gru"), positions=dict(name="none")),
    "deep_speech": dict(
        norm="none", block=dict(name="deep_speech"), positions=dict(name="none"),
        frontend=dict(name="deep_speech", filters=(2, 2)),
    ),
    "online": dict(frontend=dict(name="mel", n_mels=20, factor=2, normalize="online")),
}  # fmt: skip


@functools.cache
def _config(name: str, encoder: str) -> ConfigDict:
    config: Any = ConfigDict(experiment(name)[0].to_dict())
    for key, value in ENCODERS[encoder].items():
        if key == "frontend" and "name" not in value:
            value = dict(config.model.frontend.to_dict(), **value)
        with config.unlocked():
            config.model[key] = ConfigDict(value) if isinstance(value, dict) else value
    return config


@functools.cache
def _variables(name: str, encoder: str) -> tuple[Any, Any]:
    task = configs.make_task(_config(name, encoder))
    return task, drawn(task)


def drawn(task: Any) -> dict[str, Any]:
    """Variables of a task that nobody has trained, without compiling an initialisation."""
    batch = make_batch(task)
    keys = dict.fromkeys(("params", *task.rngs), jax.random.key(0))
    shapes = dict(jax.eval_shape(lambda: task.init(keys, batch, step=jnp.int32(0), train=False)))
    shapes.pop("sums", None)
    params = draw_params(shapes.pop("params"))
    return {"params": params, **jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)}


def make_run(workdir: Path, name: str = "ctc", encoder: str = "post") -> Run:
    """A run of an experiment (see tests/tasks/experiments.py) over an encoder of `ENCODERS`."""
    task, variables = _variables(name, encoder)
    workdir.mkdir(parents=True, exist_ok=True)
    if name == "ctc":
        vocabulary = dict(format=1, kind="characters", steps="nfc", specials={}, tokens=TOKENS)
        (workdir / "vocab.json").write_text(json.dumps(vocabulary))
    return Run(workdir, workdir / "checkpoints/3", 3, _config(name, encoder), task, variables, "0" * 64)


def flipped(run: Run) -> Run:
    """`run` with the sign of one weight of the first layer changed: the negative control."""
    flat = flatten_dict(run.variables, sep="/")
    name = next(name for name, x in flat.items() if "/transformer/layer" in name and x.ndim > 1)
    return dataclasses.replace(run, variables=unflatten_dict(flat | {name: -flat[name]}, sep="/"))


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Two sizes by two lengths, one of them no multiple of anything, with padded rows full of noise."""
    rng = np.random.default_rng(0)
    found = []
    for rows, samples in ((1, 4000), (1, 7321), (3, 4000), (3, 7321)):
        audio = 0.1 * rng.normal(size=(rows, samples)).astype(np.float32)
        lengths = np.linspace(samples, 0.45 * samples, rows).astype(np.int32)
        found.append((audio, lengths))
    return found


_ANSWERS: dict[Any, Any] = {}


def expected(run: Run, audio: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """What the run's own code answers, in float32; every format asks for the same."""
    task = run.task.clone(encoder=run.task.encoder.clone(dtype="float32"))
    key = id(run.variables), audio.tobytes(), lengths.tobytes()
    if key not in _ANSWERS:
        answer = jax.tree.map(np.asarray, jax.jit(serve(task))(run.variables, audio, lengths))
        _ANSWERS[key] = answer, run.variables  # kept, so that no others take their id
    return _ANSWERS[key][0]


def difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest, over all answers; they must have the same names, shapes and types."""
    kinds = lambda arrays: {name: (x.shape, x.dtype) for name, x in arrays.items()}  # noqa: E731
    assert kinds(found) == kinds(wanted)
    return max(float(np.abs(found[name].astype(np.float64) - x).max(initial=0)) for name, x in wanted.items())

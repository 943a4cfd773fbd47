"""Runs with adapters that nobody has trained: an experiment over HuBERT's encoder, its leaves drawn."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from speechjax import adapter
from speechjax import config as configs
from speechjax.checkpoint import Checkpoints
from speechjax.runs import open_run
from speechjax.step import State
from tests.drawing import draw_params
from tests.tasks.experiments import experiment, make_batch

LORA = dict(kind="lora", name="low", targets="attention/(query|value)$", rank=2, alpha=6.0)
IA3 = dict(kind="ia3", name="scales")
HOULSBY = dict(kind="houlsby", name="serial", width=3)
BIAS = dict(kind="bias", name="fit")


def build(task_of: str, *adapters: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(config, task, drawn parameters) of an experiment over HuBERT's encoder with these adapters."""
    config: Any = ConfigDict(experiment("hubert")[0].to_dict())
    config.task = experiment(task_of)[0].task
    for key in adapter._WORDS:
        config.data[key] = experiment(task_of)[0].data[key]
    config.model.adapters = adapters
    task = configs.make_task(config)
    batch = make_batch(task)
    variables = jax.eval_shape(
        lambda: task.init(dict.fromkeys(("params", *task.rngs), jax.random.key(0)), batch, step=0, train=False)
    )
    return config, task, draw_params(variables["params"])


def write_run(workdir: Path, config: ConfigDict, params: Any, extra: Any = None) -> Path:
    """A run of three updates."""
    configs.claim_workdir(workdir, config)
    zero = jax.numpy.int32(0)
    state = State(
        step=jax.numpy.int32(3), params=params, opt_state=(jax.numpy.ones(3), {"mu": params}), extra=extra or {},
        meters={"loss": jax.numpy.zeros(2)}, skipped=zero, skipped_in_row=zero,
    )  # fmt: skip
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1, every=1)
    checkpoints.save(3, state, {"best": {}, "model": {}, "data": ""}, force=True)
    checkpoints.close()
    return workdir


def flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_base(tmp_path_factory: Any) -> Path:
    """A pretraining run."""
    config, _, params = build("hubert")
    return write_run(tmp_path_factory.mktemp("runs") / "base", config, params)


def opened(workdir: Path) -> Any:
    return open_run(str(workdir), jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def features(run: Any) -> np.ndarray:
    batch = make_batch(run.task, rows=2)
    return np.asarray(jax.jit(lambda v: run.task.apply(v, batch, method="features").frames)(run.variables))

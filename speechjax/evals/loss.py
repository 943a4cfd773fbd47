"""The task's own losses and metrics on the held-out split."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speechjax import sharding
from speechjax.step import stream_keys
from speechjax.train import Job


class Loss:
    """{loss or metric: value} over every held-out example, "loss" their sum; masks are alike at every evaluation."""

    def __init__(self, job: Job, *, every: int):
        self.job, self.every = job, every
        seed = job.config.train.seed + 1

        @functools.partial(jax.jit, out_shardings=sharding.replicated(job.mesh))
        def sums(params, extra, batch, step, number):
            rngs = stream_keys(job.task, seed, number)
            losses, metrics = job.task.apply({"params": params, **extra}, batch, step=step, train=False, rngs=rngs)
            self._losses = tuple(losses)
            return {k: jnp.stack(pair) for k, pair in {**losses, **metrics}.items()}

        self._sums = sums
        self._losses: tuple[str, ...] = ()  # their names, known once it is traced

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        total: dict[str, np.ndarray] = {}
        batches = self.job.data.valid_batches(*sharding.host_part(self.job.mesh))
        for number, batch in enumerate(batches):
            batch = sharding.global_batch(self.job.mesh, batch)
            sums = jax.device_get(self._sums(params, extra, batch, jnp.int32(step), jnp.int32(number)))
            total = {k: v.astype(np.float64) + total.get(k, 0) for k, v in sums.items()}
        found = {k: float(s / w) if w else float("nan") for k, (s, w) in total.items()}
        return {"loss": sum(found[k] for k in self._losses), **found}

"""A linear probe of the frozen encoder on labelled recordings, always beside its controls."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from speechjax import sharding
from speechjax.data.pipeline import SAMPLE_RATE, read_rows
from speechjax.data.plan import Plan, plan_shapes
from speechjax.data.records import Records, open_records
from speechjax.errors import UserError
from speechjax.evals import linear_probe
from speechjax.models.layers import frame_mask
from speechjax.step import batch_shapes, init_state
from speechjax.train import Job

SHORT = ("accuracy", "random_accuracy", "log_mel_accuracy", "mfcc_accuracy")  # metric names of the rows
RANDOM_SEED = 10_000  # far from the seeds people train with


def mean_and_std(frames: jax.Array, lengths: jax.Array) -> jax.Array:
    """Mean and standard deviation over the valid frames: [B, T, D], [B] -> float32 [B, 2 D]."""
    frames = frames.astype(jnp.float32)
    valid = frame_mask(lengths, frames.shape[1])[..., None]
    count = jnp.maximum(lengths, 1).astype(jnp.float32)[:, None]
    mean = jnp.sum(jnp.where(valid, frames, 0), axis=1) / count
    variance = jnp.sum(jnp.where(valid, frames - mean[:, None], 0) ** 2, axis=1) / count
    return jnp.concatenate([mean, jnp.sqrt(variance)], axis=-1)


class Probe:
    """Leave-one-speaker-out accuracy of a linear classifier on pooled hidden states.

    `source` names the recordings (empty: no probe), `pattern` a regex on their ids with groups `label` and
    `speaker`; recordings it does not fit are left out.  `held_out` lists the speakers the result is about (empty:
    all); for an honest figure their audio stays out of pretraining.  `seeds` probe seeds: each trains on another
    nine tenths, and draws another random-initialised encoder.  The features of a recording are mean and standard
    deviation over time of every hidden state.  Controls: the same on a random-initialised encoder, and log-mel
    and MFCC statistics.
    """

    def __init__(self, job: Job, *, every: int, source: str, pattern: str, held_out: Sequence[str], seeds: int):
        self.job, self.every, self.seeds = job, every, seeds
        self.held_out = tuple(held_out)
        self.records: Records | None = None
        if source:
            self._open(source, pattern)
        replicated = NamedSharding(job.mesh, PartitionSpec())

        def pooled(params, extra, batch):
            encoded = job.task.apply({"params": params, **extra}, batch, method="features")
            return jnp.concatenate([mean_and_std(h, encoded.lengths) for h in encoded.hidden], axis=-1)

        self._pooled = jax.jit(pooled, out_shardings=replicated)
        self._controls: dict[str, Any] = {}

    def _open(self, source, pattern):
        data = self.job.config.data
        self.records = open_records(
            source, cache_dir=data.cache_dir or None, min_seconds=0.05, max_bad_share=data.max_bad_share
        )
        found = [re.search(pattern, i.rsplit(".", 1)[0]) for i in self.records.ids]
        self.part = np.array([i for i, m in enumerate(found) if m], np.int64)
        if not len(self.part):
            raise UserError(f"evals.probe.pattern={pattern!r} fits no id of {source}, e.g. {self.records.ids[0]!r}")
        self.labels = np.array([m["label"] for m in found if m])
        self.speakers = np.array([m["speaker"] for m in found if m])
        lengths = self.records.lengths[self.part]
        quantum, offset = self.job.task.encoder.frame_len()
        shapes = plan_shapes(
            lengths, crop=int(lengths.max()), batch_samples=30 * SAMPLE_RATE, shapes=3, quantum=quantum,
            offset=offset, row_multiple=self.job.mesh.size,
        )  # fmt: skip
        self.plan = Plan(lengths, shapes, seed=0)

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        if self.records is None:
            return {}
        rows = {"this encoder": [self._score(self._encode(params, extra), seed) for seed in range(self.seeds)]}
        rows |= self._control_rows()
        columns, cells = linear_probe.format_rows(rows)
        held = f"held out: {', '.join(self.held_out)}" if self.held_out else "each speaker held out in turn"
        title = f"Linear probe at step {step}, accuracy in %, {held}"
        self.job.logs.table(title, columns, cells)
        self.job.logs.save_json("probe", dict(title=title, columns=columns, rows=cells))
        return {key: float(np.mean([s["mean"] for s in scores])) for key, scores in zip(SHORT, rows.values(), strict=True)}

    def _control_rows(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of the controls; they do not depend on training, so they are computed once a run."""
        if not self._controls:
            randoms = [self._encode(*self._random(seed)) for seed in range(self.seeds)]
            audio = [self.records.read(i) for i in self.part]
            rows = {"random-initialised encoder": [self._score(f, s) for s, f in enumerate(randoms)]}
            for label, statistics in (
                ("log-mel statistics", linear_probe.log_mel_statistics),
                ("MFCC statistics", linear_probe.mfcc_statistics),
            ):
                features = statistics(audio)
                rows[label] = [self._score(features, seed) for seed in range(self.seeds)]
            self._controls = rows
        return self._controls

    def _encode(self, params: Any, extra: Any) -> np.ndarray:
        """Pooled features of every recording, float32 [N, D]."""
        features = None
        for rows in self.plan.sweep():
            batch = read_rows(self.records, self.part, rows, jax.process_index(), jax.process_count())
            out = jax.device_get(self._pooled(params, extra, sharding.global_batch(self.job.mesh, batch)))
            features = np.zeros((len(self.part), out.shape[1]), np.float32) if features is None else features
            filled = rows.example >= 0
            features[rows.example[filled]] = out[filled]
        assert features is not None  # there is at least one recording
        return features

    def _random(self, seed: int) -> tuple[Any, Any]:
        """(params, extra) of an encoder that was never trained."""
        shapes = batch_shapes(self.plan.shapes[0], self.job.mesh)
        state = jax.jit(lambda: init_state(self.job.task, optax.identity(), RANDOM_SEED + seed, shapes))()
        return state.params, state.extra

    def _score(self, features: np.ndarray, seed: int) -> dict[str, Any]:
        return linear_probe.leave_one_group_out(
            features, self.labels, self.speakers, held_out=self.held_out or None, seed=seed
        )

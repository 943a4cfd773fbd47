"""A linear probe of the frozen encoder on labelled recordings, always beside its controls.

Shapes: N recordings, B batch, T frames, D width.
"""

import itertools
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from speechjax import sharding
from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.pipeline import batch_spec, read_rows
from speechjax.data.plan import Plan, plan_shapes
from speechjax.data.records import Records, open_records
from speechjax.data.shards import UnreadableError
from speechjax.errors import UserError
from speechjax.evals import _linear_probe as linear_probe
from speechjax.step import batch_shapes, init_state
from speechjax.train import Job

log = logging.getLogger("speechjax")

RANDOM_SEED = 10_000  # far from the seeds people train with
THIS, RANDOM, LOG_MEL, MFCC = "this encoder", "random-initialised encoder", "log-mel statistics", "MFCC statistics"
METRICS = {THIS: "score", RANDOM: "score_random", LOG_MEL: "score_log_mel", MFCC: "score_mfcc"}  # in %


class Labelled(NamedTuple):
    """N labelled recordings: where they are in `records`, their labels and speakers, how to batch them."""

    records: Records
    part: np.ndarray
    labels: np.ndarray
    speakers: np.ndarray
    plan: Plan


class Probe:
    """Leave-one-speaker-out accuracy of a linear classifier on pooled hidden states.

    `source` names the recordings (empty: no probe), `pattern` a regex on their ids with groups `label` and
    `speaker`; recordings it does not fit are left out.  Every speaker is tested with a classifier trained on the
    others; the result is the mean over the speakers in `held_out` (empty: all), whose audio, for an honest
    figure, stays out of pretraining.  `seeds` probe seeds: each trains on another nine tenths of the recordings,
    and draws another random-initialised encoder.  The features of a recording are five statistics over time
    (`linear_probe.pool`) of one hidden state, chosen like the penalty: on the training speakers alone.  Controls,
    pooled alike: a random-initialised encoder, log-mel, MFCC.
    """

    def __init__(self, job: Job, *, every: int, source: str, pattern: str, held_out: Sequence[str], seeds: int):
        self.job, self.every, self.seeds, self.held_out = job, every, seeds, tuple(held_out)
        self.labelled = self._open(source, pattern) if source else None
        self._controls: dict[str, list[linear_probe.ProbeResult]] = {}

        def pooled(params, extra, batch):
            encoded = job.task.apply({"params": params, **extra}, batch, method="features")
            return jnp.stack([pool(h, encoded.lengths) for h in encoded.hidden], axis=1)

        self._pooled = jax.jit(pooled, out_shardings=sharding.replicated(job.mesh))

    def _open(self, source: str, pattern: str) -> Labelled:
        data = self.job.config.data
        records = open_records(
            source, cache_dir=data.cache_dir or None, min_seconds=0.05, max_bad_share=data.max_bad_share
        )
        found = [re.search(pattern, name.rsplit(".", 1)[0]) for name in records.ids]
        part = np.array([i for i, match in enumerate(found) if match], np.int64)
        if not len(part):
            raise UserError(f"config.evals.probe.pattern={pattern!r} fits no id of {source}, e.g. {records.ids[0]!r}")
        labels, speakers = (np.array([m[name] for m in found if m]) for name in ("label", "speaker"))
        if unknown := sorted(set(self.held_out) - set(speakers)):
            known = ", ".join(sorted(set(speakers)))
            raise UserError(
                f"config.evals.probe.held_out: no speaker {', '.join(unknown)} in {source}; there are: {known}"
            )
        quantum, offset = self.job.task.encoder.frame_len()
        lengths = records.lengths[part]
        shapes = plan_shapes(
            lengths, crop=int(lengths.max()), batch_samples=30 * SAMPLE_RATE, shapes=3, quantum=quantum,
            offset=offset, row_multiple=self.job.mesh.size,
        )  # fmt: skip
        return Labelled(records, part, labels, speakers, Plan(lengths, shapes, seed=0))

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        if self.labelled is None:
            return {}
        rows = {THIS: self._scores(self.labelled, [self._encode(self.labelled, params, extra)] * self.seeds)}
        rows |= self._control_scores(self.labelled)
        means = {row: np.array([self._mean(score) for score in scores]) for row, scores in rows.items()}
        self._show(step, rows, means)
        return {METRICS[row]: float(values.mean()) for row, values in means.items()}

    def _control_scores(self, labelled: Labelled) -> dict[str, list[linear_probe.ProbeResult]]:
        """Scores of the controls: they do not change in training, so they are computed once a run."""
        if not self._controls:
            audio = [_audio(labelled.records, int(i)) for i in labelled.part]
            features = {
                RANDOM: [self._encode(labelled, *self._random(labelled, seed)) for seed in range(self.seeds)],
                LOG_MEL: [linear_probe.log_mel_statistics(audio)] * self.seeds,
                MFCC: [linear_probe.mfcc_statistics(audio)] * self.seeds,
            }
            self._controls = {row: self._scores(labelled, seeds) for row, seeds in features.items()}
        return self._controls

    def _encode(self, labelled: Labelled, params: Any, extra: Any) -> np.ndarray:
        """Pooled hidden states of every recording, float32 [N, layers + 1, 5 D]."""
        features: np.ndarray | None = None
        for rows in labelled.plan.sweep():
            hosts = jax.process_index(), jax.process_count()
            batch = read_rows(labelled.records, labelled.part, rows, *hosts, lost=_lost)
            out = jax.device_get(self._pooled(params, extra, sharding.global_batch(self.job.mesh, batch)))
            if features is None:
                features = np.zeros((len(labelled.part), *out.shape[1:]), np.float32)
            example = rows.example[:, 0]
            features[example[example >= 0]] = out[example >= 0]
        assert features is not None  # there is at least one recording
        return features

    def _random(self, labelled: Labelled, seed: int) -> tuple[Any, Any]:
        """(params, extra) of an encoder that was never trained."""
        shapes = batch_shapes(batch_spec(labelled.plan.shapes[0]), self.job.mesh)
        state = jax.jit(lambda: init_state(self.job.task, optax.identity(), RANDOM_SEED + seed, shapes))()
        return state.params, state.extra

    def _scores(self, labelled: Labelled, features: Sequence[np.ndarray]) -> list[linear_probe.ProbeResult]:
        return [
            linear_probe.leave_one_group_out(x, labelled.labels, labelled.speakers, seed=seed)
            for seed, x in enumerate(features)
        ]

    def _mean(self, score: linear_probe.ProbeResult) -> float:
        return float(np.mean([score["accuracy"][speaker] for speaker in self.held_out or score["accuracy"]]))

    def _show(self, step: int, rows: dict[str, list[linear_probe.ProbeResult]], means: dict[str, np.ndarray]) -> None:
        """The table on the console and, as probe.json, on the report page."""
        speakers = sorted(rows[THIS][0]["accuracy"])
        columns = ["features", "mean", "std over seeds", *(s + "*" * (s in self.held_out) for s in speakers)]
        cells = [
            [row, f"{means[row].mean():.1f}", f"{means[row].std():.1f}"]
            + [f"{np.mean([score['accuracy'][s] for score in scores]):.1f}" for s in speakers]
            for row, scores in rows.items()
        ]
        over = "the speakers marked *" if self.held_out else "all speakers"
        title = f"Linear probe at step {step}: accuracy in %, each speaker held out in turn, mean over {over}"
        if self.held_out:
            columns.append("all")
            for line, scores in zip(cells, rows.values(), strict=True):
                line.append(f"{np.mean([score['mean'] for score in scores]):.1f}")
        self.job.logs.table(title, columns, cells)
        self.job.logs.save_json("probe", dict(title=title, columns=columns, rows=cells))


def _lost(i: int, error: Exception) -> None:
    log.warning("the probe hears silence instead of recording %d: %s", i, error)


def _audio(records: Records, i: int) -> np.ndarray:
    """int16 samples; silence where they cannot be read any more, which must not end a training run."""
    try:
        return records.read(i)
    except UnreadableError as error:
        _lost(i, error)
        return np.zeros(int(records.lengths[i]), np.int16)


def pool(frames: jax.Array, lengths: jax.Array) -> jax.Array:
    """`linear_probe.pool` of every row, on the device: [B, T, D], [B] -> float32 [B, 5 D]."""
    frames = frames.astype(jnp.float32)
    time = jnp.arange(frames.shape[1])[None, :]

    def mean(start, stop, values=frames):
        inside = (time >= start[:, None]) & (time < stop[:, None])
        count = jnp.maximum(stop - start, 1).astype(jnp.float32)[:, None]
        return jnp.sum(jnp.where(inside[..., None], values, 0), axis=1) / count

    none = jnp.zeros_like(lengths)
    centre = mean(none, lengths)
    spread = jnp.sqrt(mean(none, lengths, jnp.square(frames - centre[:, None])))
    bounds = [lengths * third // 3 for third in range(4)]
    thirds = [mean(a, jnp.maximum(b, a + 1)) for a, b in itertools.pairwise(bounds)]
    return jnp.concatenate([centre, spread, *thirds], axis=-1)

"""A linear probe of the frozen encoder on labelled recordings, always beside its controls.

Shapes: N recordings, B batch, T frames, D width.
"""

import functools
import itertools
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from speechjax import sharding
from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.pipeline import read_rows
from speechjax.data.plan import Plan, plan_shapes
from speechjax.data.records import Records, open_records
from speechjax.data.shards import UnreadableError
from speechjax.errors import UserError
from speechjax.evals import _cache, _few_shot, _frames, _logistic
from speechjax.evals import _linear_probe as linear_probe
from speechjax.evals import _probe_tables as tables_of
from speechjax.evals._probe_tables import LOG_MEL, METRICS, MFCC, RANDOM, THIS, Scores
from speechjax.train import Job

log = logging.getLogger("speechjax")


Layers = list[np.ndarray]  # pooled hidden states [N, 5 D], each with a D of its own


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
    `speaker`; recordings it does not fit are left out.  Every speaker in `held_out` (empty: all), whose audio, for an
    honest figure, stays out of pretraining, is tested with a classifier trained on all others; the score is the mean
    over them.  `seeds` probe seeds: each trains on another nine tenths of the recordings, and draws another
    random-initialised encoder.  The features of a recording are five statistics over time (`linear_probe.pool`) of
    one hidden state, chosen like the penalty: on the training speakers alone.  A second table, <name>_layers, has
    every hidden state by itself.  Controls, pooled alike: a random-initialised encoder, log-mel, MFCC; their scores
    are kept in the cache, under what they were computed from.

    With few labels, <name>_shots: for each k in `shots` the classifier (`_few_shot.accuracies`) knows only k examples
    a class of the training speakers, in ten draws, and looks at the hidden state that the probe chose.

    Metrics, in %: `score` and those of the controls, and `score_<k>_shot`.
    """

    def __init__(
        self, job: Job, *, every: int, source: str, pattern: str, held_out: Sequence[str], seeds: int,
        shots: Sequence[int] = (1, 5, 20),
    ):  # fmt: skip
        self.job, self.every, self.seeds, self.held_out = job, every, seeds, tuple(held_out)
        if seeds < 1 or any(k < 1 for k in shots):
            raise UserError(f"config.evals.probe: seeds={seeds} and shots={tuple(shots)} must be 1 or more")
        self.labelled = self._open(source, pattern) if source else None
        self.shots = self._available(self.labelled, shots) if self.labelled else ()
        self._controls: dict[str, list[Scores]] = {}

        def pooled(params, extra, batch):
            encoded = job.task.apply({"params": params, **extra}, batch, method="features")
            return [pool(h, encoded.lengths) for h in encoded.hidden]

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

    def _tested(self, labelled: Labelled) -> list[str]:
        return list(self.held_out) or sorted(set(labelled.speakers.tolist()))

    def _available(self, labelled: Labelled, shots: Sequence[int]) -> tuple[int, ...]:
        """Those of `shots` that the recordings suffice for."""
        tested = self._tested(labelled)
        most = _few_shot.available(labelled.labels, labelled.speakers, tested) if len(set(labelled.speakers)) > 1 else 0
        if most < max(shots, default=0):
            log.info("probe: no more than %d recordings of the rarest label to train on: no shots above", most)
        return tuple(sorted(k for k in set(shots) if k <= most))

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        if self.labelled is None:
            return {}
        rows = {THIS: self._scores(self.labelled, [self._encode(self.labelled, params, extra)] * self.seeds)}
        rows |= self._control_scores(self.labelled)
        self._show(step, name, rows)
        few = {k: float(np.mean([list(s["shots"][str(k)].values()) for s in rows[THIS]])) for k in self.shots}
        return {METRICS[row]: float(np.mean([s["probe"]["mean"] for s in scores])) for row, scores in rows.items()} | {
            f"score_{k}_shot": value for k, value in few.items()
        }

    def _control_scores(self, labelled: Labelled) -> dict[str, list[Scores]]:
        """Scores of the controls: they do not change in training, so they are computed once a run."""
        if not self._controls:
            audio = [_audio(labelled.records, int(i)) for i in labelled.part]
            where = _frames.Recordings(labelled.records, labelled.part, labelled.plan)
            random = (_frames.random_variables(self.job, where, seed) for seed in range(self.seeds))
            features = {
                RANDOM: [self._encode(labelled, *variables) for variables in random],
                LOG_MEL: [[linear_probe.log_mel_statistics(audio)]] * self.seeds,
                MFCC: [[linear_probe.mfcc_statistics(audio)]] * self.seeds,
            }
            self._controls = {row: self._scores(labelled, seeds, cached=True) for row, seeds in features.items()}
        return self._controls

    def _encode(self, labelled: Labelled, params: Any, extra: Any) -> Layers:
        """Pooled hidden states of every recording."""
        layers: Layers = []
        for rows in labelled.plan.sweep():
            hosts = sharding.host_part(self.job.mesh)
            batch = read_rows(labelled.records, labelled.part, rows, *hosts, lost=_lost)
            pooled = jax.device_get(self._pooled(params, extra, sharding.global_batch(self.job.mesh, batch)))
            if not layers:
                layers = [np.zeros((len(labelled.part), own.shape[1]), np.float32) for own in pooled]
            example = rows.example[:, 0]
            for layer, own in zip(layers, pooled, strict=True):
                layer[example[example >= 0]] = own[example >= 0]
        return layers

    def _scores(self, labelled: Labelled, features: Sequence[Layers], cached: bool = False) -> list[Scores]:
        """Of each seed's hidden states; `cached`: kept on disk."""
        folder, sources = _cache.folder(self.job.config.data.cache_dir), (linear_probe, _few_shot, _logistic)
        arrays, found = (labelled.labels, labelled.speakers), []
        for seed, x in enumerate(features):
            score = functools.partial(self._score, labelled, x, seed)
            # Not under what the features come from (recordings, encoder, code), of which something would be forgotten.
            options = [seed, self._tested(labelled), self.shots]
            key = _cache.digest((*x, *arrays), options, [str(s.__file__) for s in sources]) if cached else ""
            found.append(_cache.cached(folder, key, score) if cached else score())
        return found

    def _score(self, labelled: Labelled, layers: Layers, seed: int) -> Scores:
        labels, speakers, tested = labelled.labels, labelled.speakers, self._tested(labelled)
        probe = linear_probe.leave_one_group_out(layers, labels, speakers, held_out=tested, seed=seed)
        shots: dict[str, dict[str, list[float]]] = {str(k): {} for k in self.shots}
        for speaker in tested if self.shots else ():
            chosen = layers[probe["layer"][speaker]]
            for k, found in _few_shot.accuracies(chosen, labels, speakers, speaker, self.shots, seed).items():
                shots[str(k)][speaker] = found
        return Scores(probe=probe, shots=shots)

    def _show(self, step: int, name: str, rows: dict[str, list[Scores]]) -> None:
        """The tables on the console and, as <name>.json, <name>_layers.json and <name>_shots.json, in report/."""
        tables = {name: tables_of.speakers(rows, step), f"{name}_layers": tables_of.layers(rows, step)}
        if self.shots:
            tables[f"{name}_shots"] = tables_of.shots(rows, step)
        for file, table in tables.items():
            self.job.logs.table(table["title"], table["columns"], table["rows"])
            self.job.logs.save_json(file, table)


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

"""Frozen features of labelled recordings, frame by frame: what the ABX test and the unit statistics look at.

Shapes: N recordings, B batch, L hidden states asked for, T frames, D features.

Beside the encoder stand three controls: the same encoder, random-initialised, and log-mel and MFCC frames, which need
no model.  What does not beat them has learnt nothing that this test can see.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from speechjax import sharding
from speechjax.audio import features as audio_features
from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.pipeline import batch_spec, read_rows
from speechjax.data.plan import Plan, Shape, plan_shapes
from speechjax.data.records import Records, open_records
from speechjax.errors import UserError
from speechjax.step import stream_keys
from speechjax.train import Job

log = logging.getLogger("speechjax")

THIS, RANDOM, LOG_MEL, MFCC = "this encoder", "random-initialised encoder", "log-mel", "MFCC"
SUFFIXES = {THIS: "", RANDOM: "_random", LOG_MEL: "_log_mel", MFCC: "_mfcc"}  # of the metrics
_RANDOM_SEED = 10_000  # far from the seeds people train with
_LONGEST = 120.0  # seconds; longer recordings are cut, and what is cut has no alignment
_BATCH_SECONDS = 30

Phones = list[tuple[str, float, float]]  # (symbol, start s, end s), in order


class Timing(NamedTuple):
    """Frame t is centred on sample t * `hop` + `centre`."""

    hop: int
    centre: float

    def between(self, start: float, end: float) -> tuple[int, int]:
        """[first, stop) of the frames whose centres lie in [start, end) seconds."""
        # The tolerance is a thousandth of a sample: 0.1 * 16000 is not 1600 in binary.
        first, stop = (math.ceil((s * SAMPLE_RATE - self.centre - 1e-3) / self.hop) for s in (start, end))
        return max(first, 0), max(stop, 0)


CONTROL_TIMING = Timing(SAMPLE_RATE // 100, 0.0)  # centred frames: frame t on sample t * hop


class Recordings(NamedTuple):
    """N recordings: where they are in `records`, and how to batch them."""

    records: Records
    part: np.ndarray
    plan: Plan


class Features(NamedTuple):
    """`compute(params, extra, batch)` -> ([B, L, T, D] float32, frames of each row [B]), and what a frame covers."""

    timing: Timing
    compute: Callable[[Any, Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]


def open_source(job: Job, source: str) -> Records:
    """The recordings of an evaluator's `source`, uncut up to two minutes."""
    data = job.config.data
    return open_records(
        source, cache_dir=data.cache_dir or None, min_seconds=0.05, max_bad_share=data.max_bad_share,
        segment_seconds=_LONGEST,
    )  # fmt: skip


def aligned(records: Records, what: str) -> dict[int, Phones]:
    """{example: its phones} of the recordings that have phones with times.

    Raises UserError, which names the option `what`, where none has.
    """
    found = {i: phones for i in range(len(records)) if (phones := _phones(records, i))}
    if not found:
        raise UserError(
            f"{what}: no recording has phones with times; a manifest's JSON line needs "
            '"phones": [["HH", 0.00, 0.06], ["AY", 0.06, 0.21], ...], and embedded:0.1 has them'
        )
    return found


def _phones(records: Records, i: int) -> Phones:
    phones = records.meta(i).get("phones") or []
    try:
        return [(str(symbol), float(start), float(end)) for symbol, start, end in phones]
    except (TypeError, ValueError):  # symbols without times, as fairseq's .phn has them
        return []


def batched(job: Job, records: Records, part: Sequence[int] | np.ndarray) -> Recordings:
    """The examples `part` of `records`, ready for `sweep`."""
    quantum, offset = job.task.encoder.frame_len()
    chosen = np.asarray(part, np.int64)
    lengths = records.lengths[chosen]
    shapes = plan_shapes(
        lengths, crop=int(lengths.max()), batch_samples=_BATCH_SECONDS * SAMPLE_RATE, shapes=3, quantum=quantum,
        offset=offset, row_multiple=job.mesh.size,
    )  # fmt: skip
    return Recordings(records, chosen, Plan(lengths, shapes, seed=0))


def sweep(
    job: Job, recordings: Recordings, features: Features, params: Any, extra: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """(n, float32 [L, T, D]) of every recording, the n-th of `recordings`, T its valid frames.

    A recording that cannot be read any more counts as silence: that must not end a training run.
    """

    def lost(i: int, error: Exception) -> None:
        log.warning("an evaluation hears silence instead of recording %d: %s", i, error)

    hosts = sharding.host_part(job.mesh)
    for rows in recordings.plan.sweep():
        batch = read_rows(recordings.records, recordings.part, rows, *hosts, lost=lost)
        batch["lengths"] = np.asarray(rows.count[:, 0], np.int32)[_mine(rows.shape, *hosts)]
        out, counts = jax.device_get(features.compute(params, extra, sharding.global_batch(job.mesh, batch)))
        for row, n in enumerate(rows.example[:, 0].tolist()):
            if n >= 0:
                yield n, out[row, :, : int(counts[row])]


def _mine(shape: Shape, host: int, hosts: int) -> slice:
    share = shape.rows // hosts
    return slice(host * share, (host + 1) * share)


def encoder_features(job: Job, layers: Sequence[int]) -> Features:
    """The hidden states `layers` of the task's encoder.  Raises UserError if it has several at one time."""
    if (tokens := job.task.encoder.tokens()) > 1:
        raise UserError(
            f"config.evals: this encoder has {tokens} tokens at one time, of which none is that of a phone; "
            "leave out abx and units (--evals=probe)"
        )

    def compute(params, extra, batch):
        encoded = job.task.apply({"params": params, **extra}, batch, method="features")
        states = [encoded.hidden[layer].astype(jnp.float32) for layer in layers]
        return jnp.stack(states, axis=1), encoded.lengths

    hop, more = job.task.encoder.frame_len()
    return Features(Timing(hop, (hop + more) / 2), jax.jit(compute, out_shardings=sharding.replicated(job.mesh)))


def control_features(job: Job, name: str) -> Features:
    """80 log-mel bands, or 13 MFCC with first and second derivatives, 10 ms apart, normalised over each recording.

    Without that normalisation the angle between two frames is mostly the recording's level and its microphone.
    """

    hop = CONTROL_TIMING.hop

    def compute(params, extra, batch):
        del params, extra
        if name == LOG_MEL:
            frames, lengths = audio_features.log_mel(batch["audio"], batch["lengths"], hop=hop)
        else:
            cepstra, lengths = audio_features.mfcc(batch["audio"], batch["lengths"], hop=hop, n_mels=26)
            slopes = [audio_features.deltas(cepstra, lengths, order=order)[0] for order in (1, 2)]
            frames = jnp.concatenate([cepstra, *slopes], axis=-1)
        return audio_features.cmvn(frames, lengths)[0][:, None], lengths

    return Features(CONTROL_TIMING, jax.jit(compute, out_shardings=sharding.replicated(job.mesh)))


def hidden_count(job: Job, recordings: Recordings) -> int:
    """How many hidden states the task's features have."""
    encoded, _ = jax.eval_shape(lambda: _init(job, recordings, 0))
    return len(encoded.hidden)


def chosen_layers(job: Job, recordings: Recordings, layer: int, layers: str, what: str) -> list[int]:
    """The hidden states to look at, that of the metrics last; `what` names the evaluator's block in errors."""
    count = hidden_count(job, recordings)
    if not -count <= layer < count:
        raise UserError(f"{what}.layer={layer}: there are the hidden states 0 to {count - 1}, or -1 for the last")
    if layers not in ("one", "all"):
        raise UserError(f"{what}.layers={layers!r}: choose one (the one in layer) or all")
    main = layer % count
    return [k for k in range(count) if layers == "all" and k != main] + [main]


def random_variables(job: Job, recordings: Recordings, seed: int = 0) -> tuple[Any, Any]:
    """(params, extra) of what the task's features need, never trained."""
    _, variables = jax.jit(lambda: _init(job, recordings, _RANDOM_SEED + seed))()
    variables = dict(variables)
    return variables.pop("params"), variables


def _init(job: Job, recordings: Recordings, seed: int) -> Any:
    spec = batch_spec(recordings.plan.shapes[0])
    batch = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in spec.items()}
    rngs = {"params": jax.random.key(seed), **stream_keys(job.task, seed, jnp.int32(0))}
    # Not the task's own call: what it needs beyond audio (units, labels) these recordings may lack.
    return job.task.init_with_output(rngs, batch, method="features")

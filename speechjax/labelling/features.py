"""What is clustered: MFCC, or a hidden layer of a trained encoder; computed batch by batch on the device, never stored.

Shapes: B batch, T frames, D dimensions.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from speechjax import config as configs
from speechjax import sharding
from speechjax.audio import features as audio_features
from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.pipeline import batch_spec
from speechjax.data.plan import Shape
from speechjax.errors import UserError
from speechjax.labelling.windows import LONGEST
from speechjax.runs import open_run

log = logging.getLogger("speechjax")

_HOP, _WINDOW, _SLOPE = 160, 400, 5
_CONTEXT = 1.0  # seconds beside a window of a long recording that an encoder hears too


@dataclass(frozen=True, eq=False)
class Features:
    """A way from a batch to frames: `compute(variables, batch)` -> (float32 [B, T, D], frames int32 [B]).

    Frame t takes samples [t hop, t hop + hop + extra).  `definition` (JSON) decides the numbers; `context` frames on
    either side of a cut make a frame what it would be without the cut, or nearly.
    """

    name: str
    definition: dict[str, Any]
    hop: int
    extra: int
    context: int
    variables: Any
    compute: Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]


def mfcc39(_: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """13 MFCC, their slopes and the slopes of these, at 100 Hz: [B, T, 39], [B]; T = 1 + (S - 400) // 160.

    The features of HuBERT's first iteration (Hsu et al. 2021, section IV-B): Kaldi's MFCC of 23 bands and lifter 22,
    of samples between -1 and 1 rather than of 16 bits (which keeps digital silence from being an outlier); slopes by
    linear regression over 5 frames.  Unlike the published code, which repeats the first and last frame, the slopes of
    the two frames at either end are those of the first and last whole window.
    """
    audio = batch["audio"]
    # Kaldi's convention takes 1.0 for 32768; the log's floor is the only place where scale is more than an offset.
    audio = (audio.astype(jnp.float32) / 32768 if audio.dtype == jnp.int16 else audio) / 32768
    found, frames = audio_features.mfcc(
        audio, batch["lengths"], convention="kaldi", n_fft=_WINDOW, hop=_HOP, n_mels=23, n_mfcc=13
    )
    slopes, _ = audio_features.deltas(found, frames, width=_SLOPE)
    curves, _ = audio_features.deltas(slopes, frames, width=_SLOPE)
    return jnp.concatenate([found, slopes, curves], axis=-1), frames


def mfcc() -> Features:
    """`mfcc39` as features to cluster."""
    definition = dict(
        name="mfcc", convention="kaldi", full_scale=1, n_mels=23, n_mfcc=13, deltas=[1, 2], width=_SLOPE,
        window=_WINDOW, hop=_HOP, sample_rate=SAMPLE_RATE,
    )  # fmt: skip
    return Features("MFCC", definition, _HOP, _WINDOW - _HOP, 2 * (_SLOPE // 2), {}, mfcc39)


def hidden(which: str, layer: int, mesh: jax.sharding.Mesh) -> Features:
    """Hidden state `layer` of a trained encoder, by `runs.open_run`: 0 the layers' input, n the output of the n-th.

    With pre-norm encoders that is the residual stream, not yet normalised.  Raises UserError for a run or a checkpoint
    that is not there, for a layer that it does not have, and for encoders with several tokens at one time.
    """
    run = open_run(which, sharding.replicated(mesh))
    if (tokens := run.task.encoder.tokens()) > 1:
        raise UserError(f"--features={which}: its encoder has {tokens} tokens at one time; a unit names one frame")
    hop, extra = run.task.encoder.frame_len()

    def states(variables, batch):
        return run.task.apply(variables, batch, method="features")

    def compute(variables, batch):
        encoded = states(variables, batch)
        return encoded.hidden[layer].astype(jnp.float32), encoded.lengths

    spec = batch_spec(Shape(1, 2 * hop + extra))
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec.items()}
    count = len(jax.eval_shape(states, run.variables, batch).hidden)
    if not 0 <= layer < count:
        raise UserError(f"--layer={layer}: this encoder has layers 1 to {count - 1}, and 0, their input")
    blocks = configs.to_json(run.config)
    context = round(_CONTEXT * SAMPLE_RATE / hop)
    definition = dict(
        name="hidden", layer=layer, hop=hop, extra=extra, checkpoint=run.digest, task=blocks["task"]["name"],
        model=blocks["model"], window=LONGEST, context=context, sample_rate=SAMPLE_RATE,
    )  # fmt: skip
    name = f"layer {layer} of {run.workdir.name} at step {run.step}"
    log.info("features: %s (%s)", name, run.directory)
    return Features(name, definition, hop, extra, context, run.variables, compute)


def open_features(which: str, layer: int | None, mesh: jax.sharding.Mesh) -> Features:
    """What --features and --layer name: `mfcc`, or RUNDIR[@STEP] with a layer.  Raises UserError as `hidden` does."""
    if which == "mfcc":
        if layer is not None:
            raise UserError(f"--layer={layer} is of an encoder; --features=mfcc has none")
        return mfcc()
    if layer is None:
        raise UserError(f"--features={which} needs --layer=N, the layer of its encoder; else say --features=mfcc")
    return hidden(which, layer, mesh)

"""Teachers: moving averages of a student's parameters, and the targets made of their layers.

Shapes: B batch, T frames, D width, G segments a row.  `lengths` is int32 [B], or [B, T] for packed rows of up to G
`segments`: see layers.py.

Everything here speaks of the rate of an average, 1 - decay: float32 holds a rate of 1e-7, but no decay of 1 - 1e-7.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.models.layers import frame_mask

LEAST_RATE = 1e-7  # slower averages are none: float32 parameters would no longer move (SpidR's published threshold)


def ema_rate(step: jax.Array, *, schedule: str, start: float, end: float, steps: int) -> jax.Array:
    """1 - decay after `step` updates, for a decay from `start` towards `end`; below `LEAST_RATE` it is 0.

    "linear" arrives after `steps` updates (data2vec, arXiv 2202.03555, section 3.2); "exponential" has a time constant
    of `steps` (SpidR, arXiv 2512.20308).  Raises UserError for other names and for decays outside [0, 1].
    """
    if schedule not in ("linear", "exponential"):
        raise UserError(f"config.task.ema_schedule={schedule!r}: choose linear or exponential")
    if not (0 <= start <= 1 and 0 <= end <= 1 and steps > 0):
        raise UserError(f"config.task: ema_start={start}, ema_end={end} must be in [0, 1], ema_steps={steps} above 0")
    progress = step.astype(jnp.float32) / steps
    left = jnp.exp(-progress) if schedule == "exponential" else jnp.maximum(1 - progress, 0)
    rate = (1 - end) + (end - start) * left
    return jnp.where(rate > LEAST_RATE, rate, 0.0)


def ema(teacher: Any, student: Any, rate: jax.Array) -> Any:
    """teacher + rate * (student - teacher) in float32, for trees alike."""
    return jax.tree.map(lambda t, s: t + rate * (s.astype(jnp.float32) - t), teacher, student)


def tracked(transformer: Mapping[str, Any], *, positions: bool) -> dict[str, Any]:
    """The part of a transformer's parameters that has a teacher of its own, in float32.

    Without `positions` the convolutions that encode them are the student's (data2vec, DinoSR, SpidR).
    """
    part = {k: v for k, v in transformer.items() if positions or k != "positions"}
    return jax.tree.map(lambda x: x.astype(jnp.float32), part)


def new_teacher(transformer: Mapping[str, Any], *, positions: bool) -> dict[str, Any]:
    """`tracked` as copies: outside jit the student's own arrays would be donated to the next step twice."""
    return jax.tree.map(lambda x: x.copy(), tracked(transformer, positions=positions))


def teacher_layers(
    encoder: SpeechEncoder, teacher: Mapping[str, Any], features: jax.Array, lengths: jax.Array
) -> list[jax.Array]:
    """Feed-forward outputs, before the residual sum, of every layer of the teacher: [B, T, C] -> L times [B, T, D].

    `encoder` is the bound student; whatever `teacher` does not hold is taken from it.  The teacher sees unmasked
    features, has no dropout, and passes no gradient.
    """
    params = encoder.variables["params"]
    params = lax.stop_gradient({**params, "transformer": {**params["transformer"], **teacher}})
    alone: Any = encoder.clone(parent=None)
    encoded = alone.apply(
        {"params": params}, lax.stop_gradient(features), lengths, train=False, hidden="mlp", method="contextualize"
    )
    return encoded.hidden


def instance_norm(x: jax.Array, lengths: jax.Array, segments: int = 1, epsilon: float = 1e-5) -> jax.Array:
    """Zero mean and unit variance over the frames of each utterance, by feature: [B, T, D] -> float32 [B, T, D].

    Padding takes no part and is zero.  (Ulyanov et al. 2016, arXiv 1607.08022; of the targets: data2vec, section 3.3.)
    """
    member_BxGxT = _members(lengths, x.shape[1], segments)
    x = x.astype(jnp.float32)
    mean, variance = _moments(x, member_BxGxT)
    back = lambda moment: jnp.einsum("bgt,bgd->btd", member_BxGxT, moment)  # noqa: E731
    return (x - back(mean)) * back(lax.rsqrt(variance + epsilon)) * jnp.sum(member_BxGxT, axis=1)[..., None]


def time_variation(x: jax.Array, lengths: jax.Array, segments: int = 1) -> tuple[jax.Array, jax.Array]:
    """(sum of squares around each utterance's mean over time, sum of squares) of [B, T, D] inside utterances.

    Their ratio is 0 for features that are the same in all frames of an utterance, whatever their size, up to 1.
    """
    member_BxGxT = _members(lengths, x.shape[1], segments)
    x = lax.stop_gradient(x).astype(jnp.float32)
    _, variance = _moments(x, member_BxGxT)
    around = jnp.sum(variance * jnp.sum(member_BxGxT, axis=2)[..., None])
    square = jnp.sum(jnp.sum(jnp.square(x), axis=2) * jnp.sum(member_BxGxT, axis=1))
    return around, square


def mean_deviation(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Standard deviation over all frames of weight 1, averaged over features: [B, T, D], float32 [B, T] -> [].

    What the published monitors of collapse call variance.
    """
    n = jnp.sum(weight)
    mean = jnp.einsum("btd,bt->d", x, weight) / jnp.maximum(n, 1)
    square = jnp.einsum("btd,bt->d", jnp.square(x - mean[None, None]), weight)
    return jnp.mean(jnp.sqrt(square / jnp.maximum(n - 1, 1) + 1e-6))


def _members(lengths, frames, segments):
    """float32 [B, G, T]: 1 where a frame is of the row's g-th utterance."""
    if lengths.ndim == 1:
        return frame_mask(lengths, frames)[:, None].astype(jnp.float32)
    ids = jnp.arange(1, segments + 1, dtype=jnp.int32)
    return (lengths[:, None, :] == ids[None, :, None]).astype(jnp.float32)


def _moments(x, member_BxGxT):
    """Mean and variance over time of each utterance: float32 [B, G, D] each; 0 and 0 for those without frames."""
    share = member_BxGxT / jnp.maximum(jnp.sum(member_BxGxT, axis=2, keepdims=True), 1)
    mean = jnp.einsum("bgt,btd->bgd", share, x)
    centred = x - jnp.einsum("bgt,bgd->btd", member_BxGxT, mean)  # two passes: the one-pass variance cancels
    return mean, jnp.einsum("bgt,btd->bgd", share, jnp.square(centred))

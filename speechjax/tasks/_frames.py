"""Objectives that give back the frames of a spectral front end: their way through the encoder, and what they share.

Shapes: B batch, N frames of 10 ms, F features of one, k frames stacked, T = N // k.
"""

import jax
import jax.numpy as jnp
from jax import lax

from speechjax.models.encoder import Encoded
from speechjax.models.layers import frame_mask
from speechjax.tasks._base import Task


class FrameTask(Task):
    """A task whose encoder takes frames as they are, without the layer norm over the features of a frame.

    That norm takes every frame's loudness, which then cannot be given back: from normalised frames of 80 log-mels the
    best linear map restores a frame with a root mean square error of 0.55 standard deviations, and predicts 50 ms ahead
    from 80 ms with 0.90 instead of 0.87 (read speech).
    """

    def encode(
        self, x: jax.Array, lengths: jax.Array, *, train: bool, hidden: bool | str = False
    ) -> Encoded:  # fmt: skip
        """Frames of `encoder.inputs`, perhaps altered, through the encoder: float32 [B, N, F], [B] -> `Encoded`."""
        features, lengths = self.encoder.embed(x, lengths)
        return self.encoder.contextualize(features, lengths, train=train, hidden=hidden)

    def features(self, batch: dict[str, jax.Array]) -> Encoded:
        """Features of every layer, for probes: `Encoded` with all hidden states."""
        return self.encode(*self.encoder.inputs(batch), train=False, hidden=True)


def unstack_frames(x: jax.Array, frames: int, factor: int) -> jax.Array:
    """The reverse of `stack_frames`, zeros for the frames that had been dropped: [B, T, k F] -> [B, N, F]."""
    B, T, C = x.shape
    x = x.reshape(B, T * factor, C // factor)
    return jnp.pad(x, ((0, 0), (0, frames - T * factor), (0, 0)))


def utterance_mean(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Mean over the valid frames of each row: [B, N, F], [B] -> [B, 1, F]."""
    valid = frame_mask(lengths, x.shape[1])[..., None]
    count = jnp.maximum(lengths, 1).astype(x.dtype)[:, None, None]
    return jnp.sum(jnp.where(valid, x, 0), axis=1, keepdims=True) / count


def batch_mean(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean over all frames of weight 1: [B, N, F], float32 [B, N] -> [1, 1, F]."""
    mean = jnp.einsum("bnf,bn->f", x, weight) / jnp.maximum(jnp.sum(weight), 1)
    return mean[None, None]


def interpolate(x: jax.Array, known: jax.Array) -> jax.Array:
    """Straight lines over time between the nearest known frames: [B, N, F], bool [B, N] -> [B, N, F].

    Before the first and after the last known frame it stays that one; rows without any are zero.
    """
    B, N, _ = x.shape
    time = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32)[None], (B, N))
    before = lax.cummax(jnp.where(known, time, -1), axis=1)
    after = lax.cummin(jnp.where(known, time, N), axis=1, reverse=True)
    first, last = jnp.where(before < 0, after, before), jnp.where(after == N, before, after)
    at = lambda index: jnp.take_along_axis(x, jnp.clip(index, 0, N - 1)[..., None], axis=1)  # noqa: E731
    part = (time - first).astype(x.dtype) / jnp.maximum(last - first, 1).astype(x.dtype)
    line = at(first) + part[..., None] * (at(last) - at(first))
    return jnp.where(jnp.any(known, axis=1)[:, None, None], line, jnp.zeros((), x.dtype))


def constant_output_alarm(output: float, target: float) -> dict[str, str]:
    """The alarm for outputs whose deviation over frames has become small beside that of the targets."""
    if not output < 0.05 * target:
        return {}
    return dict(
        output_collapse=f"outputs vary by {output:.3g} over the frames, targets by {target:.3g}: the model gives the "
        "mean of all frames for each; lower optim.learning_rate, lengthen optim.warmup, and check that the audio is "
        "not silent"
    )

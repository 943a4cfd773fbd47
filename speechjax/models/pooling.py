"""From the frames of an utterance to one vector.  Shapes: B batch, T frames, D width.  Padding takes no part."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.models.layers import fan_in_uniform, frame_mask


def mean_pool(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Mean over the frames of each row: [B, T, D], int32 [B] -> float32 [B, D]; zero for a row without frames."""
    valid = frame_mask(lengths, x.shape[1]).astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", jnp.where(valid[..., None] > 0, x.astype(jnp.float32), 0), valid)
    return total / jnp.maximum(lengths, 1).astype(jnp.float32)[:, None]


class AttentiveStatistics(nn.Module):
    """Weighted mean and standard deviation over frames: [B, T, D], int32 [B] -> float32 [B, 2 D].

    The weights, one a frame, come from a layer of `hidden` units and a softmax over the frames of the row (Okabe et al.
    2018, arXiv 1803.10963, equations 3 to 6).  A row without frames has the mean 0.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        valid = frame_mask(lengths, x.shape[1])
        x = jnp.where(valid[..., None], x.astype(jnp.float32), 0)
        dense = nn.Dense(self.hidden, dtype=jnp.float32, kernel_init=fan_in_uniform(x.shape[-1]), name="attention")
        score = nn.Dense(1, use_bias=False, dtype=jnp.float32, name="score")(nn.tanh(dense(x)))[..., 0]
        # Large and finite: a row without frames would turn minus infinity into NaN.
        weight = jnp.where(valid, jax.nn.softmax(jnp.where(valid, score, -1e30), axis=1), 0)
        mean = jnp.einsum("bt,btd->bd", weight, x)
        # Around the mean: the difference of two large squares would cancel.
        variance = jnp.einsum("bt,btd->bd", weight, jnp.square(x - mean[:, None]))
        return jnp.concatenate([mean, jnp.sqrt(variance + 1e-6)], axis=1)  # sqrt has no slope at zero

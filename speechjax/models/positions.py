"""Positional encodings.  Shapes: B batch, T frames, D width, K kernel, G groups."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.models.layers import gelu

FRAMES_PER_ROW = 4  # of `grouped_conv`; segments of packed rows start at multiples of it


def grouped_conv(
    x: jax.Array,
    kernel: jax.Array,
    groups: int,
    frames_per_row: int = FRAMES_PER_ROW,
    segments: jax.Array | None = None,
) -> jax.Array:
    """'Same' grouped convolution as one batched matrix product: [B, T, D], [K, D/G, D] -> [B, T, D].

    `frames_per_row` neighbouring frames become one row, multiplied by a banded Toeplitz matrix that holds the
    kernel once for each of them: 3 % more FLOPs at four, but wide products.  XLA's own grouped convolution has a
    weight gradient 18 times slower on CPU and gathers the whole batch on every device when the batch is sharded.
    Even kernels see one frame more of the past, as the published code (which drops the last frame).

    With segment ids `segments` [B, T] no segment sees another.  Each must start at a multiple of `frames_per_row`:
    then one row has one segment, and hiding the frames of others from its window is exact.
    """
    B, T, D = x.shape
    K, width, _ = kernel.shape
    r, out = frames_per_row, D // groups
    rows = -(-T // r)
    blocks = -(-(K - 1 + r) // r)
    left = K // 2
    x = jnp.pad(x, ((0, 0), (left, (rows - 1 + blocks) * r - left - T), (0, 0)))
    x = x.reshape(B, rows - 1 + blocks, r, groups, width).transpose(3, 0, 1, 2, 4)
    x = x.reshape(groups, B, rows - 1 + blocks, r * width)
    x = jnp.concatenate([x[:, :, j : j + rows] for j in range(blocks)], axis=-1)
    if segments is not None:
        ids = jnp.pad(segments, ((0, 0), (left, (rows - 1 + blocks) * r - left - T)))
        ids = ids.reshape(B, rows - 1 + blocks, r)
        ids = jnp.concatenate([ids[:, j : j + rows] for j in range(blocks)], axis=-1)
        same = ids == segments[:, ::r, None]
        x = jnp.where(jnp.repeat(same, width, axis=-1)[None], x, jnp.zeros((), x.dtype))

    w = kernel.reshape(K, width, groups, out).transpose(2, 0, 1, 3)
    w = jnp.pad(w, ((0, 0), (r - 1, blocks * r - K), (0, 0), (0, 0)))
    # Column block q of the Toeplitz matrix is the kernel shifted down by q frames.
    w = jnp.stack([w[:, r - 1 - q : r - 1 - q + blocks * r] for q in range(r)], axis=3)
    w = w.reshape(groups, blocks * r * width, r * out)
    y = jnp.einsum("gbnk,gko->gbno", x, w)
    return y.reshape(groups, B, rows * r, out)[:, :, :T].transpose(1, 2, 0, 3).reshape(B, T, D)


class ConvPositions(nn.Module):
    """Relative positions by a wide grouped convolution (wav2vec 2.0, section 2): [B, T, D], [B] or [B, T] -> [B, T, D].

    Weight-normalised with one gain a kernel tap, not a channel; the gains start at the norms, so the first
    kernel is its own direction.  The caller zeroes padded frames first.  Segments of packed rows (`lengths`: see
    layers.py) start at multiples of `FRAMES_PER_ROW` frames.
    """

    kernel: int = 128
    groups: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        K, D = self.kernel, x.shape[-1]
        std = math.sqrt(4 / (K * D))
        v = self.param("direction", nn.initializers.normal(std), (K, D // self.groups, D))
        squared_norm = jnp.sum(v * v, axis=(1, 2), keepdims=True)
        gain = self.param("gain", lambda _: jnp.sqrt(squared_norm))
        bias = self.param("bias", nn.initializers.zeros, (D,))
        kernel = v * (gain * lax.rsqrt(jnp.maximum(squared_norm, 1e-24)))
        segments = lengths if lengths.ndim == 2 else None
        y = grouped_conv(x, kernel.astype(self.dtype), self.groups, segments=segments)
        return gelu(y + bias.astype(self.dtype)[None, None])

"""Positions that are added to the input of a stack of blocks.  Shapes: B batch, T frames, D width, K kernel, G groups.

Those that act inside attention are in relative.py; a config may have both, either or none.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speechjax.errors import UserError
from speechjax.models.layers import LayerNorm, fan_in_uniform, frame_positions, gelu, zero_padding
from speechjax.models.recall import kept, recall, streams

FRAMES_PER_ROW = 4  # of `grouped_conv`; segments of packed rows start at multiples of it


def grouped_conv(
    x: jax.Array,
    kernel: jax.Array,
    groups: int,
    frames_per_row: int = FRAMES_PER_ROW,
    segments: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """'Same' grouped convolution as one batched matrix product: [B, T, D], [K, D/G, D] -> [B, T, D].

    `frames_per_row` neighbouring frames become one row, multiplied by a banded Toeplitz matrix that holds the
    kernel once for each of them: 3 % more FLOPs at four, but wide products.  XLA's own grouped convolution has a
    weight gradient 18 times slower on CPU and gathers the whole batch on every device when the batch is sharded.
    Even kernels see one frame more of the past, as the published code (which drops the last frame); with `causal`
    kernels see the frame itself and K - 1 of its past.

    With segment ids `segments` [B, T] no segment sees another.  Each must start at a multiple of `frames_per_row`:
    then one row has one segment, and hiding the frames of others from its window is exact.
    """
    B, T, D = x.shape
    K, width, _ = kernel.shape
    r, out = frames_per_row, D // groups
    rows = -(-T // r)
    blocks = -(-(K - 1 + r) // r)
    left = K - 1 if causal else K // 2
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
    """Relative positions by wide grouped convolutions: [B, T, D], [B] or [B, T] -> [B, T, D].

    With `depth` 1, one weight-normalised convolution and GELU (wav2vec 2.0, section 2): one gain a kernel tap, not a
    channel; the gains start at the norms, so the first kernel is its own direction.  With more, data2vec's stack
    (arXiv 2202.03555, section 4; the published code): `depth` times convolution of width `kernel`, layer norm without
    gain or bias, GELU.  With `leaky` padding enters this stack, as in fairseq and transformers: for comparisons.

    The caller zeroes padded frames first.  Segments of packed rows (`lengths`: see layers.py) start at multiples of
    `FRAMES_PER_ROW` frames.
    """

    kernel: int = 128
    groups: int = 16
    depth: int = 1
    leaky: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, causal: bool = False) -> jax.Array:
        if x.shape[-1] % self.groups:
            raise UserError(f"config.model.positions.groups={self.groups}: config.model.width is no multiple of it")
        if streams(self) and not causal:
            raise UserError(
                "config.model.positions.name='conv' looks ahead, and a stream cannot: set config.model.attention.chunk"
            )
        segments = lengths if lengths.ndim == 2 else None

        def conv(x, kernel, bias, name="past"):
            x, past = recall(self, name, x, self.kernel - 1)
            y = grouped_conv(x, kernel.astype(self.dtype), self.groups, segments=segments, causal=causal)[:, past:]
            return y + bias.astype(self.dtype)[None, None]

        K, D = self.kernel, x.shape[-1]
        shape = (K, D // self.groups, D)
        if self.depth == 1:
            v = self.param("direction", nn.initializers.normal(math.sqrt(4 / (K * D))), shape)
            squared_norm = jnp.sum(v * v, axis=(1, 2), keepdims=True)
            gain = self.param("gain", lambda _: jnp.sqrt(squared_norm))
            bias = self.param("bias", nn.initializers.zeros, (D,))
            return gelu(conv(x, v * (gain * lax.rsqrt(jnp.maximum(squared_norm, 1e-24))), bias))
        init = fan_in_uniform(K * D // self.groups)
        for i in range(self.depth):
            # A padded frame becomes the bias, normalised, in the first convolution: the second would let it in.
            x = x if self.leaky else zero_padding(x, lengths)
            kernel, bias = self.param(f"conv{i}_kernel", init, shape), self.param(f"conv{i}_bias", init, (D,))
            y = conv(x, kernel, bias, f"past{i}")
            x = gelu(LayerNorm(out_dtype=self.dtype, use_bias=False, use_scale=False, name=f"norm{i}")(y))
        return x


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines of the frame's number within its utterance (Vaswani et al. 2017, section 3.5)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, causal: bool = False) -> jax.Array:
        B, T, D = x.shape
        number = frame_positions(lengths, T)
        if (seen := kept(self, "seen", lambda: jnp.zeros(B, jnp.int32))) is not None:
            number, seen.value = seen.value[:, None] + number, seen.value + T
        encoded = sinusoids(number, D)
        return jnp.broadcast_to(encoded.astype(self.dtype), x.shape)


class NoPositions(nn.Module):
    """Nothing is added."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, causal: bool = False) -> jax.Array:
        return jnp.zeros_like(x)


POSITIONS = {"conv": ConvPositions, "sinusoidal": SinusoidalPositions, "none": NoPositions}


def angles(positions: jax.Array, count: int) -> jax.Array:
    """Positions times `count` frequencies from 1 down to nearly 1/10000: int32 [...] -> float32 [..., count]."""
    frequencies = jnp.asarray(10000.0 ** -(np.arange(count) / count), jnp.float32)
    return positions.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * positions.ndim + (count,))


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """Sines, then cosines: int32 [...] -> float32 [..., D]; `width` D is even."""
    if width % 2:
        raise UserError(f"config.model.width={width}: sinusoidal positions need an even width")
    angle = angles(positions, width // 2)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

"""Decoders that make waveforms, or more frames, out of frames.

Shapes: B batch, T frames, S samples, K kernel, C channels in, O out.  `lengths` is int32 [B].
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.models.layers import fan_in_uniform, gelu, zero_padding


def transposed_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Every frame times a kernel of K outputs, laid down `stride` apart and added: [B, T, C], [K, C, O] -> [B, S, O].

    S = (T - 1) stride + K; K is at least the stride.  One matrix product and a few shifted sums: XLA's own transposed
    convolution multiplies the zeros between the frames too.
    """
    B, T, C = x.shape
    K, _, out = kernel.shape
    blocks = -(-K // stride)
    kernel = jnp.pad(kernel, ((0, blocks * stride - K), (0, 0), (0, 0)))
    pieces = x @ kernel.transpose(1, 0, 2).reshape(C, blocks * stride * out)
    pieces = pieces.reshape(B, T, blocks, stride * out)
    y = sum(jnp.pad(pieces[:, :, i], ((0, 0), (i, blocks - 1 - i), (0, 0))) for i in range(blocks))
    return jnp.asarray(y).reshape(B, (T - 1 + blocks) * stride, out)[:, : (T - 1) * stride + K]


def transposed_len(lengths: Any, kernel: int, stride: int) -> Any:
    """Outputs that `lengths` frames reach: an int32 array."""
    return jnp.where(lengths > 0, (lengths - 1) * stride + kernel, 0)


class TransposedConv(nn.Module):
    """`transposed_conv` with a bias; frames of the padding enter as zeros: [B, T, C], [B] -> [B, S, O], [B]."""

    out: int
    kernel: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = zero_padding(x, lengths).astype(self.dtype)
        # An output is the sum of about K / stride frames: so its variance is that of the input, halved by the GELU.
        terms = self.kernel * x.shape[-1] / self.stride
        kernel = self.param(
            "kernel", nn.initializers.normal((2 / terms) ** 0.5), (self.kernel, x.shape[-1], self.out)
        )  # fmt: skip
        bias = self.param("bias", nn.initializers.zeros, (self.out,))
        y = transposed_conv(x, kernel.astype(self.dtype), self.stride) + bias.astype(self.dtype)[None, None]
        return y, transposed_len(lengths, self.kernel, self.stride)


class WaveformDecoder(nn.Module):
    """The convolutions of a waveform front end in reverse, GELU between: [B, T, C], [B] -> float32 [B, S], [B].

    `channels`, `kernels` and `strides` are the front end's.  Of t frames it makes as many samples as t frames are made
    of; beyond them there are zeros.
    """

    channels: Sequence[int]
    kernels: Sequence[int]
    strides: Sequence[int]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        for i in reversed(range(len(self.kernels))):
            out = self.channels[i - 1] if i else 1
            conv = TransposedConv(out, self.kernels[i], self.strides[i], self.dtype, name=f"conv{i}")
            x, lengths = conv(x, lengths)
            x = gelu(x) if i else x
        return zero_padding(x.astype(jnp.float32), lengths)[..., 0], lengths


class FrameDecoder(nn.Module):
    """`factor` times as many frames: [B, T, C], [B] -> float32 [B, factor T, out], zero beyond `factor` lengths.

    A linear layer, a transposed convolution of four outputs a frame for every doubling, a linear layer; GELU between.
    """

    factor: int
    width: int
    out: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        init = fan_in_uniform(x.shape[-1])
        x = gelu(nn.Dense(self.width, dtype=self.dtype, kernel_init=init, bias_init=init, name="in")(x))
        for i in range(self.factor.bit_length() - 1):
            y, _ = TransposedConv(self.width, 4, 2, self.dtype, name=f"conv{i}")(x, lengths)
            # Its frames reach one further on either side; what lies between is twice as many.
            x, lengths = gelu(y[:, 1:-1]), 2 * lengths
        init = fan_in_uniform(self.width)
        x = nn.Dense(self.out, kernel_init=init, bias_init=init, dtype=jnp.float32, name="out")(x.astype(jnp.float32))
        return zero_padding(x, lengths)

"""Front ends: waveform in, frames out.  Shapes: B batch, S samples, T frames, C channels, K kernel, G segments."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.errors import UserError
from speechjax.models.layers import (
    LayerNorm,
    at_segments,
    fan_in_uniform,
    frame_mask,
    gelu,
    segment_ids,
    zero_padding,
)

# wav2vec 2.0 section 4.2: seven layers, 320 samples (20 ms) a frame, receptive field 400 samples.
KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)

kernel_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def as_float(audio: jax.Array) -> jax.Array:
    """PCM travels to the device as int16 and becomes float32 in [-1, 1) here."""
    return audio.astype(jnp.float32) / 32768 if audio.dtype == jnp.int16 else audio


def conv_out_len(samples: Any, kernels: Sequence[int], strides: Sequence[int]) -> Any:
    """Frames a stack of unpadded convolutions makes of `samples` (int or int32 array); never below zero."""
    for kernel, stride in zip(kernels, strides, strict=True):
        samples = (samples - kernel) // stride + 1
    return max(samples, 0) if isinstance(samples, int) else jnp.maximum(samples, 0)


def windows(x: jax.Array, kernel: int, stride: int) -> jax.Array:
    """All windows an unpadded convolution sees: [B, S, C] -> [B, T, kernel * C].

    Stride-sized blocks, then a few shifted views side by side: no gather, so it is cheap on every backend.
    """
    B, S, C = x.shape
    T = (S - kernel) // stride + 1
    views = -(-kernel // stride)
    needed = (T - 1 + views) * stride
    x = jnp.pad(x, ((0, 0), (0, max(0, needed - S)), (0, 0)))[:, :needed]
    blocks = x.reshape(B, T - 1 + views, stride * C)
    widths = [min(stride, kernel - i * stride) * C for i in range(views)]
    return jnp.concatenate([blocks[:, i : i + T, :w] for i, w in enumerate(widths)], axis=-1)


def strided_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Unpadded 1-D convolution, [B, S, C] with [K, C, O] -> [B, T, O].

    Kernel 2 at stride 2 is a reshape and one matrix product, never slower than the native convolution; for
    longer kernels the native one in channels-last layout wins.
    """
    K, C, out = kernel.shape
    if K == stride:
        return windows(x, K, stride) @ kernel.reshape(K * C, out)
    return _conv(x, kernel, stride)


def _native_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The native convolution; on CPUs matrix products make the gradient of its weights, up to 1.4 times faster."""
    return _native_conv(x, kernel, stride)


def _conv_bwd(stride, saved, g):
    x, kernel = saved

    def native(x, g):
        return jax.linear_transpose(lambda kernel: _native_conv(x, kernel, stride), kernel)(g)[0]

    def products(x, g):
        (B, S, C), (K, _, out), T = x.shape, kernel.shape, g.shape[1]
        rows = g.reshape(B * T, out)
        parts = []
        for first in range(0, K, stride):  # as in `windows`, and no window is ever put together
            taps = min(stride, K - first)
            view = jnp.pad(x, ((0, 0), (0, max(0, first + T * stride - S)), (0, 0)))[:, first : first + T * stride]
            view = view.reshape(B * T, stride * C)[:, : taps * C]
            parts.append((rows.T @ view).T.reshape(taps, C, out))
        return jnp.concatenate(parts)

    dx = jax.linear_transpose(lambda x: _native_conv(x, kernel, stride), x)(g)[0]
    return dx, lax.platform_dependent(x, g, cpu=products, default=native)


_conv.defvjp(lambda x, kernel, stride: (_conv(x, kernel, stride), (x, kernel)), _conv_bwd)


class GroupNormConv(nn.Module):
    """First convolution, per-channel norm over time, GELU: [B, S, 1], valid frames [B] -> [B, T, C].

    The convolution is linear in the K samples of its window, so mean and variance of every channel over time
    follow from the windows' mean and K x K covariance, and the norm folds into per-utterance weights: exact, and
    the largest activation of the network is written once.  Only valid frames enter the statistics, so padding
    does not leak (without padding this is the published group norm).
    """

    channels: int
    kernel: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        K, C = self.kernel, self.channels
        w_KxC = self.param("kernel", kernel_init, (K, 1, C))[:, 0]
        scale = self.param("scale", nn.initializers.ones, (C,))
        offset = self.param("bias", nn.initializers.zeros, (C,))
        # float32 island: the covariance of near-silent windows vanishes in bfloat16.
        with jax.default_matmul_precision("float32"):
            w_BxTxK = windows(x, K, self.stride)
            valid = frame_mask(lengths, w_BxTxK.shape[1])[..., None]
            count = jnp.maximum(lengths, 1).astype(jnp.float32)
            mean_BxK = jnp.sum(jnp.where(valid, w_BxTxK, 0), axis=1) / count[:, None]
            centred = jnp.where(valid, w_BxTxK - mean_BxK[:, None], 0)
            cov_BxKxK = jnp.einsum("btk,btl->bkl", centred, centred) / count[:, None, None]
            var_BxC = jnp.einsum("kc,bkl,lc->bc", w_KxC, cov_BxKxK, w_KxC)
            folded_BxKxC = w_KxC[None] * (scale[None] * lax.rsqrt(var_BxC + 1e-5))[:, None]
            shift_BxC = offset[None] - jnp.einsum("bk,bkc->bc", mean_BxK, folded_BxKxC)
        y = jnp.einsum("btk,bkc->btc", w_BxTxK.astype(self.dtype), folded_BxKxC.astype(self.dtype))
        return gelu(y + shift_BxC[:, None].astype(self.dtype))


class WaveformExtractor(nn.Module):
    """The convolutional feature encoder of wav2vec 2.0 (section 2): [B, S], [B] -> [B, T, C], [B].

    `norm="group"` normalises the first layer over time (Base); `"layer"` normalises every layer over channels
    (Large).  With `leaky` the norm over time has the padding in its statistics, as fairseq's and transformers' have:
    what a row becomes then depends on the rows it is with; for comparisons with those.

    `normalize` gives each waveform zero mean and unit variance first, from `statistics` (mean and standard deviation of
    the whole recording, [B] each) where given, else from the valid samples of the row.

    Packed rows come with `starts`, the first samples of their segments, multiples of the hop; starts, `lengths` and
    `statistics` are then [B, G] (length 0: no such segment) and the second output is segment ids [B, T] (`lengths`:
    see layers.py).  A segment has the frames it would have alone; frames that reach past its end belong to none.
    Raises UserError for packed rows with `norm="group"`.
    """

    channels: Sequence[int] = (512,) * 7
    kernels: Sequence[int] = KERNELS
    strides: Sequence[int] = STRIDES
    norm: str = "group"
    bias: bool = False
    normalize: bool = False
    leaky: bool = False
    dtype: Any = jnp.float32

    def out_len(self, samples: Any) -> Any:
        """Frames made of `samples`: 16000 -> 49, 250000 -> 781."""
        return conv_out_len(samples, self.kernels, self.strides)

    def frame_len(self) -> tuple[int, int]:
        """(hop, receptive field - hop) in samples: (320, 80) as published."""
        hop = math.prod(self.strides)
        field = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            field = (field - 1) * stride + kernel
        return hop, field - hop

    def packs(self) -> bool:
        """Whether rows may hold several utterances: not with statistics over time, which would mix them."""
        return self.norm != "group"

    def tokens(self) -> int:
        """Tokens at one time."""
        return 1

    @nn.compact
    def __call__(
        self,
        audio: jax.Array,
        lengths: jax.Array,
        statistics: tuple[jax.Array, jax.Array] | None = None,
        starts: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        if self.norm not in ("group", "layer"):
            raise UserError(f"config.model.frontend.norm={self.norm!r}: expected 'group' or 'layer'")
        if starts is not None and not self.packs():
            raise UserError(
                f"config.model.frontend.norm={self.norm!r} normalises over time and would mix the utterances of a "
                "packed row: use 'layer', or batches of one utterance a row"
            )
        hop, _ = self.frame_len()
        x = as_float(audio)
        if self.normalize and starts is None:
            x = _normalize(x, lengths, statistics)
        elif self.normalize:
            x = _normalize_segments(x, starts, lengths, statistics, hop)
        x = x[..., None]
        layers = list(zip(self.channels, self.kernels, self.strides, strict=True))
        for i, (channels, K, stride) in enumerate(layers):
            if i == 0 and self.norm == "group":
                whole = jnp.full_like(lengths, x.shape[1])
                valid = conv_out_len(whole if self.leaky else lengths, (K,), (stride,))
                x = GroupNormConv(channels, K, stride, self.dtype, name="conv0")(x, valid)
                continue
            kernel = self.param(f"conv{i}_kernel", kernel_init, (K, x.shape[-1], channels))
            x = strided_conv(x.astype(self.dtype), kernel.astype(self.dtype), stride)
            if self.bias:
                bias = self.param(f"conv{i}_bias", fan_in_uniform(K * kernel.shape[1]), (channels,))
                x = x + bias.astype(self.dtype)[None, None]
            if self.norm == "layer":
                x = LayerNorm(out_dtype=self.dtype, name=f"norm{i}")(x)
            x = gelu(x)
        lengths = self.out_len(lengths)
        if starts is not None:
            lengths = segment_ids(starts // hop, lengths, x.shape[1])
        return zero_padding(x, lengths), lengths


def _normalize(x, lengths, statistics):
    if statistics is None:
        valid = frame_mask(lengths, x.shape[1])
        count = jnp.maximum(lengths, 1).astype(jnp.float32)
        mean = jnp.sum(jnp.where(valid, x, 0), axis=1) / count
        std = jnp.sqrt(jnp.sum(jnp.where(valid, x - mean[:, None], 0) ** 2, axis=1) / count)
    else:
        mean, std = statistics
    return (x - mean[:, None]) * lax.rsqrt(std**2 + 1e-7)[:, None]


def _normalize_segments(x, starts, lengths, statistics, hop):
    """`_normalize` for packed rows: float32 [B, S], int32 [B, G] x 2, ([B, G], [B, G]) or None -> [B, S].

    Segments start at multiples of `hop`, so N blocks of `hop` samples have one segment each, and statistics are
    looked up by block: a gather of every sample would be slow on accelerators.
    """
    (B, S), G = x.shape, starts.shape[1]
    N = -(-S // hop)
    x = jnp.pad(x, ((0, 0), (0, N * hop - S))).reshape(B, N, hop)
    ids = segment_ids(starts // hop, -(-lengths // hop), N)
    at_blocks = lambda values: at_segments(values, ids)[..., None]  # noqa: E731
    if statistics is None:
        time = jnp.arange(N * hop, dtype=jnp.int32).reshape(1, N, hop)
        valid = (ids > 0)[..., None] & (time < at_blocks(starts + lengths))
        own_BxNxG = ids[..., None] == jnp.arange(1, G + 1, dtype=jnp.int32)[None, None]
        count = jnp.maximum(lengths, 1).astype(jnp.float32)

        def average(values):
            totals = jnp.sum(jnp.where(valid, values, 0), axis=2, keepdims=True)
            return jnp.sum(jnp.where(own_BxNxG, totals, 0), axis=1) / count

        mean = average(x)
        std = jnp.sqrt(average((x - at_blocks(mean)) ** 2))
    else:
        mean, std = statistics
    x = (x - at_blocks(mean)) * at_blocks(lax.rsqrt(std**2 + 1e-7))
    return x.reshape(B, N * hop)[:, :S]

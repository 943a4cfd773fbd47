"""Conformer layers (Gulati et al. 2020).  Shapes: B batch, T frames, D width, K kernel.

`lengths` is int32 [B], or [B, T] for packed rows: see layers.py.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.errors import UserError
from speechjax.models.attention import SelfAttention
from speechjax.models.batch_norm import BatchNorm
from speechjax.models.block import Block
from speechjax.models.layers import LayerNorm, fan_in_uniform, frame_mask, gelu, shard_batch, zero_padding
from speechjax.models.recall import recall
from speechjax.models.relative import AttentionOptions

ACTIVATIONS = {"swish": nn.swish, "gelu": gelu}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, left: int, segments: jax.Array | None = None) -> jax.Array:
    """One kernel a channel, as many frames out as in: [B, T, D], [K, D] -> [B, T, D].

    Output t sees inputs t - left to t - left + K - 1, zeros outside the row; with segment ids [B, T] only those of
    its own segment.  Sums run in float32 whatever the compute dtype.

    A sum of K shifted products, which XLA makes one loop: 2.4 ms of CPU where its own grouped convolution takes 60
    (B 4, T 800, D 256, K 31).  With the backward pass written out below, 12 ms where that takes 190 and autodiff of
    the shifted products 69.
    """
    K, T = len(kernel), x.shape[1]
    ends = (left, K - 1 - left)
    padded = jnp.pad(x, ((0, 0), ends, (0, 0)))
    total = jnp.zeros(x.shape, jnp.float32)
    for k in range(K):
        tap = padded[:, k : k + T].astype(jnp.float32) * kernel[k].astype(jnp.float32)[None, None]
        if segments is not None:
            same = jnp.pad(segments, ((0, 0), ends))[:, k : k + T] == segments
            tap = jnp.where(same[..., None], tap, 0.0)
        total = total + tap
    return total.astype(x.dtype)


def _depthwise_fwd(x, kernel, left, segments):
    return depthwise_conv(x, kernel, left, segments), (x, kernel, segments)


def _depthwise_bwd(left, saved, g):
    x, kernel, segments = saved
    K, T = len(kernel), x.shape[1]
    ends = (left, K - 1 - left)
    dx = depthwise_conv(g, kernel[::-1], K - 1 - left, segments)
    padded = jnp.pad(x, ((0, 0), ends, (0, 0)))
    ids = None if segments is None else jnp.pad(segments, ((0, 0), ends))

    def tap(k):
        products = lax.dynamic_slice_in_dim(padded, k, T, 1).astype(jnp.float32) * g.astype(jnp.float32)
        if ids is not None:
            same = lax.dynamic_slice_in_dim(ids, k, T, 1) == segments
            products = jnp.where(same[..., None], products, 0.0)
        return jnp.sum(products, axis=1)

    # Rows are summed outside the loop: where the batch is sharded, one all-reduce instead of K.
    dkernel = jnp.sum(lax.map(tap, jnp.arange(K)), axis=1)
    return dx, dkernel.astype(kernel.dtype), None


depthwise_conv.defvjp(_depthwise_fwd, _depthwise_bwd)


class MaskedGroupNorm(nn.Module):
    """Group norm over time and the channels of a group, valid frames only: [B, T, D], [B] -> [B, T, D]."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        B, T, D = x.shape
        if D % self.groups:
            raise UserError(
                f"config.model.width={D} does not divide into the {self.groups} groups of conv_norm='group'"
            )
        scale = self.param("scale", nn.initializers.ones, (D,))
        offset = self.param("bias", nn.initializers.zeros, (D,))
        y = x.astype(jnp.float32).reshape(B, T, self.groups, D // self.groups)
        valid = frame_mask(lengths, T)[..., None, None]
        count = jnp.maximum(lengths, 1).astype(jnp.float32)[:, None, None, None] * (D // self.groups)
        mean = jnp.sum(jnp.where(valid, y, 0), axis=(1, 3), keepdims=True) / count
        variance = jnp.sum(jnp.where(valid, y - mean, 0) ** 2, axis=(1, 3), keepdims=True) / count
        y = ((y - mean) * lax.rsqrt(variance + 1e-5)).reshape(B, T, D)
        return (y * scale[None, None] + offset[None, None]).astype(self.dtype)


class ConvModule(nn.Module):
    """Pointwise, GLU, depthwise, norm, activation, pointwise: [B, T, D], [B] or [B, T] -> [B, T, D].

    Published with batch norm ("batch"), whose statistics mix utterances.  `norm="layer"` normalises each
    frame; "group" over the valid frames of a row, so neither packed rows nor `causal`, which raise UserError.
    Without `bias` none of the three products has one.  With `leaky` padding enters the convolution, as in
    transformers' wav2vec 2.0 conformers: for comparisons.
    """

    kernel: int
    norm: str
    causal: bool
    bias: bool = True
    activation: str = "swish"
    leaky: bool = False
    groups: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, train: bool) -> jax.Array:
        D, K = x.shape[-1], self.kernel
        if self.norm not in ("layer", "group", "batch"):
            raise UserError(f"config.model.block.conv_norm={self.norm!r}: expected 'layer', 'group' or 'batch'")
        if self.norm == "group" and (self.causal or lengths.ndim == 2):
            cause = "look ahead" if self.causal else "mix the utterances of a packed row"
            raise UserError(f"config.model.block.conv_norm='group' runs over time and would {cause}: use 'layer'")
        init = nn.initializers.normal(0.02)
        dense: Any = partial(nn.Dense, use_bias=self.bias, dtype=self.dtype, kernel_init=init)
        x = nn.glu(dense(2 * D, name="pointwise_in")(x))
        kernel = self.param("depthwise_kernel", fan_in_uniform(K), (K, D))
        segments = lengths if lengths.ndim == 2 else None
        left = K - 1 if self.causal else K // 2
        # What stands in padding was zero before the layers, not after their biases and norms.
        x, past = recall(self, "past", x if self.leaky else zero_padding(x, lengths), left)
        y: Any = depthwise_conv(x, kernel.astype(self.dtype), left, segments)
        x = y[:, past:]
        if self.bias:
            x = x + self.param("depthwise_bias", nn.initializers.zeros, (D,)).astype(self.dtype)[None, None]
        if self.norm == "batch":
            x = BatchNorm(self.dtype, name="norm")(x, frame_mask(lengths, x.shape[1]), train)
        elif self.norm == "group":
            x = MaskedGroupNorm(self.groups, self.dtype, name="norm")(x, lengths)
        else:
            x = LayerNorm(out_dtype=self.dtype, name="norm")(x)
        return dense(D, name="pointwise_out")(ACTIVATIONS[self.activation](x))


class ConformerLayer(Block):
    """Half a feed-forward step, attention, convolution, half a step, norm: [B, T, D], [B] or [B, T] -> two [B, T, D].

    Gulati et al. 2020, section 2.4, with dropout as there.  The second output is the last feed-forward branch before
    it is halved, dropped out and added.  Every branch normalises its own input, so `norm` must be "pre", or "none":
    then no norm follows the last layer (w2v-BERT 2.0).  Raises UserError for "post" and unknown names.
    Where `attention` has chunks, and with `causal_conv`, the convolution sees no later frame.  `conv_bias` and `leaky`
    are those of `ConvModule`; `activation` "swish", or "gelu", is that of all branches.
    """

    kernel: int = 31
    conv_norm: str = "layer"
    conv_bias: bool = True
    causal_conv: bool = False
    activation: str = "swish"
    leaky: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, lengths: jax.Array, train: bool, bias: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        if self.norm not in ("pre", "none"):
            raise UserError(f"config.model.norm={self.norm!r}: conformer layers normalise their inputs: set 'pre'")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"config.model.block.activation={self.activation!r}: choose from {', '.join(ACTIVATIONS)}")
        drop = nn.Dropout(self.dropout, deterministic=not train)
        norm = lambda name: LayerNorm(out_dtype=self.dtype, name=name)  # noqa: E731
        attend = SelfAttention(
            self.heads, self.attention_dropout, self.dtype, self.attention, self.head_width, name="attention"
        )
        causal = self.causal_conv or AttentionOptions(**self.attention).causal
        conv = ConvModule(
            self.kernel, self.conv_norm, causal, self.conv_bias, self.activation, self.leaky, dtype=self.dtype,
            name="conv",
        )  # fmt: skip
        y = shard_batch(x)
        y = y + 0.5 * drop(self._mlp(norm("mlp1_norm")(y), train, "mlp1"))
        y = y + drop(attend(norm("attention_norm")(y), lengths, train=train, bias=bias))
        y = y + drop(conv(norm("conv_norm")(y), lengths, train))
        mlp = self._mlp(norm("mlp2_norm")(y), train, "mlp2")
        y = norm("norm")(y + 0.5 * drop(mlp))
        return self.unless_dropped(y, x, train), mlp

    def _mlp(self, x, train, name):
        init = nn.initializers.normal(0.02)
        up = nn.Dense(self.mlp, dtype=self.dtype, kernel_init=init, name=f"{name}_up")
        hidden = ACTIVATIONS[self.activation](up(x))
        hidden = nn.Dropout(self.activation_dropout, deterministic=not train)(hidden)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, name=f"{name}_down")(hidden)

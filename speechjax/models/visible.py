"""A transformer over the frames that are not masked, as if the others had been cut out (data2vec 2, arXiv 2212.07525).

Shapes: R rows (utterances times masks), T frames, K kept frames, D width, H heads.  `lengths` is int32 [R].
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speechjax.errors import UserError
from speechjax.models.layers import LayerNorm, fan_in_uniform, frame_mask, gelu, zero_padding
from speechjax.models.masking import masked_slots
from speechjax.models.positions import POSITIONS
from speechjax.models.relative import AttentionOptions, SharedBias
from speechjax.models.transformer import Transformer, TransformerLayer


def block_mask(key: jax.Array, lengths: jax.Array, frames: int, *, prob: float, span: int, adjust: float) -> jax.Array:
    """Which frames are masked: int32 [R] -> bool [R, T], exactly floor(prob * t) of the t frames of each utterance.

    Spans around floor((prob + adjust) * t / span) frames, drawn with replacement, are masked first; single frames,
    drawn from all masked or all others, then bring their number to the mark (the published code).
    """
    centre_key, rank_key = jax.random.split(key)
    spans = np.array([int(t * ((prob + adjust) / span)) for t in range(frames + 1)], np.int32)
    wanted = masked_counts(frames, prob)
    t = lengths[:, None]
    u = jax.random.uniform(centre_key, (len(lengths), max(1, int(spans[-1]))))
    centre = jnp.floor(u * t.astype(jnp.float32)).astype(jnp.int32)[:, :, None]
    drawn = jnp.arange(u.shape[1])[None] < jnp.asarray(spans)[lengths][:, None]
    time = jnp.arange(frames, dtype=jnp.int32)
    first = centre - span // 2
    inside = (time[None, None] >= first) & (time[None, None] < first + span) & drawn[:, :, None]
    inside = jnp.any(inside, axis=1) & (time[None] < t)

    # Masked frames before others, others before padding, at random within each; the first ones it is.
    noise = jax.random.uniform(rank_key, inside.shape) - inside.astype(jnp.float32)
    order = jnp.argsort(jnp.where(time[None] < t, noise, 2.0), axis=1)
    return jnp.argsort(order, axis=1) < jnp.asarray(wanted)[lengths][:, None]


def masked_counts(frames: int, prob: float) -> np.ndarray:
    """Frames that `block_mask` masks in an utterance of 0 to T frames: int32 [T + 1]."""
    return np.array([int(prob * t) for t in range(frames + 1)], np.int32)


def attend_visible(
    transformer: Transformer, x: jax.Array, lengths: jax.Array, mask: jax.Array, slots: int, keys: dict[str, jax.Array]
) -> jax.Array:
    """A bound transformer's output for the frames that are not masked, zero elsewhere: [R, T, D] -> [R, T, D].

    `slots` K is the most frames a row keeps.  `keys` are those of dropout and layer drop; without any it is not
    training.  The convolutions that encode positions see all frames, the masked ones as zeros; the layers see only
    the frames kept, at the distances they have in the utterance.  Raises UserError for blocks other than transformer
    layers, and for attention other than "none" and "alibi" over the whole utterance.
    """
    options, block = AttentionOptions(**transformer.attention), transformer.block["name"]
    if block != "transformer" or options.positions not in ("none", "alibi") or options.chunk:
        raise UserError(
            f"config.model has block {block!r} and attention {dict(transformer.attention)}: encoding only the visible "
            "frames needs block.name=transformer, attention.positions=alibi or none, and no attention.chunk"
        )
    params, train = transformer.variables["params"], bool(keys)
    visible = frame_mask(lengths, x.shape[1]) & ~mask
    x = jnp.where(visible[..., None], x, jnp.zeros((), x.dtype))
    conv = {"name": "conv"} | dict(transformer.positions)
    positions: Any = POSITIONS[conv.pop("name")](dtype=transformer.dtype, parent=None, **conv)
    x = x + positions.apply({"params": params.get("positions", {})}, x, lengths)

    kept, valid = masked_slots(visible, slots)
    counts = jnp.sum(valid, axis=1)
    x = zero_padding(jnp.take_along_axis(x, kept[..., None], axis=1), counts)
    norm: Any = LayerNorm(out_dtype=transformer.dtype, parent=None)
    if transformer.norm == "post":
        x = norm.apply({"params": params["norm"]}, x)
    if train:
        drop: Any = nn.Dropout(transformer.dropout, deterministic=False, parent=None)
        x = drop.apply({}, x, rngs={"dropout": jax.random.fold_in(keys["dropout"], transformer.layers)})
    x = _layers(transformer, params, x, counts, _distance_bias(transformer, params, options, kept), keys)
    if transformer.norm == "pre":
        x = norm.apply({"params": params["norm"]}, x)
    back = jnp.maximum(jnp.cumsum(visible.astype(jnp.int32), axis=1) - 1, 0)
    return jnp.where(visible[..., None], jnp.take_along_axis(x, back[..., None], axis=1), jnp.zeros((), x.dtype))


def _distance_bias(transformer, params, options, kept):
    """ALiBi between the frames kept: int32 [R, K] -> float32 [R, H, K, K]."""
    if options.positions == "none":
        return None
    shared: Any = SharedBias(transformer.heads, options, parent=None)
    slope_H = shared.apply({"params": params["attention_bias"]}, 2)[:, 0, 1]  # linear: distance 1 says it all
    distance = jnp.abs(kept[:, None, :, None] - kept[:, None, None, :]).astype(jnp.float32)
    return slope_H[None, :, None, None] * distance


def _layers(transformer, params, x, counts, bias, keys):
    layer: Any = TransformerLayer(
        heads=transformer.heads, head_width=transformer.head_width, mlp=transformer.mlp, norm=transformer.norm,
        dropout=transformer.dropout, attention_dropout=transformer.attention_dropout,
        activation_dropout=transformer.activation_dropout, layerdrop=transformer.layerdrop, dtype=transformer.dtype,
        attention=transformer.attention, parent=None,
    )  # fmt: skip

    def run(x, number, own):
        rngs = {name: jax.random.fold_in(key, number) for name, key in keys.items()}
        return layer.apply({"params": own}, x, counts, bool(keys), bias, rngs=rngs)[0]

    run = jax.checkpoint(run, prevent_cse=not transformer.scan) if transformer.remat else run
    numbers = jnp.arange(transformer.layers)
    if transformer.scan:
        return jax.lax.scan(lambda x, one: (run(x, *one), None), x, (numbers, params["layers"]))[0]
    for i in range(transformer.layers):
        x = run(x, numbers[i], params[f"layer{i}"])
    return x


class ConvDecoder(nn.Module):
    """Grouped convolutions, each with layer norm (no gain, no bias), GELU and a residual, then a projection back.

    [R, T, D] -> float32 [R, T, D] (section 3.1; the published code, where the first layer has no residual since its
    width changes).  Padding is zero before every convolution.  `depth` layers of `width` channels, odd `kernel`.
    """

    depth: int
    width: int
    kernel: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        out = x.shape[-1]
        if out % self.groups or self.width % self.groups or self.kernel % 2 == 0:
            raise UserError(
                f"config.task: decoder_groups={self.groups} must divide decoder_width={self.width} and "
                f"config.model.width={out}; decoder_kernel={self.kernel} must be odd"
            )
        for i in range(self.depth):
            x = zero_padding(x, lengths)
            y = gelu(
                LayerNorm(out_dtype=self.dtype, use_bias=False, use_scale=False, name=f"norm{i}")(self._conv(i, x))
            )
            x = x + y if x.shape == y.shape else y
        init = fan_in_uniform(self.width)
        return nn.Dense(out, kernel_init=init, bias_init=init, dtype=jnp.float32, name="out")(x.astype(jnp.float32))

    def _conv(self, i, x):
        R, T, C = x.shape
        K, G = self.kernel, self.groups
        init = fan_in_uniform(K * C // G)
        kernel = self.param(f"conv{i}_kernel", init, (G, K * C // G, self.width // G)).astype(self.dtype)
        bias = self.param(f"conv{i}_bias", init, (self.width,)).astype(self.dtype)
        x = jnp.pad(x, ((0, 0), (K // 2, K // 2), (0, 0))).reshape(R, T + K - 1, G, C // G)
        taps = jnp.concatenate([x[:, k : k + T] for k in range(K)], axis=-1)  # one product, not XLA's grouped kernels
        return jnp.einsum("rtgc,gco->rtgo", taps, kernel).reshape(R, T, self.width) + bias[None, None]

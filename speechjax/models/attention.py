"""One attention function for every model.  Shapes: B batch, T frames, S keys, H heads, E head width, D width."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speechjax.errors import UserError
from speechjax.models.attention_kernels import fused
from speechjax.models.layers import frame_mask, frame_positions
from speechjax.models.positions import sinusoids
from speechjax.models.recall import recall, streams
from speechjax.models.relative import AttentionOptions, relative_shift, rotate


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    bias: jax.Array | None = None,
    prefix: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    chunk: int = 0,
    left: int = -1,
    dropout: nn.Dropout | None = None,
    deterministic: bool = True,
    impl: str = "xla",
) -> jax.Array:
    """Scaled dot-product attention over the valid keys: [B, T, H, E], [B, S, H, E] x 2 -> [B, T, H, E].

    `lengths`, int32 [B] or [B, S], says which keys are valid; the queries are at the places of the last T of them.
    Keys of another segment of a packed row are not valid (`lengths`: see layers.py), nor those of a later chunk of
    `chunk` frames, or more than `left` chunks earlier (see `AttentionOptions`; chunks start with the utterance).
    `bias` float32, broadcast to [B, H, T, S], is added to the scaled products.  A frame without any valid key attends
    evenly and stays finite.

    `prefix` are P keys and values [P, H, E] that every frame sees, whatever limits the others, and the queries
    [B, T, H, E] they meet: `q` without position.

    `impl` says what computes it (see `AttentionOptions`): the kernels leave other numbers in padding, finite too.
    """
    drops = dropout is not None and not deterministic
    y = fused(
        impl, q, k, v, lengths=lengths, bias=bias, prefix=prefix is not None, chunk=chunk, left=left, dropout=drops
    )
    if y is not None:
        return y
    # Softmax in float32 whatever the compute dtype.  Float16 would overflow before it, which WavLM's code prevents by
    # scaling the products down and up again; bfloat16 has the range of float32.
    # Heads before frames: CPUs multiply [T, E] matrices that lie in one piece 1.9 times faster.
    T, S = q.shape[1], k.shape[1]
    q_BxHxTxE, k_BxHxSxE, v_BxHxSxE = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    logits_BxHxTxS = jnp.einsum("bhte,bhse->bhts", q_BxHxTxE, k_BxHxSxE).astype(jnp.float32)
    if bias is not None:
        logits_BxHxTxS = logits_BxHxTxS + bias
    valid = frame_mask(lengths, S)[:, None, None, :]
    if lengths.ndim == 2:
        valid = valid & (lengths[:, None, S - T :, None] == lengths[:, None, None, :])
    if chunk:
        number = frame_positions(lengths, S) // chunk
        behind = number[:, None, S - T :, None] - number[:, None, None, :]
        valid = valid & (behind >= 0) & (True if left < 0 else behind <= left)
    logits_BxHxTxS = jnp.where(valid, logits_BxHxTxS, jnp.finfo(jnp.float32).min)
    if prefix is not None:
        always = jnp.einsum("bthe,phe->bhtp", prefix[0] * q.shape[-1] ** -0.5, prefix[1]).astype(jnp.float32)
        logits_BxHxTxS = jnp.concatenate([logits_BxHxTxS, always], axis=-1)
    weights = jax.nn.softmax(logits_BxHxTxS).astype(v.dtype)
    if dropout is not None:
        weights = dropout(weights, deterministic=deterministic)
    y = jnp.swapaxes(jnp.einsum("bhts,bhse->bhte", weights[..., :S], v_BxHxSxE), 1, 2)
    return y if prefix is None else y + jnp.einsum("bhtp,phe->bthe", weights[..., S:], prefix[2])


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017): [B, T, D], [B] or [B, T] -> [B, T, D].

    `options` are those of `AttentionOptions`; `bias` float32 [H, T, T] is what `SharedBias` makes for them, or
    [B, H, T, T] where rows differ.  `prefix`, keys and values [P, H, E], is seen by all frames and has no position.
    In a stream keys and values of the chunks to the left are recalled.

    A head is D / heads wide, or `head_width` where that is not 0, as after heads were pruned.  Raises UserError for a
    `head_width` where positions or gates are of the input, split over the heads.
    """

    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    options: Mapping[str, Any] = field(default_factory=dict)
    head_width: int = 0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array,
        *,
        train: bool,
        bias: jax.Array | None = None,
        prefix: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        B, T, D = x.shape
        options = AttentionOptions(**self.options)
        E = _width_of_head(self, D, options)
        init = nn.initializers.normal(0.02)

        def project(name, width):
            return nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)

        by_head = lambda x: x.reshape(B, T, self.heads, E)  # noqa: E731
        turned = rotate(by_head(x)).reshape(B, T, D) if options.positions == "rotary_inputs" else x
        if options.positions == "rotary_inputs" and streams(self):
            raise UserError("config.model.attention.positions='rotary_inputs' cannot be streamed: use 'rotary'")
        inputs = dict(query=turned, key=turned, value=x)
        q, k, v = (by_head(project(name, self.heads * E)(y)) for name, y in inputs.items())
        bias = bias[None] if bias is not None and bias.ndim == 3 else bias
        content = q
        if streams(self):
            # Without positions: a key's depends on the step that looks back at it.
            k, _ = recall(self, "keys", k, options.past)
            v, _ = recall(self, "values", v, options.past)
            lengths, _ = recall(self, "ids", frame_mask(lengths, T).astype(jnp.int32), options.past)
        S = k.shape[1]
        if options.positions == "rotary":
            q, k = rotate(q, S - T), rotate(k)
        if options.positions == "relative":
            q, bias = self._by_distance(q, S, D)
            content = q
        if options.positions == "shaw":
            bias = self._by_clipped_distance(q, S, options)
        if options.gated:
            bias = bias * self._gate(x)
        dropout = nn.Dropout(self.dropout) if self.dropout else None
        y = attention(
            q, k, v, lengths=lengths, bias=bias, prefix=prefix and (content, *prefix), chunk=options.chunk,
            left=options.left, dropout=dropout, deterministic=not train, impl=options.impl,
        )  # fmt: skip
        return project("out", D)(y.reshape(B, T, self.heads * E))

    def _by_distance(self, q, S, D):
        """Queries for the content of keys, and the products of those for their distance: terms (a, c) and (b, d)."""
        _, T, H, E = q.shape
        zeros = nn.initializers.zeros
        content = self.param("content_bias", zeros, (H, E)).astype(q.dtype)[None, None]
        distance = self.param("distance_bias", zeros, (H, E)).astype(q.dtype)[None, None]
        # From S - 1 frames after the key down to T - 1 before it.
        encoded = sinusoids(jnp.arange(S - 1, -T, -1, dtype=jnp.int32), D).astype(self.dtype)
        init = nn.initializers.normal(0.02)
        keys = nn.Dense(H * E, use_bias=False, dtype=self.dtype, kernel_init=init, name="distance")(encoded)
        scores = jnp.einsum("bthe,jhe->bhtj", (q + distance) * E**-0.5, keys.reshape(S + T - 1, H, E))
        return q + content, relative_shift(scores).astype(jnp.float32)

    def _by_clipped_distance(self, q, S, options):
        """Products of queries [B, T, H, E] with the vectors of their keys' distances: float32 [B, H, T, S]."""
        T, E = q.shape[1], q.shape[3]
        before, after = options.before, options.after
        table = self.param("distance_table", nn.initializers.normal(0.02), (before + after + 1, E))
        # From S - 1 frames before the query to T - 1 after it.
        row = np.clip(np.arange(1 - S, T), -before, after) + before
        scores = jnp.einsum("bthe,je->bhtj", q * E**-0.5, table.astype(q.dtype)[row])
        return relative_shift(scores).astype(jnp.float32)

    def _gate(self, x):
        """WavLM's gate of the bias, 1.75 at first: [B, T, D] -> float32 [B, H, T, 1].

        The paper gates by the queries; its code and weights have the layer's input, split over the heads.  Eight
        outputs summed by four are two, but learn at four times the rate, as published.
        """
        B, T, D = x.shape
        x = x.reshape(B, T, self.heads, D // self.heads)
        scores = nn.Dense(8, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name="gate")(x)
        scores = jnp.sum(scores.astype(jnp.float32).reshape(B, T, self.heads, 2, 4), axis=-1)
        update, reset = jnp.moveaxis(jax.nn.sigmoid(scores), -1, 0)
        scale = self.param("gate_scale", nn.initializers.ones, (self.heads,))[None, None]
        return (update * (reset * scale - 1) + 2).transpose(0, 2, 1)[..., None]


def _width_of_head(module: SelfAttention, width: int, options: AttentionOptions) -> int:
    """Not a method: what methods of modules return may be captured as intermediates."""
    if not module.head_width:
        if width % module.heads:
            raise UserError(f"config.model.width={width} is no multiple of config.model.heads={module.heads}")
        return width // module.heads
    if options.gated or options.positions == "rotary_inputs":
        what = "gated=True" if options.gated else "positions='rotary_inputs'"
        raise UserError(
            f"config.model.head_width={module.head_width}: config.model.attention.{what} splits the input over the "
            "heads: set head_width=0"
        )
    return module.head_width

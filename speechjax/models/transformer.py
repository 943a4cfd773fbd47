"""The stack of blocks between positions and output: transformer layers, conformer layers or others of `BLOCKS`.

Shapes: B batch, T frames, D width, H heads.  `lengths` is int32 [B], or [B, T] for packed rows: see layers.py.

A block is built with the arguments that all share (those of `TransformerLayer`) and its own options, and called as
`layer(x, lengths, train, bias)` -> (y, output of its feed-forward branch before the residual sum), both [B, T, D].
`bias` is the attention bias that all layers share, float32 [H, T, T] or None; it and `attention` go to
`SelfAttention`.  Where `attention` limits the context, a block may use no later frame in any other way either.  What a
block has of earlier frames it recalls in a stream (see recall.py).
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax

from speechjax.errors import UserError
from speechjax.models.attention import SelfAttention
from speechjax.models.block import Block
from speechjax.models.conformer import ConformerLayer
from speechjax.models.deep_speech import DeepSpeechLayer, DeepSpeechTop
from speechjax.models.layers import LayerNorm, gelu, shard_batch, zero_padding
from speechjax.models.positions import POSITIONS
from speechjax.models.recall import STREAM
from speechjax.models.recurrent import BLSTMLayer, GRULayer
from speechjax.models.relative import AttentionOptions, SharedBias


class TransformerLayer(Block):
    """One layer; `norm` "post" (Base) or "pre" (Large): [B, T, D], [B] or [B, T] -> two [B, T, D].

    The second is the feed-forward branch as it enters the residual sum, before its dropout: what data2vec regresses
    on.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, lengths: jax.Array, train: bool, bias: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attend = SelfAttention(
            self.heads, self.attention_dropout, self.dtype, self.attention, self.head_width, name="attention"
        )
        if self.norm == "none":
            raise UserError("config.model.norm='none' is for recurrent blocks; transformer layers need 'post' or 'pre'")
        norm1 = LayerNorm(out_dtype=self.dtype, name="attention_norm")
        norm2 = LayerNorm(out_dtype=self.dtype, name="mlp_norm")
        y = shard_batch(x)
        if self.norm == "pre":
            y = y + drop(attend(norm1(y), lengths, train=train, bias=bias))
            mlp = self._mlp(norm2(y), train)
            y = y + drop(mlp)
        else:
            y = norm1(y + drop(attend(y, lengths, train=train, bias=bias)))
            mlp = self._mlp(y, train)
            y = norm2(y + drop(mlp))
        return self.unless_dropped(y, x, train), mlp

    def _mlp(self, x, train):
        init = nn.initializers.normal(0.02)
        hidden = gelu(nn.Dense(self.mlp, dtype=self.dtype, kernel_init=init, name="mlp_up")(x))
        hidden = nn.Dropout(self.activation_dropout, deterministic=not train)(hidden)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, name="mlp_down")(hidden)


BLOCKS = {
    "transformer": TransformerLayer,
    "conformer": ConformerLayer,
    "gru": GRULayer,
    "blstm": BLSTMLayer,
    "deep_speech": DeepSpeechLayer,
}
# What stands once above the last block, of the same options: `top(x, lengths, train)` -> x.
TOPS = {"deep_speech": DeepSpeechTop}
# What the program gives every block; the rest are options of its own.
SHARED = (
    "heads", "head_width", "mlp", "norm", "dropout", "attention_dropout", "activation_dropout", "layerdrop",
    "attention", "dtype",
)  # fmt: skip


class Transformer(nn.Module):
    """Positions, then `layers` blocks: [B, T, D], [B] or [B, T] -> ([B, T, D], hidden states).

    `norm="post"` normalises after the positions, "pre" after the last layer, "none" neither.  Hidden states: with
    `hidden=True` the input of the first layer and the output of each, L + 1; with "pre" the last one is not yet
    normalised, nor has it passed what stands above the layers (`TOPS`).  With `hidden="mlp"` the feed-forward output
    of each layer before the residual sum, L.  Else an empty list.  `scan` stacks the layers' parameters and compiles
    one layer; `remat` recomputes a layer's activations in the backward pass.
    """

    layers: int
    heads: int
    mlp: int
    norm: str
    positions: Mapping[str, Any]
    dropout: float
    attention_dropout: float
    activation_dropout: float
    layerdrop: float
    scan: bool
    remat: bool
    dtype: Any
    block: Mapping[str, Any] = field(default_factory=lambda: {"name": "transformer"})
    attention: Mapping[str, Any] = field(default_factory=dict)
    head_width: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, lengths: jax.Array, *, train: bool, hidden: bool | str = False
    ) -> tuple[jax.Array, list[jax.Array]]:
        if self.norm not in ("post", "pre", "none"):
            raise UserError(f"config.model.norm={self.norm!r}: expected 'post' or 'pre', or 'none' (recurrent blocks)")
        context = AttentionOptions(**self.attention)
        options = {"name": "conv"} | dict(self.positions)
        positions = POSITIONS[options.pop("name")](dtype=self.dtype, name="positions", **options)
        bias = SharedBias(self.heads, context, name="attention_bias")(x.shape[1])
        x = zero_padding(x, lengths)
        x = x + positions(x, lengths, context.causal)
        if self.norm == "post":
            x = LayerNorm(out_dtype=self.dtype, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x, states = self._stack(x, lengths, bias, train, hidden)
        if self.block["name"] in TOPS:
            x = TOPS[self.block["name"]](**_block_options(self), name="top")(x, lengths, train)
        if self.norm == "pre":
            x = LayerNorm(out_dtype=self.dtype, name="norm")(x)
        return zero_padding(x, lengths), [zero_padding(s, lengths) for s in states]

    def _stack(self, x, lengths, bias, train, hidden):
        layer_class: Any = BLOCKS[self.block["name"]]
        if self.remat:
            # Scan already keeps XLA from merging the recomputation with the original.
            layer_class = nn.remat(layer_class, static_argnums=(3,), prevent_cse=not self.scan)
        options = _block_options(self)
        states = [x] if hidden is True else []

        def body(layer, x, _):
            y, mlp = layer(x, lengths, train, bias)
            return y, (mlp if hidden == "mlp" else y if hidden else None)

        if self.scan:
            stack = nn.scan(
                body,
                variable_axes={"params": 0, "batch_stats": 0, "sums": 0, STREAM: 1},
                split_rngs={"params": True, "dropout": True, "layerdrop": True},
                length=self.layers,
            )
            out: Any = stack(layer_class(**options, name="layers"), x, None)
            x, kept = out
        else:
            kept = []
            for i in range(self.layers):
                x, state = body(layer_class(**options, name=f"layer{i}"), x, None)
                kept.append(state)
        return x, [*states, *kept] if hidden else []


def _block_options(stack: Transformer) -> dict[str, Any]:
    """Not a method: what methods of modules return may be captured as intermediates, and names are no arrays."""
    return {k: v for k, v in stack.block.items() if k != "name"} | {k: getattr(stack, k) for k in SHARED}

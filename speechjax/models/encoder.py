"""The speech encoder: front end, projection, transformer.

Shapes: B batch, S samples, T frames, C channels, D width, G segments.  `lengths` is int32 [B], or [B, T] for packed
rows: see layers.py.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.attention import SelfAttention
from speechjax.models.frontend import WaveformExtractor
from speechjax.models.layers import LayerNorm, fan_in_uniform, gelu, shard_batch, zero_padding
from speechjax.models.positions import FRAMES_PER_ROW, ConvPositions

FRONTENDS = {"waveform": WaveformExtractor}


class TransformerLayer(nn.Module):
    """One layer; `norm` "post" (Base) or "pre" (Large): [B, T, D], [B] or [B, T] -> [B, T, D]."""

    heads: int
    mlp: int
    norm: str
    dropout: float
    attention_dropout: float
    activation_dropout: float
    layerdrop: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, train: bool) -> jax.Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attend = SelfAttention(self.heads, self.attention_dropout, self.dtype, name="attention")
        norm1 = LayerNorm(out_dtype=self.dtype, name="attention_norm")
        norm2 = LayerNorm(out_dtype=self.dtype, name="mlp_norm")
        y = shard_batch(x)
        if self.norm == "pre":
            y = y + drop(attend(norm1(y), lengths, train=train))
            y = y + drop(self._mlp(norm2(y), train))
        else:
            y = norm1(y + drop(attend(y, lengths, train=train)))
            y = norm2(y + drop(self._mlp(y, train)))
        if train and self.layerdrop:
            # One draw for the whole global batch, so every device drops the same layers.  The layer is computed
            # and discarded: branching would save 5 % of the work and cost a second program.
            keep = jax.random.bernoulli(self.make_rng("layerdrop"), 1 - self.layerdrop)
            y = jnp.where(keep, y, x)
        return y

    def _mlp(self, x, train):
        init = nn.initializers.normal(0.02)
        hidden = gelu(nn.Dense(self.mlp, dtype=self.dtype, kernel_init=init, name="mlp_up")(x))
        hidden = nn.Dropout(self.activation_dropout, deterministic=not train)(hidden)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, name="mlp_down")(hidden)


class Transformer(nn.Module):
    """Convolutional positions, then `layers` layers: [B, T, D], [B] or [B, T] -> ([B, T, D], hidden states).

    `norm="post"` normalises after the positions, "pre" after the last layer.  Hidden states (asked for with
    `hidden=True`, else an empty list) are the input of the first layer and the output of each; with "pre" the
    last one is not yet normalised.  `scan` stacks the layers' parameters and compiles one layer; `remat`
    recomputes a layer's activations in the backward pass.
    """

    layers: int
    heads: int
    mlp: int
    norm: str
    positions: dict[str, Any]
    dropout: float
    attention_dropout: float
    activation_dropout: float
    layerdrop: float
    scan: bool
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, lengths: jax.Array, *, train: bool, hidden: bool = False
    ) -> tuple[jax.Array, list[jax.Array]]:
        if self.norm not in ("post", "pre"):
            raise UserError(f"config.model.norm={self.norm!r}: expected 'post' or 'pre'")
        x = zero_padding(x, lengths)
        x = x + ConvPositions(dtype=self.dtype, name="positions", **self.positions)(x, lengths)
        if self.norm == "post":
            x = LayerNorm(out_dtype=self.dtype, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x, states = self._stack(x, lengths, train, hidden)
        if self.norm == "pre":
            x = LayerNorm(out_dtype=self.dtype, name="norm")(x)
        return zero_padding(x, lengths), [zero_padding(s, lengths) for s in states]

    def _stack(self, x, lengths, train, hidden):
        layer_class = TransformerLayer
        if self.remat:
            # Scan already keeps XLA from merging the recomputation with the original.
            layer_class = nn.remat(TransformerLayer, static_argnums=(3,), prevent_cse=not self.scan)
        options: dict[str, Any] = dict(
            heads=self.heads, mlp=self.mlp, norm=self.norm, dropout=self.dropout, dtype=self.dtype,
            attention_dropout=self.attention_dropout, activation_dropout=self.activation_dropout,
            layerdrop=self.layerdrop,
        )  # fmt: skip
        if not self.scan:
            states = [x]
            for i in range(self.layers):
                states.append(layer_class(**options, name=f"layer{i}")(states[-1], lengths, train))
            return states[-1], states if hidden else []

        def body(layer, carry, _):
            y = layer(carry, lengths, train)
            return y, (y if hidden else None)

        stack = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True, "layerdrop": True},
            length=self.layers,
        )
        last, states = stack(layer_class(**options, name="layers"), x, None)
        return last, [x, *states] if states is not None else []


class Encoded(NamedTuple):
    """`frames` [B, T, D], `lengths` [B] (packed rows: [B, T]), and on demand every hidden state [B, T, D]."""

    frames: jax.Array
    lengths: jax.Array
    hidden: list[jax.Array]


class SpeechEncoder(nn.Module):
    """Front end, layer norm, projection to `width`, transformer.  The model block of a config is its arguments.

    `__call__` goes from batch to `Encoded`.  Pretraining tasks use the halves: `extract` (batch to features) and
    `contextualize` (features, perhaps masked, to `Encoded`).

    A batch is {audio int16 or float [B, S], lengths int32 [B]} and perhaps {mean, std [B]} of the recordings.  In a
    packed batch a row holds up to G utterances: {starts, lengths int32 [B, G], mean, std [B, G]}.  Segment g is the
    lengths[g] samples from starts[g], a multiple of `segment_align()`; segments are in order and do not overlap,
    those that do not exist come last and have length 0, and what is between them does not matter.
    """

    frontend: dict[str, Any]
    width: int
    layers: int
    heads: int
    mlp: int
    norm: str
    positions: dict[str, Any]
    dropout: float
    attention_dropout: float
    activation_dropout: float
    input_dropout: float
    layerdrop: float
    scan: bool
    remat: bool
    dtype: str

    def setup(self):
        options = dict(self.frontend)
        name = options.pop("name")
        dtype = jnp.dtype(self.dtype)
        self.front = FRONTENDS[name](**options, dtype=dtype)
        self.feature_norm = LayerNorm(out_dtype=dtype)
        features = self.front.channels[-1]
        init = fan_in_uniform(features)
        self.projection = nn.Dense(self.width, dtype=dtype, kernel_init=init, bias_init=init)
        self.input_drop = nn.Dropout(self.input_dropout)
        self.mask_embedding = self.param("mask_embedding", nn.initializers.uniform(1.0), (self.width,))
        self.transformer = Transformer(
            layers=self.layers, heads=self.heads, mlp=self.mlp, norm=self.norm, positions=dict(self.positions),
            dropout=self.dropout, attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout, layerdrop=self.layerdrop, scan=self.scan,
            remat=self.remat, dtype=dtype,
        )  # fmt: skip

    def frame_len(self) -> tuple[int, int]:
        """(samples from one frame to the next, samples the first frame takes beyond that)."""
        return self._detached_front().frame_len()

    def packs(self) -> bool:
        """Whether the front end can tell the utterances of a packed row apart."""
        return self._detached_front().packs()

    def segment_align(self) -> int:
        """Samples of which the start of every segment of a packed row is a multiple."""
        hop, _ = self.frame_len()
        return hop * FRAMES_PER_ROW

    def _detached_front(self):
        front = dict(self.frontend)
        return FRONTENDS[front.pop("name")](**front, parent=None)

    def extract(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Features of the front end before any norm: batch -> ([B, T, C], [B] or [B, T]).

        Raises UserError for packed rows where not `packs()`.  Rows with a misaligned segment become NaN: a compiled
        program cannot raise, and the loop stops on NaN.
        """
        statistics = (batch["mean"], batch["std"]) if "mean" in batch else None
        starts = batch.get("starts")
        features, lengths = self.front(batch["audio"], batch["lengths"], statistics, starts)
        if starts is not None:
            aligned = jnp.all((starts % self.segment_align() == 0) | (batch["lengths"] == 0), axis=1)
            features = jnp.where(aligned[:, None, None], features, jnp.nan)
        return shard_batch(features), lengths

    def contextualize(
        self,
        features: jax.Array,
        lengths: jax.Array,
        *,
        mask: jax.Array | None = None,
        train: bool,
        hidden: bool = False,
    ) -> Encoded:
        """Normalised features [B, T, C], masked where `mask` [B, T] is true, through the transformer."""
        x = self.input_drop(self.projection(features), deterministic=not train)
        if mask is not None:
            x = jnp.where(mask[..., None], self.mask_embedding.astype(x.dtype)[None, None], x)
        frames, states = self.transformer(x, lengths, train=train, hidden=hidden)
        return Encoded(frames, lengths, states)

    def __call__(self, batch: dict[str, jax.Array], *, train: bool = False, hidden: bool = False) -> Encoded:
        features, lengths = self.extract(batch)
        return self.contextualize(self.feature_norm(features), lengths, train=train, hidden=hidden)

"""Transformer decoder: the next token from those before it, and from the frames of an encoder where it hears one.

Shapes: B batch, K hypotheses of a row, U tokens, M most tokens, T frames, H heads, E head width, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.attention import attention
from speechjax.models.layers import LayerNorm, shard_batch, zero_padding
from speechjax.models.positions import sinusoids


class Memory(NamedTuple):
    """What a decoder hears: keys and values of `lengths` int32 [B] frames, [B, T, H, E] for every layer."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array


class Cache(NamedTuple):
    """What hypotheses have read: `position` int32 [B, K] tokens, keys and values [B, K, M, H, E] for every layer."""

    position: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class MultiHead(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) whose keys and values are made apart, to be kept."""

    width: int
    heads: int
    dropout: float
    dtype: Any

    def setup(self):
        init = nn.initializers.normal(0.02)
        make = lambda: nn.Dense(self.width, dtype=self.dtype, kernel_init=init)  # noqa: E731
        self.query, self.key, self.value, self.out = make(), make(), make(), make()
        self.drop = nn.Dropout(self.dropout)

    def read(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values: [..., D] -> [..., H, E] each."""
        return self._split(self.key(x)), self._split(self.value(x))

    def _split(self, x):
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def __call__(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array, *, chunk: int = 0, train: bool
    ) -> jax.Array:
        """Queries [B, U, D] to the first `lengths` int32 [B] of [B, S, H, E] -> [B, U, D]; `chunk` 1: none later."""
        drop = self.drop if self.dropout else None
        y = attention(
            self._split(self.query(x)), keys, values, lengths=lengths, chunk=chunk, dropout=drop,
            deterministic=not train,
        )  # fmt: skip
        return self.out(y.reshape(x.shape))


class DecoderLayer(nn.Module):
    """Self-attention, attention to what is heard, two linear maps around a ReLU; `norm` before or after each."""

    width: int
    heads: int
    mlp: int
    norm: str
    dropout: float
    attention_dropout: float
    listens: bool
    dtype: Any

    def setup(self):
        options = (self.width, self.heads, self.attention_dropout, self.dtype)
        init = nn.initializers.normal(0.02)
        self.attention = MultiHead(*options)
        self.attention_norm = LayerNorm(out_dtype=self.dtype)
        if self.listens:
            self.listening = MultiHead(*options)
            self.listening_norm = LayerNorm(out_dtype=self.dtype)
        self.mlp_up = nn.Dense(self.mlp, dtype=self.dtype, kernel_init=init)
        self.mlp_down = nn.Dense(self.width, dtype=self.dtype, kernel_init=init)
        self.mlp_norm = LayerNorm(out_dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def _add(self, x: jax.Array, norm: Callable, branch: Callable, train: bool) -> jax.Array:
        y = self.drop(branch(self._before(norm, x)), deterministic=not train)
        return x + y if self.norm == "pre" else norm(x + y)

    def _before(self, norm: Callable, x: jax.Array) -> jax.Array:
        return norm(x) if self.norm == "pre" else x

    def _rest(self, x: jax.Array, heard: tuple | None, train: bool) -> jax.Array:
        """What follows self-attention: `heard` are keys, values and lengths of the encoder's frames."""
        if heard is not None:
            x = self._add(x, self.listening_norm, lambda y: self.listening(y, *heard, train=train), train)
        mlp = lambda y: self.mlp_down(nn.relu(self.mlp_up(y)))  # noqa: E731
        return self._add(x, self.mlp_norm, mlp, train)

    def __call__(self, x: jax.Array, heard: tuple | None, train: bool) -> jax.Array:
        """Whole sequences, a token seeing itself and those before: [B, U, D] -> [B, U, D]."""
        lengths = jnp.full(x.shape[0], x.shape[1], jnp.int32)

        def attend(y):
            return self.attention(y, *self.attention.read(y), lengths, chunk=1, train=train)

        return self._rest(self._add(x, self.attention_norm, attend, train), heard, train)

    def step(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        position: jax.Array,
        slot: jax.Array,
        heard: tuple | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """One more token of each hypothesis: [B, K, D], kept [B, K, M, H, E] -> [B, K, D], and what is kept now.

        `slot` int32 [B, K] is where its key goes, M to drop it; it sees the first `position` int32 [B, K], and itself.
        """
        B, K, D = x.shape
        at = jnp.arange(B)[:, None], jnp.arange(K)[None], slot
        new = self.attention.read(self._before(self.attention_norm, x))
        keys, values = (kept.at[at].set(y, mode="drop") for kept, y in zip((keys, values), new, strict=True))
        flat = lambda y: y.reshape(B * K, *y.shape[2:])  # noqa: E731

        def attend(y):
            y = self.attention(y.reshape(B * K, 1, D), flat(keys), flat(values), flat(position) + 1, train=False)
            return y.reshape(B, K, D)

        # The hypotheses of a row hear the same frames: to those they are K queries of one sequence, and cost no copies.
        return self._rest(self._add(x, self.attention_norm, attend, False), heard, False), keys, values


class TransformerDecoder(nn.Module):
    """The decoder of Vaswani et al. 2017 (section 3), its token embedding scaled and with sinusoidal positions.

    Token ids are those of speechjax.data.text; a sequence begins with <s>.  `norm` "post" is theirs, "pre" that of
    the Speech-Transformer (Dong et al. 2018) and ESPnet, with a norm after the last layer.  With `tied` the embedding
    is the output layer too (section 3.4), without bias.  Without `listens` it attends to no encoder: a language model.

    `__call__` goes over whole sequences, `step` a token at a time with what `start` begins: equal logits.

    Raises UserError for a `norm` that does not exist and a `width` that is no even multiple of `heads`.
    """

    classes: int
    width: int
    layers: int
    heads: int
    mlp: int
    norm: str
    tied: bool
    dropout: float
    attention_dropout: float
    listens: bool
    dtype: Any

    def setup(self):
        if self.norm not in ("pre", "post"):
            raise UserError(f"config.task.decoder.norm={self.norm!r}: choose pre or post")
        if self.width % self.heads or self.width % 2:
            raise UserError(
                f"config.task.decoder.width={self.width} must be even and a multiple of decoder.heads={self.heads}"
            )
        self.embedding = self.param(
            "embedding", nn.initializers.normal(self.width**-0.5), (self.classes, self.width)
        )  # fmt: skip
        options: dict[str, Any] = dict(
            width=self.width, heads=self.heads, mlp=self.mlp, norm=self.norm, dropout=self.dropout,
            attention_dropout=self.attention_dropout, listens=self.listens, dtype=self.dtype,
        )  # fmt: skip
        self.stack = [DecoderLayer(**options, name=f"layer{i}") for i in range(self.layers)]
        if self.norm == "pre":
            self.out_norm = LayerNorm(out_dtype=self.dtype)
        if not self.tied:
            self.out = nn.Dense(self.classes, dtype=jnp.float32, kernel_init=nn.initializers.normal(0.02))
        self.drop = nn.Dropout(self.dropout)

    def listen(self, frames: jax.Array, lengths: jax.Array) -> Memory:
        """Keys and values of an encoder's frames [B, T, any width], of which `lengths` int32 [B] count."""
        # A row without frames attends evenly to all of them: what is in the padding must not be heard there either.
        frames = zero_padding(frames, lengths).astype(self.dtype)
        keys, values = zip(*(layer.listening.read(frames) for layer in self.stack), strict=True)
        return Memory(keys, values, lengths)

    def __call__(self, tokens: jax.Array, memory: Memory | None, *, train: bool) -> jax.Array:
        """Logits of the token after each: int32 [B, U] -> float32 [B, U, V].  What follows a token does not matter."""
        x = self._embed(shard_batch(tokens), jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], train)
        for number, layer in enumerate(self.stack):
            x = layer(x, self._heard(memory, number), train)
        return self._logits(x)

    def start(self, rows: int, beams: int, tokens: int) -> Cache:
        """Before the first token of [rows, beams] hypotheses of at most `tokens`, <s> among them."""
        empty = jnp.zeros((rows, beams, tokens, self.heads, self.width // self.heads), self.dtype)
        return Cache(jnp.zeros((rows, beams), jnp.int32), (empty,) * self.layers, (empty,) * self.layers)

    def step(self, tokens: jax.Array, cache: Cache, memory: Memory | None) -> tuple[jax.Array, Cache]:
        """Logits after one more token each, int32 [B, K] -> float32 [B, K, V]; where it is negative nothing is kept.

        The logits mean nothing there, nor where more tokens come than `start` made room for.
        """
        reads = tokens >= 0
        room = cache.keys[0].shape[2]
        slot = jnp.where(reads, cache.position, room)
        x = self._embed(tokens, cache.position, train=False)
        kept = []
        for number, layer in enumerate(self.stack):
            keys, values = cache.keys[number], cache.values[number]
            x, *new = layer.step(x, keys, values, cache.position, slot, self._heard(memory, number))
            kept.append(new)
        keys, values = zip(*kept, strict=True)
        return self._logits(x), Cache(cache.position + reads.astype(jnp.int32), keys, values)

    def _embed(self, tokens, positions, train):
        # Clipped, because ids in the padding may be anything, and jax makes those beyond the table NaN.
        x = jnp.take(self.embedding, tokens, axis=0, mode="clip") * math.sqrt(self.width)
        x = x + jnp.broadcast_to(sinusoids(positions, self.width), x.shape)
        return self.drop(x.astype(self.dtype), deterministic=not train)

    def _logits(self, x):
        x = (self.out_norm(x) if self.norm == "pre" else x).astype(jnp.float32)
        return x @ self.embedding.T if self.tied else self.out(x)

    def _heard(self, memory: Memory | None, layer: int) -> tuple | None:
        if (memory is not None) != self.listens:
            raise ValueError("a decoder that listens needs a memory, and a language model has none")
        return None if memory is None else (memory.keys[layer], memory.values[layer], memory.lengths)


def make_decoder(
    block: Mapping[str, Any], *, classes: int, listens: bool, dtype: Any, **module: Any
) -> TransformerDecoder:
    """The decoder that the block config.task.decoder describes; UserError names what it lacks or has too much."""
    given = {"classes", "listens", "dtype", "parent", "name"}
    allowed = {name for name in TransformerDecoder.__dataclass_fields__ if name not in given}
    if wrong := sorted(allowed ^ set(block)):
        raise UserError(f"config.task.decoder: it has {', '.join(sorted(allowed))}; unknown or missing: {wrong}")
    return TransformerDecoder(**block, classes=classes, listens=listens, dtype=jnp.dtype(dtype), **module)

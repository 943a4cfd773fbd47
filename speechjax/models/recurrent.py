"""Recurrent layers.  Shapes: B batch, T frames, D width, H hidden width of a direction, d directions (1 or 2).

`lengths` is int32 [B], or [B, T] for packed rows: see layers.py.  The recurrences themselves (`gru`, `lstm`) take
inputs that are already projected, all frames at once, and begin anew at frames that are `first`.  In a stream `memory`
is the variable that has the state before the first frame, and is left with that after the last (see recall.py).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.errors import UserError
from speechjax.models.block import Block
from speechjax.models.layers import fan_in_uniform, frame_positions, shard_batch, zero_padding
from speechjax.models.recall import kept
from speechjax.models.relative import AttentionOptions


def gru(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    first: jax.Array,
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
    memory: Any = None,
) -> jax.Array:
    """Gated recurrent unit from projected inputs: [B, T, 3 D], [D, 3 D], [D], bool [B, T] -> float32 [B, T, D].

    The three parts of the projections are those of the reset gate r, the update gate z and the candidate n (Cho et
    al. 2014, with r applied after the product, as cuDNN has it):
    n = tanh(inputs_n + r (h kernel_n + bias)), h = (1 - z) n + z h.  Before frames that are `first`, h is zero.
    `activation` replaces tanh.

    State and gates are float32, products in the dtype of `kernel`.  All frames are projected at once outside the
    loop, which makes forward and backward 1.3 times as fast on CPU as a cell that projects its own.
    """
    D = len(kernel)

    def step(h, now):
        x, is_first = now
        h = jnp.where(is_first[:, None], 0.0, h)
        x, y = x.astype(jnp.float32), (h.astype(kernel.dtype) @ kernel).astype(jnp.float32)
        r, z = jnp.split(nn.sigmoid(x[:, : 2 * D] + y[:, : 2 * D]), 2, axis=1)
        n = activation(x[:, 2 * D :] + r * (y[:, 2 * D :] + bias[None]))
        h = (1 - z) * n + z * h
        return h, h

    return _unroll(step, jnp.zeros((inputs.shape[0], D), jnp.float32), inputs, first, memory)


def lstm(inputs: jax.Array, kernel: jax.Array, first: jax.Array, memory: Any = None) -> jax.Array:
    """Long short-term memory from projected inputs: [B, T, 4 H], [H, 4 H], bool [B, T] -> float32 [B, T, H].

    The four parts of the projections are those of input gate i, forget gate f, candidate g and output gate o:
    c = f c + i tanh(g), h = o tanh(c) (Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000).
    No gate sees the cell c: Graves et al. 2013 have such peepholes, cuDNN and PyTorch have not, and Greff et al.
    (arXiv 1503.04069) found nothing lost without.  State and gates are float32, products in the dtype of
    `kernel`.
    """
    H = len(kernel)

    def step(state, now):
        x, is_first = now
        h, c = (jnp.where(is_first[:, None], 0.0, s) for s in state)
        gates = x.astype(jnp.float32) + (h.astype(kernel.dtype) @ kernel).astype(jnp.float32)
        i, f, g, o = jnp.split(gates, 4, axis=1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((inputs.shape[0], H), jnp.float32)
    return _unroll(step, (start, start), inputs, first, memory)


def _unroll(step: Callable, start: Any, inputs: jax.Array, first: jax.Array, memory: Any) -> jax.Array:
    """Outputs of all frames: [B, T, .], bool [B, T] -> [B, T, .]; `step(state, frame)` -> (state, output)."""
    start = start if memory is None else memory.value
    last, states = lax.scan(step, start, (inputs.transpose(1, 0, 2), first.T))
    if memory is not None:
        memory.value = last
    return states.transpose(1, 0, 2)


def first_frames(lengths: jax.Array, frames: int) -> jax.Array:
    """True where an utterance begins: int32 [B] or [B, T] -> bool [B, T]."""
    return jnp.broadcast_to(frame_positions(lengths, frames) == 0, (lengths.shape[0], frames))


def last_frames(lengths: jax.Array, frames: int, chunk: int = 0) -> jax.Array:
    """True where an utterance ends, or a chunk of `chunk` frames (0: none): int32 [B] or [B, T] -> bool [B, T]."""
    position = frame_positions(lengths, frames)
    if lengths.ndim == 1:
        last = position == lengths[:, None] - 1
    else:
        last = lengths != jnp.pad(lengths, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    return last | (position % chunk == chunk - 1) if chunk else last


def both_ways(
    recur: Callable[..., jax.Array],
    inputs: jax.Array,
    kernel: jax.Array,
    lengths: jax.Array,
    chunk: int = 0,
    memory: Any = None,
) -> jax.Array:
    """`recur(inputs, kernel, first)` forwards, and with d = 2 backwards too: [d, B, T, .], [d, H, .] -> [d, B, T, H].

    The backward direction begins at the last valid frame of an utterance, not in the padding behind it; with `chunk`
    anew at the last frame of every chunk, so that no frame sees a later chunk (latency-controlled, Zhang et al. 2016,
    arXiv 1510.08983, here without frames beyond the chunk).  One loop runs both directions.  `memory` is that of the
    forward direction.
    """
    T = inputs.shape[2]
    first, last = first_frames(lengths, T), last_frames(lengths, T, chunk)
    back = lambda x: jnp.flip(x, axis=1)  # noqa: E731
    if memory is not None:
        if len(kernel) == 2 and not chunk:
            raise UserError(
                "config.model.block.bidirectional=True begins at the end of the utterance, and a stream cannot: "
                "set config.model.attention.chunk, or bidirectional=False"
            )
        ahead = recur(inputs[0], kernel[0], jnp.zeros_like(first), memory)
        behind = [back(recur(back(x), k, back(last))) for x, k in zip(inputs[1:], kernel[1:], strict=True)]
        return jnp.stack([ahead, *behind])
    if len(kernel) == 1:
        return recur(inputs[0], kernel[0], first)[None]
    states = jax.vmap(recur)(jnp.stack([inputs[0], back(inputs[1])]), kernel, jnp.stack([first, back(last)]))
    return jnp.stack([states[0], back(states[1])])


class LSTM(nn.Module):
    """One LSTM layer in one or both directions, side by side: [B, T, .], [B] or [B, T] -> [B, T, d H].

    Biases of the forget gates start at 1 (Gers et al. 2000; Jozefowicz et al. 2015), others at 0; there is
    one bias, where cuDNN has two that add up.  `chunk`: see `both_ways`.
    """

    hidden: int
    bidirectional: bool = True
    chunk: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        (B, T, _), H, d = x.shape, self.hidden, 1 + self.bidirectional
        init = fan_in_uniform(H)
        forget_only = lambda key, shape, dtype: (jnp.arange(shape[0]) // H % 4 == 1).astype(dtype)  # noqa: E731
        x = shard_batch(x)
        project = nn.Dense(d * 4 * H, dtype=self.dtype, kernel_init=init, bias_init=forget_only, name="input")
        kernel = self.param("kernel", init, (d, H, 4 * H))
        inputs = project(x).reshape(B, T, d, 4 * H).transpose(2, 0, 1, 3)
        memory = kept(self, "state", lambda: (jnp.zeros((B, H)), jnp.zeros((B, H))))
        states = both_ways(lstm, inputs, kernel.astype(self.dtype), lengths, self.chunk, memory)
        y = states.transpose(1, 2, 0, 3).reshape(B, T, d * H).astype(self.dtype)
        return zero_padding(y, lengths)


class BiLSTM(nn.Module):
    """`layers` bidirectional LSTM layers, each on the outputs of the one before: [B, T, D], [B] -> [B, T, 2 H].

    As a head: two layers of 1024 and a linear map are SUPERB's for recognition (arXiv 2105.01051, section 3; its code
    has a dropout of 0.2 after each).  No residual connections.
    """

    layers: int
    hidden: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, train: bool = False) -> jax.Array:
        for i in range(self.layers):
            x = LSTM(self.hidden, dtype=self.dtype, name=f"layer{i}")(x, lengths)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


class GRULayer(Block):
    """One unidirectional GRU layer and a residual connection: [B, T, D], [B] or [B, T] -> two [B, T, D].

    The layer of autoregressive predictive coding (Chung et al. 2019, section 3.1).  There the first of three layers
    has no residual connection, since its input is narrower; here the encoder projects to the width before it.  The
    second output is that of the GRU before dropout and sum.  A frame sees none after it.  `heads`, `mlp`, `norm`,
    `attention` and the dropouts inside other blocks are the arguments of every block, and not used.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, lengths: jax.Array, train: bool, bias: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        D = x.shape[-1]
        init = fan_in_uniform(D)
        x = shard_batch(x)
        project = nn.Dense(3 * D, dtype=self.dtype, kernel_init=init, bias_init=init, name="input")
        kernel = self.param("kernel", init, (D, 3 * D))
        candidate_bias = self.param("bias", init, (D,))
        memory = kept(self, "state", lambda: jnp.zeros((len(x), D)))
        first = first_frames(lengths, x.shape[1]) & (memory is None)
        states = gru(project(x), kernel.astype(self.dtype), candidate_bias, first, memory=memory)
        states = zero_padding(states.astype(self.dtype), lengths)
        y = zero_padding(x, lengths) + nn.Dropout(self.dropout, deterministic=not train)(states)
        return self.unless_dropped(y, x, train), states


class BLSTMLayer(Block):
    """One LSTM layer, both directions side by side: [B, T, D], [B] or [B, T] -> two [B, T, D].

    The layer of deep bidirectional LSTM for CTC (Graves et al. 2013, arXiv 1303.5778, section 2), with `lstm`'s
    gates.  Each direction has half of the width; with `hidden` it has that, and a linear map leads back to the width.
    `residual` adds the layer's input, which the paper does not.  The second output is that before dropout and sum.

    Where `attention` has chunks the backward direction stays inside them (`both_ways`); `bidirectional=False` is an
    LSTM that sees no later frame at all.  Other arguments of every block are not used.  Raises UserError for an odd
    width that two directions would have to share.
    """

    hidden: int = 0
    bidirectional: bool = True
    residual: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, lengths: jax.Array, train: bool, bias: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        D, d = x.shape[-1], 1 + self.bidirectional
        if not self.hidden and D % d:
            raise UserError(f"config.model.width={D} is odd, and config.model.block gives each direction half of it")
        chunk = AttentionOptions(**self.attention).chunk
        states = LSTM(self.hidden or D // d, self.bidirectional, chunk, self.dtype, name="lstm")(x, lengths)
        if self.hidden:
            init = fan_in_uniform(d * self.hidden)
            states = nn.Dense(D, dtype=self.dtype, kernel_init=init, bias_init=init, name="output")(states)
            states = zero_padding(states, lengths)
        y = nn.Dropout(self.dropout, deterministic=not train)(states)
        if self.residual:
            y = zero_padding(x, lengths) + y
        return self.unless_dropped(y, x, train), states

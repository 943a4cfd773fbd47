"""When the tokens of a known transcript were spoken, by CTC.  Shapes: B batch, T frames, V vocabulary, U tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from speechjax.models.layers import frame_mask

BLANK = 0


class Alignment(NamedTuple):
    """First frame of each token and the one after its last, int32 [B, U] each, -1 where there is no token.

    `scores` float32 [B] is the log-probability of that path; -inf, and no times, where a row has too few frames.
    """

    starts: jax.Array
    ends: jax.Array
    scores: jax.Array


def ctc_align(logits: jax.Array, lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array) -> Alignment:
    """The likeliest path of CTC that says `tokens` int32 [B, U], of which `token_lengths` [B] count, inside jit.

    `logits` [B, T, V] of any scale, `lengths` int32 [B].  Viterbi over the states blank, token, blank, ... of Graves et
    al. 2006 (section 4.1, with the maximum in place of the sum).  The emissions of CTC are peaks: a token's frames are
    where the model says it, not as long as it sounds.
    """
    B, U = tokens.shape
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    states = jnp.zeros((B, 2 * U + 1), jnp.int32).at[:, 1::2].set(tokens)
    # From one token to the next without a blank: not between equal ones.
    skips = jnp.zeros(states.shape, bool).at[:, 3::2].set(tokens[:, 1:] != tokens[:, :-1])

    def before(x: jax.Array, n: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (n, 0)), constant_values=-jnp.inf)[:, : x.shape[1]]

    def read(score, now):
        frame, inside = now
        ways = jnp.stack([score, before(score, 1), jnp.where(skips, before(score, 2), -jnp.inf)])
        # After its end a row stays in its state.
        step = jnp.where(inside[:, None], jnp.argmax(ways, axis=0).astype(jnp.int32), 0)
        new = jnp.max(ways, axis=0) + jnp.take_along_axis(frame, states, axis=1)
        return jnp.where(inside[:, None], new, score), step

    start = jnp.full(states.shape, -jnp.inf).at[:, 0].set(0.0)
    inside = frame_mask(lengths, logits.shape[1])
    score, steps = lax.scan(read, start, (log_probs.transpose(1, 0, 2), inside.T))

    ends = jnp.stack([jnp.maximum(2 * token_lengths - 1, 0), 2 * token_lengths], axis=1)
    finals = jnp.take_along_axis(score, ends, axis=1)
    last = jnp.take_along_axis(ends, jnp.argmax(finals, axis=1)[:, None], axis=1)[:, 0]

    def back(state, step):
        return state - jnp.take_along_axis(step, state[:, None], axis=1)[:, 0], state

    _, path = lax.scan(back, last, steps, reverse=True)
    return _times(path.T, inside, token_lengths, U, jnp.max(finals, axis=1))


def _times(path: jax.Array, inside: jax.Array, token_lengths: jax.Array, tokens: int, scores: jax.Array) -> Alignment:
    """From the state of every frame, int32 [B, T]."""
    B, T = path.shape
    time = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    row = jnp.arange(B, dtype=jnp.int32)[:, None]
    token = jnp.where(inside & (path % 2 == 1), path // 2, tokens)  # blanks and padding outside: dropped
    starts = jnp.full((B, tokens), T, jnp.int32).at[row, token].min(time, mode="drop")
    ends = jnp.zeros((B, tokens), jnp.int32).at[row, token].max(time + 1, mode="drop")
    there = frame_mask(token_lengths, tokens) & (scores > -jnp.inf)[:, None]
    return Alignment(jnp.where(there, starts, -1), jnp.where(there, ends, -1), scores)

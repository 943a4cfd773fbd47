"""What decoders give, and what may steer them.  Shapes: B batch, K beams, N hypotheses, U tokens, V vocabulary."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

SPECIALS = 4  # ids below are no tokens of a transcript: <pad>, which is CTC's blank, <s>, </s>, <unk>


class Hypotheses(NamedTuple):
    """The N best token sequences of every row, best first; rows of fewer have the score -inf at the end.

    `tokens` int32 [B, N, U] of which the first `lengths` int32 [B, N] count, without specials; `scores` float32 [B, N]
    in nats, what the search maximised; `frames` int32 [B, N, U] is the frame of the encoder in which a token was
    emitted, -1 where the decoder does not know.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    frames: jax.Array


def or_unfinished(finished: jax.Array, unfinished: jax.Array) -> jax.Array:
    """float32 [B, N]: the scores `finished`, -inf for hypotheses that may not end; in rows of only such, `unfinished`.

    Speech cut off within a word of a lexicon is such a row: its transcript ends there too, rather than being lost.
    """
    return jnp.where(jnp.any(finished > -jnp.inf, axis=1, keepdims=True), finished, unfinished)


class Scorer(Protocol):
    """Scores the next token of every hypothesis: an n-gram or neural language model, a lexicon, hot words.

    A scorer holds arrays and is used inside jit; its state is a pytree of arrays [B, K, ...], so that a search may
    reorder hypotheses with one gather.  Scores are natural logarithms (or bonuses), float32, -inf for what is
    forbidden.
    """

    def start(self, rows: int, beams: int) -> Any:
        """State before the first token, for [rows, beams] hypotheses."""
        ...

    def scores(self, state: Any) -> jax.Array:
        """float32 [B, K, V]: of every token as the next one; specials (ids below 4) have 0."""
        ...

    def advance(self, state: Any, tokens: jax.Array) -> Any:
        """State after `tokens` int32 [B, K]; where they are negative it stays."""
        ...

    def final(self, state: Any) -> jax.Array:
        """float32 [B, K]: of ending here."""
        ...

"""A reward for every token and every word, against language models that like short transcripts; and no <unk>.

Shapes: B batch, K beams, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp

from speechjax.decode.types import SPECIALS

UNKNOWN = 3


@flax.struct.dataclass
class Bonus:
    """The scorer of the insertion bonus (Hannun et al. 2014, arXiv 1408.2873), to be used with weight 1.

    Each token gains `token` nats and each word `word`, where it begins: with any token that is not `boundary`, at the
    start or after `boundary` (the space of a vocabulary of characters; -1: there is none, a transcript is one word).
    `symbols` is V.  The state is whether a word is open, bool [B, K].
    """

    symbols: int = flax.struct.field(pytree_node=False)
    token: float = flax.struct.field(pytree_node=False)
    word: float = flax.struct.field(pytree_node=False)
    boundary: int = flax.struct.field(pytree_node=False)

    def start(self, rows: int, beams: int) -> jax.Array:
        return jnp.zeros((rows, beams), bool)

    def scores(self, state: jax.Array) -> jax.Array:
        ids = jnp.arange(self.symbols, dtype=jnp.int32)[None, None]
        begins = (ids != self.boundary) & ~state[..., None]
        return jnp.where(ids < SPECIALS, 0.0, self.token + jnp.where(begins, self.word, 0.0))

    def advance(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.where(tokens < 0, state, tokens != self.boundary)

    def final(self, state: jax.Array) -> jax.Array:
        return jnp.zeros(state.shape)


@flax.struct.dataclass
class Known:
    """Forbids <unk>: no other scorer has anything to say of it, so it would be the way around all of them.

    `symbols` is V; there is no state but a place for it, bool [B, K].
    """

    symbols: int = flax.struct.field(pytree_node=False)

    def start(self, rows: int, beams: int) -> jax.Array:
        return jnp.zeros((rows, beams), bool)

    def scores(self, state: jax.Array) -> jax.Array:
        unknown = jnp.arange(self.symbols, dtype=jnp.int32) == UNKNOWN
        return jnp.broadcast_to(jnp.where(unknown, -jnp.inf, 0.0), (*state.shape, self.symbols))

    def advance(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        return state

    def final(self, state: jax.Array) -> jax.Array:
        return jnp.zeros(state.shape)

"""How sure a decoder is, from the scores of its hypotheses.  Shapes: B batch, N hypotheses, U tokens.

Scores are turned into posteriors over the N best alone, so that these confidences know no rival outside the list and
are too high where it is short; one hypothesis always has 1.  They order results; for probabilities calibrate `scale`
on held-out speech (1: as the scores are; language models with weights above 1 want less).
"""

import jax
import jax.numpy as jnp
from jax import lax

from speechjax.decode.types import Hypotheses


def hypothesis_confidence(hypotheses: Hypotheses, scale: float = 1.0) -> jax.Array:
    """Posterior of every hypothesis among the N, float32 [B, N]: softmax of `scale` times the scores; 0 for none."""
    there = hypotheses.scores > -jnp.inf
    scores = jnp.where(there, hypotheses.scores, 0)
    weight = jnp.where(there, jnp.exp(scale * (scores - scores[:, :1])), 0)
    return weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1)


def token_confidence(hypotheses: Hypotheses, scale: float = 1.0) -> jax.Array:
    """Posterior of every token of the best hypothesis, float32 [B, U]; 0 beyond its length.  To be used inside jit.

    The summed posteriors of the hypotheses that have the token in the same place (word posteriors from N-best lists:
    Wessel, Macherey and Ney 1999, "A comparison of word graph and N-best list based confidence measures").  Places are
    those of an alignment with the fewest edits to the best hypothesis, so that decoders without times have them too.
    """
    posteriors = hypothesis_confidence(hypotheses, scale)
    every = jax.vmap(jax.vmap(_agrees, (None, None, 0, 0)))
    best, length = hypotheses.tokens[:, 0], hypotheses.lengths[:, 0]
    agrees = every(best, length, hypotheses.tokens, hypotheses.lengths)
    return jnp.sum(jnp.where(agrees, posteriors[..., None], 0), axis=1)


def _agrees(best: jax.Array, length: jax.Array, other: jax.Array, other_length: jax.Array) -> jax.Array:
    """bool [U]: which tokens of `best` an alignment with the fewest edits leaves unchanged in `other`, int32 [U] each.

    Edits cost 1 each; from the end, the first such alignment of Wagner and Fischer's table (1974).
    """
    U = len(best)
    column = jnp.arange(U + 1, dtype=jnp.int32)

    def read(row, token):
        substituted = row[:-1] + (other != token).astype(jnp.int32)
        found = jnp.concatenate([row[:1] + 1, jnp.minimum(row[1:] + 1, substituted)])
        # An insertion costs 1 from the column before: a running minimum, once the slope is out.
        found = lax.cummin(found - column) + column
        return found, found

    _, rows = lax.scan(read, column, best)
    rows = jnp.concatenate([column[None], rows])

    def back(place, _):
        """One edit from the cell (u, v) of the table towards (0, 0); the token it found unchanged, or U."""
        u, v = place
        above, left = jnp.maximum(u - 1, 0), jnp.maximum(v - 1, 0)
        cost = (other[left] != best[above]).astype(jnp.int32)
        diagonal = (u > 0) & (v > 0) & (rows[above, left] + cost == rows[u, v])
        deleted = (u > 0) & (rows[above, v] + 1 == rows[u, v])
        place = jnp.where(diagonal | deleted, above, u), jnp.where(diagonal | ~deleted, left, v)
        return place, jnp.where(diagonal & (cost == 0), above, U)

    _, found = lax.scan(back, (length, other_length), length=2 * U)
    return jnp.zeros(U, bool).at[found].set(True, mode="drop")

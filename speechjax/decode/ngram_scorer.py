"""An n-gram model in a search: contexts are states, and backing off is a failure.

Shapes: B batch, K beams, V tokens.
"""

import logging
from collections.abc import Sequence
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from speechjax.decode.automaton import DENSE_BYTES, Arcs, Automaton, make_automaton
from speechjax.decode.ngram import BEGIN, END, UNKNOWN, NGram
from speechjax.decode.types import SPECIALS
from speechjax.errors import UserError

log = logging.getLogger("speechjax")


def ngram_arcs(model: NGram) -> Arcs:
    """The model over its own symbols, in nats.

    State 0 is the empty context; the others are all n-grams below the model's order, the n-gram of arc a state a + 1.
    So after symbol i alone, and after <s>, the state is i + 1, or 0 for a model of order 1.
    """
    V = len(model.symbols)
    arcs = np.zeros(0, np.int64)  # source * V + symbol, ascending
    targets, fail = [], np.zeros(1, np.int64)
    offset = 0  # of the states of the order below
    for k, keys in enumerate(model.keys, 1):
        source, symbol = keys // V + offset, keys % V
        # The longest end of the n-gram, itself left out, that is a state.
        shorter = np.zeros(len(keys), np.int64) if k == 1 else _follow(arcs, fail, fail[source], symbol, V)
        offset = len(fail)
        if k < model.order:
            targets.append(offset + np.arange(len(keys)))
            fail = np.concatenate([fail, shorter])
        else:
            targets.append(shorter)
        arcs = np.concatenate([arcs, source * V + symbol])
    nats = np.log(10)
    weight = np.concatenate(model.logp) * nats
    fail_weight = np.concatenate([np.zeros(1), *model.backoff[: model.order - 1]]) * nats
    return Arcs(arcs // V, arcs % V, np.concatenate(targets), weight, fail, fail_weight)


def _follow(arcs: np.ndarray, fail: np.ndarray, state: np.ndarray, symbol: np.ndarray, V: int) -> np.ndarray:
    """States after `symbol` in `state`, among the arcs that lead to a state of their own."""
    while True:
        wanted = state * V + symbol
        at = np.minimum(np.searchsorted(arcs, wanted), len(arcs) - 1)
        hit = arcs[at] == wanted
        if hit.all():
            return at + 1
        state = np.where(hit, state, fail[state])


def start_state(model: NGram) -> int:
    """The state of `ngram_arcs` at the beginning of a text."""
    return BEGIN + 1 if model.order > 1 else 0


@flax.struct.dataclass
class NgramScorer:
    """A `Scorer`: log p of the next token, in nats, and at the end that of </s>.  State: int32 [B, K].

    `symbols` int32 [V] are the model's ids of the tokens; a special one weighs 0 and leaves the state alone.
    """

    automaton: Automaton
    symbols: jax.Array
    begin: int = flax.struct.field(pytree_node=False)

    @classmethod
    def build(cls, model: NGram, tokens: Sequence[str], dense_bytes: int = DENSE_BYTES) -> Self:
        """Of a model over tokens, and the strings of all ids of a vocabulary, the specials' first.

        A token that the model does not know scores as <unk> (logged).  Raises UserError if it knows none.
        """
        symbols = [UNKNOWN] * SPECIALS + [model.id(token) for token in tokens[SPECIALS:]]
        unknown = [token for token, id in zip(tokens, symbols, strict=True) if id == UNKNOWN][SPECIALS:]
        if len(unknown) == len(tokens) - SPECIALS:
            known = ", ".join(map(repr, model.symbols[3:8]))
            raise UserError(
                f"the n-gram model knows none of the vocabulary's tokens: it has {known}, ..., the vocabulary "
                f"{', '.join(map(repr, unknown[:5]))}, ...; train it with the same tokens"
            )
        if unknown:
            log.warning("tokens that the n-gram model does not know, <unk> to it: %s", ", ".join(map(repr, unknown)))
        automaton = make_automaton(ngram_arcs(model), len(model.symbols), dense_bytes)
        return cls(automaton, jnp.asarray(symbols, jnp.int32), start_state(model))

    def start(self, rows: int, beams: int) -> jax.Array:
        return jnp.full((rows, beams), self.begin, jnp.int32)

    def scores(self, state: jax.Array) -> jax.Array:
        found = jnp.take(self.automaton.weights(state), self.symbols, axis=-1)
        return found.at[..., :SPECIALS].set(0.0)

    def advance(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        after = self.automaton.step(state, self.symbols[jnp.maximum(tokens, 0)])[1]
        return jnp.where(tokens < SPECIALS, state, after)

    def final(self, state: jax.Array) -> jax.Array:
        return self.automaton.step(state, jnp.full_like(state, END))[0]

"""Hot words: phrases that a search should rather find than not, such as names of a field or a list of contacts.

Shapes: B batch, K beams, V tokens.
"""

from collections.abc import Sequence
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from speechjax.decode.automaton import DENSE_BYTES, Arcs, Automaton, make_automaton
from speechjax.decode.types import SPECIALS
from speechjax.errors import UserError


@flax.struct.dataclass
class HotWords:
    """A `Scorer`: `bonus` for every token of every phrase that occurs, in the end; until then on trust.

    A token that carries a phrase on earns its bonus at once, so that the beam keeps the phrase while it grows; what is
    not finished gives it back.  The automaton of Aho and Corasick (1975) over tokens, as in icefall's and sherpa's
    context graphs: of several phrases under way the longest has credit, a failure pays back all but what its longest
    end has earned, and a phrase within a phrase counts as well.  Unlike theirs, a finished phrase has its bonus once
    from the start, where theirs has it twice until the next failure.  State: int32 [B, K].

    `boundary` is the token between words (the space of characters; -1: none): with one, phrases are whole words.
    `credit` float32 [S] is what a state has on trust.
    """

    automaton: Automaton
    credit: jax.Array
    boundary: int = flax.struct.field(pytree_node=False)
    begin: int = flax.struct.field(pytree_node=False)
    tokens: int = flax.struct.field(pytree_node=False)

    @classmethod
    def build(
        cls,
        phrases: Sequence[Sequence[int]],
        *,
        bonus: float,
        tokens: int,
        boundary: int = -1,
        dense_bytes: int = DENSE_BYTES,
        names: Sequence[str] = (),
    ) -> Self:
        """Of phrases as ids of a vocabulary of V `tokens`, without specials; those there twice count once.

        Raises UserError for an empty phrase, and one with a special id, such as <unk>, or none of the vocabulary; it is
        named as in `names`, or by its number.
        """
        for number, phrase in enumerate(phrases, 1):
            if not len(phrase) or not all(SPECIALS <= token < tokens for token in phrase):
                fault = "has symbols that the vocabulary lacks" if len(phrase) else "is empty"
                which = repr(names[number - 1]) if names else f"{number} of {len(phrases)}"
                raise UserError(f"hot word {which} {fault}; leave it out, or write it differently")
        edge = () if boundary < 0 else (boundary,)
        arcs, credit = _arcs({(*edge, *phrase, *edge): bonus * len(phrase) for phrase in phrases}, bonus, edge, tokens)
        automaton = make_automaton(arcs, tokens, dense_bytes)
        # A text begins as if a word had just ended; the first arcs are those of state 0 for all tokens.
        begin = int(arcs.target[boundary]) if edge else 0
        return cls(automaton, jnp.asarray(credit, jnp.float32), boundary, begin, tokens)

    def start(self, rows: int, beams: int) -> jax.Array:
        return jnp.full((rows, beams), self.begin, jnp.int32)

    def scores(self, state: jax.Array) -> jax.Array:
        return self.automaton.weights(state).at[..., :SPECIALS].set(0.0)

    def advance(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.where(tokens < SPECIALS, state, self.automaton.step(state, jnp.maximum(tokens, 0))[1])

    def final(self, state: jax.Array) -> jax.Array:
        """Takes back what is on trust; at the end a word ends."""
        if self.boundary < 0:
            return -self.credit[state]
        last, after = self.automaton.step(state, jnp.full_like(state, self.boundary))
        return last - self.credit[after]


def _arcs(
    phrases: dict[tuple[int, ...], float], bonus: float, edge: tuple[int, ...], tokens: int
) -> tuple[Arcs, np.ndarray]:
    """The automaton whose states are all beginnings of phrases, shorter ones first, and every state's credit."""
    states: set[tuple[int, ...]] = {phrase[:n] for phrase in phrases for n in range(len(phrase) + 1)} | {()}
    order = sorted(states, key=lambda beginning: (len(beginning), beginning))
    number = {beginning: s for s, beginning in enumerate(order)}
    followed = {beginning[:-1] for beginning in order if beginning}
    fail = np.zeros(len(order), np.int64)
    credit, earned = np.zeros((2, len(order)))
    for s, beginning in enumerate(order[1:], 1):
        # The longest end of it, itself left out, that is a state.
        fail[s] = next(number[beginning[n:]] for n in range(1, len(beginning) + 1) if beginning[n:] in number)
        own = bonus * max(len(beginning) - len(edge), 0)
        credit[s] = own if beginning in followed else credit[fail[s]]
        earned[s] = phrases.get(beginning, 0.0) + earned[fail[s]]
    arcs = {(0, token): 0 for token in range(tokens)}
    arcs |= {(number[beginning[:-1]], beginning[-1]): number[beginning] for beginning in order[1:]}
    (source, symbol), target = np.array(sorted(arcs)).T, np.array([arcs[arc] for arc in sorted(arcs)])
    weight = credit[target] + earned[target] - credit[source]
    return Arcs(source, symbol, target, weight, fail, credit[fail] - credit), credit

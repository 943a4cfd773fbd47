"""Weighted automata with failure arcs, on device: what n-grams, lexica and hot words are in a search.

A symbol takes the arc that the state has for it.  Where it has none, the automaton pays the state's failure weight,
goes to the state's failure state, and tries again there; state 0 has an arc for every symbol, which ends this.  With
back-off weights that is an n-gram model (Allauzen, Mohri and Roark 2003), with prefixes as states the matcher of Aho
and Corasick (1975).

Shapes: S states, A arcs, V symbols; states and symbols of any shape [...].
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

DENSE_BYTES = 64 * 2**20  # up to here a table of all states and symbols is worth its memory


class Arcs(NamedTuple):
    """An automaton in NumPy: `source`, `symbol`, `target` int [A] and `weight` [A], ascending by (source, symbol).

    `fail` int [S] and `fail_weight` [S]; fail[s] < s, but for state 0, which has an arc for every symbol.
    """

    source: np.ndarray
    symbol: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    fail: np.ndarray
    fail_weight: np.ndarray

    @property
    def depth(self) -> np.ndarray:
        """int [S]: how many failures there are from a state to state 0."""
        depth, at = np.zeros(len(self.fail), np.int64), np.arange(len(self.fail))
        while at.any():
            depth += at > 0
            at = self.fail[at]
        return depth


@flax.struct.dataclass
class Dense:
    """A table of what every symbol does in every state: `weight` float32 and `target` int32 [S, V]."""

    weight: jax.Array
    target: jax.Array

    def step(self, state: jax.Array, symbol: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 and int32 [...]: weight of `symbol` in `state`, int32 [...], and the state after it."""
        return self.weight[state, symbol], self.target[state, symbol]

    def weights(self, state: jax.Array) -> jax.Array:
        """float32 [..., V]: of every symbol in `state` int32 [...]."""
        return self.weight[state]


@flax.struct.dataclass
class Sparse:
    """Arcs of all states in a row, those of state s from `first[s]` on, found by binary search.

    `first` int32 [S + 1], `symbol`, `target` int32 and `weight` float32 [A], `fail` int32 and `fail_weight` [S];
    `depth` is the longest chain of failures, `halvings` bounds the search among one state's arcs.
    """

    first: jax.Array
    symbol: jax.Array
    target: jax.Array
    weight: jax.Array
    fail: jax.Array
    fail_weight: jax.Array
    symbols: int = flax.struct.field(pytree_node=False)
    depth: int = flax.struct.field(pytree_node=False)
    halvings: int = flax.struct.field(pytree_node=False)

    def step(self, state: jax.Array, symbol: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `Dense.step`."""
        state, symbol = jnp.broadcast_arrays(state, symbol)

        def attempt(_, carry):
            state, paid, arc = carry
            low = self._search(state, symbol)
            hit = (low < self.first[state + 1]) & (self.symbol[low] == symbol)
            fails = (arc < 0) & ~hit
            return (
                jnp.where(fails, self.fail[state], state),
                jnp.where(fails, paid + self.fail_weight[state], paid),
                jnp.where((arc < 0) & hit, low, arc),
            )

        start = (state, jnp.zeros(state.shape, jnp.float32), jnp.full(state.shape, -1, jnp.int32))
        _, paid, arc = jax.lax.fori_loop(0, self.depth + 1, attempt, start)
        return paid + self.weight[arc], self.target[arc]

    def weights(self, state: jax.Array) -> jax.Array:
        """As `Dense.weights`."""
        return self.step(state[..., None], jnp.arange(self.symbols, dtype=jnp.int32))[0]

    def _search(self, state: jax.Array, symbol: jax.Array) -> jax.Array:
        """The first arc of `state` whose symbol is not below `symbol`."""

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) // 2
            right = (low < high) & (self.symbol[middle] < symbol)
            return jnp.where(right, middle + 1, low), jnp.where(right, high, middle)

        bounds = self.first[state], self.first[state + 1]
        return jax.lax.fori_loop(0, self.halvings, halve, bounds)[0]


Automaton = Dense | Sparse


def make_automaton(arcs: Arcs, symbols: int, dense_bytes: int = DENSE_BYTES) -> Automaton:
    """The automaton over symbols 0 to V - 1 on device: dense where its table has at most `dense_bytes`."""
    fits = len(arcs.fail) * symbols * 8 <= dense_bytes
    return _dense(arcs, symbols) if fits else _sparse(arcs, symbols)


def _dense(arcs: Arcs, symbols: int) -> Dense:
    weight = np.zeros((len(arcs.fail), symbols), np.float32)
    target = np.zeros((len(arcs.fail), symbols), np.int32)
    depth = arcs.depth
    for level in range(depth.max() + 1):
        states, own = depth == level, depth[arcs.source] == level
        if level:
            weight[states] = weight[arcs.fail[states]] + arcs.fail_weight[states, None].astype(np.float32)
            target[states] = target[arcs.fail[states]]
        at = arcs.source[own], arcs.symbol[own]
        weight[at], target[at] = arcs.weight[own], arcs.target[own]
    return Dense(jnp.asarray(weight), jnp.asarray(target))


def _sparse(arcs: Arcs, symbols: int) -> Sparse:
    first = np.searchsorted(arcs.source, np.arange(len(arcs.fail) + 1))
    return Sparse(
        first=jnp.asarray(first, jnp.int32),
        symbol=jnp.asarray(arcs.symbol, jnp.int32),
        target=jnp.asarray(arcs.target, jnp.int32),
        weight=jnp.asarray(arcs.weight, jnp.float32),
        fail=jnp.asarray(arcs.fail, jnp.int32),
        fail_weight=jnp.asarray(arcs.fail_weight, jnp.float32),
        symbols=symbols,
        depth=int(arcs.depth.max()),
        halvings=int(np.diff(first).max()).bit_length(),
    )

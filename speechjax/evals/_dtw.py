"""Dynamic time warping of many pairs of frame sequences at once.

Shapes: P pairs, I and J frames of the two sequences of a pair, K anti-diagonals.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

DISTANCES = ("angular", "kl")
_SAME = 1 - 4e-6  # cosines above are rounding of 1: else equal frames would be at distances that depend on their place
_BUCKETS = [4 << n for n in range(12)]  # frames
_CELLS = 1 << 20  # of the distance matrices of a batch


def frame_distances(left: np.ndarray, right: np.ndarray, distance: str) -> np.ndarray:
    """Distance of every frame of [I, D] to every frame of [J, D]: float32 [I, J].

    angular: the angle between them, in halves of a turn (0 to 1); a frame of zeros is at right angles to all.
    kl: Kullback-Leibler divergence in nats, mean of both directions, of the distributions softmax(frame).
    """
    left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
    if distance == "angular":
        cosine = _unit(left) @ _unit(right).T
        return np.where(cosine > _SAME, 0, np.arccos(np.clip(cosine, -1, 1)) / np.pi).astype(np.float32)
    p, q = _log_softmax(left), _log_softmax(right)
    own = np.sum(np.exp(p) * p, axis=1)[:, None] + np.sum(np.exp(q) * q, axis=1)
    return np.maximum(own - np.exp(p) @ q.T - p @ np.exp(q).T, 0) / 2


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@jax.jit
def warped(cells_PxIxJ: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Mean distance along the best path of every pair: [P, I, J] distances, [P] and [P] frames -> [P].

    A path goes from the first frames to the last ones by steps of one frame in either sequence or in both; the best
    has the smallest sum, and of equal ones the diagonal step first.  What is symmetric in the pair stays so.
    """
    P, I, J = cells_PxIxJ.shape  # noqa: E741
    K = I + J - 1
    # Row i moves i columns to the right, so that a column is an anti-diagonal; pairs last, for the vector units.
    cells = jnp.pad(jnp.transpose(cells_PxIxJ, (1, 2, 0)), ((0, 0), (0, I), (0, 0)), constant_values=jnp.inf)
    diagonals_KxIxP = jnp.transpose(cells.reshape(I * (K + 1), P)[: I * K].reshape(I, K, P), (1, 0, 2))
    at_end = jnp.arange(I)[:, None] == (left - 1)[None]

    def below(x, first):
        return jnp.concatenate([jnp.broadcast_to(first, (1, P)), x[:-1]])

    def step(carry, diagonal):
        (cost, length), (cost_before, length_before), found = carry
        k, cell = diagonal
        up, up_length = below(cost, jnp.float32(jnp.inf)), below(length, jnp.float32(0))
        both, both_length = below(cost_before, jnp.where(k == 0, 0.0, jnp.inf)), below(length_before, jnp.float32(0))
        side = jnp.minimum(up, cost)
        tied = jnp.where(up == cost, jnp.minimum(up_length, length), length)
        side_length = jnp.where(up < cost, up_length, tied)
        straight = both <= side
        new = cell + jnp.where(straight, both, side)
        new_length = 1 + jnp.where(straight, both_length, side_length)
        here = jnp.sum(jnp.where(at_end, new / new_length, 0), axis=0)
        found = jnp.where(k == left + right - 2, here, found)
        return ((new, new_length), (cost, length), found), None

    never, none = jnp.full((I, P), jnp.inf, jnp.float32), jnp.zeros((I, P), jnp.float32)
    start = ((never, none), (never, none), jnp.zeros(P, jnp.float32))
    (_, _, found), _ = lax.scan(step, start, (jnp.arange(K), diagonals_KxIxP))
    return found


class Warper:
    """Distances of pairs, computed in batches of few static shapes: `add` them, then `result()`."""

    def __init__(self, pairs: int):
        self._out = np.full(pairs, np.nan, np.float32)
        self._waiting: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]] = {}
        self._filled: dict[int, int] = {}

    def add(
        self,
        cells: np.ndarray,
        starts: tuple[np.ndarray, np.ndarray],
        counts: tuple[np.ndarray, np.ndarray],
        first: int,
    ) -> None:
        """Pairs number `first`, `first` + 1, ... of frames whose distances are in `cells` [I, J].

        Each has counts[0] frames from row starts[0] on, and counts[1] frames from column starts[1] on, [pairs] each.
        """
        largest = np.maximum(*counts)
        bucket = np.searchsorted(_BUCKETS, largest)
        for b in np.unique(bucket).tolist():
            size = _BUCKETS[b]
            mine = np.flatnonzero(bucket == b)
            for part in np.array_split(mine, -(-len(mine) // self._rows(size))):
                i = np.minimum(starts[0][part][:, None] + np.arange(size), cells.shape[0] - 1)
                j = np.minimum(starts[1][part][:, None] + np.arange(size), cells.shape[1] - 1)
                self._put(size, (cells[i[:, :, None], j[:, None, :]], counts[0][part], counts[1][part], first + part))

    def result(self) -> np.ndarray:
        """float32 [pairs]."""
        for size in list(self._waiting):
            self._flush(size)
        return self._out

    def _rows(self, size: int) -> int:
        return max(1, min(4096, _CELLS // size**2))

    def _put(self, size: int, piece: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> None:
        if self._filled.get(size, 0) + len(piece[3]) > self._rows(size):
            self._flush(size)
        self._waiting.setdefault(size, []).append(piece)
        self._filled[size] = self._filled.get(size, 0) + len(piece[3])

    def _flush(self, size: int) -> None:
        cells, left, right, pairs = (np.concatenate(column) for column in zip(*self._waiting.pop(size), strict=True))
        spare = self._rows(size) - len(pairs)
        pad = ((0, spare), *((0, 0),) * 2)
        ends = [np.pad(n.astype(np.int32), (0, spare), constant_values=1) for n in (left, right)]
        self._out[pairs] = np.asarray(warped(np.pad(cells, pad), *ends))[: len(pairs)]
        self._filled[size] = 0

"""k-means on the device, a batch at a time: k-means++, Lloyd, mini-batches.

Shapes: N points, D dimensions, K centroids, L trials.

Every function is pure and jittable, and takes points that are split over a mesh's data axes: centroids are copies, the
sums over points become one reduction.  Nothing is ever [N, K, D].  Points that are not `valid` (padding) count for
nothing, whatever is in them, NaN included.

Precision is float32, made safe where it matters: distances are compared about the centroids' mean, for
|x|^2 - 2 x c + |c|^2 of data far from the origin is all rounding; centroids move by the mean of the *differences* from
them; sums over a whole data set are compensated.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

EXACT = lax.Precision.HIGHEST


class Clusters(NamedTuple):
    """The state of mini-batch k-means: `centroids` float32 [K, D], `counts` float32 [K] of points that each has taken.

    `step` int32 updates were made; `inertia` float32 is the last batch's mean squared distance, before its update.
    """

    centroids: jax.Array
    counts: jax.Array
    step: jax.Array
    inertia: jax.Array


class Sums(NamedTuple):
    """What one pass of Lloyd's algorithm adds up, over any number of batches: see `accumulate`.

    `moves` [K, D + 2]: of every centroid's points the sum of the differences from it, their number, and the sum of
    their squared distances.  `errors`: what float32 has lost of that so far.
    """

    moves: jax.Array
    errors: jax.Array


def start(centroids: jax.Array) -> Clusters:
    """Mini-batch k-means from these centroids [K, D]."""
    counts = jnp.zeros(centroids.shape[0], jnp.float32)
    return Clusters(centroids.astype(jnp.float32), counts, jnp.int32(0), jnp.float32(jnp.inf))


def assign(points: jax.Array, centroids: jax.Array) -> jax.Array:
    """The nearest centroid of every point: [..., D], [K, D] -> int32 [...]; of several equally near ones the first."""
    points, centroids = points.astype(jnp.float32), centroids.astype(jnp.float32)
    middle = jnp.mean(centroids, axis=0)
    near = centroids - middle[None]
    along = jnp.dot(points - middle.reshape((1,) * (points.ndim - 1) + (-1,)), near.T, precision=EXACT)
    half = 0.5 * jnp.sum(jnp.square(near), axis=1)
    return jnp.argmax(along - half.reshape((1,) * (points.ndim - 1) + (-1,)), axis=-1).astype(jnp.int32)


def _moves(centroids: jax.Array, points: jax.Array, valid: jax.Array) -> jax.Array:
    """`Sums.moves` [K, D + 2] of one batch: points [N, D], valid bool [N]."""
    points = jnp.where(valid[:, None], points.astype(jnp.float32), 0)
    code = assign(points, centroids)
    off = points - centroids[code]
    counted = jnp.concatenate([off, jnp.ones_like(off[:, :1]), jnp.sum(jnp.square(off), axis=1, keepdims=True)], axis=1)
    chosen_NxK = jax.nn.one_hot(jnp.where(valid, code, -1), centroids.shape[0], dtype=jnp.float32)
    return jnp.einsum("nk,nd->kd", chosen_NxK, counted, precision=EXACT)


def update(clusters: Clusters, points: jax.Array, valid: jax.Array) -> Clusters:
    """One update of mini-batch k-means (Sculley 2010): points [N, D], valid bool [N].

    Every centroid becomes the mean of all points it has ever taken, as in scikit-learn's MiniBatchKMeans.
    """
    moves = _moves(clusters.centroids, points, valid)
    taken = moves[:, -2]
    counts = clusters.counts + taken
    centroids = clusters.centroids + moves[:, :-2] / jnp.maximum(counts, 1)[:, None]
    inertia = jnp.sum(moves[:, -1]) / jnp.maximum(jnp.sum(taken), 1)
    return Clusters(centroids, counts, clusters.step + 1, inertia)


def reassign(key: jax.Array, clusters: Clusters, points: jax.Array, valid: jax.Array, ratio: float) -> Clusters:
    """Moves centroids that have taken fewer points than `ratio` of what the largest has to random points of a batch.

    At most as many as half the batch's points; they then count for as much as the smallest of the others.
    """
    K, N = clusters.centroids.shape[0], points.shape[0]
    few = min(K, N)
    order = jnp.argsort(clusters.counts)[:few]  # smallest first
    rank = jnp.arange(few)
    poor = (clusters.counts[order] < ratio * jnp.max(clusters.counts)) & (rank < jnp.sum(valid) // 2)
    _, drawn = lax.top_k(jnp.where(valid, jax.random.uniform(key, (N,)), -1.0), few)
    new = jnp.where(poor[:, None], points[drawn].astype(jnp.float32), clusters.centroids[order])
    moved = jnp.zeros(K, bool).at[order].set(poor)
    least = jnp.min(jnp.where(moved, jnp.inf, clusters.counts))
    counts = jnp.where(moved, least, clusters.counts)
    return clusters._replace(centroids=clusters.centroids.at[order].set(new), counts=counts)


def no_sums(centroids: jax.Array) -> Sums:
    """The beginning of a pass."""
    zero = jnp.zeros((centroids.shape[0], centroids.shape[1] + 2), jnp.float32)
    return Sums(zero, zero)


def accumulate(sums: Sums, centroids: jax.Array, points: jax.Array, valid: jax.Array) -> Sums:
    """Adds a batch to a pass: points [N, D], valid bool [N]; the centroids stay as they are until `lloyd_update`."""
    new = _moves(centroids, points, valid)
    # Knuth's two-sum: the rounding error of an addition is itself a float, and known exactly.
    total = sums.moves + new
    part = total - sums.moves
    return Sums(total, sums.errors + ((sums.moves - (total - part)) + (new - part)))


def lloyd_update(centroids: jax.Array, sums: Sums) -> Clusters:
    """The end of a pass: every centroid becomes the mean of its points; one without points stays where it is.

    The result's `inertia` is the pass's mean squared distance from the old centroids, so it never rises from pass to
    pass; `counts` are the pass's points.
    """
    total = sums.moves + sums.errors
    counts = total[:, -2]
    moved = centroids + total[:, :-2] / jnp.maximum(counts, 1)[:, None]
    inertia = jnp.sum(total[:, -1]) / jnp.maximum(jnp.sum(counts), 1)
    return Clusters(moved, counts, jnp.int32(1), inertia)


def kmeans_plus_plus(
    key: jax.Array, points: jax.Array, k: int, *, valid: jax.Array | None = None, trials: int = 0
) -> tuple[jax.Array, jax.Array]:
    """k of the points as first centroids (Arthur and Vassilvitskii 2007): ([K, D], mean squared distance from them).

    points [N, D], valid bool [N].  The first is drawn evenly; every further one with a probability proportional to its
    squared distance from the nearest one so far.  Of `trials` such draws (0: 2 + ln k, as scikit-learn) the one is
    taken that leaves the smallest sum.  With fewer distinct points than k, some come twice: the caller's to see.
    """
    trials = trials or 2 + int(math.log(k))
    valid = jnp.ones(points.shape[0], bool) if valid is None else valid
    weight = valid.astype(jnp.float32)
    points = jnp.where(valid[:, None], points.astype(jnp.float32), 0)
    middle = jnp.sum(points, axis=0) / jnp.maximum(jnp.sum(weight), 1)
    x = points - middle[None]
    norms = jnp.sum(jnp.square(x), axis=1)
    # Below this a distance is the rounding of what it was computed from: the same point.
    rounding = 4 * float(jnp.finfo(jnp.float32).eps) * math.sqrt(x.shape[1])

    def distances(drawn):
        """[L, N] from each of the drawn points."""
        sums = norms[drawn][:, None] + norms[None]
        found = sums - 2 * jnp.dot(x[drawn], x.T, precision=EXACT)
        return jnp.where(found > rounding * sums, found, 0) * weight[None]

    def step(i, carry):
        chosen, closest = carry
        drawn = _draw(jax.random.fold_in(key, i), closest, trials)
        left = jnp.minimum(closest[None], distances(drawn))
        best = jnp.argmin(jnp.sum(left, axis=1))
        return chosen.at[i].set(drawn[best]), left[best]

    first = _draw(jax.random.fold_in(key, 0), weight, 1)
    chosen = jnp.zeros(k, first.dtype).at[0].set(first[0])
    chosen, closest = lax.fori_loop(1, k, step, (chosen, distances(first)[0]))
    return points[chosen], jnp.sum(closest) / jnp.maximum(jnp.sum(weight), 1)


def _draw(key: jax.Array, weight: jax.Array, count: int) -> jax.Array:
    """Numbers int [L] of points, drawn with probabilities proportional to `weight` [N], with replacement."""
    upto = jnp.cumsum(weight)
    at = jax.random.uniform(key, (count,)) * upto[-1]
    drawn = jnp.minimum(jnp.searchsorted(upto, at, side="right"), weight.shape[0] - 1)
    # A running sum that was computed in parallel may round to a fall: never a point that cannot be drawn.
    return jnp.where(weight[drawn] > 0, drawn, jnp.argmax(weight))


def sample(key: jax.Array, points: jax.Array, valid: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`count` of the valid points, evenly, without replacement: [N, D], bool [N] -> ([count, D], bool [count]).

    Where there are fewer, the second says which are real.
    """
    _, drawn = lax.top_k(jnp.where(valid, jax.random.uniform(key, valid.shape), -1.0), count)
    return points[drawn].astype(jnp.float32), valid[drawn]


def fit(key: jax.Array, points: jax.Array, k: int, *, passes: int = 50) -> Clusters:
    """k-means of points [N, D] that fit into memory: k-means++, then `passes` of Lloyd's algorithm."""
    centroids, _ = kmeans_plus_plus(key, points, k)
    valid = jnp.ones(points.shape[0], bool)

    def one(_, clusters):
        return lloyd_update(clusters.centroids, accumulate(no_sums(centroids), clusters.centroids, points, valid))

    return lax.fori_loop(0, passes, one, start(centroids)._replace(step=jnp.int32(1)))

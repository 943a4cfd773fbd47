"""k-means: against scikit-learn from the same start, closed forms and brute force; the same on any mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans, MiniBatchKMeans

from speechjax import sharding
from speechjax.models import kmeans

K, D = 5, 3


def blobs(n: int = 400, *, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    """Points about five centres, of which two are close."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(K, D)) * 4
    return (centres[rng.integers(K, size=n)] + rng.normal(size=(n, D)) + offset).astype(np.float32)


def everyone(points: np.ndarray) -> np.ndarray:
    return np.ones(len(points), bool)


# One compilation each for the whole file.
accumulate, lloyd_update = jax.jit(kmeans.accumulate), jax.jit(kmeans.lloyd_update)
update, assign = jax.jit(kmeans.update), jax.jit(kmeans.assign)


def lloyd(points: np.ndarray, centroids: np.ndarray, passes: int, batches: int = 1) -> list[kmeans.Clusters]:
    """Every pass's result, each over so many batches."""
    found = []
    for _ in range(passes):
        sums = kmeans.no_sums(jnp.asarray(centroids))
        for part in np.split(points, batches):
            sums = accumulate(sums, centroids, part, everyone(part))
        found.append(lloyd_update(jnp.asarray(centroids), sums))
        centroids = np.asarray(found[-1].centroids)
    return found


# ---- against scikit-learn


@pytest.mark.parametrize("batches", [1, 4])
def test_lloyd_equals_scikit_learns_from_the_same_start(batches):
    points = blobs()
    first = points[:K]
    theirs = KMeans(K, init=first, n_init=1, max_iter=7, tol=0, algorithm="lloyd").fit(points)
    found = lloyd(points, first, theirs.n_iter_, batches)
    # Means of some hundred values of size 10 in float32.
    np.testing.assert_allclose(found[-1].centroids, theirs.cluster_centers_, atol=1e-4)
    assert np.array_equal(assign(points, found[-1].centroids), theirs.labels_)
    assert not np.allclose(found[0].centroids, theirs.cluster_centers_, atol=1e-2)  # one pass would not do


def test_mini_batches_equal_scikit_learns_from_the_same_start():
    points = blobs(600)
    # Its own reassignment is off, as in HuBERT's recipe.
    theirs = MiniBatchKMeans(K, init=points[:K], n_init=1, reassignment_ratio=0)
    clusters = kmeans.start(jnp.asarray(points[:K]))
    for part in np.split(points, 6):
        theirs.partial_fit(part)
        clusters = update(clusters, part, everyone(part))
        np.testing.assert_allclose(clusters.centroids, theirs.cluster_centers_, atol=1e-4)
        np.testing.assert_array_equal(clusters.counts, theirs._counts)
    assert int(clusters.step) == 6


def test_features_far_from_the_origin_lose_no_precision():
    """Where |x|^2 is a million times a distance, the textbook expansion in float32 takes the wrong centroid."""
    points = blobs(200, offset=3000.0)
    centroids = points[:K]
    exact = np.square(points[:, None].astype(np.float64) - centroids[None]).sum(-1)
    assert np.array_equal(assign(points, centroids), exact.argmin(1))
    textbook = np.square(points).sum(1)[:, None] - 2 * points @ centroids.T + np.square(centroids).sum(1)[None]
    assert not np.array_equal(textbook.argmin(1), exact.argmin(1))
    [result] = lloyd(points, centroids, 1)
    assert float(result.inertia) == pytest.approx(exact.min(1).mean(), rel=1e-5)  # a float32 sum of 200


# ---- properties


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_inertia_never_rises(seed):
    points = blobs(seed=seed)
    inertia = [float(c.inertia) for c in lloyd(points, points[:K], 6)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(inertia))  # one rounding
    assert inertia[-1] < inertia[0]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([np.nan, np.inf, 1e30]))
def test_padding_never_counts_whatever_is_in_it(seed, noise):
    points = blobs(100, seed=seed)
    valid = np.random.default_rng(seed).random(100) < 0.7
    dirty = np.where(valid[:, None], points, noise)
    zeros = np.where(valid[:, None], points, 0)
    clusters = kmeans.start(jnp.asarray(points[:K]))
    for function, state in ((update, (clusters,)), (accumulate, (kmeans.no_sums(clusters.centroids), points[:K]))):
        a, b = function(*state, dirty, valid), function(*state, zeros, valid)
        jax.tree.map(np.testing.assert_array_equal, a, b)
    updated = update(clusters, dirty, valid)
    assert float(updated.counts.sum()) == valid.sum()
    counted = update(clusters, zeros, everyone(zeros))
    assert not np.array_equal(counted.centroids, updated.centroids)  # zeros that count do pull


def test_a_centroid_without_points_stays_and_is_seen():
    points = blobs()
    far = np.full((1, D), 1e3, np.float32)
    first = np.concatenate([points[: K - 1], far])
    for result in (lloyd(points, first, 1)[0], update(kmeans.start(jnp.asarray(first)), points, everyone(points))):
        assert float(result.counts[-1]) == 0
        np.testing.assert_array_equal(result.centroids[-1], far[0])
        assert np.isfinite(np.asarray(result.centroids)).all()


def test_reassignment_moves_the_poor_to_points_of_the_batch_and_nobody_else():
    points = blobs()
    clusters = kmeans.start(jnp.asarray(points[:K]))._replace(counts=jnp.asarray([100.0, 0, 50, 9, 20]))
    valid = everyone(points)
    valid[200:] = False
    moved = kmeans.reassign(jax.random.key(0), clusters, jnp.asarray(points), jnp.asarray(valid), 0.1)
    rich = [0, 2, 4]
    np.testing.assert_array_equal(moved.centroids[np.array(rich)], points[rich])
    for poor in (1, 3):
        assert (np.asarray(moved.centroids[poor]) == points[:200]).all(axis=1).any()
    np.testing.assert_array_equal(moved.counts, [100, 20, 50, 20, 20])
    same = kmeans.reassign(jax.random.key(0), clusters, jnp.asarray(points), jnp.asarray(valid), 0.0)
    jax.tree.map(np.testing.assert_array_equal, same, clusters)


def test_sums_over_a_large_data_set_lose_nothing():
    """Small counts on top of 2**25, as after days of audio: plain float32 would not move at all."""
    centroids = jnp.zeros((1, 1))
    sums = kmeans.Sums(jnp.full((1, 3), 2.0**25), jnp.zeros((1, 3)))
    for _ in range(50):
        sums = accumulate(sums, centroids, np.ones((1, 1), np.float32), np.ones(1, bool))
    assert np.float32(2.0**25) + np.float32(1) == 2.0**25
    np.testing.assert_array_equal(np.asarray(sums.moves, np.float64) + np.asarray(sums.errors, np.float64), 2**25 + 50)


# ---- meshes


def test_one_device_or_four_make_no_difference():
    points, valid = blobs(), np.arange(400) % 7 > 0
    results = []
    for devices in (1, 4):
        mesh = sharding.make_mesh(data=-1, fsdp=1, devices=jax.devices()[:devices])
        split = sharding.global_batch(mesh, {"x": points, "valid": valid})
        assert len(split["x"].addressable_shards) == devices
        clusters = jax.device_put(kmeans.start(jnp.asarray(points[:K])), sharding.replicated(mesh))
        sums = kmeans.no_sums(clusters.centroids)
        results.append(
            (
                update(clusters, split["x"], split["valid"]), assign(split["x"], clusters.centroids),
                accumulate(sums, clusters.centroids, split["x"], split["valid"]).moves,
                jax.jit(lambda x, v: kmeans.kmeans_plus_plus(jax.random.key(1), x, K, valid=v))(*split.values()),
            )
        )  # fmt: skip
    # The order of a sum of 400 values of size 10 changes.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), *results)


# ---- k-means++


def greedy(points: np.ndarray, trials: int) -> dict[tuple[int, int], float]:
    """Probability of every (first, second) choice, by going through all draws."""
    found = {}
    d2 = np.square(points[:, None] - points[None]).sum(-1)
    for first in range(len(points)):
        weight = d2[first] / d2[first].sum()
        for draws in itertools.product(range(len(points)), repeat=trials):
            sums = [np.minimum(d2[first], d2[j]).sum() for j in draws]
            pair = first, draws[int(np.argmin(sums))]
            found[pair] = found.get(pair, 0) + np.prod(weight[list(draws)]) / len(points)
    return found


@pytest.mark.parametrize("trials", [1, 2])
def test_kmeans_plus_plus_draws_with_squared_distances(trials):
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [4, 0, 1]], np.float32)
    keys = jax.random.split(jax.random.key(0), 8000)
    drawn = jax.vmap(lambda key: kmeans.kmeans_plus_plus(key, points, 2, trials=trials)[0])(keys)
    number = np.square(np.asarray(drawn)[:, :, None] - points[None, None]).sum(-1).argmin(-1)
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(number.T), 1)
    wanted = np.zeros((4, 4))
    for pair, p in greedy(points, trials).items():
        wanted[pair] = p
    assert counts[wanted == 0].sum() == 0
    # Five standard deviations of a binomial count, and some for the smallest.
    np.testing.assert_array_less(np.abs(counts - 8000 * wanted), 5 * np.sqrt(8000 * wanted) + 3)
    even = np.where(wanted > 0, 1 / 12, 0)
    assert (np.abs(counts - 8000 * even) > 5 * np.sqrt(8000 * even) + 3).any()  # an even draw would be seen


def test_kmeans_plus_plus_takes_distinct_points_and_no_padding():
    points = np.repeat(np.arange(8, dtype=np.float32)[:, None] + 1000.1, 5, axis=0)  # each five times
    valid = np.arange(40) < 35  # the last value is padding
    for seed in range(4):
        key = jax.random.key(seed)
        first, inertia = kmeans.kmeans_plus_plus(key, jnp.asarray(points), 7, valid=jnp.asarray(valid))
        np.testing.assert_array_equal(np.sort(np.asarray(first)[:, 0]), np.unique(points[valid]))
        assert float(inertia) == 0
    more, _ = kmeans.kmeans_plus_plus(jax.random.key(0), jnp.asarray(points), 9, valid=jnp.asarray(valid))
    assert len(np.unique(np.asarray(more), axis=0)) == 7  # there are no more; none is padding


def test_a_fit_finds_well_separated_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [0, 50], [50, 0]], np.float32)
    label = rng.integers(3, size=300)
    points = centres[label] + rng.normal(size=(300, 2)).astype(np.float32)
    found = kmeans.fit(jax.random.key(0), jnp.asarray(points), 3, passes=5)
    code = np.asarray(assign(points, found.centroids))
    assert len(set(zip(code.tolist(), label.tolist(), strict=True))) == 3
    assert float(found.inertia) == pytest.approx(2.0, rel=0.2)  # two dimensions of variance 1, from 300 points


def test_a_sample_has_every_valid_point_equally_often():
    points = jnp.arange(10, dtype=jnp.float32)[:, None]
    valid = jnp.arange(10) < 8
    drawn, real = jax.vmap(lambda key: kmeans.sample(key, points, valid, 4))(jax.random.split(jax.random.key(0), 2000))
    assert bool(real.all())
    counts = np.bincount(np.asarray(drawn).astype(int).ravel(), minlength=10)
    assert counts[8:].sum() == 0
    np.testing.assert_array_less(np.abs(counts[:8] - 1000), 5 * np.sqrt(500))  # five standard deviations
    assert all(len(set(row)) == 4 for row in np.asarray(drawn)[:, :, 0].tolist())
    few, real = kmeans.sample(jax.random.key(0), points, valid, 10)
    assert int(real.sum()) == 8
    assert sorted(np.asarray(few)[np.asarray(real), 0].tolist()) == list(range(8))

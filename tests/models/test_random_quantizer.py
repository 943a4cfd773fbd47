"""The random-projection quantizer against distances in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from speechjax.errors import UserError
from speechjax.models.random_quantizer import RandomQuantizer, code_counts

N, F, G, V, C = 40, 12, 3, 9, 4
QUANTIZER = RandomQuantizer(codebooks=G, codes=V, dim=C)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, N, F)).astype(np.float32)


@pytest.fixture(scope="module")
def frozen(x):
    return QUANTIZER.init(jax.random.key(0), x)


def distances(frozen, x) -> np.ndarray:
    """Of the unit vectors, as published: [..., F] -> [..., G, V]."""
    arrays = frozen["frozen"]
    projection, codebook = (np.asarray(arrays[name], np.float64) for name in ("projection", "codebook"))
    y = np.einsum("...f,gfc->...gc", np.asarray(x, np.float64), projection)
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    codebook /= np.linalg.norm(codebook, axis=-1, keepdims=True)
    return np.linalg.norm(y[..., None, :] - codebook, axis=-1)


def test_codes_are_the_nearest_of_unit_length(frozen, x):
    codes = np.asarray(QUANTIZER.apply(frozen, x))
    assert codes.dtype == np.int32
    assert codes.shape == (2, N, G)
    np.testing.assert_array_equal(codes, distances(frozen, x).argmin(axis=-1))
    plain = np.asarray(frozen["frozen"]["codebook"], np.float64)  # not of unit length
    y = np.einsum("bnf,gfc->bngc", x, np.asarray(frozen["frozen"]["projection"]))
    unnormalised = np.linalg.norm(y[..., None, :] - plain, axis=-1).argmin(axis=-1)
    assert (codes != unnormalised).mean() > 0.1, "negative control: the lengths matter"


def test_length_does_not_matter_and_silence_has_code_zero(frozen, x):
    codes = QUANTIZER.apply(frozen, x)
    np.testing.assert_array_equal(codes, QUANTIZER.apply(frozen, 100 * x))
    assert (np.asarray(codes) != np.asarray(QUANTIZER.apply(frozen, -x))).mean() > 0.9, "negative control"
    np.testing.assert_array_equal(QUANTIZER.apply(frozen, np.zeros_like(x)), 0)


def test_nothing_is_trained_and_the_init_key_decides(frozen, x):
    assert set(frozen) == {"frozen"}, "a parameter would be trained and decayed"
    again, other = (QUANTIZER.init(jax.random.key(seed), x) for seed in (0, 1))
    for a, b, c in zip(*(jax.tree.leaves(tree) for tree in (frozen, again, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).all()
    codes, after = QUANTIZER.apply(frozen, x, mutable=["frozen"])
    jax.tree.map(np.testing.assert_array_equal, after, frozen)
    projection = np.asarray(frozen["frozen"]["projection"])
    assert (projection[0] != projection[1]).all(), "every codebook has its own projection"
    assert (np.asarray(codes)[..., 0] != np.asarray(codes)[..., 1]).mean() > 0.5


def test_distributions_are_the_papers():
    wide = RandomQuantizer(codebooks=2, codes=4000, dim=16)
    arrays = wide.init(jax.random.key(3), jnp.zeros((1, 320)))["frozen"]
    limit = math.sqrt(6 / (320 + 16))
    projection = np.asarray(arrays["projection"])
    assert np.abs(projection).max() <= limit
    # Uniform: 10,240 draws, the standard error of their deviation is 0.4 %.
    assert projection.std() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    codebook = np.asarray(arrays["codebook"])
    assert codebook.mean() == pytest.approx(0, abs=0.02)
    assert codebook.std() == pytest.approx(1, rel=0.02)


def test_no_array_of_differences_is_made(x):
    """Trap: [..., V, C] differences are C times the memory of the products, and those of one codebook are enough."""

    def largest(jaxpr) -> int:
        inner = [largest(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
        return max([*inner, *(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)], default=0)

    wide = RandomQuantizer(codebooks=4, codes=512, dim=8)
    frozen = wide.init(jax.random.key(0), x)
    assert largest(jax.make_jaxpr(lambda x: wide.apply(frozen, x))(x).jaxpr) == x[..., 0].size * 512


def test_no_gradient_comes_out(frozen, x):
    loss = lambda frozen, x: jnp.sum(QUANTIZER.apply(frozen, x).astype(jnp.float32))  # noqa: E731
    assert all((g == 0).all() for g in jax.tree.leaves(jax.grad(loss, (0, 1))(frozen, jnp.asarray(x))))


@pytest.mark.parametrize("sizes", [dict(codebooks=0), dict(codes=0), dict(dim=0)])
def test_sizes_are_checked(sizes, x):
    with pytest.raises(UserError, match="must be at least 1"):
        RandomQuantizer(**sizes).init(jax.random.key(0), x)


def test_code_counts_count():
    rng = np.random.default_rng(0)
    codes, valid = rng.integers(0, V, (3, 20, G)).astype(np.int32), rng.random((3, 20)) < 0.6
    counts = np.asarray(code_counts(jnp.asarray(codes), jnp.asarray(valid), V))
    expected = [np.bincount(codes[..., g][valid], minlength=V) for g in range(G)]
    np.testing.assert_array_equal(counts, expected)
    assert (counts != [np.bincount(codes[..., g].ravel(), minlength=V) for g in range(G)]).any(), "negative control"

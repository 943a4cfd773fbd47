"""The grouped convolution as a matrix product against the library's, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from speechjax.models.layers import gelu
from speechjax.models.positions import ConvPositions, grouped_conv

WIDTH, GROUPS = 12, 3


def library_conv(x, kernel, left):
    return lax.conv_general_dilated(
        x, kernel, (1,), [(left, kernel.shape[0] - 1 - left)], feature_group_count=GROUPS,
        dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip


@pytest.mark.parametrize(("frames", "kernel", "per_row"), [(3, 16, 4), (21, 6, 4), (5, 6, 1), (22, 31, 4)])
def test_grouped_conv_equals_the_library(frames, kernel, per_row):
    rng = np.random.default_rng(frames)
    shapes = (2, frames, WIDTH), (kernel, WIDTH // GROUPS, WIDTH), (2, frames, WIDTH)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    @jax.jit
    def both(x, w, g):
        ours, ours_back = jax.vjp(lambda x, w: grouped_conv(x, w, GROUPS, per_row), x, w)
        theirs, theirs_back = jax.vjp(lambda x, w: library_conv(x, w, kernel // 2), x, w)
        return [ours, *ours_back(g)], [theirs, *theirs_back(g)], library_conv(x, w, (kernel - 1) // 2)

    ours, theirs, shifted = both(x, w, g)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())  # float32 sums of up to 124 terms
    if kernel % 2 == 0:
        assert np.abs(ours[0] - shifted).max() > 0.1, "negative control: an even kernel sees the past first"


def test_first_kernel_is_its_own_direction():
    """Weight norm starts with gain = norm, one gain a tap, and the directions have the published scale."""
    K, D, G = 32, 64, 4
    module = ConvPositions(kernel=K, groups=G)
    x = np.random.default_rng(0).normal(size=(2, 10, D)).astype(np.float32)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(1), x)
    v, gain = (np.asarray(variables["params"][name]) for name in ("direction", "gain"))
    assert v.shape == (K, D // G, D)
    assert gain.shape == (K, 1, 1)
    assert v.std() == pytest.approx(np.sqrt(4 / (K * D)), rel=0.02)  # 32768 draws
    np.testing.assert_allclose(gain[:, 0, 0], np.linalg.norm(v.reshape(K, -1), axis=1), rtol=1e-6)
    expected = jax.jit(lambda x, v: gelu(grouped_conv(x, v, G)))(x, v)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_gain_sets_the_size_of_a_tap_whatever_the_direction(random_params):
    module = ConvPositions(kernel=3, groups=1)
    x = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)
    params = jax.tree.map(np.asarray, random_params(module, x))
    run = jax.jit(lambda p: module.apply({"params": p}, x))
    base = run(params)
    np.testing.assert_allclose(run(params | {"direction": 7 * params["direction"]}), base, atol=1e-6)
    one_tap = run(params | {"gain": np.array([0, 1, 0], np.float32)[:, None, None]})
    middle = np.asarray(params["direction"][1])
    expected = jax.jit(gelu)(x @ (middle / np.linalg.norm(middle)) + params["bias"])
    np.testing.assert_allclose(one_tap, expected, atol=1e-6)
    assert np.abs(one_tap - base).max() > 0.1


def test_a_zero_direction_has_finite_gradients(random_params):
    module = ConvPositions(kernel=3, groups=1)
    x = jnp.ones((1, 5, 4))
    params = jax.tree.map(np.zeros_like, random_params(module, x))
    total = lambda p: jnp.sum(jnp.asarray(module.apply({"params": p}, x)))  # noqa: E731
    gradient = jax.jit(jax.grad(total))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))

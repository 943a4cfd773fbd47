"""The small pieces: GELU, gradient scaling, masks, layer norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from speechjax.models.layers import LayerNorm, fan_in_uniform, frame_mask, gelu, scale_gradient, shard_batch, zero_padding

POINTS = jnp.linspace(-8, 8, 2001)


def test_gelu_is_the_exact_one():
    x = np.asarray(POINTS, np.float64)
    exact = x * special.ndtr(x)
    np.testing.assert_allclose(gelu(POINTS), exact, atol=1e-6)  # float32 of values up to 8
    np.testing.assert_allclose(gelu(POINTS), jax.nn.gelu(POINTS, approximate=False), atol=1e-6)
    assert np.abs(jax.nn.gelu(POINTS, approximate=True) - exact).max() > 1e-4, "negative control: tanh form"


def test_gelu_gradient():
    x = np.asarray(POINTS, np.float64)
    exact = special.ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    ours, theirs = (
        jax.vmap(jax.grad(f))(POINTS) for f in (gelu, lambda x: jax.nn.gelu(x, approximate=False))
    )
    np.testing.assert_allclose(ours, exact, atol=1e-6)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_gelu_keeps_the_dtype_and_multiplies_the_cotangent():
    value, pull = jax.vjp(gelu, POINTS.astype(jnp.bfloat16))
    assert value.dtype == jnp.bfloat16
    (once,), (thrice,) = (pull(jnp.full_like(value, c)) for c in (1, 3))
    assert once.dtype == jnp.bfloat16
    np.testing.assert_allclose(thrice.astype(jnp.float32), 3 * once.astype(jnp.float32), rtol=2**-8)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_scale_gradient(scale):
    value, gradient = jax.value_and_grad(lambda x: scale_gradient(x, scale) ** 2)(jnp.float32(3))
    assert value == pytest.approx(9, rel=1e-6)  # 0.1 x + 0.9 x rounds
    assert gradient == pytest.approx(6 * scale, rel=1e-6)


def test_frame_mask_and_zero_padding():
    lengths = jnp.array([0, 2, 5], jnp.int32)
    np.testing.assert_array_equal(frame_mask(lengths, 4).sum(axis=1), [0, 2, 4])
    x = jnp.full((3, 4, 2), jnp.nan)
    zeroed = np.asarray(zero_padding(x, lengths))
    np.testing.assert_array_equal(zeroed == 0, ~np.asarray(frame_mask(lengths, 4))[..., None].repeat(2, -1))
    assert zero_padding(x.astype(jnp.bfloat16), lengths).dtype == jnp.bfloat16


def test_layer_norm_runs_in_float32_and_does_not_cancel():
    x = 1000 + jax.random.normal(jax.random.key(0), (50, 16))
    norm = LayerNorm(out_dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x)
    assert norm.apply(variables, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    exact = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    # The mean of values near 1000 rounds at 6e-5; the one-pass variance would be off by 0.1.
    np.testing.assert_allclose(LayerNorm().apply(variables, x), exact, atol=3e-4)


def test_fan_in_uniform():
    draw = fan_in_uniform(64)(jax.random.key(0), (4000,))
    assert -1 / 8 <= draw.min() < -0.124 and 0.124 < draw.max() <= 1 / 8
    assert abs(draw.std() - 0.25 / np.sqrt(12)) < 0.002


def test_shard_batch_splits_rows_over_data_axes_and_only_with_a_mesh():
    x = jnp.arange(8.0)[:, None]
    assert len(jax.jit(shard_batch)(x).sharding.device_set) == 1
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: shard_batch(x) * 1)(x)
    assert split.sharding.shard_shape(split.shape) == (2, 1)
    np.testing.assert_array_equal(split, x)

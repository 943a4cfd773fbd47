"""The small pieces: GELU, gradient scaling, masks, layer norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from speechjax.models.layers import (
    LayerNorm,
    at_segments,
    fan_in_uniform,
    frame_mask,
    frame_positions,
    gelu,
    scale_gradient,
    segment_ids,
    shard_batch,
    zero_padding,
)

POINTS = np.linspace(-8, 8, 2001, dtype=np.float32)
erf_form, tanh_form = (functools.partial(jax.nn.gelu, approximate=a) for a in (False, True))


def value_and_slope(f, x=POINTS):
    value, pull = jax.jit(lambda x: jax.vjp(f, x)[0]), jax.jit(jax.vmap(jax.grad(f)))
    return np.asarray(value(x)), np.asarray(pull(x))


def test_gelu_and_its_gradient_are_the_exact_ones():
    x = POINTS.astype(np.float64)
    exact = x * special.ndtr(x), special.ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    for ours, library, truth in zip(value_and_slope(gelu), value_and_slope(erf_form), exact, strict=True):
        np.testing.assert_allclose(ours, truth, atol=1e-6)  # float32 of values up to 8
        np.testing.assert_allclose(ours, library, atol=1e-6)
    assert np.abs(value_and_slope(tanh_form)[0] - exact[0]).max() > 1e-4, "negative control: the tanh form"


def test_gelu_keeps_the_dtype_and_multiplies_the_cotangent():
    @jax.jit
    def both(x):
        value, pull = jax.vjp(gelu, x)
        return value, pull(jnp.full_like(value, 1))[0], pull(jnp.full_like(value, 4))[0]

    value, once, four_times = both(jnp.bfloat16(POINTS))
    assert value.dtype == once.dtype == jnp.bfloat16
    np.testing.assert_array_equal(4 * np.asarray(once, np.float32), np.asarray(four_times, np.float32))


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_scale_gradient(scale):
    value, gradient = jax.jit(jax.value_and_grad(lambda x: scale_gradient(x, scale) ** 2))(jnp.float32(3))
    assert value == pytest.approx(9, rel=1e-6)  # 0.1 x + 0.9 x rounds
    assert gradient == pytest.approx(6 * scale, rel=1e-6)


def test_frame_mask_and_zero_padding():
    lengths = np.array([0, 2, 5], np.int32)
    inside = np.asarray(jax.jit(frame_mask, static_argnums=1)(lengths, 4))
    np.testing.assert_array_equal(inside.sum(axis=1), [0, 2, 4])
    assert inside[1].tolist() == [True, True, False, False]
    nothing = jnp.bfloat16(np.full((3, 4, 2), np.nan))
    zeroed = jax.jit(zero_padding)(nothing, lengths)
    assert zeroed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(zeroed, np.float32)[..., 0] == 0, ~inside)


def test_segment_ids_and_what_follows_from_them():
    starts = np.array([[0, 2, 4], [3, 0, 0]], np.int32)
    counts = np.array([[2, 0, 3], [1, 0, 0]], np.int32)
    ids = jax.jit(segment_ids, static_argnums=2)(starts, counts, 7)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, [[1, 1, 0, 0, 3, 3, 3], [0, 0, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(frame_mask(ids, 7), np.asarray(ids) > 0)
    np.testing.assert_array_equal(zero_padding(jnp.ones((2, 7, 1)), ids)[..., 0], np.asarray(ids) > 0)
    values = np.array([[5, 6, 7], [8, 9, 9]], np.int32)
    np.testing.assert_array_equal(at_segments(values, ids)[0], [5, 5, 5, 5, 7, 7, 7])
    np.testing.assert_array_equal(at_segments(values, ids)[1], 8)


def test_frame_positions_restart_with_every_segment():
    run = jax.jit(frame_positions, static_argnums=1)
    np.testing.assert_array_equal(run(np.array([3, 5], np.int32), 4), [[0, 1, 2, 3]])
    ids = np.array([[1, 1, 1, 2, 2, 0, 3], [0, 0, 2, 2, 2, 2, 3]], np.int32)
    positions = np.asarray(run(ids, 7))
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(np.where(ids > 0, positions, 0), [[0, 1, 2, 0, 1, 0, 0], [0, 0, 0, 1, 2, 3, 0]])


def test_layer_norm_runs_in_float32_and_does_not_cancel():
    x = (1000 + np.random.default_rng(0).normal(size=(50, 16))).astype(np.float32)
    params = dict(scale=np.ones(16, np.float32), bias=np.zeros(16, np.float32))
    norm = jax.jit(lambda x: LayerNorm().apply({"params": params}, x))
    wide = x.astype(np.float64)
    exact = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    # The mean of values near 1000 rounds at 6e-5; the one-pass variance would be off by a tenth.
    np.testing.assert_allclose(norm(x), exact, atol=3e-4)
    half = LayerNorm(out_dtype=jnp.bfloat16)
    jaxpr, out = jax.make_jaxpr(lambda x: half.apply({"params": params}, x), return_shape=True)(jnp.bfloat16(x))
    assert out.dtype == jnp.bfloat16
    assert "bf16[50,16] = mul" not in str(jaxpr)


def test_fan_in_uniform():
    draw = np.asarray(jax.jit(lambda: fan_in_uniform(64)(jax.random.key(0), (4000,)))())
    assert -1 / 8 <= draw.min() < -0.124
    assert 0.124 < draw.max() <= 1 / 8
    assert abs(draw.std() - 0.25 / np.sqrt(12)) < 0.002


def test_shard_batch_splits_rows_over_data_axes_and_only_with_a_mesh():
    x = np.arange(8, dtype=np.float32)[:, None]
    assert len(jax.jit(shard_batch)(x).sharding.device_set) == 1
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: shard_batch(x) * 1)(x)
    assert split.sharding.shard_shape(split.shape) == (2, 1)
    np.testing.assert_array_equal(split, x)

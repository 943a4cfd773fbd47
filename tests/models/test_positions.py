"""Positions added to the input; the grouped convolution against the library's, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from speechjax.errors import UserError
from speechjax.models.layers import gelu
from speechjax.models.positions import POSITIONS, ConvPositions, SinusoidalPositions, grouped_conv

WIDTH, GROUPS = 12, 3


def library_conv(x, kernel, left):
    return lax.conv_general_dilated(
        x, kernel, (1,), [(left, kernel.shape[0] - 1 - left)], feature_group_count=GROUPS,
        dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("frames", "kernel", "per_row", "causal"),
    [(3, 16, 4, False), (21, 6, 4, False), (5, 6, 1, False), (22, 31, 4, False), (21, 6, 4, True), (3, 16, 4, True)],
)
def test_grouped_conv_equals_the_library(frames, kernel, per_row, causal):
    rng = np.random.default_rng(frames)
    shapes = (2, frames, WIDTH), (kernel, WIDTH // GROUPS, WIDTH), (2, frames, WIDTH)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    @jax.jit
    def both(x, w, g):
        ours, ours_back = jax.vjp(lambda x, w: grouped_conv(x, w, GROUPS, per_row, causal=causal), x, w)
        left = kernel - 1 if causal else kernel // 2
        theirs, theirs_back = jax.vjp(lambda x, w: library_conv(x, w, left), x, w)
        return [ours, *ours_back(g)], [theirs, *theirs_back(g)], library_conv(x, w, (kernel - 1) // 2)

    ours, theirs, shifted = both(x, w, g)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())  # float32 sums of up to 124 terms
    if kernel % 2 == 0:
        assert np.abs(ours[0] - shifted).max() > 0.1, "negative control: an even kernel sees the past first"


def test_grouped_conv_of_segments_is_that_of_each_alone():
    """Segments at multiples of four frames, of one frame, of less and more than the kernel, with and without gaps."""
    rng = np.random.default_rng(0)
    K, T = 9, 31
    x, w, g = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, T, WIDTH), (K, WIDTH // GROUPS, WIDTH), (2, T, WIDTH))
    )
    runs = [[(0, 1), (4, 12), (16, 19), (20, 31)], [(8, 11), (12, 30)]]
    ids = np.zeros((2, T), np.int32)
    for b, row in enumerate(runs):
        for i, (start, stop) in enumerate(row):
            ids[b, start:stop] = i + 1
    inside = (ids > 0)[..., None]

    @functools.partial(jax.jit, static_argnums=0)
    def packed(aware, x, w):
        conv = lambda x, w: grouped_conv(x, w, GROUPS, segments=ids if aware else None)  # noqa: E731
        y, back = jax.vjp(conv, x, w)
        return y, *back(jnp.where(inside, g, 0))

    @jax.jit
    def alone(x, w):
        def rows(x, w):
            y = jnp.zeros_like(x)
            for b, row in enumerate(runs):
                for start, stop in row:
                    y = y.at[b, start:stop].set(library_conv(x[b : b + 1, start:stop], w, K // 2)[0])
            return y

        y, back = jax.vjp(rows, x, w)
        return y, *back(jnp.where(inside, g, 0))

    ours, expected, mixed = packed(True, x, w), alone(x, w), packed(False, x, w)
    for a, b, c in zip(ours, expected, mixed, strict=True):
        a, b, c = ((np.asarray(v) * inside if v.shape == x.shape else np.asarray(v)) for v in (a, b, c))
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())  # float32 sums of up to 36 terms
        assert np.abs(c - b).max() > 0.1, "negative control: without the ids segments mix"


def test_first_kernel_is_its_own_direction():
    """Weight norm starts with gain = norm, one gain a tap, and the directions have the published scale."""
    K, D, G = 32, 64, 4
    module = ConvPositions(kernel=K, groups=G)
    x = np.random.default_rng(0).normal(size=(2, 10, D)).astype(np.float32)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(1), x, np.array([10, 10], np.int32))
    v, gain = (np.asarray(variables["params"][name]) for name in ("direction", "gain"))
    assert v.shape == (K, D // G, D)
    assert gain.shape == (K, 1, 1)
    assert v.std() == pytest.approx(np.sqrt(4 / (K * D)), rel=0.02)  # 32768 draws
    np.testing.assert_allclose(gain[:, 0, 0], np.linalg.norm(v.reshape(K, -1), axis=1), rtol=1e-6)
    expected = jax.jit(lambda x, v: gelu(grouped_conv(x, v, G)))(x, v)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_gain_sets_the_size_of_a_tap_whatever_the_direction(random_params):
    module = ConvPositions(kernel=3, groups=1)
    x, lengths = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32), np.array([5], np.int32)
    params = jax.tree.map(np.asarray, random_params(module, x, lengths))
    run = jax.jit(lambda p: module.apply({"params": p}, x, lengths))
    base = run(params)
    np.testing.assert_allclose(run(params | {"direction": 7 * params["direction"]}), base, atol=1e-6)
    one_tap = run(params | {"gain": np.array([0, 1, 0], np.float32)[:, None, None]})
    middle = np.asarray(params["direction"][1])
    expected = jax.jit(gelu)(x @ (middle / np.linalg.norm(middle)) + params["bias"])
    np.testing.assert_allclose(one_tap, expected, atol=1e-6)
    assert np.abs(one_tap - base).max() > 0.1


def test_a_zero_direction_has_finite_gradients(random_params):
    module = ConvPositions(kernel=3, groups=1)
    x, lengths = jnp.ones((1, 5, 4)), jnp.array([5], jnp.int32)
    params = jax.tree.map(np.zeros_like, random_params(module, x, lengths))
    total = lambda p: jnp.sum(jnp.asarray(module.apply({"params": p}, x, lengths)))  # noqa: E731
    gradient = jax.jit(jax.grad(total))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("causal", [False, True])
def test_a_stack_is_convolution_norm_and_gelu_again_and_again(random_params, causal):
    """Data2vec's: no weight norm, no gain, padding zero before each convolution."""
    module = ConvPositions(kernel=5, groups=GROUPS, depth=3)
    x = np.random.default_rng(0).normal(size=(2, 9, WIDTH)).astype(np.float32)
    lengths = np.array([9, 4], np.int32)
    x[1, 4:] = 0
    params = random_params(module, x, lengths)
    assert set(params) == {f"conv{i}_{name}" for i in range(3) for name in ("kernel", "bias")}
    assert params["conv0_kernel"].shape == (5, WIDTH // GROUPS, WIDTH)

    @jax.jit
    def reference(zeroed):
        y = jnp.asarray(x)
        for i in range(3):
            y = y * jnp.asarray(zeroed, jnp.float32)
            y = library_conv(y, params[f"conv{i}_kernel"], 4 if causal else 2) + params[f"conv{i}_bias"][None, None]
            centred = y - y.mean(-1, keepdims=True)
            y = jax.nn.gelu(centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5), approximate=False)
        return y

    inside = np.arange(9)[None, :, None] < lengths[:, None, None]
    y = np.asarray(jax.jit(lambda x: module.apply({"params": params}, x, lengths, causal))(x))
    expected = np.asarray(reference(inside)) * inside
    np.testing.assert_allclose(y * inside, expected, atol=1e-5)  # float32 of values up to 3
    leaking = np.asarray(reference(np.ones_like(inside))) * inside
    assert (np.abs(leaking - y * inside)[1].max() > 0.01) == (not causal), "negative control: padding comes back in"


def test_the_kernels_of_a_stack_start_as_published():
    """U(-1/sqrt(fan in), 1/sqrt(fan in)) of kernels and biases."""
    module = ConvPositions(kernel=8, groups=2, depth=2)
    init = lambda: module.init(jax.random.key(0), jnp.zeros((1, 9, 32)), jnp.array([9]))["params"]  # noqa: E731
    for leaf in jax.tree.leaves(jax.jit(init)()):
        limit = 1 / np.sqrt(8 * 32 / 2)
        assert limit * 0.8 < np.abs(leaf).max() <= limit


def test_sinusoids_of_the_frame_number_within_the_utterance():
    ids = np.array([[1, 1, 1, 2, 2, 0, 3]], np.int32)
    x = np.zeros((1, 7, 6), np.float32)
    run = jax.jit(lambda n: SinusoidalPositions().apply({}, x, n))
    alone, packed = (np.asarray(run(n))[0] for n in (np.array([7], np.int32), ids))
    for t in range(7):
        for i, frequency in enumerate((1, 10000 ** (-1 / 3), 10000 ** (-2 / 3))):
            assert alone[t, i] == pytest.approx(np.sin(t * frequency), abs=1e-6)  # float32 angles up to 6
            assert alone[t, 3 + i] == pytest.approx(np.cos(t * frequency), abs=1e-6)
    np.testing.assert_array_equal(packed[[0, 1, 2, 3, 4, 6]], alone[[0, 1, 2, 0, 1, 0]])


def test_no_positions_are_zeros_without_parameters():
    module = POSITIONS["none"]()
    y, variables = module.init_with_output(jax.random.key(0), jnp.ones((1, 3, 4)), jnp.array([3]))
    assert not np.any(y)
    assert not variables


@pytest.mark.parametrize(
    ("module", "message"), [(ConvPositions(groups=5), "groups=5"), (SinusoidalPositions(), "even width")]
)
def test_widths_that_do_not_fit_are_named(module, message):
    x = jnp.zeros((1, 4, 7))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), x, jnp.array([4])))

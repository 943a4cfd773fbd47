"""The conformer layer: depthwise convolution and conv module against loops, packed rows, causality, sharding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from speechjax.errors import UserError
from speechjax.models.conformer import ConformerLayer, ConvModule, depthwise_conv

SHARED: dict[str, Any] = dict(
    heads=2, mlp=12, norm="pre", dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
    dtype=jnp.float32,
)  # fmt: skip


def layer_of(**changes: Any) -> ConformerLayer:
    return ConformerLayer(**(SHARED | dict(kernel=5) | changes))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def exact(params: Any) -> Any:
    return jax.tree.map(lambda p: np.asarray(p, np.float64), params)


def loops_depthwise(x: np.ndarray, kernel: np.ndarray, left: int, ids: np.ndarray) -> np.ndarray:
    """float64, one multiplication at a time; frames of other ids than one's own do not count."""
    out = np.zeros(x.shape)
    for b, t, k in np.ndindex(x.shape[0], x.shape[1], len(kernel)):
        s = t + k - left
        if 0 <= s < x.shape[1] and ids[b, s] == ids[b, t]:
            out[b, t] += x[b, s].astype(np.float64) * kernel[k]
    return out


@pytest.mark.parametrize(("K", "left"), [(5, 2), (4, 2), (5, 4), (9, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_depthwise_conv_and_its_gradients_equal_loops(K, left, packed):
    """Gradients: of sum(out * g) with respect to x and the kernel, from the same loops, since out is bilinear."""
    x, kernel, g = noise(2, 7, 3), noise(K, 3, seed=1), noise(2, 7, 3, seed=2)
    ids = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 1, 2, 2, 2, 2, 2]], np.int32)
    segments = ids if packed else None
    same = ids if packed else np.ones((2, 7), np.int32)
    out, back = jax.vjp(lambda x, w: depthwise_conv(x, w, left, segments), x, kernel)
    dx, dkernel = back(g)
    # float32 sums of nine products at most.
    np.testing.assert_allclose(out, loops_depthwise(x, kernel, left, same), atol=2e-6)
    by_x, by_kernel = np.zeros(x.shape), np.zeros(kernel.shape)
    for b, t, k in np.ndindex(2, 7, K):
        s = t + k - left
        if 0 <= s < 7 and same[b, s] == same[b, t]:
            by_x[b, s] += g[b, t] * kernel[k]
            by_kernel[k] += g[b, t] * x[b, s]
    np.testing.assert_allclose(dx, by_x, atol=2e-6)
    np.testing.assert_allclose(dkernel, by_kernel, atol=5e-6)  # sums of fourteen
    if packed:
        assert np.abs(out - loops_depthwise(x, kernel, left, np.ones_like(ids))).max() > 0.1, "negative control"


def test_depthwise_conv_equals_the_library():
    x, kernel = noise(2, 40, 6), noise(31, 6, seed=1)
    theirs = lax.conv_general_dilated(
        x, kernel[:, None], (1,), [(15, 15)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=6
    )
    np.testing.assert_allclose(depthwise_conv(x, kernel, 15), theirs, atol=1e-5)  # float32 sums of 31


def test_depthwise_conv_sums_in_float32():
    """bfloat16 sums of 31 terms would be off by a hundredth of the largest; only inputs and output are rounded."""
    x, kernel = jnp.asarray(noise(1, 200, 4) + 3, jnp.bfloat16), jnp.asarray(noise(31, 4, seed=1) + 1, jnp.bfloat16)
    wide = np.asarray(depthwise_conv(x.astype(jnp.float32), kernel.astype(jnp.float32), 15))
    ours = np.asarray(depthwise_conv(x, kernel, 15), np.float32)
    assert np.abs(ours / wide - 1).max() <= 2**-8, "one rounding to eight bits"


def test_sharded_batches_are_not_gathered():
    """Forward and backward over four devices: sums of the kernel's gradient are all that travels, and only once."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x, kernel, g = noise(4, 20, 8), noise(7, 8, seed=1), noise(4, 20, 8, seed=2)

    def step(x, kernel, g):
        return jax.vjp(lambda x, w: depthwise_conv(x, w, 3), x, kernel)[1](g)

    sharded = jax.jit(step, in_shardings=(rows, everywhere, rows), out_shardings=(rows, everywhere))
    program = sharded.lower(x, kernel, g).compile().as_text()
    assert "all-gather" not in program
    assert program.count(" all-reduce(") == 1
    ours, alone = sharded(x, kernel, g), jax.jit(step)(x, kernel, g)
    np.testing.assert_allclose(ours[0], alone[0], atol=1e-6)
    np.testing.assert_allclose(ours[1], alone[1], atol=1e-5)  # float32 sums in another order


def numpy_conv_module(x, p, left, norm, lengths, groups=2):
    """float64 with loops; `norm` "layer" or "group"."""
    h = dense(x, p["pointwise_in"])
    D = x.shape[-1]
    h = h[..., :D] * sigmoid(h[..., D:])
    inside = np.arange(x.shape[1])[None] < lengths[:, None]
    h = np.where(inside[..., None], h, 0)
    h = loops_depthwise(h, p["depthwise_kernel"], left, np.ones(x.shape[:2], int)) + p["depthwise_bias"]
    if norm == "layer":
        h = layer_norm(h, p["norm"])
    else:
        for b, n in enumerate(lengths):
            for c in range(0, D, D // groups):
                part = h[b, :n, c : c + D // groups]
                h[b, :n, c : c + D // groups] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
        h = h * p["norm"]["scale"] + p["norm"]["bias"]
    return dense(h * sigmoid(h), p["pointwise_out"])


@pytest.mark.parametrize(("norm", "causal", "kernel"), [("layer", False, 5), ("layer", True, 4), ("group", False, 4)])
def test_conv_module_equals_loops(norm, causal, kernel, random_params):
    x, lengths = noise(2, 9, 8), np.array([9, 6], np.int32)
    module = ConvModule(kernel, norm, causal, groups=2)
    params = random_params(module, x, lengths, False)
    ours = np.asarray(module.apply({"params": params}, x, lengths, False))
    left = kernel - 1 if causal else kernel // 2
    expected = numpy_conv_module(x.astype(np.float64), exact(params), left, norm, lengths)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(ours[row, :n], expected[row, :n], atol=1e-5)  # float32
    other = numpy_conv_module(x.astype(np.float64), exact(params), left - 1, norm, lengths)
    assert np.abs(other[0] - expected[0]).max() > 1e-2, "negative control: another alignment"


def test_layer_equals_the_equations(random_params):
    """Gulati et al. 2020, section 2.4, in float64; attention is one head's softmax, written out."""
    x, lengths = noise(2, 9, 8), np.array([9, 6], np.int32)
    layer = layer_of(heads=1)
    params = random_params(layer, x, lengths, False)
    ours, mlp = jax.jit(lambda x, n: layer.apply({"params": params}, x, n, False))(x, lengths)
    p = exact(params)

    def feed_forward(y, name):
        h = dense(layer_norm(y, p[f"{name}_norm"]), p[f"{name}_up"])
        return dense(h * sigmoid(h), p[f"{name}_down"])

    for row, n in enumerate(lengths):
        y = x[row, :n].astype(np.float64)
        y = y + 0.5 * feed_forward(y, "mlp1")
        h = layer_norm(y, p["attention_norm"])
        q, k, v = (dense(h, p["attention"][name]) for name in ("query", "key", "value"))
        weights = np.exp(q @ k.T / np.sqrt(8))
        y = y + dense(weights / weights.sum(-1, keepdims=True) @ v, p["attention"]["out"])
        y = y + numpy_conv_module(layer_norm(y, p["conv_norm"])[None], p["conv"], 2, "layer", np.array([n]))[0]
        branch = feed_forward(y, "mlp2")
        np.testing.assert_allclose(mlp[row, :n], branch, atol=2e-5)  # float32
        np.testing.assert_allclose(ours[row, :n], layer_norm(y + 0.5 * branch, p["norm"]), atol=5e-5)


@pytest.mark.parametrize("conv_norm", ["layer", "group"])
def test_padding_does_not_leak(conv_norm, random_params):
    """The layers before leave biases in the padding: whatever stands there, valid frames are the same."""
    x, lengths = noise(3, 12, 32), np.array([12, 7, 0], np.int32)
    layer = layer_of(conv_norm=conv_norm)
    params = random_params(layer, x, lengths, False)
    run = jax.jit(lambda x: layer.apply({"params": params}, x, lengths, False)[0])
    inside = np.arange(12)[None] < lengths[:, None]
    other = np.where(inside[..., None], x, 7 * x[::-1] + 3)
    np.testing.assert_array_equal(run(x)[inside], run(other)[inside])
    assert np.isfinite(run(other)).all()
    longer = jax.jit(lambda x: layer.apply({"params": params}, x, np.array([12, 8, 0], np.int32), False)[0])
    assert np.abs(longer(x) - run(x))[1, :7].max() > 1e-3, "negative control: one more valid frame"


@pytest.mark.parametrize("positions", ["none", "relative"])
def test_a_packed_segment_is_as_alone(positions, random_params):
    ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 3, 3, 3, 3]], np.int32)
    x = noise(1, 12, 8)
    layer = layer_of(attention=dict(positions=positions))
    params = random_params(layer, x, ids, False)
    run = jax.jit(lambda x, n: layer.apply({"params": params}, x, n, False)[0])
    packed = np.asarray(run(x, ids))[0]
    whole = np.asarray(run(x, np.array([12], np.int32)))[0]
    for g in (1, 2, 3):
        own = ids[0] == g
        alone = np.zeros_like(x)
        alone[0, : own.sum()] = x[0, own]
        expected = np.asarray(run(alone, np.array([own.sum()], np.int32)))[0, : own.sum()]
        np.testing.assert_allclose(packed[own], expected, atol=2e-6)  # float32 sums at another place
        assert np.abs(whole[own] - expected).max() > 1e-2, "negative control: one utterance"


def test_chunks_see_no_later_chunk(random_params):
    """Attention in chunks of 4, and a convolution that looks back only: frames before a chunk ignore it."""
    x, lengths = noise(1, 12, 8), np.array([12], np.int32)
    later = x.copy()
    later[:, 8:] = noise(1, 4, 8, seed=5)
    for chunk, leaks in ((4, False), (0, True)):
        layer = layer_of(attention=dict(positions="none", chunk=chunk))
        params = random_params(layer, x, lengths, False)
        run = jax.jit(lambda x, layer=layer, params=params: layer.apply({"params": params}, x, lengths, False)[0])
        change = np.abs(run(later) - run(x))[0, :8].max()
        assert change > 1e-3 if leaks else change == 0


def test_dropout_and_layerdrop_only_in_training(random_params):
    x, lengths = noise(1, 12, 8), np.array([12], np.int32)
    layer = layer_of(dropout=0.3, activation_dropout=0.3, attention_dropout=0.3, layerdrop=0.5)
    params = random_params(layer, x, lengths, False)

    @jax.jit
    def trained(key):
        rngs = {"dropout": jax.random.fold_in(key, 0), "layerdrop": jax.random.fold_in(key, 1)}
        return layer.apply({"params": params}, x, lengths, True, rngs=rngs)[0]

    drawn = [np.asarray(trained(jax.random.key(i))) for i in range(12)]
    dropped = [np.array_equal(y, x) for y in drawn]
    assert 0 < sum(dropped) < 12
    kept = [y for y, d in zip(drawn, dropped, strict=True) if not d]
    assert np.abs(kept[0] - kept[1]).max() > 1e-2
    plain = layer_of()
    ours, expected = (f.apply({"params": params}, x, lengths, False)[0] for f in (layer, plain))
    np.testing.assert_array_equal(ours, expected)


def test_bfloat16_stays_close(random_params):
    x, lengths = noise(2, 40, 16), np.array([40, 25], np.int32)
    params = random_params(layer_of(), x, lengths, False)

    def run(dtype):
        return layer_of(dtype=dtype).apply({"params": params}, x.astype(dtype), lengths, False)[0]

    both = jax.jit(lambda: (run(jnp.float32), run(jnp.bfloat16)))()
    wide, narrow = both[0], np.asarray(both[1], np.float32)
    assert both[1].dtype == jnp.bfloat16
    error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
    assert 1e-4 < error < 0.02  # eight bits


@pytest.mark.parametrize(("scan", "remat"), [(False, False), (True, True)])
def test_an_encoder_of_conformers(tiny_encoder, random_params, scan, remat):
    """Front end, stack and hidden states; finite gradients for every parameter."""
    encoder = tiny_encoder(
        block=dict(name="conformer", kernel=7), norm="pre", positions=dict(name="none"),
        attention=dict(positions="relative"), scan=scan, remat=remat,
    )  # fmt: skip
    batch = dict(audio=noise(2, 800) * 0.1, lengths=np.array([800, 500], np.int32))
    params = random_params(encoder, batch)

    @jax.jit
    @jax.grad
    def gradients(params):
        encoded = encoder.apply({"params": params}, batch, hidden=True)
        assert len(encoded.hidden) == 3
        return jnp.sum(encoded.frames * jnp.cos(encoded.hidden[1]))

    for path, g in jax.tree_util.tree_flatten_with_path(gradients(params))[0]:
        if path[0].key != "mask_embedding":
            assert 0 < np.abs(g).max() < np.inf, path


@pytest.mark.parametrize(
    ("changes", "lengths", "message"),
    [
        (dict(norm="post"), [5], r"config\.model\.norm='post'.*'pre'"),
        (dict(conv_norm="rms"), [5], r"conv_norm='rms'.*'layer', 'group' or 'batch'"),
        (dict(conv_norm="group"), [[1, 1, 1, 2, 2]], r"conv_norm='group'.*packed row.*'layer'"),
        (dict(conv_norm="group", attention=dict(chunk=2)), [5], r"conv_norm='group'.*look ahead.*'layer'"),
        (dict(conv_norm="group"), [5], r"width=8.*16 groups"),
    ],
)
def test_mistakes_are_named(changes, lengths, message):
    with pytest.raises(UserError, match=message):
        layer_of(**changes).init(jax.random.key(0), noise(1, 5, 8), np.array(lengths, np.int32), False)

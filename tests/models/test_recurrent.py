"""The GRU layer against its equations, frame by frame, and against PyTorch's convention by way of Flax's cell."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.models.recurrent import GRULayer, gru

SHARED: dict[str, Any] = dict(
    heads=1, mlp=1, norm="pre", dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
    dtype=jnp.float32,
)  # fmt: skip


def layer_of(**changes: Any) -> GRULayer:
    return GRULayer(**(SHARED | changes))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loops_gru(x: np.ndarray, p: Any) -> np.ndarray:
    """One utterance [T, D] in float64."""
    D, h, out = x.shape[-1], np.zeros(x.shape[-1]), []
    for frame in x.astype(np.float64):
        a = frame @ p["input"]["kernel"] + p["input"]["bias"]
        u = h @ p["kernel"]
        r, z = sigmoid(a[:D] + u[:D]), sigmoid(a[D : 2 * D] + u[D : 2 * D])
        n = np.tanh(a[2 * D :] + r * (u[2 * D :] + p["bias"]))
        h = (1 - z) * n + z * h
        out.append(h)
    return np.array(out).reshape(x.shape)


@pytest.fixture(scope="module")
def params(random_params):
    drawn = random_params(layer_of(), noise(2, 9, 6), np.array([9, 6], np.int32), False)
    return jax.tree.map(lambda p: 2 * p, drawn)  # gates far from a half


@pytest.fixture(scope="module")
def run(params):
    return jax.jit(lambda x, lengths: layer_of().apply({"params": params}, x, lengths, False))


def test_layer_equals_the_equations(run, params):
    x, lengths = noise(3, 9, 6), np.array([9, 6, 0], np.int32)
    y, states = run(x, lengths)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for row, n in enumerate(lengths):
        expected = loops_gru(x[row, :n], exact)
        np.testing.assert_allclose(states[row, :n], expected, atol=2e-6)  # float32, nine steps
        np.testing.assert_allclose(y[row, :n], expected + x[row, :n], atol=2e-6)
        assert (np.asarray(y)[row, n:] == 0).all()


def test_recurrence_equals_the_library(params):
    """Flax's cell has the same equations, with one matrix for each gate; values and gradients."""
    x, g, D = noise(2, 9, 6), noise(2, 9, 6, seed=1), 6
    first = np.arange(9)[None].repeat(2, 0) == 0

    def ours(params, x):
        projected = x @ params["input"]["kernel"] + params["input"]["bias"][None, None]
        return gru(projected, params["kernel"], params["bias"], first)

    def theirs(params, x):
        gates = {}
        for i, gate in enumerate("rzn"):
            part = slice(i * D, (i + 1) * D)
            gates[f"i{gate}"] = dict(kernel=params["input"]["kernel"][:, part], bias=params["input"]["bias"][part])
            gates[f"h{gate}"] = dict(kernel=params["kernel"][:, part])
        gates["hn"]["bias"] = params["bias"]
        state, out = jnp.zeros((2, D)), []
        for t in range(9):
            state, y = nn.GRUCell(D).apply({"params": gates}, state, x[:, t])
            out.append(y)
        return jnp.stack(out, axis=1)

    def both(params, x):
        return [jax.value_and_grad(lambda p, x, f=f: jnp.sum(f(p, x) * g), (0, 1))(params, x) for f in (ours, theirs)]

    a, b = jax.jit(both)(params, x)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, atol=2e-5)  # float32 sums over eighteen frames


def test_a_frame_sees_none_after_it(run):
    x, lengths = noise(1, 9, 6), np.array([9], np.int32)
    later = x.copy()
    later[:, 5:] += 1
    change = np.abs(run(later, lengths)[0] - run(x, lengths)[0])[0]
    assert (change[:5] == 0).all()
    assert (change[5:] > 0).all(), "negative control"


def test_padding_does_not_leak(run):
    x, lengths = noise(2, 9, 6), np.array([9, 4], np.int32)
    inside = np.arange(9)[None] < lengths[:, None]
    other = np.where(inside[..., None], x, 9.0).astype(np.float32)
    np.testing.assert_array_equal(run(other, lengths)[0], run(x, lengths)[0])


def test_a_packed_segment_starts_anew(run):
    ids = np.array([[1, 1, 1, 2, 2, 0, 3, 3, 3]], np.int32)
    x = noise(1, 9, 6)
    packed = np.asarray(run(x, ids)[0])[0]
    whole = np.asarray(run(x, np.array([9], np.int32))[0])[0]
    assert (packed[5] == 0).all()
    for g in (1, 2, 3):
        own = ids[0] == g
        alone = np.zeros_like(x)
        alone[0, : own.sum()] = x[0, own]
        expected = np.asarray(run(alone, np.array([own.sum()], np.int32))[0])[0, : own.sum()]
        np.testing.assert_allclose(packed[own], expected, atol=1e-6)  # the same float32 operations
        if g > 1:
            assert np.abs(whole[own] - expected).max() > 1e-2, "negative control: the state runs on"


def test_bfloat16_state_does_not_drift(params):
    """Over 400 frames: the state is float32, so only products are rounded, and errors do not add up."""
    x, lengths = noise(2, 400, 6), np.array([400, 400], np.int32)

    def states(dtype):
        return layer_of(dtype=dtype).apply({"params": params}, x.astype(dtype), lengths, False)[1]

    wide, narrow = jax.jit(lambda: (states(jnp.float32), states(jnp.bfloat16)))()
    assert narrow.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(narrow, np.float32) - wide, axis=(0, 2)) / np.linalg.norm(wide, axis=(0, 2))
    assert error[-100:].mean() < 0.03  # eight bits, through gates
    assert error[-100:].mean() < 3 * error[:100].mean()


def test_dropout_and_layerdrop_only_in_training(params):
    x, lengths = noise(1, 9, 6), np.array([9], np.int32)
    layer = layer_of(dropout=0.5, layerdrop=0.5)

    @jax.jit
    def trained(key):
        rngs = {"dropout": jax.random.fold_in(key, 0), "layerdrop": jax.random.fold_in(key, 1)}
        return layer.apply({"params": params}, x, lengths, True, rngs=rngs)

    quiet = np.asarray(layer.apply({"params": params}, x, lengths, False)[0])
    np.testing.assert_array_equal(quiet, layer_of().apply({"params": params}, x, lengths, False)[0])
    outcomes = set()
    for i in range(12):
        y, states = (np.asarray(a) for a in trained(jax.random.key(i)))
        if np.array_equal(y, x):
            outcomes.add("dropped")
            continue
        outcomes.add("kept")
        zeroed = np.isclose(y, x, atol=0)
        assert 0.2 < zeroed.mean() < 0.8
        # What is kept is doubled; float32, with x added and taken off again.
        np.testing.assert_allclose((y - x)[~zeroed], 2 * states[~zeroed], atol=1e-6)
    assert outcomes == {"dropped", "kept"}


def test_an_encoder_of_grus(tiny_encoder, random_params):
    """Scanned and not, with hidden states: the same numbers, finite gradients for every parameter."""
    batch = dict(audio=noise(2, 800) * 0.1, lengths=np.array([800, 500], np.int32))
    settings: dict[str, Any] = dict(block=dict(name="gru"), norm="pre", positions=dict(name="none"))
    plain, scanned = tiny_encoder(**settings), tiny_encoder(scan=True, **settings)
    params = random_params(plain, batch)
    stack = params["transformer"]
    layers = [stack[f"layer{i}"] for i in range(2)]
    rest = {name: p for name, p in stack.items() if not name.startswith("layer")}
    stacked = params | {"transformer": rest | {"layers": jax.tree.map(lambda *p: jnp.stack(p), *layers)}}

    def run(encoder, params):
        encoded = encoder.apply({"params": params}, batch, hidden=True)
        return jnp.sum(encoded.frames * jnp.cos(encoded.hidden[1])), encoded.hidden

    (_, states), grads = jax.jit(jax.value_and_grad(lambda p: run(plain, p), has_aux=True))(params)
    _, others = jax.jit(lambda p: run(scanned, p))(stacked)
    for a, b in zip(states, others, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # float32, compiled otherwise
    assert len(states) == 3
    for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]:
        if path[0].key != "mask_embedding":
            assert 0 < np.abs(g).max() < np.inf, path

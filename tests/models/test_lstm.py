"""LSTM layers and blocks: lengths, packed rows, chunks, options.  Their numbers against PyTorch's: tests/golden."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax import presets
from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.models.recurrent import LSTM, BiLSTM, BLSTMLayer, last_frames
from speechjax.models.transformer import BLOCKS

SHARED: dict[str, Any] = dict(
    heads=1, mlp=1, norm="none", dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
    dtype=jnp.float32,
)  # fmt: skip
T, D = 12, 6
LENGTHS = np.array([12, 7, 0], np.int32)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "projected": dict(hidden=5),
    "residual": dict(residual=True),
    "forwards": dict(bidirectional=False),
    "chunks": dict(attention=dict(chunk=4)),
}


def layer_of(**changes: Any) -> BLSTMLayer:
    return BLSTMLayer(**(SHARED | changes))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def runner(random_params):
    """(**options) -> x, lengths -> (output, branch), as arrays; the parameters depend on shapes alone."""
    made: dict[str, Any] = {}

    def build(**options: Any):
        if (key := repr(options)) not in made:
            layer: Any = layer_of(**options)
            params = random_params(layer, noise(3, T, D), LENGTHS, False)
            params = jax.tree.map(lambda p: 2 * p, params)  # gates far from a half
            made[key] = jax.jit(lambda x, n: layer.apply({"params": params}, x, n, False))
        run = made[key]
        return lambda x, n: [np.asarray(a) for a in run(x, np.asarray(n, np.int32))]

    return build


def test_the_registry_knows_it():
    assert BLOCKS["blstm"] is BLSTMLayer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padding_changes_nothing_and_is_zero(runner, options):
    run, x = runner(**options), noise(3, T, D)
    inside = np.arange(T) < LENGTHS[:, None]
    noisy = np.where(inside[..., None], x, 50 * noise(3, T, D, seed=1))
    for a, b in zip(run(x, LENGTHS), run(noisy, LENGTHS), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a[~inside] == 0).all()
        assert np.abs(a[inside]).max() > 0.1
    y, _ = run(x, LENGTHS)
    np.testing.assert_allclose(y[1, :7], run(x[1:2, :7], [7])[0][0], atol=1e-6)  # the same float32 operations
    assert np.abs(run(np.where(inside[..., None], x + 1, x), LENGTHS)[0] - y)[inside].max() > 0.1, "negative control"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_packed_segment_is_as_alone(runner, options):
    ids = np.array([[1, 1, 1, 2, 2, 0, 3, 3, 3, 3, 3, 3]], np.int32)
    run, x = runner(**options), noise(1, T, D)
    packed, whole = run(x, ids)[0][0], run(x, [T])[0][0]
    assert (packed[5] == 0).all()
    for g in (1, 2, 3):
        own = ids[0] == g
        alone = noise(1, T, D, seed=9)
        alone[0, : own.sum()] = x[0, own]
        expected = run(alone, [own.sum()])[0][0, : own.sum()]
        np.testing.assert_allclose(packed[own], expected, atol=1e-6)  # the same float32 operations
        if g == 2:
            assert np.abs(whole[own] - expected).max() > 1e-2, "negative control: without ids they mix"


def reach(run, frame: int) -> list[int]:
    """The frames whose output changes with that frame's input."""
    x = noise(1, T, D)
    other = x.copy()
    other[0, frame] += 1
    return np.flatnonzero(np.abs(run(other, [T])[0] - run(x, [T])[0]).max(axis=(0, 2))).tolist()


def test_who_sees_whom(runner):
    everything = list(range(T))
    assert reach(runner(), 5) == everything
    assert reach(runner(bidirectional=False), 5) == everything[5:]
    assert reach(runner(attention=dict(chunk=4)), 5) == everything[4:], "its chunk and all later ones"
    assert reach(runner(attention=dict(chunk=1)), 5) == everything[5:]
    assert reach(runner(bidirectional=False, attention=dict(chunk=4)), 5) == everything[5:]


def test_ends_of_utterances_and_chunks():
    found = lambda lengths, chunk: np.asarray(last_frames(jnp.array(lengths), 6, chunk)).astype(int).tolist()  # noqa: E731
    assert found([6, 4, 0], 0) == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0], [0] * 6]
    assert found([[1, 1, 0, 2, 2, 2]], 0)[0][:2] == [0, 1]
    assert found([[1, 1, 0, 2, 2, 2]], 0)[0][3:] == [0, 0, 1]
    assert found([[0, 2, 2, 2, 2, 2]], 2)[0][1:] == [0, 1, 0, 1, 1], "chunks count from the start of a segment"


def test_options_are_what_they_say(runner, random_params):
    """Output and branch of every option, from the plain LSTM inside."""
    x, lengths = noise(3, T, D), np.array([T, T, T], np.int32)
    params = random_params(layer_of(hidden=5), x, lengths, False)

    def layer(**options):
        own = params if options.get("hidden") else {"lstm": params_of(options.get("bidirectional", True))}
        return jax.jit(lambda: layer_of(**options).apply({"params": own}, x, lengths, False))()

    def params_of(both: bool):
        return random_params(LSTM(D // (1 + both), both), x, lengths)

    def inside(both: bool, params, H):
        return jax.jit(lambda: LSTM(H, both).apply({"params": params}, x, lengths))()

    y, branch = layer()
    np.testing.assert_array_equal(y, branch)
    np.testing.assert_allclose(y, inside(True, params_of(True), 3), atol=1e-6)  # the same operations, compiled apart
    y, residual_branch = layer(residual=True)
    np.testing.assert_array_equal(residual_branch, branch)
    np.testing.assert_allclose(y, x + branch, atol=1e-6)
    states = inside(True, params["lstm"], 5)
    assert states.shape == (3, T, 10)
    y, _ = layer(hidden=5)
    expected = states @ params["output"]["kernel"] + params["output"]["bias"][None, None]
    np.testing.assert_allclose(y, expected, atol=1e-5)  # float32 sums of ten
    np.testing.assert_allclose(layer(bidirectional=False)[0], inside(False, params_of(False), D), atol=1e-6)


def test_forget_gates_start_open():
    for both in (True, False):
        module, given = LSTM(4, both), (noise(1, 3, D), np.array([3], np.int32))
        params = jax.jit(lambda key, module=module, given=given: module.init(key, *given))(jax.random.key(0))["params"]
        bias = np.asarray(params["input"]["bias"]).reshape(1 + both, 4, 4)  # direction, gate, unit
        assert (bias[:, 1] == 1).all()
        assert (bias[:, [0, 2, 3]] == 0).all()
        assert 0 < np.abs(params["kernel"]).max() <= 0.5, "PyTorch's 1 / sqrt(hidden)"


def test_bfloat16_state_does_not_drift(random_params):
    """Over 400 frames: the cell is float32, so only products are rounded, and errors do not add up."""
    x, lengths = noise(2, 400, D), np.array([400, 400], np.int32)
    params = jax.tree.map(lambda p: 2 * p, random_params(LSTM(4), x, lengths))
    run = lambda dtype: LSTM(4, dtype=dtype).apply({"params": params}, x.astype(dtype), lengths)  # noqa: E731
    wide, narrow = jax.jit(lambda: (run(jnp.float32), run(jnp.bfloat16)))()
    assert narrow.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(narrow, np.float32) - wide, axis=(0, 2)) / np.linalg.norm(wide, axis=(0, 2))
    assert error.mean() < 0.03  # eight bits, through gates
    assert error[150:250].mean() < 3 * error[:50].mean()


def test_dropout_and_layerdrop_only_in_training(random_params):
    x, lengths = noise(1, T, D), np.array([T], np.int32)
    layer = layer_of(dropout=0.5, layerdrop=0.5)
    params = random_params(layer, x, lengths, False)

    @jax.jit
    def trained(key):
        rngs = {"dropout": jax.random.fold_in(key, 0), "layerdrop": jax.random.fold_in(key, 1)}
        return layer.apply({"params": params}, x, lengths, True, rngs=rngs)

    quiet = jax.jit(lambda: [of.apply({"params": params}, x, lengths, False)[0] for of in (layer, layer_of())])()
    np.testing.assert_array_equal(*quiet)
    outcomes = set()
    for i in range(12):
        y, states = (np.asarray(a) for a in trained(jax.random.key(i)))
        if np.array_equal(y, x):
            outcomes.add("dropped")
            continue
        outcomes.add("kept")
        assert 0.2 < (y == 0).mean() < 0.8
        np.testing.assert_allclose(y[y != 0], 2 * states[y != 0], atol=1e-6)  # what is kept is doubled
    assert outcomes == {"dropped", "kept"}


def test_a_head_of_two_layers(random_params):
    """Width of both directions; dropout after each layer, in training only."""
    head, x, lengths = BiLSTM(2, 4, dropout=0.5), noise(2, T, D), np.array([T, 5], np.int32)
    params = random_params(head, x, lengths)

    @jax.jit
    def run():
        one = LSTM(4).apply({"params": params["layer0"]}, x, lengths)
        two: Any = LSTM(4).apply({"params": params["layer1"]}, one, lengths)
        dropped = head.apply({"params": params}, x, lengths, True, rngs={"dropout": jax.random.key(0)})
        return head.apply({"params": params}, x, lengths), two, dropped

    y, two, dropped = run()
    assert y.shape == (2, T, 8)
    assert (np.asarray(y)[1, 5:] == 0).all()
    np.testing.assert_allclose(y, two, atol=1e-6)  # the same operations
    assert 0.2 < (np.asarray(dropped)[0] == 0).mean() < 0.8


def test_an_odd_width_is_refused():
    with pytest.raises(UserError, match=r"config\.model\.width=7 is odd"):
        jax.eval_shape(lambda: layer_of().init(jax.random.key(0), noise(1, 3, 7), jnp.array([3]), False))


@pytest.mark.parametrize("scan", [False, True])
def test_an_encoder_of_them_learns_in_every_parameter(scan, random_params):
    model: dict[str, Any] = presets.bilstm("tiny") | dict(width=8, scan=scan, remat=scan)
    encoder: Any = SpeechEncoder(**model)
    batch = dict(audio=noise(2, 2000) * 0.1, lengths=np.array([2000, 1300], np.int32))
    params = random_params(encoder, batch)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        encoded = encoder.apply({"params": params}, batch, hidden=True)
        assert len(encoded.hidden) == 3
        return jnp.sum(jnp.square(encoded.frames))

    value, gradients = loss(params)
    assert np.isfinite(value)
    for path, g in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        if path[0].key != "mask_embedding":
            assert 0 < np.abs(g).max() < np.inf, path


def test_base_has_the_published_size():
    """Closed form, and Graves et al. 2013, table 1: 6.8 M weights of which peepholes and 123 inputs are not here."""
    model = presets.bilstm()
    encoder = SpeechEncoder(**model)
    batch = dict(audio=jnp.zeros((1, 1600), jnp.int16), lengths=jnp.array([1600], jnp.int32))
    shapes: Any = jax.eval_shape(lambda: encoder.init(jax.random.key(0), batch))["params"]
    count = lambda tree: sum(int(np.prod(p.shape)) for p in jax.tree.leaves(tree))  # noqa: E731
    W, H, F = 500, 250, 40
    layer = 2 * 4 * H * (W + H + 1)
    assert count(shapes["transformer"]) == 5 * layer
    assert count(shapes) == 5 * layer + 2 * F + W * (F + 1) + W  # feature norm, projection, mask embedding
    published = 2 * 4 * H * (123 + H + 1) + 4 * layer + 5 * 2 * 3 * H + 62 * (W + 1)
    assert abs(published - 6.8e6) < 0.05e6
    assert abs(count(shapes) / published - 1) < 0.12

"""The transformer stack: scan, recomputation, layer drop, dropout."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.models.transformer import Transformer

B, T, D = 3, 9, 16
LENGTHS = jnp.array([9, 5, 0], jnp.int32)
X = jax.random.normal(jax.random.key(0), (B, T, D))


def make(**settings) -> Transformer:
    tiny: dict[str, Any] = dict(
        layers=2, heads=2, mlp=24, norm="post", positions=dict(kernel=4, groups=2), dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, scan=False, remat=False, dtype=jnp.float32,
    )  # fmt: skip
    return Transformer(**(tiny | settings))


@pytest.fixture(scope="module")
def params(random_params):
    """Unrolled; the same tree for both norms."""
    return random_params(make(), X, LENGTHS, train=False)


def stacked(params):
    """Unrolled layers `layer0`, `layer1` as the one stacked `layers` of a scan."""
    rest = {name: p for name, p in params.items() if not name.startswith("layer")}
    return rest | {"layers": jax.tree.map(lambda *p: np.stack(p), params["layer0"], params["layer1"])}


@functools.cache
def compiled(**settings):
    def loss(params):
        model: Any = make(**settings)
        frames, hidden = model.apply({"params": params}, X, LENGTHS, train=True, hidden=True)
        return jnp.sum(jnp.sin(3 * frames)) + jnp.sum(jnp.cos(3 * hidden[1])), (frames, hidden)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def outputs_and_gradient(params, **settings):
    (_, out), gradient = compiled(**settings)(params)
    return jax.tree.map(np.asarray, (out, gradient))


def worst(a, b) -> float:
    """Largest difference of two trees, each leaf relative to its own largest value, or to one."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / max(1, np.abs(x).max())) for x, y in pairs)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_scan_and_remat_change_nothing(params, norm):
    out, gradient = outputs_and_gradient(params, norm=norm)
    reference = (out, stacked(gradient))
    scanned = outputs_and_gradient(stacked(params), norm=norm, scan=True, remat=norm == "pre")
    # Compiled otherwise, so float32 rounds otherwise.
    assert worst(reference, scanned) < 1e-5
    if norm == "post":
        out, gradient = outputs_and_gradient(params, norm=norm, remat=True)
        assert worst(reference, (out, stacked(gradient))) < 1e-5
        swapped = params | {"layer0": params["layer1"], "layer1": params["layer0"]}
        wrong = outputs_and_gradient(stacked(swapped), norm=norm, scan=True, remat=False)
        assert worst(reference[0], wrong[0]) > 0.1, "negative control: the order of the layers"


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_mlp_outputs_are_what_enters_the_residual_sum(params, norm):
    """One a layer, as the last product of the branch gives them: before dropout and sum, scanned or not."""
    settings: dict[str, Any] = dict(norm=norm, dropout=0.4)

    def run(params, hidden, capture=False, train=False, **more):
        model: Any = make(**settings, **more)
        kept = dict(capture_intermediates=lambda m, _: m.name == "mlp_down", mutable="intermediates")
        rngs = {"dropout": jax.random.key(0)}
        args: dict[str, Any] = dict(train=train, hidden=hidden, rngs=rngs, **(kept if capture else {}))
        return model.apply({"params": params}, X, LENGTHS, **args)

    (frames, states), seen = jax.jit(functools.partial(run, hidden="mlp", capture=True, train=True))(params)
    assert len(states) == 2
    inside = np.arange(T)[None, :, None] < np.asarray(LENGTHS)[:, None, None]
    for i, state in enumerate(states):
        product = np.asarray(seen["intermediates"][f"layer{i}"]["mlp_down"]["__call__"][0])
        np.testing.assert_array_equal(state, np.where(inside, product, 0))
        assert np.abs(state).max() > 0.1
    assert np.isfinite(frames).all()

    outputs, mlps = (jax.jit(functools.partial(run, hidden=h))(params)[1] for h in (True, "mlp"))
    assert len(outputs) == 3
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(outputs[1:], mlps, strict=True)), "negative control"
    for more in (dict(scan=True), dict(scan=True, remat=True)):
        scanned = jax.jit(functools.partial(run, hidden="mlp", **more))(stacked(params))[1]
        assert worst(mlps, scanned) < 1e-5  # compiled otherwise, so float32 rounds otherwise
    scanned = jax.jit(functools.partial(run, hidden=True, scan=True))(stacked(params))[1]
    assert worst(outputs, scanned) < 1e-5
    if norm == "pre":
        # Branch by branch: the output less the MLP branch is the input plus what attention gave.
        before = np.asarray(outputs[2]) - np.asarray(mlps[1])
        normed = (before - before.mean(-1, keepdims=True)) / np.sqrt(before.var(-1, keepdims=True) + 1e-5)
        p = jax.tree.map(np.asarray, params["layer1"])
        up = normed * p["mlp_norm"]["scale"] + p["mlp_norm"]["bias"]
        up = np.asarray(jax.nn.gelu(up @ p["mlp_up"]["kernel"] + p["mlp_up"]["bias"], approximate=False))
        expected = up @ p["mlp_down"]["kernel"] + p["mlp_down"]["bias"]
        np.testing.assert_allclose(np.where(inside, expected, 0), mlps[1], atol=1e-4)  # float32; a norm amplifies


def test_layers_of_a_scan_start_differently():
    init = lambda: make(scan=True).init(jax.random.key(0), X, LENGTHS, train=False)["params"]["layers"]  # noqa: E731
    kernel = np.asarray(jax.jit(init)()["mlp_up"]["kernel"])
    assert kernel.shape == (2, D, 24)
    assert kernel.std() == pytest.approx(0.02, rel=0.1)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.02


@pytest.mark.parametrize("scan", [False, True])
def test_layerdrop_skips_layers_of_the_whole_batch(params, scan):
    """Two layers at one half: over many keys exactly four outcomes; a dropped layer is the identity."""
    tree = stacked(params) if scan else params
    apply = lambda train, seed: make(layerdrop=0.5, scan=scan).apply(  # noqa: E731
        {"params": tree}, X, LENGTHS, train=train, hidden=True, rngs={"layerdrop": jax.random.key(seed)}
    )
    run = jax.jit(apply, static_argnums=0)
    outcomes = set()
    for seed in range(24):
        states = [np.asarray(h)[:2] for h in run(True, seed)[1]]
        changed = [(a != b).any(axis=(1, 2)) for a, b in itertools.pairwise(states)]
        assert all(c[0] == c[1] for c in changed), "rows of a batch differ in the layers they drop"
        outcomes.add(tuple(bool(c[0]) for c in changed))
    assert len(outcomes) == 4  # P(one is missing) < 4 (3/4)^24 = 0.4 %, and the keys are fixed
    if not scan:
        states = [np.asarray(h) for h in run(False, 0)[1]]
        assert all((a != b).any() for a, b in itertools.pairwise(states)), "evaluation drops nothing"


def test_layerdrop_of_one_makes_the_stack_the_identity(params):
    rngs = {"layerdrop": jax.random.key(0)}
    run = lambda p: make(layerdrop=1.0).apply({"params": p}, X, LENGTHS, train=True, hidden=True, rngs=rngs)  # noqa: E731
    frames, hidden = jax.jit(run)(params)
    for state in [frames, *hidden[1:]]:
        np.testing.assert_array_equal(state, hidden[0])


def test_dropout_follows_the_key(params):
    model = make(layers=1, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)
    run = jax.jit(
        lambda seed: model.apply({"params": params}, X, LENGTHS, train=True, rngs={"dropout": jax.random.key(seed)})
    )
    first, again, other = (np.asarray(run(seed)[0]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("dropout", {(B, T, D): 1 + 2 * 2}),  # after the positions, and after both branches of a layer
        ("attention_dropout", {(B, 2, T, T): 2}),
        ("activation_dropout", {(B, T, 24): 2}),
    ],
)
def test_where_each_dropout_acts_in_training_only(params, name, shapes):
    def draws(train):
        jaxpr = jax.make_jaxpr(
            lambda: make(**{name: 0.1}).apply(
                {"params": params}, X, LENGTHS, train=train, rngs={"dropout": jax.random.key(0)}
            )
        )()
        found = {}
        for equation in _equations(jaxpr.jaxpr):
            if equation.primitive.name == "random_bits":
                shape = tuple(equation.params["shape"])
                found[shape] = found.get(shape, 0) + 1
        return found

    assert draws(True) == shapes
    assert draws(False) == {}


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_unknown_norm_is_named():
    with pytest.raises(UserError, match=r"'rms'.*'post' or 'pre'"):
        jax.eval_shape(lambda: make(norm="rms").init(jax.random.key(0), X, LENGTHS, train=False))

"""The optimizer against closed forms and against AdamW written out in numpy."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from speechjax import config
from speechjax.errors import UserError
from speechjax.optim import detach, make_optimizer, schedule
from speechjax.paths import path_name
from speechjax.step import init_state
from tests.tasks.experiments import make_batch

REPO = Path(__file__).resolve().parent.parent
ADAM = dict(b1=0.9, b2=0.98, eps=1e-6)


@pytest.fixture(autouse=True)
def _optax_promotes():
    """optax's own Adam takes a float to the power of an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def expected_rate(step, peak, warmup, steps):
    if step < warmup:
        return peak * step / warmup
    return peak * max(steps - step, 0) / (steps - warmup)


def values(rate, *steps):
    return [np.asarray(rate(step)).item() for step in steps]


@pytest.mark.parametrize("step", [0, 1, 50, 99, 100, 101, 550, 999, 1000, 2000])
def test_schedule_is_two_straight_lines(step):
    rate = values(schedule(learning_rate=3e-3, warmup=100, steps=1000), step)
    # float32 rounds a handful of operations on numbers of the size of the peak
    np.testing.assert_allclose(rate, [expected_rate(step, 3e-3, 100, 1000)], rtol=1e-6, atol=3e-3 * 1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    rate = schedule(learning_rate=1.0, warmup=0, steps=10)
    np.testing.assert_allclose(values(rate, 0, 5, 10), [1.0, 0.5, 0.0], rtol=1e-6)


def test_schedule_of_a_run_shorter_than_its_warmup_only_rises():
    rate = schedule(learning_rate=1.0, warmup=100, steps=10)
    np.testing.assert_allclose(values(rate, 0, 5, 10), [0.0, 0.05, 0.1], rtol=1e-6)


def test_published_base_recipe():
    """Section 4.2 of the paper: Adam, peak 5e-4, warm-up over 8 % of 400 k updates, then linearly to zero."""
    base: Any = config.load(f"{REPO}/configs/pretrain/wav2vec2.py:size=base")
    _, rate = make_optimizer(steps=base.train.steps, **base.optim)
    assert base.train.steps == 400_000
    found = values(rate, 0, 16_000, 32_000, 216_000, 400_000)
    np.testing.assert_allclose(found, [0, 2.5e-4, 5e-4, 2.5e-4, 0], rtol=1e-5, atol=1e-12)
    assert (base.optim.b1, base.optim.b2, base.optim.eps) == (0.9, 0.98, 1e-6)


def trees():
    """Parameters, then three gradients for them."""
    rng = np.random.default_rng(0)
    shapes = {"dense": {"kernel": (4, 3), "bias": (3,)}, "gain": (2,)}
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return [jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple)) for _ in range(4)]


def by_name(tree) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in flatten_dict(tree, sep="/").items()}


def numpy_adamw(params, grads, rates, decay_of, b1, b2, eps):
    """Loshchilov & Hutter 2019, algorithm 2, in float64; `decay_of` maps a leaf's name to its rate."""
    p = {k: v.astype(np.float64) for k, v in by_name(params).items()}
    m = {k: np.zeros_like(v) for k, v in p.items()}
    v = {k: np.zeros_like(x) for k, x in p.items()}
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
        for name, g in by_name(grad).items():
            g = g.astype(np.float64)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            step = (m[name] / (1 - b1**t)) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            p[name] = p[name] - rate * step - rate * decay_of(name) * p[name]
    return p


def run(tx, params, grads):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return by_name(params)


def test_three_updates_equal_adamw_in_numpy_with_decay_by_path():
    params, *grads = trees()
    rules = (("bias$", 0.0), ("^dense/", 0.1), (".*", 0.02))
    tx, rate = make_optimizer(steps=100, learning_rate=0.1, warmup=2, weight_decay=rules, clip_norm=0.0, **ADAM)
    rates = [expected_rate(k, 0.1, 2, 100) for k in range(3)]
    np.testing.assert_allclose(values(rate, 0, 1, 2), rates, rtol=1e-6)
    decay = {"dense/kernel": 0.1, "dense/bias": 0.0, "gain": 0.02}
    found = run(tx, params, grads)
    wanted = numpy_adamw(params, grads, rates, decay.__getitem__, **ADAM)
    # the control: one rate for all is another result by far more than the tolerance
    uniform = numpy_adamw(params, grads, rates, lambda name: 0.1, **ADAM)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-6, atol=2e-6)  # float32 against float64
    assert np.abs(found["dense/bias"] - uniform["dense/bias"]).max() > 1e-4


def test_decay_is_decoupled_from_the_gradient():
    """With a zero gradient Adam's step is zero and only the decay moves a parameter: by rate * decay * p."""
    params, *_ = trees()
    zero = jax.tree.map(np.zeros_like, params)
    rules = (("kernel", 0.5), (".*", 0.0))
    tx, _ = make_optimizer(steps=10, learning_rate=0.1, warmup=0, weight_decay=rules, clip_norm=1.0, **ADAM)
    found = run(tx, params, [zero])
    np.testing.assert_allclose(found["dense/kernel"], params["dense"]["kernel"] * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(found["dense/bias"], params["dense"]["bias"])
    np.testing.assert_array_equal(found["gain"], params["gain"])


def test_clip_bounds_the_global_norm_and_zero_turns_it_off():
    params, grad, *_ = trees()
    grad = jax.tree.map(lambda g: 100 * g, grad)
    norm = float(optax.tree.norm(grad))
    kept = {}
    for clip in (0.0, 1.0, 1e6):
        tx, _ = make_optimizer(
            steps=10, learning_rate=1.0, warmup=0, weight_decay=((".*", 0.0),), clip_norm=clip, **ADAM
        )
        _, state = tx.update(grad, tx.init(params), params)
        kept[clip] = float(optax.tree.norm(optax.tree.get(state, "mu"))) / (1 - ADAM["b1"])
    np.testing.assert_allclose([kept[0.0], kept[1.0], kept[1e6]], [norm, 1.0, norm], rtol=1e-5)


def test_every_parameter_needs_a_decay_rule():
    params, grad, *_ = trees()
    tx, _ = make_optimizer(
        steps=10, learning_rate=1.0, warmup=0, weight_decay=(("kernel", 0.1),), clip_norm=0.0, **ADAM
    )
    with pytest.raises((ValueError, UserError), match="no weight_decay rule covers parameter"):
        tx.update(grad, tx.init(params), params)


def test_moments_are_float32_and_the_first_rate_is_that_of_step_zero():
    params, grad, *_ = trees()
    tx, rate = make_optimizer(steps=10, learning_rate=1.0, warmup=5, weight_decay=((".*", 0.1),), clip_norm=0.0, **ADAM)
    state = tx.init(params)
    kinds = {x.dtype for x in jax.tree.leaves(state) if x.ndim}
    assert kinds == {jnp.dtype("float32")}
    updates, _ = tx.update(grad, state, params)
    assert values(rate, 0) == [0.0]
    assert all(not np.any(u) for u in jax.tree.leaves(updates))


def test_first_moments_may_be_bfloat16():
    """Three updates differ from those of float32 by the rounding of the moment, and the second moments do not."""
    params, *grads = trees()
    found, states = {}, {}
    for kind in ("float32", "bfloat16"):
        tx, _ = make_optimizer(
            steps=100, learning_rate=0.1, warmup=0, weight_decay=((".*", 0.0),), clip_norm=0.0, moment_dtype=kind,
            **ADAM,
        )  # fmt: skip
        found[kind] = run(tx, params, grads)
        _, states[kind] = tx.update(grads[0], tx.init(params), params)
    for name in found["float32"]:
        moved = np.abs(found["float32"][name] - by_name(params)[name]).max()
        apart = np.abs(found["float32"][name] - found["bfloat16"][name]).max()
        assert 0 < apart < 0.02 * moved
    kinds = {x.dtype for x in jax.tree.leaves(optax.tree.get(states["bfloat16"], "mu"))}
    assert kinds == {jnp.dtype("bfloat16")}
    nu = [optax.tree.get(state, "nu") for state in states.values()]
    jax.tree.map(np.testing.assert_array_equal, *nu)
    with pytest.raises(UserError, match=r"moment_dtype='float16': choose float32 or bfloat16"):
        make_optimizer(
            steps=1, learning_rate=1.0, warmup=0, weight_decay=(), clip_norm=0.0, moment_dtype="float16", **ADAM
        )


def test_tri_stage_schedule():
    """data2vec's 3/90/7 %: up, hold, exponentially down to a hundredth."""
    rate = schedule(learning_rate=2.0, warmup=30, hold=900, steps=1000, decay="exponential", floor=0.01)
    found = values(rate, 15, 30, 929, 930, 965, 1000, 1100)
    np.testing.assert_allclose(found, [1.0, 2.0, 2.0, 2.0, 2 * 0.01**0.5, 0.02, 0.02], rtol=1e-5)  # float32 powers


def test_cosine_inverse_square_root_and_constant_schedules():
    base: Any = dict(learning_rate=2.0, warmup=100, steps=300)
    np.testing.assert_allclose(values(schedule(**base, decay="cosine"), 200, 300), [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(values(schedule(**base, decay="cosine", floor=0.1), 300), [0.2], rtol=1e-6)
    noam = values(schedule(**base, decay="inverse_sqrt"), 0, 50, 100, 400, 10_000)
    np.testing.assert_allclose(noam, [0.0, 1.0, 2.0, 1.0, 0.2], rtol=1e-6)
    np.testing.assert_allclose(values(schedule(**base, decay="constant"), 100, 10_000), [2.0, 2.0])


def test_schedule_mistakes_are_named():
    with pytest.raises(UserError, match="decay='lineal': choose from linear, cosine"):
        schedule(learning_rate=1.0, warmup=1, steps=2, decay="lineal")
    with pytest.raises(UserError, match=r"floor above 0"):
        schedule(learning_rate=1.0, warmup=1, steps=2, decay="exponential")


def test_frozen_parameters_stay_and_others_move():
    options: Any = dict(steps=100, learning_rate=0.1, warmup=0, weight_decay=((".*", 0.5),), clip_norm=0.0, **ADAM)
    tx, _ = make_optimizer(**options, freeze=(("front/.*", 2, 4), ("always", 0, -1)))
    params = {"front": {"w": jnp.ones(3)}, "always": jnp.ones(2), "rest": jnp.ones(2)}
    state, seen = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        seen.append([float(params["front"]["w"][0]), float(params["always"][0]), float(params["rest"][0])])  # type: ignore
    front, always, rest = np.diff(np.array([[1.0, 1.0, 1.0], *seen]), axis=0).T
    np.testing.assert_array_equal(front != 0, [True, True, False, False, True, True])
    np.testing.assert_array_equal(always, 0)  # neither decay nor momentum
    assert np.all(rest != 0)


def test_what_is_frozen_takes_no_part_in_clipping():
    """Gradients 3 and 4: clipped to 1 together they are 0.6 and 0.8; the first alone becomes 1."""
    options: Any = dict(steps=9, learning_rate=1.0, warmup=0, weight_decay=((".*", 0.0),), clip_norm=1.0, **ADAM)
    params = {"moves": jnp.zeros(()), "stays": jnp.zeros(())}
    for freeze, expected in (((), 0.6), ((("stays", 0, -1),), 1.0)):
        tx, _ = make_optimizer(**options, freeze=freeze)
        _, state = tx.update({"moves": jnp.float32(3), "stays": jnp.float32(4)}, tx.init(params), params)
        assert float(optax.tree.get(state, "mu")["moves"]) == pytest.approx((1 - ADAM["b1"]) * expected)


def test_a_freeze_rule_that_fits_nothing_is_named():
    options: Any = dict(steps=9, learning_rate=1.0, warmup=0, weight_decay=((".*", 0.0),), clip_norm=1.0, **ADAM)
    tx, _ = make_optimizer(**options, freeze=(("^front/", 0, -1), ("^frnt/", 0, -1)))
    with pytest.raises(UserError, match=r"config.optim.freeze: '\^frnt/' fits no parameter, e.g. 'front/w'"):
        tx.init({"front": {"w": jnp.ones(3)}})


@pytest.mark.parametrize("spec", ["data2vec.py:size=tiny", "data2vec.py:size=tiny2", "spidr.py:size=tiny", "spidr.py"])
def test_published_rules_freeze_the_front_end_and_nothing_else(spec):
    loaded = config.load(f"{REPO}/configs/pretrain/{spec}{',' if ':' in spec else ':'}smoke")
    task = config.make_task(loaded)
    batch = make_batch(task)
    params = jax.eval_shape(lambda: init_state(task, optax.identity(), 0, batch)).params
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    frozen = [name for name in names if any(re.search(rule[0], name) for rule in loaded.optim.freeze)]
    parts = ("encoder/front/", "encoder/feature_norm/", "encoder/projection/")
    assert frozen
    assert frozen == [name for name in names if name.startswith(parts)]


OPTIONS: dict[str, Any] = dict(
    steps=10, learning_rate=0.1, warmup=0, weight_decay=((".*", 0.1),), clip_norm=0.0, **ADAM
)


def test_rates_multiply_the_update_by_path():
    """Decay included: a layer at a tenth of the rate forgets a tenth as fast."""
    params, grad, *_ = trees()
    plain = run(make_optimizer(**OPTIONS)[0], params, [grad])
    found = run(make_optimizer(**OPTIONS, rates=(("^dense/kernel", 0.1), (".*", 1.0)))[0], params, [grad])
    before = by_name(params)
    np.testing.assert_allclose(
        found["dense/kernel"] - before["dense/kernel"],
        0.1 * (plain["dense/kernel"] - before["dense/kernel"]),
        rtol=1e-4,
    )
    for name in ("dense/bias", "gain"):
        np.testing.assert_array_equal(found[name], plain[name])


def test_rates_must_cover_every_parameter():
    params, grad, *_ = trees()
    with pytest.raises(ValueError, match="no rates rule covers parameter 'dense/bias'"):
        run(make_optimizer(**OPTIONS, rates=(("kernel", 0.1),))[0], params, [grad])


def test_what_never_trains_has_neither_moments_nor_gradient():
    """Adapters on a large model would otherwise pay for Adam of all of it."""
    params, grad, *_ = trees()
    freeze = (("^dense/bias", 0, 0), ("^dense/", 0, -1))
    tx, _ = make_optimizer(**OPTIONS, freeze=freeze)
    state = tx.init(params)
    sizes = sorted(x.size for x in jax.tree.leaves(optax.tree.get(state, "mu")))
    assert sizes == sorted([params["dense"]["bias"].size, params["gain"].size])
    found = run(tx, params, [grad, grad])
    np.testing.assert_array_equal(found["dense/kernel"], params["dense"]["kernel"])
    assert (found["dense/bias"] != params["dense"]["bias"]).all()

    cut = detach(freeze)
    slope = jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(cut(p))))(params)
    assert not np.any(slope["dense"]["kernel"])
    assert np.all(slope["dense"]["bias"])
    # The control: what only begins frozen has a gradient.
    later = detach((("^dense/", 0, 100),))
    assert np.all(jax.grad(lambda p: jnp.sum(later(p)["dense"]["kernel"] ** 2))(params)["dense"]["kernel"])


def test_layers_count_from_the_end():
    """Gradual unfreezing from the top, for a model of any depth."""
    params = {"encoder": {f"layer{i}": {"w": np.ones(2, np.float32)} for i in range(12)}}
    grads = jax.tree.map(np.ones_like, params)
    tx, _ = make_optimizer(**OPTIONS, freeze=(("/layer-[12]/", 0, 0), ("/layer-3/", 0, 1), ("^encoder/", 0, -1)))
    first, second = run(tx, params, [grads]), run(tx, params, [grads, grads])
    moved = lambda found: {name for name, x in found.items() if np.any(x != 1)}  # noqa: E731
    assert moved(first) == {"encoder/layer10/w", "encoder/layer11/w"}
    assert moved(second) == {"encoder/layer9/w", "encoder/layer10/w", "encoder/layer11/w"}


def test_a_rule_for_layers_that_are_stacked_says_so():
    params = {"layers": {"w": np.ones((3, 2), np.float32)}}
    with pytest.raises(UserError, match=r"'/layer-1/' fits no parameter, e.g. 'layers/w' .*scan=False"):
        make_optimizer(**OPTIONS, freeze=(("/layer-1/", 0, -1),))[0].init(params)

"""FLOPs of training: closed forms, the published sizes, and XLA's own count of a small model without loops."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from speechjax import config as configs
from speechjax import flops, sharding
from speechjax.ahead.batch import task_spec
from speechjax.data.plan import Shape
from speechjax.errors import UserError
from speechjax.step import init_state, ratio, stream_keys
from tests.tasks.experiments import EXPERIMENTS, HEADS, REPO, experiment

SECOND = 16000


def load(name: str, *overrides: str) -> Any:
    return configs.load(f"{REPO}/configs/pretrain/{name}", list(overrides))


def total(found: dict[str, float]) -> float:
    return sum(found.values())


# ---- single products: a function of (params, data)


def of(function, *shapes) -> float:
    return total(flops.count(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def test_a_product_costs_its_forward_pass_once_more_for_each_factor_that_learns():
    product = 2 * 5 * 3 * 7
    matrix, data = (3, 7), (5, 3)
    assert of(lambda w, x: x @ w, matrix, data) == 2 * product  # no gradient flows into the data
    assert of(lambda w, x: (x * w.sum()) @ w, matrix, data) == 3 * product
    assert of(lambda w, x: x @ lax.stop_gradient(w), matrix, data) == product
    assert of(lambda w, x: x @ jnp.round(w).astype(jnp.int32).astype(jnp.float32), matrix, data) == product
    assert of(lambda w, x: jnp.sin(x), matrix, data) == 0


def test_loops_count_as_often_as_they_turn_and_carry_gradients_on():
    matrix, data = (3, 3), (5, 3)

    def through(w, x):
        """The first turn multiplies data alone, but no loop is compiled for its first turn only."""
        return lax.scan(lambda x, _: (x @ w, None), x, length=6)[0]

    assert of(through, matrix, data) == 6 * 3 * (2 * 5 * 3 * 3)
    once = jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w)
    assert of(once, matrix, data) == (2 + 3) * (2 * 5 * 3 * 3), "what is computed again does not count"
    larger = lambda w, x: lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)  # noqa: E731
    assert of(larger, matrix, data) == (2 + 3) * (2 * 5 * 3 * 3)
    unknown = lambda w, x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)  # noqa: E731
    with pytest.raises(UserError, match="cannot be counted: it computes products inside 'while'"):
        of(unknown, matrix, data)
    of(lambda w, x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x + w, x), (5, 3), (5, 3))  # negative control


@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (2, 1), (1, 3)])
def test_convolutions(groups, dilation):
    def conv(w, x):
        return lax.conv_general_dilated(
            x, w, (2,), [(2, 2)], lhs_dilation=(dilation,), feature_group_count=groups,
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip

    B, S, C, K, D = 2, 20, 4, 5, 6
    out = (1 + (S - 1) * dilation + 4 - K) // 2 + 1
    expected = 2 * B * out * D * K * C / groups / dilation
    assert of(conv, (K, C // groups, D), (B, S, C)) == pytest.approx(2 * expected)


def test_fourier_transforms():
    assert of(lambda w, x: jnp.fft.rfft(x).real * w, (1, 9), (3, 16)) == 3 * 2.5 * 16 * 4
    assert of(lambda w, x: jnp.fft.rfft(x * w).real, (1, 16), (3, 16)) == 2 * 3 * 2.5 * 16 * 4


def test_only_what_the_result_needs_counts():
    def two(w, x):
        metric = x @ w @ w
        return x @ w, metric

    assert of(two, (3, 3), (5, 3)) == (2 + 2 + 3) * 90
    assert of(lambda w, x: two(w, x)[0], (3, 3), (5, 3)) == 2 * 90


# ---- models


def test_a_small_model_in_closed_form():
    config, _ = experiment("wav2vec2")
    model, task = config.model, config.task
    found = flops.parts(config, SECOND)
    C, D, F, T, L = 16, model.width, model.mlp, 49, model.layers
    frames = [3199, 1599, 799, 399, 199, 99, 49]
    kernels = [10, 3, 3, 3, 3, 2, 2]
    # Of the first layer only the weights learn; its covariance is of the audio alone and costs little.
    front = 2 * 2 * frames[0] * 10 * C + sum(
        3 * 2 * t * k * C * C for t, k in zip(frames[1:], kernels[1:], strict=True)
    )
    covariance = 2 * frames[0] * 10 * 10
    assert found["frontend"] == pytest.approx(front + covariance, rel=2e-3)
    assert found["linear"] == 3 * 2 * T * (L * (4 * D * D + 2 * D * F) + C * D)
    assert found["attention"] == 3 * 2 * L * 2 * T * T * D
    # Four frames a row, each with its own shift of the kernel's 16 taps: 19 taps wide, and so 20.
    rows, groups, width = 13, model.positions.groups, D // model.positions.groups
    assert found["positions"] == 3 * 2 * rows * groups * (20 * width) * (4 * width)
    assert 0 < found["head"] < found["linear"]
    assert task.codes * task.codebooks == 16


@pytest.mark.parametrize(
    ("config", "published"),
    [("wav2vec2.py:size=base", 46.0), ("wav2vec2.py:size=large", 119.0), ("best_rq.py:size=paper", 96.0)],
)
def test_the_published_sizes(config, published):
    """Against 3 x the forward pass by hand, in 1e9 a second of audio, of crops of 15 s."""
    found = total(one_row(load(config), 15 * SECOND, rows=16)) / 16
    assert found / 15 / 1e9 == pytest.approx(published, rel=0.02)


def one_row(config: Any, samples: int = SECOND, rows: int = 1) -> dict[str, float]:
    return flops.batch_flops(config, task_spec(config, configs.make_task(config), Shape(rows, samples)))


def test_how_layers_are_compiled_changes_nothing():
    plain = one_row(load("wav2vec2.py:size=large,smoke", "model.scan=False", "model.remat=False"))
    assert one_row(load("wav2vec2.py:size=large,smoke", "model.scan=True", "model.remat=True")) == plain
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    with jax.set_mesh(mesh):
        config = load("wav2vec2.py:size=large,smoke")
        with config.unlocked():
            config.model.attention = dict(positions="none", impl="splash")
        assert one_row(config) == plain, "kernels hide their products"
    fewer = one_row(load("wav2vec2.py:size=large,smoke", "model.layers=2"))
    assert fewer["attention"] == pytest.approx(plain["attention"] * 2 / 3), "negative control: two layers of three"


def test_what_a_batch_needs_once_is_no_part_of_an_utterance():
    """The keys of a conformer's relative positions are the same for all rows."""
    config = load("best_rq.py:size=paper,smoke")
    one, three, eight = flops.parts(config, SECOND), one_row(config, rows=3), one_row(config, rows=8)
    assert {part: eight[part] - three[part] for part in flops.PARTS} == pytest.approx(
        {part: 5 * count for part, count in one.items()}
    )
    assert eight["linear"] > 8.05 * one["linear"]


def test_a_teacher_only_listens_and_metrics_do_not_count():
    config, _ = experiment("data2vec")
    model = config.model
    layers, projection = model.layers * (4 * model.width**2 + 2 * model.width * model.mlp), 160 * model.width
    found = one_row(config, SECOND + 400)
    assert config.optim.freeze, "the tiny recipe never trains the projection"
    assert found["linear"] == 2 * 50 * ((3 + 1) * layers + (1 + 1) * projection)


def test_frozen_layers_learn_nothing():
    config = load("wav2vec2.py:size=tiny,smoke")
    free = one_row(config)
    config.optim.freeze = (("^encoder/", 0, 1000),)
    assert one_row(config) == free, "for a time only: the gradient is computed"
    config.optim.freeze = (("^encoder/", 0, -1),)
    still = one_row(config)
    assert still["attention"] == pytest.approx(free["attention"] / 3)
    assert still["linear"] == pytest.approx(free["linear"] / 3)
    assert still["head"] > 0.5 * free["head"]


def test_xla_counts_the_same():
    """Of a model so wide that products are nearly all of it; XLA counts every operation, ours are the most of them."""
    sizes = ["model.width=256", "model.mlp=1024", "model.layers=2", "model.heads=4", "model.positions.groups=16"]
    config = load("wav2vec2.py:size=tiny,smoke", *sizes)
    task = configs.make_task(config)
    spec = task_spec(config, task, Shape(2, 2 * SECOND))
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec.items()}
    state = jax.eval_shape(functools.partial(init_state, task, optax.identity(), 0, batch))

    def loss(params, extra, batch):
        step = jnp.int32(0)
        out, _ = task.apply(
            {"params": params, **extra}, batch, step=step, train=True, rngs=stream_keys(task, 0, step), mutable=["sums"]
        )
        return sum(ratio(pair) for pair in out[0].values())

    lowered = jax.jit(jax.grad(loss)).lower(state.params, state.extra, batch)
    theirs = (lowered.cost_analysis() or {})["flops"]
    ours = total(flops.batch_flops(config, spec))
    assert 0.9 < ours / theirs <= 1.0
    thinner = total(flops.batch_flops(load("wav2vec2.py:size=tiny,smoke"), spec))
    assert thinner < 0.5 * theirs, "negative control"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXPERIMENTS, *HEADS])
def test_every_experiment_can_be_counted(name):
    config, _ = experiment(name)
    one, two = flops.parts(config, SECOND), flops.parts(config, 2 * SECOND)
    assert all(np.isfinite(count) and count >= 0 for count in one.values())
    assert (one["linear"] > 0) == (config.model.layers > 0)
    assert total(one) > 0
    for part in ("frontend", "linear"):
        assert not one[part] or 1.9 < two[part] / one[part] < 2.2

"""Several heads: one encoder for all, each head as if alone, and state, names and mistakes of every head its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_heads
from flax.traverse_util import flatten_dict
from tiny_heads import HEAD
from tiny_hubert import BASE, LENGTHS, SAMPLES, means, streams

from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.step import init_state, train_step
from speechjax.tasks.classify import Classify
from speechjax.tasks.several import Several
from tests.drawing import draw_params

POOLED: dict[str, Any] = dict(projection=0, pooling="mean", pooling_hidden=4)
WHO: dict[str, Any] = dict(
    label="label_who", classes=5, loss="softmax", label_smoothing=0.0, class_weights="none", **POOLED
)
HEADS: dict[str, Any] = dict(
    who=dict(task="classify", weight=1.0, **WHO),
    old=dict(task="regress", weight=0.5, label="label_age", loss="mse", **POOLED),
    when=dict(task="frames", weight=2.0, classes=3, unit_hop=20, loss="softmax"),
)


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return dict(
        audio=rng.integers(-9000, 9000, (3, SAMPLES)).astype(np.int16), lengths=LENGTHS,
        mean=np.zeros(3, np.float32), std=np.full(3, 0.2, np.float32), unread=np.zeros(3, np.int32),
        label_who=np.array([2, 4, 1], np.int32), label_age=np.array([31, 55, np.nan], np.float32),
        units=rng.integers(0, 3, (3, SAMPLES // 20)).astype(np.int32),
    )  # fmt: skip


def make_task(layers: str = "weighted", heads: Any = HEADS, **more: Any) -> Several:
    return Several(encoder=SpeechEncoder(**BASE), heads=heads, **HEAD | dict(layers=layers) | more)


def weighed(**weights: float) -> Any:
    return {name: block | dict(weight=weights.get(name, block["weight"])) for name, block in HEADS.items()}


def shapes_of(task: Any) -> dict[str, Any]:
    rngs = {"params": jax.random.key(0), **streams(task)}
    return dict(jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False)))


@functools.cache
def drawn() -> dict[str, Any]:
    shapes = shapes_of(make_task())
    params = draw_params(shapes.pop("params"))
    shapes.pop("sums")
    return {"params": params, **jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)}


def gradients(task: Any, variables: Any, batch: Any) -> Any:
    """(losses, metrics, gradient of what the loop minimises)."""

    def total(params, batch):
        given = {**variables, "params": params}
        losses, metrics = task.apply(given, batch, step=jnp.int32(0), train=False)
        return sum(value / jnp.maximum(weight, 1) for value, weight in losses.values()), (losses, metrics)

    (_, aux), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"], batch)
    return *jax.tree.map(np.asarray, aux), jax.tree.map(np.asarray, gradient)


def test_parameters_lie_below_their_head_and_those_of_the_encoder_once():
    found = shapes_of(make_task())
    assert set(found["params"]) == {"encoder", "old", "when", "who"}
    alone = {**WHO, "label": "label_who"}
    single = shapes_of(Classify(encoder=SpeechEncoder(**BASE), **HEAD | dict(layers="weighted") | alone))
    assert flatten_dict(found["params"]["encoder"]).keys() == flatten_dict(single["params"]["encoder"]).keys()
    assert set(found["params"]["who"]) == set(single["params"]) - {"encoder"} == {"head", "layer_weights"}
    assert set(found["prior"]) == {"who"}
    assert set(found["scale"]) == {"old"}
    assert set(found["sums"]) == {"old", "who"}


def test_the_encoder_runs_once(monkeypatch):
    calls, variables = [], drawn()
    run = SpeechEncoder.contextualize
    monkeypatch.setattr(
        SpeechEncoder, "contextualize", lambda self, *args, **more: calls.append(1) or run(self, *args, **more)
    )
    task = make_task()
    jax.eval_shape(lambda: task.apply(variables, make_batch(), step=jnp.int32(0), train=False))
    assert len(calls) == 1


def test_beside_heads_of_weight_zero_a_head_is_as_if_alone():
    variables, batch = drawn(), make_batch()
    single = Classify(encoder=SpeechEncoder(**BASE), **HEAD | dict(layers="weighted") | WHO)
    params = variables["params"]
    alone = {"params": {"encoder": params["encoder"], **params["who"]}, "prior": variables["prior"]["who"]}
    losses, metrics, gradient = gradients(single, alone, batch)
    both, more, together = gradients(make_task(heads=weighed(old=0.0, when=0.0)), variables, batch)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)  # another order of sums
    close(both["who/classification"][0], losses["classification"][0])
    jax.tree.map(close, together["encoder"], gradient["encoder"])
    jax.tree.map(close, together["who"], {k: v for k, v in gradient.items() if k != "encoder"})
    assert not any(np.any(g) for name in ("old", "when") for g in jax.tree.leaves(together[name]))
    assert set(both) == {"who/classification", "old/regression", "when/frames"}
    assert both["old/regression"][0] == both["when/frames"][0] == 0
    for key, pair in metrics.items():
        name = f"chance_who/{key.removeprefix('chance_')}" if key.startswith("chance_") else f"who/{key}"
        close(more[name], pair)
    _, _, all_three = gradients(make_task(), variables, batch)
    off = jax.tree.map(lambda a, b: np.abs(a - b).max(), all_three["encoder"], together["encoder"])
    far = max(jax.tree.leaves(off))
    assert far > 1e-3, "negative control: the other heads have a say"


def test_losses_and_their_chance_levels_weigh_alike():
    batch = tiny_heads.make_batch(**{key: x for key, x in make_batch().items() if key.startswith(("label", "units"))})

    def found(who: float) -> Any:
        task = tiny_heads.make_task(Several, heads=weighed(who=who), **HEAD)
        losses, metrics, *_ = tiny_heads.run(task, tiny_heads.make_variables(task, batch), batch)
        return losses, metrics

    (one, chance), (three, chances) = found(1.0), found(3.0)
    assert three["who/classification"] == (pytest.approx(3 * one["who/classification"][0], rel=1e-5), 2)
    assert one["who/classification"][1] == 2
    assert three["old/regression"][0] == pytest.approx(one["old/regression"][0], rel=1e-5)
    name = "chance_who/classification"
    assert chances[name][0] == pytest.approx(3 * chance[name][0], rel=1e-5)
    assert chances["chance_who/accuracy"] == chance["chance_who/accuracy"]


def test_state_and_alarms_are_each_heads_own():
    """Two updates by the loop's step; then the counts are those of the batches."""
    task, tx = make_task(mask_prob=0.3), optax.sgd(1e-3)
    state = jax.jit(functools.partial(init_state, task, tx, 0))(make_batch())
    step = jax.jit(functools.partial(train_step, task, tx, 0, 10))
    meters: Any = {}
    for number in range(2):
        state, meters = step(state, make_batch(number))
    assert np.asarray(state.extra["prior"]["who"]["counts"]).tolist() == [0, 0, 2, 0, 2]
    scale = jax.tree.map(float, state.extra["scale"]["old"])
    assert scale == dict(count=4, mean=pytest.approx(43), squares=pytest.approx(4 * 144))
    found = means({k: tuple(v) for k, v in meters.items() if "skipped" not in k})
    health = task.health(found, 0)
    assert health == {}, "one label each, but several kinds"
    found["who/labelled_share"] = found["when/labelled_share"] = 0.1
    found["old/target_deviation"] = 0.0
    alarms = task.health(found, 0)
    assert set(alarms) == {"who/unlabelled", "when/unlabelled", "old/one_number"}
    assert alarms["who/unlabelled"].startswith("head who: only 10% of the rows")


def test_what_it_needs_answers_and_shows():
    task, variables = make_task(), drawn()
    assert set(task.needs) == {"label_who", "label_age", "units"}
    assert task.sizes() == {
        "label_who": ("config.task.heads.who.classes", 5), "units": ("config.task.heads.when.classes", 3)
    }  # fmt: skip
    assert task.rngs == ("dropout", "layerdrop", "mask")

    def ask(batch):
        shown = task.apply(variables, batch, step=jnp.int32(0), method="predict")
        return task.apply(variables, batch, method="answer"), shown

    answer, shown = jax.eval_shape(ask, make_batch())
    assert {k: v.shape for k, v in answer.items()} == {
        "who/scores": (3, 5), "old/value": (3,), "when/scores": (3, 24, 3), "when/lengths": (3,)
    }  # fmt: skip
    assert shown["lengths"].shape == (3,)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (dict(who=HEADS["who"] | dict(task="hubert")), r"heads\.who\.task='hubert' is no task with a head"),
        (dict(who=HEADS["who"] | dict(task="nothing")), "task='nothing' is no task with a head"),
        (
            dict(who=HEADS["who"] | dict(smoothing=1)),
            "heads.who has no 'smoothing'; its fields: class_weights",
        ),
        (dict(who={k: v for k, v in HEADS["who"].items() if k != "loss"}), "heads.who needs 'loss'"),
        (dict(who={k: v for k, v in HEADS["who"].items() if k != "weight"}), "heads.who needs weight"),
        (dict(encoder=HEADS["who"]), "'encoder' is no name for a head"),
        ({"a/b": HEADS["who"]}, "'a/b' is no name for a head"),
    ],
)
def test_mistakes_are_named(heads, message):
    with pytest.raises(UserError, match=message):
        _ = make_task(heads=heads).sizes()

"""Classes of utterances: pooling without padding, the loss against a loop, an honest chance level, every alarm."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_hubert import BASE, LENGTHS, SAMPLES, equal, means, streams

from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.models.pooling import AttentiveStatistics, mean_pool
from speechjax.step import init_state, train_step
from speechjax.tasks.sounds import Sounds
from tests.drawing import draw_params

COUNTS = np.array([24, 17, 0])
CLASSES = 5

# ------------------------------------------------------------------------------------------- pooling


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)


SIZES = np.array([6, 4, 0], np.int32)


def test_the_mean_is_over_the_frames_of_the_row(frames):
    found = np.asarray(mean_pool(frames, SIZES))
    np.testing.assert_allclose(found[:2], [frames[0].mean(axis=0), frames[1, :4].mean(axis=0)], rtol=1e-5)
    assert not found[2].any()
    assert np.abs(found[1] - frames[1].mean(axis=0)).max() > 0.01, "negative control: padding counted"


def test_attention_is_a_softmax_over_the_frames_of_the_row(frames):
    pool = AttentiveStatistics(3)
    params = draw_params(jax.eval_shape(lambda: pool.init(jax.random.key(0), frames, SIZES))["params"])
    found = np.asarray(pool.apply({"params": params}, frames, SIZES))
    dense, score = jax.tree.map(np.asarray, (params["attention"], params["score"]["kernel"]))
    for row, n in ((0, 6), (1, 4)):
        x = frames[row, :n].astype(np.float64)
        e = np.exp(np.tanh(x @ dense["kernel"] + dense["bias"]) @ score)[:, 0]
        w = e / e.sum()
        mean = w @ x
        std = np.sqrt(w @ (x - mean) ** 2)
        np.testing.assert_allclose(found[row], np.concatenate([mean, std]), rtol=1e-4, atol=1e-5)  # 1e-6 in the root
        assert np.abs(w - 1 / n).max() > 0.01, "negative control: not the plain mean"
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", ["mean", "attention"])
def test_nothing_in_the_padding_is_pooled_and_gradients_are_finite(frames, kind):
    pool = AttentiveStatistics(3)
    params = draw_params(jax.eval_shape(lambda: pool.init(jax.random.key(0), frames, SIZES))["params"])

    def total(x):
        out = mean_pool(x, SIZES) if kind == "mean" else pool.apply({"params": params}, x, SIZES)
        return jnp.sum(out**2), out

    noisy = np.where(np.arange(6)[None, :, None] < SIZES[:, None, None], frames, np.nan).astype(np.float32)
    (_, quiet), gradient = jax.value_and_grad(total, has_aux=True)(frames)
    (_, loud), of_noise = jax.value_and_grad(total, has_aux=True)(noisy)
    np.testing.assert_array_equal(quiet, loud)
    for g in (gradient, of_noise):
        assert np.isfinite(g).all()
        assert not np.asarray(g)[1, 4:].any()
        assert not np.asarray(g)[2].any()
    constant = jax.grad(lambda x: total(x)[0])(np.ones_like(frames))
    assert np.isfinite(constant).all(), "the root of no deviation has no slope"


# ------------------------------------------------------------------------------------------- the task


@functools.cache
def made(pooling: str = "attention", layer_sum: bool = True, mask_prob: float = 0.0) -> tuple[Sounds, Any]:
    """(task, variables)."""
    task = Sounds(
        encoder=SpeechEncoder(**BASE), classes=CLASSES, pooling=pooling, pooling_hidden=4, layer_sum=layer_sum,
        mask_prob=mask_prob, mask_span=3,
    )  # fmt: skip
    rngs = {"params": jax.random.key(0), **streams(task)}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))
    counts = np.array([3, 0, 10, 1, 2], np.int32)
    return task, {"params": draw_params(shapes["params"]), "prior": {"counts": counts}}


def make_batch(**changes: Any) -> dict[str, np.ndarray]:
    """int16 noise, in the padding too; the last row could not be read."""
    rows = len(LENGTHS)
    audio = np.random.default_rng(0).integers(-9000, 9000, (rows, SAMPLES)).astype(np.int16)
    batch = dict(
        audio=audio, lengths=LENGTHS, mean=np.zeros(rows, np.float32), std=np.full(rows, 0.2, np.float32),
        label=np.array([2, 4, 1], np.int32),
    )  # fmt: skip
    return batch | changes


@functools.cache
def program(*made_as: Any, train: bool = False) -> Any:
    task, _ = made(*made_as)

    def total(params, prior, batch, seed):
        variables = {"params": params, "prior": prior}
        (losses, metrics), sown = task.apply(
            variables, batch, step=jnp.int32(0), train=train, rngs=streams(task, seed), mutable=["sums"]
        )
        logits, *_ = task.apply(variables, batch, False, method="_logits")
        return sum(value for value, _ in losses.values()), (losses, metrics, sown["sums"], logits)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(variables: Any, batch: Any, *made_as: Any, train: bool = False, seed: int = 0) -> Any:
    """(losses, metrics, sums, logits, gradient), as numpy."""
    (_, aux), gradient = program(*made_as, train=train)(
        variables["params"], variables["prior"], batch, jnp.int32(seed)
    )  # fmt: skip
    return *jax.tree.map(np.asarray, aux), jax.tree.map(np.asarray, gradient)


def test_loss_and_metrics_are_those_of_a_loop():
    _, variables = made()
    losses, metrics, sums, logits, _ = run(variables, make_batch())
    x = logits.astype(np.float64)
    surprise = [np.log(np.exp(x[r]).sum()) - x[r, k] for r, k in ((0, 2), (1, 4))]
    assert losses["classification"] == (pytest.approx(sum(surprise), rel=1e-5), 2)
    assert metrics["accuracy"] == ((x[0].argmax() == 2) + (x[1].argmax() == 4), 2)
    assert sums["labels"].tolist() == [0, 0, 1, 0, 1]  # the unread row teaches nothing
    assert metrics["target_perplexity"] == (pytest.approx(2, rel=1e-5), 1)
    assert metrics["labelled_share"] == (2, 2)
    # Add-one counts of 16 labels: 11 of 21, and 3 of 21.
    assert metrics["chance_classification"] == (pytest.approx(math.log(21 / 11) + math.log(21 / 3), rel=1e-5), 2)
    assert metrics["chance_accuracy"] == (1, 2)

    losses, metrics, _, _, gradient = run(variables, make_batch(label=np.array([-1, 4, 1], np.int32)))
    assert losses["classification"] == (pytest.approx(surprise[1], rel=1e-5), 1)
    assert metrics["labelled_share"] == (1, 2)
    losses, _, _, _, gradient = run(variables, make_batch(label=np.full(3, -1, np.int32)))
    assert losses["classification"] == (0, 0)
    assert not any(g.any() for g in jax.tree.leaves(gradient))


def test_the_prior_counts_labels_exactly_past_what_float32_can():
    task, _ = made()
    extra = {"prior": {"counts": np.array([2**24 + 1, 5, 0, 0, 0], np.int32)}}
    after = task.after_step(None, extra, {"labels": np.array([1, 0, 2, 0, 0], np.float32)}, 0)
    assert np.asarray(after["prior"]["counts"]).tolist() == [2**24 + 2, 5, 2, 0, 0]


def test_the_layers_are_summed_as_their_weights_say():
    """Weight on the last layer only is the encoder's output; on the first, something else."""
    _, variables = made()
    _, plain = made("attention", False)

    def logits(weights):
        params = {**plain["params"], "layer_weights": np.array(weights, np.float32)}
        return run({**variables, "params": params}, make_batch())[3]

    last = run({**plain, "params": plain["params"]}, make_batch(), "attention", False)[3]
    np.testing.assert_allclose(logits([-50, 50]), last, rtol=1e-4, atol=1e-5)  # float32 through one more sum
    assert np.abs(logits([50, -50]) - last).max() > 0.01
    gradient = run(variables, make_batch())[4]
    assert gradient["layer_weights"].any()


def test_spans_are_hidden_in_training_only():
    _, variables = made()
    masked: tuple[Any, ...] = ("attention", True, 0.5)
    first, second = (run(variables, make_batch(), *masked, train=True, seed=s) for s in (0, 1))
    assert first[0]["classification"][0] != second[0]["classification"][0]
    assert first[4]["encoder"]["mask_embedding"].any()
    equal(first[3], run(variables, make_batch())[3])  # these logits are evaluation's


def test_a_picture_shows_the_class_at_every_frame():
    task, variables = made()
    look = jax.jit(functools.partial(task.apply, method="predict", step=jnp.int32(0)))
    shown = jax.tree.map(np.asarray, look(variables, make_batch()))
    guess = run(variables, make_batch())[3].argmax(axis=1)
    for row, (label, n) in enumerate(zip((2, 4), COUNTS[:2], strict=True)):
        assert shown["true"][row].tolist() == [label] * n + [-1] * (24 - n)
        assert shown["predicted"][row].tolist() == [guess[row]] * n + [-1] * (24 - n)


def test_mistakes_are_named():
    task, variables = made()
    packed = make_batch() | dict(starts=np.zeros((3, 1), np.int32))
    with pytest.raises(UserError, match=r"config\.data\.fill=False"):
        task.apply(variables, packed, step=jnp.int32(0), train=False)
    with pytest.raises(UserError, match="choose mean or attention"):
        task.clone(pooling="max").apply(variables, make_batch(), step=jnp.int32(0), train=False)


# ------------------------------------------------------------------------------------------- alarms, learning


def test_alarms():
    task, variables = made()
    batch = make_batch(lengths=np.array([500, 361, 420], np.int32))  # classes 2, 4 and 1
    share = np.array([4, 1, 11, 2, 3]) / 21  # the prior
    head = variables["params"]["head"]
    deaf = {"kernel": np.zeros_like(head["kernel"]), "bias": np.log(share).astype(np.float32)}
    params = {**variables["params"], "head": deaf}
    losses, metrics, *_ = run({**variables, "params": params}, batch)
    found = means(losses, metrics)
    assert found["classification"] == pytest.approx(found["chance_classification"], rel=1e-5)
    assert set(task.health(found, 1000)) == {"constant_prediction", "stuck_at_chance"}
    assert task.health(found, 999) == {}
    losses, metrics, *_ = run(variables, batch | {"label": np.full(3, 2, np.int32)})
    assert set(task.health(means(losses, metrics), 0)) == {"one_class"}
    losses, metrics, *_ = run(variables, batch | {"label": np.full(3, -1, np.int32)})
    assert set(task.health(means(losses, metrics), 0)) == {"unlabelled"}
    good = dict(labelled_share=1.0, target_perplexity=3.5, prediction_perplexity=3.0)
    assert task.health(good | dict(classification=0.5, chance_classification=1.5), 5000) == {}


@pytest.mark.slow
def test_it_learns_which_tone_is_which():
    """Five pitches in noise: after 150 updates new tones are told apart, and the prior is even."""
    rng = np.random.default_rng(0)

    def batch():
        label = rng.integers(0, CLASSES, 8).astype(np.int32)
        wave = np.arange(SAMPLES)[None] * (0.05 + 0.08 * label[:, None])
        audio = (9000 * np.sin(2 * np.pi * wave) + rng.normal(size=wave.shape) * 2000).astype(np.int16)
        ones = np.ones(8, np.float32)
        return dict(
            audio=audio, lengths=np.full(8, SAMPLES, np.int32), mean=0 * ones, std=0.2 * ones, label=label,
            unread=np.zeros(8, np.int32),
        )  # fmt: skip

    task, tx = made()[0], optax.adam(2e-3)
    state = jax.jit(functools.partial(init_state, task, tx, 0))(batch())
    step = jax.jit(functools.partial(train_step, task, tx, 0, 10), donate_argnums=0)
    history = []
    for _ in range(150):
        state, meters = step(state, batch())
        history.append(means(jax.device_get({k: v for k, v in meters.items() if "skipped" not in k})))
    assert history[0]["accuracy"] < 0.6
    assert history[-1]["accuracy"] > 0.9
    counts = np.asarray(state.extra["prior"]["counts"])
    assert counts.sum() == 1200
    # The prior has become log 5; the first window's labels cost about as much.
    assert history[-1]["chance_classification"] == pytest.approx(math.log(5), abs=0.1)

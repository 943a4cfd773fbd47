"""The language model's scores against plain loops; texts for teacher forcing; that audio means nothing to it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_hubert import BASE, equal, means, streams

from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.step import init_state, train_step
from speechjax.tasks.language_model import LanguageModel, Text
from tests.drawing import draw_params

CLASSES = 9
DECODER: dict[str, Any] = dict(
    width=16, layers=1, heads=2, mlp=24, norm="pre", tied=True, dropout=0.0, attention_dropout=0.0
)
TOKENS = np.array([[4, 5, 4, 8], [6, 7, 99, -5], [8, 8, 8, 8]], np.int32)  # what is beyond the lengths may be anything
LENGTHS = np.array([4, 2, 0], np.int32)


def make_task(**settings: Any) -> LanguageModel:
    return LanguageModel(encoder=SpeechEncoder(**BASE), classes=CLASSES, decoder=DECODER | settings)


def make_batch(**changes: np.ndarray) -> dict[str, np.ndarray]:
    audio = np.random.default_rng(0).integers(-9000, 9000, (3, 500)).astype(np.int16)
    row = dict(lengths=np.array([500, 361, 0], np.int32), unread=np.zeros(3, np.int32))
    return dict(audio=audio, tokens=TOKENS, token_lengths=LENGTHS) | row | changes


@functools.cache
def drawn() -> Any:
    task = make_task()
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), make_batch(), step=jnp.int32(0), train=False))
    params = draw_params(shapes["params"])
    params["token_decoder"]["embedding"] = params["token_decoder"]["embedding"] * 3
    return params


@functools.cache
def runner() -> Any:
    task = make_task()

    def total(params, batch):
        losses, metrics = task.apply({"params": params}, batch, step=jnp.int32(0), train=False, rngs=streams(task))
        return sum(value / jnp.maximum(weight, 1) for value, weight in losses.values()), (losses, metrics)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(batch: dict[str, np.ndarray]) -> Any:
    """(losses, metrics), gradient."""
    (_, found), gradient = jax.device_get(runner()(drawn(), batch))
    return *found, gradient


def test_texts_begin_with_the_begin_and_end_with_the_end():
    text = jax.tree.map(np.asarray, Text.of(jnp.asarray(TOKENS), jnp.asarray(LENGTHS)))
    assert text.inputs.tolist() == [[1, 4, 5, 4, 8], [1, 6, 7, 0, 0], [1, 0, 0, 0, 0]]
    assert np.where(text.count, text.targets, -1).tolist() == [[4, 5, 4, 8, 2], [6, 7, 2, -1, -1], [-1] * 5]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_surprise_is_the_cross_entropy_of_the_smoothed_targets(smoothing):
    """As the divergence from a target distribution written down; nothing counts in the third row."""
    logits = np.random.default_rng(1).normal(size=(3, 5, CLASSES)).astype(np.float32) * 2
    text = Text.of(jnp.asarray(TOKENS), jnp.asarray(LENGTHS))
    log = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=2, keepdims=True))
    expected = 0.0
    for b, u, target in [(0, 0, 4), (0, 1, 5), (0, 2, 4), (0, 3, 8), (0, 4, 2), (1, 0, 6), (1, 1, 7), (1, 2, 2)]:
        wanted = np.full(CLASSES, smoothing / CLASSES)
        wanted[target] += 1 - smoothing
        expected -= wanted @ log[b, u]
    assert float(text.surprise(jnp.asarray(logits), smoothing)) == pytest.approx(expected, rel=1e-5)  # float32
    assert abs(float(text.surprise(jnp.asarray(logits), 0.1)) - expected) > 0.1, "negative control"


def test_losses_and_metrics_are_those_of_plain_loops():
    task, params = make_task(), drawn()
    losses, metrics, gradient = run(make_batch())
    inputs = np.array([[1, 4, 5, 4, 8], [1, 6, 7, 0, 0]], np.int32)
    decoder = task.detached_decoder()
    logits: Any = jax.jit(
        lambda p: decoder.apply({"params": p["token_decoder"]}, jnp.asarray(inputs), None, train=False)
    )(params)
    targets = [(0, 0, 4), (0, 1, 5), (0, 2, 4), (0, 3, 8), (0, 4, 2), (1, 0, 6), (1, 1, 7), (1, 2, 2)]
    log = np.asarray(jax.nn.log_softmax(logits), np.float64)
    surprise = -sum(log[at] for at in targets)
    assert losses == {"cross_entropy": (pytest.approx(surprise, rel=1e-5), 8)}
    assert metrics["perplexity"] == (pytest.approx(math.exp(surprise / 8) * 8, rel=1e-5), 8)
    assert metrics["accuracy"] == (sum(log[b, u].argmax() == t for b, u, t in targets), 8)
    assert metrics["chance_accuracy"] == (2, 8), "the end, or 4"
    entropy = -sum(k / 8 * math.log(k / 8) for k in (2, 2, 1, 1, 1, 1))
    assert metrics["chance_cross_entropy"] == (pytest.approx(8 * entropy, rel=1e-5), 8)
    assert metrics["transcribed_share"] == (2, 2), "the third row is not there"
    crop = make_batch(lengths=np.array([500, 361, 90], np.int32))
    assert run(crop)[1]["transcribed_share"] == (2, 3)
    assert gradient.keys() == {"token_decoder"}, "the encoder has no parameters"
    shown = task.apply({"params": params}, make_batch(), step=jnp.int32(0), method="predict")
    assert shown["lengths"].tolist() == [5, 3, 0]  # type: ignore[index]
    np.testing.assert_array_equal(shown["true"][1], [6, 7, 2, -1, -1])  # type: ignore[index]


def test_neither_audio_nor_padding_is_read():
    losses, metrics, gradient = run(make_batch())
    silent = make_batch(
        audio=np.zeros((3, 500), np.int16), lengths=np.zeros(3, np.int32),
        tokens=np.where(np.arange(4) < LENGTHS[:, None], TOKENS, 5).astype(np.int32),
    )  # fmt: skip
    equal((losses, metrics, gradient), run(silent))
    other = run(make_batch(tokens=TOKENS[:, ::-1].clip(0, 8)))[0]
    assert abs(other["cross_entropy"][0] - losses["cross_entropy"][0]) > 0.01, "negative control"
    nothing, counted, gradient = run(make_batch(token_lengths=np.zeros(3, np.int32)))
    assert nothing["cross_entropy"] == (0, 0)
    assert counted["perplexity"] == (0, 0)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))


def test_mistakes_and_alarms_are_named():
    task = make_task()
    assert task.sizes() == {"tokens": ("config.task.classes", CLASSES)}
    with pytest.raises(UserError, match="does not listen"):
        task.features({})
    with pytest.raises(UserError, match=r"config\.data\.fill=False"):
        task.apply({"params": drawn()}, make_batch(starts=np.zeros((3, 1), np.int32)), step=jnp.int32(0), train=False)
    good = dict(transcribed_share=1.0, cross_entropy=1.0, chance_cross_entropy=2.0)
    assert task.health(good, 5000) == {}
    assert set(task.health(good | dict(transcribed_share=0.1), 0)) == {"untranscribed"}
    stuck = good | dict(cross_entropy=1.99)
    assert set(task.health(stuck, 1000)) == {"stuck_at_chance"}
    assert task.health(stuck, 999) == {}


@pytest.mark.slow
def test_it_learns_a_chain():
    """Four tokens, each followed by one of two: 400 updates on new texts reach the chain's entropy, near log 2."""
    rng, n = np.random.default_rng(0), 12

    def batch():
        tokens = rng.integers(0, 4, (16, n)).astype(np.int32)
        for u in range(1, n):
            tokens[:, u] = (tokens[:, u - 1] + 1 + rng.integers(0, 2, 16)) % 4
        ones = np.ones(16, np.int32)
        return dict(
            audio=np.zeros((16, 500), np.int16), lengths=500 * ones, unread=0 * ones, tokens=tokens + 4,
            token_lengths=n * ones,
        )  # fmt: skip

    task, tx = make_task(width=32), optax.adam(3e-3)
    state = jax.jit(functools.partial(init_state, task, tx, 0))(batch())
    step = jax.jit(functools.partial(train_step, task, tx, 0, 10), donate_argnums=0)
    history = []
    for _ in range(400):
        state, meters = step(state, batch())
        history.append(means(jax.device_get({k: v for k, v in meters.items() if "skipped" not in k})))
    # The first token is one of four, the end is known by its position.
    best = (math.log(4) + (n - 1) * math.log(2)) / (n + 1)
    last = {name: float(np.mean([h[name] for h in history[-20:]])) for name in history[0]}
    assert history[0]["cross_entropy"] > 1.8
    assert last["cross_entropy"] == pytest.approx(best, abs=0.08)
    assert last["perplexity"] == pytest.approx(math.exp(best), abs=0.2)
    assert last["cross_entropy"] < 0.5 * last["chance_cross_entropy"]

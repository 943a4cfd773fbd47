"""The transducer task: what is scored and answered, its pictures and alarms, and that it learns."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_hubert import BASE, LARGE, LENGTHS, SAMPLES, equal, means, streams

from speechjax.decode.transducer import Greedy
from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.step import init_state, train_step
from speechjax.tasks import _ctc, _transducer_loss
from speechjax.tasks.transducer import Transducer
from tests.drawing import draw_params

COUNTS = np.array([24, 17, 0], np.int32)  # frames of LENGTHS
CLASSES = 6
VARIANTS = {"rnnt": dict(), "tdt": dict(kind="tdt", sigma=0.05), "ctc": dict(ctc_weight=0.3)}


def make_task(encoder: dict[str, Any] = LARGE, **settings: Any) -> Transducer:
    options: dict[str, Any] = dict(
        kind="rnnt", classes=CLASSES, durations=(0, 1, 2), predictor="stateless", predictor_width=8, predictor_depth=2,
        joint_width=12, chunk=5, sigma=0.0, fastemit=0.0, ctc_weight=0.0, layers="last", mask_prob=0.0, mask_span=3,
        channel_mask_prob=0.0, channel_mask_span=4, head_dropout=0.0,
    )  # fmt: skip
    return Transducer(encoder=SpeechEncoder(**encoder), **(options | settings))


def make_batch(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """int16 noise, in the padding too; row 2 has a transcript, but could not be read."""
    audio = np.random.default_rng(seed).integers(-9000, 9000, (3, SAMPLES)).astype(np.int16)
    batch: dict[str, Any] = dict(
        audio=audio, lengths=LENGTHS, mean=np.zeros(3, np.float32), std=np.full(3, 0.2, np.float32),
        tokens=np.array([[4, 5, 5, 3], [3, 4, 0, 0], [4, 4, 4, 4]], np.int32),
        token_lengths=np.array([4, 2, 4], np.int32),
    )  # fmt: skip
    return batch | changes


@functools.cache
def begun(variant: str) -> tuple[Transducer, Any, Any]:
    """(task, parameters, jitted (params, batch) -> (losses, metrics), gradient of the sum of the losses)."""
    task = make_task(**VARIANTS[variant])
    rngs = {"params": jax.random.key(0), **streams(task)}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))["params"]

    def total(params, batch):
        losses, metrics = task.apply({"params": params}, batch, step=jnp.int32(0), train=True, rngs=streams(task))
        return sum(value for value, _ in losses.values()), (losses, metrics)

    run = jax.jit(jax.value_and_grad(total, has_aux=True))

    def call(params, batch):
        (_, (losses, metrics)), gradient = run(params, batch)
        return jax.tree.map(np.asarray, (losses, metrics, gradient))

    return task, draw_params(shapes), call


@functools.cache
def answered(variant: str) -> Any:
    task, params, _ = begun(variant)
    found = jax.jit(functools.partial(task.apply, method="answer"))({"params": params}, make_batch())
    return jax.tree.map(np.asarray, found)


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("variant", VARIANTS)
def test_transcripts_are_scored_a_token_and_only_where_there_are_some(variant):
    task, params, run = begun(variant)
    losses, metrics, gradient = run(params, make_batch())
    network, own = task.detached_network(), {"params": params["network"]}
    found = answered(variant)
    assert found["lengths"].tolist() == COUNTS.tolist()
    durations = network.durations
    assert durations == ((0, 1, 2) if variant == "tdt" else ())

    @jax.jit
    def expected():
        texts = network.apply(own, make_batch()["tokens"], method="texts")
        x = network.apply(own, found["frames"], method="frames")
        join = network.apply(own, method="joint")
        text = COUNTS, make_batch()["tokens"], np.array([4, 2, 0], np.int32)
        sigma = VARIANTS[variant].get("sigma", 0.0)
        return _transducer_loss.transducer_loss(join, x, texts, *text, durations=durations, chunk=24, sigma=sigma)

    assert losses[task.kind] == (pytest.approx(float(np.sum(expected())), rel=1e-5), 6)
    assert metrics["transcribed_share"] == (2, 2)
    assert metrics["too_long_share"] == (0, 2)
    assert metrics[f"chance_{task.kind}"][1] == 6
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))

    silent = make_batch(token_lengths=np.array([0, 2, 0], np.int32))
    losses, metrics, gradient = run(params, silent)
    assert losses[task.kind] == (pytest.approx(float(expected()[1]), rel=1e-5), 2)
    assert metrics["transcribed_share"] == (1, 2)
    louder = silent | {"audio": np.where(np.arange(3)[:, None] == 0, silent["audio"][::-1], silent["audio"])}
    again, _, other = run(params, louder)
    equal(losses, again)
    equal(gradient, other)
    losses, _, gradient = run(params, make_batch(token_lengths=np.zeros(3, np.int32)))
    assert losses[task.kind] == (0, 0)
    assert not any(g.any() for g in jax.tree.leaves(gradient))


def test_the_padding_is_not_heard():
    _, params, run = begun("ctc")
    batch = make_batch()
    inside = np.arange(SAMPLES) < LENGTHS[:, None]
    loud = batch | dict(audio=np.where(inside, batch["audio"], -batch["audio"][::-1]).astype(np.int16))
    loud["tokens"] = np.where(np.arange(4) < batch["token_lengths"][:, None], batch["tokens"], 5).astype(np.int32)
    for a, b in zip(jax.tree.leaves(run(params, loud)), jax.tree.leaves(run(params, batch)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    other = run(params, batch | dict(audio=-batch["audio"]))[0]["rnnt"][0]
    assert abs(other - run(params, batch)[0]["rnnt"][0]) > 1e-3, "negative control"


def test_the_auxiliary_ctc_is_ctc():
    """A weighted loss on the same frames, with the error rate of its best path; without a weight it is not there."""
    _, params, run = begun("ctc")
    losses, metrics, _ = run(params, make_batch())
    logits, text = answered("ctc")["logits"], (make_batch()["tokens"], np.array([4, 2, 0], np.int32))
    loss, errors = _ctc.ctc_loss(logits, COUNTS, *text), _ctc.greedy_errors(logits, COUNTS, *text)
    assert losses["ctc"] == (pytest.approx(0.3 * float(np.sum(loss)), rel=1e-5), 6)
    assert metrics["error_rate"] == (int(np.sum(errors[:2])), 6)
    assert "ctc_head" in params
    _, params, run = begun("rnnt")
    losses, metrics, _ = run(params, make_batch())
    assert losses.keys() == {"rnnt"}
    assert "error_rate" not in metrics
    assert not [name for name in params if "ctc" in name]
    assert "logits" not in answered("rnnt")

    many = make_batch(tokens=np.full((3, 20), 4, np.int32), token_lengths=np.array([20, 2, 0], np.int32))
    losses, metrics, _ = begun("ctc")[2](begun("ctc")[1], many)
    assert losses["ctc"][1] == 2, "24 frames hold no 20 equal tokens and their blanks"
    assert losses["rnnt"][1] == 22, "a transducer's do"
    assert metrics["too_long_share"] == (1, 2)


def test_every_parameter_learns():
    """But the mask embedding, since nothing is masked here."""
    for variant in VARIANTS:
        _, params, run = begun(variant)
        gradient = run(params, make_batch())[2]
        for path, g in jax.tree_util.tree_flatten_with_path(gradient)[0]:
            assert g.any() or path[-1].key == "mask_embedding", path


# ------------------------------------------------------------------------------------------- pictures and answers


@pytest.mark.parametrize("variant", ["rnnt", "tdt"])
def test_pictures_show_tokens_where_they_are_said(variant):
    task, params, _ = begun(variant)
    params = params | {"network": params["network"] | {"bias": 0 * params["network"]["bias"]}}
    look = jax.jit(functools.partial(task.apply, method="predict", step=jnp.int32(0)))
    shown = jax.tree.map(np.asarray, look({"params": params}, make_batch()))
    assert shown["lengths"].tolist() == COUNTS.tolist()
    assert shown["true"].shape == shown["predicted"].shape == (3, 24)
    assert (shown["true"][2] == -1).all()
    for row in range(2):
        there = shown["true"][row][shown["true"][row] >= 0].tolist()
        transcript = make_batch()["tokens"][row].tolist()
        assert there
        assert all(token in transcript for token in there)
        assert (shown["true"][row, COUNTS[row] :] == -1).all()
        assert (shown["predicted"][row, COUNTS[row] :] == -1).all()
    assert not (shown["predicted"] == 0).any()
    # One token a frame is what greedy search finds with room for one.
    network = task.detached_network()
    found = jax.jit(Greedy(network, 24, symbols=1))(params["network"], answered(variant)["frames"], COUNTS)
    for row in range(2):
        said = shown["predicted"][row]
        expected = np.asarray(found.tokens)[row, 0, : int(found.lengths[row, 0])]
        if not {1, 2} & {*said.tolist()}:  # which a decoder never says
            np.testing.assert_array_equal(said[said >= 0], expected)


def test_mistakes_are_named():
    for settings, text in (
        (dict(kind="hat"), "choose from rnnt, tdt"),
        (dict(kind="tdt", durations=(0, 2)), r"config\.task\.durations=\(0, 2\).*1 among them"),
        (dict(kind="tdt", durations=()), r"config\.task\.durations=\(\)"),
        (dict(kind="tdt", durations=(1, 0)), "ascending"),
        (dict(predictor="gru"), "choose from stateless, lstm"),
    ):
        init = functools.partial(make_task(**settings).init, train=False)
        with pytest.raises(UserError, match=text):
            jax.eval_shape(init, jax.random.key(0), make_batch(), step=jnp.int32(0))
    assert make_task().sizes() == {"tokens": ("config.task.classes", CLASSES)}
    assert make_task().needs == ("tokens",)


def test_alarms():
    """Who does not listen: a network whose output is constant is at chance, exactly."""
    task, params, run = begun("rnnt")
    counts = np.array([24 + 17, 0, 0, 2, 2, 2])
    deaf = jax.tree.map(np.zeros_like, params["network"]) | {
        "bias": np.log(np.maximum(counts, 1e-30), dtype=np.float32)
    }
    found = means(*run(params | {"network": deaf}, make_batch())[:2])
    assert found["rnnt"] == pytest.approx(found["chance_rnnt"], rel=1e-5)
    assert set(task.health(found, 1000)) == {"stuck_at_chance"}
    assert task.health(found, 999) == {}
    silent = means(*run(params, make_batch(token_lengths=np.zeros(3, np.int32)))[:2])
    assert math.isnan(silent["rnnt"])
    assert set(task.health(silent, 1000)) == {"untranscribed"}
    good = dict(transcribed_share=0.9, too_long_share=0.01, rnnt=1.0, chance_rnnt=3.0)
    assert task.health(good, 5000) == {}
    bad = good | dict(blank_share=1.0, ctc=0.9, chance_ctc=0.9)
    assert set(begun("ctc")[0].health(bad, 5000)) == {"only_blanks", "stuck_at_chance"}


# ------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rnnt", "tdt"])
def test_it_learns_which_tone_is_which(variant):
    """Three tones, none twice in a row: after 1,000 updates greedy search has new sequences, and at the start does not.

    A token counts where it is in its place, so one that is missing costs all after it.  Who knows that there are four
    and does not listen has two thirds of them wrong; the model must have less than half as many.
    """
    rng = np.random.default_rng(0)

    def batch():
        steps = np.concatenate([rng.integers(0, 3, (8, 1)), rng.integers(1, 3, (8, 3))], axis=1)
        tones = (steps.cumsum(axis=1) % 3 + 1).astype(np.int32)
        wave = np.repeat(np.array([0, 0.15, 0.3, 0.6])[tones], 125, axis=1).cumsum(axis=1)
        audio = (9000 * np.sin(2 * np.pi * wave) + rng.normal(size=wave.shape) * 900).astype(np.int16)
        ones = np.ones(8, np.float32)
        return dict(
            audio=audio, lengths=np.full(8, SAMPLES, np.int32), mean=0 * ones, std=0.2 * ones, tokens=tones + 2,
            token_lengths=np.full(8, 4, np.int32), unread=np.zeros(8, np.int32),
        )  # fmt: skip

    task, tx = make_task(encoder=BASE, **(VARIANTS[variant] | dict(ctc_weight=0.3))), optax.adam(3e-3)
    state = jax.jit(functools.partial(init_state, task, tx, 0))(batch())
    step = jax.jit(functools.partial(train_step, task, tx, 0, 10), donate_argnums=0)

    @jax.jit
    def errors(params, batch):
        found = task.apply({"params": params}, batch, method="answer")
        search = Greedy(task.detached_network(), tokens=4, symbols=3)
        return jnp.sum(search(params["network"], found["frames"], found["lengths"]).tokens[:, 0] != batch["tokens"])

    before = int(errors(state.params, batch()))
    history = []
    for _ in range(1000):
        state, meters = step(state, batch())
        history.append(means(jax.device_get({k: v for k, v in meters.items() if "skipped" not in k})))
    after = sum(int(errors(state.params, batch())) for _ in range(4)) / 4
    deaf = 32 * 2 / 3
    assert before > 0.75 * deaf
    assert after < 0.5 * deaf
    assert history[-1][variant] < 0.3 * history[-1][f"chance_{variant}"]

"""BEST-RQ: the ways it collapses, and the mistakes people make with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from tiny_best_rq import ENCODER, LENGTHS, SAMPLES, make_batch, make_run, make_task, make_variables, means

from speechjax import config as configs
from speechjax.errors import UserError
from speechjax.tasks import best_rq


@pytest.fixture(scope="module")
def model():
    """(task, variables, run)."""
    task = make_task()
    return task, make_variables(task), make_run(task, backward=True)


def alarms(task, variables, batch, step=1000, seed=0) -> tuple[dict[str, str], dict[str, float]]:
    losses, metrics, _, _ = make_run(task, train=False)(variables, batch, seed)
    values = means(losses, metrics)
    return task.health(values, step), values


def speech_batch(folder) -> dict[str, np.ndarray]:
    files = sorted((folder / "kerstin").rglob("*.ogg"))[:24]
    audio = np.concatenate([soundfile.read(file, dtype="int16")[0] for file in files])
    rows = len(audio) // SAMPLES
    return dict(audio=audio[: rows * SAMPLES].reshape(rows, SAMPLES), lengths=np.full(rows, SAMPLES, np.int32))


@pytest.mark.parametrize("codes", [64, 2048])
def test_unnormalised_speech_collapses_the_quantizer(real_speech, codes):
    """The trap of section 3.1 of the paper: log-mels as they are have a few codes; normalised, dozens to hundreds."""
    batch = speech_batch(real_speech)
    task = make_task(codes=codes, code_dim=16, codebooks=1)
    variables = make_variables(task)
    healthy, values = alarms(task, variables, batch, step=10)
    assert values["target_perplexity"] > 12
    assert healthy == {}
    raw = make_task(dict(frontend=ENCODER["frontend"] | dict(normalize="none")), codes=codes, code_dim=16, codebooks=1)
    collapsed, values = alarms(raw, variables, batch, step=10)
    assert values["target_perplexity"] < 5
    assert set(collapsed) == {"codebook_collapse"}
    assert "model.frontend.normalize" in collapsed["codebook_collapse"]


def test_silence_collapses_the_quantizer(model):
    task, variables, _ = model
    batch = make_batch()
    silence = batch | {"audio": np.zeros_like(batch["audio"])}
    assert set(alarms(task, variables, silence, step=10)[0]) == {"codebook_collapse"}
    assert alarms(task, variables, batch, step=10)[0] == {}


def many(seed: int = 0) -> dict[str, np.ndarray]:
    return make_batch(seed, np.full(12, SAMPLES, np.int32))


def test_one_answer_for_all_frames_raises_an_alarm():
    """An encoder whose frames are all alike leaves the heads their biases, which learn how frequent the codes are."""
    task = make_task(codebooks=1, codes=32, code_dim=8)
    variables = make_variables(task)
    out = make_run(task)(variables, many())[3]["out"]
    counts = np.bincount(out["targets"][..., 0][out["masked"]], minlength=32)
    heads = dict(kernel=np.zeros((1, 32, 32), np.float32), bias=np.log(counts + 0.1)[None].astype(np.float32))
    collapsed = variables | {"params": variables["params"] | {"heads": heads}}
    raised, values = alarms(task, collapsed, many())
    assert set(raised) == {"constant_prediction"}
    assert values["prediction_perplexity"] == pytest.approx(1)
    assert values["accuracy"] == pytest.approx(values["chance_accuracy"]), "the best constant answer is chance"
    assert values["prediction"] == pytest.approx(values["chance_prediction"], rel=0.05)
    assert alarms(task, collapsed, many(), step=999)[0] == {}


def test_guessing_is_at_chance_and_answers_are_not():
    """Heads that answer differently everywhere, but know nothing."""
    task = make_task(codebooks=1, codes=32, code_dim=8)
    variables = make_variables(task)
    frames = make_run(task, train=False)(variables, many())[3]["Heads"][0].reshape(-1, 32)
    mean = frames.mean(axis=0)
    kernel = np.random.default_rng(0).normal(size=(32, 32))
    kernel = (kernel - np.outer(mean, mean @ kernel) / (mean @ mean))[None].astype(np.float32)
    heads = dict(kernel=kernel, bias=np.zeros((1, 32), np.float32))
    guessing = variables | {"params": variables["params"] | {"heads": heads}}
    raised, values = alarms(task, guessing, many())
    assert set(raised) == {"stuck_at_chance"}
    assert alarms(task, guessing, many(), step=999)[0] == {}
    knowing = dict(prediction=0.5 * values["chance_prediction"], accuracy=0.5)
    assert task.health(values | knowing, 1000) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask_prob=1.5), "mask_prob"),
        (dict(mixing=-0.1), "mixing"),
        (dict(masked_share_needed=0.0), "masked_share_needed"),
        (dict(mask_span=0), "mask_span"),
        (dict(codes=0), "codes"),
    ],
)
def test_values_are_checked(change, message):
    task = make_task(**change)
    rngs = {name: jax.random.key(1) for name in ("params", *task.rngs)}
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))


def test_waveforms_and_packed_rows_are_refused():
    front = dict(name="waveform", channels=(16,) * 3, kernels=(10, 3, 2), strides=(5, 2, 2), norm="group")
    packed = make_batch() | dict(starts=np.zeros((3, 1), np.int32), lengths=LENGTHS[:, None])
    for task, batch, message in (
        (make_task(dict(frontend=front)), make_batch(), "config.model.frontend"),
        (make_task(), packed, "data.fill=False"),
    ):
        rngs = {name: jax.random.key(1) for name in ("params", *task.rngs)}
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda t=task, b=batch, r=rngs: t.init(r, b, step=jnp.int32(0), train=False))


def test_predict_shows_all_targets_and_guesses_where_masked(model):
    task, variables, _ = model
    rngs = {"mask": jax.random.key(4)}
    shown, raw = jax.jit(
        lambda: (
            task.apply(variables, make_batch(), step=jnp.int32(0), rngs=rngs, method="predict"),
            task.apply(variables, make_batch(), False, rngs=rngs, method="_predict"),
        )
    )()
    np.testing.assert_array_equal(shown["lengths"], [25, 13, 0])
    inside = np.arange(25) < np.asarray(shown["lengths"])[:, None]
    np.testing.assert_array_equal(shown["true"], np.where(inside, raw["targets"][..., 0], -1))
    np.testing.assert_array_equal(shown["predicted"], np.where(raw["masked"], raw["guesses"][..., 0], -1))
    assert 0 < shown["mask"].sum() < inside.sum()


@pytest.mark.parametrize("arg", ["size=paper", "size=base", "size=nest", "size=tiny,streaming", "size=nest,smoke"])
def test_configs_are_sound(arg):
    config = configs.load(f"configs/pretrain/best_rq.py:{arg}")
    assert config.task.name == "best_rq"
    assert configs.task_class("best_rq") is best_rq.BestRQ
    if "streaming" in arg:
        assert (config.task.mask_prob, config.task.mask_span) == (0.02, 30)
        assert config.model.frontend.factor == 2
        assert config.model.attention.chunk == 1
    elif "smoke" not in arg:
        assert config.task.codes == 8192
        assert config.model.frontend.factor == (8 if "nest" in arg else 4)

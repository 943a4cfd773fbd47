"""Masked autoencoders: what is altered, what is judged and against which controls, by loops; and how they collapse."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings

from speechjax import config as configs
from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.models.spectral import sinusoids_2d
from speechjax.tasks._alterations import Mockingjay, Patches, Tera, make_alteration
from speechjax.tasks.mae import MAE, unpatch
from tests.drawing import draw_params

SAMPLES, F = 10_000, 10  # 61 frames, one of them left over when two are stacked
LENGTHS = np.array([10_000, 6_000, 0], np.int32)  # 61, 36 and no frames
ENCODER: dict[str, Any] = dict(
    frontend=dict(name="mel", n_mels=F, factor=2), width=16, layers=1, heads=2, mlp=16, norm="post",
    positions=dict(name="sinusoidal"), dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0,
    layerdrop=0.0, scan=False, remat=False, dtype="float32",
)  # fmt: skip
PATCHES = dict(
    frontend=dict(name="patch", n_mels=12, patch=(5, 4), embedding=16, convention="kaldi"),
    norm="pre",
    positions=dict(name="none"),
)  # 12 columns of 3 patches in 61 frames, 7 in 36
TERA: dict[str, Any] = dict(name="tera", prob=0.3, span=4, zero=0.8, random=0.1, channels=0.4)
HIDE: dict[str, Any] = dict(name="patches", share=0.7, layers=1, width=8, heads=2, mlp=16)
few = settings(max_examples=8, deadline=None, derandomize=True)


def make_task(encoder: dict[str, Any] | None = None, **alteration: Any) -> MAE:
    return MAE(encoder=SpeechEncoder(**(ENCODER | (encoder or {}))), alteration=alteration or TERA)


def make_batch(seed: int = 0, lengths: np.ndarray = LENGTHS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    audio = rng.normal(size=(len(lengths), SAMPLES))
    audio[:, 1:] += np.repeat(rng.uniform(-1, 1, (len(lengths), 9)), 1200, axis=1)[:, : SAMPLES - 1] * audio[:, :-1]
    return dict(audio=(4000 * audio).clip(-32768, 32767).astype(np.int16), lengths=lengths)


def streams(task: Any, seed: Any = 0) -> dict[str, jax.Array]:
    return {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(task.rngs)}


def make_variables(task: MAE) -> dict[str, Any]:
    rngs = {"params": jax.random.key(0), **streams(task)}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))
    return dict(params=draw_params(shapes["params"]))


def make_run(task: MAE):
    """Jitted `run(variables, batch, seed)` -> losses, metrics, what `_restore` gives, inputs of the parts."""

    def both(variables, batch, seed):
        seen: dict[str, Any] = {}

        def watch(call, args, kwargs, context):
            out = call(*args, **kwargs)
            name = type(context.module).__name__
            if (name, context.method_name) == ("MAE", "_restore"):
                seen["out"] = out
            if (name, context.method_name) == ("PatchDecoder", "__call__"):
                seen["encoded"] = args
            if (name, context.method_name) == ("Transformer", "__call__"):
                seen.setdefault("transformers", []).append(args)
            return out

        with nn.intercept_methods(watch):
            out = task.apply(variables, batch, step=jnp.int32(0), train=False, rngs=streams(task, seed))
        seen["inputs"] = task.apply(variables, batch, method=lambda m, b: m.encoder.inputs(b))
        return *out, seen

    run = jax.jit(both)
    return lambda variables, batch, seed=0: jax.tree.map(np.asarray, run(variables, batch, seed))


def means(losses, metrics) -> dict[str, float]:
    return {k: float(s / w) if w else math.nan for k, (s, w) in (losses | metrics).items()}


@pytest.fixture(scope="module")
def spans():
    task = make_task()
    return task, make_variables(task), make_run(task)


@pytest.fixture(scope="module")
def patches():
    task = make_task(PATCHES, **HIDE)
    return task, make_variables(task), make_run(task)


# ------------------------------------------------------------------------------------------- loss and controls


def reference(out, power: int) -> dict[str, float]:
    """Loss and metrics by loops over rows, from targets, outputs and masks."""
    target, output, chosen, judged, valid = (
        out[name] for name in ("target", "output", "chosen", "judged", "valid")
    )  # fmt: skip
    errors: dict[str, list] = dict(reconstruction=[], chance_reconstruction=[], frame_error=[], interpolation_error=[])
    for b in range(len(target)):
        mean = target[b][valid[b]].mean(axis=0) if valid[b].any() else 0
        own = np.abs(output[b] - target[b].astype(np.float64)) ** power
        errors["reconstruction"] += [*own[judged[b]]]
        errors["chance_reconstruction"] += [*np.abs(mean - target[b])[judged[b]] ** power]
        errors["frame_error"] += [*own[chosen[b]].ravel()]
        errors["interpolation_error"] += [*np.abs(out["lines"][b] - target[b])[chosen[b]].ravel() ** power]
    deviation = lambda x: np.sqrt(x[chosen].var(axis=0, ddof=1) + 1e-6).mean()  # noqa: E731
    return {k: float(np.mean(v)) for k, v in errors.items()} | dict(
        output_deviation=deviation(output), target_deviation=deviation(target), masked_share=chosen.sum() / valid.sum()
    )


def test_loss_and_controls_of_runs_are_the_definitions(spans):
    _, variables, run = spans
    losses, metrics, seen = run(variables, make_batch(), 2)
    out, (x, lengths) = seen["out"], seen["inputs"]
    np.testing.assert_array_equal(lengths, [61, 36, 0])
    np.testing.assert_array_equal(out["target"], x)
    expected, got = reference(out, 1), means(losses, metrics)
    assert set(expected) == set(got)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-5), name  # float32
    # The frame that no stack holds cannot be restored, and is not asked for.
    assert not out["chosen"][0, 60]
    assert not out["judged"][0, 60].any()
    for b, n in enumerate((61, 36)):
        known = np.flatnonzero(~out["chosen"][b, :n])
        for f in range(F):
            np.testing.assert_allclose(
                out["lines"][b, :n, f], np.interp(np.arange(n), known, x[b, known, f]), atol=2e-5
            )
    assert losses["reconstruction"][1] > metrics["frame_error"][1], "the block of bins counts too"


def test_loss_and_controls_of_patches_are_the_definitions(patches):
    _, variables, run = patches
    losses, metrics, seen = run(variables, make_batch(), 2)
    out, (x, lengths) = seen["out"], seen["inputs"]
    np.testing.assert_array_equal(lengths, [36, 21, 0])
    np.testing.assert_array_equal(out["chosen"].sum(axis=1), [25, 14, 0])
    centred = x.astype(np.float64) - x.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(out["target"], centred / np.sqrt(centred.var(axis=2, keepdims=True) + 1e-6), atol=1e-4)
    expected, got = reference(out, 2), means(losses, metrics)
    assert set(expected) == set(got)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-5), name
    for band in range(3):  # lines run along the patches of one band
        own = np.arange(band, 36, 3)
        known = np.flatnonzero(~out["chosen"][0, own])
        for p in range(20):
            lines = np.interp(np.arange(12), known, out["target"][0, own[known], p]) if len(known) else np.zeros(12)
            np.testing.assert_allclose(out["lines"][0, own, p], lines, atol=2e-5)


def test_patches_come_back_in_their_places(patches):
    """What the decoder's transformer gets: each visible patch's own vector, else the token, and the patch's place."""
    _, variables, run = patches
    seen = run(variables, make_batch(), 2)[2]
    frames, visible, lengths, *_ = seen["encoded"]
    x = seen["transformers"][1][0]
    params = variables["params"]["decoder"]
    places = sinusoids_2d(12, 3, 8)
    assert frames.shape[1] == 36 - int(0.7 * 36), "the encoder's row is as long as the most that is visible"
    for b, t in np.ndindex(3, 36):
        if t >= lengths[b]:
            continue
        own = frames[b, visible[b, : t + 1].sum() - 1] @ np.asarray(params["project"]["kernel"]) + np.asarray(
            params["project"]["bias"]
        )
        expected = (own if visible[b, t] else np.asarray(params["token"])) + places[t]
        np.testing.assert_allclose(x[b, t], expected, atol=1e-5)
    assert 0 < visible.sum() < 57


def test_hidden_patches_are_not_seen(patches):
    """The gradient of all outputs by the input: none at hidden patches and padding, some at every visible one."""
    task, variables, _ = patches
    lengths = jnp.array([36, 21], jnp.int32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 36, 20)), jnp.float32)

    def total(x):
        out = task.apply(variables, x, lengths, False, rngs=streams(task), method="_restore_patches")
        return jnp.sum(jnp.where(out["chosen"][..., None], jnp.sin(out["output"]), 0)), out["chosen"]

    grads, hidden = jax.jit(jax.grad(total, has_aux=True))(x)
    size = np.abs(np.asarray(grads)).max(axis=2)
    valid = np.arange(36)[None] < np.asarray(lengths)[:, None]
    np.testing.assert_array_equal(size[hidden | ~valid], 0)
    assert (size[valid & ~np.asarray(hidden)] > 0).all()


def test_zeroed_frames_are_not_seen():
    """Negative control: frames that stay as they are, are."""
    for zero in (1.0, 0.0):
        task = make_task(dict(layers=1), **TERA | dict(zero=zero, random=0.0, channels=0.0))
        variables = make_variables(task)
        lengths = jnp.array([60], jnp.int32)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 60, F)), jnp.float32)

        def total(x, task=task, variables=variables, lengths=lengths):
            out = task.apply(variables, x, lengths, False, rngs=streams(task), method="_restore_frames")
            return jnp.sum(jnp.sin(out["output"])), out["chosen"]

        grads, chosen = jax.jit(jax.grad(total, has_aux=True))(x)
        size = np.abs(np.asarray(grads)).max(axis=2)
        assert (size[~np.asarray(chosen)] > 0).all()
        assert ((size[np.asarray(chosen)] == 0) == (zero == 1)).all()


def test_unpatch_restores_the_spectrogram(patches):
    """Against the same audio's frames, from a front end without patches."""
    task, variables, _ = patches
    plain = make_task(dict(frontend=dict(name="mel", n_mels=12, factor=1)))
    inputs = lambda m, b: m.encoder.inputs(b)  # noqa: E731
    x, _ = task.apply(variables, make_batch(), method=inputs)
    frames, _ = plain.apply({"params": {"encoder": variables["params"]["encoder"]}}, make_batch(), method=inputs)
    np.testing.assert_allclose(unpatch(x, 3, (5, 4))[0], frames[0, :60], atol=1e-6)


def test_predict_shows_what_was_there_and_what_was_made(spans, patches):
    for (task, variables, run), frames in ((spans, [61, 36, 0]), (patches, [60, 35, 0])):
        rngs = streams(task, 2)
        shown = jax.jit(
            lambda v, t=task, r=rngs: t.apply(v, make_batch(), step=jnp.int32(0), rngs=r, method="predict")
        )(variables)
        np.testing.assert_array_equal(shown["lengths"], frames)
        assert (
            shown["target"].shape
            == shown["output"].shape
            == (3, 61 if task is spans[0] else 60, shown["target"].shape[2])
        )
        out = run(variables, make_batch(), 2)[2]["out"]
        if "mask" in shown:
            np.testing.assert_array_equal(shown["mask"], out["chosen"])
        else:
            share = (np.asarray(shown["target"]) != np.asarray(shown["output"]))[0].mean()
            assert share == pytest.approx(25 / 36, abs=0.01), "visible patches are shown as they are"


# ------------------------------------------------------------------------------------------- collapse and mistakes


def test_one_answer_for_all_frames_raises_an_alarm(spans, patches):
    for (task, variables, run), head in ((spans, ("head", "out")), (patches, ("decoder", "out"))):
        module, layer = head
        old = variables["params"][module][layer]
        zero = {layer: dict(kernel=0 * old["kernel"], bias=0.1 + 0 * old["bias"])}
        constant = {"params": variables["params"] | {module: variables["params"][module] | zero}}
        values = means(*run(constant, make_batch())[:2])
        assert set(task.health(values, 1000)) == {"output_collapse"}
        assert task.health(values, 999) == {}
        values = means(*run(variables, make_batch())[:2])  # drawn at random, it knows nothing
        assert set(task.health(values, 1000)) == {"stuck_at_chance"}
        assert task.health(values | dict(reconstruction=0.7 * values["chance_reconstruction"]), 1000) == {}


@pytest.mark.parametrize(
    ("alteration", "message"),
    [
        (dict(name="reverse"), "there are mockingjay, tera, patches"),
        (dict(prob=0.15), "alteration.name=None"),
        (dict(name="mockingjay", channels=0.2), "has no 'channels'; allowed: prob, random, span, zero"),
        (dict(name="tera", zero=0.8, random=0.3), "together at most 1"),
        (dict(name="tera", channels=1.2), "channels=1.2"),
        (dict(name="patches", share=1.0), "share=1.0"),
    ],
)
def test_options_are_checked(alteration, message):
    with pytest.raises(UserError, match=message):
        make_alteration(alteration)


@pytest.mark.parametrize(
    ("encoder", "alteration", "message"),
    [
        (dict(), HIDE, "need the front end 'patch'"),
        (PATCHES, TERA, "and it needs them"),
        (PATCHES | dict(positions=dict(name="sinusoidal")), HIDE, "visible patches lack"),
        (PATCHES | dict(attention=dict(positions="rotary")), HIDE, "visible patches lack"),
        (
            dict(
                frontend=dict(name="waveform", channels=(16,) * 3, kernels=(10, 3, 2), strides=(5, 2, 2), norm="group")
            ),
            TERA,
            "config.model.frontend",
        ),
    ],
)
def test_encoders_that_do_not_fit_are_named(encoder, alteration, message):
    task = make_task(encoder, **alteration)
    rngs = {"params": jax.random.key(0), **streams(task)}
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))


@pytest.mark.parametrize("size", ["tera", "mockingjay", "audio_mae", "tiny"])
def test_configs_are_sound(size):
    config = configs.load(f"configs/pretrain/mae.py:size={size}")
    configs.check(config)
    how = make_alteration(config.task.alteration)
    assert type(how) is {"mockingjay": Mockingjay, "audio_mae": Patches}.get(size, Tera)
    if size != "audio_mae":
        assert (how.prob, how.span, how.zero, how.random) == (0.15, 7, 0.8, 0.1)

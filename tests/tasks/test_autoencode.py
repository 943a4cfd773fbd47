"""Autoencoders: losses against numpy, what passes the middle, the codebook's updates, and the ways they collapse."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax import config as configs
from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.tasks.autoencode import FLOOR, RESOLUTIONS, Autoencode, log_magnitude
from tests.drawing import draw_params

SAMPLES, F = 4_400, 8
LENGTHS = np.array([4_400, 2_900, 0], np.int32)
WAVE: dict[str, Any] = dict(name="waveform", channels=(6, 6, 6), kernels=(10, 4, 4), strides=(5, 4, 4), norm="group")
MEL: dict[str, Any] = dict(name="mel", n_mels=F, factor=2)
ENCODER: dict[str, Any] = dict(
    width=16, layers=1, heads=2, mlp=16, norm="post", positions=dict(name="none"), dropout=0.0, attention_dropout=0.0,
    activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, scan=False, remat=False, dtype="float32",
)  # fmt: skip


def make_task(front: dict[str, Any], layers: int = 0, **changes: Any) -> Autoencode:
    tiny: dict[str, Any] = dict(
        bottleneck=4, codes=0, commitment=0.25, code_decay=0.9, revive_below=0.0,
        waveform_weight=0.1 if front["name"] == "waveform" else 0.0,
    )  # fmt: skip
    encoder = SpeechEncoder(**(ENCODER | dict(frontend=front, layers=layers)))
    return Autoencode(encoder=encoder, **(tiny | changes))


def make_batch(seed: int = 0, lengths: np.ndarray = LENGTHS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    audio = rng.normal(size=(len(lengths), SAMPLES))
    audio[:, 1:] += np.repeat(rng.uniform(-1, 1, (len(lengths), 11)), 400, axis=1)[:, : SAMPLES - 1] * audio[:, :-1]
    return dict(audio=(4000 * audio).clip(-32768, 32767).astype(np.int16), lengths=lengths)


def make_variables(task: Autoencode) -> dict[str, Any]:
    rngs = {name: jax.random.key(i) for i, name in enumerate(("params", *task.rngs))}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))
    drawn = dict(params=draw_params(shapes["params"]))
    if task.codes:
        rng = np.random.default_rng(1)
        counts = rng.uniform(1, 3, task.codes).astype(np.float32)
        words = 0.3 * rng.normal(size=(task.codes, task.bottleneck))
        book = dict(sums=words * counts[:, None], counts=counts)
        drawn["codebook"] = dict(quantizer=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), book))
    return drawn


def make_run(task: Autoencode):
    """Jitted `run(variables, batch)` -> losses, metrics, sums, outputs of the parts."""

    def both(variables, batch):
        seen: dict[str, Any] = {}

        def watch(call, args, kwargs, context):
            out = call(*args, **kwargs)
            name = (type(context.module).__name__, context.method_name)
            if name in (("Autoencode", "_waveforms"), ("Autoencode", "_frames"), ("VectorQuantizer", "__call__")):
                seen[context.method_name] = out
            if context.module.name == "narrow":
                seen["z"] = out
            return out

        with nn.intercept_methods(watch):
            out, sown = task.apply(variables, batch, step=jnp.int32(0), train=False, mutable=["sums"])
        return *out, sown.get("sums", {}), seen

    run = jax.jit(both)
    return lambda variables, batch: jax.tree.map(np.asarray, run(variables, batch))


def means(losses, metrics) -> dict[str, float]:
    return {k: float(s / w) if w else math.nan for k, (s, w) in (losses | metrics).items()}


@pytest.fixture(scope="module")
def waveform():
    task = make_task(WAVE)
    return task, make_variables(task), make_run(task)


@pytest.fixture(scope="module")
def discrete():
    task = make_task(MEL, layers=1, codes=6)
    return task, make_variables(task), make_run(task)


# ------------------------------------------------------------------------------------------- losses


def spectrum(x: np.ndarray, size: int) -> np.ndarray:
    """Log magnitudes of one signal by numpy: a window around every quarter of it, zeros outside."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    padded = np.pad(x.astype(np.float64), (size // 2, size))
    frames = [padded[t : t + size] * window for t in range(0, len(x) + 1, size // 4)]
    return np.log(np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 / (window**2).sum() + FLOOR))


def test_losses_of_the_waveform_are_the_definitions(waveform):
    _, variables, run = waveform
    batch = make_batch()
    losses, metrics, _, seen = run(variables, batch)
    target, output, samples = seen["_waveforms"]
    # 80 samples a frame, a field of 85: 54 and 36 frames.
    np.testing.assert_array_equal(samples, [53 * 80 + 85, 35 * 80 + 85, 0])
    rows = [np.asarray(batch["audio"][b, :n], np.float64) for b, n in enumerate(samples[:2])]
    rows = [x / np.sqrt(np.square(x).mean()) for x in rows]
    for b, x in enumerate(rows):
        np.testing.assert_allclose(target[b, : len(x)], x, rtol=1e-3, atol=1e-5)
        assert (target[b, len(x) :] == 0).all()
        assert (output[b, len(x) :] == 0).all()
    wanted = [[spectrum(x, size) for x in rows] for size in RESOLUTIONS]
    got = [[spectrum(output[b, : len(x)], size) for b, x in enumerate(rows)] for size in RESOLUTIONS]
    total, chance = 0.0, 0.0
    for size, w, g in zip(RESOLUTIONS, wanted, got, strict=True):
        mean = np.concatenate(w).mean(axis=0)
        total += sum(np.abs(a - b).mean(axis=1).sum() for a, b in zip(w, g, strict=True)) * size / 4 / 3
        chance += sum(np.abs(a - mean).mean(axis=1).sum() for a in w) * size / 4 / 3
    n = samples.sum()
    found = means(losses, metrics)
    # Logarithms in float32 of powers near the floor, of transforms that err by 1e-7 of the loudest bin.
    assert found["spectrum"] == pytest.approx(total / n, rel=2e-3)
    assert found["chance_spectrum"] == pytest.approx(chance / n, rel=2e-3)
    difference = sum(np.abs(output[b, : len(x)] - x).sum() for b, x in enumerate(rows))
    assert found["waveform"] == pytest.approx(0.1 * difference / n, rel=1e-3)
    assert found["chance_waveform"] == pytest.approx(0.1 * sum(np.abs(x).sum() for x in rows) / n, rel=1e-3)
    frames = np.concatenate(wanted[-1])
    assert found["target_deviation"] == pytest.approx(np.sqrt(frames.var(axis=0, ddof=1) + 1e-6).mean(), rel=1e-3)


def test_loudness_of_a_recording_is_not_asked_for(waveform):
    _, variables, run = waveform
    batch = make_batch()
    quiet = batch["audio"] // 4
    loud, quiet = (run(variables, batch | {"audio": audio}) for audio in (4 * quiet, quiet))
    assert loud[0]["spectrum"][0] == pytest.approx(quiet[0]["spectrum"][0], rel=1e-3)  # 1e-5 in the group norm


def test_losses_of_frames_are_the_definitions(discrete):
    task, variables, run = discrete
    losses, metrics, _, seen = run(variables, make_batch())
    target, output, counts = seen["_frames"]
    x, lengths = task.apply(variables, make_batch(), method=lambda m, b: m.encoder.inputs(b))
    np.testing.assert_array_equal(lengths, [26, 16, 0])
    np.testing.assert_array_equal(counts, [26, 16, 0])
    np.testing.assert_allclose(target, x[:, :26], atol=1e-6)
    valid = np.arange(26)[None] < counts[:, None]
    wanted, made = target[valid].astype(np.float64), output[valid]
    found = means(losses, metrics)
    assert found["reconstruction"] == pytest.approx(np.square(wanted - made).mean(), rel=1e-5)
    assert found["chance_reconstruction"] == pytest.approx(wanted.var(axis=0).mean(), rel=1e-5)
    assert found["output_deviation"] == pytest.approx(np.sqrt(made.var(axis=0, ddof=1) + 1e-6).mean(), rel=1e-4)
    codes = seen["__call__"].codes[valid[:, ::2][:, :13]]
    share = np.bincount(codes, minlength=6) / len(codes)
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    assert found["code_perplexity"] == pytest.approx(np.exp(entropy), rel=1e-4)
    assert found["unused_codes"] == pytest.approx((share == 0).mean())
    distance = np.square(seen["z"] - seen["__call__"].vectors)[valid[:, ::2][:, :13]].mean()
    assert found["commitment"] == pytest.approx(0.25 * distance, rel=1e-4)


def test_sums_and_weights_add_up_over_rows(waveform, discrete):
    """So that one division by the weight of the whole batch, over devices and micro-batches, is the mean."""
    for (_, variables, run), counts in ((waveform, (53 * 80 + 85, 35 * 80 + 85)), (discrete, (26 * F, 16 * F))):
        whole = run(variables, make_batch())[0]
        parts = [run(variables, make_batch(lengths=LENGTHS * np.int32(row)))[0] for row in ([1, 0, 0], [0, 1, 0])]
        for name, pair in whole.items():
            (a, m), (b, n) = (part[name] for part in parts)
            assert (m, n) == ((13, 8) if name == "commitment" else counts), name
            assert pair == (pytest.approx(a + b, rel=1e-5), m + n), name  # float32
            assert abs((a / m + b / n) / 2 / ((a + b) / (m + n)) - 1) > 1e-4, "negative control: mean of means"


def test_silence_has_a_finite_gradient():
    """Trap: the gradient of a magnitude, or of its logarithm, at zero."""
    lengths = jnp.array([600], jnp.int32)
    gradient = jax.grad(lambda x: jnp.sum(log_magnitude(x, lengths, 256)[0]))(jnp.zeros((1, 600)))
    assert np.isfinite(gradient).all()


# ------------------------------------------------------------------------------------------- the middle


def test_the_codebook_follows_over_updates(discrete):
    """Ten updates of sums over the whole batch against a loop in float64, from what the encoder gave."""
    task, variables, run = discrete
    after = jax.jit(lambda extra, sums, step: task.after_step({}, extra, sums, step))
    book = {k: np.array(v, np.float64) for k, v in variables["codebook"]["quantizer"].items()}
    extra = {"codebook": variables["codebook"]}
    for step in range(3):
        _, _, sums, seen = run({**variables, **extra}, make_batch(step))
        z, codes = seen["z"], seen["__call__"].codes
        for name in book:
            book[name] = 0.9 * book[name]
        for b, n in enumerate((13, 8, 0)):
            for t in range(n):
                book["sums"][codes[b, t]] += 0.1 * z[b, t]
                book["counts"][codes[b, t]] += 0.1
        extra = after(extra, sums, jnp.int32(step))
        for name, value in book.items():
            np.testing.assert_allclose(extra["codebook"]["quantizer"][name], value, atol=1e-5)
    assert np.abs(book["counts"] - variables["codebook"]["quantizer"]["counts"]).max() > 0.5


def test_codes_out_of_use_are_revived_where_asked(discrete):
    task, variables, _ = discrete
    far = variables["codebook"]["quantizer"] | dict(counts=jnp.array([5, 5, 5, 5, 5, 1e-3]))
    extra = {"codebook": {"quantizer": far | dict(sums=far["sums"].at[5].set(0))}}
    sums = dict(sums=np.zeros((6, 4), np.float32), counts=np.zeros(6, np.float32))
    reviving = task.clone(revive_below=0.05)
    kept, moved = (t.after_step({}, extra, sums, jnp.int32(0))["codebook"]["quantizer"] for t in (task, reviving))
    assert kept["counts"][5] < 0.01
    assert moved["counts"][5] > 1
    assert float(moved["counts"].sum()) == pytest.approx(float(kept["counts"].sum()), rel=1e-3)


def test_gradient_reaches_the_encoder_through_the_codes(discrete):
    task, variables, _ = discrete

    def loss(params, codebook):
        losses, _ = task.apply(
            {"params": params, "codebook": codebook}, make_batch(), step=jnp.int32(0), train=True
        )  # fmt: skip
        total, n = losses["reconstruction"]
        return total / n

    dparams, dbook = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], variables["codebook"])
    assert all((g == 0).all() for g in jax.tree.leaves(dbook))
    assert np.abs(dparams["narrow"]["kernel"]).max() > 1e-5
    assert np.abs(dparams["encoder"]["projection"]["kernel"]).max() > 1e-6


def test_probes_see_every_layer_and_the_middle(discrete, waveform):
    for (task, variables, run), widths in ((discrete, [16, 16, 4]), (waveform, [6, 4])):
        encoded = jax.jit(lambda v, t=task: t.apply(v, make_batch(), method="features"))(variables)
        assert [h.shape[2] for h in encoded.hidden] == widths
        np.testing.assert_array_equal(encoded.frames, encoded.hidden[-1])
        seen = run(variables, make_batch())[3]
        middle = seen["__call__"].vectors if "__call__" in seen else seen["z"]
        np.testing.assert_allclose(encoded.frames, middle, atol=1e-5)


# ------------------------------------------------------------------------------------------- collapse and mistakes


def alarms(task, variables, run, step=1000, **changes):
    values = means(*run(variables, make_batch())[:2])
    return task.health(values | changes, step)


def test_one_code_for_all_frames_raises_an_alarm(discrete):
    """Codewords far from all inputs but one: nothing else is ever chosen, nor moved."""
    task, variables, run = discrete
    assert alarms(task, variables, run, 100) == {}
    book = variables["codebook"]["quantizer"]
    far = book | dict(
        sums=book["sums"] + 100 * (np.arange(6) > 0)[:, None].astype(np.float32) * book["counts"][:, None]
    )
    collapsed = variables | {"codebook": {"quantizer": far}}
    found = alarms(task, collapsed, run, 100)
    assert set(found) == {"codebook_collapse"}
    assert alarms(task, collapsed, run, 99) == {}
    assert "task.revive_below" in found["codebook_collapse"]
    # And the cure that the message names: the far codes die out, and come back where the inputs are.
    extra, cured = {"codebook": {"quantizer": far}}, task.clone(revive_below=0.2, code_decay=0.5)
    after = jax.jit(lambda extra, sums, step: cured.after_step({}, extra, sums, step))
    for step in range(20):
        extra = after(extra, run({**variables, **extra}, make_batch())[2], jnp.int32(step))
    assert alarms(task, {**variables, **extra}, run, 100) == {}


def test_one_answer_for_all_frames_raises_an_alarm(discrete, waveform):
    for task, variables, run in (discrete, waveform):
        name = "conv0" if task is waveform[0] else "out"
        decoder = variables["params"]["decoder"]
        silent = decoder | {name: jax.tree.map(jnp.zeros_like, decoder[name])}
        constant = variables | {"params": variables["params"] | {"decoder": silent}}
        assert set(alarms(task, constant, run)) == {"output_collapse"}
        assert alarms(task, constant, run, 999) == {}


def test_guessing_is_at_chance_and_knowing_is_not(discrete, waveform):
    for task, variables, run in (discrete, waveform):
        assert set(alarms(task, variables, run)) == {"stuck_at_chance"}  # drawn at random, it knows nothing
        assert alarms(task, variables, run, 999) == {}
        assert alarms(task, variables, run, spectrum=0.1, reconstruction=0.1) == {}


def test_mistakes_are_named():
    wave = make_task(WAVE | dict(norm="layer"))
    packed = make_batch() | dict(starts=np.zeros((3, 1), np.int32), lengths=LENGTHS[:, None])
    for task, batch, message in (
        (make_task(MEL, waveform_weight=0.1), make_batch(), "waveform_weight=0.1"),
        (make_task(dict(name="patch", n_mels=16, embedding=16)), make_batch(), "'patch' has no frames"),
        (wave, packed, "data.fill=False"),
    ):
        rngs = {name: jax.random.key(0) for name in ("params", *task.rngs)}
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda t=task, b=batch, r=rngs: t.init(r, b, step=jnp.int32(0), train=False))


@pytest.mark.parametrize("size", ["waveform", "vq", "features", "tiny"])
def test_configs_are_sound(size):
    config = configs.load(f"configs/pretrain/autoencode.py:size={size}")
    configs.check(config)
    assert config.task.codes == dict(vq=512, tiny=256).get(size, 0)
    assert (config.task.commitment, config.task.code_decay) == (0.25, 0.99)

"""APC: the loss and its controls against numpy, that the future is not seen, and the ways it collapses."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from speechjax import config as configs
from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.tasks import apc
from speechjax.tasks.apc import APC, PAST, check_causal
from tests.drawing import draw_params

SAMPLES, FRAMES, F = 9_840, 60, 6
LENGTHS = np.array([9_840, 6_000, 700, 0], np.int32)  # 60, 36, 2 and no frames
COUNTS = np.array([60, 36, 2, 0])
ENCODER: dict[str, Any] = dict(
    frontend=dict(name="mel", n_mels=F, factor=1), width=16, layers=2, heads=2, mlp=16, norm="pre",
    positions=dict(name="none"), block=dict(name="gru"), dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    input_dropout=0.0, layerdrop=0.0, scan=False, remat=False, dtype="float32",
)  # fmt: skip
CAUSAL = dict(block=dict(name="transformer"), positions=dict(kernel=4, groups=2), attention=dict(chunk=1))


def make_task(encoder: dict[str, Any] | None = None, **changes: Any) -> APC:
    tiny: dict[str, Any] = dict(shift=5, codes=0, code_temperature=0.5)
    return APC(encoder=SpeechEncoder(**(ENCODER | (encoder or {}))), **(tiny | changes))


def make_batch(seed: int = 0, lengths: np.ndarray = LENGTHS) -> dict[str, np.ndarray]:
    """Noise whose colour and loudness change, in the padding too."""
    rng = np.random.default_rng(seed)
    audio = rng.normal(size=(len(lengths), SAMPLES))
    audio[:, 1:] += np.repeat(rng.uniform(-1, 1, (len(lengths), 9)), 1200, axis=1)[:, : SAMPLES - 1] * audio[:, :-1]
    loudness = np.repeat(rng.uniform(0.2, 2, (len(lengths), 13)), 800, axis=1)[:, :SAMPLES]
    return dict(audio=(3000 * loudness * audio).clip(-32768, 32767).astype(np.int16), lengths=lengths)


def streams(task: Any, seed: int = 0) -> dict[str, jax.Array]:
    return {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(task.rngs)}


def make_variables(task: APC) -> dict[str, Any]:
    """Parameters drawn without compiling; the control has seen nothing."""
    rngs = {"params": jax.random.key(0), **streams(task)}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))
    control = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes["control"])
    return dict(params=draw_params(shapes["params"]), control=control)


def make_run(task: APC, train: bool = False):
    """Jitted `run(variables, batch)` -> losses, metrics, sums, (inputs, frame lengths), predictions."""

    def both(variables, batch):
        out, sown = task.apply(
            variables, batch, step=jnp.int32(0), train=train, rngs=streams(task), mutable=["sums"]
        )  # fmt: skip
        x, lengths = task.apply(variables, batch, method=lambda m, b: m.encoder.inputs(b))
        output = task.apply(variables, x, lengths, train, rngs=streams(task), method="_predict")[0]
        return *out, sown["sums"], (x, lengths), output

    run = jax.jit(both)
    return lambda variables, batch: jax.tree.map(np.asarray, run(variables, batch))


def means(losses, metrics) -> dict[str, float]:
    return {k: float(s / w) if w else math.nan for k, (s, w) in (losses | metrics).items()}


@pytest.fixture(scope="module")
def model():
    task = make_task()
    return task, make_variables(task), make_run(task)


# ------------------------------------------------------------------------------------------- loss and controls


def pairs(x, lengths, shift: int, k: int):
    """(row, encoder frame, last input frame seen, target) of every frame that has one, by loops."""
    for b, n in enumerate(lengths):
        for t in range(x.shape[1] // k):
            first = t * k + shift
            if first + k <= n:
                yield b, t, (t + 1) * k - 1, x[b, first : first + k].astype(np.float64).ravel()


def reference(x, lengths, output, shift: int, k: int) -> dict[str, float]:
    found = list(pairs(x, lengths, shift, k))
    target = np.array([y for *_, y in found])
    guess = np.array([output[b, t] for b, t, *_ in found], np.float64)
    copy = np.array([np.tile(x[b, last], k) for b, _, last, _ in found])
    deviation = lambda y: np.sqrt(y.var(axis=0, ddof=1) + 1e-6).mean()  # noqa: E731
    root = lambda y: math.sqrt(np.square(y - target).mean())  # noqa: E731
    return dict(
        prediction=np.abs(guess - target).mean(), mse=np.square(guess - target).mean(), rmse=root(guess),
        chance_prediction=np.abs(target.mean(axis=0) - target).mean(), chance_rmse=root(target.mean(axis=0)),
        copy_error=np.abs(copy - target).mean(), copy_rmse=root(copy), linear_error=np.abs(target).mean(),
        linear_rmse=root(0 * target), output_deviation=deviation(guess), target_deviation=deviation(target),
    )  # fmt: skip


@pytest.mark.parametrize(("k", "shift"), [(1, 5), (2, 3)])
def test_loss_and_metrics_are_the_definitions(k, shift):
    task = make_task(dict(frontend=dict(name="mel", n_mels=F, factor=k)), shift=shift)
    losses, metrics, _, (x, lengths), output = make_run(task)(make_variables(task), make_batch())
    np.testing.assert_array_equal(lengths, COUNTS)
    expected, got = reference(x, lengths, output, shift, k), means(losses, metrics)
    assert set(expected) == set(got)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-5), name  # float32
    n = sum(max(0, (int(c) - shift) // k) for c in COUNTS)
    assert losses["prediction"][1] == n * k * F
    assert abs(got["rmse"] - got["prediction"]) > 0.05, "root mean square is not the mean absolute error"


def test_depth_zero_is_one_affine_map():
    task = make_task(dict(layers=0))
    variables = make_variables(task)
    assert set(variables["params"]) == {"head", "encoder"}
    assert set(variables["params"]["encoder"]) == {"mask_embedding"}, "which every encoder has, and nothing else"
    losses, _, _, (x, lengths), _ = make_run(task)(variables, make_batch())
    W, b = (np.asarray(variables["params"]["head"][name], np.float64) for name in ("kernel", "bias"))
    errors = [np.abs(x[r, t] @ W + b - target) for r, t, _, target in pairs(x, lengths, 5, 1)]
    assert losses["prediction"][0] == pytest.approx(np.sum(errors), rel=1e-5)  # float32
    features = jax.jit(lambda v: task.apply(v, make_batch(), method="features"))(variables)
    np.testing.assert_array_equal(features.frames, x)
    assert len(features.hidden) == 1


def design(x, lengths) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    for b, t, _, target in pairs(x, lengths, 5, 1):
        past = [x[b, s] if s >= 0 else np.zeros(F) for s in range(t - PAST + 1, t + 1)]
        rows.append((np.concatenate([*past, [1.0]]), target))
    a, y = zip(*rows, strict=True)
    return np.array(a, np.float64), np.array(y, np.float64)


def test_linear_control_is_least_squares_on_the_batches_before(model):
    """Against numpy's lstsq on the stacked batches, the older ones decayed, the ridge as rows of its own."""
    task, variables, run = model
    after = jax.jit(lambda params, extra, sums, step: task.after_step(params, extra, sums, step))
    extra, designs = {"control": variables["control"]}, []
    for seed in range(3):
        step = jnp.int32(20 * seed)
        losses, metrics, sums, inputs, _ = run({**variables, **extra}, make_batch(seed))
        a, y = design(*inputs)
        if seed == 2:
            old = jax.tree.map(np.asarray, extra["control"])
            decay = np.sqrt(np.concatenate([np.full(len(d[0]), 0.999 ** (1 - i)) for i, d in enumerate(designs)]))
            A, Y = (np.concatenate(part) * decay[:, None] for part in zip(*designs, strict=True))
            ridge = np.sqrt(1e-3 * (decay**2).sum()) * np.eye(A.shape[1])
            W = np.linalg.lstsq(np.concatenate([A, ridge]), np.concatenate([Y, np.zeros((len(ridge), F))]), rcond=None)
            np.testing.assert_allclose(old["weights"], W[0], atol=2e-3)  # float32, condition 1e4
            assert np.abs(old["weights"]).max() > 0.1
            got = means(losses, metrics)
            assert got["linear_error"] == pytest.approx(np.abs(a @ W[0] - y).mean(), rel=1e-3)
            assert got["linear_rmse"] == pytest.approx(np.sqrt(np.square(a @ W[0] - y).mean()), rel=1e-3)
            own = np.linalg.lstsq(a, y, rcond=None)[0]
            assert np.square(a @ own - y).mean() < 0.9 * got["linear_rmse"] ** 2, "not fitted to what it is judged on"
        designs.append((a, y))
        extra = after(variables["params"], extra, sums, step)
    between = after(variables["params"], extra, sums, jnp.int32(41))
    np.testing.assert_array_equal(between["control"]["weights"], extra["control"]["weights"])
    assert between["control"]["frames"] > extra["control"]["frames"]


# ------------------------------------------------------------------------------------------- the future


@pytest.mark.parametrize("encoder", [{}, CAUSAL, CAUSAL | dict(frontend=dict(name="mel", n_mels=F, factor=2))])
def test_no_prediction_depends_on_a_later_frame(encoder):
    """Trap: what is predicted leaks into the input.  The gradient of one frame's prediction by all inputs."""
    task = make_task(encoder)
    k = task.encoder.subsampling()
    variables, t = make_variables(task), 9
    lengths = jnp.array([40], jnp.int32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, F)), jnp.float32)

    def said(x):
        return jnp.sum(
            jnp.square(task.apply(variables, x, lengths, False, rngs=streams(task), method="_predict")[0][0, t])
        )

    by_frame = np.abs(np.asarray(jax.jit(jax.grad(said))(x)))[0].max(axis=1)
    seen = (t + 1) * k
    np.testing.assert_array_equal(by_frame[seen:], 0)
    assert (by_frame[seen - k : seen] > 0).all()
    assert (by_frame[: seen - k] > 0).all(), "all of the past"


def test_a_bidirectional_encoder_does_leak(monkeypatch):
    """Negative control of the test above, and why such encoders are refused."""
    monkeypatch.setattr(apc, "check_causal", lambda encoder: None)
    task = make_task(CAUSAL | dict(attention=dict(positions="none")))
    variables, lengths = make_variables(task), jnp.array([40], jnp.int32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, F)), jnp.float32)
    said = lambda x: jnp.sum(jnp.square(task.apply(variables, x, lengths, False, method="_predict")[0][0, 9]))  # noqa: E731
    assert (np.abs(np.asarray(jax.jit(jax.grad(said))(x)))[0, 10:].max(axis=1) > 0).all()


def test_unnormalised_audio_is_not_heard_ahead_and_normalised_audio_is():
    """From the samples on.  Published normalisation over the utterance looks ahead: documented, and seen here."""
    batch = make_batch(lengths=LENGTHS[:1])
    later = batch | {"audio": batch["audio"].copy()}
    later["audio"][:, 4000:] //= 3
    before = (4000 - 400) // 160 + 1  # frames whose windows end there
    for normalize, same in (("none", True), ("utterance", False)):
        task = make_task(dict(layers=1, frontend=ENCODER["frontend"] | dict(normalize=normalize)))
        variables, run = make_variables(task), make_run(task)
        a, b = (run(variables, each)[4][0] for each in (batch, later))
        assert (np.array_equal(a[:before], b[:before])) == same
        assert not np.allclose(a[before + 3 :], b[before + 3 :])


@pytest.mark.parametrize(
    ("encoder", "fits"),
    [
        (dict(), True),
        (dict(positions=dict(name="sinusoidal")), True),
        (dict(positions=dict(kernel=4, groups=2)), False),  # convolutions over both sides before the GRU
        (dict(positions=dict(kernel=4, groups=2), attention=dict(chunk=3)), True),  # their causal form
        (CAUSAL, True),
        (CAUSAL | dict(attention=dict(chunk=2)), False),  # the first of a chunk sees the second
        (CAUSAL | dict(attention=dict()), False),
        (CAUSAL | dict(layers=0, attention=dict()), True),
        (dict(frontend=dict(name="patch", n_mels=16, embedding=16)), False),
    ],
)
def test_what_sees_the_future_is_refused(encoder, fits):
    made = SpeechEncoder(**(ENCODER | encoder))
    if fits:
        check_causal(made)
    else:
        with pytest.raises(UserError, match=r"choose mel|attention\.chunk=1"):
            check_causal(made)


def test_mistakes_are_named():
    front = dict(name="waveform", channels=(16,) * 3, kernels=(10, 3, 2), strides=(5, 2, 2), norm="group")
    packed = make_batch() | dict(starts=np.zeros((4, 1), np.int32), lengths=LENGTHS[:, None])
    for task, batch, message in (
        (make_task(dict(frontend=dict(name="mel", n_mels=F, factor=8))), make_batch(), "shift=5 is below"),
        (make_task(dict(frontend=front)), make_batch(), "config.model.frontend"),
        (make_task(), packed, "data.fill=False"),
    ):
        rngs = {"params": jax.random.key(0), **streams(task)}
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda t=task, b=batch, r=rngs: t.init(r, b, step=jnp.int32(0), train=False))


# ------------------------------------------------------------------------------------------- codes and collapse


def alarms(task, variables, run, step=1000):
    losses, metrics, *_ = run(variables, make_batch())
    values = means(losses, metrics)
    return task.health(values, step), values


def replaced(variables, name, **leaves):
    return variables | {"params": variables["params"] | {name: leaves}}


def test_vq_apc_counts_its_codes_and_says_when_they_collapse():
    task = make_task(codes=12)
    variables, run = make_variables(task), make_run(task)
    found, values = alarms(task, variables, run, 10)
    assert not found
    assert 1.5 < values["code_perplexity"] <= 12
    assert run(variables, make_batch())[4].shape == (4, FRAMES, F)
    # Logits that are the same for all frames choose one code for all.
    logits = dict(kernel=jnp.zeros((16, 12)), bias=jnp.arange(12.0))
    quantizer = variables["params"]["quantizer"] | {"logits": logits}
    collapsed, values = alarms(task, replaced(variables, "quantizer", **quantizer), run, 10)
    assert set(collapsed) == {"codebook_collapse"}
    assert values["code_perplexity"] == pytest.approx(1)
    output = run(replaced(variables, "quantizer", **quantizer), make_batch())[4]
    np.testing.assert_allclose(output[0], np.broadcast_to(output[0, :1], output[0].shape), atol=1e-6)


def test_code_temperature_shapes_the_gradient_not_the_choice():
    """Codes are hard, so the loss is the same at any temperature; the soft choice's gradient is not."""
    variables = make_variables(make_task(codes=12))

    def loss(params, temperature):
        task = make_task(codes=12, code_temperature=temperature)
        (losses, _), _ = task.apply(
            variables | {"params": params}, make_batch(), step=jnp.int32(0), train=True, rngs=streams(task),
            mutable=["sums"],
        )  # fmt: skip
        total, n = losses["prediction"]
        return total / n

    run = jax.jit(jax.value_and_grad(loss))
    (hot, first), (cold, last) = (run(variables["params"], temperature) for temperature in (2.0, 0.5))
    assert float(cold) == pytest.approx(float(hot), rel=1e-6)
    first, last = (np.asarray(gradient["quantizer"]["logits"]["kernel"]) for gradient in (first, last))
    assert np.linalg.norm(last - first) > 0.05 * np.linalg.norm(first) > 0


def test_one_answer_for_all_frames_raises_an_alarm(model):
    task, variables, run = model
    constant = replaced(variables, "head", kernel=jnp.zeros((16, F)), bias=jnp.full(F, 0.1))
    found, values = alarms(task, constant, run)
    assert set(found) == {"output_collapse"}
    assert values["output_deviation"] < 0.01
    assert alarms(task, constant, run, 999)[0] == {}


def test_guessing_is_at_chance_and_knowing_is_not(model):
    task, variables, run = model
    found, values = alarms(task, variables, run)  # drawn at random, it knows nothing
    assert set(found) == {"stuck_at_chance"}
    assert alarms(task, variables, run, 999)[0] == {}
    assert task.health(values | dict(prediction=0.7 * values["chance_prediction"]), 1000) == {}


def test_controls_of_real_speech_are_in_their_order(real_speech):
    """Of speech 50 ms ahead the past says more than the mean, and eight frames more than the last one alone."""
    files = sorted((real_speech / "kerstin").rglob("*.ogg"))[:60]
    audio = np.concatenate([soundfile.read(file, dtype="int16")[0] for file in files])
    rows = len(audio) // SAMPLES // 2
    task = make_task(dict(layers=0, frontend=dict(name="mel", n_mels=20, factor=1)))
    variables, run = make_variables(task), make_run(task)
    first, second = audio[: 2 * rows * SAMPLES].reshape(2, rows, SAMPLES)
    lengths = np.full(rows, SAMPLES, np.int32)
    *_, sums, _, _ = run(variables, dict(audio=first, lengths=lengths))
    extra = task.after_step(variables["params"], {"control": variables["control"]}, sums, jnp.int32(0))
    got = means(*run({**variables, **extra}, dict(audio=second, lengths=lengths))[:2])
    assert got["linear_rmse"] < 0.95 * min(got["copy_rmse"], got["chance_rmse"])


def test_predict_shows_targets_beside_predictions(model):
    task, variables, run = model
    shown = jax.jit(lambda v: task.apply(v, make_batch(), step=jnp.int32(0), method="predict"))(variables)
    *_, (x, _), output = run(variables, make_batch())
    np.testing.assert_array_equal(shown["lengths"], [55, 31, 0, 0])
    np.testing.assert_array_equal(shown["target"][0, :55], x[0, 5:])
    np.testing.assert_allclose(shown["output"], output, atol=1e-6)


@pytest.mark.parametrize("size", ["paper", "vq", "transformer", "linear", "tiny"])
def test_configs_are_sound(size):
    config = configs.load(f"configs/pretrain/apc.py:size={size}")
    configs.check(config)
    assert config.task.shift == 5
    assert configs.make_task(config).encoder.layers == {"linear": 0, "transformer": 12}.get(size, 3)
    assert config.task.codes == (512 if size == "vq" else 0)

"""Deep Speech 2: its front end and layers against plain loops, lengths, chunks, lookahead, training, size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from speechjax import presets
from speechjax.data.plan import plan_shapes
from speechjax.errors import UserError
from speechjax.models.batch_norm import DECAY, EPSILON
from speechjax.models.deep_speech import (
    DeepSpeechFrontend,
    DeepSpeechLayer,
    DeepSpeechTop,
    log_spectrogram,
)
from speechjax.models.encoder import FRONTENDS, SpeechEncoder
from speechjax.models.layers import frame_mask
from speechjax.models.transformer import BLOCKS, Transformer
from speechjax.paths import path_name
from speechjax.step import init_state, train_step
from speechjax.tasks._base import Task
from tests.drawing import draw_params

SHARED: dict[str, Any] = dict(
    heads=1, mlp=1, norm="none", dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
    dtype=jnp.float32,
)  # fmt: skip
FRONT = DeepSpeechFrontend(filters=(2, 3, 2))
SAMPLES = 3360  # 20 frames, 10 after the first convolution
# Whole, of odd length, one frame exactly, one sample short of one, nothing.
LENGTHS = np.array([3360, 2111, 480, 479, 0], np.int32)
T, D = 12, 6


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def variables_of(module: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Parameters around zero, running means too, variances around one."""
    shapes: Any = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    state = draw_params(shapes["batch_stats"])
    state = jax.tree_util.tree_map_with_path(lambda k, v: 1 + 0.3 * v if k[-1].key == "variance" else v, state)
    return {"params": draw_params(shapes["params"]), "batch_stats": state}


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """int16 [5, 3360], noise in the padding too."""
    return np.random.default_rng(0).integers(-9000, 9000, (5, SAMPLES)).astype(np.int16)


@pytest.fixture(scope="module")
def variables(audio) -> dict[str, Any]:
    return variables_of(FRONT, audio, LENGTHS)


@pytest.fixture(scope="module")
def run(variables):
    """(audio, lengths, train) -> (frames, lengths), and what was sown."""

    @functools.partial(jax.jit, static_argnums=2)
    def run(audio, lengths, train):
        return FRONT.apply(variables, audio, lengths, mutable=["sums"] if train else ["nothing"])

    return run


def test_the_registries_know_them():
    assert FRONTENDS["deep_speech"] is DeepSpeechFrontend
    assert BLOCKS["deep_speech"] is DeepSpeechLayer


def test_spectrogram_is_that_of_numpy(audio):
    """Windows of 20 ms every 10 ms of a clip of power 1, whole ones only."""
    spectrum, counts = jax.jit(log_spectrogram)(audio, LENGTHS)
    assert spectrum.shape == (5, 20, 161)
    assert counts.tolist() == [20, 12, 2, 1, 0]
    for row, n, frames in zip(audio, LENGTHS, counts, strict=True):
        clip = row[:n] / 32768
        clip = clip / np.sqrt(np.mean(clip**2)) if n else clip
        for t in range(frames):
            window = clip[160 * t : 160 * t + 320] * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(320) / 320))
            expected = np.log(np.abs(np.fft.rfft(window)) ** 2)
            got = np.asarray(spectrum)[np.flatnonzero((audio == row).all(axis=1))[0], t]
            np.testing.assert_allclose(got, expected, atol=2e-3)  # noise has bins 60 dB below the loudest
    assert (np.asarray(spectrum)[1, 12:] == 0).all()


def in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def plain_norm(x: np.ndarray, p: Any, state: Any) -> np.ndarray:
    return (x - state["mean"]) / np.sqrt(state["variance"] + EPSILON) * p["scale"] + p["bias"]


def plain_front(x: np.ndarray, n: int, variables: Any) -> np.ndarray:
    """One utterance [N, 161] in float64, N even or odd, convolution by convolution: [n, C]."""
    y = x.astype(np.float64)[..., None]
    for i, (high, wide, along) in enumerate([(41, 11, 2), (21, 11, 1), (21, 11, 1)]):
        p, norm = (variables["params"][k] for k in (f"conv{i}_kernel", f"norm{i}"))
        padded = np.pad(y, ((wide // 2,) * 2, (high // 2,) * 2, (0, 0)))
        bins = (y.shape[1] + 1) // 2
        out = np.zeros((n, bins, p.shape[-1]))
        for t in range(n):
            for f in range(bins):
                patch = padded[along * t : along * t + wide, 2 * f : 2 * f + high]
                out[t, f] = np.tensordot(patch, p, axes=3)
        y = np.clip(plain_norm(out, norm, variables["batch_stats"][f"norm{i}"]), 0, 20)
    return y.reshape(n, y.shape[1] * y.shape[2])


def test_front_end_equals_plain_loops(audio, run, variables):
    frames, lengths = run(audio, LENGTHS, False)[0]
    assert frames.shape == (5, 10, 2 * 21)
    assert FRONT.channels[-1] == 42
    assert lengths.tolist() == [10, 6, 1, 0, 0]
    x, _ = FRONT.inputs(jnp.asarray(audio), jnp.asarray(LENGTHS))
    exact = in_float64(variables)
    for row, (n, valid) in enumerate(zip((10, 6, 1), (20, 12, 2), strict=True)):
        expected = plain_front(np.asarray(x)[row, :valid], n, exact)
        assert (expected > 0).mean() > 0.2
        np.testing.assert_allclose(np.asarray(frames)[row, :n], expected, atol=5e-5)  # float32, 700 terms a sum


def test_frame_len_is_exact():
    """`hop n + extra` samples make n frames, one sample less makes fewer: as plans assume."""
    hop, extra = FRONT.frame_len()
    assert (hop, extra) == (320, 160)

    def counted(samples: int) -> int:
        given = jax.ShapeDtypeStruct((2, samples), jnp.int16), jax.ShapeDtypeStruct((2,), jnp.int32)
        shapes: Any = jax.eval_shape(lambda *a: FRONT.init_with_output(jax.random.key(0), *a)[0], *given)
        return shapes[0].shape[1]

    for n in (1, 2, 7):
        for samples, frames in ((hop * n + extra, n), (hop * n + extra - 1, n - 1), (hop * (n + 1) + extra - 1, n)):
            assert FRONT.out_len(samples) == counted(samples) == frames
            assert FRONT.out_len(jnp.array([samples], jnp.int32))[0] == frames
    assert counted(100) == FRONT.out_len(0) == 0
    lengths = np.random.default_rng(0).integers(5000, 50000, 100)
    for shape in plan_shapes(
        lengths, crop=40000, batch_samples=80000, shapes=3, row_multiple=1, quantum=hop, offset=extra
    ):
        assert FRONT.out_len(shape.samples) == (shape.samples - extra) / hop


@pytest.mark.parametrize("train", [False, True])
def test_padding_changes_nothing_not_even_statistics(audio, run, train):
    (frames, lengths), sown = run(audio, LENGTHS, train)
    inside = np.arange(10) < np.asarray(lengths)[:, None]
    assert (np.asarray(frames)[~inside] == 0).all()
    noisy = np.where(np.arange(SAMPLES) < LENGTHS[:, None], audio, -audio[::-1])
    (other, _), other_sown = run(noisy, LENGTHS, train)
    np.testing.assert_array_equal(frames, other)
    jax.tree.map(np.testing.assert_array_equal, sown, other_sown)
    assert set(sown) == ({"sums"} if train else set())
    changed = audio.copy()
    changed[1, 600:700] = 0
    differing = np.abs(run(changed, LENGTHS, train)[0][0] - frames).max(axis=(1, 2))
    assert differing[1] > 1e-2, "negative control: valid samples"
    assert (differing[0] > 0) == train, "statistics of the batch tie its rows together, running ones do not"


def test_a_row_does_not_depend_on_how_far_it_is_padded(audio, run):
    wide, narrow = run(audio, LENGTHS, False)[0][0][1], run(audio[1:2, :2111], LENGTHS[1:2], False)[0][0][0]
    np.testing.assert_allclose(wide[: len(narrow)], narrow, atol=1e-4)  # float32 sums in another order


def test_halves_and_packed_rows(audio, run, variables):
    x, lengths = FRONT.inputs(jnp.asarray(audio), jnp.asarray(LENGTHS))
    assert x.shape == (5, 20, FRONT.n_features)
    embedded = jax.jit(lambda x, n: FRONT.apply(variables, x, n, method="embed"))(x, lengths)
    np.testing.assert_allclose(embedded[0], run(audio, LENGTHS, False)[0][0], atol=1e-5)  # compiled in two pieces
    assert embedded[0].shape[1] == x.shape[1] // FRONT.subsampling
    assert not FRONT.packs()
    with pytest.raises(UserError, match=r"packed row.*data\.fill=False"):
        FRONT.apply(variables, audio, LENGTHS, None, jnp.zeros((5, 1), jnp.int32))
    for filters in ((), (2, 2, 2, 2)):
        with pytest.raises(UserError, match=r"filters=.*1 to 3"):
            FRONT.clone(filters=filters).apply(variables, x, lengths, method="embed")


def plain_layer(x: np.ndarray, v: Any, cell: str, both: bool) -> np.ndarray:
    """One utterance [T, D] in float64, equations 3, 4 and 9, or 10."""
    p, state = v["params"], v["batch_stats"]["norm"]
    f = lambda a: np.clip(a, 0, 20)  # noqa: E731
    s = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    a = plain_norm(x @ p["input"]["kernel"], p["norm"], state)
    total = np.zeros(x.shape)
    for way in range(1 + both):
        U, h = p["kernel"][way], np.zeros(D)
        for t in range(len(x))[:: -1 if way else 1]:
            if cell == "rnn":
                h = f(a[t] + h @ U)
            else:
                u = h @ U
                r, z = s(a[t, :D] + u[:D]), s(a[t, D : 2 * D] + u[D : 2 * D])
                h = (1 - z) * f(a[t, 2 * D :] + r * u[2 * D :]) + z * h
            total[t] += h
    return total


@pytest.mark.parametrize("cell", ["rnn", "gru"])
@pytest.mark.parametrize("both", [True, False])
def test_layer_equals_the_equations(cell, both):
    layer: Any = DeepSpeechLayer(**SHARED, cell=cell, bidirectional=both)
    x, lengths = noise(3, T, D), np.array([T, 7, 0], np.int32)
    v = variables_of(layer, x, lengths, False)
    v["params"] = jax.tree.map(lambda p: 2 * p, v["params"])
    y, branch = jax.jit(lambda: layer.apply(v, x, lengths, False))()
    np.testing.assert_array_equal(y, branch)
    for row, n in enumerate(lengths):
        expected = plain_layer(x[row, :n], in_float64(v), cell, both)
        np.testing.assert_allclose(y[row, :n], expected, rtol=1e-5, atol=1e-5)  # float32, twelve steps
        assert (np.asarray(y)[row, n:] == 0).all()
    assert (np.asarray(y)[0] > 0).mean() > 0.3


def test_top_equals_plain_loops():
    """Row convolution over four frames (equation 11), of one utterance and of a packed row, then two layers."""
    options: dict[str, Any] = dict(**SHARED, bidirectional=False, lookahead=3)
    x = noise(1, T, D)
    ids = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]], np.int32)
    for lengths in (ids, np.array([9], np.int32)):
        top: Any = DeepSpeechTop(**options, fully_connected=2)
        v = variables_of(top, x, lengths, False)
        exact = in_float64(v)
        taps = exact["params"]["lookahead"]
        runs = [(0, 5), (5, 10)] if lengths is ids else [(0, 9)]
        expected = np.zeros((T, D))
        for start, stop in runs:
            for t in range(start, stop):
                expected[t] = sum(taps[j] * x[0, t + j] for j in range(4) if t + j < stop)
        alone: Any = DeepSpeechTop(**options, fully_connected=0)
        only = alone.apply({"params": {"lookahead": v["params"]["lookahead"]}}, x, lengths, False)
        np.testing.assert_allclose(only[0], expected, atol=1e-5)
        for i in range(2):
            p, state = exact["params"], exact["batch_stats"][f"norm{i}"]
            expected = np.clip(plain_norm(expected @ p[f"linear{i}"]["kernel"], p[f"norm{i}"], state), 0, 20)
        valid = np.asarray(frame_mask(jnp.asarray(lengths), T))[0]
        y = np.asarray(jax.jit(lambda top=top, v=v, n=lengths: top.apply(v, x, n, False))())[0]
        np.testing.assert_allclose(y[valid], expected[valid], atol=1e-5)
        assert (y[~valid] == 0).all()


def stack_of(attention: dict[str, Any] | None = None, scan: bool = False, **block: Any) -> Transformer:
    own: dict[str, Any] = SHARED | dict(
        layers=2, scan=scan, remat=scan, positions=dict(name="none"), attention=attention or {}
    )
    return Transformer(**own, block=dict(name="deep_speech", **block))


def reach(frame: int, **options: Any) -> list[int]:
    """The frames of a stack of two layers and its top that change with that frame's input."""
    stack: Any = stack_of(**options)
    x, lengths = noise(1, T, D) + 1, np.array([T], np.int32)
    v = variables_of(stack, x, lengths, train=False)
    # Nobody's ReLU is closed, and nobody's at its end.
    shift = lambda k, p: p + 3 if k[-1].key == "bias" else p / 2  # noqa: E731
    v["params"] = jax.tree_util.tree_map_with_path(shift, v["params"])
    other = x.copy()
    other[0, frame] += 1
    a, b = (jax.jit(lambda x: stack.apply(v, x, lengths, train=False)[0])(given) for given in (x, other))
    return np.flatnonzero(np.abs(np.asarray(a) - b).max(axis=(0, 2))).tolist()


def test_who_sees_whom():
    everything = list(range(T))
    assert reach(6) == everything
    assert reach(6, bidirectional=False) == everything[6:]
    assert reach(6, bidirectional=False, lookahead=2) == everything[4:]
    assert reach(6, attention=dict(chunk=4)) == everything[4:], "its chunk and all later ones"
    assert reach(6, cell="gru", attention=dict(chunk=1)) == everything[6:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cell="lstm"), r"block\.cell='lstm': there are rnn, gru"),
        (dict(lookahead=3), r"block\.lookahead=3 is for bidirectional=False"),
        (dict(lookahead=3, bidirectional=False, attention=dict(chunk=2)), r"without attention\.chunk"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: stack_of(**options).init(jax.random.key(0), noise(1, 3, D), jnp.array([3]), train=False))


def test_bfloat16_stays_near_float32():
    """Over 200 frames of two layers: states and statistics are float32, so roundings do not add up."""
    x, lengths = noise(2, 200, D), np.array([200, 150], np.int32)
    v = variables_of(stack_of(scan=True), x, lengths, train=False)

    def run(dtype):
        stack: Any = stack_of(scan=True).clone(dtype=dtype)
        (y, _), sown = stack.apply(v, x.astype(dtype), lengths, train=True, mutable=["sums"])
        return y, sown["sums"]

    (wide, sums), (narrow, narrow_sums) = jax.jit(lambda: (run(jnp.float32), run(jnp.bfloat16)))()
    assert narrow.dtype == jnp.bfloat16
    far = lambda a, b: np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)  # noqa: E731
    assert 0 < far(narrow, wide) < 0.05  # eight bits
    assert far(narrow[:, 100:], wide[:, 100:]) < 2 * far(narrow[:, :100], wide[:, :100])
    for a, b in zip(jax.tree.leaves(narrow_sums), jax.tree.leaves(sums), strict=True):
        assert a.dtype == jnp.float32
        assert far(a, b) < 0.02


class Norms(Task):
    """A loss that anything lowers, and the running statistics of the encoder."""

    def __call__(self, batch, *, step, train):
        encoded = self.encoder(batch, train=train)
        n = jnp.sum(encoded.lengths).astype(jnp.float32)
        return {"loss": (jnp.sum(jnp.square(encoded.frames - 1)), n)}, {}


@pytest.mark.parametrize("scan", [False, True])
def test_an_update_trains_every_parameter_and_moves_every_statistic(scan):
    """The loop's own step, whole and in micro-batches; evaluation uses what was gathered."""
    model: dict[str, Any] = presets.deep_speech_2("tiny") | dict(width=8, scan=scan, remat=scan)
    model["frontend"] |= dict(filters=(2, 2))
    task: Any = Norms(encoder=SpeechEncoder(**model))
    batch: Any = dict(
        audio=(3000 * noise(4, 1760)).astype(np.int16), lengths=np.array([1760, 1100, 800, 0], np.int32),
        unread=np.zeros(4, np.int32),
    )  # fmt: skip
    state = jax.jit(lambda: init_state(task, optax.sgd(0.0), 0, batch))()
    assert set(state.extra) == {"batch_stats"}
    step = jax.jit(functools.partial(train_step, task, optax.sgd(1e-3), 0, 10), static_argnames="parts")
    after = {parts: step(state, batch, parts=parts)[0] for parts in ((1,) if scan else (1, 2))}

    def unmoved(new, old):
        same = jax.tree.map(lambda a, b: bool((a == b).all()), new, old)
        return {path_name(k) for k, still in jax.tree_util.tree_flatten_with_path(same)[0] if still}

    # What the projection adds to every frame, batch norm takes off again.
    assert unmoved(after[1].params, state.params) <= {"encoder/mask_embedding", "encoder/projection/bias"}
    assert len(jax.tree.leaves(state.extra)) == 2 * (2 + (1 if scan else 2) + 1)  # convolutions, layers, top
    assert not unmoved(after[1].extra, state.extra)

    # The first convolution's inputs do not depend on how the batch is cut, so neither do its statistics.
    front = [after[parts].extra["batch_stats"]["encoder"]["front"]["norm0"] for parts in after]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), front[0], front[-1])
    x, lengths = task.encoder._detached_front().inputs(jnp.asarray(batch["audio"]), jnp.asarray(batch["lengths"]))
    kernel = state.params["encoder"]["front"]["conv0_kernel"]
    y = jax.lax.conv_general_dilated(
        x[..., None], kernel, (2, 2), ((5, 5), (20, 20)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    seen = np.asarray(y)[np.arange(y.shape[1]) < np.asarray(lengths)[:, None] // 2].reshape(-1, 2)
    np.testing.assert_allclose(front[0]["mean"], (1 - DECAY) * seen.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(front[0]["variance"], DECAY + (1 - DECAY) * seen.var(axis=0), atol=1e-5)

    evaluate = jax.jit(lambda state: task.apply({"params": state.params, **state.extra}, batch, step=0, train=False))
    (before, _), (later, _) = evaluate(state), evaluate(after[1].replace(params=state.params))
    assert np.abs(before["loss"][0] - later["loss"][0]) > 1e-3


def count(tree: Any) -> int:
    return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(tree))


def test_base_has_the_published_size():
    """Closed form; table 1 says 38 M, without our norm and linear map before the first layer."""
    encoder = SpeechEncoder(**presets.deep_speech_2())
    batch = dict(audio=jnp.zeros((1, 1600), jnp.int16), lengths=jnp.array([1600], jnp.int32))
    shapes: Any = jax.eval_shape(lambda: encoder.init(jax.random.key(0), batch))["params"]
    W, C = 1280, 96 * 21
    layers = 7 * (3 * W * W + 2 * W)
    top = W * W + 2 * W
    front = 41 * 11 * 32 + 21 * 11 * 32 * 32 + 21 * 11 * 32 * 96 + 2 * (32 + 32 + 96)
    assert count(shapes["front"]) == front
    assert count(shapes["transformer"]) == layers + top
    before = 2 * C + (C + 1) * W + W  # feature norm, projection, mask embedding
    assert count(shapes) == front + before + layers + top
    published = front + (C * W + 6 * W * W + 7 * 2 * W * W) + 7 * 2 * W + top + 29 * (W + 1)
    assert abs(published / 38e6 - 1) < 0.05

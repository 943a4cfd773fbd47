"""Spectral front ends: frame counts, padding, stacking, strided convolutions and patches against plain loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from speechjax.audio.features import cmvn, log_mel
from speechjax.data.plan import plan_shapes
from speechjax.errors import UserError
from speechjax.models.encoder import FRONTENDS
from speechjax.models.spectral import ConvSubsampling, MelFrontend, MfccFrontend, PatchFrontend, sinusoids_2d

KINDS: dict[str, Any] = {
    "mel": MelFrontend(n_mels=20, factor=4),
    "whisper": MelFrontend(n_mels=20, factor=2, convention="whisper"),
    "librosa": MelFrontend(n_mels=20, factor=1, convention="librosa"),
    "conv": MelFrontend(n_mels=20, factor=4, subsample="conv", conv_channels=8, embedding=16),
    "mfcc": MfccFrontend(),
    "patch": PatchFrontend(n_mels=32, patch=(4, 16), embedding=16, convention="kaldi"),
}
SAMPLES = 8000
# Whole, of odd length, one window exactly, one sample short of a window, nothing.
LENGTHS = np.array([8000, 5003, 400, 399, 0], np.int32)


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """int16 [5, 8000], noise in the padding too."""
    return np.random.default_rng(0).integers(-9000, 9000, (5, SAMPLES)).astype(np.int16)


@pytest.fixture(scope="module", params=KINDS)
def front(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def run(front, audio, random_params):
    shapes = jax.eval_shape(lambda: front.init(jax.random.key(0), audio, LENGTHS))
    params = random_params(front, audio, LENGTHS) if shapes else {}
    return jax.jit(lambda audio, lengths: front.apply({"params": params}, audio, lengths))


def test_the_encoder_knows_them():
    classes = {"mel": MelFrontend, "mfcc": MfccFrontend, "patch": PatchFrontend}
    assert {name: FRONTENDS.get(name) for name in classes} == classes


@pytest.mark.parametrize(
    ("front", "frame_len", "frames"),
    [
        (MelFrontend(factor=1), (160, 240), 98),  # Kaldi's count for a second: 1 + (16000 - 400) // 160
        (MelFrontend(factor=4), (640, 240), 24),
        (MfccFrontend(), (320, 240), 49),  # wav2vec 2.0's count
        (MelFrontend(factor=2, convention="whisper"), (320, 0), 50),
        (PatchFrontend(), (2560, 0), 6 * 8),
        (PatchFrontend(n_mels=80, convention="kaldi"), (2560, 240), 6 * 5),
    ],
)
def test_frames_of_a_second(front, frame_len, frames):
    assert front.frame_len() == frame_len
    assert front.out_len(16000) == frames
    if front == PatchFrontend():
        assert front.out_len(163840) == 512, "tokens of 10.24 s, as published"
    shape = jax.eval_shape(front.inputs, jnp.zeros((1, 16000), jnp.int16), jnp.zeros(1, jnp.int32))[0].shape
    assert shape[1] // front.subsampling == frames


def test_frame_len_is_exact(front):
    """`hop n + extra` samples make n frames (patches: n columns), one sample less makes fewer: as plans assume."""
    hop, extra = front.frame_len()
    unit = front.grid() if isinstance(front, PatchFrontend) else 1

    def counted(samples: int) -> int:
        shapes = jax.eval_shape(
            lambda audio, lengths: front.init_with_output(jax.random.key(0), audio, lengths)[0],
            jax.ShapeDtypeStruct((2, samples), jnp.int16), jax.ShapeDtypeStruct((2,), jnp.int32),
        )  # fmt: skip
        return shapes[0].shape[1]

    for n in (1, 2, 7):
        for samples, frames in ((hop * n + extra, n), (hop * n + extra - 1, n - 1), (hop * (n + 1) + extra - 1, n)):
            assert front.out_len(samples) == frames * unit
            assert front.out_len(jnp.array([samples], jnp.int32))[0] == frames * unit
            assert counted(samples) == frames * unit
    lengths = np.random.default_rng(0).integers(5000, 50000, 100)
    planned = plan_shapes(lengths, crop=40000, batch_samples=80000, shapes=3, row_multiple=1, quantum=hop, offset=extra)
    assert len(planned) == 3
    for shape in planned:
        assert front.out_len(shape.samples) == (shape.samples - extra) / hop * unit


def test_frames_ignore_padding_and_end_with_the_utterance(front, run, audio):
    frames, lengths = run(audio, LENGTHS)
    np.testing.assert_array_equal(lengths, front.out_len(LENGTHS))
    assert frames.shape == (5, front.out_len(SAMPLES), front.channels[-1])
    inside = np.arange(frames.shape[1])[None] < np.asarray(lengths)[:, None]
    assert (np.asarray(frames)[~inside] == 0).all()
    assert np.isfinite(frames).all()
    if front.convention == "kaldi":
        assert lengths[3] == lengths[4] == 0, "shorter than a window"
    noisy = np.where(np.arange(SAMPLES) < LENGTHS[:, None], audio, -audio[::-1])
    np.testing.assert_array_equal(frames, run(noisy, LENGTHS)[0])
    changed = audio.copy()
    changed[1, 2000:2100] = 0
    differing = np.abs(run(changed, LENGTHS)[0] - frames).max(axis=(1, 2))
    assert differing[1] > 1e-2, "negative control: valid samples"
    assert (differing[[0, 2, 3, 4]] == 0).all()


def test_a_row_does_not_depend_on_how_far_it_is_padded(run, audio):
    """Padding noise and static width: the frames of 5003 samples are the same in a row of 5003."""
    wide, narrow = run(audio, LENGTHS)[0][1], run(audio[1:2, :5003], LENGTHS[1:2])[0][0]
    # float32 sums in another order: logarithms near 20 that vary by 0.5 keep four digits.
    np.testing.assert_allclose(wide[: len(narrow)], narrow, atol=1e-4)


def test_int16_is_float_over_32768(run, audio):
    np.testing.assert_array_equal(run(audio, LENGTHS)[0], run(audio.astype(np.float32) / 32768, LENGTHS)[0])


def test_inputs_then_embed_is_the_call(front, run, audio, random_params):
    shapes = jax.eval_shape(lambda: front.init(jax.random.key(0), audio, LENGTHS))
    variables = {"params": random_params(front, audio, LENGTHS)} if shapes else {}
    x, lengths = jax.jit(front.inputs)(audio, LENGTHS)
    assert x.dtype == jnp.float32
    assert x.shape[1] // front.subsampling == front.out_len(SAMPLES)
    features, lengths = jax.jit(lambda x, n: front.apply(variables, x, n, method="embed"))(x, lengths)
    expected, expected_lengths = run(audio, LENGTHS)
    np.testing.assert_array_equal(lengths, expected_lengths)
    np.testing.assert_allclose(features, expected, atol=1e-5)  # float32; compiled in two pieces


def test_every_utterance_is_normalised_by_itself(front, audio):
    """Mean 0 and variance 1 of every feature over a row's own valid frames, however loud it is and its neighbours."""
    quiet = np.where(np.arange(5)[:, None] == 1, audio // 8, audio)
    for row, signal in ((0, audio), (1, audio), (1, quiet)):
        x, lengths = (np.asarray(a) for a in jax.jit(front.inputs)(signal, LENGTHS))
        valid = x[row, : lengths[row]]
        if isinstance(front, PatchFrontend):
            (frames, bands), rows = front.patch, front.grid()
            valid = valid.reshape(-1, rows, frames, bands).transpose(0, 2, 1, 3).reshape(-1, front.n_mels)
            if row == 1:
                continue  # frames that fill no column were normalised too
        np.testing.assert_allclose(valid.mean(axis=0), 0, atol=5e-5)  # float32 logarithms near 20 that vary by 0.5
        np.testing.assert_allclose(valid.std(axis=0), 1, atol=1e-4)
    raw, lengths = jax.jit(front.clone(normalize="none").inputs)(audio, LENGTHS)
    assert np.abs(np.asarray(raw)[0, : lengths[0]].mean(axis=0)).max() > 0.5, "negative control: normalize='none'"


def test_silence_and_one_frame_are_zero(front):
    silence = np.zeros((2, SAMPLES), np.int16)
    silence[1, :400] = np.random.default_rng(0).integers(-9000, 9000, 400)
    x, _ = jax.jit(front.inputs)(silence, np.array([SAMPLES, 400], np.int32))
    rows = 1 if front.convention == "kaldi" else 0  # centred windows: 400 samples have more than one frame
    assert (np.asarray(x)[: 1 + rows] == 0).all()


def loops_stack(x: np.ndarray, factor: int) -> np.ndarray:
    return np.array([np.concatenate([x[t * factor + i] for i in range(factor)]) for t in range(len(x) // factor)])


def test_stacking_equals_loops(audio):
    front = KINDS["mel"]
    frames, lengths = jax.jit(lambda a, n: front.apply({}, a, n))(audio, LENGTHS)
    for row in (0, 1):
        n = np.array([LENGTHS[row]])
        mel = jax.jit(lambda a, n: cmvn(*log_mel(a, n, convention="kaldi", n_mels=20))[0][0])(
            audio[row : row + 1, : n[0]], n
        )
        expected = loops_stack(np.asarray(mel), 4)
        assert len(expected) == lengths[row]
        np.testing.assert_allclose(
            frames[row, : lengths[row]], expected, atol=1e-4
        )  # float32 logarithms near 20 that vary by 0.5


def loops_conv(x: np.ndarray, params: dict[str, np.ndarray], layers: int) -> np.ndarray:
    """One row [N, F] in float64: output (t, f) sees inputs 2 t - 1 to 2 t + 1 and 2 f - 1 to 2 f + 1, zero outside."""
    y = x[..., None].astype(np.float64)
    for i in range(layers):
        kernel, bias = params[f"conv{i}_kernel"], params[f"conv{i}_bias"]
        out = np.zeros((len(y) // 2, -(-y.shape[1] // 2), kernel.shape[-1])) + bias
        for t in range(out.shape[0]):
            for f in range(out.shape[1]):
                for i_t in range(3):
                    for i_f in range(3):
                        s, g = 2 * t + i_t - 1, 2 * f + i_f - 1
                        if 0 <= s and 0 <= g < y.shape[1]:
                            out[t, f] += y[s, g] @ kernel[i_t, i_f]
        y = np.maximum(out, 0)
    flat = y.reshape(len(y), y.shape[1] * y.shape[2])
    return flat @ params["linear"]["kernel"] + params["linear"]["bias"]


@pytest.mark.parametrize(("factor", "features"), [(2, 6), (4, 7)])
def test_conv_subsampling_equals_loops(factor, features, random_params):
    """Rows alone, without padding, so the loops cannot see any."""
    module = ConvSubsampling(factor, channels=4, out=5)
    rng = np.random.default_rng(0)
    x, lengths = rng.normal(size=(3, 21, features)).astype(np.float32), np.array([21, 14, 3], np.int32)
    params = random_params(module, x, lengths)
    ours, counts = jax.jit(module.apply)({"params": params}, x, lengths)
    np.testing.assert_array_equal(counts, lengths // factor)
    assert ours.shape == (3, 21 // factor, 5)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for row, n in enumerate(lengths):
        expected = loops_conv(x[row, :n], exact, factor.bit_length() - 1)
        np.testing.assert_allclose(ours[row, : counts[row]], expected, atol=1e-5)  # float32
    assert (np.asarray(ours)[1, counts[1] :] == 0).all()


@pytest.mark.parametrize("factor", [2, 8])
def test_conv_subsampling_is_causal(factor, random_params):
    """Output t is made of inputs before (t + 1) factor, and of the last of those."""
    module = ConvSubsampling(factor, channels=4, out=5)
    x, lengths = np.random.default_rng(0).uniform(size=(1, 40, 8)).astype(np.float32), np.array([40], np.int32)
    params = random_params(module, x, lengths)
    params = jax.tree.map(jnp.abs, params)  # no ReLU is shut by chance
    apply = jax.jit(lambda x: module.apply({"params": params}, x, lengths)[0][0])
    t = 3
    later, last = x.copy(), x.copy()
    later[:, (t + 1) * factor :] += 5
    last[:, (t + 1) * factor - 1] += 5
    np.testing.assert_array_equal(apply(later)[: t + 1], apply(x)[: t + 1])
    assert np.abs(apply(later) - apply(x))[t + 1 :].max() > 1e-2, "negative control"
    assert np.abs(apply(last) - apply(x))[t].max() > 1e-3


def test_patches_are_cut_column_by_column(audio):
    front = KINDS["patch"]
    x, lengths = (np.asarray(a) for a in jax.jit(front.inputs)(audio, LENGTHS))
    mel, frames = jax.jit(lambda a, n: cmvn(*log_mel(a, n, convention="kaldi", n_mels=32)))(audio, LENGTHS)
    assert front.grid() == 2
    np.testing.assert_array_equal(lengths, np.asarray(frames) // 4 * 2)
    for row, token in ((0, 0), (0, 1), (0, 2), (1, int(lengths[1]) - 1)):
        column, band = token // 2, token % 2
        expected = np.asarray(mel)[row, column * 4 : column * 4 + 4, band * 16 : band * 16 + 16]
        np.testing.assert_allclose(x[row, token], expected.reshape(-1), atol=1e-5)  # compiled otherwise, float32


def test_patch_embedding_adds_the_position_of_the_patch(audio, random_params):
    front = KINDS["patch"]
    params = random_params(front, audio, LENGTHS)
    x, lengths = jax.jit(front.inputs)(audio, LENGTHS)
    y, _ = jax.jit(lambda x, n: front.apply({"params": params}, x, n, method="embed"))(x, lengths)
    projection = params["projection"]
    plain = np.asarray(x)[0] @ np.asarray(projection["kernel"]) + np.asarray(projection["bias"])
    for token in range(lengths[0]):
        column, band, position = token // 2, token % 2, []
        for place in (column, band):
            angles = [place / 10000 ** (i / 4) for i in range(4)]
            position += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
        np.testing.assert_allclose(y[0, token] - plain[token], position, atol=1e-4)  # float32 sums of 64 products


def test_grid_positions_tell_every_patch_apart():
    positions = sinusoids_2d(60, 8, 64)
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1) + 10 * np.eye(480)
    assert distance.min() > 0.1
    np.testing.assert_array_equal(positions[:8, :32], np.broadcast_to(positions[0, :32], (8, 32)))


@pytest.mark.parametrize("kind", ["conv", "patch"])
def test_spectra_stay_in_float32(kind, audio, random_params):
    """A bfloat16 encoder gets the same inputs bit for bit; only the embedding is rounded."""
    front = KINDS[kind]
    rounded = front.clone(dtype=jnp.bfloat16)
    params = random_params(front, audio, LENGTHS)

    @jax.jit
    def both():
        pairs = [f.apply({"params": params}, audio, LENGTHS)[0] for f in (front, rounded)]
        return [f.inputs(audio, LENGTHS)[0] for f in (front, rounded)], pairs

    (exact_x, x), (exact, embedded) = both()
    np.testing.assert_array_equal(x, exact_x)
    assert embedded.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(embedded, np.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.02  # eight bits


def test_mfcc_and_its_slopes_on_speech(real_speech):
    """Features 13 to 25 are the slopes of the first 13, those after them the slopes of these."""
    path = sorted((real_speech / "kerstin").rglob("*.ogg"))[0]
    signal, rate = soundfile.read(path, dtype="int16", frames=32000)
    assert rate == 16000
    front = MfccFrontend(normalize="none")
    x = np.asarray(jax.jit(front.inputs)(signal[None], np.array([len(signal)], np.int32))[0])[0]
    assert x.shape == (front._frames(len(signal)), 39)
    for order in (1, 2):
        lower, upper = x[:, 13 * (order - 1) : 13 * order], x[:, 13 * order : 13 * (order + 1)]
        for t in (10, 77, 150):
            slope = sum(lag * lower[t + lag] for lag in (-2, -1, 1, 2)) / 10
            np.testing.assert_allclose(upper[t], slope, atol=1e-3)  # float32; cepstra reach 100
    assert x[:, 0].std() > 5, "the loudness of speech varies"


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (MelFrontend(convention="htk2"), r"convention='htk2'.*kaldi"),
        (MelFrontend(normalize="global"), r"normalize='global'.*'utterance'"),
        (MelFrontend(factor=3), r"factor=3.*1, 2, 4 or 8"),
        (MelFrontend(subsample="pool"), r"subsample='pool'.*'stack' or 'conv'"),
        (MelFrontend(n_mels=128), r"frontend\.n_mels=128: .*lower n_mels"),
        (MfccFrontend(convention="whisper"), r"config\.model\.frontend.*MFCC"),
        (PatchFrontend(n_mels=80, patch=(16, 32)), r"n_mels=80.*32"),
        (PatchFrontend(embedding=10), r"embedding=10.*multiple of 4"),
    ],
)
def test_mistakes_are_named(front, message, audio):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: front.init(jax.random.key(0), audio, LENGTHS))


def test_packed_rows_are_refused(front, audio):
    assert not front.packs()
    with pytest.raises(UserError, match=r"data\.fill=False"):
        front.apply({}, audio, LENGTHS[:, None], None, np.zeros((5, 1), np.int32))


@pytest.mark.parametrize("kind", ["mel", "patch"])
def test_an_encoder_hears_speech_through_it(kind, real_speech, tiny_encoder, random_params):
    """Both halves of the front end make what `extract` makes; frames and hidden states count as they do."""
    options: dict[str, Any] = {
        "mel": dict(name="mel", factor=4, subsample="conv", conv_channels=8, embedding=24),
        "patch": dict(name="patch", n_mels=32, embedding=24),
    }
    signal, _ = soundfile.read(sorted((real_speech / "kerstin").rglob("*.ogg"))[0], dtype="int16", frames=16000)
    batch = dict(audio=np.stack([signal, signal[::-1]]), lengths=np.array([16000, 9000], np.int32))
    encoder = tiny_encoder().clone(frontend=options[kind])
    params = random_params(encoder, batch)

    @jax.jit
    def run():
        apply = lambda method, *args: encoder.apply({"params": params}, *args, method=method)  # noqa: E731
        halves = apply("embed", *apply("inputs", batch))
        return halves, apply("extract", batch), encoder.apply({"params": params}, batch, hidden=True)

    (halves, lengths), (whole, expected_lengths), encoded = run()
    np.testing.assert_array_equal(halves, whole)
    np.testing.assert_array_equal(lengths, expected_lengths)
    np.testing.assert_array_equal(lengths, encoded.lengths)
    assert [h.shape for h in encoded.hidden] == [(2, whole.shape[1], 64)] * 3
    hop, extra = encoder.frame_len()
    tokens = 2 if kind == "patch" else 1
    assert lengths.tolist() == [(n - extra) // hop * tokens for n in (16000, 9000)]
    assert np.isfinite(encoded.frames).all()
    assert encoder.subsampling() == (4 if kind == "mel" else 1)

"""Features against librosa 0.11, and the layer contract: padding in, zeros out."""

from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.fft
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.audio import features

# One signal is shorter than a window on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:n_fft=.* is too large for input signal:UserWarning")

# Float32 on both sides: librosa's own MFCC differ by 0.9e-4 from its float64 ones, and a near-silent mel band, a sum of
# cancelling rounding errors, by 1e-3 dB. A real mistake (another window, mel scale or floor) is 0.1 dB and more.
RTOL, ATOL = 1e-4, 5e-4
# (sample rate, FFT, hop, mel bands): the default, its 8 kHz counterpart, and a power of two with a short hop
SETTINGS = [(16000, 400, 160, 80), (8000, 200, 80, 26), (16000, 512, 128, 40)]


def _chirp(samples: int, sample_rate: int) -> np.ndarray:
    return 0.5 * librosa.chirp(fmin=60, fmax=0.45 * sample_rate, sr=sample_rate, length=samples)


def _signals(sample_rate: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal(9001)
    loud_and_quiet = np.concatenate([0.9 * rng.standard_normal(3000), 1e-7 * rng.standard_normal(4321)])
    return [
        x.astype(np.float32) for x in (noise, _chirp(8192, sample_rate), loud_and_quiet, np.zeros(1600), noise[:77])
    ]


def _padded(signals: list[np.ndarray], fill: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(x) for x in signals], np.int32)
    batch = np.random.default_rng(1).normal(0, fill, (len(signals), lengths.max() + 123)).astype(np.float32)
    for row, signal in zip(batch, signals, strict=True):
        row[: len(signal)] = signal
    return batch, lengths


def _librosa_log_mel(signal: np.ndarray, setting: tuple[int, int, int, int]) -> np.ndarray:
    sample_rate, n_fft, hop, n_mels = setting
    mel = librosa.feature.melspectrogram(y=signal, sr=sample_rate, n_fft=n_fft, hop_length=hop, n_mels=n_mels)
    return librosa.power_to_db(mel).T


def _librosa_mfcc(signal: np.ndarray, setting: tuple[int, int, int, int]) -> np.ndarray:
    sample_rate, n_fft, hop, n_mels = setting
    return librosa.feature.mfcc(y=signal, sr=sample_rate, n_mfcc=13, n_fft=n_fft, hop_length=hop, n_mels=n_mels).T


def _keywords(setting: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("sample_rate", "n_fft", "hop", "n_mels"), setting, strict=True))


def _check_against_librosa(signals: list[np.ndarray], setting: tuple[int, int, int, int]) -> None:
    batch, lengths = _padded(signals)
    log_mel, mel_frames = jax.jit(lambda x, n: features.log_mel(x, n, **_keywords(setting)))(batch, lengths)
    mfcc, mfcc_frames = jax.jit(lambda x, n: features.mfcc(x, n, **_keywords(setting)))(batch, lengths)
    np.testing.assert_array_equal(mel_frames, mfcc_frames)
    for row, signal in enumerate(signals):
        expected = _librosa_log_mel(signal, setting)
        assert mel_frames[row] == len(expected)
        np.testing.assert_allclose(log_mel[row, : len(expected)], expected, rtol=RTOL, atol=ATOL)
        np.testing.assert_allclose(mfcc[row, : len(expected)], _librosa_mfcc(signal, setting), rtol=RTOL, atol=ATOL)
        assert not np.any(log_mel[row, len(expected) :])
        assert not np.any(mfcc[row, len(expected) :])


@pytest.mark.parametrize("setting", SETTINGS)
def test_synthetic_sound_agrees_with_librosa(setting):
    _check_against_librosa(_signals(setting[0]), setting)


def test_real_speech_agrees_with_librosa(real_speech: Path):
    digits = [soundfile.read(real_speech / "fsdd" / f"{d}_theo_{d}.wav", dtype="float32")[0] for d in range(4)]
    _check_against_librosa(digits, SETTINGS[1])
    sentences = [
        soundfile.read(path, dtype="float32")[0] for path in sorted((real_speech / "kerstin").rglob("*.ogg"))[:3]
    ]
    assert sentences
    _check_against_librosa(sentences, SETTINGS[0])


@pytest.mark.parametrize("wrong", [{"htk": True}, {"norm": None}, {"window": "hamming"}, {"pad_mode": "reflect"}])
def test_the_tolerance_notices_another_convention(wrong):
    signal = _signals(16000)[0]
    ours, _ = jax.jit(features.log_mel)(jnp.asarray(signal)[None], jnp.array([len(signal)], jnp.int32))
    mel = librosa.feature.melspectrogram(y=signal, sr=16000, n_fft=400, hop_length=160, n_mels=80, **wrong)
    assert not np.allclose(ours[0], librosa.power_to_db(mel).T, rtol=RTOL, atol=ATOL)


def test_double_precision_agrees_with_librosa_to_a_millionth():
    # librosa stores its mel filters in float32: 6e-8 of a power, 3e-7 dB, summed by the DCT to below 1e-6 x sqrt(80).
    signal = _signals(16000)[0].astype(np.float64)
    with jax.enable_x64(True):
        mfcc, _ = jax.jit(features.mfcc)(jnp.asarray(signal)[None], jnp.array([len(signal)], jnp.int32))
        assert mfcc.dtype == jnp.float64
    np.testing.assert_allclose(mfcc[0], _librosa_mfcc(signal, SETTINGS[0]), rtol=0, atol=1e-6)


def test_spectrum_agrees_with_librosa():
    batch, lengths = _padded(_signals(16000))
    spectrum, n_frames = jax.jit(features.stft)(batch, lengths)
    for row, samples in enumerate(lengths):
        expected = librosa.stft(batch[row, :samples], n_fft=400, hop_length=160, center=True, pad_mode="constant").T
        # One float32 rounding error for each of the FFT's log2(400) ~ 9 stages, of a sum of at most 400 x 0.9.
        np.testing.assert_allclose(spectrum[row, : n_frames[row]], expected, rtol=0, atol=9 * 6e-8 * 360)
        assert not np.any(spectrum[row, n_frames[row] :])


@pytest.mark.parametrize(("order", "width"), [(1, 9), (2, 9), (1, 3), (2, 5)])
def test_deltas_agree_with_librosa(order, width):
    rng = np.random.default_rng(2)
    lengths = np.array([40, 23, width], np.int32)
    frames = rng.normal(0, 100, (3, 40, 13)).astype(np.float32)
    slopes, out_lengths = jax.jit(lambda x, n: features.deltas(x, n, width=width, order=order))(frames, lengths)
    np.testing.assert_array_equal(out_lengths, lengths)
    for row, length in enumerate(lengths):
        expected = librosa.feature.delta(frames[row, :length].T, width=width, order=order).T
        # Sums of at most 9 products of values up to 400: 9 roundings of 6e-8 x 400 each.
        np.testing.assert_allclose(slopes[row, :length], expected, rtol=0, atol=9 * 6e-8 * 400)
        assert not np.any(slopes[row, length:])


def test_deltas_of_less_than_a_window_are_zero():
    slopes, _ = features.deltas(jnp.ones((2, 5, 3)).cumsum(axis=1), jnp.array([5, 4], jnp.int32), width=5)
    np.testing.assert_allclose(slopes[0], 1.0, rtol=1e-6)
    assert not np.any(slopes[1])
    assert features.deltas(jnp.ones((2, 3, 1)), jnp.array([3, 0], jnp.int32))[0].shape == (2, 3, 1)


@pytest.mark.parametrize(("width", "order"), [(4, 1), (1, 1), (3, 3)])
def test_deltas_refuse_a_window_without_a_middle_or_too_short_for_the_order(width, order):
    with pytest.raises(ValueError, match="odd width above the order"):
        features.deltas(jnp.ones((1, 20, 2)), jnp.array([20], jnp.int32), width=width, order=order)


@pytest.mark.parametrize("function", [features.stft, features.log_mel, features.mfcc])
def test_whatever_lies_in_the_padding_the_output_is_the_same(function):
    function = jax.jit(function)
    signals = _signals(16000)
    quiet, lengths = _padded(signals)
    outputs = [np.asarray(function(_padded(signals, fill)[0], lengths)[0]) for fill in (0.3, 1e4, np.inf)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])
    longer = np.asarray(function(quiet, lengths + 1)[0])
    assert not np.array_equal(outputs[0], longer), "one padding sample more must be audible, or this test is deaf"


def test_int16_is_read_as_fractions_of_full_scale():
    pcm = np.random.default_rng(3).integers(-32768, 32767, (2, 5000), np.int16)
    lengths = np.array([5000, 4321], np.int32)
    np.testing.assert_array_equal(
        jax.jit(features.mfcc)(pcm, lengths)[0],
        jax.jit(features.mfcc)(pcm / np.float32(32768), lengths)[0],
    )


@given(samples=st.integers(0, 3000), hop=st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_the_static_length_is_the_length_of_a_full_row(samples, hop):
    audio = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    spectrum, n_frames = jax.eval_shape(lambda x, n: features.stft(x, n, hop=hop), audio, lengths)
    assert spectrum.shape[1] == features.out_len(samples, hop)
    assert n_frames.dtype == jnp.int32
    if samples:
        centred = np.zeros(samples + 400)
        assert spectrum.shape[1] == librosa.util.frame(centred, frame_length=400, hop_length=hop).shape[-1]


def test_an_empty_row_has_no_frames():
    mfcc, n_frames = jax.jit(features.mfcc)(jnp.ones((2, 800)), jnp.array([800, 0], jnp.int32))
    assert n_frames.tolist() == [6, 0]
    assert np.isfinite(mfcc).all()
    assert not np.any(mfcc[1])


@pytest.mark.parametrize("setting", SETTINGS)
def test_matrices(setting):
    sample_rate, n_fft, _, n_mels = setting
    expected = librosa.filters.mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels, dtype=np.float64).T
    np.testing.assert_allclose(features.mel_filters(sample_rate, n_fft, n_mels), expected, rtol=1e-9, atol=1e-14)
    expected = np.asarray(scipy.fft.dct(np.eye(n_mels), type=2, norm="ortho"))[:, :13]
    np.testing.assert_allclose(features.dct_matrix(n_mels, 13), expected, rtol=0, atol=1e-14)


def test_a_mel_band_without_a_bin_is_refused():
    with pytest.raises(ValueError, match="200 mel bands at 16000 Hz need a longer FFT than 400"):
        features.mel_filters(16000, 400, 200)

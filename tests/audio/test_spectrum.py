"""The spectrum's inverse against librosa and against itself; pre-emphasis; mean and variance normalisation."""

import functools

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.signal
from sounds import noise_and_tone, padded, speech

from speechjax.audio import features, spectrum

# One signal is shorter than a window on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:n_fft=.* is too large for input signal:UserWarning")
EPS = float(np.finfo(np.float32).eps)


@functools.partial(jax.jit, static_argnames=("n_fft", "hop"))
def _there_and_back(audio, lengths, *, n_fft=400, hop=160):
    found, _ = spectrum.stft(audio, lengths, n_fft=n_fft, hop=hop)
    return spectrum.istft(found, lengths, samples=audio.shape[1], n_fft=n_fft, hop=hop)


def _check_inverse(signals) -> None:
    batch, lengths = padded(signals)
    back, out_lengths = _there_and_back(batch, lengths)
    np.testing.assert_array_equal(out_lengths, lengths)
    for row, signal in zip(np.asarray(back), signals, strict=True):
        # A few roundings of the largest sample, ten-fold under the flank of the last window.
        np.testing.assert_allclose(row[: len(signal)], signal, rtol=0, atol=20 * EPS * np.abs(signal).max())
        assert not np.any(row[len(signal) :])


def test_the_inverse_gives_synthetic_sound_back():
    _check_inverse(noise_and_tone())


def test_the_inverse_gives_real_speech_back(real_speech):
    digits, sentences = speech(real_speech, seconds=1.5)
    _check_inverse(digits + sentences)


@pytest.mark.parametrize(("n_fft", "hop"), [(2, 1), (3, 1), (8, 4), (21, 7), (60, 17), (61, 30)])
def test_the_inverse_is_exact_at_every_length(n_fft, hop):
    lengths = np.arange(140, dtype=np.int32)
    audio = np.random.default_rng(n_fft).uniform(-1, 1, (140, 139))
    with jax.enable_x64(True):
        back, _ = _there_and_back(audio, lengths, n_fft=n_fft, hop=hop)
    # The last sample's only window may be as low as sin(pi / n_fft)^2 there, 2.7e-3 for 60.
    np.testing.assert_allclose(back, np.where(np.arange(139) < lengths[:, None], audio, 0), rtol=0, atol=1e-12)


def _check_against_librosa(signals) -> None:
    batch, lengths = padded(signals)
    rng = np.random.default_rng(4)
    found, n_frames = jax.jit(spectrum.stft)(batch, lengths)
    changed = np.asarray(found) * rng.uniform(0.5, 1.5, found.shape).astype(np.float32)
    inverse = jax.jit(functools.partial(spectrum.istft, samples=batch.shape[1]))
    ours, _ = inverse(changed, lengths)
    for row, n in enumerate(lengths):
        theirs = librosa.istft(changed[row, : n_frames[row]].T, hop_length=160, n_fft=400, length=n)
        # As above: 1e-4 relative of the loudest would be 40 times this.
        np.testing.assert_allclose(ours[row, :n], theirs, rtol=0, atol=20 * EPS * np.abs(theirs).max())
    beyond = np.arange(changed.shape[1])[:, None] >= np.asarray(n_frames)[:, None, None]
    other = np.where(beyond, rng.normal(size=changed.shape), 0).astype(np.float32)
    np.testing.assert_array_equal(inverse(changed + other, lengths)[0], ours)
    assert not np.array_equal(inverse(changed + np.roll(other, -1, axis=1), lengths)[0], ours)


def test_the_inverse_of_any_spectrum_agrees_with_librosa():
    _check_against_librosa(noise_and_tone())


def test_the_inverse_of_changed_speech_agrees_with_librosa(real_speech):
    _check_against_librosa(speech(real_speech, seconds=1.5)[1])


def test_the_round_trip_has_the_gradient_of_the_identity():
    batch, lengths = padded([*noise_and_tone(2001), np.zeros(0, np.float32)])
    weight = np.random.default_rng(6).normal(size=batch.shape).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(weight * _there_and_back(x, lengths)[0]))(batch)
    expected = np.where(np.arange(batch.shape[1]) < lengths[:, None], weight, 0)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=20 * EPS * np.abs(weight).max())


@pytest.mark.parametrize(("hop", "samples"), [(201, 1000), (160, 1761)])
def test_the_inverse_refuses_samples_without_a_window(hop, samples):
    with pytest.raises(ValueError, match="without a window: lower the hop"):
        spectrum.istft(jnp.zeros((1, 11, 201), jnp.complex64), jnp.array([900], jnp.int32), samples=samples, hop=hop)


def _check_pre_emphasis(signals) -> None:
    batch, lengths = padded(signals)
    ours, out_lengths = jax.jit(features.pre_emphasis)(batch, lengths)
    np.testing.assert_array_equal(out_lengths, lengths)
    for row, signal in zip(np.asarray(ours), signals, strict=True):
        theirs = librosa.effects.preemphasis(signal, coef=0.97, zi=np.zeros(1))
        # Two roundings of values up to the largest sample.
        np.testing.assert_allclose(row[: len(signal)], theirs, rtol=0, atol=2 * EPS * np.abs(signal).max())
        assert not np.any(row[len(signal) :])


def test_pre_emphasis_of_synthetic_sound_agrees_with_librosa():
    signals = noise_and_tone()
    _check_pre_emphasis(signals)
    undone = scipy.signal.lfilter([1], [1, -0.97], np.asarray(features.pre_emphasis(*padded(signals))[0])[0, :9001])
    # The inverse filter sums about 1 / (1 - 0.97) rounding errors.
    np.testing.assert_allclose(undone, signals[0], rtol=0, atol=33 * EPS)


def test_pre_emphasis_of_real_speech_agrees_with_librosa(real_speech):
    digits, sentences = speech(real_speech)
    _check_pre_emphasis(digits + sentences)


def test_pre_emphasis_reads_int16_and_knows_no_padding():
    pcm = np.random.default_rng(3).integers(-32768, 32767, (3, 101), np.int16)
    lengths = np.array([101, 40, 0], np.int32)
    ours, _ = features.pre_emphasis(pcm, lengths, coefficient=0.5)
    float_input = np.where(np.arange(101) < lengths[:, None], pcm / np.float32(32768), np.nan)
    np.testing.assert_array_equal(ours, features.pre_emphasis(float_input, lengths, coefficient=0.5)[0])
    assert ours[0, 0] == pcm[0, 0] / 32768
    assert not np.any(ours[2])


@pytest.mark.parametrize("variance", [True, False])
def test_normalised_features_agree_with_numpy(variance):
    rng = np.random.default_rng(8)
    values = rng.normal(-30, 20, (4, 50, 7)).astype(np.float32)
    values[:, :, 3] = 17.3
    lengths = np.array([50, 33, 1, 0], np.int32)
    ours, _ = jax.jit(functools.partial(features.cmvn, variance=variance))(values, lengths)
    for row, n in enumerate(lengths[:3]):
        double = values[row, :n].astype(np.float64)
        theirs = double - double.mean(axis=0)
        if variance:
            theirs = theirs / np.maximum(double.std(axis=0), 1e-9)
        # The mean of 50 values up to 100 is right to some 1e-5, and the deviation is 20.
        np.testing.assert_allclose(ours[row, :n], theirs, rtol=1e-5, atol=1e-5 if variance else 1e-4)
    for row, n in enumerate(lengths):
        assert not np.any(ours[row, n:])
    assert not variance or not np.any(ours[:, :, 3])


@pytest.mark.parametrize("variance", [True, False])
def test_normalised_speech_has_mean_zero_and_variance_one(real_speech, variance):
    signals = speech(real_speech)[1]
    mel, n_frames = jax.jit(features.log_mel)(*padded(signals))
    ours, _ = jax.jit(functools.partial(features.cmvn, variance=variance))(mel, n_frames)
    for row, frames in zip(np.asarray(ours, np.float64), n_frames, strict=True):
        np.testing.assert_allclose(row[:frames].mean(axis=0), 0, atol=1e-4)  # 400 summands of up to 80 dB in float32
        assert np.allclose(row[:frames].std(axis=0), 1, atol=1e-5) == variance


@pytest.mark.parametrize("variance", [True, False])
def test_normalisation_has_a_finite_gradient_and_knows_no_padding(variance):
    values = np.random.default_rng(9).normal(size=(4, 20, 3)).astype(np.float32)
    values[1] = 5.0
    lengths = jnp.array([20, 12, 1, 0], jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(features.cmvn(x, lengths, variance=variance)[0]))))
    value, gradient = step(values)
    assert np.isfinite(gradient).all()
    assert np.any(gradient[0])
    other = np.where(np.arange(20)[:, None] < np.asarray(lengths)[:, None, None], values, np.nan)
    again, gradient_again = step(other)
    assert value == again
    np.testing.assert_array_equal(gradient, gradient_again)


def test_deltas_of_what_lies_behind_padding_are_not_looked_at():
    values = np.full((1, 20, 2), np.nan, np.float32)
    values[0, :12] = np.arange(12)[:, None]
    slopes, _ = jax.jit(features.deltas)(values, jnp.array([12], jnp.int32))
    np.testing.assert_allclose(slopes[0, :12], 1.0, rtol=1e-5)  # of values up to 11, in float32

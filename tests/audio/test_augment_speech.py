"""Every augmentation that is not random, on real speech of odd lengths with padding, against float64 references."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.signal
from sounds import padded, speech

from speechjax.audio import augment, augment_filters, augment_mixing

# The requirement is 1e-4. Float32 sums, and FFTs of log2(50,000) ~ 16 stages, err by 1e-6 of the peak.
RTOL = 1e-5
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal(60_000).astype(np.float32)
RESPONSE = (RNG.standard_normal(1501) * np.exp(-np.arange(1501) / 300)).astype(np.float32)
RESPONSE[[0, 37]] = 0.5, -9.0


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def reference_noise(x: np.ndarray) -> np.ndarray:
    noise = NOISE[: len(x)].astype(np.float64)
    return x + noise * rms(x) / rms(noise) / 10 ** (7.5 / 20)


def reference_speed(x: np.ndarray, up: int, down: int) -> np.ndarray:
    # 64 zero crossings of a sinc that ends at 0.95 of the band, under a Kaiser window: all of it from the formula.
    reach = int(64 / 0.95 * max(up, down))
    zeros = np.arange(-reach, reach + 1) * 0.95 / max(up, down)
    taps = np.sinc(zeros) * np.i0(10.06 * np.sqrt(1 - (zeros / 64) ** 2)) / np.i0(10.06)
    # `resample_poly` multiplies its window by `up`.
    return scipy.signal.resample_poly(x, up, down, window=taps * 0.95 / max(up, down))


def reference_band(x: np.ndarray, low: float, high: float) -> np.ndarray:
    band, pass_zero = ((low, high), False) if low else (high, True)
    return np.convolve(x, scipy.signal.firwin(511, band, fs=16000, pass_zero=pass_zero))[255 : 255 + len(x)]


def reference_response(x: np.ndarray) -> np.ndarray:
    heard = np.convolve(x, RESPONSE.astype(np.float64))[37 : 37 + len(x)]
    return heard * rms(x) / rms(heard)


def rows_of(x: np.ndarray, like: jax.Array) -> jax.Array:
    return jnp.tile(jnp.asarray(x)[None], (len(like), 1))


def speed(which: int):
    return lambda x, n: augment_filters.speed(x, n, jnp.full((len(x),), which))


# name: (ours on a batch, the reference on one row)
CASES = {
    "gain": (lambda x, n: augment.gain(x, n, -7.3), lambda x: x * 10 ** (-7.3 / 20)),
    "clip": (lambda x, n: augment.clip(x, n, 0.3), lambda x: np.clip(x, -0.3 * abs(x).max(), 0.3 * abs(x).max())),
    "quantize": (lambda x, n: augment.quantize(x, n, 7), lambda x: np.clip(np.round(x * 64) / 64, -1, 63 / 64)),
    "noise": (lambda x, n: augment_mixing.add_noise(x, n, rows_of(NOISE[: x.shape[1]], x), 7.5), reference_noise),
    "slower": (speed(0), lambda x: reference_speed(x, 10, 9)),
    "same": (speed(1), lambda x: x),
    "faster": (speed(2), lambda x: reference_speed(x, 10, 11)),
    "telephone": (lambda x, n: augment_filters.band_limit(x, n, 300, 3400), lambda x: reference_band(x, 300, 3400)),
    "low-pass": (lambda x, n: augment_filters.band_limit(x, n, 0, 2500), lambda x: reference_band(x, 0, 2500)),
    "response": (lambda x, n: augment_filters.convolve_response(x, n, rows_of(RESPONSE, x)), reference_response),
}


@pytest.fixture(scope="module")
def batch(real_speech) -> tuple[np.ndarray, np.ndarray]:
    """Two sentences and a digit, all taken for 16 kHz, of odd lengths; loud noise in the padding."""
    digits, sentences = speech(real_speech)
    return padded([sentences[0][:40_001], sentences[1][:23_457], digits[0][:2999]])


@pytest.mark.parametrize("name", CASES)
def test_real_speech_agrees_with_the_reference(name, batch):
    ours, reference = CASES[name]
    audio, lengths = batch
    changed, new_lengths = jax.jit(ours)(audio, lengths)
    assert changed.dtype == jnp.float32
    changed = np.asarray(changed)
    for row, length in enumerate(lengths):
        expected = reference(audio[row, :length].astype(np.float64))
        assert new_lengths[row] == len(expected)
        error = np.abs(changed[row, : len(expected)] - expected).max()
        assert error <= RTOL * np.abs(expected).max()
        assert not np.any(changed[row, len(expected) :])


@pytest.mark.parametrize("name", sorted(set(CASES) - {"gain", "same", "quantize"}))
def test_the_tolerance_notices_padding_taken_for_speech(name, batch):
    ours, reference = CASES[name]
    audio, lengths = batch
    changed, _ = jax.jit(ours)(audio, np.full_like(lengths, audio.shape[1]))
    expected = reference(audio[2, : lengths[2]].astype(np.float64))
    assert np.abs(changed[2, : len(expected)] - expected).max() > 10 * RTOL * np.abs(expected).max()


def test_resampled_speech_sounds_like_librosas(batch):
    # librosa (soxr, very high quality) has another filter: they agree where both pass, below 0.9 of the lower band.
    audio, lengths = batch
    x = audio[0, : lengths[0]]
    ours, new_lengths = jax.jit(speed(2))(x[None], lengths[:1])
    theirs = librosa.resample(x, orig_sr=11, target_sr=10, res_type="soxr_vhq")
    assert new_lengths[0] == len(theirs)
    difference = np.asarray(ours[0, : len(theirs)]) - theirs
    passed = scipy.signal.firwin(511, 0.85)
    # The kernel's ripple; measured 4e-6. Half a sample's shift would give 0.1.
    assert rms(np.convolve(difference, passed)) < 3e-5 * rms(theirs)

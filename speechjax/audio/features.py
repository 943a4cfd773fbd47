"""Log-mel spectra, MFCC and their deltas, computed on the device from the waveform.

Shape alphabet: B batch, S samples, T frames, F features (or frequency bins).

Every function takes (array, lengths) and returns (array, lengths); whatever lies beyond a row's length never
reaches the output, and the output's own padding is zero. A row of length 0 has 0 frames.

Conventions are those of librosa 0.11: periodic Hann window, frames centred on multiples of the hop with zeros
outside the signal, power spectrum, Slaney's mel scale with area-normalised triangles, decibels floored at 1e-10
and at 80 dB below each utterance's loudest point, orthonormal DCT-II, Savitzky-Golay deltas.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Accelerators multiply float32 matrices in bfloat16 unless told otherwise: 0.4 % of a power is 0.02 dB.
_EXACT = jax.lax.Precision.HIGHEST
_POWER_FLOOR = 1e-10
_RANGE_DB = 80.0

# Slaney's mel scale (Auditory Toolbox, 1998): linear below 1 kHz, logarithmic above, 27 steps to 6.4 kHz.
_HZ_PER_MEL = 200.0 / 3.0
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27.0


def out_len(samples: int, hop: int = 160) -> int:
    """Number of frames of `samples` samples (a static count): one at each multiple of the hop, ends included."""
    return samples // hop + 1 if samples > 0 else 0


def stft(audio: jax.Array, lengths: jax.Array, *, n_fft: int = 400, hop: int = 160) -> tuple[jax.Array, jax.Array]:
    """Short-time Fourier transform of the valid samples.

    audio: [B, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples.
    Returns complex [B, T, n_fft // 2 + 1] with T = `out_len(S, hop)`, and [B] int32 frames.
    """
    signal = _valid_samples(audio, lengths)
    padded = jnp.pad(signal, ((0, 0), (n_fft // 2, n_fft - n_fft // 2)))
    index = np.arange(out_len(audio.shape[1], hop))[:, None] * hop + np.arange(n_fft)[None]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    spectrum = jnp.fft.rfft(padded[:, index] * jnp.asarray(hann, signal.dtype)[None, None])
    n_frames = jnp.where(lengths > 0, lengths // hop + 1, 0)
    return _zero_padding(spectrum, n_frames), n_frames


def log_mel(
    audio: jax.Array,
    lengths: jax.Array,
    *,
    sample_rate: int = 16000,
    n_fft: int = 400,
    hop: int = 160,
    n_mels: int = 80,
) -> tuple[jax.Array, jax.Array]:
    """Mel power spectrum in dB, from 0 Hz to half the sample rate.

    audio: [B, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples.
    Returns [B, T, n_mels] in dB (full scale 1.0) and [B] int32 frames.
    Raises ValueError if the FFT is too short to resolve the lowest of `n_mels` bands.
    """
    spectrum, n_frames = stft(audio, lengths, n_fft=n_fft, hop=hop)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    mel = jnp.dot(power, jnp.asarray(mel_filters(sample_rate, n_fft, n_mels), power.dtype), precision=_EXACT)
    decibel = 10.0 * jnp.log10(jnp.maximum(mel, _POWER_FLOOR))
    loudest = jnp.max(decibel, axis=(1, 2), keepdims=True, initial=-jnp.inf, where=_mask(decibel, n_frames))
    return _zero_padding(jnp.maximum(decibel, loudest - _RANGE_DB), n_frames), n_frames


def mfcc(
    audio: jax.Array,
    lengths: jax.Array,
    *,
    sample_rate: int = 16000,
    n_fft: int = 400,
    hop: int = 160,
    n_mels: int = 80,
    n_mfcc: int = 13,
) -> tuple[jax.Array, jax.Array]:
    """Mel-frequency cepstral coefficients (Davis and Mermelstein, 1980): the DCT of `log_mel`.

    audio: [B, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples.
    Returns [B, T, n_mfcc] and [B] int32 frames. Raises what `log_mel` raises.
    """
    decibel, n_frames = log_mel(audio, lengths, sample_rate=sample_rate, n_fft=n_fft, hop=hop, n_mels=n_mels)
    # Padded frames are zero in dB and so stay zero under a linear map.
    dct = jnp.asarray(dct_matrix(n_mels, n_mfcc), decibel.dtype)
    return jnp.dot(decibel, dct, precision=_EXACT), n_frames


def deltas(features: jax.Array, lengths: jax.Array, *, width: int = 9, order: int = 1) -> tuple[jax.Array, jax.Array]:
    """Time derivative of the given order, per frame: a polynomial of that degree fitted to `width` frames.

    features: [B, T, F]. lengths: [B] int32, frames. Returns [B, T, F] and the lengths.
    Frames nearer to an end than half a window take the derivative of the first or last whole window, which is what
    extrapolating that window's polynomial gives (Savitzky and Golay, 1964; librosa's mode "interp"). Rows shorter
    than one window, which librosa refuses, have derivative 0. Raises ValueError for a width that is even or <= order.
    """
    if width % 2 == 0 or width <= order:
        raise ValueError(f"deltas need an odd width above the order {order}, not {width}")
    half, n_frames = width // 2, features.shape[1]
    fit = np.linalg.pinv(np.vander(np.arange(-half, half + 1), order + 1, increasing=True))
    taps = fit[order] * math.factorial(order)
    padded = jnp.pad(features, ((0, 0), (half, half), (0, 0)))
    slopes = jnp.zeros_like(features)
    for lag, tap in enumerate(taps):
        slopes = slopes + float(tap) * padded[:, lag : lag + n_frames]
    last_whole = jnp.maximum(lengths - 1 - half, half)[:, None]
    centre = jnp.clip(jnp.arange(n_frames, dtype=lengths.dtype)[None], half, last_whole)
    slopes = jnp.take_along_axis(slopes, jnp.minimum(centre, n_frames - 1)[:, :, None], axis=1)
    return _zero_padding(slopes, jnp.where(lengths >= width, lengths, 0)), lengths


@functools.cache
def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """Triangular mel filters as a float64 matrix [n_fft // 2 + 1, n_mels]; each triangle has unit area in Hz.

    Raises ValueError if a triangle falls between two FFT bins: that band would be silent whatever the audio.
    """
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(sample_rate / 2), n_mels + 2))
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    bins = np.fft.rfftfreq(n_fft, 1.0 / sample_rate)[:, None]
    triangles = np.maximum(0.0, np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)))
    if not triangles.any(axis=0).all():
        raise ValueError(
            f"{n_mels} mel bands at {sample_rate} Hz need a longer FFT than {n_fft} samples "
            "(the lowest bands contain no FFT bin): raise n_fft or lower n_mels"
        )
    return triangles * (2.0 / (high - low))


@functools.cache
def dct_matrix(n_in: int, n_out: int) -> np.ndarray:
    """The first `n_out` columns of the orthonormal DCT-II of `n_in` values, float64 [n_in, n_out]."""
    phase = np.pi / n_in * np.outer(np.arange(n_in) + 0.5, np.arange(n_out))
    return np.cos(phase) * np.sqrt(np.where(np.arange(n_out) == 0, 1.0, 2.0) / n_in)


def _hz_to_mel(hz: float) -> float:
    return hz / _HZ_PER_MEL if hz < _BREAK_HZ else _BREAK_MEL + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < _BREAK_MEL, mel * _HZ_PER_MEL, _BREAK_HZ * np.exp((mel - _BREAK_MEL) * _LOG_STEP))


def _valid_samples(audio: jax.Array, lengths: jax.Array) -> jax.Array:
    if audio.dtype == jnp.int16:
        audio = audio.astype(jnp.float32) / 32768.0
    return jnp.where(jnp.arange(audio.shape[1], dtype=lengths.dtype)[None] < lengths[:, None], audio, 0.0)


def _mask(features: jax.Array, lengths: jax.Array) -> jax.Array:
    return (jnp.arange(features.shape[1], dtype=lengths.dtype)[None] < lengths[:, None])[:, :, None]


def _zero_padding(features: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.where(_mask(features, lengths), features, jnp.zeros((), features.dtype))

"""Mel filters and the cosine transform, as float64 matrices computed once on the host."""

import functools
from typing import Literal, NamedTuple

import numpy as np

# Slaney's mel scale (Auditory Toolbox, 1998): linear below 1 kHz, logarithmic above, 27 steps to 6.4 kHz.
_HZ_PER_MEL = 200.0 / 3.0
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27.0


class MelBank(NamedTuple):
    """How a tool draws its triangles between `low_hz` and half the sample rate, equally spaced in mel."""

    scale: Literal["slaney", "htk"]  # HTK: 2595 log10(1 + f / 700), also written 1127 ln(1 + f / 700)
    low_hz: float
    flanks: Literal["hz", "mel"]  # the axis on which the triangles' sides are straight
    unit_area: bool  # each triangle's area in Hz is 1; otherwise its height is


SLANEY = MelBank("slaney", 0.0, "hz", True)
HTK = MelBank("htk", 0.0, "hz", False)
KALDI = MelBank("htk", 20.0, "mel", False)


@functools.cache
def mel_filters(sample_rate: int, n_fft: int, n_mels: int, bank: MelBank = SLANEY) -> np.ndarray:
    """Triangular mel filters as a float64 matrix [n_fft // 2 + 1, n_mels].

    Raises ValueError if a triangle falls between two FFT bins: that band would be silent whatever the audio.
    """
    mel_of, hz_of = (_slaney_mel, _slaney_hz) if bank.scale == "slaney" else (_htk_mel, _htk_hz)
    lowest, highest = mel_of(np.array([bank.low_hz, sample_rate / 2]))
    in_mel = np.linspace(lowest, highest, n_mels + 2)
    in_hz = hz_of(in_mel)
    bins = np.fft.rfftfreq(n_fft, 1.0 / sample_rate)[:, None]
    edges, bins = (in_hz, bins) if bank.flanks == "hz" else (in_mel, mel_of(bins))
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.maximum(0.0, np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)))
    if not triangles.any(axis=0).all():
        raise ValueError(
            f"{n_mels} mel bands at {sample_rate} Hz need a longer FFT than {n_fft} samples "
            "(the lowest bands contain no FFT bin): raise n_fft or lower n_mels"
        )
    return triangles * (2.0 / (in_hz[2:] - in_hz[:-2])) if bank.unit_area else triangles


@functools.cache
def dct_matrix(n_in: int, n_out: int) -> np.ndarray:
    """The first `n_out` columns of the orthonormal DCT-II of `n_in` values, float64 [n_in, n_out]."""
    phase = np.pi / n_in * np.outer(np.arange(n_in) + 0.5, np.arange(n_out))
    return np.cos(phase) * np.sqrt(np.where(np.arange(n_out) == 0, 1.0, 2.0) / n_in)


def _slaney_mel(hz: np.ndarray) -> np.ndarray:
    above = _BREAK_MEL + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return np.where(hz < _BREAK_HZ, hz / _HZ_PER_MEL, above)


def _slaney_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < _BREAK_MEL, mel * _HZ_PER_MEL, _BREAK_HZ * np.exp((mel - _BREAK_MEL) * _LOG_STEP))


def _htk_mel(hz: np.ndarray) -> np.ndarray:
    return 1127.0 * np.log1p(hz / 700.0)


def _htk_hz(mel: np.ndarray) -> np.ndarray:
    return 700.0 * np.expm1(mel / 1127.0)

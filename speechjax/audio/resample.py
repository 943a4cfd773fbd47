"""Change of sample rate on the device, for augmentation and features; preparing a corpus is soxr's work.

Shape alphabet: B batch, S samples, N output samples.

A windowed-sinc low pass (Smith and Gossett, 1984) in polyphase form, one strided convolution with a channel for each
phase. Measured against the lower of the two rates' half (its Nyquist frequency): flat to 3e-5 up to 0.9, half the
amplitude at 0.95, -95 dB and less from 1.0 on, so that nothing folds back. soxr's HQ, which passes up to 0.913, agrees
to 1e-5 below 0.87 where one rate divides the other; at other ratios its own tones are off by up to 6e-4 there.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.audio.waveform import EXACT, valid_samples

# 100 dB of attenuation in a Kaiser window: beta = 0.1102 (A - 8.7), and a transition of (A - 8) / 2.285 / taps rad.
_BETA = 10.06
_ZEROS = 64  # zero crossings of the sinc on each side
_CUTOFF = 0.95
_LARGEST = 1 << 23  # filter taps in all phases


def resample(audio: jax.Array, lengths: jax.Array, *, from_hz: int, to_hz: int) -> tuple[jax.Array, jax.Array]:
    """The waveform at another sample rate, with silence assumed beyond its ends.

    audio: [B, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples.
    Returns float [B, N] with N = ceil(S to_hz / from_hz), and [B] int32 samples, rounded up likewise.
    Raises ValueError for rates below 1 Hz or with so small a common divisor that the filters do not fit.
    """
    up, down = _ratio(from_hz, to_hz)
    signal = valid_samples(audio, lengths)
    n_out, out_lengths = _out_len(signal.shape[1], up, down), _out_len(lengths, up, down)
    if up == down:
        return signal, out_lengths
    taps, reach = phase_filters(up, down)
    turns = -(-n_out // up)
    width = max(turns - 1, 0) * down + len(taps)
    padded = jnp.pad(signal, ((0, 0), (reach, max(width - reach - signal.shape[1], 0))))[:, :width]
    kernel = jnp.asarray(taps, signal.dtype)[:, None, :]
    phases = jax.lax.conv_general_dilated(
        padded[:, :, None], kernel, (down,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), precision=EXACT
    )
    return valid_samples(phases.reshape(len(padded), -1)[:, :n_out], out_lengths), out_lengths


@functools.cache
def phase_filters(up: int, down: int) -> tuple[np.ndarray, int]:
    """Weights float64 [K, up] of the samples from `reach` before to the last that matters, and `reach`.

    Output sample q * up + p is the sum over k of weight [k, p] times input sample q * down + k - reach.
    """
    # In units of an input sample: the sinc's first zero and the window's half width.
    cutoff = _CUTOFF * min(1.0, up / down)
    half = _ZEROS / cutoff
    reach = math.ceil(half)
    last = math.ceil((up - 1) * down / up + half)
    if (last + reach + 1) * up > _LARGEST:
        raise ValueError(
            f"resampling by {up}/{down} needs {(last + reach + 1) * up:,} filter taps, above {_LARGEST:,}: "
            "choose rates with a larger common divisor"
        )
    distance = np.arange(-reach, last + 1)[:, None] - np.arange(up) * (down / up)
    window = np.i0(_BETA * np.sqrt(np.maximum(1.0 - np.square(distance / half), 0.0))) / np.i0(_BETA)
    return cutoff * np.sinc(cutoff * distance) * window * (np.abs(distance) < half), reach


def _ratio(from_hz: int, to_hz: int) -> tuple[int, int]:
    if min(from_hz, to_hz) < 1:
        raise ValueError(f"sample rates are positive, not {from_hz} and {to_hz} Hz")
    divisor = math.gcd(from_hz, to_hz)
    return to_hz // divisor, from_hz // divisor


def _out_len(samples, up: int, down: int):
    # Whole turns first: samples * up does not fit int32 for minutes at 44.1 kHz.
    return samples // down * up + -(-(samples % down * up) // down)

"""Log-mel spectra, MFCC, their deltas and their normalisation, computed on the device from the waveform.

Shape alphabet: B batch, S samples, T frames, F features (or frequency bins).

Every function takes (array, lengths) and returns (array, lengths); whatever lies beyond a row's length never
reaches the output, and the output's own padding is zero. A row of length 0 has 0 frames.

Whose numbers `log_mel` and `mfcc` return is one argument, `convention`:

| convention | equals | frames | window | mel bands | values |
|---|---|---|---|---|---|
| librosa | librosa 0.11's defaults | every multiple of the hop, zeros outside | Hann | Slaney, unit area | dB, 80 dB |
| htk | librosa with `htk=True, norm=None` | the same | Hann | HTK, unit height | dB, 80 dB |
| kaldi | Kaldi's compute-fbank-feats and compute-mfcc-feats, dither 0 | whole windows | Povey | HTK from 20 Hz | ln |
| whisper | `transformers.WhisperFeatureExtractor` | librosa's without the last | Hann | librosa's | log10 / 4 + 1, 2 |

"80 dB" and "2" are the range kept below each utterance's loudest point. "htk" is HTK's mel scale, not its HCopy
(pre-emphasis, Hamming window, natural logarithm of the magnitude). Kaldi's window has the DC removed and is
pre-emphasised by 0.97, frame by frame, at the scale of int16; its FFT is the next power of two above `n_fft`; its
`--use-energy` is off, as its recipes set it, and its MFCC usually come from 23 bands (`n_mels=23`). Whisper is run on
30 s: pad the audio with zeros and give that length for the same numbers; given the true length they are those of an
utterance the extractor was told not to pad.

Precision: an FFT in float32, theirs as ours, errs everywhere by about 1e-7 of the frame's loudest amplitude. Powers
down to 60 dB below the loudest agree with the float32 tools to 1e-4 (measured 1.2e-4 in ln for Kaldi on speech), those
at 80 dB to 2e-3. The same code in float64 agrees with the formulas to 1e-9.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.audio.mel import HTK, KALDI, SLANEY, MelBank, dct_matrix, mel_filters
from speechjax.audio.spectrum import Framing, framed, hann, out_len, stft
from speechjax.audio.waveform import EXACT, frame_mask, pre_emphasis, valid_samples, zero_padding

__all__ = [
    "CONVENTIONS", "cmvn", "dct_matrix", "deltas", "log_mel", "mel_filters", "mfcc", "out_len", "pre_emphasis", "stft",
]  # fmt: skip


def _povey(size: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))) ** 0.85


class Convention(NamedTuple):
    """One tool's way from samples to features: factor * log10(max(mel power, floor)) + offset."""

    bank: MelBank
    framing: Framing
    factor: float
    window: Callable[[int], np.ndarray] = hann
    floor: float = 1e-10
    offset: float = 0.0
    decades: float = math.inf  # of power kept below each utterance's loudest point
    full_scale: float = 1.0  # what a sample of 1.0 counts as
    frame_pre_emphasis: float = 0.0  # after the frame's mean is taken off; 0: neither
    power_of_two: bool = False  # FFT length
    lifter: int | None = 0  # of the cepstra, 0: none; None: the tool has no cepstra


CONVENTIONS = {
    "librosa": Convention(SLANEY, "centred", factor=10.0, decades=8.0),
    "htk": Convention(HTK, "centred", factor=10.0, decades=8.0),
    "kaldi": Convention(
        KALDI, "whole", factor=math.log(10.0), window=_povey, floor=float(np.finfo(np.float32).eps),
        full_scale=32768.0, frame_pre_emphasis=0.97, power_of_two=True, lifter=22,
    ),
    "whisper": Convention(SLANEY, "reflected", factor=0.25, offset=1.0, decades=8.0, lifter=None),
}  # fmt: skip


def log_mel(
    audio: jax.Array,
    lengths: jax.Array,
    *,
    convention: str = "librosa",
    sample_rate: int = 16000,
    n_fft: int = 400,
    hop: int = 160,
    n_mels: int = 80,
) -> tuple[jax.Array, jax.Array]:
    """Logarithm of the mel power spectrum, up to half the sample rate; see the module's table.

    audio: [B, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples. n_fft: samples in a window.
    Returns [B, T, n_mels] with T = `out_len(S, hop, n_fft=n_fft, framing=CONVENTIONS[convention].framing)`, in dB
    (full scale 1.0) for the default convention, and [B] int32 frames.
    Raises ValueError for an unknown convention, or if the FFT is too short to resolve the lowest of `n_mels` bands.
    """
    how = _convention(convention)
    frames, n_frames = framed(valid_samples(audio, lengths), lengths, size=n_fft, hop=hop, framing=how.framing)
    frames = frames * how.full_scale
    if how.frame_pre_emphasis:
        frames = frames - frames.mean(axis=-1, keepdims=True)
        frames = frames - how.frame_pre_emphasis * jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    fft = 1 << (n_fft - 1).bit_length() if how.power_of_two else n_fft
    spectrum = jnp.fft.rfft(frames * jnp.asarray(how.window(n_fft), frames.dtype)[None, None], n=fft)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    filters = jnp.asarray(mel_filters(sample_rate, fft, n_mels, how.bank), power.dtype)
    decades = jnp.log10(jnp.maximum(jnp.dot(power, filters, precision=EXACT), how.floor))
    mask = frame_mask(decades.shape[1], n_frames)
    loudest = jnp.max(decades, axis=(1, 2), keepdims=True, initial=-jnp.inf, where=mask)
    values = how.factor * jnp.maximum(decades, loudest - how.decades) + how.offset
    return zero_padding(values, n_frames), n_frames


def mfcc(
    audio: jax.Array,
    lengths: jax.Array,
    *,
    convention: str = "librosa",
    sample_rate: int = 16000,
    n_fft: int = 400,
    hop: int = 160,
    n_mels: int = 80,
    n_mfcc: int = 13,
) -> tuple[jax.Array, jax.Array]:
    """Mel-frequency cepstral coefficients (Davis and Mermelstein, 1980): the DCT of `log_mel`.

    audio: [B, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples.
    Returns [B, T, n_mfcc] and [B] int32 frames.
    Raises what `log_mel` raises, and ValueError for "whisper", which knows no cepstra.
    """
    lifter = _convention(convention).lifter
    if lifter is None:
        raise ValueError(f"there are no MFCC of convention {convention!r}: use its log_mel, or another convention")
    mel, n_frames = log_mel(
        audio, lengths, convention=convention, sample_rate=sample_rate, n_fft=n_fft, hop=hop, n_mels=n_mels
    )
    dct = dct_matrix(n_mels, n_mfcc)
    if lifter:
        dct = dct * (1.0 + 0.5 * lifter * np.sin(np.pi * np.arange(n_mfcc) / lifter))
    # Padded frames are zero and so stay zero under a linear map.
    return jnp.dot(mel, jnp.asarray(dct, mel.dtype), precision=EXACT), n_frames


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
    padded = jnp.pad(zero_padding(features, lengths), ((0, 0), (half, half), (0, 0)))
    slopes = jnp.zeros_like(features)
    for lag, tap in enumerate(taps):
        slopes = slopes + float(tap) * padded[:, lag : lag + n_frames]
    last_whole = jnp.maximum(lengths - 1 - half, half)[:, None]
    centre = jnp.clip(jnp.arange(n_frames, dtype=lengths.dtype)[None], half, last_whole)
    slopes = jnp.take_along_axis(slopes, jnp.minimum(centre, n_frames - 1)[:, :, None], axis=1)
    return zero_padding(slopes, jnp.where(lengths >= width, lengths, 0)), lengths


def cmvn(
    features: jax.Array, lengths: jax.Array, *, variance: bool = True, sample: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Cepstral mean and variance normalisation over each utterance (Viikki and Laurila, 1998).

    features: [B, T, F] float. lengths: [B] int32, frames. Returns [B, T, F] and the lengths: over a row's valid frames
    every feature has mean 0 and, with `variance`, variance 1: that of the population, or of the `sample`. A feature
    that varies by no more than its own rounding error, as in silence or a row of one frame, is 0 throughout.
    """
    mask = frame_mask(features.shape[1], lengths)
    features = zero_padding(features, lengths)
    count = jnp.maximum(lengths, 1).astype(features.dtype)[:, None, None]
    mean = jnp.sum(features, axis=1, keepdims=True) / count
    centred = jnp.where(mask, features - mean, 0.0)
    if not variance:
        return centred, lengths
    power = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / (jnp.maximum(count - 1, 1) if sample else count)
    rounding = jnp.square(16.0 * float(jnp.finfo(features.dtype).eps) * mean)
    varies = power > rounding
    # The gradient of a square root is infinite at 0 even where its value is not taken.
    deviation = jnp.sqrt(jnp.where(varies, power, 1.0))
    return jnp.where(varies, centred / deviation, 0.0), lengths


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ValueError(f"no feature convention {name!r}: use one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]

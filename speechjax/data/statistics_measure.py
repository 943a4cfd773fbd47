"""One recording in numbers, and the bins that they are counted in.

Shapes: S samples at 16 kHz, T frames of 20 ms. Powers are relative to full scale, of which 0 dBFS is a constant.
"""

from typing import NamedTuple

import numpy as np

from speechjax.data.decode import SAMPLE_RATE

FRAME = SAMPLE_RATE // 50  # samples, 20 ms
LOWEST_DBFS = -120  # bin of digital silence: one nonzero sample lifts a 20 ms frame to -115

_FULL_SCALE = 32_768
_CLIPPED = 32_767  # symmetric converters stop here at both ends
_CHUNK = 512 * FRAME  # its float copy stays in the CPU's cache
# Up to `end`, in tenths of a second, bins of the length histogram are `width` wide: fine where training crops.
_LENGTHS = ((400, 1), (1_200, 10), (36_000, 100), (864_000, 6_000))

_WINDOW = 512  # samples of each spectrum that looks for treble
_WINDOWS = 16  # eight miss the fricatives of some utterances
_HANN = np.hanning(_WINDOW + 1)[:-1].astype(np.float32)  # periodic: an offset stays in the lowest two bins
_RUMBLE = 4  # bins of 31.25 Hz left out at the bottom: a DC offset would pass for a lack of treble
_TREBLE = 136  # from 4.25 kHz on, clear of the transition band of resamplers
_EDGES = 10.0 ** (np.arange(LOWEST_DBFS + 1, 1) / 10)  # power at the lower edges of the bins above the lowest


# ---- bins


def length_bin(samples: int) -> int:
    """Lower edge of the bin of a length, in tenths of a second; from 24 h on there is one bin."""
    tenths = samples * 10 // SAMPLE_RATE
    return min(tenths // length_width(tenths) * length_width(tenths), _LENGTHS[-1][0])


def length_width(tenths: int) -> int:
    """Width of the bin at a length, both in tenths of a second."""
    return next((width for end, width in _LENGTHS if tenths < end), _LENGTHS[-1][1])


def level_bins(power: np.ndarray) -> np.ndarray:
    """Whole dB, rounded down, of powers relative to full scale, between -120 and 0."""
    return np.searchsorted(_EDGES, power, side="right") + LOWEST_DBFS


# ---- measuring


class Measured(NamedTuple):
    """Powers relative to full scale, `frames` float32 [T] with the last over its own length; `clipped` in samples."""

    level: float
    peak: float
    offset: float
    treble: float
    frames: np.ndarray
    clipped: int


def measure(audio: np.ndarray) -> Measured:
    """One pass over int16 [S] in pieces of 10 s, so that nothing as large as the audio is made.

    Squares and sums are those of float32 copies: int16 has no 32,768 for its -32,768, and its squares overflow. The
    sum of a frame is exact there (320 · 32,768 < 2^24), and so are its squares as far up as the silence threshold.
    """
    peak, clipped = 0, 0
    sums, energies = np.empty((2, -(-len(audio) // FRAME)), np.float32)
    buffer = np.empty((min(len(energies), _CHUNK // FRAME), FRAME), np.float32)
    ones = np.ones(FRAME, np.float32)
    for start in range(0, len(audio), _CHUNK):
        piece = audio[start : start + _CHUNK]
        low, high = int(piece.min()), int(piece.max())
        peak = max(peak, -low, high)
        if max(-low, high) >= _CLIPPED:
            clipped += int(np.count_nonzero(piece >= _CLIPPED)) + int(np.count_nonzero(piece <= -_CLIPPED))
        here = slice(start // FRAME, start // FRAME + -(-len(piece) // FRAME))
        block = buffer[: here.stop - here.start]
        flat = block.reshape(-1)
        flat[: len(piece)] = piece
        flat[len(piece) :] = 0
        np.vecdot(block, ones, out=sums[here])
        np.vecdot(block, block, out=energies[here])
    full, count = float(_FULL_SCALE) ** 2, max(1, len(audio))
    level = float(energies.sum(dtype=np.float64)) / count / full
    offset = (float(sums.sum(dtype=np.float64)) / count) ** 2 / full
    frames = energies / (FRAME * full)
    if len(audio) % FRAME:
        frames[-1] *= FRAME / (len(audio) % FRAME)
    return Measured(level, peak**2 / full, offset, _treble(audio), frames, clipped)


def _treble(audio: np.ndarray) -> float:
    """Share of the power above 4.25 kHz in 32 ms windows spread evenly over int16 [S]; 1 where there is no power.

    Resampling from 8 kHz leaves that band empty, and no rate in a header tells.
    """
    if len(audio) < _WINDOW:
        audio = np.pad(audio, (0, _WINDOW - len(audio)))
    count = min(_WINDOWS, len(audio) // _WINDOW)
    step = len(audio) // count
    spectrum = np.fft.rfft(audio[: count * step].reshape(count, step)[:, :_WINDOW] * _HANN)
    treble = np.vdot(spectrum[:, _TREBLE:], spectrum[:, _TREBLE:]).real
    total = np.vdot(spectrum[:, _RUMBLE:], spectrum[:, _RUMBLE:]).real
    return float(treble / total) if total else 1.0

"""Recordings of any length, block by block: windows that overlap, or pieces cut where it is quiet.

Nothing here holds more than a window of audio.  Shapes: S samples, T frames.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from speechjax.data.decode import SAMPLE_RATE

_SMOOTH = 0.3  # seconds over which loudness is averaged: a pause, not the closure of a plosive
_FULL_SCALE = 32768


class Level:
    """Mean and standard deviation of all samples so far, full scale 1."""

    def __init__(self):
        self.samples, self._total, self._squares = 0, 0, 0

    def hear(self, pcm: np.ndarray) -> None:
        wide = pcm.astype(np.int64)
        self.samples += len(pcm)
        self._total += int(wide.sum())
        self._squares += int(wide @ wide)

    @property
    def mean(self) -> float:
        return self._total / max(self.samples, 1) / _FULL_SCALE

    @property
    def std(self) -> float:
        return max(self._squares / max(self.samples, 1) / _FULL_SCALE**2 - self.mean**2, 0.0) ** 0.5


class Window(NamedTuple):
    """`audio` int16 [S] from the frame `start` of a recording on; of its frames, `low` to `high` count.

    Frame t of a recording takes its samples from t hop on, hop + extra of them.  `last`: nothing follows.
    """

    audio: np.ndarray
    start: int
    low: int
    high: int
    last: bool


class _Cutter:
    """Audio as it comes, of which the last part is kept."""

    def __init__(self, hop: int, extra: int):
        self._hop, self._extra = hop, extra
        self._pcm, self._begin = bytearray(), 0  # kept samples, and the frame they begin with
        self._samples = 0  # so far

    @property
    def _frames(self) -> int:
        return max((self._samples - self._extra) // self._hop, 0)

    def _hear(self, pcm: np.ndarray) -> None:
        self._pcm += pcm.tobytes()
        self._samples += len(pcm)

    def _audio(self, start: int, end: int | None) -> np.ndarray:
        """What the frames from `start` to `end` hear; None: all there is."""
        first = (start - self._begin) * self._hop
        after = None if end is None else 2 * ((end - self._begin) * self._hop + self._extra)
        return np.frombuffer(bytes(self._pcm[2 * first : after]), np.int16)

    def _forget(self, start: int) -> None:
        """Nothing before the frame `start` is needed any more."""
        if start > self._begin:
            del self._pcm[: 2 * (start - self._begin) * self._hop]
            self._begin = start


class Windows(_Cutter):
    """Windows of `size` frames, one every `step`, whose frames count up to `ahead` before their end.

    The first one ends after `first` frames, and all begin at multiples of `align`.  Frames come in order, each once;
    `ahead` frames or more come after them in their window, and before them `size` - `step` - `ahead` - `align` + 1 or
    more, except at the ends of the recording.
    """

    def __init__(self, hop: int, extra: int, *, size: int, step: int, ahead: int, first: int, align: int = 1):
        super().__init__(hop, extra)
        self._size, self._step, self._ahead, self._align = size, step, ahead, align
        self._end, self._done = first, 0

    def hear(self, pcm: np.ndarray) -> Iterator[Window]:
        """The windows that are complete now."""
        self._hear(pcm)
        while self._frames >= self._end:
            start = self._start(self._end)
            window = self._window(start, self._end, self._end - self._ahead, last=False)
            self._forget(start)
            self._end += self._step
            yield window

    def finish(self) -> Window:
        """What is left; without frames where there is nothing."""
        return self._window(self._start(self._frames), None, self._frames, last=True)

    def _start(self, end: int) -> int:
        return -(-max(end - self._size, 0) // self._align) * self._align

    def _window(self, start: int, end: int | None, upto: int, last: bool) -> Window:
        low, self._done = self._done, upto
        return Window(self._audio(start, end), start, low - start, upto - start, last)


class Pieces(_Cutter):
    """Pieces of at most `size` frames, cut where the second half of that is quietest."""

    def __init__(self, hop: int, extra: int, *, size: int):
        super().__init__(hop, extra)
        self._size = size

    def hear(self, pcm: np.ndarray) -> Iterator[Window]:
        """The pieces that are complete now."""
        self._hear(pcm)
        while self._frames - self._begin >= self._size:
            start, cut = self._begin, self._begin + self._quietest()
            yield Window(self._audio(start, cut), start, 0, cut - start, last=False)
            self._forget(cut)

    def finish(self) -> Window:
        """What is left; without frames where there is nothing."""
        return Window(self._audio(self._begin, None), self._begin, 0, self._frames - self._begin, last=True)

    def _quietest(self) -> int:
        audio = self._audio(self._begin, self._begin + self._size)[: self._size * self._hop]
        power = np.square(audio.reshape(self._size, self._hop), dtype=np.float32).mean(axis=1)
        span = min(max(round(_SMOOTH * SAMPLE_RATE / self._hop), 1), self._size)
        smooth = np.convolve(power, np.ones(span, np.float32), "same")
        half = self._size // 2
        if not half:
            return self._size
        quiet = np.flatnonzero(smooth[half:] == smooth[half:].min())  # of digital silence all
        return half + int(quiet[len(quiet) // 2])

"""Crop-to-fill: rows of one length, filled with segments of several examples, so that hardly a frame is padding.

A segment of n samples gives (n - extra) // hop frames; frames that reach beyond it belong to nobody.

Shapes: N examples, R rows of a batch, G segments of a row, W rows of a window.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from speechjax.data.permutation import permute, uniform
from speechjax.data.plan import CROPS, ROWS, Rows, Shape, streams
from speechjax.errors import UserError

_LOOK_AHEAD = 16
_WINDOW, _WINDOW_ROWS = 2048, 8192  # entries, but not more rows than that
_MEASURED = 3  # windows
_CHUNK = 512


@dataclass(frozen=True)
class Row:
    """What a row takes, in samples: segments begin at multiples of `align`; at most `segments` of them.

    `crop` is the least that may be left of a cropped example, `least` a room that is still worth leaving.
    """

    samples: int
    align: int
    hop: int
    extra: int
    crop: int
    least: int
    segments: int

    def whole_frames(self, samples: int) -> int:
        """The samples that the frames within these take."""
        return (samples - self.extra) // self.hop * self.hop + self.extra

    def place(self, n: int, room: int) -> tuple[int, int, int] | None:
        """The best use of `room` samples at the end of the row for the next n samples of an example.

        (samples lost, room taken, samples placed); None where they do not fit.  Lost is what of the example will
        not be used and what of the room; what remains of the example is not lost if it can go on in another row.
        """
        full = self.whole_frames(room)
        if n >= full >= self.crop:
            rest = n - full
            return (rest if rest < self.crop else 0), room, full
        slot = -(-n // self.align) * self.align
        left = room - slot
        best = None if n > room else (slot - n + left * (left < self.least), slot, n)
        # Shorter, so that the next segment can begin at once or has room at all.
        slot = min((n + self.align) // self.align * self.align, (room - self.least) // self.align * self.align)
        count = self.whole_frames(slot)
        if count > n:
            slot -= self.align
            count = self.whole_frames(slot)
        if count >= self.crop and (best is None or n - count < best[0]):
            best = n - count, slot, count
        return best


def pack(lengths: Iterator[int], rows: int, row: Row) -> np.ndarray:
    """Fills `rows` rows with examples of these lengths: int64 [P, 6] of (row, place, item, offset, count, at).

    `item` counts the lengths, `offset` is where in it the segment begins, `place` and `at` where in the row it
    stands, as number and sample.  In order, except that the first of the next 16 that loses little goes first; an
    example too long for its row goes on in the next.
    """
    items = enumerate(lengths)
    waiting: list[tuple[int, int, int]] = []  # item, offset, samples from there on
    placed: list[tuple[int, int, int, int, int, int]] = []
    for r in range(rows):
        at = 0
        for place in range(row.segments):
            waiting += [(i, 0, n) for i, n in itertools.islice(items, _LOOK_AHEAD - len(waiting))]
            if at >= row.samples:
                break
            room, best = row.samples - at, None
            for w, (_, _, n) in enumerate(waiting):
                found = row.place(n, room)
                if found and (best is None or found[0] < best[0]):
                    best = *found, w
                    if found[0] < row.align:
                        break
            if best is None:
                break
            _, slot, count, w = best
            item, offset, n = waiting.pop(w)
            placed.append((r, place, item, offset, count, at))
            at += slot
            if slot == room and n - count >= row.crop:
                waiting.insert(0, (item, offset + count, n - count))
    return np.array(placed, np.int64).reshape(-1, 6)


class FillPlan:
    """The endless sequence of training batches of `rows` rows of `samples`, filled with segments of examples.

    Lengths, `source` and `rates` are those of `Plan`.  Segments begin at multiples of `align` samples and are whole
    examples or crops of at least `min_segment`; an example longer than the rest of its row goes on in another.  The
    stream of examples is cut into windows of a fixed number of entries, which fill a fixed number of batches on
    average; each is packed on its own and its rows are shuffled, so batch k costs its window at most (some
    20 us an example) wherever it is.  Where a window's rows are full early, its last examples are left out this
    time; where they are not, they take the first of the next.  `hop` and `extra`: samples from frame to frame, and
    what a frame takes beyond.  Raises UserError where a row cannot hold `min_segment`.
    """

    def __init__(
        self, lengths: np.ndarray, seed: int, *, rows: int, samples: int, align: int, hop: int, extra: int,
        min_segment: int, source: np.ndarray | None = None, rates: Sequence[float] | None = None,
    ):  # fmt: skip
        crop = max(-(-(min_segment - extra) // hop), 1) * hop + extra
        if samples < crop:
            raise UserError(
                f"rows of {samples} samples cannot hold the least segment, {crop}: "
                "raise config.data.crop_seconds or set config.data.fill=False"
            )
        self.lengths, self.seed = lengths, seed
        (self._stream,) = streams(lengths, [Shape(rows, samples)], seed, source, rates).values()
        trial = sorted(itertools.islice(self._lengths_from(0), _WINDOW))
        row = Row(samples, align, hop, extra, crop, min(crop, trial[_WINDOW // 4]), samples // align + 1)
        entries, segments = self._measured(row)
        self._row = replace(row, segments=segments)
        self._batches = math.ceil(min(_WINDOW / entries, _WINDOW_ROWS) / rows)
        self._entries = max(1, round(self._batches * rows * entries))
        self.shapes = [Shape(rows, samples, segments)]
        self.batches_per_epoch = max(1, round(self._stream.block * self._batches / self._entries))
        self._window = lru_cache(maxsize=2)(self._make_window)

    def _lengths_from(self, entry: int) -> Iterator[int]:
        for first in itertools.count(entry, _CHUNK):
            yield from self.lengths[self._stream.examples(np.arange(first, first + _CHUNK))].tolist()

    def _measured(self, row: Row) -> tuple[float, int]:
        """(how many entries of the stream fill a row on average, how many segments a row has at most)."""
        mean = self._stream.average(self.lengths)
        rows = _MEASURED * math.ceil(min(_WINDOW * mean / row.samples, _WINDOW_ROWS))
        _, place, item, _, count, _ = pack(self._lengths_from(0), rows, row).T
        used = np.bincount(item, count)
        length = np.fromiter(self._lengths_from(0), np.int64, len(used))
        # What the last example has left would have gone on in the next row: it is not used up.
        length[item[-1]] = used[item[-1]]
        return float(length[used > 0].sum() / mean / rows), int(place.max()) + 1

    def _packed(self, window: int) -> np.ndarray:
        """The segments of one window, as `pack` gives them."""
        return pack(self._lengths_from(window * self._entries), self._batches * self.shapes[0].rows, self._row)

    def _make_window(self, window: int) -> np.ndarray:
        """(example, start, count, at) of the rows of one window in their shuffled order, int64 [4, W, G]."""
        row, place, item, offset, count, at = self._packed(window).T
        entry = window * self._entries + item
        example = self._stream.examples(entry)
        unused = self.lengths[example] - np.bincount(item, count).astype(np.int64)[item]
        start = offset + uniform(unused + 1, (self.seed, CROPS, 0, entry))
        rows = self._batches * self.shapes[0].rows
        segments = np.zeros((4, rows, self._row.segments), np.int64)
        segments[0] = -1
        # Segments of one long example lie in consecutive rows; in a batch they would be too much of the same.
        row = permute(row, rows, (self.seed, ROWS, window))
        segments[:, row, place] = example, start, count, at
        return segments

    def batch(self, k: int) -> Rows:
        """Batch number `k`, from 0."""
        window, j = divmod(k, self._batches)
        rows = self.shapes[0].rows
        return Rows(self.shapes[0], *self._window(window)[:, j * rows : (j + 1) * rows].copy())

    def useful_share(self) -> tuple[float, float]:
        """(share of the rows' frames that lie in a segment, share of the audio that is used), both 0 to 1.

        Measured on the first three windows; what a window takes from the next does not count as used.
        """
        row, frames, used, audio = self._row, 0, 0, 0
        for window in range(_MEASURED):
            _, _, item, _, count, _ = self._packed(window).T
            frames += np.maximum((count - row.extra) // row.hop, 0).sum()
            used += count[item < self._entries].sum()
            audio += sum(itertools.islice(self._lengths_from(window * self._entries), self._entries))
        rows = _MEASURED * self._batches * self.shapes[0].rows
        return float(frames / (rows * ((row.samples - row.extra) // row.hop))), float(used / audio)

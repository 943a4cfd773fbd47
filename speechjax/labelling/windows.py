"""Recordings as windows that a device can hold, such that every frame of every recording comes exactly once.

Shapes: N windows, R rows of a batch, T frames.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.pipeline import read_rows
from speechjax.data.plan import Batch, Plan, Rows, Shape, plan_shapes
from speechjax.data.records import Records
from speechjax.data.shards import UnreadableError
from speechjax.data.units import unit_count
from speechjax.errors import UserError

LONGEST = 30.0  # seconds
_ROWS = 8  # batches are multiples of it, so that 1, 2, 4 and 8 devices compute the same ones


@dataclass(frozen=True)
class Windows:
    """N windows, all [N]: samples `begin` to `begin + count` of example `recording` of the records.

    Of the frames that a model makes of a window, those from `offset` on, `kept` of them, are the recording's frames
    from `first` on; the others are context, and belong to the windows beside it.
    """

    recording: np.ndarray
    begin: np.ndarray
    count: np.ndarray
    offset: np.ndarray
    kept: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.recording)

    def of(self, chosen: np.ndarray) -> "Windows":
        """Those that `chosen` (bool or int) names."""
        return Windows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def cut(lengths: np.ndarray, *, hop: int, extra: int, context: int, seconds: float = LONGEST) -> Windows:
    """Windows of recordings of these lengths (int [recordings], samples), each about `seconds` at most.

    A frame t takes samples [t hop, t hop + hop + extra).  A recording that is no longer is one window, all of it;
    others are cut into equal parts, with `context` frames more on either side, where there are any.  Cut without them
    at the edges, a frame would be lost at every cut, and those beside it would see zeros.  Recordings too short for a
    frame have no window.
    """
    lengths = lengths.astype(np.int64)
    frames = np.maximum((lengths - extra) // hop, 0)
    longest = max(unit_count(round(seconds * SAMPLE_RATE), hop, extra), 4 * context, 1)
    pieces = np.where(frames <= longest, np.minimum(frames, 1), -(-frames // max(longest - 2 * context, 1)))
    recording = np.repeat(np.arange(len(lengths)), pieces)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    of, total = pieces[recording], frames[recording]
    first, last = total * piece // of, total * (piece + 1) // of
    low, high = np.maximum(first - context, 0), np.minimum(last + context, total)
    end = np.where(high == total, lengths[recording], high * hop + extra)
    return Windows(recording, low * hop, end - low * hop, first - low, last - first, first)


def shapes_of(windows: Windows, *, hop: int, extra: int, batch_seconds: float, devices: int) -> list[Shape]:
    """Static batch shapes for these windows, of about `batch_seconds` of audio each."""
    return plan_shapes(
        windows.count, crop=int(windows.count.max()), batch_samples=int(batch_seconds * SAMPLE_RATE), shapes=4,
        quantum=hop, offset=extra, row_multiple=int(np.lcm(_ROWS, devices)),
    )  # fmt: skip


def plan_of(windows: Windows, shapes: list[Shape], seed: int) -> Plan:
    """Batches of windows, shuffled or swept; none is cropped, for the largest shape holds the longest."""
    return Plan(windows.count, shapes, seed)


def read(records: Records, windows: Windows, batches: Iterable[Rows]) -> Iterator[Batch]:
    """The batches of a plan, with `offset` and `kept` int32 [R] (0 for empty rows) beside the usual keys.

    Raises UserError for what cannot be read: a label of silence that stands in for it would be a wrong label.
    """
    for rows in batches:
        example = rows.example[:, 0]
        there = example >= 0
        begin = np.where(there, windows.begin[example], 0)
        try:
            batch = read_rows(records, windows.recording, rows._replace(start=begin[:, None]))
        except UnreadableError as error:
            raise UserError(f"{error}; repair it (python -m speechjax.prepare --verify) and label again") from error
        batch["offset"] = np.where(there, windows.offset[example], 0).astype(np.int32)
        batch["kept"] = np.where(there, windows.kept[example], 0).astype(np.int32)
        yield batch

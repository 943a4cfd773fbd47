"""Which recordings are held out, and which are trained on: decided by ids, so that adding files moves few."""

import re

import numpy as np

from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.records import Records
from speechjax.errors import UserError

_CANDIDATES = 100_000


def held_out(records: Records, seconds: float, pattern: str) -> np.ndarray:
    """Indices of the held-out examples: whole recordings whose id matches `pattern`; without one by a hash of the id.

    By hash as many recordings as fit into `seconds`, at most a tenth, at least one.  Raises UserError for a pattern
    that is no regex or matches nothing, and for fewer than two recordings.
    """
    if pattern:
        try:
            wanted = re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.data.valid={pattern!r} is not a regular expression: {error}") from None
        found = np.flatnonzero([bool(wanted.search(name)) for name in records.ids])
        if not len(found):
            raise UserError(f"config.data.valid={pattern!r} matches no id, e.g. {records.id(0)!r}")
        return found
    first, recording = _recordings(records)
    if len(first) < 2:
        raise UserError("only one usable recording; at least two are needed, one of them to hold out")
    size = np.add.reduceat(records.lengths, first)
    candidates = _by_hash(records.keys[first])
    chosen = _fitting(size, candidates, min(seconds * SAMPLE_RATE, int(size.sum()) / 10))
    return np.flatnonzero(np.isin(recording, chosen or [int(candidates[np.argmin(size[candidates])])]))


def some(records: Records, examples: np.ndarray, seconds: float) -> np.ndarray:
    """Of `examples` those of about so many seconds, by a hash of their ids: less is always a part of more.

    0 seconds are all.  Raises UserError where not one fits.
    """
    if not seconds:
        return examples
    order = np.argsort(records.keys[examples], kind="stable")
    chosen = _fitting(records.lengths[examples], order, seconds * SAMPLE_RATE)
    if not chosen:
        raise UserError(f"config.data.train_seconds={seconds:g} is less than any recording has")
    return examples[np.sort(chosen)]


def _recordings(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """The first example of every recording, and the number of every example's recording."""
    new = (np.diff(records.row, prepend=-1) != 0) | (np.diff(records.part, prepend=-1) != 0)
    return np.flatnonzero(new), np.cumsum(new) - 1


def _by_hash(keys: np.ndarray) -> np.ndarray:
    if len(keys) > _CANDIDATES:
        candidates = np.argpartition(keys, _CANDIDATES)[:_CANDIDATES]
    else:
        candidates = np.arange(len(keys))
    return candidates[np.argsort(keys[candidates], kind="stable")]


def _fitting(size: np.ndarray, order: np.ndarray, room: float) -> list[int]:
    """Those that still fit, one after the other."""
    chosen: list[int] = []
    for k in order.tolist():
        if size[k] <= room:
            chosen.append(k)
            room -= int(size[k])
    return chosen

"""Which recordings are held out, and which are trained on: decided by ids, so that adding files moves few."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.records import Records
from speechjax.errors import UserError

log = logging.getLogger("speechjax")

_CANDIDATES = 100_000


def held_out(records: Records, seconds: float, pattern: str) -> np.ndarray:
    """Indices of the held-out examples: whole recordings whose id matches `pattern`; without one by a hash of the id.

    A pattern "@FILE" names the recordings in FILE, an id a line (`recording_id`; a regex that begins with @ is written
    [@]...).  By hash as many recordings as fit into `seconds`, at most a tenth, at least one.  Raises UserError for a
    pattern that is no regex or matches nothing, a file that cannot be read, and for fewer than two recordings.
    """
    if pattern.startswith("@"):
        return _listed(records, Path(pattern[1:]).expanduser())
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


def recording_id(records: Records, i: int) -> str:
    """Id of the recording that example i is, or is a segment of."""
    name = records.id(i)
    return name if records.piece[i] < 0 else name.rpartition("#")[0]


def list_ids(ids: Iterable[str]) -> bytes:
    """What a FILE holds that config.data.valid=@FILE names; UserError for an id that does not fit into a line."""
    lines = sorted(set(ids))
    if broken := [name for name in lines if "\n" in name or "\r" in name]:
        raise UserError(f"the id {broken[0]!r} has a line break: no list of ids can hold it")
    return "".join(f"{name}\n" for name in lines).encode("utf-8", "surrogateescape")


def _listed(records: Records, file: Path) -> np.ndarray:
    try:
        wanted = set(filter(None, re.split(r"\r?\n", file.read_bytes().decode("utf-8", "surrogateescape"))))
    except OSError as error:
        raise UserError(f"config.data.valid=@{file}: {error.strerror}; write a file with an id a line") from None
    names = [recording_id(records, i) for i in range(len(records))]
    found = np.flatnonzero([name in wanted for name in names])
    if not len(found):
        raise UserError(f"config.data.valid=@{file}: no recording has one of its {len(wanted)} ids, e.g. {names[0]!r}")
    if missing := len(wanted - set(names)):
        log.warning("config.data.valid=@%s: %d of its %d ids are of no recording", file, missing, len(wanted))
    return found


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

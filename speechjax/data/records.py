"""Recordings to train on: prepared sets, opened together, filtered and cut, with every fault on record.

A source that is not prepared yet is prepared at first use into the cache, an entry `records/<key>/` in the format of
`shards`.  An entry holds everything: what to include and where to cut are decided when opening, so they can change
without decoding again.
"""

import collections
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.mixture import Part, parse_mixture
from speechjax.data.prepare import prepare
from speechjax.data.shards import FORMAT, MIXTURE, DamagedError, Shards, open_shards
from speechjax.data.sources import digest, open_source
from speechjax.errors import TooManyRejectedError, UserError

log = logging.getLogger("speechjax")

_TIMED = ("text", "phones", "units")  # belong to a whole recording and are wrong for a part of it


class Opened(NamedTuple):
    """One part of a mixture: its prepared set, and how it is to be weighed."""

    part: Part
    shards: Shards
    rejected: list[dict[str, str]]


@dataclass(frozen=True, eq=False)
class Records:
    """N recordings, or segments of long ones, with random access to their samples.

    All arrays are [N]: `part` (which of `parts`), `row` (in its set), `begin` and `lengths` in samples, `piece` (number
    of the segment, -1: a whole recording), `keys` (hash of the id), `mean` and `std` of the whole recording, full
    scale 1.0.  `rejected` lists {"id", "reason"}.
    """

    parts: list[Opened]
    part: np.ndarray
    row: np.ndarray
    begin: np.ndarray
    lengths: np.ndarray
    piece: np.ndarray
    keys: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    rejected: list[dict[str, str]]
    summary: str

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def hours(self) -> float:
        return float(self.lengths.sum()) / SAMPLE_RATE / 3600

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the order of examples: two hosts, or two starts, that agree in it read the same."""
        sha = hashlib.sha256()
        for array in (self.keys, self.part, self.piece, self.lengths):
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    @functools.cached_property
    def ids(self) -> list[str]:
        """Every id; for a large set, ask for those you need."""
        return [self.id(i) for i in range(len(self))]

    def id(self, i: int) -> str:
        """The id of example i: the source's, with the number of the segment, and of the part if there are several."""
        name = self._entry(i)["id"]
        name = name if self.piece[i] < 0 else f"{name}#{int(self.piece[i]):04d}"
        return name if len(self.parts) == 1 else f"{int(self.part[i])}:{name}"

    def meta(self, i: int) -> dict[str, Any]:
        """What is known of example i; for a segment without what belongs to the whole recording."""
        own = self._entry(i)["meta"]
        return own if self.piece[i] < 0 else {key: value for key, value in own.items() if key not in _TIMED}

    def _entry(self, i: int) -> dict[str, Any]:
        return self.parts[int(self.part[i])].shards.entry(int(self.row[i]))

    def read(self, i: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """int16 [count] samples of example i from `start` on, by default all.

        Raises IndexError beyond the example, where the next one's samples lie, and `UnreadableError`.
        """
        count = int(self.lengths[i]) - int(start) if count is None else int(count)
        self._check(i, start, count)
        out = np.empty(count, np.int16)
        self.read_into(i, start, out)
        return out

    def read_into(self, i: int, start: int, out: np.ndarray) -> None:
        """As `read`, into int16 [count]."""
        self._check(i, start, len(out))
        self.parts[int(self.part[i])].shards.read_into(int(self.row[i]), int(self.begin[i]) + int(start), out)

    def _check(self, i: int, start: int, count: int) -> None:
        if not 0 <= start <= start + count <= self.lengths[i]:
            raise IndexError(f"samples {start} to {start + count} of {self.id(i)!r}, which has {self.lengths[i]}")


def open_records(
    source: str,
    *,
    cache_dir: str | None = None,
    segment_seconds: float = 30.0,
    min_seconds: float,
    max_bad_share: float,
    include: str = "",
    exclude: str = "",
    progress: bool = True,
) -> Records:
    """Opens `source`, a mixture or one of its parts, for training; what is not prepared is, into `cache_dir`/records.

    `cache_dir` is by default $SPEECHJAX_CACHE, else ~/.cache/speechjax. Recordings above `segment_seconds` are cut
    into equal segments "id#0000", shorter ones than `min_seconds` rejected; `include` and `exclude` are regexes
    searched in ids. Raises `UserError` where the source cannot be opened, more than `max_bad_share` of a part is
    rejected, nothing is left, or the disk is full.
    """
    if not 0 <= 2 * min_seconds <= segment_seconds:
        raise UserError(
            f"config.data.min_seconds={min_seconds:g}: from 0 to half of the {segment_seconds:g} s at which recordings "
            "are cut"
        )
    wanted = _id_filter(include, exclude)
    root = Path(cache_dir or os.environ.get("SPEECHJAX_CACHE") or "~/.cache/speechjax").expanduser() / "records"
    parts, columns, summaries = [], [], []
    for part in parse_mixture(source):
        for opened in _open_part(part, root, progress):
            rows, rejected = _usable(opened.shards, wanted, min_seconds)
            if not len(rows) and not rejected:
                filters = f"no id passes config.data.include={include!r}, config.data.exclude={exclude!r}"
                raise UserError(f"{opened.part.source}: {filters if wanted else 'there is no recording in it'}")
            _check_share(opened.part.source, len(rows), rejected, max_bad_share)
            rows = _capped(opened, rows)
            cut = _cut(opened.shards, rows, round(segment_seconds * SAMPLE_RATE))
            columns.append((np.full(len(cut[0]), len(parts), np.int16), *cut))
            summaries.append(_summary(opened, len(rows), cut, rejected))
            parts.append(opened._replace(rejected=rejected))
    for summary in summaries:
        log.info("%s", summary)
    return Records(
        parts,
        *(np.concatenate(column) for column in zip(*columns, strict=True)),
        rejected=[
            entry if len(parts) == 1 else {**entry, "source": opened.part.source}
            for opened in parts
            for entry in opened.rejected
        ],
        summary="\n".join(summaries),
    )


def _open_part(part: Part, root: Path, progress: bool) -> list[Opened]:
    """The prepared set of a part, or the sets of a folder prepared as a mixture."""
    kind, _, rest = part.source.partition(":")
    if kind != "shards":
        return [Opened(part, _cached(part, root, progress), [])]
    mixture = Path(rest).expanduser() / MIXTURE
    if not mixture.exists():
        return [Opened(part, open_shards(part.source, rest), [])]
    if part.hours is not None:
        raise UserError(f"{part.source} is a mixture of its own: give hours= where its parts are prepared")
    try:
        parts = [
            Part(f"shards:{mixture.parent / inner['folder']}", part.weight * inner["weight"], inner["hours"], True)
            for inner in json.loads(mixture.read_text(encoding="utf-8"))["parts"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{mixture} cannot be read; give its prepare command again to repair it") from error
    return [opened for own in parts for opened in _open_part(own, root, progress)]


def _cached(part: Part, root: Path, progress: bool) -> Shards:
    """The cache's entry of a source, prepared or repaired where necessary."""
    source = open_source(part.source)
    folder = root / digest([str(FORMAT), str(part.copy), source.fingerprint])[:32]
    if (folder / "dataset.json").exists():
        try:
            return Shards(folder)
        except DamagedError as error:
            log.warning("%s; it will be prepared again", error)
    prepare(source, folder, copy=part.copy, progress=progress)
    try:
        return Shards(folder)
    except DamagedError as error:
        raise UserError(f"{error} although just written; is the disk of the cache all right?") from error


def _id_filter(include: str, exclude: str) -> Callable[[str], bool] | None:
    """Whether an id is wanted; None where all are."""
    compiled = []
    for name, pattern in (("include", include), ("exclude", exclude)):
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"config.data.{name}={pattern!r} is not a regular expression: {error}") from error
    kept, dropped = compiled
    if not include and not exclude:
        return None
    return lambda id: bool(kept.search(id)) and not (exclude and dropped.search(id))


def _usable(
    shards: Shards, wanted: Callable[[str], bool] | None, min_seconds: float
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Rows of the recordings to use, and the wanted ones that cannot be used."""
    chosen = np.ones(len(shards), bool)
    rejected = shards.rejected
    if wanted is not None:
        chosen[:] = [wanted(entry["id"]) for entry in shards.entries()]
        rejected = [entry for entry in rejected if wanted(entry["id"])]
    short = chosen & (shards.index["length"] < min_seconds * SAMPLE_RATE)
    reason = f"shorter than {min_seconds:g} s"
    rejected += [{"id": shards.entry(row)["id"], "reason": reason} for row in np.flatnonzero(short).tolist()]
    return np.flatnonzero(chosen & ~short), rejected


def _check_share(source: str, usable: int, rejected: list[dict[str, str]], allowed: float) -> None:
    share = len(rejected) / (usable + len(rejected))
    if usable and share <= allowed:
        return
    found = f"{100 * share:.3g} % of {usable + len(rejected):,} recordings are unusable: {_reasons(rejected)}"
    example = f"for example {rejected[0]['id']!a} ({rejected[0]['reason']})"
    if not usable:
        raise TooManyRejectedError(f"{source}: nothing to train on; {found}; {example}", rejected)
    raise TooManyRejectedError(
        f"{source}: {found}; {example}. Allowed are {100 * allowed:.3g} %: repair them, leave them out with "
        "--config.data.exclude, or raise --config.data.max_bad_share",
        rejected,
    )


def _reasons(rejected: list[dict[str, str]]) -> str:
    counts = collections.Counter(entry["reason"] for entry in rejected)
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common(6))


def _capped(opened: Opened, rows: np.ndarray) -> np.ndarray:
    """At most `hours` of a part, at least one recording: the first in a hash's order, so a larger cap only adds."""
    hours = opened.part.hours
    if hours is None:
        return rows
    order = rows[np.argsort(opened.shards.index["key"][rows], kind="stable")]
    fits = np.cumsum(opened.shards.index["length"][order]) <= hours * 3600 * SAMPLE_RATE
    return np.sort(order[: max(1, int(fits.sum()))])


def _cut(shards: Shards, rows: np.ndarray, longest: int) -> tuple[np.ndarray, ...]:
    """(row, begin, length, piece, key, mean, std): the chosen recordings, those above `longest` as equal segments."""
    lengths = shards.index["length"][rows]
    pieces = -(-lengths // longest)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    row, whole, of = np.repeat(rows, pieces), np.repeat(lengths, pieces), np.repeat(pieces, pieces)
    begin, end = whole * piece // of, whole * (piece + 1) // of
    number = np.where(of > 1, piece, -1).astype(np.int32)
    key, mean, std = (shards.index[name][row] for name in ("key", "mean", "std"))
    return row, begin, end - begin, number, key, mean, std


def _summary(opened: Opened, recordings: int, cut: tuple[np.ndarray, ...], rejected: list[dict[str, str]]) -> str:
    segments = f" in {len(cut[0]):,} segments" if len(cut[0]) > recordings else ""
    parts = [f"{recordings:,} recordings{segments}", f"{cut[2].sum() / SAMPLE_RATE / 3600:.2f} h"]
    if opened.part.hours is not None:
        parts.append(f"of {opened.shards.info['samples'] / SAMPLE_RATE / 3600:.2f} h")
    if rejected:
        parts.append(f"{len(rejected):,} rejected ({_reasons(rejected)})")
    if opened.shards.info["ignored"]:
        parts.append(f"{opened.shards.info['ignored']:,} other files ignored")
    return f"{opened.part.source}: {', '.join(parts)}"

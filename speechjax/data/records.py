"""Recordings at rest: a source decoded once into one int16 file, opened by memmap, every fault on record.

A cache entry `records/<key>/` holds audio.pcm (int16 little-endian, 16 kHz mono, back to back), index.npz, and a line
an item in examples.jsonl and rejected.jsonl. It holds everything: what to include and where to cut are decided when
opening, so they can change without decoding again. An entry appears by one rename, so it is complete or absent.
"""

import collections
import errno
import json
import logging
import os
import re
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from speechjax.data.decode import SAMPLE_RATE, BadAudio
from speechjax.data.sources import Item, Source, digest, open_source
from speechjax.errors import TooManyRejectedError, UserError

log = logging.getLogger("speechjax")

_FORMAT = "1"  # part of the key: count up when the same source would be stored differently
_FULL_SCALE = 32_768
_TIMED = ("text", "phones", "units")  # belong to a whole recording and are wrong for a part of it
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True, eq=False)
class Records:
    """N recordings, or segments of long ones, with random access to their samples.

    `lengths` and `offsets` int64 [N] in samples; `mean` and `std` float32 [N] of the whole recording that a segment
    came from, full scale = 1.0; `audio` int16 [samples of the whole cache]. `rejected` lists {"id", "reason"},
    `ignored` counts files that are not audio by name.
    """

    ids: list[str]
    lengths: np.ndarray
    offsets: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    meta: list[dict[str, Any]]
    audio: np.ndarray
    rejected: list[dict[str, str]] = field(default_factory=list)
    ignored: int = 0
    summary: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def hours(self) -> float:
        return float(self.lengths.sum()) / SAMPLE_RATE / 3600

    def read(self, i: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """int16 [count] samples of example i from `start` on, by default all; a read-only view.

        Raises IndexError beyond the example, where the next one's samples lie.
        """
        length = int(self.lengths[i])
        stop = length if count is None else int(start) + int(count)
        if not 0 <= start <= stop <= length:
            raise IndexError(f"samples {start} to {stop} of {self.ids[i]!r}, which has {length}")
        offset = int(self.offsets[i])
        return np.asarray(self.audio[offset + int(start) : offset + stop])


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
    """Opens `source` for training, decoding it on first use into `cache_dir`/records.

    `cache_dir` is by default $SPEECHJAX_CACHE, else ~/.cache/speechjax. Recordings above `segment_seconds` are cut
    into equal segments "id#0000", shorter ones than `min_seconds` rejected; `include` and `exclude` are regexes
    searched in ids. Raises `UserError` where the source cannot be opened, more than `max_bad_share` of it is
    rejected, nothing is left, or the disk is full.
    """
    if segment_seconds <= 0 or not 0 <= 2 * min_seconds <= segment_seconds:
        raise UserError(f"min_seconds={min_seconds:g} must not exceed half of segment_seconds={segment_seconds:g}")
    wanted = _id_filter(include, exclude)
    opened = open_source(source)
    root = Path(cache_dir or os.environ.get("SPEECHJAX_CACHE") or "~/.cache/speechjax").expanduser() / "records"
    folder = root / digest([_FORMAT, opened.fingerprint])[:32]
    stored = _load(folder)
    if stored is None:
        shutil.rmtree(folder, ignore_errors=True)
        _prepare(opened, folder, progress)
        stored = _load(folder)
        if stored is None:
            raise UserError(f"{folder} cannot be read back; is the disk of the cache all right?")
    rows, rejected = _usable(stored, wanted, min_seconds)
    if not rows and not rejected:
        raise UserError(f"{source}: no id passes config.data.include={include!r}, config.data.exclude={exclude!r}")
    _check_share(source, len(rows), rejected, max_bad_share)
    records = _cut(opened, stored, rows, rejected, round(segment_seconds * SAMPLE_RATE))
    log.info("%s", records.summary)
    return records


def _id_filter(include: str, exclude: str) -> Callable[[str], bool]:
    compiled = []
    for name, pattern in (("include", include), ("exclude", exclude)):
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"config.data.{name}={pattern!r} is not a regular expression: {error}") from error
    kept, dropped = compiled
    return lambda id: bool(kept.search(id)) and not (exclude and dropped.search(id))


# ---- opening


class _Stored(NamedTuple):
    """A cache entry as it lies on disk: one row a usable recording."""

    ids: list[str]
    meta: list[dict[str, Any]]
    lengths: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    audio: np.ndarray
    rejected: list[dict[str, str]]


def _load(folder: Path) -> _Stored | None:
    """The entry, or None where it is absent or damaged."""
    if not folder.is_dir():
        return None
    try:
        info = json.loads((folder / "info.json").read_text())
        with open(folder / "index.npz", "rb") as file, np.load(file, allow_pickle=False) as index:
            lengths, mean, std = index["lengths"], index["mean"], index["std"]
        examples, rejected = (_read_lines(folder / name) for name in ("examples.jsonl", "rejected.jsonl"))
        samples = int(lengths.sum())
        found = [len(examples), len(lengths), len(rejected), samples, (folder / "audio.pcm").stat().st_size]
        stated = [info["recordings"], info["recordings"], info["rejected"], info["samples"], 2 * info["samples"]]
        if found != stated:
            raise ValueError(f"found {found}, expected {stated}")
        audio = np.memmap(folder / "audio.pcm", "<i2", mode="r") if samples else np.zeros(0, np.int16)
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s) and will be prepared again", folder, error)
        return None
    except OSError as error:
        raise UserError(f"cannot read the cache {folder}: {error.strerror}") from error
    ids = [example.pop("id") for example in examples]
    return _Stored(ids, [example["meta"] for example in examples], lengths, mean, std, audio, rejected)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _usable(
    stored: _Stored, wanted: Callable[[str], bool], min_seconds: float
) -> tuple[list[int], list[dict[str, str]]]:
    """Rows of the recordings to use, and the wanted ones that cannot be used."""
    rows, rejected = [], [entry for entry in stored.rejected if wanted(entry["id"])]
    for row, (name, length) in enumerate(zip(stored.ids, stored.lengths.tolist(), strict=True)):
        if not wanted(name):
            continue
        if length < min_seconds * SAMPLE_RATE:
            rejected.append({"id": name, "reason": f"shorter than {min_seconds:g} s"})
        else:
            rows.append(row)
    return rows, rejected


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


def _cut(source: Source, stored: _Stored, rows: list[int], rejected: list[dict[str, str]], longest: int) -> Records:
    """The chosen recordings, those above `longest` samples as equal segments."""
    begins = (np.cumsum(stored.lengths) - stored.lengths).tolist()
    ids, meta, origin, offsets, lengths = [], [], [], [], []
    for row in rows:
        name, own, length = stored.ids[row], stored.meta[row], int(stored.lengths[row])
        pieces = -(-length // longest)
        if pieces == 1:
            ids.append(name)
        else:
            ids += [f"{name}#{k:04d}" for k in range(pieces)]
            own = {key: value for key, value in own.items() if key not in _TIMED}
        bounds = [length * k // pieces for k in range(pieces + 1)]
        meta += [own] * pieces
        origin += [row] * pieces
        offsets += [begins[row] + bound for bound in bounds[:-1]]
        lengths += np.diff(bounds).tolist()
    segments = f" in {len(ids):,} segments" if len(ids) > len(rows) else ""
    parts = [f"{len(rows):,} recordings{segments}", f"{sum(lengths) / SAMPLE_RATE / 3600:.2f} h"]
    if rejected:
        parts.append(f"{len(rejected):,} rejected ({_reasons(rejected)})")
    if source.ignored:
        parts.append(f"{source.ignored:,} other files ignored")
    return Records(
        ids,
        np.array(lengths, np.int64),
        np.array(offsets, np.int64),
        stored.mean[origin],
        stored.std[origin],
        meta,
        stored.audio,
        rejected,
        source.ignored,
        f"{source.name}: {', '.join(parts)}",
    )


# ---- preparing


def _prepare(source: Source, folder: Path, progress: bool) -> None:
    """Decodes the source into a new entry; another process may be doing the same, and the first to finish wins."""
    log.info("preparing %s in %s", source.name, folder)
    work = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    written = _Written()
    try:
        work.mkdir(parents=True)
        _sweep(folder.parent)
        _write(source, work, written, progress)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise _cache_error(error, source, folder.parent, written) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass
class _Written:
    """How far a preparation has come."""

    items: int = 0
    samples: int = 0


def _write(source: Source, work: Path, written: _Written, progress: bool) -> None:
    lengths, mean, std, rejected = [], [], [], 0
    with (
        open(work / "audio.pcm", "wb") as pcm,
        open(work / "examples.jsonl", "w", encoding="utf-8") as examples,
        open(work / "rejected.jsonl", "w", encoding="utf-8") as rejects,
    ):
        for item, outcome in _with_progress(_decoded(source), source, progress):
            written.items += 1
            if isinstance(outcome, BadAudio):
                rejected += 1
                rejects.write(json.dumps({"id": item.id, "reason": str(outcome)}) + "\n")
                continue
            written.samples += len(outcome.audio)
            pcm.write(outcome.audio.astype("<i2", copy=False).data)
            examples.write(json.dumps({"id": item.id, "meta": item.meta}) + "\n")
            lengths.append(len(outcome.audio))
            mean.append(outcome.mean)
            std.append(outcome.std)
        pcm.flush()
        os.fsync(pcm.fileno())
    np.savez(
        work / "index.npz",
        lengths=np.array(lengths, np.int64),
        mean=np.array(mean, np.float32),
        std=np.array(std, np.float32),
    )
    info = {"source": source.name, "recordings": len(lengths), "rejected": rejected, "samples": written.samples}
    (work / "info.json").write_text(json.dumps(info, indent=1) + "\n")


class _Decoded(NamedTuple):
    audio: np.ndarray
    mean: float
    std: float


_Outcomes = Iterator[tuple[Item, _Decoded | BadAudio]]


def _decoded(source: Source) -> _Outcomes:
    """Items with their audio, decoded in parallel, in order, a bounded number at a time."""
    workers = os.cpu_count() or 1
    pending: collections.deque[tuple[Item, Future[_Decoded | BadAudio]]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in source.items():
                pending.append((item, pool.submit(_decode, item)))
                if len(pending) > 2 * workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        except OSError as error:
            raise UserError(f"cannot read {source.name}: {error}; is its disk all right?") from error
        finally:
            for _, future in pending:
                future.cancel()


def _decode(item: Item) -> _Decoded | BadAudio:
    try:
        audio = item.read()
    except BadAudio as verdict:
        return verdict
    total = squares = 0.0
    for block in np.array_split(audio, len(audio) // (1 << 20) + 1):
        values = block.astype(np.float64)
        total += float(values.sum())
        squares += float(values @ values)
    mean = total / len(audio)
    std = max(squares / len(audio) - mean**2, 0.0) ** 0.5
    return _Decoded(audio, mean / _FULL_SCALE, std / _FULL_SCALE)


def _with_progress(stream: _Outcomes, source: Source, wanted: bool) -> _Outcomes:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        yield from bar.track(stream, total=source.total, description="decoding")


def _cache_error(error: OSError, source: Source, root: Path, written: _Written) -> UserError:
    """What to tell the user whose cache cannot be written."""
    if error.errno not in _DISK_FULL:
        return UserError(
            f"cannot write the cache in {root}: {error.strerror}; set config.data.cache_dir or $SPEECHJAX_CACHE "
            "to a folder on a local disk"
        )
    gigabytes = 2 * written.samples / 1e9
    need = f"more than {gigabytes:.2g} GB"
    if source.total and written.items:
        need = f"about {gigabytes * source.total / written.items:.2g} GB"
    return UserError(
        f"the disk is full: {source.name} needs {need} in {root}; make room there, or set config.data.cache_dir or "
        "$SPEECHJAX_CACHE to a larger disk"
    )


def _sweep(root: Path) -> None:
    """Removes what crashed preparations left, once nothing in it was touched for a day."""
    for work in root.glob("*.tmp-*"):
        try:
            touched = max(path.stat().st_mtime for path in (work, *work.iterdir()))
        except OSError:  # finished or removed meanwhile
            continue
        if time.time() - touched > _STALE_SECONDS:
            shutil.rmtree(work, ignore_errors=True)

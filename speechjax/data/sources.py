"""Where recordings come from: a URI-like string names a source, `open_source` turns it into items.

    embedded[:HOURS]               speech synthesised by the embedded corpus
    folder:DIR                     every audio file below DIR
    manifest:FILE.jsonl            one JSON object a line, as in NeMo
    tfds:NAME[/CONFIG]:SPLIT[@HZ]  a prepared TensorFlow Datasets split

Opening lists and stats; decoding happens in `Item.read`, which may run in any thread.
"""

import collections
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from speechjax.data.decode import EXTENSIONS, BadAudio, decode
from speechjax.errors import UserError

# What data sets call the fields of an example, in order of preference.
_SYNONYMS = {
    "text": ("text", "transcript", "transcription", "sentence", "normalized_text"),
    "speaker": ("speaker", "speaker_id", "spk_id", "client_id"),
    "lang": ("lang", "language", "locale"),
    "label": ("label", "command", "class"),
}


@dataclass(frozen=True)
class Item:
    """One recording: a unique id, `read()` -> int16 [samples] mono at 16 kHz, and what is known about it.

    `read` raises `BadAudio` when the recording cannot be used.
    """

    id: str
    read: Callable[[], np.ndarray]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A stream of items, in the same order each time `items()` is called.

    `fingerprint` digests names, sizes and times, not audio; `total` is None where only the stream knows its
    end; `ignored` counts files that are not audio by name.
    """

    name: str
    fingerprint: str
    items: Callable[[], Iterator[Item]]
    total: int | None
    ignored: int = 0


def open_source(source: str) -> Source:
    """The source that a string such as `folder:/data/speech` names.

    Raises `UserError` when the string is malformed or names nothing that could be read.
    """
    kind, _, rest = source.partition(":")
    if kind not in _KINDS:
        hint = f" (did you mean folder:{source}?)" if os.path.isdir(source) else ""
        raise UserError(
            f"data source {source!r}: unknown kind {kind!r}{hint}; use embedded[:HOURS], folder:DIR, "
            "manifest:FILE.jsonl or tfds:NAME[/CONFIG]:SPLIT"
        )
    return _KINDS[kind](source, rest)


def digest(parts: Iterable[str]) -> str:
    """SHA-256 of a sequence of strings, file names of any encoding included."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return sha.hexdigest()


def _identity(path: str) -> str:
    """Changes when the file does, appears, or becomes readable."""
    try:
        status = os.stat(path)
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns} {os.access(path, os.R_OK)}"


def with_standard_names(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with text, speaker, lang and label under these names, whatever the data set calls them."""
    meta = dict(fields)
    for standard, names in _SYNONYMS.items():
        found = next((name for name in names if name in meta), standard)
        if found != standard:
            meta[standard] = meta.pop(found)
    return meta


# ---- embedded


def _embedded(source: str, rest: str) -> Source:
    try:
        hours = float(rest or 1)
    except ValueError:
        hours = 0.0
    if not 0 < hours < float("inf"):
        raise UserError(f"data source {source!r}: HOURS must be a positive number, e.g. embedded:0.5")
    from speechjax.data import embedded

    def items() -> Iterator[Item]:
        for utterance in embedded.utterances(hours, seed=0):
            meta = {key: value for key, value in utterance.items() if key not in ("id", "audio")}
            yield Item(utterance["id"], functools.partial(np.asarray, utterance["audio"]), meta)

    # The corpus is what its code and texts say, spoken by one version of the synthesiser.
    folder = Path(embedded.__file__).parent
    files = [*folder.glob("embedded*.py"), *folder.glob("espeak*.py"), *folder.glob("embedded_text/*")]
    recipe = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)]
    voice = metadata.version("espeakng-loader")
    return Source(source, digest(["embedded", repr(hours), voice, *recipe]), items, total=None)


# ---- folder


def _folder(source: str, rest: str) -> Source:
    root = os.path.abspath(os.path.expanduser(rest))
    if not rest:
        raise UserError(f"data source {source!r}: which folder? Write folder:DIR")
    if not os.path.isdir(root):
        raise UserError(f"data source {source!r}: no such folder: {root}")
    paths: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    for entry in _walk(root, set()):
        extension = os.path.splitext(entry.name)[1].lower()
        # A dangling link is a recording that somebody misses; a pipe or a socket is not.
        if extension in EXTENSIONS and (entry.is_symlink() or entry.is_file()):
            paths.append(entry.path)
        else:
            others[extension or entry.name] += 1
    if not paths:
        common = ", ".join(f"{count} {extension}" for extension, count in others.most_common(3))
        raise UserError(
            f"data source {source!r}: no audio files in {root} (found {common or 'nothing'}; "
            f"readable are {' '.join(sorted(EXTENSIONS))})"
        )
    ids = sorted(path[len(root.rstrip("/")) + 1 :] for path in paths)

    def items() -> Iterator[Item]:
        for name in ids:
            yield Item(name, functools.partial(decode, os.path.join(root, name)), {})

    identities = (part for name in ids for part in (name, _identity(os.path.join(root, name))))
    return Source(source, digest(["folder", root, *identities]), items, len(ids), others.total())


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """Files below a folder, hidden ones left out; follows links, enters no folder twice."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error
    for entry in visible:
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
            yield from _walk(entry.path, seen)
        else:
            yield entry


# ---- manifest

_PATH_KEYS = ("audio_filepath", "audio", "path", "file")


@dataclass(frozen=True)
class _Line:
    """A manifest line: either a piece of an audio file or the fault that makes it unusable."""

    id: str
    number: int
    path: str
    offset: float
    duration: float | None
    meta: dict[str, Any]
    fault: str


def _manifest(source: str, rest: str) -> Source:
    path = os.path.abspath(os.path.expanduser(rest))
    try:
        with open(path, "rb") as file:
            rows = file.read().splitlines()
    except OSError as error:
        raise UserError(f"data source {source!r}: cannot read {path}: {error.strerror}") from error
    lines = [_parse(row, path, number) for number, row in enumerate(rows, 1) if row.strip()]
    lines.sort(key=lambda line: line.id)
    for one, other in itertools.pairwise(lines):
        if one.id == other.id:
            raise UserError(
                f"{path}: lines {one.number} and {other.number} have the same id {one.id!r}; "
                'give each line its own "id"'
            )
    identities = [line.fault or _identity(line.path) for line in lines]
    if all(line.fault or identity == "missing" for line, identity in zip(lines, identities, strict=True)):
        _refuse_manifest(path, lines)

    def items() -> Iterator[Item]:
        for line in lines:
            if line.fault:
                yield Item(line.id, functools.partial(_raise, line.fault), line.meta)
            else:
                read = functools.partial(decode, line.path, line.offset, line.duration)
                yield Item(line.id, read, line.meta)

    content = hashlib.sha256(b"\n".join(rows)).hexdigest()
    return Source(source, digest(["manifest", path, content, *identities]), items, len(lines))


def _parse(row: bytes, manifest: str, number: int) -> _Line:
    here = f"{os.path.basename(manifest)}:{number}"

    def rejected(fault: str) -> _Line:
        return _Line(here, number, "", 0.0, None, {}, fault)

    try:
        entry = json.loads(row)
    except ValueError:
        return rejected("bad JSON")
    if not isinstance(entry, dict):
        return rejected("not a JSON object")
    key = next((key for key in _PATH_KEYS if isinstance(entry.get(key), str)), None)
    if key is None:
        return rejected("no audio path")
    name = entry.pop(key)
    offset, duration = entry.pop("offset", None), entry.pop("duration", None)
    # Pieces of one file differ in their offset, so it belongs to the name.
    own_id = entry.pop("id", name if offset is None else f"{name}@{offset}")
    if not all(value is None or (type(value) in (int, float) and 0 <= value < 1e9) for value in (offset, duration)):
        return rejected("bad offset or duration")
    path = os.path.join(os.path.dirname(manifest), os.path.expanduser(name))
    return _Line(str(own_id), number, path, offset or 0.0, duration, with_standard_names(entry), "")


def _refuse_manifest(path: str, lines: list[_Line]) -> NoReturn:
    if not lines:
        raise UserError(f"{path}: the manifest is empty")
    first = min(lines, key=lambda line: line.number)
    raise UserError(
        f"{path}: none of its {len(lines)} lines is usable; line {first.number}: "
        + (first.fault or f"no such file: {first.path} (relative paths start at the manifest's folder)")
        + f'; a line looks like {{"{_PATH_KEYS[0]}": "a.wav", "text": "..."}}'
    )


def _raise(fault: str) -> NoReturn:
    raise BadAudio(fault)


def _tfds(source: str, rest: str) -> Source:
    from speechjax.data import tfds_source

    return tfds_source.open_split(source, rest)


_KINDS: dict[str, Callable[[str, str], Source]] = {
    "embedded": _embedded,
    "folder": _folder,
    "manifest": _manifest,
    "tfds": _tfds,
}

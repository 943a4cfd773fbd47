"""Where recordings come from: a URI-like string names a source, `open_source` turns it into items.

    embedded[:HOURS]                         speech synthesised by the embedded corpus
    folder:DIR                               every audio file below DIR; lists of any kind in it are not read
    manifest:FILE                            recordings that a file lists, in one of the formats of manifests.py
    tfds:NAME[/CONFIG]:SPLIT[#FEATURE][@HZ]  a prepared TensorFlow Datasets split
    shards:DIR                               what a preparation wrote

Opening lists and stats; decoding happens in `Item.read`, which may run in any thread, and of files in any process.
Several sources in one string are mixture.py's.
"""

import array
import collections
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from speechjax.data.decode import EXTENSIONS, decode
from speechjax.errors import UserError

# What data sets call the fields of an example, in order of preference: of two texts, the one as it is spoken.
_SYNONYMS = {
    "text": ("text_normalized", "normalized_text", "text", "transcript", "transcription", "sentence"),
    "speaker": ("speaker", "speaker_id", "spk_id", "client_id"),
    "lang": ("lang", "language", "locale"),
    "label": ("label", "command", "class"),
}


@dataclass(frozen=True)
class Item:
    """One recording: a unique id, `read()` -> int16 [samples] mono at 16 kHz, and what is known about it.

    `read` raises `BadAudio` when the recording cannot be used, and can be pickled. `size` is roughly how many bytes it
    takes, as a file or as PCM, 0 where nobody knows. `file` is the path, offset and duration (s, None: to the end) of
    a recording that lies in a file of its own or in a part of one, so that it can be read in place.
    """

    id: str
    read: Callable[[], np.ndarray]
    meta: dict[str, Any]
    size: int = 0
    file: tuple[str, float, float | None] | None = None


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
            "manifest:FILE, tfds:NAME[/CONFIG]:SPLIT or shards:DIR"
        )
    return _KINDS[kind](source, rest)


def digest(parts: Iterable[str]) -> str:
    """SHA-256 of a sequence of strings, file names of any encoding included."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return sha.hexdigest()


class Status(NamedTuple):
    """A file as the fingerprint sees it: `identity` changes when it does, appears, or becomes readable."""

    identity: str
    size: int

    @property
    def missing(self) -> bool:
        return self.identity == "missing"


def is_remote(path: str) -> bool:
    """Whether a path is a URL, which only the workers of a preparation on Beam can read."""
    return re.match(r"[a-zA-Z][-+.\w]*://", path) is not None


def file_status(path: str) -> Status:
    """The status of a file; one that is missing has no size, and of a remote one nothing is asked."""
    if is_remote(path):
        return Status(path, 0)
    try:
        status = os.stat(path)
    except OSError:
        return Status("missing", 0)
    # Asked only where the mode leaves it open: one call a file less, which is a second in a million files.
    readable = status.st_mode & 0o444 == 0o444 or os.access(path, os.R_OK)
    return Status(f"{status.st_size} {status.st_mtime_ns} {readable}", status.st_size)


def file_item(
    id: str, path: str, meta: dict[str, Any], size: int, offset: float = 0.0, duration: float | None = None
) -> Item:
    """A recording in a file, or the part of it that begins at `offset` and lasts `duration` seconds."""
    part = () if not offset and duration is None else (offset, duration)
    return Item(id, functools.partial(decode, path, *part), meta, size, (path, offset, duration))


def with_standard_names(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with text, speaker, lang and label under these names, whatever the data set calls them.

    Of several texts the first that is not empty in order of preference is "text"; what bore that name is "raw_text".
    """
    meta = dict(fields)
    for standard, names in _SYNONYMS.items():
        present = [name for name in names if name in meta]
        found = next((name for name in present if meta[name] not in ("", None)), present[0] if present else standard)
        if found != standard:
            if standard in meta:
                meta[f"raw_{standard}"] = meta.pop(standard)
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
            audio = utterance["audio"]
            yield Item(utterance["id"], functools.partial(np.asarray, audio), meta, size=audio.nbytes)

    # The corpus is what its code and texts say, spoken by one version of the synthesiser.
    folder = Path(embedded.__file__).parent
    files = [*folder.glob("embedded*.py"), *folder.glob("espeak*.py"), *folder.glob("embedded_text/*")]
    recipe = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)]
    voice = metadata.version("espeakng-loader")
    return Source(source, digest(["embedded", repr(hours), voice, *recipe]), items, total=None)


# ---- folder


def _folder(source: str, rest: str) -> Source:
    if is_remote(rest):
        from speechjax.data.beam import remote_folder

        return remote_folder(source, rest)
    root = os.path.abspath(os.path.expanduser(rest))
    if not rest:
        raise UserError(f"data source {source!r}: which folder? Write folder:DIR")
    if not os.path.isdir(root):
        raise UserError(f"data source {source!r}: no such folder: {root}")
    top = root.rstrip("/") + "/"
    ids: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    for entry in _walk(root, set()):
        extension = os.path.splitext(entry.name)[1].lower()
        # A dangling link is a recording that somebody misses; a pipe or a socket is not.
        if extension in EXTENSIONS and (entry.is_symlink() or entry.is_file()):
            ids.append(entry.path[len(top) :])
        else:
            others[extension or entry.name] += 1
    if not ids:
        common = ", ".join(f"{count} {extension}" for extension, count in others.most_common(3))
        raise UserError(
            f"data source {source!r}: no audio files in {root} (found {common or 'nothing'}; "
            f"readable are {' '.join(sorted(EXTENSIONS))})"
        )
    ids.sort()
    sizes = array.array("q")

    def parts() -> Iterator[str]:
        yield from ("folder", root)
        for name in ids:
            status = file_status(top + name)
            sizes.append(status.size)
            yield from (name, status.identity)

    def items() -> Iterator[Item]:
        for name, size in zip(ids, sizes, strict=True):
            yield file_item(name, top + name, {}, size)

    return Source(source, digest(parts()), items, len(ids), others.total())


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


# ---- those with a file of their own


def _manifest(source: str, rest: str) -> Source:
    from speechjax.data import manifests

    return manifests.open_manifest(source, rest)


def _tfds(source: str, rest: str) -> Source:
    from speechjax.data import tfds_source

    return tfds_source.open_split(source, rest)


def _shards(source: str, rest: str) -> Source:
    from speechjax.data.shards import as_source

    return as_source(source, rest)


_KINDS: dict[str, Callable[[str, str], Source]] = {
    "embedded": _embedded,
    "folder": _folder,
    "manifest": _manifest,
    "tfds": _tfds,
    "shards": _shards,
}

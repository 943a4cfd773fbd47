"""A prepared data set: int16 PCM in shards with random access, their index, and what is known of every recording.

    DIR/dataset.json            written last: without it the set is incomplete
    DIR/index.npy               one `INDEX` row a recording
    DIR/shard-00000.pcm         int16 little-endian, 16 kHz mono, recordings back to back (absent if read in place)
    DIR/shard-00000.jsonl       one {"id", "meta"} a line (and {"file"} if read in place)
    DIR/shard-00000.npy         the shard's rows of the index
    DIR/shard-00000.json        sizes and SHA-256 of these, rejections, statistics; written last: the shard is whole
    DIR/rejected.jsonl          one {"id", "reason"} a line

A shard is written by one worker from a fixed list of items, so shards can be made in any order, on any machine, and
an interrupted preparation goes on with those that are missing.
"""

import errno
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from speechjax.data.decode import SAMPLE_RATE, BadAudio, decode, for_soundfile
from speechjax.data.sources import Item, Source, digest
from speechjax.errors import UserError

FORMAT = 2
INDEX = np.dtype(
    [
        ("length", "<i8"),  # samples
        ("offset", "<i8"),  # bytes before the first sample in the shard, or in the user's own file; -1: decode that
        ("line", "<i8"),  # bytes before the recording's line in the .jsonl
        ("key", "<u8"),  # hash of the id: what is held out, and what a cap leaves, follow its order
        ("shard", "<i4"),
        ("mean", "<f4"),  # of the whole recording, full scale = 1.0
        ("std", "<f4"),
    ]
)
MIXTURE = "mixture.json"  # in a folder that holds several prepared sets
FULL_SCALE = 32_768
_OPEN_FILES = 256


class UnreadableError(Exception):
    """Samples that were there when the set was prepared cannot be read now."""


class DamagedError(Exception):
    """A prepared set is not what its own records say."""


def id_key(name: str) -> int:
    """The first 64 bits of the id's SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


class Shards:
    """A prepared set, open: `index` [N] (`INDEX`, mapped), and random access to samples, ids and meta data.

    Raises `DamagedError` where files are missing or have other sizes than recorded, `UserError` where `folder` holds no
    prepared set or the disk cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._prefix = f"{folder}{os.sep}"  # a string: to make a Path costs as much as a short read
        try:
            self.info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
            self._check()
            mapped = "r" if self.info["recordings"] else None  # nothing can be mapped of an empty file
            self.index = np.load(folder / "index.npy", mmap_mode=mapped, allow_pickle=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f"{error.filename} is missing") from error
        except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise DamagedError(f"{folder} cannot be read: {error}") from error
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error.strerror}") from error
        if self.index.dtype != INDEX or len(self.index) != self.info["recordings"]:
            raise DamagedError(f"{folder / 'index.npy'} does not fit dataset.json")

    def _check(self) -> None:
        if self.info["format"] != FORMAT:
            raise UserError(
                f"{self.folder} has format {self.info['format']}, this version reads {FORMAT}: prepare it again"
            )
        for name, file in [*self.info["files"].items(), *self.info["joined"].items()]:
            size = (self.folder / name).stat().st_size
            if size != file["bytes"]:
                raise DamagedError(f"{self.folder / name} has {size:,} bytes instead of {file['bytes']:,}")

    def __len__(self) -> int:
        return len(self.index)

    def _opened(self, path: str) -> "_File":
        return open_file(path, self.info["sha256"])  # what is made anew under a name is another file

    @property
    def rejected(self) -> list[dict[str, str]]:
        """{"id", "reason"} of every recording that could not be used."""
        with open(self.folder / "rejected.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def entry(self, row: int) -> dict[str, Any]:
        """{"id", "meta"} of one recording, and "file" where it is read in place."""
        record = self.index[row]
        file = self._opened(f"{self._prefix}{shard_name(int(record['shard']))}.jsonl")
        line = b""
        while not line.endswith(b"\n"):
            more = file.read(int(record["line"]) + len(line), max(512, len(line)))
            if not more:
                raise DamagedError(f"{file.path} ends within a line")
            line += more
            line = line[: line.find(b"\n") + 1] or line
        try:
            return json.loads(line)
        except ValueError as error:
            raise DamagedError(f"{file.path} has lines that are not JSON") from error

    def entries(self) -> Iterator[dict[str, Any]]:
        """`entry` of every row, in order."""
        for number in range(self.info["shards"]):
            with open(self.folder / f"{shard_name(number)}.jsonl", encoding="utf-8") as file:
                yield from map(json.loads, file)

    def damaged(self) -> dict[str, str]:
        """{file: what is wrong} after reading everything."""
        return damaged(self.folder)

    def read_into(self, row: int, start: int, out: np.ndarray) -> None:
        """Samples from `start` on into `out`, int16 [count], contiguous.  Raises `UnreadableError`.

        Reads rather than maps: a mapped file that shrinks or whose disk fails ends the process, a read says so.
        """
        record = self.index[row]
        offset = int(record["offset"])
        try:
            if self.info["copy"]:
                path = f"{self._prefix}{shard_name(int(record['shard']))}.pcm"
                self._opened(path).read_into(offset + 2 * start, out)
            else:
                path, begin, seconds = self.entry(row)["file"]
                if offset >= 0:
                    _File(path).read_into(offset + 2 * start, out)
                else:
                    _decode_into(path, begin, seconds, start, out)
        except (OSError, DamagedError, BadAudio, soundfile.LibsndfileError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise UserError("too many open files: raise the limit, `ulimit -n 4096`") from error
            raise UnreadableError(f"{error}") from error


def damaged(folder: Path) -> dict[str, str]:
    """{file: what is wrong} of a prepared set, finished or not, after reading all of it."""
    found = {}
    for record in (*folder.glob("shard-*.json"), folder / "dataset.json"):
        try:
            info = json.loads(record.read_text(encoding="utf-8"))
            promised = info["joined" if record.name == "dataset.json" else "files"].items()
        except FileNotFoundError:  # an unfinished set
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            found[record.name] = "it cannot be read"
            continue
        for name, recorded in promised:
            try:
                with open(folder / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != recorded["sha256"]:
                        found[name] = "its content has changed"
            except FileNotFoundError:
                found[name] = "it is missing"
    return dict(sorted(found.items()))


class _File:
    """A file to read at any place from any thread; closed when nobody holds it any more."""

    def __init__(self, path: str):
        self.path, self.fd = path, -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close=os.close) -> None:  # bound here: when Python ends, `os` may be gone before the file
        if self.fd >= 0:
            close(self.fd)

    def read(self, at: int, count: int) -> bytes:
        return os.pread(self.fd, count, at)

    def read_into(self, at: int, out: np.ndarray) -> None:
        view = out.data.cast("B")
        while view.nbytes:
            done = os.preadv(self.fd, [view], at)
            if not done:
                raise OSError(f"{self.path} ends before byte {at + view.nbytes:,}")
            view, at = view[done:], at + done


@functools.lru_cache(_OPEN_FILES)  # of all sets together: a process may open 1,024 as a rule
def open_file(path: str, version: str) -> _File:
    return _File(path)


def _decode_into(path: str, begin: float, seconds: float | None, start: int, out: np.ndarray) -> None:
    """Part of a recording, from the file itself: by seeking where that is exact, else by decoding all of it."""
    with soundfile.SoundFile(for_soundfile(path)) as file:
        if file.samplerate == SAMPLE_RATE and file.format in ("WAV", "WAVEX", "FLAC") and file.frames < 1 << 62:
            if first := round(begin * SAMPLE_RATE) + start:  # libsndfile restarts its decoder for any seek
                file.seek(first)
            if file.channels == 1 and file.subtype == "PCM_16":
                done = len(file.read(out=out, dtype="int16"))
            else:
                block = file.read(len(out), dtype="float32", always_2d=True).mean(axis=1, dtype=np.float32)
                out[: len(block)] = np.clip(np.rint(block * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1)
                done = len(block)
            if done < len(out):
                raise BadAudio("truncated")
            return
    samples = decode(path, begin, seconds)[start : start + len(out)]
    if len(samples) < len(out):
        raise BadAudio("truncated")
    out[:] = samples


def as_source(source: str, rest: str) -> Source:
    """A prepared set as a stream of items, to be prepared in another way or together with others."""
    shards = open_shards(source, rest)

    def items() -> Iterator[Item]:
        for row, entry in enumerate(shards.entries()):
            read = functools.partial(_read_whole, shards, row)
            yield Item(entry["id"], read, entry["meta"], size=2 * int(shards.index["length"][row]))

    return Source(source, digest(["shards", shards.info["sha256"]]), items, len(shards))


def open_shards(source: str, rest: str) -> Shards:
    """The prepared set that `shards:DIR` names; UserError with the way out where it is none, or damaged."""
    folder = Path(rest).expanduser().absolute()
    if not rest or not folder.is_dir():
        raise UserError(f"data source {source!r}: no such folder: {folder}")
    if (folder / MIXTURE).exists():
        raise UserError(f"data source {source!r}: {folder} is a mixture, which can only be trained on; name its parts")
    if not (folder / "dataset.json").exists():
        begun = any(path for pattern in ("shard-*", "*/preparing.json") for path in folder.glob(pattern))
        state = "not finished: give its prepare command again" if begun else "no prepared set"
        raise UserError(f"data source {source!r}: {folder} is {state}")
    try:
        return Shards(folder)
    except DamagedError as error:
        raise UserError(f"data source {source!r}: {error}; give its prepare command again to repair it") from error


def _read_whole(shards: Shards, row: int) -> np.ndarray:
    audio = np.empty(int(shards.index["length"][row]), np.int16)
    try:
        shards.read_into(row, 0, audio)
    except UnreadableError as error:
        raise BadAudio("not readable any more") from error
    return audio

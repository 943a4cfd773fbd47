"""Writing a prepared data set (see `shards`): one worker a shard, then one pass that joins them."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from speechjax.data.decode import SAMPLE_RATE, BadAudio, for_soundfile, raw_pcm_offset
from speechjax.data.shards import FORMAT, FULL_SCALE, INDEX, id_key, shard_name
from speechjax.data.sources import Item, Source, digest
from speechjax.data.statistics import Statistics
from speechjax.errors import UserError


def write_shard(folder: Path, number: int, items: Iterable[Item], copy: bool) -> dict[str, Any]:
    """Decodes `items` into shard `number`; returns what its .json holds.

    With `copy=False` no samples are stored, and the recordings are read where they are.  Files appear under their
    names when they are whole, the .json last.
    """
    base = folder / shard_name(number)
    statistics, rejected, rows = Statistics.new(), [], []
    offset = line = 0
    suffixes = (".pcm", ".jsonl", ".npy") if copy else (".jsonl", ".npy")
    with Hashed(base, ".pcm", wanted=copy) as pcm, Hashed(base, ".jsonl") as lines:
        for item in items:
            try:
                audio = item.read()
            except BadAudio as verdict:
                rejected.append({"id": item.id, "reason": str(verdict)})
                statistics.reject(item.id, str(verdict))
                continue
            except OSError as error:  # the storage failed, which is no verdict on the recording
                raise UserError(f"cannot read {item.id}: {error}; is its disk all right?") from error
            entry: dict[str, Any] = {"id": item.id, "meta": item.meta}
            if item.file is None:
                rate, channels, kind = 0, 0, ""
            else:
                rate, channels, kind = _described(item.file[0])
            statistics.add(audio, rate=rate, channels=channels, kind=kind, meta=item.meta)
            at = offset
            if copy:
                pcm.write(audio.astype("<i2", copy=False).data)
                offset += audio.nbytes
            else:
                entry["file"] = item.file
                at = _offset_in_place(item, len(audio))
            mean, std = _moments(audio)
            rows.append((len(audio), at, line, id_key(item.id), number, mean, std))
            line += lines.write(json.dumps(entry).encode() + b"\n")
        index = np.array(rows, INDEX)
    with Hashed(base, ".npy") as file:
        np.save(file, index)
    written = {".pcm": pcm, ".jsonl": lines, ".npy": file}
    info = {
        "files": {base.name + suffix: written[suffix].info() for suffix in suffixes},
        "recordings": len(index),
        "samples": int(index["length"].sum()),
        "rejected": rejected,
        "statistics": statistics.to_json(),
    }
    write_json(base.with_suffix(".json"), info)
    return info


class Hashed:
    """A file written beside its place, hashed on the way, moved there when it is whole and on the disk."""

    def __init__(self, base: Path, suffix: str, wanted: bool = True):
        self.path = base.with_suffix(suffix)
        self.scratch = self.path.with_name(self.path.name + ".tmp")
        self.wanted, self.bytes, self.sha = wanted, 0, hashlib.sha256()

    def __enter__(self) -> "Hashed":
        self.file = open(self.scratch, "wb") if self.wanted else None
        return self

    def write(self, data: Any) -> int:
        assert self.file is not None
        self.sha.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        self.file.write(data)
        return size

    def info(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self.sha.hexdigest()}

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.file is None:
            return
        try:
            with self.file:
                if kind is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if kind is None:
                self.scratch.replace(self.path)
        finally:
            self.scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _moments(audio: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation, full scale 1.0, a block of the recording at a time."""
    total = squares = 0.0
    for block in np.array_split(audio, len(audio) // (1 << 20) + 1):
        values = block.astype(np.float64)
        total += float(values.sum())
        squares += float(np.einsum("i,i->", values, values))  # not BLAS, whose threads would fight the other workers
    mean = total / len(audio)
    return mean / FULL_SCALE, max(squares / len(audio) - mean**2, 0.0) ** 0.5 / FULL_SCALE


def _described(path: str) -> tuple[int, int, str]:
    """(sample rate, channels, format) of a file that could be decoded."""
    try:
        info = soundfile.info(for_soundfile(path))
    except (soundfile.LibsndfileError, OSError):  # gone meanwhile; what it held is decoded already
        return 0, 0, ""
    return info.samplerate, info.channels, f"{info.format} {info.subtype}"


def _offset_in_place(item: Item, samples: int) -> int:
    """Where the samples begin in a file that already holds what a shard would, else -1."""
    assert item.file is not None
    path, start, _ = item.file
    data = raw_pcm_offset(path)
    if data is None:
        return -1
    at = data + 2 * round(start * SAMPLE_RATE)
    return at if at + 2 * samples <= os.path.getsize(path) else -1


def shard_info(folder: Path, number: int) -> dict[str, Any] | None:
    """What a finished shard's .json says; None where the shard is not there or its files have other sizes."""
    try:
        info = json.loads((folder / f"{shard_name(number)}.json").read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == file["bytes"] for name, file in info["files"].items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return info if whole else None


def statistics_of(folder: Path) -> Statistics:
    """The statistics of all finished shards of a folder."""
    statistics = Statistics.new()
    for path in sorted(folder.glob("shard-*.json")):
        statistics.merge(Statistics.from_json(json.loads(path.read_text(encoding="utf-8"))["statistics"]))
    return statistics


def finish(folder: Path, source: Source, shards: int, copy: bool) -> None:
    """Joins finished shards to a data set: index.npy, rejected.jsonl and, last, dataset.json."""
    files, rejected = {}, 0
    counts = []
    with Hashed(folder / "rejected", ".jsonl") as rejects:
        for number in range(shards):
            info = json.loads((folder / f"{shard_name(number)}.json").read_text(encoding="utf-8"))
            files |= info["files"]
            counts.append((info["recordings"], info["samples"]))
            rejected += len(info["rejected"])
            for entry in info["rejected"]:
                rejects.write(json.dumps(entry).encode() + b"\n")
    total = sum(recordings for recordings, _ in counts)
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, INDEX)) | {"shape": (total,)}
    with Hashed(folder / "index", ".npy") as index:
        # Written, not mapped: where the disk is full a write raises, and a mapped page ends the process.
        np.lib.format.write_array_header_1_0(index, header)  # type: ignore[arg-type]
        for number in range(shards):
            index.write(np.load(folder / f"{shard_name(number)}.npy", allow_pickle=False).tobytes())
    contents = digest(f"{name} {file['sha256']}" for name, file in sorted(files.items()))
    write_json(
        folder / "dataset.json",
        {
            "format": FORMAT,
            "source": source.name,
            "fingerprint": source.fingerprint,
            "copy": copy,
            "sample_rate": SAMPLE_RATE,
            "recordings": total,
            "samples": sum(samples for _, samples in counts),
            "rejected": rejected,
            "ignored": source.ignored,
            "shards": shards,
            "sha256": contents,
            "files": files,
            "joined": {"index.npy": index.info(), "rejected.jsonl": rejects.info()},
        },
    )

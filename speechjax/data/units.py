"""A store of discrete units: one code every `hop` samples of each recording, written in shards, read at random.

    DIR/labelling.json          what is being labelled, by which codebook; written first
    DIR/shard-00000.units       codes, little-endian, in blocks of 4,096 with a checksum behind each
    DIR/shard-00000.npy         the shard's `INDEX` rows
    DIR/shard-00000.json        sizes and SHA-256 of these, how often each code occurs; written last: the shard is whole
    DIR/index.npy               all rows, in the order of their keys
    DIR/units.json              written last of all: without it the store is incomplete

Units belong to whole recordings, not to the segments that long ones are cut into for training, so that
`segment_seconds` may differ between labelling and training; so may every filter, as long as training sees no more.
A recording is known by its id, its length, and its mean and deviation: one that changed since is found out.

Unit j of a recording covers its samples [j hop, (j + 1) hop); there are (samples - extra) // hop of them, `hop` and
`extra` being those of the features that were clustered: a frame takes `hop + extra` samples.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.data.records import Records
from speechjax.data.shard_writer import Hashed, shard_info, write_json
from speechjax.data.shards import open_file, shard_name
from speechjax.data.sources import digest
from speechjax.errors import UserError

FORMAT = 1
# Which recording: hash of the id, samples, mean and standard deviation (full scale 1.0), all of the whole recording.
IDENTITY = np.dtype([("key", "<u8"), ("samples", "<i8"), ("mean", "<f4"), ("std", "<f4")])
INDEX = np.dtype([*IDENTITY.descr, ("offset", "<i8"), ("shard", "<i4")])  # offset in bytes
COMMAND = "python -m speechjax.label"
_BLOCK = 4096  # units
_CLAIMED = ("format", "hop", "extra", "codes", "codebook", "source", "shards")


def identities(records: Records) -> np.ndarray:
    """`IDENTITY` [N] of the recording that each example is, or is a segment of; segments of one have the same."""
    found = np.empty(len(records), IDENTITY)
    found["key"], found["mean"], found["std"] = records.keys, records.mean, records.std
    for number, opened in enumerate(records.parts):
        own = records.part == number
        found["samples"][own] = opened.shards.index["length"][records.row[own]]
    return found


def unit_count(samples: int, hop: int, extra: int = 0) -> int:
    """How many units a recording of so many samples has."""
    return max(0, (samples - extra) // hop)


class UnitWriter:
    """Writes a store, shard by shard, in any order and on any machine; what is whole is kept when it starts again.

        writer = UnitWriter(folder, hop=320, extra=80, codes=500, codebook_digest=..., source_digest=..., shards=7)
        who = identities(records)
        for number in range(7):
            if not writer.done(number):
                writer.write(number, ((who[i], units) for i, units in work_of(number)))
        writer.finish()

    Which recordings make which shard must follow from the source and `shards` alone.  `source_digest` says what is
    labelled (`Records.digest`), `codebook_digest` by what.  Raises `UserError` where `folder` holds other labels.
    Several processes may write different shards once one of them has made the folder.
    """

    def __init__(
        self, folder: Path, *, hop: int, codes: int, codebook_digest: str, source_digest: str, shards: int,
        extra: int = 0,
    ):  # fmt: skip
        values = (FORMAT, hop, extra, codes, codebook_digest, source_digest, shards)
        self.folder, self._mine = Path(folder), dict(zip(_CLAIMED, values, strict=True))
        self.hop, self.extra, self.codes, self.shards = hop, extra, codes, shards
        self._claim()

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "labelling.json"
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            before = {}
        if before == self._mine:
            return
        if any(self.folder.glob("shard-*")):
            if not isinstance(before, dict) or not before:
                raise UserError(f"{self.folder} holds shards of something unknown; use another folder, or empty it")
            other = ", ".join(name for name in _CLAIMED if before.get(name) != self._mine[name])
            raise UserError(f"{self.folder} holds other labels ({other} differ); use another folder, or empty it")
        write_json(file, self._mine)

    def done(self, number: int) -> bool:
        """Whether shard `number` is there, whole."""
        return shard_info(self.folder, number) is not None

    def write(self, number: int, entries: Iterable[tuple[np.void, np.ndarray]]) -> None:
        """Writes one shard from (an `IDENTITY` row, integers [unit_count of its samples] from 0 to codes - 1) each.

        Recordings come as a stream; only the units of one are held.  Interrupted, it leaves nothing that `done`
        would take for a shard.  Raises ValueError for units that do not fit, before the shard is there.
        """
        base = self.folder / shard_name(number)
        (self.folder / "units.json").unlink(missing_ok=True)
        base.with_suffix(".json").unlink(missing_ok=True)
        rows, counts, offset = [], np.zeros(self.codes, np.int64), 0
        with Hashed(base, ".units") as codes:
            for who, units in entries:
                units = self._checked(who, units)
                rows.append((*who.tolist(), offset, number))
                counts += np.bincount(units, minlength=self.codes)
                offset += codes.write(_sealed(units.astype(_kind(self.codes)), int(who["key"])))
        index = np.array(rows, INDEX)
        with Hashed(base, ".npy") as file:
            np.save(file, index)
        written = {f"{base.name}.units": codes.info(), f"{base.name}.npy": file.info()}
        write_json(base.with_suffix(".json"), {"files": written, "recordings": len(index), "counts": counts.tolist()})

    def _checked(self, who: np.void, units: np.ndarray) -> np.ndarray:
        units, wanted = np.asarray(units), unit_count(int(who["samples"]), self.hop, self.extra)
        if units.shape != (wanted,) or units.dtype.kind not in "iu":
            raise ValueError(f"units {units.shape} {units.dtype} of {who['samples']} samples: not {wanted} integers")
        if wanted and not 0 <= units.min() <= units.max() < self.codes:
            raise ValueError(f"units from {units.min()} to {units.max()}: not of {self.codes} codes")
        return units

    def finish(self, info: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Joins the shards, all of which must be there; returns what units.json holds, `info` (JSON) among it.

        recordings, units (how many), counts [codes] (how often each), digest (of codebook, source and units).
        Raises `UserError` where shards are missing or torn.
        """
        found = [shard_info(self.folder, number) for number in range(self.shards)]
        shards = [shard for shard in found if shard is not None]
        if len(shards) < self.shards:
            raise UserError(
                f"{self.shards - len(shards)} of {self.shards} shards in {self.folder} are not whole: give the label "
                "command again"
            )
        files = {name: file for shard in shards for name, file in shard["files"].items()}
        parts = [np.load(self.folder / f"{shard_name(k)}.npy", allow_pickle=False) for k in range(self.shards)]
        index = np.concatenate([np.empty(0, INDEX), *parts])
        index = index[np.lexsort([index[name] for name in ("offset", "shard", "mean", "std", "samples", "key")])]
        with Hashed(self.folder / "index", ".npy") as file:
            np.save(file, index)
        counts = np.sum([shard["counts"] for shard in shards], axis=0, dtype=np.int64)
        claimed = [f"{name} {value}" for name, value in self._mine.items()]
        content = digest([*claimed, *(f"{name} {file['sha256']}" for name, file in sorted(files.items()))])
        summary = {
            **(info or {}), **self._mine, "recordings": len(index), "units": int(counts.sum()), "digest": content,
            "files": files | {"index.npy": file.info()}, "counts": counts.tolist(),
        }  # fmt: skip
        write_json(self.folder / "units.json", summary)
        return summary


def _kind(codes: int) -> np.dtype:
    return np.dtype("<u2" if codes <= 1 << 16 else "<i4")


def _sealed(units: np.ndarray, key: int) -> bytes:
    """Blocks with a CRC-32 behind each, which begins at the key and number: blocks in a wrong place are told, too."""
    blocks = [units[first : first + _BLOCK].tobytes() for first in range(0, len(units), _BLOCK)]
    return b"".join(block + _checksum(block, key, b) for b, block in enumerate(blocks))


def _checksum(block: bytes, key: int, number: int) -> bytes:
    return zlib.crc32(block, (key ^ number) & 0xFFFF_FFFF).to_bytes(4, "little")


class Units:
    """A finished store: `hop`, `extra`, `codes`, `codebook`, `digest`, and all the rest of units.json in `info`.

    Raises `UserError` as `open_units` does.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.info = json.loads((folder / "units.json").read_text(encoding="utf-8"))
            if self.info["format"] != FORMAT:
                raise UserError(f"{folder} has format {self.info['format']}, this version reads {FORMAT}: label again")
            for name, file in self.info["files"].items():
                if (folder / name).stat().st_size != file["bytes"]:
                    raise self._damaged(f"{name} has another size than when it was written")
            self.hop, self.extra, self.codes = (int(self.info[name]) for name in ("hop", "extra", "codes"))
            self.codebook, self.digest = str(self.info["codebook"]), str(self.info["digest"])
            mapped = "r" if self.info["recordings"] else None  # nothing can be mapped of an empty file
            self.index = np.load(folder / "index.npy", mmap_mode=mapped, allow_pickle=False)
            if self.index.dtype != INDEX or len(self.index) != self.info["recordings"]:
                raise self._damaged("index.npy does not fit units.json")
        except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise self._damaged(f"it cannot be read: {error}") from error
        except OSError as error:
            raise self._damaged(f"{error.filename}: {error.strerror}") from error
        self._kind, self._prefix = _kind(self.codes), f"{folder}/"

    def _damaged(self, what: str) -> UserError:
        return UserError(f"the units in {self.folder} are damaged: {what}; empty the folder and label again")

    def __len__(self) -> int:
        return len(self.index)

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Row int64 [N] of each recording (`IDENTITY` [N]); -1 where it is unknown, -2 where it has changed since."""
        keys = np.ascontiguousarray(self.index["key"])
        left, right = (np.searchsorted(keys, wanted["key"], side=side) for side in ("left", "right"))
        rows = np.where(left < right, -2, -1)
        for nth in range(int((right - left).max(initial=0))):  # several where parts of a mixture use the same ids
            open_ = np.flatnonzero((rows == -2) & (left + nth < right))
            at = left[open_] + nth
            same = _same(self.index[at], wanted[open_])
            rows[open_[same]] = at[same]
        return rows

    def read(self, row: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """Units `first` to `first + count` of a recording (default: to its end), int32; -1 beyond either end.

        Raises `UserError` where they are not what was written.
        """
        record = self.index[row]
        total = unit_count(int(record["samples"]), self.hop, self.extra)
        count = max(0, total - first) if count is None else count
        found = np.full(count, -1, np.int32)
        low, high = max(first, 0), min(first + count, total)
        if low >= high:
            return found
        blocks = range(low // _BLOCK, -(-high // _BLOCK))
        units = self._blocks(record, blocks, total)
        found[low - first : high - first] = units[low - blocks[0] * _BLOCK : high - blocks[0] * _BLOCK]
        return found

    def _blocks(self, record: np.void, blocks: range, total: int) -> np.ndarray:
        full = _BLOCK * self._kind.itemsize + 4
        name = f"{shard_name(int(record['shard']))}.units"
        last = min(_BLOCK, total - blocks[-1] * _BLOCK) * self._kind.itemsize + 4
        size = (len(blocks) - 1) * full + last
        try:
            # What is made anew under a name is another file.
            raw = open_file(self._prefix + name, self.digest).read(int(record["offset"]) + blocks[0] * full, size)
        except (OSError, OverflowError) as error:
            raise self._damaged(f"{name} cannot be read ({error})") from error
        parts = [raw[begin : begin + full] for begin in range(0, size, full)]
        for number, part in zip(blocks, parts, strict=True):
            if part[-4:] != _checksum(part[:-4], int(record["key"]), number):
                raise self._damaged(f"{name} has changed since it was written")
        return np.frombuffer(b"".join(part[:-4] for part in parts), self._kind)


def _same(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether recordings of one id are the same sound.

    Mean and deviation may differ in the last places: not every decoder rounds alike, and another recording differs
    by far more.
    """
    slack = 1e-4 * wanted["std"] + 1e-7
    near = [np.abs(found[name] - wanted[name]) <= slack for name in ("mean", "std")]
    return (found["samples"] == wanted["samples"]) & near[0] & near[1]


def open_units(folder: Path) -> Units:
    """The store in `folder`; UserError with the way out where there is none, or it is not finished, or damaged."""
    folder = Path(folder).expanduser().absolute()
    if not (folder / "units.json").exists():
        if (folder / "labelling.json").exists():
            raise UserError(f"the units in {folder} are not finished: give their label command again")
        raise UserError(f"{folder} holds no units; make them with {COMMAND} --out={folder}")
    return Units(folder)

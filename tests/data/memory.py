"""Records without files: what a prepared set would give, from arrays."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from speechjax.data.mixture import Part
from speechjax.data.records import Opened, Records
from speechjax.data.shards import UnreadableError, id_key

# The data block of a config, and what a run adds to it, for corpora of a few hundred samples a recording.
OPTIONS = dict(
    source="memory", seed=1, row_divisor=4, frame_len=(20, 5), segment_align=40, workdir=None, temperature=1.0,
    crop_seconds=250 / 16000, batch_seconds=1000 / 16000, shapes=2, fill=False, row_multiple=4, min_seconds=0.0,
    valid_seconds=10.0, include="", exclude="", text="", text_steps="", max_bad_share=0.1, cache_dir="",
)  # fmt: skip


def random_lengths(n: int, seed: int = 0) -> np.ndarray:
    """Samples of each recording."""
    return np.random.default_rng(seed).integers(20, 400, n)


class MemoryShards:
    """Recordings of noise; each `row` of them can be broken."""

    def __init__(self, lengths: Sequence[int], ids: Sequence[str], meta: Sequence[dict], seed: int):
        rng = np.random.default_rng(seed)
        self.audio = [rng.integers(-20_000, 20_000, n).astype(np.int16) for n in lengths]
        self.ids, self.meta = list(ids), list(meta)
        self.broken: set[int] = set()

    def entry(self, row: int) -> dict:
        return {"id": self.ids[row], "meta": dict(self.meta[row])}

    def entries(self) -> Iterator[dict]:
        return (self.entry(row) for row in range(len(self.ids)))

    def read_into(self, row: int, start: int, out: np.ndarray) -> None:
        if row in self.broken:
            raise UnreadableError("broken on purpose")
        out[:] = self.audio[row][start : start + len(out)]


def memory_records(
    lengths: Sequence[int],
    ids: Sequence[str] | None = None,
    meta: Sequence[dict] | None = None,
    part: Sequence[int] | None = None,
    weights: Sequence[float] = (1.0,),
) -> Records:
    """Records of these lengths; every recording's mean is its index.  Ids "x#0000", "x#0001" are segments of x."""
    lengths = np.asarray(lengths, np.int64)
    N = len(lengths)
    ids = [f"r{i:04d}" for i in range(N)] if ids is None else ids
    meta = [{}] * N if meta is None else meta
    part = np.zeros(N, np.int16) if part is None else np.asarray(part, np.int16)
    found = [re.fullmatch(r"(.*)#(\d{4,})", name) for name in ids]
    names = [match[1] if match else name for match, name in zip(found, ids, strict=True)]
    rows = list(dict.fromkeys(zip(part.tolist(), names, strict=True)))
    row = np.array([rows.index(key) for key in zip(part.tolist(), names, strict=True)])
    begin = np.zeros(N, np.int64)
    for i in range(1, N):
        begin[i] = begin[i - 1] + lengths[i - 1] if row[i] == row[i - 1] else 0
    total = np.bincount(row, lengths, minlength=len(rows)).astype(int)
    first = [int(np.flatnonzero(row == k)[0]) for k in range(len(rows))]
    shards = MemoryShards(total, [name for _, name in rows], [meta[i] for i in first], seed=N)
    return Records(
        parts=[Opened(Part(f"memory:{s}", weight), shards, []) for s, weight in enumerate(weights)],  # type: ignore[arg-type]
        part=part,
        row=row,
        begin=begin,
        lengths=lengths,
        piece=np.array([int(match[2]) if match else -1 for match in found]),
        keys=np.array([id_key(name) for name in names], np.uint64),
        mean=np.arange(N, dtype=np.float32),
        std=np.ones(N, np.float32),
        rejected=[],
        summary="",
    )

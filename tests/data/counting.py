"""Records that say in their samples where they are from: sample s is s // HOP, the number of its unit."""

import dataclasses

import numpy as np
from memory import memory_records

from speechjax.data.units import UnitWriter, identities, unit_count

HOP, EXTRA = 20, 5
PHONE_HOP = 160


def make_records(lengths, hop=HOP, **more):
    """Records whose samples are the numbers of their units; a recording's mean is its row."""
    records = memory_records(lengths, **more)
    for opened in records.parts:
        shards = opened.shards
        shards.index = np.array([(len(audio),) for audio in shards.audio], [("length", "<i8")])
        shards.audio = [(np.arange(len(audio)) // hop).astype(np.int16) for audio in shards.audio]
    return dataclasses.replace(records, mean=records.row.astype(np.float32))


def random_lengths(n, low=20, high=400, seed=0):
    return np.random.default_rng(seed).integers(low, high, n)


def label_all(folder, records, skip=()):
    """A store in which unit j of every recording is j, as the samples have it."""
    who = identities(records)
    first = np.flatnonzero((records.piece <= 0) & ~np.isin(np.arange(len(records)), skip))
    writer = UnitWriter(
        folder, hop=HOP, extra=EXTRA, codes=40_000, codebook_digest="c", source_digest=records.digest, shards=1
    )
    writer.write(0, ((who[i], np.arange(unit_count(int(who["samples"][i]), HOP, EXTRA))) for i in first))
    return writer.finish()


def segments_of(batch):
    """(row, first sample, samples, mean) of every segment that holds audio."""
    lengths = batch["lengths"].reshape(len(batch["audio"]), -1)
    starts = batch["starts"] if "starts" in batch else np.zeros_like(lengths)
    for r, g in np.argwhere(lengths > 0).tolist():
        yield r, int(starts[r, g]), int(lengths[r, g]), batch["mean"].reshape(lengths.shape)[r, g]


CASES = {
    "crops": dict(),
    "filled": dict(fill=True, crop_seconds=5.0, batch_seconds=20.0, shapes=1),
    "segments": dict(),
    "mixture": dict(),
}

"""Labelling recordings with a codebook: every frame of every recording once, into a store of units.

Shapes: R rows of a batch, T frames, K codes.
"""

import collections
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speechjax import sharding
from speechjax.data.plan import Rows, Shape
from speechjax.data.records import Records
from speechjax.data.units import UnitWriter, identities
from speechjax.labelling import windows as cutting
from speechjax.labelling.codebook import Codebook
from speechjax.labelling.features import Features
from speechjax.labelling.progress import Bar
from speechjax.models import kmeans

SHARD_UNITS = 1 << 20  # about: at 50 Hz, six hours
_MOST_SHARDS = 4096


def source_digest(records: Records) -> str:
    """SHA-256 of which recordings these are and what they sound like, so far as mean and deviation tell."""
    return hashlib.sha256(records.digest.encode() + identities(records).tobytes()).hexdigest()


def label(
    records: Records, features: Features, codebook: Codebook, out: Path, mesh: jax.sharding.Mesh, *,
    batch_seconds: float,
) -> None:  # fmt: skip
    """Writes the units of every recording of `records`, whole ones, into the store `out`; what is there is kept.

    Raises UserError for a store of other labels, and for recordings that cannot be read.
    """
    who = identities(records)
    once = np.sort(np.unique(who, return_index=True)[1])  # a mixture may name a recording twice
    windows = cutting.cut(records.lengths, hop=features.hop, extra=features.extra, context=features.context)
    units = np.bincount(windows.recording, windows.kept, minlength=len(records)).astype(np.int64)[once]
    shards = int(np.clip(round(units.sum() / SHARD_UNITS), 1, _MOST_SHARDS))
    shard = (np.cumsum(units) - units) * shards // max(1, units.sum())
    writer = UnitWriter(
        out, hop=features.hop, extra=features.extra, codes=len(codebook.centroids), shards=shards,
        codebook_digest=codebook.digest, source_digest=source_digest(records),
    )  # fmt: skip
    todo = [number for number in range(shards) if not writer.done(number)]
    if not todo and (out / "units.json").exists():
        return
    shapes = cutting.shapes_of(
        windows, hop=features.hop, extra=features.extra, batch_seconds=batch_seconds, devices=mesh.size
    )
    compute = _program(features, codebook, mesh)
    none = np.zeros(0, np.int32)  # recordings too short for a frame
    with Bar("labelling", shards, shards - len(todo)) as bar:
        for number in todo:
            mine = once[shard == number]
            codes = _codes(records, windows.of(np.isin(windows.recording, mine)), shapes, compute, mesh)
            writer.write(number, ((who[i], codes.get(i, none)) for i in mine.tolist()))  # type: ignore[misc]
            bar.advance()
    writer.finish({"features": features.definition, "features_of": features.name})


Batch = dict[str, jax.Array]


def _program(
    features: Features, codebook: Codebook, mesh: jax.sharding.Mesh
) -> Callable[[Batch], tuple[jax.Array, jax.Array]]:
    """batch -> (units int32 [R, T], frames int32 [R]), a copy on every device."""
    everywhere = sharding.replicated(mesh)
    centroids = jax.device_put(codebook.centroids, everywhere)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def assign(variables, centroids, batch):
        frames, lengths = features.compute(variables, batch)
        return kmeans.assign(frames, centroids), lengths

    def compute(batch):
        return assign(features.variables, centroids, {k: v for k, v in batch.items() if k not in ("offset", "kept")})

    return compute


def _codes(
    records: Records, windows: cutting.Windows, shapes: list[Shape], compute: Callable[[Batch], Any],
    mesh: jax.sharding.Mesh,
) -> dict[int, np.ndarray]:  # fmt: skip
    """{recording: its units int32} of all recordings that `windows` are of."""
    if not len(windows):
        return {}
    total = np.bincount(windows.recording, windows.kept).astype(np.int64)
    found = {i: np.full(total[i], -1, np.int32) for i in np.unique(windows.recording).tolist()}
    for rows, codes, lengths in _swept(records, windows, shapes, compute, mesh):
        for row, n in enumerate(rows.example[:, 0].tolist()):
            if n < 0:
                continue
            first, offset, kept = int(windows.first[n]), int(windows.offset[n]), int(windows.kept[n])
            if lengths[row] < offset + kept:
                raise RuntimeError(f"{lengths[row]} frames of {windows.count[n]} samples: less than frame_len() says")
            found[int(windows.recording[n])][first : first + kept] = codes[row, offset : offset + kept]
    return found


def _swept(
    records: Records, windows: cutting.Windows, shapes: list[Shape], compute: Callable[[Batch], Any],
    mesh: jax.sharding.Mesh,
) -> Iterator[tuple[Rows, np.ndarray, np.ndarray]]:  # fmt: skip
    """Every batch with its results, of which one is computed while another is fetched."""
    swept = list(cutting.plan_of(windows, shapes, seed=0).sweep())
    running: collections.deque[tuple[Rows, Any]] = collections.deque()
    batches = sharding.on_device(mesh, cutting.read(records, windows, iter(swept)))
    for rows, (batch, _) in zip(swept, batches, strict=True):
        running.append((rows, compute(batch)))
        if len(running) > 1:
            rows, results = running.popleft()
            yield rows, *jax.device_get(results)
    for rows, results in running:
        yield rows, *jax.device_get(results)

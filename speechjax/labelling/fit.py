"""Fitting a codebook to a stream of features: what was interrupted goes on, to the same bytes.

Shapes: B batch, T frames, D dimensions, K codes.
"""

import functools
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from speechjax import sharding
from speechjax.data.plan import Rows
from speechjax.data.records import Records
from speechjax.errors import UserError
from speechjax.labelling import windows as cutting
from speechjax.labelling.codebook import arrays_from_bytes, arrays_to_bytes
from speechjax.labelling.features import Features
from speechjax.labelling.progress import Bar
from speechjax.logs import replace_file
from speechjax.models import kmeans

log = logging.getLogger("speechjax")

SAVE_EVERY = 20  # batches
_SAMPLE = 30_000  # points for k-means++, at least 3 a code
_SAMPLE_BATCHES = 64  # that the sample comes from
_TOLERANCE = 1e-4  # Lloyd ends once a pass lowers the inertia by less, as a share of it


@dataclass(frozen=True)
class Recipe:
    """How to fit: HuBERT's recipe by default (scikit-learn's MiniBatchKMeans), but for the batches' size.

    `method` "minibatch" or "lloyd"; at most `passes` over the data, less where `patience` batches in a row did not
    lower the smoothed inertia (mini-batches), or a pass lowered it by under 0.01 % (Lloyd).  k-means++ is tried
    `inits` times.  `reassign`: centroids with fewer points than this share of the largest's are moved (mini-batches).
    """

    clusters: int
    method: str = "minibatch"
    passes: int = 100
    patience: int = 100
    inits: int = 20
    reassign: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, least in dict(clusters=2, passes=1, patience=1, inits=1, reassign=0, seed=0).items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {least}")
        if self.method not in ("minibatch", "lloyd"):
            raise UserError(f"--method={self.method}: choose minibatch or lloyd")


class Material(NamedTuple):
    """What a codebook is fitted to: windows of recordings, batches over them, the features of them, where."""

    records: Records
    windows: cutting.Windows
    plan: Any
    features: Features
    mesh: jax.sharding.Mesh

    def batches(self, rows: Iterator[Rows]) -> Iterator[dict[str, jax.Array]]:
        """Batches on the devices, read ahead of the computation."""
        read = cutting.read(self.records, self.windows, rows)
        return (batch for batch, _ in sharding.on_device(self.mesh, read))


@dataclass
class Progress:
    """Where a fit is, beside its arrays: JSON in the saved state."""

    batch: int = 0
    smoothed: float | None = None
    best: float = math.inf
    without: int = 0  # batches since the best
    done: bool = False
    inertia: list[float] = field(default_factory=list)  # smoothed, at every save; of every pass for Lloyd


def points_of(features: Features, variables: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The points of a batch and which are valid, [B T, D] and bool [B T]; in jit."""
    batch = dict(batch)
    offset, kept = batch.pop("offset"), batch.pop("kept")
    frames, lengths = features.compute(variables, batch)
    time = jnp.arange(frames.shape[1], dtype=jnp.int32)[None]
    valid = (time >= offset[:, None]) & (time < jnp.minimum(offset + kept, lengths)[:, None])
    return frames.reshape(-1, frames.shape[-1]), valid.reshape(-1)


def fit(material: Material, recipe: Recipe, folder: Path, request: dict[str, Any]) -> tuple[kmeans.Clusters, Progress]:
    """Clusters for `recipe`; state goes to `folder`, and what is there by the same `request` is continued.

    On the same devices the result is that of an uninterrupted fit to the bit.  Raises UserError for more clusters than
    distinct points, for features that are not finite, and where `folder` holds the state of another request.
    """
    folder.mkdir(parents=True, exist_ok=True)
    restored = _load(folder / "state.npz", request)
    everywhere = sharding.replicated(material.mesh)
    if restored is None:
        clusters = kmeans.start(_initial(material, recipe))
        arrays, progress = _start(recipe, clusters), Progress()
        _save(folder / "state.npz", request, arrays, progress)
    else:
        arrays, progress = restored
        log.info("fitting goes on at batch %d", progress.batch)
    arrays = jax.device_put(arrays, everywhere)
    advance = _minibatches if recipe.method == "minibatch" else _passes
    for latest in () if progress.done else advance(material, recipe, arrays, progress):
        arrays, progress = latest
        _save(folder / "state.npz", request, arrays, progress)
    clusters = kmeans.Clusters(**{name: arrays[name] for name in kmeans.Clusters._fields})
    return jax.device_get(clusters), progress


Arrays = dict[str, jax.Array]


def _start(recipe: Recipe, clusters: kmeans.Clusters) -> Arrays:
    arrays = clusters._asdict()
    if recipe.method == "lloyd":
        arrays |= kmeans.no_sums(clusters.centroids)._asdict()
    return arrays


def _minibatches(
    material: Material, recipe: Recipe, arrays: Arrays, progress: Progress
) -> Iterator[tuple[Arrays, Progress]]:
    """Mini-batch updates; yields what is to be saved, at the end for certain."""
    plan, variables = material.plan, material.features.variables
    total_points = int(material.windows.kept.sum())
    total = recipe.passes * plan.batches_per_epoch

    @functools.partial(jax.jit, out_shardings=sharding.replicated(material.mesh))
    def update(variables, clusters, batch, number):
        points, valid = points_of(material.features, variables, batch)
        counted = jnp.sum(valid)
        clusters = kmeans.update(clusters, points, valid)
        if recipe.reassign:
            key = jax.random.fold_in(jax.random.key(recipe.seed), number)
            moved = kmeans.reassign(key, clusters, points, valid, recipe.reassign)
            # After points enough that every centroid could have had ten, as scikit-learn.
            due = number % max(1, round(10 * recipe.clusters / points.shape[0])) == 0
            clusters = jax.tree.map(lambda new, old: jnp.where(due, new, old), moved, clusters)
        return clusters, counted

    clusters = kmeans.Clusters(**arrays)
    with Bar("fitting", total, progress.batch) as bar:
        for batch in material.batches(plan.batch(k) for k in range(progress.batch, total)):
            clusters, points = update(variables, clusters, batch, jnp.int32(progress.batch))
            _judge(progress, _finite(clusters), int(points), total_points, recipe)
            progress.done |= progress.batch == total
            bar.advance(note=f"inertia {progress.smoothed or 0:.4g}")
            if progress.done or progress.batch % SAVE_EVERY == 0:
                progress.inertia.append(progress.smoothed or float(clusters.inertia))
                yield clusters._asdict(), progress
            if progress.done:
                break


def _judge(progress: Progress, inertia: float, points: int, total_points: int, recipe: Recipe) -> None:
    """Counts a batch, and ends the fit where nothing has got better for long: as MiniBatchKMeans does."""
    progress.batch += 1
    if progress.batch == 1:  # of centroids that have seen nothing yet
        return
    share = min(1.0, 2 * points / (total_points + 1))
    before = progress.smoothed
    progress.smoothed = inertia if before is None else before * (1 - share) + inertia * share
    if progress.smoothed < progress.best:
        progress.best, progress.without = progress.smoothed, 0
    else:
        progress.without += 1
    progress.done = progress.without >= recipe.patience


def _passes(
    material: Material, recipe: Recipe, arrays: Arrays, progress: Progress
) -> Iterator[tuple[Arrays, Progress]]:
    """Lloyd's algorithm: every point once a pass; yields what is to be saved, at the end of every pass for certain."""
    swept = list(material.plan.sweep())
    variables, everywhere = material.features.variables, sharding.replicated(material.mesh)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def accumulate(variables, sums, centroids, batch):
        return kmeans.accumulate(sums, centroids, *points_of(material.features, variables, batch))

    end = jax.jit(kmeans.lloyd_update, out_shardings=everywhere)
    clusters = kmeans.Clusters(**{name: arrays[name] for name in kmeans.Clusters._fields})
    sums = kmeans.Sums(**{name: arrays[name] for name in kmeans.Sums._fields})
    total = recipe.passes * len(swept)
    with Bar("fitting", total, progress.batch) as bar:
        rows = (swept[k % len(swept)] for k in range(progress.batch, total))
        for batch in material.batches(rows):
            sums = accumulate(variables, sums, clusters.centroids, batch)
            progress.batch += 1
            over = progress.batch % len(swept) == 0
            if over:
                clusters = end(clusters.centroids, sums)._replace(step=clusters.step + 1)
                sums = jax.tree.map(jnp.zeros_like, sums)
                inertia = _finite(clusters)
                before = progress.inertia[-1] if progress.inertia else math.inf
                progress.inertia.append(inertia)
                progress.done = before - inertia <= _TOLERANCE * inertia or progress.batch == total
            bar.advance(note=f"inertia {progress.inertia[-1]:.4g}" if progress.inertia else "")
            if over or progress.batch % SAVE_EVERY == 0:
                yield {**clusters._asdict(), **sums._asdict()}, progress
            if progress.done:
                break


def _finite(clusters: kmeans.Clusters) -> float:
    inertia = float(clusters.inertia)
    if not math.isfinite(inertia):
        raise UserError("the features are not finite: has the run they come from diverged? Take an earlier checkpoint")
    return inertia


def _initial(material: Material, recipe: Recipe) -> jax.Array:
    """First centroids [K, D]: the best of several k-means++ over a sample of the first batches' points."""
    plan, variables = material.plan, material.features.variables
    wanted = max(_SAMPLE, 3 * recipe.clusters)
    batches = min(_SAMPLE_BATCHES, plan.batches_per_epoch)
    everywhere = sharding.replicated(material.mesh)
    key = jax.random.key(recipe.seed)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def sample(variables, batch, number):
        points, valid = points_of(material.features, variables, batch)
        share = min(points.shape[0], -(-wanted // batches))
        return kmeans.sample(jax.random.fold_in(key, number), points, valid, share)

    found = []
    with Bar("sampling", batches) as bar:
        for number, batch in enumerate(material.batches(plan.batch(k) for k in range(batches))):
            points, valid = jax.device_get(sample(variables, batch, jnp.int32(number)))
            found.append(points[valid])
            bar.advance()
    points = np.concatenate(found)
    if not np.isfinite(points).all():
        raise UserError("the features are not finite: has the run they come from diverged? Take an earlier checkpoint")
    distinct = len(np.unique(points, axis=0)) if len(points) < 50 * recipe.clusters else recipe.clusters
    if distinct < recipe.clusters:
        raise UserError(
            f"--clusters={recipe.clusters}: there are only {distinct:,} different frames to start from; take fewer "
            "clusters or more audio (--fraction)"
        )
    short = -len(points) % material.mesh.size
    split = sharding.global_batch(
        material.mesh,
        {"points": np.pad(points, ((0, short), (0, 0))), "valid": np.arange(len(points) + short) < len(points)},
    )

    @functools.partial(jax.jit, out_shardings=everywhere)
    def attempt(points, valid, number):
        again = jax.random.fold_in(jax.random.fold_in(key, batches), number)
        return kmeans.kmeans_plus_plus(again, points, recipe.clusters, valid=valid)

    best, least = None, math.inf
    with Bar("k-means++", recipe.inits) as bar:
        for number in range(recipe.inits):
            centroids, inertia = attempt(split["points"], split["valid"], jnp.int32(number))
            if float(inertia) < least:
                best, least = centroids, float(inertia)
            bar.advance(note=f"inertia {least:.4g}")
    assert best is not None
    return best


# ---- the state on disk


def _save(path: Path, request: dict[str, Any], arrays: Arrays, progress: Progress) -> None:
    about = json.dumps({"request": request, "progress": asdict(progress)}).encode()
    content = {name: np.asarray(array) for name, array in jax.device_get(arrays).items()}
    replace_file(path, arrays_to_bytes(about=np.frombuffer(about, np.uint8), **content))


def _load(path: Path, request: dict[str, Any]) -> tuple[Arrays, Progress] | None:
    try:
        content = arrays_from_bytes(path.read_bytes())
        about = json.loads(content.pop("about").tobytes())
        before, progress = about["request"], Progress(**about["progress"])
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a torn file makes of numpy and json
        log.warning("%s cannot be read (%s): the fit begins anew", path, error)
        return None
    check_request(path.parent.parent, before, request)
    return {name: jnp.asarray(array) for name, array in content.items()}, progress


def check_request(folder: Path, before: dict[str, Any], request: dict[str, Any]) -> None:
    """UserError that names what differs, where a folder holds what another command made."""
    if before == request:
        return
    changed = []
    for name in sorted(before.keys() | request.keys()):
        old, new = before.get(name), request.get(name)
        if old != new:
            short = all(isinstance(value, (int, float, str)) and len(str(value)) < 40 for value in (old, new))
            changed.append(f"{name}: {old} -> {new}" if short else name)
    raise UserError(f"{folder} holds another codebook ({'; '.join(changed)}); use another --out, or empty it")

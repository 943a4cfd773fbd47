"""The mesh, and where every array lives on it."""

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from speechjax.errors import UserError
from speechjax.paths import match, path_name

BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(*, data: int, fsdp: int) -> Mesh:
    """Mesh (data, fsdp) over all devices of all processes; -1 for `data` takes what `fsdp` leaves.

    Parameters are split over `fsdp` and copied over `data`; batches are split over both.  Raises UserError when
    the axes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp:
        raise UserError(f"mesh.fsdp={fsdp} does not divide the {devices} devices here")
    data = devices // fsdp if data == -1 else data
    if data * fsdp != devices:
        raise UserError(f"mesh.data={data} x mesh.fsdp={fsdp} is not the {devices} devices here; use mesh.data=-1")
    # Auto axes: Flax linen's modules know nothing of explicit sharding types, jax.make_mesh's default.
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


# Everything is split along its largest divisible axis; the optimizer's moments follow, for their paths end alike.
RULES = ((".*", "fsdp"),)
SMALL = 2**14  # elements below which splitting costs more than it saves


def state_sharding(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, str]] = RULES) -> Any:
    """NamedSharding for every leaf of a tree of shapes, by path rules: "fsdp" splits, "replicate" copies."""

    def place(path, leaf):
        strategy = match(rules, path_name(path), "sharding")
        parts = mesh.shape["fsdp"]
        spec = [None] * leaf.ndim
        if strategy == "fsdp" and parts > 1 and np.prod(leaf.shape) >= SMALL:
            axes = [i for i in range(leaf.ndim) if leaf.shape[i] % parts == 0]
            if axes:
                spec[max(axes, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(mesh: Mesh, shapes: Any) -> Any:
    """A tree of shapes with the shardings of `state_sharding`."""
    place = state_sharding(mesh, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, place)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device: what every process may fetch."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows become its part of the global arrays, split over the mesh's data axes."""
    place = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()}


def on_device(mesh: Mesh, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """(global batch, samples of audio in it); a thread fetches and transfers up to three batches ahead of the step.

    The samples are those of this process, times the number of processes: good enough for a rate.
    What fetching a batch raises is raised where that batch would have come.
    """

    def fetch() -> tuple[dict[str, jax.Array], int] | None:
        if batch := next(batches, None):
            return global_batch(mesh, batch), int(batch["lengths"].sum()) * jax.process_count()
        return None

    with ThreadPoolExecutor(1) as thread:
        ahead = collections.deque(thread.submit(fetch) for _ in range(3))
        while ready := ahead.popleft().result():
            ahead.append(thread.submit(fetch))
            yield ready

"""The mesh, and where every array lives on it."""

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from speechjax.errors import UserError
from speechjax.paths import match, path_name

BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(*, data: int, fsdp: int, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh (data, fsdp, tensor) over all devices of all processes, or `devices`; -1 for `data` takes what is left.

    Batches are split over `data` and `fsdp`.  Parameters are copied over `data`, split over `fsdp` and gathered where
    they are used; over `tensor` the layers themselves are split (`RULES`).  Slices of a TPU pod, which only a slower
    network connects, are neighbours along `data` alone.  Raises UserError when the axes do not multiply to the number
    of devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    count, inner = len(devices), fsdp * tensor
    if fsdp < 1 or tensor < 1 or count % inner:
        raise UserError(f"mesh.fsdp={fsdp} x mesh.tensor={tensor} does not divide the {count} devices here")
    data = count // inner if data == -1 else data
    if data * inner != count:
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} is not the {count} devices here; use "
            "mesh.data=-1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise UserError(f"mesh.data={data} is no multiple of the {slices} slices, which only the axis data may cross")
    shape = (data // slices, fsdp, tensor)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices)
    mesh = _mesh(grid)
    if _part_of(mesh, jax.process_index()) is None:
        # Neighbours on the network, but no host's rows would be neighbours in the batch.
        mesh = _mesh(np.asarray(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(data, fsdp, tensor))
    return mesh


def _mesh(grid: np.ndarray) -> Mesh:
    # Auto axes: Flax linen's modules know nothing of explicit sharding types, jax.make_mesh's default.
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def row_parts(mesh: Mesh) -> int:
    """Into how many parts a mesh splits the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def host_part(mesh: Mesh) -> tuple[int, int]:
    """(which, of how many) equal parts of a global batch's rows this process reads, in the order of the rows.

    Processes that a layer is split over read the same part.
    """
    part = _part_of(mesh, jax.process_index())
    if part is None:
        raise UserError(f"the mesh {dict(mesh.shape)} gives process {jax.process_index()} no neighbouring rows")
    return part


def _part_of(mesh: Mesh, process: int) -> tuple[int, int] | None:
    """`host_part` of a process; None where some process has rows that do not lie together, or more than others."""
    places: dict[int, set[int]] = collections.defaultdict(set)
    for row, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in devices:
            places[device.process_index].add(row)
    count = len(places[process]) or 1
    whole = all(
        len(rows) == count and min(rows) % count == 0 and max(rows) - min(rows) < count for rows in places.values()
    )
    return (min(places[process], default=0) // count, row_parts(mesh) // count) if whole else None


# How leaves are split, by path; the optimizer's moments follow, for their paths end alike.  Of layers that `tensor`
# splits (Shoeybi et al. 2019), the first product gives each device some heads or units, the second sums over them.
RULES = (
    (r"(^|/)(query|key|value|mlp_up)/(kernel|bias)$", "columns"),
    (r"(^|/)(attention/out|mlp_down)/kernel$", "rows"),
    (".*", "fsdp"),
)
SMALL = 2**14  # elements below which splitting costs more than it saves


def state_sharding(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, str]] = RULES) -> Any:
    """NamedSharding for every leaf of a tree of shapes, by path rules.

    "columns" splits the last axis over `tensor`, "rows" the one before it.  These and "fsdp" split the largest axis
    that is left over `fsdp`; "replicate" copies.
    """

    def place(path, leaf):
        strategy = match(rules, path_name(path), "sharding")
        spec: list[str | None] = [None] * leaf.ndim
        if strategy == "replicate" or np.prod(leaf.shape) < SMALL:
            return NamedSharding(mesh, PartitionSpec(*spec))
        axis = {"columns": leaf.ndim - 1, "rows": leaf.ndim - 2}.get(strategy, -1)
        if axis >= 0 and mesh.shape["tensor"] > 1 and leaf.shape[axis] % mesh.shape["tensor"] == 0:
            spec[axis] = "tensor"
        parts = mesh.shape["fsdp"]
        axes = [i for i in range(leaf.ndim) if spec[i] is None and leaf.shape[i] % parts == 0]
        if axes and parts > 1:
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

    The samples are those of this process's part, times the parts: good enough for a rate.
    What fetching a batch raises is raised where that batch would have come.
    """

    def fetch() -> tuple[dict[str, jax.Array], int] | None:
        if batch := next(batches, None):
            return global_batch(mesh, batch), int(batch["lengths"].sum()) * host_part(mesh)[1]
        return None

    with ThreadPoolExecutor(1) as thread:
        ahead = collections.deque(thread.submit(fetch) for _ in range(3))
        while ready := ahead.popleft().result():
            ahead.append(thread.submit(fetch))
            yield ready

"""The mesh on four virtual devices, and where parameters, moments and batches land on it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from speechjax import config, sharding
from speechjax.data.pipeline import batch_spec
from speechjax.data.plan import Shape
from speechjax.errors import UserError
from speechjax.optim import make_optimizer
from speechjax.paths import path_name
from speechjax.sharding import BATCH, SMALL, global_batch, make_mesh, on_device, state_sharding
from speechjax.step import batch_shapes, init_state

REPO = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(jax.device_count() != 4, reason="written for the four virtual devices of conftest")


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor", "expected"),
    [
        (-1, 1, 1, (4, 1, 1)), (-1, 2, 1, (2, 2, 1)), (-1, 4, 1, (1, 4, 1)), (2, 2, 1, (2, 2, 1)), (4, 1, 1, (4, 1, 1)),
        (-1, 1, 2, (2, 1, 2)), (-1, 2, 2, (1, 2, 2)), (1, 1, 4, (1, 1, 4)),
    ],
)  # fmt: skip
def test_mesh_covers_every_device_once(data, fsdp, tensor, expected):
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == expected
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((-1, 3, 1), "mesh.fsdp=3 x mesh.tensor=1 does not divide the 4 devices"),
        ((-1, 8, 1), "mesh.fsdp=8 x mesh.tensor=1 does not divide the 4 devices"),
        ((-1, 0, 1), "mesh.fsdp=0 x mesh.tensor=1 does not divide the 4 devices"),
        ((-1, -1, 1), "mesh.fsdp=-1 x mesh.tensor=1 does not divide the 4 devices"),
        ((-1, 2, 4), "mesh.fsdp=2 x mesh.tensor=4 does not divide the 4 devices"),
        ((-1, 1, 0), "mesh.fsdp=1 x mesh.tensor=0 does not divide the 4 devices"),
        ((3, 1, 1), "mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 is not the 4 devices"),
        ((1, 2, 1), "mesh.data=1 x mesh.fsdp=2 x mesh.tensor=1 is not the 4 devices"),
        ((0, 4, 1), "mesh.data=0 x mesh.fsdp=4 x mesh.tensor=1 is not the 4 devices"),
    ],
)
def test_wrong_factors_are_refused_with_the_cause(axes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**dict(zip(("data", "fsdp", "tensor"), axes, strict=True)))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as far as the mesh looks at it."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def pod(processes, chips, slices=1):
    """`processes` hosts of `chips` chips in every slice."""
    places = [(s, p, c) for s in range(slices) for p in range(processes) for c in range(chips)]
    return [Chip(i, s * processes + p, s) for i, (s, p, _) in enumerate(places)]


@pytest.mark.parametrize(
    ("fsdp", "tensor", "parts"),
    [(1, 1, 4), (4, 1, 4), (8, 1, 4), (1, 2, 4), (2, 2, 4), (1, 4, 4), (1, 8, 2), (1, 16, 1)],
)
def test_every_host_reads_its_own_rows(fsdp, tensor, parts, monkeypatch):
    """Four hosts of four chips; where a layer is split over hosts, these read the same rows."""
    mesh = make_mesh(data=-1, fsdp=fsdp, tensor=tensor, devices=pod(4, 4))
    rows = np.arange(sharding.row_parts(mesh)).reshape(parts, -1)
    own = mesh.devices.reshape(-1, tensor)
    for host in range(4):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        part, count = sharding.host_part(mesh)
        assert count == parts
        mine = [row for row, chips in enumerate(own) if any(chip.process_index == host for chip in chips)]
        assert mine == rows[part].tolist()


def test_rows_of_a_host_lie_together_whatever_the_network(monkeypatch):
    """A mesh that is best for the network may give a host every second row; then the mesh goes by hosts."""
    devices = pod(2, 2)
    shuffled = [devices[i] for i in (0, 2, 1, 3)]
    assert sharding._part_of(sharding._mesh(np.asarray(shuffled).reshape(4, 1, 1)), 0) is None
    mesh = make_mesh(data=-1, fsdp=1, devices=shuffled)
    assert [chip.process_index for chip in mesh.devices.flat] == [0, 0, 1, 1]


def test_slices_are_crossed_by_the_data_axis_alone():
    mesh = make_mesh(data=-1, fsdp=4, tensor=2, devices=pod(2, 4, slices=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 2}
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh.data=1 is no multiple of the 2 slices"):
        make_mesh(data=-1, fsdp=16, devices=pod(2, 4, slices=2))


def test_layers_are_split_over_tensor_by_columns_and_then_rows():
    place = state_sharding(make_mesh(data=-1, fsdp=2, tensor=2), {
        "layer0": {
            "attention": {"query": {"kernel": shape(256, 256)}, "out": {"kernel": shape(256, 256)}},
            "mlp_up": {"kernel": shape(256, 1024), "bias": shape(1024)}, "mlp_down": {"kernel": shape(1024, 256)},
        },
        "layers": {"mlp_up": {"kernel": shape(12, 256, 1024)}, "mlp_down": {"kernel": shape(12, 1024, 256)}},
        "head": {"kernel": shape(256, 1000)}, "odd": {"mlp_up": {"kernel": shape(256, 1023)}},
    })  # fmt: skip
    found = {path_name(path): tuple(s.spec) for path, s in jax.tree_util.tree_leaves_with_path(place)}
    assert found == {
        "layer0/attention/query/kernel": ("fsdp", "tensor"), "layer0/attention/out/kernel": ("tensor", "fsdp"),
        "layer0/mlp_up/kernel": ("fsdp", "tensor"), "layer0/mlp_up/bias": (None,),
        "layer0/mlp_down/kernel": ("tensor", "fsdp"), "layers/mlp_up/kernel": (None, "fsdp", "tensor"),
        "layers/mlp_down/kernel": (None, "tensor", "fsdp"), "head/kernel": (None, "fsdp"),
        "odd/mlp_up/kernel": ("fsdp", None),
    }  # fmt: skip


def test_the_largest_divisible_axis_of_a_big_array_is_split():
    place = state_sharding(make_mesh(data=-1, fsdp=2), {
        "wide": shape(64, 1024), "tall": shape(1024, 64), "odd": shape(2**11 + 1, 64), "cube": shape(3, 512, 512),
        "indivisible": shape(257, 129), "small": shape(64, 64), "edge": shape(SMALL // 2, 2),
        "below": shape(SMALL - 2), "scalar": shape(),
    })  # fmt: skip
    assert {name: tuple(s.spec) for name, s in place.items()} == {
        "wide": (None, "fsdp"), "tall": ("fsdp", None), "odd": (None, "fsdp"), "cube": (None, "fsdp", None),
        "indivisible": (None, None), "small": (None, None), "edge": ("fsdp", None), "below": (None,), "scalar": (),
    }  # fmt: skip


def test_without_fsdp_everything_is_copied():
    place = state_sharding(make_mesh(data=-1, fsdp=1), {"wide": shape(64, 1024)})
    assert place["wide"].is_fully_replicated


def test_rules_choose_by_path_and_must_cover_everything():
    mesh = make_mesh(data=-1, fsdp=2)
    tree = {"head": {"kernel": shape(512, 512)}, "encoder": {"kernel": shape(512, 512)}}
    place = state_sharding(mesh, tree, (("^head/", "replicate"), (".*", "fsdp")))
    assert place["head"]["kernel"].is_fully_replicated
    assert not place["encoder"]["kernel"].is_fully_replicated
    with pytest.raises((ValueError, UserError), match="no sharding rule covers parameter 'head/kernel'"):
        state_sharding(mesh, tree, (("^encoder/", "fsdp"),))


@functools.cache
def abstract_state(size):
    """Shapes of the whole training state of one config, on a mesh (2, 2)."""
    settings: Any = config.load(f"{REPO}/configs/pretrain/wav2vec2.py:{size}")
    task = config.make_task(settings)
    tx, _ = make_optimizer(steps=settings.train.steps, **settings.optim)
    mesh = make_mesh(data=-1, fsdp=2)
    with jax.set_mesh(mesh):
        batch = batch_shapes(batch_spec(Shape(4, 16000)), mesh)
        state = jax.eval_shape(functools.partial(init_state, task, tx, 0, batch))
    return state, state_sharding(mesh, state)


SIZES = ["size=tiny", "size=base", "size=large,smoke"]


@pytest.mark.parametrize("size", SIZES)
def test_fsdp_leaves_no_big_parameter_copied(size):
    state, place = abstract_state(size)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    big = 0
    for (path, leaf), spot in zip(leaves, jax.tree.leaves(place), strict=True):
        splittable = leaf.size >= SMALL and any(d % 2 == 0 for d in leaf.shape)
        assert spot.is_fully_replicated != splittable, path_name(path)
        big += splittable
        held = np.prod(spot.shard_shape(leaf.shape), dtype=int)
        assert held == (leaf.size // 2 if splittable else leaf.size), path_name(path)
    assert big > 0 or "smoke" in size
    # The point of it all: a device holds hardly more than half of the parameters and moments.
    if "smoke" not in size:
        total = sum(x.size for x in jax.tree.leaves(state))
        held = sum(
            np.prod(s.shard_shape(x.shape), dtype=int)
            for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(place), strict=True)
        )
        assert held < (0.52 if size == "size=base" else 0.55) * total  # of a tiny model more is too small to split


@pytest.mark.parametrize("size", SIZES)
def test_moments_live_where_their_parameter_lives(size):
    _, place = abstract_state(size)
    wanted = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(place.params)}
    for moment in ("mu", "nu"):
        found = {
            path_name(p).split(f"/{moment}/")[1]: s
            for p, s in jax.tree_util.tree_leaves_with_path(place.opt_state)
            if f"/{moment}/" in path_name(p)
        }
        assert found == wanted


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_global_batch_gives_every_device_its_own_rows(fsdp):
    mesh = make_mesh(data=-1, fsdp=fsdp)
    audio = np.arange(8 * 5, dtype=np.int16).reshape(8, 5)
    lengths = np.arange(8, dtype=np.int32)
    batch = global_batch(mesh, dict(audio=audio, lengths=lengths))
    assert (batch["audio"].dtype, batch["lengths"].dtype) == (jnp.int16, jnp.int32)
    assert batch["audio"].sharding == NamedSharding(mesh, sharding.BATCH)
    np.testing.assert_array_equal(batch["audio"], audio)
    for row, device in enumerate(mesh.devices.reshape(-1)):
        (shard,) = [s for s in batch["audio"].addressable_shards if s.device == device]
        np.testing.assert_array_equal(shard.data, audio[2 * row : 2 * row + 2])
    held = [np.asarray(s.data) for s in batch["lengths"].addressable_shards]
    np.testing.assert_array_equal(np.sort(np.concatenate(held)), lengths)  # no row twice


def test_a_split_array_really_lies_in_halves():
    mesh = make_mesh(data=-1, fsdp=2)
    x = jax.device_put(jnp.arange(256 * 128.0).reshape(256, 128), state_sharding(mesh, {"x": shape(256, 128)})["x"])
    assert x.sharding.spec == PartitionSpec("fsdp", None)
    assert {s.data.shape for s in x.addressable_shards} == {(128, 128)}


# ---- batches on their way to the devices


def batches(n, fail_at=None):
    for k in range(n):
        if k == fail_at:
            raise RuntimeError("the disk is gone")
        yield dict(audio=np.full((4, 10), k, np.int16), lengths=np.full(4, 5, np.int32))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 9])
def test_every_batch_arrives_once_in_order(n):
    mesh = make_mesh(data=-1, fsdp=1)
    found = list(on_device(mesh, batches(n)))
    assert [int(batch["audio"][0, 0]) for batch, _ in found] == list(range(n))
    assert all(samples == 20 for _, samples in found)
    assert all(batch["audio"].sharding.spec == BATCH for batch, _ in found)


@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_an_error_comes_where_its_batch_would_have_come(fail_at):
    stream = on_device(make_mesh(data=-1, fsdp=1), batches(9, fail_at))
    for k in range(fail_at):
        assert int(next(stream)[0]["audio"][0, 0]) == k
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(stream)


def test_batches_are_fetched_ahead_but_not_for_ever():
    fetched = []

    def counted():
        for k, batch in enumerate(batches(100)):
            fetched.append(k)
            yield batch

    stream = on_device(make_mesh(data=-1, fsdp=1), counted())
    next(stream)
    stream.close()  # waits for what is under way
    assert 1 <= len(fetched) <= 4

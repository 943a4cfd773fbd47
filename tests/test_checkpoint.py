"""Checkpoints: bitwise back, on any mesh, and never a silently damaged one."""

import contextlib
import gc
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechjax import checkpoint
from speechjax.checkpoint import Checkpoints, digest
from speechjax.errors import UserError
from speechjax.sharding import make_mesh, state_sharding

# orbax leaves coroutines behind where reading fails; collected in another test they would fail that one.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def _collect_coroutines():
    yield
    gc.collect()


def make_state(seed: int, fsdp: int = 1):
    """Leaves of every kind that a training state has, on a mesh; `seed` tells the steps apart."""
    rng = np.random.default_rng(seed)
    noise = lambda *shape, kind=jnp.float32: jnp.asarray(rng.normal(size=shape), kind)  # noqa: E731
    tree = dict(
        params=dict(kernel=noise(256, 128), bias=noise(7)),
        half=noise(16, 4, kind=jnp.bfloat16),
        moments=[noise(256, 128), np.int32(seed)],
        extra={},
        step=np.int32(seed),
    )
    return jax.device_put(tree, state_sharding(make_mesh(data=-1, fsdp=fsdp), jax.tree.map(jnp.asarray, tree)))


def like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@contextlib.contextmanager
def opened(folder, keep=3, every=1):
    checkpoints = Checkpoints(folder, keep=keep, every=every)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A folder with steps 1, 2 and 3; to be copied, never written to."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    with opened(folder) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, make_state(step), dict(best=step / 7))
    return folder


@pytest.fixture
def folder(three_steps, tmp_path):
    return shutil.copytree(three_steps, tmp_path / "checkpoints")


def array_file(folder, step):
    """The file that holds the arrays of a step: the largest by far."""
    return max((p for p in (folder / str(step) / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def restore(folder, target=None):
    """(state, meta) of the newest intact step; there has to be one."""
    with opened(folder) as checkpoints:
        found = checkpoints.restore(like(target or make_state(0)))
    assert found is not None
    return found


# ---- saving and restoring


def test_nothing_there_is_none(tmp_path):
    with opened(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(like(make_state(0))) is None
        assert checkpoints.latest_step() is None


def test_state_and_meta_come_back_bitwise(folder):
    state, meta = restore(folder)
    assert_equal(state, make_state(3))
    assert meta["best"] == 3 / 7
    assert meta["step"] == 3
    assert len(meta["digest"]) == len(jax.tree.leaves(state))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_restore_on_another_mesh(tmp_path, before, after):
    with opened(tmp_path / "c") as checkpoints:
        assert checkpoints.save(1, make_state(5, fsdp=before), {})
    found, _ = restore(tmp_path / "c", make_state(0, fsdp=after))
    assert_equal(found, make_state(5, fsdp=after))
    assert not found["params"]["kernel"].sharding.is_fully_replicated or after == 1


def test_what_is_due_is_saved_and_the_newest_are_kept(tmp_path):
    state = make_state(1)
    with opened(tmp_path / "c", keep=2, every=3) as checkpoints:
        assert checkpoints.save(3, state, {})
        assert [checkpoints.save(step, state, {}) for step in range(4, 11)] == [step % 3 == 0 for step in range(4, 11)]
        assert not checkpoints.save(9, state, {}, force=True)  # is there already
        assert checkpoints.save(11, state, {}, force=True)
        checkpoints.wait()
        assert checkpoints.latest_step() == 11
        assert not checkpoints.preempted(11)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["11", "9"]


def test_the_first_step_is_saved_only_when_due(tmp_path):
    with opened(tmp_path / "c", every=3) as checkpoints:
        assert [checkpoints.save(step, make_state(1), {}) for step in (1, 2, 3)] == [False, False, True]


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    """The loop hands the state to the next step while the writer still works."""
    state = make_state(1)
    expected = jax.tree.map(lambda x: jnp.copy(x), state)
    scramble = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    with opened(tmp_path / "c") as checkpoints:
        assert checkpoints.save(1, state, {})
        state = scramble(state)
    found, _ = restore(tmp_path / "c")
    assert_equal(found, expected)


# ---- damage


def flip(path: Path, at: float) -> None:
    """Flips one bit of the byte at this share of the file."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def restored_step(folder, caplog, broken=(3,)):
    """Restores, and returns the step found; asserts that it is whole, and that newer ones were set aside."""
    with caplog.at_level(logging.WARNING, logger="speechjax"):
        state, meta = restore(folder)
    step = int(state["step"])
    assert meta["step"] == step
    assert_equal(state, make_state(step))
    names = {p.name for p in folder.iterdir()}
    for other in broken:
        newer = other > step
        assert (f"checkpoint {other} in {folder} is broken" in caplog.text) == newer
        assert (f"{other}.broken" in names) == newer
        assert (str(other) in names) != newer
    return step


@pytest.mark.parametrize("at", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_bit_in_the_arrays_falls_back(folder, caplog, at):
    flip(array_file(folder, 3), at)
    assert restored_step(folder, caplog) == 2


def test_a_flipped_bit_anywhere_in_the_state_never_gives_a_wrong_one(folder, caplog):
    """Some bytes mean nothing; whatever the others do, what comes back is step 3 or step 2, whole."""
    found = []
    files = sorted(p.relative_to(folder) for p in (folder / "3/state").rglob("*") if p.is_file())
    for number, (file, at) in enumerate((f, at) for f in files for at in (0.0, 0.3, 0.6, 1.0)):
        copy = shutil.copytree(folder, folder.with_name(f"copy{number}"))
        flip(copy / file, at)
        found.append(restored_step(copy, caplog))
    assert len(found) > 20
    assert 2 in found


def test_the_digest_finds_what_the_array_format_does_not(folder, monkeypatch):
    """The control: with every digest alike, a changed array restores without complaint."""
    other = make_state(3)
    other["params"]["kernel"] = other["params"]["kernel"].at[7, 7].add(1e-6)
    path = folder / "3/meta/metadata"
    meta = json.loads(path.read_text())
    with monkeypatch.context() as patch, opened(folder.with_name("other")) as checkpoints:
        patch.setattr(checkpoint, "digest", lambda tree: meta["digest"])
        checkpoints.save(3, other, {})
        checkpoints.wait()
        found = checkpoints.restore(like(other))
        assert found is not None
        assert_equal(found[0], other)
    with pytest.raises(UserError):
        restore(folder.with_name("other"))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_truncated_array_file_falls_back(folder, caplog, share):
    path = array_file(folder, 3)
    os.truncate(path, int(share * path.stat().st_size))
    assert restored_step(folder, caplog) == 2


@pytest.mark.parametrize("name", ["arrays", "state/manifest.ocdbt", "meta/metadata", "meta", "state"])
def test_a_deleted_file_falls_back(folder, caplog, name):
    path = array_file(folder, 3) if name == "arrays" else folder / "3" / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert restored_step(folder, caplog) == 2


@pytest.mark.parametrize("text", ["", "{", "null", '{"format": 2}'])
def test_torn_meta_falls_back(folder, caplog, text):
    (folder / "3/meta/metadata").write_text(text)
    assert restored_step(folder, caplog) == 2


def test_two_broken_steps_fall_back_to_the_third(folder, caplog):
    for step in (2, 3):
        flip(array_file(folder, step), 0.5)
    assert restored_step(folder, caplog, broken=(3, 2)) == 1


def test_nothing_intact_is_an_error_that_keeps_everything(folder):
    for step in (1, 2, 3):
        os.truncate(array_file(folder, step), 100)
    with pytest.raises(UserError, match=r"no intact checkpoint in .*tried 3, 2, 1.*another --workdir"):
        restore(folder)
    assert {"1.broken", "2.broken", "3.broken"} <= {p.name for p in folder.iterdir()}


def test_training_goes_on_after_a_fallback(folder):
    flip(array_file(folder, 3), 0.5)
    with opened(folder) as checkpoints:
        found = checkpoints.restore(like(make_state(0)))
        assert found is not None
        assert found[1]["step"] == 2
        assert checkpoints.save(3, make_state(33), {})  # the same number once more
    state, meta = restore(folder)
    assert meta["step"] == 3
    assert_equal(state, make_state(33))
    flip(array_file(folder, 3), 0.5)  # broken once more, although 3.broken is there
    assert restore(folder)[1]["step"] == 2


def change_meta(folder, **changes):
    for step in (1, 2, 3):
        path = folder / str(step) / "meta/metadata"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_format_is_refused(folder):
    change_meta(folder, format=checkpoint.FORMAT + 1)
    with pytest.raises(UserError):
        restore(folder)


def test_another_format_is_named_and_left_alone(folder):
    change_meta(folder, format=checkpoint.FORMAT + 1)
    with pytest.raises(UserError, match=f"format {checkpoint.FORMAT + 1}"):
        restore(folder)
    assert {p.name for p in folder.iterdir()} == {"1", "2", "3"}


def test_wrong_digest_in_meta_falls_back(folder, caplog):
    path = folder / "3/meta/metadata"
    meta = json.loads(path.read_text())
    meta["digest"][0] ^= 1
    path.write_text(json.dumps(meta))
    assert restored_step(folder, caplog) == 2
    assert "digest does not match" in caplog.text


def test_leftovers_of_a_crashed_writer_are_ignored(folder):
    for name in ("4.orbax-checkpoint-tmp-1700000000", "5.broken", "notes"):
        shutil.copytree(folder / "3", folder / name)
    with opened(folder) as checkpoints:
        found = checkpoints.restore(like(make_state(0)))
        assert found is not None
        assert found[1]["step"] == checkpoints.latest_step() == 3
        assert_equal(found[0], make_state(3))
        assert checkpoints.save(4, make_state(4), {})  # saving waits for the sweep, which runs in the background
    assert {p.name for p in folder.iterdir()} == {"2", "3", "4", "5.broken", "notes"}


def test_a_full_disk_is_reported(tmp_path):
    """An error of the background writer reaches `wait`, and the steps before stay intact."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        state = make_state(1)
        large = {**state, "noise": jnp.asarray(np.random.default_rng(0).normal(size=2**19), jnp.float32)}
        checkpoints = Checkpoints(tmp_path / "c", keep=3, every=1)
        assert checkpoints.save(1, state, {})
        checkpoints.wait()
        with pytest.raises(Exception, match=r"[Nn]o space left"):  # noqa: PT012
            checkpoints.save(2, large, {})
            checkpoints.wait()
        found, meta = restore(tmp_path / "c")
        assert meta["step"] == 1
        assert_equal(found, state)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


# ---- the digest


def digest_of(values, kind=np.float32):
    return digest([jnp.asarray(np.asarray(values, kind))])


@pytest.mark.parametrize("kind", [np.float32, np.int32, jnp.bfloat16, np.uint8])
def test_every_single_bit_counts(kind):
    values = np.random.default_rng(0).integers(0, 100, 5).astype(kind)
    whole = digest([jnp.asarray(values)])
    for bit in range(8 * values.nbytes):
        data = bytearray(values.tobytes())
        data[bit // 8] ^= 1 << bit % 8
        assert digest([jnp.asarray(np.frombuffer(data, kind))]) != whole


def plain_sum(values):
    """The control: to a sum of the words the order is nothing."""
    return int(np.asarray(values, np.float32).view(np.uint32).sum(dtype=np.uint32))


def test_weights_that_change_places_are_seen():
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for i, j in [(0, 1), (0, 99), (31, 63), (98, 99)]:
        swapped = values.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert plain_sum(swapped) == plain_sum(values)
        assert digest_of(swapped) != digest_of(values)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=8, max_size=8), st.integers(0, 7), st.integers(0, 7))
@example([1.0, -1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 0, 1)
def test_swapped_values_are_seen(values, i, j):
    before = np.asarray(values, np.float32)
    swapped = before.copy()
    swapped[[i, j]] = swapped[[j, i]]
    assert plain_sum(swapped) == plain_sum(before)
    assert (digest_of(swapped) == digest_of(before)) == (swapped.tobytes() == before.tobytes())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([1.0, -1.0, 2.0], [-1.0, 1.0, 2.0]),  # two values that differ by their sign change places
        ([1.0, 2.0, 3.0], [-1.0, -2.0, 3.0]),  # two signs
        ([1.0, *[0.0] * 255, 2.0], [2.0, *[0.0] * 255, 1.0]),  # a distance that is a power of two
    ],
)
def test_changes_that_cancel_in_a_weighted_sum_are_seen(before, after):
    assert digest_of(before) != digest_of(after)


def test_the_digest_does_not_depend_on_the_mesh():
    digests = {tuple(digest(make_state(4, fsdp))) for fsdp in (1, 2, 4)}
    assert len(digests) == 1
    assert digests != {tuple(digest(make_state(5)))}


def test_a_moved_boundary_between_leaves_is_seen():
    one = dict(a=jnp.arange(4.0), b=jnp.arange(4.0, 8.0))
    two = dict(a=jnp.arange(3.0), b=jnp.arange(3.0, 8.0))
    assert digest(one) != digest(two)

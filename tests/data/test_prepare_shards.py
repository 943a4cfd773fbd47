"""Preparing goes on where it was stopped, whatever stopped it, and never mixes two sources."""

import errno
import json
import logging
import os
import resource
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax.data import prepare as module
from speechjax.data import shard_writer
from speechjax.data.prepare import chunks, expected_bytes, prepare
from speechjax.data.records import open_records
from speechjax.data.shards import Shards
from speechjax.data.sources import Item, Source, open_source
from speechjax.errors import UserError

RATE = 16_000
FILES = 200  # four shards


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    for k in range(FILES - 1):
        soundfile.write(folder / f"{k:03d}.wav", rng.integers(-9_000, 9_000, 400 + k).astype(np.int16), RATE)
    (folder / "text.wav").write_text("no audio " * 9)
    return folder


@pytest.fixture
def source(speech) -> Source:
    return open_source(f"folder:{speech}")


@pytest.fixture(scope="session")
def whole(speech, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    prepare(open_source(f"folder:{speech}"), folder, progress=False)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def items_of(sizes: list[int], **more) -> Source:
    made = [Item(f"{k}", lambda: np.arange(9, dtype=np.int16), {}, size, **more) for k, size in enumerate(sizes)]
    return Source("memory", "0", lambda: iter(made), len(made))


# ---- what makes a shard


@pytest.mark.parametrize(("total", "most"), [(1, 64), (65, 64), (3_200, 100), (200_000, 4_096), (None, 256)])
def test_shards_have_a_share_of_the_items(total, most):
    made = items_of([1] * min(total or 600, 9_000))
    parts = list(chunks(Source("memory", "0", made.items, total)))
    assert [number for number, _ in parts] == list(range(len(parts)))
    assert [item.id for _, items in parts for item in items] == [item.id for item in made.items()]
    assert {len(items) for _, items in parts[:-1]} <= {most}
    assert len(parts[-1][1]) <= most


def test_shards_are_of_bounded_size():
    gigabyte = 1 << 30
    assert [len(items) for _, items in chunks(items_of([gigabyte // 3] * 7))] == [3, 3, 1]
    assert [len(items) for _, items in chunks(items_of([3 * gigabyte] * 3))] == [1, 1, 1]
    # A file that is compressed grows, a part of one has the size that it says.
    assert [len(items) for _, items in chunks(items_of([gigabyte // 24] * 4, file=("a.mp3", 0.0, None)))] == [2, 2]
    assert [len(items) for _, items in chunks(items_of([gigabyte // 24] * 4, file=("a.mp3", 0.0, 9.0)))] == [4]


def test_expected_size(source, whole):
    assert expected_bytes(source) == pytest.approx(sum(map(len, (whole[n] for n in whole if "pcm" in n))), rel=0.05)
    assert expected_bytes(items_of([1, 2])) == 0
    assert expected_bytes(Source("memory", "0", lambda: iter(()), None)) == 0


# ---- the same bytes


def test_threads_and_processes_write_the_same_bytes(source, whole, tmp_path):
    assert sum(name.endswith(".pcm") for name in whole) == 4
    for workers in (0, 2):
        prepare(source, tmp_path / f"{workers}", workers=workers, progress=False)
        assert contents(tmp_path / f"{workers}") == whole


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, SystemExit])
def test_interrupted_it_makes_only_what_is_missing(source, whole, tmp_path, monkeypatch, decodes, failure):
    real = shard_writer.write_shard

    def third_fails(folder, number, items, copy):
        if number == 2:
            raise failure
        return real(folder, number, items, copy)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", third_fails)
        with pytest.raises(failure):
            prepare(source, tmp_path / "set", progress=False)
    assert not (tmp_path / "set" / "dataset.json").exists()
    assert not list((tmp_path / "set").glob("*.tmp"))
    there = {path.stem for path in (tmp_path / "set").glob("shard-*.json")}
    assert "shard-00002" not in there
    lost = [item.id for number, items in chunks(source) for item in items if f"shard-{number:05d}" not in there]
    decodes.clear()
    prepare(source, tmp_path / "set", progress=False)
    assert sorted(decodes) == sorted(lost)
    assert contents(tmp_path / "set") == whole
    decodes.clear()
    prepare(source, tmp_path / "set", progress=False)
    assert not decodes


def test_interrupted_while_joining(source, whole, tmp_path, monkeypatch, decodes):
    def failing(folder, *rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "finish", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "set", progress=False)
    decodes.clear()
    prepare(source, tmp_path / "set", progress=False)
    assert not decodes
    assert contents(tmp_path / "set") == whole


def test_what_a_killed_attempt_left_goes(source, whole, tmp_path):
    prepare(source, tmp_path / "set", progress=False)
    for name in ("shard-00001.json", "index.npy", "dataset.json"):
        (tmp_path / "set" / name).unlink()
    for name in ("shard-00001.pcm.tmp", "index.npy.tmp"):
        (tmp_path / "set" / name).write_bytes(b"half")
    prepare(source, tmp_path / "set", progress=False)
    assert contents(tmp_path / "set") == whole


def test_a_worker_that_dies_is_one_clear_line(source, tmp_path, monkeypatch):
    """As the kernel kills where memory runs out."""
    monkeypatch.setattr(module, "_watch_parent", dies)
    with pytest.raises(UserError, match=r"worker process was killed.* fewer --workers"):
        prepare(source, tmp_path / "set", workers=1, progress=False)


def dies() -> None:
    os.kill(os.getpid(), 9)


# ---- one at a time, one source a folder


def test_a_second_preparer_waits_and_finds_everything_done(source, whole, tmp_path, monkeypatch, decodes, caplog):
    begun, may_go_on = threading.Event(), threading.Event()
    real = shard_writer.finish

    def slow(*args):
        begun.set()
        assert may_go_on.wait(60)
        real(*args)

    monkeypatch.setattr(module, "finish", slow)
    first = threading.Thread(target=prepare, args=(source, tmp_path / "set"), kwargs={"progress": False})
    first.start()
    assert begun.wait(60)
    with caplog.at_level(logging.INFO, "speechjax"):
        second = threading.Thread(target=prepare, args=(source, tmp_path / "set"), kwargs={"progress": False})
        second.start()
        while "waiting for it" not in caplog.text:
            assert second.is_alive()
        may_go_on.set()
        first.join(60)
        second.join(60)
    assert len(decodes) == FILES
    assert contents(tmp_path / "set") == whole


def test_another_source_is_refused(source, whole, tmp_path):
    prepare(source, tmp_path, progress=False)
    other = Source("folder:/other", "1", source.items, source.total)
    changed = Source(source.name, "1", source.items, source.total)
    for refused, copy, message in (
        (other, True, "prepared from another source"),
        (changed, True, "prepared from an earlier state of the source"),
        (source, False, "prepared from the same with another copy="),
    ):
        with pytest.raises(UserError, match=f"{message} .*use another folder, or empty it"):
            prepare(refused, tmp_path, copy=copy, progress=False)
    assert contents(tmp_path) == whole
    (tmp_path / "preparing.json").unlink()
    with pytest.raises(UserError, match="shards of an unknown source"):
        prepare(source, tmp_path, progress=False)


def test_a_folder_without_shards_is_free(source, whole, tmp_path):
    """A first attempt that was refused must not be in the way of the one that its message advises."""
    embedded = items_of([9])
    with pytest.raises(UserError, match=r"no files to read in place; leave out copy=no"):
        prepare(embedded, tmp_path, copy=False, progress=False)
    prepare(embedded, tmp_path, progress=False)
    assert len(Shards(tmp_path)) == 1


def test_a_changed_file_is_a_changed_source(tmp_path):
    (tmp_path / "speech").mkdir()
    for k in range(3):
        soundfile.write(tmp_path / "speech" / f"{k}.wav", np.arange(900) / 1_000, RATE)
    prepare(open_source(f"folder:{tmp_path / 'speech'}"), tmp_path / "set", progress=False)
    soundfile.write(tmp_path / "speech" / "1.wav", np.arange(901) / 1_000, RATE)
    with pytest.raises(UserError, match="an earlier state of the source"):
        prepare(open_source(f"folder:{tmp_path / 'speech'}"), tmp_path / "set", progress=False)


# ---- disks


@pytest.mark.parametrize("workers", [0, 1])
def test_a_limit_on_file_sizes(source, whole, tmp_path, workers):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"the disk is full: .* needs about 0\.000\d+ GB in .*goes on where"):
            prepare(source, tmp_path / "set", workers=workers, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    prepare(source, tmp_path / "set", progress=False)
    assert contents(tmp_path / "set") == whole


@pytest.fixture
def small(tmp_path):
    """A folder with a file system of its own, and how to set its size in kilobytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("kilobytes", [8, 60, 150, 230])
def test_a_disk_that_fills(source, whole, small, kilobytes):
    folder, resize = small
    resize(kilobytes)
    with pytest.raises(UserError, match=r"the disk is full: folder:.*make room there and give the command again"):
        prepare(source, folder / "set", progress=False)
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / "set" / "dataset.json").exists()
    resize(9_000)
    prepare(source, folder / "set", progress=False)
    assert contents(folder / "set") == whole


@pytest.mark.parametrize("more", [0, 4, 8, 12, 16])
def test_a_disk_that_fills_while_the_parts_are_joined(source, whole, small, monkeypatch, decodes, more):
    """A mapped index would end the process with SIGBUS."""
    folder, resize = small
    with monkeypatch.context() as patch:
        patch.setattr(module, "finish", lambda *args: None)
        prepare(source, folder / "set", progress=False)
    usage = os.statvfs(folder)
    resize((usage.f_blocks - usage.f_bfree) * usage.f_frsize // 1024 + more)
    decodes.clear()
    with pytest.raises(UserError, match="the disk is full"):
        prepare(source, folder / "set", progress=False)
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / "set" / "dataset.json").exists()
    resize(9_000)
    prepare(source, folder / "set", progress=False)
    assert not decodes
    assert contents(folder / "set") == whole


@pytest.mark.parametrize(("code", "message"), [(errno.EROFS, "Read-only"), (errno.EACCES, "Permission denied")])
def test_a_folder_that_cannot_be_written(source, tmp_path, monkeypatch, code, message):
    def failing(path, *args, **kwargs):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", failing)
    with pytest.raises(UserError, match=f"cannot write .*set: {message}.*; name a folder on a local disk"):
        prepare(source, tmp_path / "set", progress=False)


def test_a_disk_that_warns(source, tmp_path, monkeypatch, caplog):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage._replace(free=1_000))
    prepare(source, tmp_path / "set", progress=False)
    assert "only 1e-06 GB are free" in caplog.text


# ---- prepared sets as sources


def test_a_prepared_set_can_be_prepared_again(source, whole, tmp_path):
    prepare(source, tmp_path / "one", progress=False)
    prepare(open_source(f"shards:{tmp_path / 'one'}"), tmp_path / "two", progress=False)
    one, two = Shards(tmp_path / "one"), Shards(tmp_path / "two")
    assert list(one.entries()) == list(two.entries())
    for name in ("length", "key", "mean", "std"):
        np.testing.assert_array_equal(one.index[name], two.index[name])
    assert b"".join(whole[name] for name in sorted(whole) if "pcm" in name) == b"".join(
        path.read_bytes() for path in sorted((tmp_path / "two").glob("*.pcm"))
    )
    assert two.info["source"].startswith("shards:")
    with pytest.raises(UserError, match="no files to read in place"):
        prepare(open_source(f"shards:{tmp_path / 'one'}"), tmp_path / "three", copy=False, progress=False)


def test_a_prepared_set_whose_samples_went_away_loses_those(source, tmp_path):
    prepare(source, tmp_path / "one", progress=False)
    again = open_source(f"shards:{tmp_path / 'one'}")
    os.truncate(tmp_path / "one" / "shard-00003.pcm", 0)
    prepare(again, tmp_path / "two", progress=False)
    rejected = Shards(tmp_path / "two").rejected
    assert {entry["reason"] for entry in rejected} == {"not readable any more"}
    assert len(rejected) == FILES - 1 - 3 * 64


def test_mixtures_open_all_parts_and_weigh_them(source, tmp_path):
    for name in ("one", "two"):
        prepare(source, tmp_path / name, progress=False)
    parts = [{"folder": "one", "weight": 3.0, "hours": None}, {"folder": "two", "weight": 0.5, "hours": 1e-4}]
    (tmp_path / "mixture.json").write_text(json.dumps({"parts": parts}))

    def opened(options: str):
        return open_records(f"shards:{tmp_path}{options}", min_seconds=0.0, max_bad_share=0.1)

    records = opened("")
    assert [each.part.weight for each in records.parts] == [3.0, 0.5]
    assert np.bincount(records.part)[0] == FILES - 1
    assert records.lengths[records.part == 1].sum() <= 0.36 * RATE
    assert [each.part.weight for each in opened("?weight=4").parts] == [12.0, 2.0]
    with pytest.raises(UserError, match=r"is a mixture of its own: give hours= where its parts are prepared"):
        opened("?hours=1")
    with pytest.raises(UserError, match=r"is a mixture, which can only be trained on; name its parts"):
        open_source(f"shards:{tmp_path}")
    (tmp_path / "mixture.json").write_text('{"parts": [{"folder"')
    with pytest.raises(UserError, match=r"mixture.json cannot be read; give its prepare command again"):
        opened("")


def test_an_unfinished_mixture_says_so(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "finish", lambda *args: None)
    prepare(source, tmp_path / "00-a", progress=False)
    with pytest.raises(UserError, match="not finished: give its prepare command again"):
        open_records(f"shards:{tmp_path}", min_seconds=0.0, max_bad_share=0.1)

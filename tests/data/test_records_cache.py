"""The cache that holds what a source gave: found again, mended, and what a failing disk does to it."""

import errno
import functools
import logging
import os
import resource

import numpy as np
import pytest
from recordings import entries, noise, write

from speechjax.data import shards, sources
from speechjax.data.records import open_records
from speechjax.errors import UserError

# ---- cache


def test_second_opening_decodes_nothing(folder, opened, decodes, tmp_path):
    first = opened(folder)
    assert len(decodes) == 10
    second = opened(folder)
    assert len(decodes) == 10
    assert second.ids == first.ids
    assert [second.meta(i) for i in range(6)] == [first.meta(i) for i in range(6)]
    assert second.rejected == first.rejected
    for k in range(len(first)):
        np.testing.assert_array_equal(second.read(k), first.read(k))
    assert len(entries(tmp_path)) == 1


def test_a_changed_file_is_decoded(folder, opened, decodes, tmp_path):
    opened(folder)
    write(folder / "good0.wav", noise(0.7, seed=77))
    records = opened(folder)
    np.testing.assert_array_equal(records.read(0), noise(0.7, seed=77))
    assert decodes.count("good0.wav") == 2
    assert len(entries(tmp_path)) == 2


def test_cache_place(folder, tmp_path, monkeypatch):
    opener = functools.partial(open_records, f"folder:{folder}", min_seconds=0.1, max_bad_share=0.5)
    monkeypatch.setenv("SPEECHJAX_CACHE", str(tmp_path / "by_env"))
    opener()
    assert (tmp_path / "by_env" / "records").is_dir()
    opener(cache_dir=str(tmp_path / "by_argument"))
    assert (tmp_path / "by_argument" / "records").is_dir()
    monkeypatch.delenv("SPEECHJAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    opener()
    assert (tmp_path / "home" / ".cache" / "speechjax" / "records").is_dir()


DAMAGES = {
    "shard-00000.pcm": lambda path: os.truncate(path, path.stat().st_size - 2),
    "shard-00000.jsonl": lambda path: path.unlink(),
    "index.npy": lambda path: os.truncate(path, 100),
    "dataset.json": lambda path: path.write_text("{"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_entry_is_prepared_again(folder, opened, tmp_path, name, caplog):
    opened(folder)
    (entry,) = entries(tmp_path)
    DAMAGES[name](entry / name)
    with caplog.at_level(logging.WARNING, "speechjax"):
        records = opened(folder)
    assert "it will be prepared again" in caplog.messages[0]
    np.testing.assert_array_equal(records.read(0), noise(0.5))
    assert entries(tmp_path) == [entry]


def test_interrupted_first_use_goes_on(folder, opened, tmp_path, monkeypatch):
    def interrupted(path, *part):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(folder)
    (entry,) = entries(tmp_path)
    assert not (entry / "dataset.json").exists()
    assert len(opened(folder)) == 6


# ---- storage that fails


def test_too_many_open_files_are_not_a_bad_recording(folder, opened, monkeypatch):
    records = opened(folder)
    shards.open_file.cache_clear()

    def failing(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(UserError, match="ulimit -n"):
        records.read(0)


def test_disk_full_for_real(folder, opened, tmp_path):
    """A limit on file sizes, the nearest to a small disk that needs no mount."""
    write(folder / "much.wav", noise(20.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"the disk is full.* needs about .* GB in .*cache/records.*larger disk"):
            opened(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(opened(folder)) == 7


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EROFS, "cannot write .*records")],
)
def test_errors_of_the_cache_disk(folder, opened, tmp_path, monkeypatch, code, message):
    def failing(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match=message):
        opened(folder)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_cache_dir_that_is_a_file(folder, opened, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cannot write .*/cache/records.*: Not a directory"):
        opened(folder)


def test_failing_disk_of_the_source_is_not_a_verdict(folder, opened, tmp_path, monkeypatch):
    """A server that stumbles must not leave half a corpus out for ever."""

    def failing(path, *part):
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(sources, "decode", failing)
    with pytest.raises(UserError, match=r"cannot read bad_cut.wav: .*Input/output error.*disk all right"):
        opened(folder)
    assert not list((tmp_path / "cache").rglob("dataset.json"))

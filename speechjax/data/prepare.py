"""Preparing: a source becomes a set of shards (see `shards`), in parallel, and goes on where it was interrupted.

Which items make which shard depends on the source alone, so the work can be split, repeated and resumed at will.
"""

import collections
import contextlib
import errno
import fcntl
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import soundfile
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from speechjax.data.decode import SAMPLE_RATE, for_soundfile
from speechjax.data.shard_writer import finish, shard_info, write_json, write_shard
from speechjax.data.shards import FORMAT, DamagedError, Shards
from speechjax.data.sources import Item, Source
from speechjax.errors import UserError

log = logging.getLogger("speechjax")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHARD_BYTES = 1 << 30  # of PCM, about
_UNPACKED = {".wav": 1, ".flac": 2, ".aiff": 1, ".aif": 1, ".au": 1}  # bytes of PCM a byte of the file, about
_COMPRESSED = 12


def chunks(source: Source) -> Iterator[tuple[int, list[Item]]]:
    """(number, items) of each shard: about a thirty-second of the source, at most 4,096 items or 1 GiB of samples."""
    most = min(max((source.total or 8_192) // 32, 64), 4_096)
    number, size, items = 0, 0, []
    for item in source.items():
        expected = item.size
        if item.file and item.file[2] is None:  # else it is known how long it is
            expected *= _UNPACKED.get(os.path.splitext(item.file[0])[1].lower(), _COMPRESSED)
        if items and (len(items) == most or size + expected > _SHARD_BYTES):
            yield number, items
            number, size, items = number + 1, 0, []
        items.append(item)
        size += expected
    if items:
        yield number, items


def prepare(source: Source, folder: Path, *, workers: int = 0, copy: bool = True, progress: bool = True) -> None:
    """Makes `folder` a prepared set of `source`, or completes and repairs one.

    `workers` processes decode files (0: threads, for programs that cannot be started twice); `copy=False` stores
    no samples and reads files in place.  Raises `UserError` where the folder is of another source, or a disk fails;
    what is done stays, and the same call goes on from there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            claim(source, folder, copy)
            todo = unfinished(source, folder)
            try:
                shards, written = _work(source, folder, todo, workers, copy, progress)
                if written or not _is_whole(folder):
                    finish(folder, source, shards, copy)
            finally:
                for left in folder.glob("*.tmp"):  # by a worker that was killed, now or in an earlier attempt
                    left.unlink()
    except OSError as error:
        raise explained(error, source, folder) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in a folder; the lock of one that died is free."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is preparing %s; waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def claim(source: Source, folder: Path, copy: bool) -> None:
    """Writes preparing.json, or refuses a folder that holds shards of something else."""
    mine = {"format": FORMAT, "source": source.name, "fingerprint": source.fingerprint, "copy": copy}
    file = folder / "preparing.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        before = {}
    # Not the name: the same folder can be spelt in many ways.
    same = all(before.get(key) == mine[key] for key in ("format", "fingerprint", "copy"))
    if not same and any(folder.glob("shard-*")):
        if not before:
            raise UserError(f"{folder} holds shards of an unknown source; use another folder, or empty it")
        what = "another source" if before.get("source") != source.name else "an earlier state of the source"
        what = what if before.get("copy") == copy else "the same with another copy="
        raise UserError(f"{folder} was prepared from {what} ({before.get('source')}); use another folder, or empty it")
    write_json(file, mine)


def unfinished(source: Source, folder: Path) -> Iterator[tuple[int, list[Item], bool]]:
    for number, items in chunks(source):
        yield number, items, shard_info(folder, number) is None


def _work(
    source: Source, folder: Path, todo: Iterator[tuple[int, list[Item], bool]], workers: int, copy: bool, progress: bool
) -> tuple[int, int]:
    """Writes the missing shards; how many there are, and how many were missing."""
    shards = written = 0
    stop = threading.Event()
    console = Console(stderr=True)
    columns = [TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    shown = progress and console.is_terminal
    pending: collections.deque[tuple[Future[Any], int]] = collections.deque()
    strangers = multiprocessing.active_children()
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar, _pool(workers) as pool:
        task = bar.add_task("preparing", total=source.total)

        def collect(most: int) -> None:
            while len(pending) > most:
                future, items = pending.popleft()
                future.result()
                bar.advance(task, items)

        try:
            for number, items, missing in todo:
                shards += 1
                if not missing:
                    bar.advance(task, len(items))
                    continue
                if not written:
                    _announce(source, folder, copy)
                written += 1
                if not copy and items[0].file is None:
                    raise UserError(f"{source.name} has no files to read in place; leave out copy=no")
                if items[0].file is None:  # its audio comes with the item: nothing to do elsewhere
                    write_shard(folder, number, items, copy)
                    bar.advance(task, len(items))
                elif isinstance(pool, ThreadPoolExecutor):
                    pending.append((pool.submit(write_shard, folder, number, _until(stop, items), copy), len(items)))
                else:
                    with _interrupts_held():  # which the workers that this starts inherit
                        pending.append((pool.submit(write_shard, folder, number, items, copy), len(items)))
                collect(2 * (workers or os.cpu_count() or 1))
            collect(0)
        except BaseException as error:
            stop.set()
            _end([process for process in multiprocessing.active_children() if process not in strangers])
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a worker process was killed, perhaps for lack of memory: give the command again with fewer "
                    "--workers, it goes on where it stopped"
                ) from error
            raise
    return shards, written


def _is_whole(folder: Path) -> bool:
    try:
        Shards(folder)
    except DamagedError:
        return False
    return True


def _until(stop: threading.Event, items: list[Item]) -> Iterator[Item]:
    for item in items:
        if stop.is_set():
            raise InterruptedError("preparation was stopped")
        yield item


def _pool(workers: int) -> Executor:
    if workers:
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _watch_parent)
    return ThreadPoolExecutor(os.cpu_count() or 1)


def _end(workers: list[Any]) -> None:
    for process in workers:
        process.terminate()
    for process in workers:
        process.join()


def _watch_parent() -> None:
    """Ends this worker when the process that started it has died: alone it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A terminal sends Ctrl-C to all processes; the workers leave it to the first, which ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _announce(source: Source, folder: Path, copy: bool) -> None:
    need = expected_bytes(source) if copy else 0
    free = shutil.disk_usage(folder).free
    log.info("preparing %s in %s%s", source.name, folder, f", about {need / 1e9:.2g} GB" if need else "")
    if need > free:
        log.warning("only %.2g GB are free in %s", free / 1e9, folder)


def expected_bytes(source: Source) -> int:
    """How much PCM a source will be, judged by the headers of a few files; 0 where that is not to be had."""
    if not source.total:
        return 0
    seconds, read = 0.0, 0
    for item in itertools.islice(source.items(), 0, None, max(1, source.total // 64)):
        if item.file is None:
            return 0
        path, _, duration = item.file
        try:
            seconds += soundfile.info(for_soundfile(path)).duration if duration is None else duration
            read += 1
        except (soundfile.LibsndfileError, OSError):  # to be rejected
            continue
    return round(2 * SAMPLE_RATE * seconds / max(read, 1) * source.total)


def explained(error: OSError, source: Source, folder: Path) -> UserError:
    """What to tell the user whose disk failed."""
    if error.errno not in DISK_FULL:
        reason = error.strerror or str(error)
        return UserError(f"cannot write {error.filename or folder}: {reason}; name a folder on a local disk")
    done = sum(path.stat().st_size for path in folder.glob("shard-*.pcm"))
    expected = expected_bytes(source)
    need = f"about {expected / 1e9:.2g} GB" if expected else f"more than {done / 1e9:.2g} GB"
    return UserError(
        f"the disk is full: {source.name} needs {need} in {folder}; make room there and give the command again, it "
        "goes on where it stopped, or name a folder on a larger disk"
    )

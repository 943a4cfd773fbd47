"""Preparing on Apache Beam: the shards of `prepare`, byte for byte, made by the workers of an engine.

The launcher lists the source and writes one list of items for each missing shard beside the output; the pipeline
carries numbers only, because engines limit how large its description may be (Dataflow: 10 MB, some 30,000 items).
One element is one shard: a bundle that is retried, or run twice at a time, writes the same bytes once more.

Sources and output may lie where Beam's file systems reach (gs://, s3://, hdfs://).  Then workers fetch a recording
before they decode it, and upload a shard when it is whole.  Beam pins older libraries than TensorFlow, so this runs in
an environment without it: neither TensorFlow nor JAX is imported here, and Beam only inside functions.
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.data.decode import EXTENSIONS, decode
from speechjax.data.manifests import decode_whole, refuse_line
from speechjax.data.prepare import chunks, claim, explained, locked
from speechjax.data.shard_writer import finish, shard_info, write_shard
from speechjax.data.shards import shard_name
from speechjax.data.sources import Item, Source, digest, file_item, is_remote
from speechjax.errors import UserError

log = logging.getLogger("speechjax")

_WORK = ".beam"  # in the output folder while a pipeline runs: lists of items, and shards half written
_REQUESTS = 16  # at a time, to a remote file system
_UNSPLIT = {  # kinds of sources whose recordings are no files that workers could read
    "embedded": "its utterances are synthesised one after another",
    "tfds": "it is read by TensorFlow, which cannot be installed beside Beam",
    "shards": "it is prepared already",
}


def check(source: str, runner: str, options: Sequence[str]) -> None:
    """Raises `UserError` for what is wrong before the source is opened: its kind, the runner, Beam's options."""
    kind = source.partition(":")[0]
    if kind in _UNSPLIT:
        raise UserError(f"{source} cannot be prepared on Beam: {_UNSPLIT[kind]}; leave out --runner")
    _pipeline(runner, options)


def prepare_on_beam(source: Source, folder: str | Path, *, runner: str, options: Sequence[str], copy: bool) -> None:
    """Makes `folder`, a path or a URL, a prepared set of `source`, or completes one, as `prepare` does.

    `runner` is Beam's name of an engine, `options` are flags for it ("--region=...").  Returns when the set is whole.
    Raises `UserError` where the workers cannot share the storage, the folder is of another source, or a storage
    fails; finished shards stay, and the same call goes on from there.
    """
    check(source.name, runner, options)
    place = str(folder) if is_remote(str(folder)) else os.path.abspath(folder)
    if runner.lower() == "dataflowrunner" and not is_remote(place):
        raise UserError(f"the workers of {runner} do not see {place}; name a folder such as gs://BUCKET/DIR")
    try:
        with _small_files(place) as here:
            _claim(source, here, place, copy)
            shards, missing = _hand_out(source, here, place, copy)
            log.info("preparing %s in %s on %s: %d of %d shards", source.name, place, runner, len(missing), shards)
            if missing:
                _run(_pipeline(runner, options), place, missing, copy)
                if is_remote(place):
                    _reflect(place, here)
                lost = sum(shard_info(here, number) is None for number in missing)
                if lost:
                    raise UserError(f"{runner} ended without {lost} of {len(missing)} shards; give the command again")
            finish(here, source, shards, copy)
            if is_remote(place):
                for name in ("rejected.jsonl", "index.npy", "dataset.json"):
                    upload(here / name, f"{place}/{name}")
            _clear(place)
    except OSError as error:
        if is_remote(place):
            raise UserError(f"cannot use {place}: {' '.join(str(error).split())}") from error
        raise explained(error, source, Path(place)) from error


# ---- launcher


def _pipeline(runner: str, options: Sequence[str]) -> Any:
    """An empty pipeline; from here on Beam's file systems know the options, too."""
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--runner={runner} needs Apache Beam: install apache-beam in an environment of its own, without "
            "TensorFlow, or leave out --runner"
        ) from error
    try:
        parsed = PipelineOptions([f"--runner={runner}", *options])
        parsed.get_all_options()  # else a malformed one is found when the pipeline runs
        return beam.Pipeline(options=parsed)
    except ValueError as error:
        raise UserError(f"--runner={runner}: {' '.join(str(error).split())}") from error
    except SystemExit as error:  # argparse has explained itself
        raise UserError(f"--runner={runner} refuses {' '.join(options)}; the line above says which option") from error


@contextlib.contextmanager
def _small_files(place: str) -> Iterator[Path]:
    """Where the launcher looks: the local folder itself, locked, or an image of the remote one."""
    if is_remote(place):
        _make_folder(place)
        with tempfile.TemporaryDirectory() as scratch:
            _reflect(place, Path(scratch))
            yield Path(scratch)
    else:
        Path(place).mkdir(parents=True, exist_ok=True)
        with locked(Path(place)):
            yield Path(place)


def _reflect(place: str, here: Path) -> None:
    """Makes `here` look like the remote folder: small files are fetched, of the others only the size is real."""

    def fetch(path: str, size: int) -> None:
        local = here / posixpath.basename(path)
        if local.suffix in (".json", ".npy"):
            _download(path, local)
        else:
            with open(local, "wb") as file:
                file.truncate(size)

    found = [entry for pattern in ("shard-*", "preparing.json") for entry in _listed(f"{place}/{pattern}")]
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(lambda entry: fetch(entry[0], entry[1]), found))


def _claim(source: Source, here: Path, place: str, copy: bool) -> None:
    try:
        claim(source, here, copy)
    except UserError as error:
        raise UserError(str(error).replace(str(here), place)) from error
    if is_remote(place):
        upload(here / "preparing.json", f"{place}/preparing.json")


def _hand_out(source: Source, here: Path, place: str, copy: bool) -> tuple[int, list[int]]:
    """How many shards the source has, and which are missing; their items are written for the workers."""
    shards, missing = 0, []
    _clear(place)
    os.makedirs(here / _WORK, exist_ok=True)
    for number, items in chunks(source):
        shards += 1
        if shard_info(here, number) is not None:
            continue
        paths = [item.file[0] for item in items if item.file]
        if not copy and any(map(is_remote, paths)):
            raise UserError(f"{source.name} is not on this machine, so it cannot be read in place; leave out copy=no")
        # A file that the launcher sees: a worker that does not see it must not call every recording missing.
        witness = next((path for path in paths if not is_remote(path) and os.path.exists(path)), None)
        todo = here / _WORK / f"{number:05d}"
        todo.write_text(json.dumps({"witness": witness, "items": [_to_json(item) for item in items]}))
        if is_remote(place):
            upload(todo, f"{place}/{_WORK}/{number:05d}")
            todo.unlink()
        missing.append(number)
    return shards, missing


def _clear(place: str) -> None:
    """Removes what an earlier pipeline, or this one, left behind."""
    work = f"{place}/{_WORK}"
    if not is_remote(place):
        shutil.rmtree(work, ignore_errors=True)
        return
    from apache_beam.io.filesystems import FileSystems  # pyright: ignore[reportMissingImports]

    if not FileSystems.get_filesystem(work).has_dirs():
        FileSystems.delete([path for path, *_ in _listed(f"{work}/*")])
    elif FileSystems.exists(work):
        FileSystems.delete([work])


def add_steps(pipeline: Any, folder: str, numbers: Sequence[int], copy: bool) -> None:
    """The pipeline: every number is a shard to be made from its list in `folder`."""
    import apache_beam as beam  # pyright: ignore[reportMissingImports]

    # Without the reshuffle an engine fuses the steps, and one worker makes all shards.
    spread = pipeline | "missing shards" >> beam.Create(numbers) | "spread" >> beam.Reshuffle()
    _ = spread | "write shards" >> beam.Map(write, folder, copy)


def _run(pipeline: Any, folder: str, numbers: Sequence[int], copy: bool) -> None:
    add_steps(pipeline, folder, numbers, copy)
    job = None
    try:
        job = pipeline.run()
        job.wait_until_finish()
    except KeyboardInterrupt:
        if job is not None:  # else a cluster would go on without us
            job.cancel()
        raise
    except (RuntimeError, UserError) as error:  # what engines raise, and what the one in this process passes on
        raise UserError(f"{_reason(error)}; finished shards stay, and the same command goes on from there") from error


def _reason(error: Exception) -> str:
    """One line: a worker's `UserError` out of what an engine reports, or the end of that, often a traceback."""
    _, found, message = str(error).rpartition("UserError: ")
    line = message.splitlines()[0] if found or isinstance(error, UserError) else message.strip().rpartition("\n")[2]
    return line.partition(" [while running")[0]


# ---- workers


def write(number: int, folder: str, copy: bool) -> None:
    """Makes one shard of `folder` from the list of items that the launcher left there."""
    from apache_beam.metrics import Metrics  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        todo = Path(scratch) / "items"
        _download(f"{folder}/{_WORK}/{number:05d}", todo)
        if not todo.exists():
            raise UserError(f"a worker finds no list of items in {folder}: name a folder that all workers share")
        work = json.loads(todo.read_text())
    witness, items = work["witness"], [_from_json(item) for item in work["items"]]
    if witness and not os.path.exists(witness):
        raise UserError(f"a worker does not see {witness}: the source must lie on storage that all workers share")
    # Beside its place, so that moving it there is one step; in a folder of its own, because an engine may let two
    # workers make the same shard and keep the first.
    beside = None if is_remote(folder) else f"{folder}/{_WORK}"
    with tempfile.TemporaryDirectory(dir=beside, ignore_cleanup_errors=True) as scratch:
        info = write_shard(Path(scratch), number, _at_hand(items, Path(scratch)), copy)
        for name in (*info["files"], f"{shard_name(number)}.json"):
            if is_remote(folder):
                upload(Path(scratch) / name, f"{folder}/{name}")
            else:
                os.replace(Path(scratch) / name, f"{folder}/{name}")
    counts = {"recordings": info["recordings"], "samples": info["samples"], "rejected": len(info["rejected"])}
    for name, count in counts.items():
        Metrics.counter("prepare", name).inc(count)


def _to_json(item: Item) -> dict[str, Any]:
    """A list of items is JSON, not a pickle: it lies where others may write, and reading it must not run code."""
    assert isinstance(item.read, functools.partial)
    read = [item.read.func.__name__, *item.read.args]
    return {"id": item.id, "read": read, "meta": item.meta, "size": item.size, "file": item.file}


def _from_json(stored: dict[str, Any]) -> Item:
    name, *arguments = stored["read"]
    read = {f.__name__: f for f in (decode, decode_whole, refuse_line, _read_anywhere)}[name]
    path, offset, duration = stored["file"]
    return Item(
        stored["id"], functools.partial(read, *arguments), stored["meta"], stored["size"], (path, offset, duration)
    )


def _at_hand(items: Iterable[Item], scratch: Path) -> Iterator[Item]:
    """The items, with a local copy of each remote file while its item, or a run of items in it, is in use."""
    fetched, local = "", Path()
    for item in items:
        if item.file is None or not is_remote(item.file[0]):
            yield item
            continue
        path = item.file[0]
        if path != fetched:
            if fetched:
                local.unlink(missing_ok=True)
            fetched, local = path, scratch / f"source{posixpath.splitext(path)[1]}"
            _download(path, local)
        # What reads a file has its path as first argument, see `file_item`.
        assert isinstance(item.read, functools.partial)
        assert item.read.args[0] == path
        read = functools.partial(item.read.func, str(local), *item.read.args[1:])
        yield replace(item, read=read, file=(str(local), *item.file[1:]))


# ---- remote storage


def remote_folder(source: str, rest: str) -> Source:
    """`folder:` for a folder that one of Beam's file systems lists.

    Its items can be read without a pipeline too, by fetching each.  Raises `UserError` where nothing can be listed.
    """
    root = rest.rstrip("/") + "/"
    try:
        files = {path[len(root) :]: (size, updated) for path, size, updated in _listed(f"{root}**")}
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"data source {source!r}: cannot list {root}: {' '.join(str(error).split())}") from error
    visible = {name: status for name, status in files.items() if not f"/{name}".count("/.")}
    ids = sorted(name for name in visible if posixpath.splitext(name)[1].lower() in EXTENSIONS)
    if not ids:
        raise UserError(f"data source {source!r}: no audio files in {root}")

    def items() -> Iterator[Item]:
        for name in ids:
            item = file_item(name, root + name, {}, visible[name][0])
            yield replace(item, read=functools.partial(_read_anywhere, root + name))

    identities = (f"{name} {visible[name]}" for name in ids)
    return Source(source, digest(["folder", root, *identities]), items, len(ids), len(visible) - len(ids))


def _read_anywhere(path: str) -> np.ndarray:
    if not is_remote(path):
        return decode(path)
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / posixpath.basename(path)
        _download(path, local)
        return decode(local)


def _make_folder(path: str) -> None:
    """Where a file system has folders, one that does not exist cannot be listed."""
    from apache_beam.io.filesystems import FileSystems  # pyright: ignore[reportMissingImports]

    try:
        system = FileSystems.get_filesystem(path)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error
    if system.has_dirs() and not FileSystems.exists(path):
        FileSystems.mkdirs(path)


def _listed(pattern: str) -> list[tuple[str, int, float]]:
    """(path, bytes, time of the last change) of the files that match; ** is any depth."""
    from apache_beam.io.filesystems import FileSystems  # pyright: ignore[reportMissingImports]

    found = FileSystems.match([pattern])[0].metadata_list
    return [(entry.path, entry.size_in_bytes, entry.last_updated_in_seconds or 0) for entry in found]


def _download(path: str, local: Path) -> None:
    """Copies a file here; one that does not exist is not here either afterwards.  Raises `UserError`."""
    from apache_beam.io.filesystem import CompressionTypes  # pyright: ignore[reportMissingImports]
    from apache_beam.io.filesystems import FileSystems  # pyright: ignore[reportMissingImports]

    try:
        with (
            FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as remote,
            open(local, "wb") as file,
        ):
            shutil.copyfileobj(remote, file, 1 << 20)
    except Exception as error:  # each file system has its own for a missing file
        local.unlink(missing_ok=True)
        if FileSystems.exists(path):
            raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def upload(local: Path, path: str) -> None:
    """Copies a file to a URL of one of Beam's file systems."""
    from apache_beam.io.filesystem import CompressionTypes  # pyright: ignore[reportMissingImports]
    from apache_beam.io.filesystems import FileSystems  # pyright: ignore[reportMissingImports]

    with (
        open(local, "rb") as file,
        FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED) as remote,
    ):
        shutil.copyfileobj(file, remote, 1 << 20)

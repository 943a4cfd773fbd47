"""How much CPU an hour of audio costs, from the disk to a batch: every reader of `bench_readers`, in turns.

CPU seconds rather than wall time, because they hardly depend on what else the machine is doing.  Files are in the page
cache: what a disk can deliver is not measured.
"""

import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from speechjax import machine
from speechjax.data.bench_readers import (
    Corpus,
    Read,
    Reader,
    bare_readers,
    make_corpus,
    other_readers,
    our_readers,
    preparations,
)
from speechjax.data.decode import SAMPLE_RATE

_LIBRARIES = ("numpy", "soundfile", "tensorflow-cpu", "tensorflow-datasets", "torch", "lhotse")


def measure(
    *, source: str, hours: float, batch_seconds: float, repeats: int, passes: int, keep: str | None = None
) -> dict[str, Any]:
    """Every reader `repeats` times, in turns, over the first `hours` of `source`, `passes` times each.

    Returns what `write` writes: "readers", each {name, kind, audio_hours, cpu_seconds and wall_seconds of every repeat,
    hours_a_core_minute {median, least, most}, useful_frames, shapes, ratio}, where `ratio` is to the bare reader of the
    same kind; the last three of our own readers also by themselves as {name (kind): ...}; "machine", "versions",
    "skipped".  The files lie in `keep`, and are made there if need be, or in a folder that is removed.

    Raises `UserError` where the source cannot be opened or `keep` holds something else.
    """
    load = machine.load()
    with _folder(keep) as folder:
        make_corpus(source, hours, folder)
        corpus = Corpus(folder, batch_seconds, passes)
        others, skipped = other_readers(corpus)
        ours = our_readers(corpus)
        readers = [*bare_readers(corpus), *ours, *others, *preparations(corpus)]
        measured = _in_turns(readers, repeats)
    rows = [_row(reader, *found) for reader, found in zip(readers, measured, strict=True)]
    bare = {row["kind"]: row for row in rows if row["name"].startswith("bare")}
    for row in rows:
        reference = bare.get(row["kind"], row)
        row["ratio"] = row["hours_a_core_minute"]["median"] / reference["hours_a_core_minute"]["median"]
    named = {f"{row['name']} ({row['kind']})": row for row in rows if row["shapes"] is not None}
    return {
        "what": "input",
        "source": source,
        **{key: {name: row[key] for name, row in named.items()} for key in ("ratio", "useful_frames", "shapes")},
        "readers": rows,
        "batch_seconds": batch_seconds,
        "repeats": repeats,
        "passes": passes,
        "skipped": skipped,
        "machine": machine.describe() | {"load_before": load, "load_after": machine.load()},
        "versions": machine.versions(_LIBRARIES),
    }


@contextlib.contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="speechjax-bench-") as folder:
            yield Path(folder)
    else:
        folder = Path(keep).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _in_turns(readers: list[Reader], repeats: int) -> list[tuple[Read, list[float], list[float]]]:
    """(what it has read, CPU seconds, wall seconds [repeats]) of every reader, after a round that does not count."""
    console = Console(stderr=True)
    columns = [TextColumn("measuring {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn()]  # fmt: skip
    found: list[tuple[Read, list[float], list[float]]] = [(Read(0, 0), [], []) for _ in readers]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=(repeats + 1) * len(readers))
        for repeat in range(repeats + 1):
            for k, reader in enumerate(readers):
                bar.update(task, description=f"{reader.name} ({reader.kind})")
                read, cpu, wall = _timed(reader.read)
                bar.advance(task)
                if repeat:
                    found[k][1].append(cpu)
                    found[k][2].append(wall)
                    found[k] = (read, *found[k][1:])
    return found


def _timed(read: Callable[[], Read]) -> tuple[Read, float, float]:
    """What was read, and its CPU and wall seconds; the CPU time of worker processes that have ended counts.

    Threads that read ahead have done so before, and do so again before the CPU time is taken: as many batches are
    paid for as were read.
    """
    began, cpu = time.perf_counter(), _cpu()
    found = read()
    wall = time.perf_counter() - began
    _settle()
    return found, _cpu() - cpu, wall


def _settle(quiet: float = 0.02) -> None:
    """Waits until this process's other threads have nothing to do."""
    busy = True
    while busy:
        before = time.process_time()
        time.sleep(quiet)
        busy = time.process_time() - before > 0.05 * quiet


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _row(reader: Reader, read: Read, cpu: list[float], wall: list[float]) -> dict[str, Any]:
    hours = read.samples / SAMPLE_RATE / 3600
    rates = [hours / (seconds / 60) for seconds in cpu]
    return {
        "name": reader.name,
        "kind": reader.kind,
        "audio_hours": hours,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "cpu_seconds_an_hour": float(np.median(cpu)) / hours,
        "wall_seconds_an_hour": float(np.median(wall)) / hours,
        "hours_a_core_minute": {"median": float(np.median(rates)), "least": min(rates), "most": max(rates)},
        "useful_frames": read.samples / read.room,
        "shapes": reader.shapes,
    }


def show(result: dict[str, Any]) -> None:
    """The measurement as a table on standard output."""
    there = result["machine"]
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"input from {result['source']}, files in the page cache")
    for name in ("reader", "kind"):
        table.add_column(name, no_wrap=True)
    for name in ("audio-h/core-min", "least-most", "CPU s/audio-h", "wall", "of bare", "useful"):
        table.add_column(name, justify="right")
    for row in result["readers"]:
        rate = row["hours_a_core_minute"]
        table.add_row(
            row["name"], row["kind"], f"{rate['median']:,.0f}", f"{rate['least']:,.0f}-{rate['most']:,.0f}",
            f"{row['cpu_seconds_an_hour']:.3f}", f"{row['wall_seconds_an_hour']:.3f}",
            "" if row["kind"] == "prepare" else f"{row['ratio']:.2f}", f"{100 * row['useful_frames']:.1f} %",
        )  # fmt: skip
    console.print(table)
    before, after = there["load_before"][0], there["load_after"][0]
    print(f"{there['processor']}, {there['threads']} threads, load {before:.1f} before and {after:.1f} after; "
          f"medians of {result['repeats']}")  # fmt: skip
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    for name, shapes in result["shapes"].items():
        print(f"shapes, {name}: {', '.join(f'{rows} x {samples}' for rows, samples in shapes)}")
    for reason in result["skipped"]:
        print(f"skipped {reason}")


def write(result: dict[str, Any], file: Path) -> None:
    """The measurement as JSON."""
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

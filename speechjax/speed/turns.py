"""Timing of several programs in turns, so that whatever else the machine does slows all of them alike."""

import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from speechjax.errors import UserError

log = logging.getLogger("speechjax")

Run = Callable[[int], Any]  # does so many steps, returns once they are done; CPU seconds where another process did them
LEAST_SECONDS = 0.25  # of a sample: of shorter steps one sample has several
REST_SECONDS = 0.25  # between samples: threads that wait for work spin for a while before they sleep


@dataclass(frozen=True)
class Contestant:
    """`open` builds and compiles what is measured; it and what it returns may fail, then `close` frees its memory."""

    name: str
    open: Callable[[], Run]
    close: Callable[[], Any] = gc.collect


@dataclass
class Timing:
    """Seconds a step, one number a round: `wall`, and `cpu` of all threads of the process.

    `first` are the seconds of the first step, with all that is compiled or allocated then; `steps` is how many a sample
    has.  `error` says in one line why it has no more rounds.
    """

    name: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    first: float = math.nan
    steps: int = 1
    error: str = ""

    @property
    def median(self) -> float:
        return float(np.median(self.wall)) if self.wall else math.nan


def take_turns(contestants: Sequence[Contestant], repeats: int) -> list[Timing]:
    """Every contestant `repeats` times, in turns, every other round in reverse order, after two that do not count.

    Who fails is out, and the others go on.
    """
    timings = [Timing(contestant.name) for contestant in contestants]
    runs: list[Run | None] = []
    with _progress() as bar:
        task = bar.add_task("", total=(repeats + 2) * len(contestants))
        for contestant, timing in zip(contestants, timings, strict=True):
            bar.update(task, description=f"preparing {timing.name}")
            runs.append(_guarded(contestant, timing, lambda c=contestant, t=timing: _ready(c, t)))
            bar.advance(task, 2)
        for number in range(repeats):
            order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
            for k in order:
                bar.update(task, description=f"measuring {timings[k].name}")
                if run := runs[k]:
                    runs[k] = _guarded(contestants[k], timings[k], lambda run=run, k=k: _sample(run, timings[k]))
                bar.advance(task)
    return timings


def _ready(contestant: Contestant, timing: Timing) -> Run:
    """Opened, warm, and with the number of steps that a sample needs."""
    run = contestant.open()
    timing.first, _ = _seconds(run, 1)
    again, _ = _seconds(run, 1)
    timing.steps = max(1, math.ceil(LEAST_SECONDS / max(again, 1e-6)))
    return run


def _sample(run: Run, timing: Timing) -> Run:
    time.sleep(REST_SECONDS)
    wall, cpu = _seconds(run, timing.steps)
    timing.wall.append(wall / timing.steps)
    timing.cpu.append(cpu / timing.steps)
    return run


def _seconds(run: Run, steps: int) -> tuple[float, float]:
    """(of the clock, of the CPU)."""
    began, cpu = time.perf_counter(), time.process_time()
    spent = run(steps)
    wall = time.perf_counter() - began
    return wall, spent if isinstance(spent, float) else time.process_time() - cpu


def _guarded(contestant: Contestant, timing: Timing, action: Callable[[], Run]) -> Run | None:
    """What `action` returns, None where it fails, which is said at once; a user's mistake stays one."""
    try:
        return action()
    except UserError:
        raise
    except Exception as error:  # out of memory, no compiler, an operation that the device lacks: of any library
        lines = str(error).strip().splitlines() or [""]
        timing.error = f"{type(error).__name__}: {lines[0][:300]}"
        log.error("%s failed: %s", timing.name, timing.error)
    contestant.close()  # only here: until its block ends, the exception holds what failed
    return None


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn()]  # fmt: skip
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, least and most."""
    low, middle, high = (float(x) for x in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "quartiles": [low, high], "least": float(min(values)), "most": float(max(values))}


def speedup(ours: Timing, theirs: Timing) -> dict[str, Any] | None:
    """How many times faster `ours` is, from the ratios of samples of one round; None without a common round.

    `cpu_speedup` is the same of CPU seconds, which a busy machine changes less, and in which waiting costs nothing.
    """
    pairs = [their / our for our, their in zip(ours.wall, theirs.wall, strict=False)]
    if not pairs:
        return None
    found = spread(pairs)
    cpu = [their / our for our, their in zip(ours.cpu, theirs.cpu, strict=False) if our]
    return {
        "cpu_speedup": float(np.median(cpu)) if cpu else None,
        "speedup": found["median"], "ratio": 1 / found["median"], "spread": found["quartiles"],
        "least": found["least"], "most": found["most"], "repeats": len(pairs), "pairs": pairs,
    }  # fmt: skip

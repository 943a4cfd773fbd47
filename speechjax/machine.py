"""What a measurement was made on."""

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any


def describe() -> dict[str, Any]:
    """The processor, how many of its threads this process may use, and the version of Python."""
    return {"processor": _processor(), "threads": threads(), "python": platform.python_version()}


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> list[float]:
    """How many programs wanted a processor over the last 1, 5 and 15 minutes."""
    return list(os.getloadavg())


def memory() -> int:
    """The most bytes that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of those of the libraries that are installed."""
    found = {}
    for name in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""The progress bar of a long job on a terminal; silent elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Counts `total` steps of `name`, the first `done` of which were made before."""

    def __init__(self, name: str, total: int, done: int = 0):
        console = Console(stderr=True)
        columns = [TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[note]}")]  # fmt: skip
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(name, total=total, completed=done, note="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=steps, note=note)

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

"""What a run says: metrics.jsonl, TensorBoard events, pictures with sound, the console.

Shapes: H height, W width, S samples.
"""

import io
import json
import math
import os
import re
import socket
import sys
import time
import wave
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from speechjax.display import progress_line
from speechjax.errors import UserError

PICTURES_KEPT = 4  # newest pictures (and sounds) of each name left in report/; TensorBoard keeps all
PICTURE_FILE = re.compile(r"(?P<name>.+)_(?P<step>\d+)\.(?:png|wav)")
EVENTS_FLUSH_SECONDS = 10.0  # RecordWriter.flush is an fsync, too slow for every call on a network file system


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that readers, and a crash, see the old content or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None  # torn by a crash in the middle of a write
    whole = isinstance(entry, dict) and {"step", "split"} <= entry.keys() and isinstance(entry["step"], int)
    return entry if whole else None


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The entries of workdir/metrics.jsonl in order; empty where there is none; torn lines are left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    return [entry for line in path.read_bytes().splitlines() if (entry := _parse(line)) is not None]


def _trim(workdir: Path, start_step: int) -> None:
    """Remove what a run resumed at `start_step` will log again.  At 0 nothing was restored: all of it."""

    def stays(step: int) -> bool:
        return 0 < start_step and step <= start_step

    path = workdir / "metrics.jsonl"
    if path.exists():
        old = path.read_bytes()
        lines = [line for line in old.splitlines() if (entry := _parse(line)) and stays(entry["step"])]
        new = b"".join(line + b"\n" for line in lines)
        if new != old:
            replace_file(path, new)
    for picture in (workdir / "report").iterdir():
        match = PICTURE_FILE.fullmatch(picture.name)
        if match and not stays(int(match["step"])):
            picture.unlink()


class _Events:
    """A TensorBoard event file, written synchronously.

    tensorboardX's SummaryWriter hands events to a thread through a queue of ten: on a full disk the thread dies,
    and the eleventh event blocks the training loop for ever; and its flush() leaves the queue where it is, so
    that os._exit loses it.  Its RecordWriter, used here, raises OSError where we can say so.
    """

    def __init__(self, directory: Path, purge_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a run's files in the order of their names, and purges by reading order.
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(str(directory / name))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=purge_step, session_log=start))
        self._records.flush()
        self._flushed = time.monotonic()

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def add(self, step: int, values: list[Any]) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed > EVENTS_FLUSH_SECONDS:
            self._records.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._records.close()


def _wav(samples: np.ndarray, sample_rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(sample_rate)
        wav.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def _png(image: np.ndarray) -> bytes:
    from matplotlib.image import imsave  # late: 0.3 s that runs without pictures need not wait

    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return buffer.getvalue()


class Logs:
    """metrics.jsonl, TensorBoard events, report/ files and console of one workdir; only one process is `enabled`.

    A run resumed at `start_step` begins by removing what it will log again: later entries of metrics.jsonl (the
    kept ones stay byte for byte), later pictures, and, by a purge event, TensorBoard's later points.  At
    `start_step` 0 nothing was restored and everything older goes.

    Raises UserError where the workdir cannot be written (disk full, quota, permissions).
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        start_step: int,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.workdir = Path(workdir)
        self.total_steps = total_steps
        self.enabled = enabled
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=20)  # (time, step) of recent progress, for the ETA
        self._live: tuple[Progress, TaskID] | None = None
        self._alarms: set[str] = set()
        if not enabled:
            return
        if console is None:  # a log file has no width; 80 columns would fold the tables
            console = Console() if sys.stdout.isatty() else Console(width=160)
        self._console = console
        with self._writing():
            (self.workdir / "report").mkdir(parents=True, exist_ok=True)
            _trim(self.workdir, start_step)
            # Unbuffered: a line is on disk, or has failed, when write() returns.
            self._metrics = open(self.workdir / "metrics.jsonl", "ab", buffering=0)
            self._events = _Events(self.workdir / "tensorboard", purge_step=start_step + 1 if start_step else 0)
        for entry in read_metrics(self.workdir):
            if entry["split"] == "alarm":
                (self._alarms.discard if entry["message"] is None else self._alarms.add)(entry["name"])

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write to the workdir {self.workdir}: {error.strerror or error}; "
                "make room or give write permission there, or choose another --workdir"
            ) from error

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        if self._metrics.write(line) != len(line):
            raise OSError("the disk is full")  # a short write to a plain file has no other cause

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """One line `{"step": ..., "split": ..., name: value, ...}`, on disk on return, and TensorBoard `split/name`.

        NaN and infinities are null in the JSON, which has no word for them, and themselves in TensorBoard.
        """
        if not self.enabled:
            return
        if reserved := {"step", "split"} & metrics.keys():
            raise ValueError(f"metrics may not be called {sorted(reserved)}: each entry has its own")
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._writing():
            self._append({"step": int(step), "split": split, **finite})
            summary = [Summary.Value(tag=f"{split}/{name}", simple_value=value) for name, value in values.items()]
            self._events.add(step, summary)

    def _save(self, step: int, name: str, suffix: str, content: bytes) -> None:
        stem = re.sub(r"[^\w.]+", "-", name)
        replace_file(self.workdir / "report" / f"{stem}_{int(step)}{suffix}", content)
        files = {}
        for path in (self.workdir / "report").glob(f"*{suffix}"):
            match = PICTURE_FILE.fullmatch(path.name)
            if match and match["name"] == stem:
                files[int(match["step"])] = path
        for old in sorted(files)[:-PICTURES_KEPT]:
            files[old].unlink()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 [H, W, 3] picture: to TensorBoard, and as report/<name>_<step>.png (newest 4 kept)."""
        if not self.enabled:
            return
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"a picture is uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        png = _png(image)
        height, width, _ = image.shape
        encoded = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        with self._writing():
            self._save(step, name, ".png", png)
            self._events.add(step, [Summary.Value(tag=name, image=encoded)])

    def audio(self, step: int, name: str, samples: np.ndarray, sample_rate: int) -> None:
        """Mono int16 [S] sound: to TensorBoard, and as report/<name>_<step>.wav beside the picture of that name."""
        if not self.enabled:
            return
        if samples.dtype != np.int16 or samples.ndim != 1:
            raise ValueError(f"audio is int16 [S], not {samples.dtype} {list(samples.shape)}")
        wav = _wav(samples, sample_rate)
        encoded = Summary.Audio(
            sample_rate=sample_rate,
            num_channels=1,
            length_frames=len(samples),
            encoded_audio_string=wav,
            content_type="audio/wav",
        )
        with self._writing():
            self._save(step, name, ".wav", wav)
            self._events.add(step, [Summary.Value(tag=name, audio=encoded)])

    def eta(self, step: int) -> str:
        """Time left at the pace of the last calls of `progress`, pauses for evaluation included; `-` at the first."""
        if not self._marks or step <= self._marks[0][1]:
            return "-"
        then, from_step = self._marks[0]
        seconds = (self._clock() - then) / (step - from_step) * max(self.total_steps - step, 0)
        return str(timedelta(seconds=round(seconds)))

    def progress(self, step: int, fields: Mapping[str, float]) -> None:
        """How far the run is: a live bar on a terminal, else a line `step 400/7200 | loss ... | eta 0:43:10`."""
        if not self.enabled:
            return
        line = f"{progress_line(fields)} | eta {self.eta(step)}" if fields else f"eta {self.eta(step)}"
        self._marks.append((self._clock(), step))
        if not self._console.is_terminal:
            self._say(f"step {step}/{self.total_steps} | {line}")
            return
        if self._live is None:
            count = TextColumn("step {task.completed:.0f}/{task.total:.0f}")
            text = TextColumn("{task.fields[line]}", markup=False)
            live = Progress(count, BarColumn(bar_width=24), text, console=self._console, auto_refresh=False)
            live.start()
            self._live = live, live.add_task("", total=self.total_steps, line=line)
        live, task = self._live
        live.update(task, completed=step, line=line, refresh=True)

    def _say(self, text: str, style: str | None = None) -> None:
        # soft_wrap: a line in a log file stays one line.
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table on the console and, unless the same one is there already, at the end of report/tables.txt."""
        if not self.enabled:
            return
        table = Table(title=Text(title, style="bold"), title_justify="left")
        for index, column in enumerate(columns):
            numeric = all(isinstance(row[index], (int, float, np.number)) for row in rows)
            table.add_column(Text(column), justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(Text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
        self._console.print(table)
        plain = Console(file=io.StringIO(), width=200, color_system=None, force_terminal=False)
        with plain.capture() as capture:
            plain.print(table)
        text = "".join(line.rstrip() + "\n" for line in capture.get().splitlines()) + "\n"
        path = self.workdir / "report" / "tables.txt"
        with self._writing():
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            if text not in before:
                replace_file(path, (before + text).encode())

    def alarm(self, step: int, name: str, message: str) -> None:
        """Say once, on the console and in metrics.jsonl, that something looks wrong; again only after `clear`."""
        if not self.enabled or name in self._alarms:
            return
        self._alarms.add(name)
        self._say(f"ALARM step {step} {name}: {message}", style="bold red")
        with self._writing():
            self._append({"step": int(step), "split": "alarm", "name": name, "message": message})

    def clear(self, step: int, name: str) -> None:
        """The alarm `name` no longer holds: an entry with message null; nothing where it was not raised."""
        if name not in self._alarms:
            return
        self._alarms.remove(name)
        self._say(f"step {step} {name}: alarm cleared", style="green")
        with self._writing():
            self._append({"step": int(step), "split": "alarm", "name": name, "message": None})

    def alarms(self, step: int, current: Mapping[str, str]) -> None:
        """Raise every alarm of `current`, {name: message}, and clear those that no longer hold."""
        for name in self._alarms - current.keys():
            self.clear(step, name)
        for name, message in current.items():
            self.alarm(step, name, message)

    def save_json(self, name: str, content: Any) -> None:
        """report/<name>.json, for the report page."""
        if self.enabled:
            with self._writing():
                replace_file(self.workdir / "report" / f"{name}.json", json.dumps(content, indent=1).encode())

    def close(self) -> None:
        """Finish the bar and the files; a second call does nothing."""
        if self._live is not None:
            self._live[0].stop()
            self._live = None
        if self.enabled:
            self.enabled = False
            with self._writing():
                self._metrics.close()
                self._events.close()

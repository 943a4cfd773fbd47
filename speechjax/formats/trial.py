"""What an export answers beside the run it comes from, and how long either takes.

Shapes: B batch, S samples.
"""

import dataclasses
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speechjax.formats.serving import SAMPLE_RATE, Loaded, serve

CLOSE = 1e-3  # of float32, relative to the largest value: another order of sums, through many layers
SECONDS = (1.0, 3.3)  # of audio; rows of the second batch size are not equally long
ROWS = (1, 3)
REPEATS = 5


class MissingLibraryError(Exception):
    """What an export is for is not installed here."""


@dataclasses.dataclass(frozen=True)
class Result:
    """`differences` {name of an answer: (largest absolute difference, largest value)} over all shapes.

    `seconds` of one row of the longer audio, median: (the run, the export); `rounds` are all of them.
    """

    differences: dict[str, tuple[float, float]]
    seconds: tuple[float, float]
    rounds: list[tuple[float, float]]

    @property
    def worst(self) -> float:
        """The largest difference, relative to the largest value of its answer."""
        return float(np.max([off / max(size, 1e-30) for off, size in self.differences.values()]))  # NaN stays NaN


def loader(kind: str) -> Callable[[Path], Loaded]:
    """What loads a format; raises MissingLibraryError where that cannot be done here."""
    needs = {"hf": ("torch", "transformers"), "onnx": ("onnxruntime",), "saved_model": ("tensorflow",),
             "litert": ("ai_edge_litert",)}  # fmt: skip
    for library in needs.get(kind, ()):
        try:
            importlib.import_module(library)
        except ImportError:
            raise MissingLibraryError(f"{library} is not installed here") from None
    if kind == "safetensors":
        return _weights
    module: Any = importlib.import_module(f"speechjax.formats.{'hf_runtime' if kind == 'hf' else kind}")
    return module.load


def _weights(folder: Path) -> Loaded:
    """Of a format that is no program."""
    from speechjax.formats import flat

    found = flat.read(folder)
    # Once, not at every call.
    variables = jax.device_put({"params": found.params, **found.extra}, jax.devices()[0])
    return _answers(found.task, variables, encoder_only=False)


def compare(run: Any, theirs: Loaded, *, encoder_only: bool = False) -> Result:
    """`theirs` beside `run` on noise of `SECONDS` and `ROWS`, then both in turn `REPEATS` times on one row."""
    ours = answers(run, encoder_only=encoder_only)
    found: dict[str, tuple[float, float]] = {}
    for rows, seconds in [(rows, seconds) for rows in ROWS for seconds in SECONDS]:
        audio, lengths = noise(rows, seconds)
        mine, other = ours(audio, lengths), theirs(audio, lengths)
        for name in sorted(mine.keys() & other.keys() - {"lengths"}):
            both = difference(mine[name], other[name], mine.get("lengths"))
            off, size = np.maximum(both, found.get(name, (0.0, 0.0)))  # NaN stays NaN
            found[name] = float(off), float(size)
        if not found:
            raise AssertionError(f"nothing to compare: {sorted(mine)} here, {sorted(other)} there")
    audio, lengths = noise(1, SECONDS[1])
    rounds = [(timed(ours, audio, lengths), timed(theirs, audio, lengths)) for _ in range(REPEATS)]
    medians = np.median(np.array(rounds), axis=0)
    return Result(found, (float(medians[0]), float(medians[1])), rounds)


def answers(run: Any, *, encoder_only: bool = False) -> Loaded:
    """What a run answers, compiled, on the host; with `encoder_only` its last frames."""
    return _answers(run.task, run.variables, encoder_only)


def _answers(task: Any, variables: Any, encoder_only: bool) -> Loaded:
    # Exports answer in float32, whatever the run was trained in.
    task = task.clone(encoder=task.encoder.clone(dtype="float32", remat=False))
    if encoder_only or not hasattr(task, "answer"):
        features = jax.jit(lambda v, batch: task.apply(v, batch, method="features"))

        def frames(audio, lengths):
            found = features(variables, {"audio": audio, "lengths": lengths})
            return {"frames": np.asarray(found.frames), "lengths": np.asarray(found.lengths)}

        return frames
    whole = jax.jit(serve(task))
    return lambda audio, lengths: jax.tree.map(np.asarray, whole(variables, audio, lengths))


def noise(rows: int, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Audio [B, S], zero in the padding, and lengths [B]: every row but the first is shorter."""
    samples = int(seconds * SAMPLE_RATE)
    lengths = np.array([samples - k * samples // 4 for k in range(rows)], np.int32)
    audio = (0.1 * np.random.default_rng(rows).normal(size=(rows, samples))).astype(np.float32)
    audio[np.arange(samples) >= lengths[:, None]] = 0
    return audio, lengths


def difference(ours: np.ndarray, theirs: np.ndarray, lengths: np.ndarray | None) -> tuple[float, float]:
    """(largest absolute difference, largest value) of answers, of valid frames; infinite where some are missing."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if ours.ndim == 3:
        frames = min(ours.shape[1], theirs.shape[1])
        if frames < (ours.shape[1] if lengths is None else lengths.max()):
            return np.inf, float(np.abs(ours).max())
        ours, theirs = ours[:, :frames], theirs[:, :frames]
    if ours.ndim == 3 and lengths is not None:
        inside = np.arange(ours.shape[1]) < lengths[:, None]
        ours, theirs = ours[inside], theirs[inside]
    return float(np.abs(ours - theirs).max(initial=0)), float(np.abs(ours).max(initial=0))


def timed(answer: Loaded, audio: np.ndarray, lengths: np.ndarray) -> float:
    start = time.perf_counter()
    answer(audio, lengths)
    return time.perf_counter() - start


def table(result: Result) -> str:
    """What a person reads of it."""
    lines = [f"{'answer':12} {'largest difference':>20} {'largest value':>16}"]
    for name, (off, size) in result.differences.items():
        lines.append(f"{name:12} {off:20.2e} {size:16.3g}")
    ours, theirs = result.seconds
    each = ", ".join(f"{b / a:.2f}" for a, b in result.rounds)
    lines.append(
        f"{SECONDS[1]:g} s of audio: {1000 * ours:.0f} ms here, {1000 * theirs:.0f} ms there, ratio "
        f"{theirs / ours:.2f} ({each})"
    )
    return "\n".join(lines)

"""One measurement, from the options of the command to everything that is shown and written.

Shapes: B batch, T frames, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from speechjax import config as configs
from speechjax import machine, sharding
from speechjax.errors import UserError
from speechjax.speed import ceiling, peer, work
from speechjax.speed.apart import Apart
from speechjax.speed.ours import PARTS, Encoding, Training, used_memory
from speechjax.speed.turns import Contestant, Timing, speedup, spread, take_turns

OURS = "speechjax"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
SHORTEST = 0.6  # of the longest row, in a batch for inference


@dataclass(frozen=True)
class Options:
    """`what` is "train" or "inference"; seconds of 0 and no variants are chosen by device and type, see `measure`.

    `tuned`: the peer's allocator keeps freed memory, as ours does on CPUs.
    """

    what: str
    config: str
    overrides: Sequence[str] = ()
    peer: bool = False
    variants: Sequence[str] = ()
    dtype: str = ""
    batch_seconds: float = 0.0
    crop_seconds: float = 0.0
    repeats: int = 10
    data: bool = False
    tuned: bool = False


def measure(options: Options) -> dict[str, Any]:
    """Everything about one config on this machine, as JSON has it.

    "train_step" or "inference" is our side: {seconds, audio_hours_a_second, mfu, ...} and, with a peer, `speedup`, the
    median over the rounds of how many times longer the first of its variants took, `spread`, its quartiles, and
    `repeats`.  "runners" has all sides with every sample.  A batch is 10 s of audio in crops of 5 s on a CPU, elsewhere
    240 s a device in crops of the config's length, unless the options say so; peers compute in the type that we do.
    Raises UserError for mistakes in options or config.
    """
    before = machine.load()
    if options.peer:
        _check_peer()
    config, changed = work.open_config(options.config, options.overrides, options.dtype, comparable=options.peer)
    batch = _batch(options, config)
    side = Training(config, batch) if options.what == "train" else Encoding(config, batch)
    theirs = _theirs(options, config, side, batch) if options.peer else {}
    flops, why = _flops(options, config, batch)
    contestants = [
        Contestant(OURS, side.open),
        *(Contestant(name, one.open, one.close) for name, one in theirs.items()),
    ]
    timings = take_turns(contestants, options.repeats)
    ran = not timings[0].error
    memory = {
        "host": machine.memory(), "device": used_memory() or (side.memory if ran else None), "planned": side.memory,
        "peer": max((one.memory() or 0 for one in theirs.values()), default=0) or None,
    }  # fmt: skip
    same = _same(side, next(iter(theirs.values())), timings) if theirs else {}
    for one in theirs.values():
        one.close()

    top = _ceiling(config, batch, side)
    runners = [_runner(timing, timings[0], flops, work.audio_seconds(batch), top) for timing in timings]
    training = side if ran and isinstance(side, Training) else None
    return {
        "what": options.what, "config": options.config, "changed": changed, "task": config.task.name,
        "parameters": side.parameters, "dtype": config.model.dtype,
        "batch": {
            "rows": len(batch["audio"]), "samples": batch["audio"].shape[1],
            "audio_seconds": work.audio_seconds(batch),
        },
        "train_step" if options.what == "train" else "inference": runners[0] | _against(timings),
        "runners": runners, "same": same, "parts": _parts(training, options.repeats) if training else {},
        "input": _input(options, training) if training else {}, "compile_seconds": side.compile_seconds,
        "memory": memory, "flops": flops, "flops_error": why, "ceiling": top,
        "machine": machine.describe() | _devices() | {"load_before": before, "load_after": machine.load()},
        "versions": machine.versions(LIBRARIES),
    }  # fmt: skip


def _check_peer() -> None:
    peer.check()
    if (devices := jax.device_count()) > 1:
        raise UserError(f"--peer=hf runs on one device, here are {devices}: hide the others (CUDA_VISIBLE_DEVICES=0)")


def _devices() -> dict[str, Any]:
    first = jax.devices()[0]
    return {"device": first.device_kind if first.platform != "cpu" else "cpu", "devices": jax.device_count()}


def _batch(options: Options, config: Any) -> work.Batch:
    on_cpu, task = jax.default_backend() == "cpu", configs.make_task(config)
    crop = options.crop_seconds or (5.0 if on_cpu else config.data.crop_seconds)
    seconds = options.batch_seconds or (10.0 if on_cpu else 240.0 * jax.device_count())
    rows, samples = work.shape_of(task, seconds, crop, sharding.row_parts(sharding.make_mesh(**config.mesh)))
    return work.make_batch(task, rows, samples, 1.0 if options.what == "train" else SHORTEST)


def _flops(options: Options, config: Any, batch: work.Batch) -> tuple[float, str]:
    """(of a step, "") or (NaN, why it is not known): a model whose FLOPs cannot be counted is still timed."""
    try:
        return (work.train_flops if options.what == "train" else work.encoder_flops)(config, batch), ""
    except UserError as error:
        return math.nan, str(error)


def _theirs(options: Options, config: Any, side: Training | Encoding, batch: work.Batch) -> dict[str, Any]:
    """{name: their side} of every variant, with our parameters as they are at first."""
    variants = options.variants or (("bf16", "bf16+compile") if config.model.dtype == "bfloat16" else ("eager",))
    kind = peer.TheirTraining if options.what == "train" else peer.TheirEncoding
    params = side.parameters_at_first()
    return {f"transformers {name}": Apart(kind, config, params, batch, name, tuned=options.tuned) for name in variants}


def _same(side: Any, theirs: Any, timings: list[Timing]) -> dict[str, Any]:
    """Whether both sides compute the same, as far as chance lets them: [ours, theirs] of the first step.

    Training draws other masks and dropout on either side.  For inference it is the largest difference of a frame in the
    row without padding, in deviations; other rows hear their padding there, where the first norm runs over time.
    """
    if timings[0].error or timings[1].error:
        return {}
    if isinstance(side, Training):
        losses, norms = theirs.ask("losses"), theirs.ask("norms")
        return {"loss": [side.first["loss"], losses[0]], "grad_norm": [side.first["grad_norm"], norms[0]]}
    ours, others = side.frames()[0], theirs.ask("frames")[0]
    return {"difference": float(np.abs(ours - others).max() / ours.std())}


def _ceiling(config: Any, batch: work.Batch, side: Any) -> dict[str, Any]:
    """FLOP/s of all devices: see ceiling.py; "published" is None where it is not known, or not for this type."""
    devices, dtype = jax.devices(), config.model.dtype
    hop, extra = side.task.encoder.frame_len()
    frames = len(batch["audio"]) * ((batch["audio"].shape[1] - extra) // hop) // len(devices)
    found = ceiling.measured(max(1, frames), config.model.width, config.model.mlp, dtype)
    published = ceiling.published(devices[0].device_kind) if dtype == "bfloat16" else None
    return found | {
        "flops_per_second": found["flops_per_second"] * len(devices),
        "published": published and published * len(devices),
    }


def _runner(timing: Timing, ours: Timing, flops: float, seconds: float, top: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": timing.name}
    if timing.wall:
        step = timing.median
        found |= {
            "seconds": step, "seconds_spread": spread(timing.wall), "cpu_seconds": float(np.median(timing.cpu)),
            "audio_hours_a_second": seconds / 3600 / step, "mfu": flops / step / top["flops_per_second"],
            "mfu_published": flops / step / top["published"] if top["published"] else None,
        }  # fmt: skip
    if timing.wall and timing is not ours:
        found["against"] = speedup(ours, timing)
    first = None if math.isnan(timing.first) else timing.first
    return found | {
        "first_seconds": first, "steps_a_sample": timing.steps, "samples": timing.wall, "cpu_samples": timing.cpu,
        "error": timing.error,
    }  # fmt: skip


def _against(timings: list[Timing]) -> dict[str, Any]:
    """`speedup` over the first variant of the peer, where both have run."""
    found = speedup(*timings[:2]) if len(timings) > 1 else None
    return {"reference": timings[1].name, **found} if found else {}


def _parts(training: Training, repeats: int) -> dict[str, Any]:
    """{part: seconds of it}: the median of what each of ever longer programs ("prefixes") takes more in a round."""
    timings = take_turns(training.prefixes(), max(3, repeats // 2))
    if failed := [timing.error for timing in timings if timing.error]:
        return {"error": failed[0]}
    seconds = np.array([timing.wall for timing in timings])
    parts = np.median(np.diff(seconds, axis=0, prepend=0.0), axis=1)
    prefixes = {part: timing.wall for part, timing in zip(PARTS, timings, strict=True)}
    return dict(zip(PARTS, parts.tolist(), strict=True)) | {"prefixes": prefixes}


def _input(options: Options, training: Training) -> dict[str, Any]:
    """With `data`, the loop's own rates on batches of config.data, in crops of at most the batch's length."""
    if not options.data:
        return {}
    config = training.config.copy_and_resolve_references()
    rows, samples = training.batch["audio"].shape
    seconds = samples / work.SAMPLE_RATE
    config.data.update(dict(
        crop_seconds=seconds, batch_seconds=rows * seconds, shapes=1,
        row_multiple=sharding.row_parts(training.mesh),
    ))  # fmt: skip
    try:
        from speechjax.experiment import open_experiment

        _, data = open_experiment(config, None)
        return training.loop(data, max(8, options.repeats))
    except ImportError as error:
        return {"error": f"{error.name} is not installed"}

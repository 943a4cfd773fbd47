"""Compile the train step of a config for hardware that is not here: does it fit, and what does it cost?

    python -m speechjax.aot --config=configs/pretrain/wav2vec2.py:size=large --topology=v5e:4x4
    python -m speechjax.aot --config=configs/pretrain/best_rq.py --topology=v5p:8x8x8 --slices=2 --mesh.fsdp=8
    python -m speechjax.aot --config=configs/pretrain/hubert.py:size=large --topology=h100:2x8 --largest --json=FILE

The step is the one that training compiles, on the longest batches that the config's data block asks for; no data is
opened.  Printed are the memory of a device, the collectives of a step, its model FLOPs and the least time that the
hardware needs for them.  Exit code 1 where the step does not fit into the memory of a device, with the largest batch
that does, as flags.  --largest looks for it in any case.

TPUs (v4, v5e, v5p, v6e, tpu7x, a shape of chips) need libtpu: pip install 'speechjax[tpu]'.  GPUs (a100, h100, h200,
b200, l4, hosts x GPUs) need JAX's CUDA plugin, but no CUDA.  cpu:N are N virtual devices of this machine.  JAX takes
three quarters of a GPU's memory, and so much may be used here: XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 changes both.
"""

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechjax.ahead import hardware
from speechjax.errors import UserError
from speechjax.verb import leave, split_overrides

if TYPE_CHECKING:
    from speechjax.ahead.program import Step, StepCompiler

log = logging.getLogger("speechjax")


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known flags and the overrides of the config, "--config." stripped."""
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG,...]", help="the experiment")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:4x4, v5p:2x2x4, h100:2x8, cpu:4")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them (default: %(default)s)")
    parser.add_argument("--largest", action="store_true", help="look for the largest batch that fits")
    parser.add_argument("--memory", type=float, default=0.0, metavar="GIB", help="of a device that may be used")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where everything printed goes, as JSON")
    args, overrides = split_overrides(parser, argv, ("--config.", "--mesh."))
    if not 0 <= args.memory < math.inf:
        parser.error(f"--memory={args.memory}: a positive number of GiB")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json={args.json}: no such folder: {args.json.absolute().parent}")
    return args, overrides


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args, overrides = parse_args(argv)
    topology = hardware.parse(args.topology, args.slices)
    hardware.prepare(topology)

    from speechjax import config as configs
    from speechjax import sharding
    from speechjax.ahead.batch import longest_shape
    from speechjax.ahead.program import StepCompiler

    config: Any = configs.load(args.config, overrides)
    mesh = sharding.make_mesh(**config.mesh, devices=topology.devices())
    compiler = StepCompiler(config, mesh, args.memory * hardware.GIB or topology.usable_memory())
    shape = longest_shape(config, compiler.task)
    if config.data.row_multiple % compiler.row_parts:
        raise UserError(
            f"config.data.row_multiple={config.data.row_multiple} must be a multiple of the {compiler.row_parts} parts "
            f"of a batch on {topology}: add --config.data.row_multiple={compiler.row_parts}"
        )
    log.info("compiling for %s, %d devices; this takes minutes where the model is large", topology, mesh.size)
    step = compiler(shape, config.train.device_seconds)
    result = describe(compiler, topology, step)
    show(result)
    if args.largest or not result["fits"]:
        result["largest"] = find_largest(compiler, step)
        show_largest(result["largest"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["fits"]:
        return 0
    raise UserError(refusal(result))


def describe(compiler: "StepCompiler", topology: hardware.Topology, step: "Step") -> dict[str, Any]:
    """Everything that is known of a step, as plain JSON types; of a refused one its parts of memory are missing."""
    from speechjax.ahead.batch import task_spec
    from speechjax.ahead.collectives import collectives
    from speechjax.flops import batch_flops
    from speechjax.step import SAMPLE_RATE

    rows, seconds = step.shape.rows, step.shape.samples / SAMPLE_RATE
    flops = batch_flops(compiler.config, task_spec(compiler.config, compiler.task, step.shape))
    traffic = collectives(step.program.as_text()) if step.program else None
    least = sum(flops.values()) / (compiler.mesh.size * topology.chip.flops)
    return {
        "topology": str(topology),
        "devices": compiler.mesh.size,
        "mesh": dict(compiler.mesh.shape),
        "parameters": compiler.parameters,
        "batch": {
            "rows": rows,
            "seconds_a_row": seconds,
            "seconds": rows * seconds,
            "seconds_a_device": rows * seconds / compiler.row_parts,
            "micro_batches": step.parts,
        },
        "fits": step.needed <= compiler.room,
        "memory": {
            **(dataclasses.asdict(step.memory) if step.memory else {}),
            "needed": step.needed if math.isfinite(step.needed) else None,
            "device": compiler.room,
        },
        "collectives": traffic and {kind: found._asdict() for kind, found in traffic.items()},
        "flops": flops | {"total": sum(flops.values())},
        "least_step_seconds": least if math.isfinite(least) else None,
        "compile_seconds": step.seconds,
    }


def find_largest(compiler: "StepCompiler", first: "Step") -> dict[str, Any]:
    """The largest batch that fits at once, as overrides, and the config's own cut so that it fits.

    `first` is the config's own step.
    """
    from speechjax.ahead.search import largest
    from speechjax.step import SAMPLE_RATE

    shape, parts = first.shape, compiler.row_parts
    own, seconds = shape.rows // parts, shape.samples / SAMPLE_RATE
    known = {0: compiler.state_bytes} | ({own: first.needed} if first.parts == 1 else {})
    attempt = lambda n: compiler(dataclasses.replace(shape, rows=n * parts), 0.0).needed  # noqa: E731
    rows = largest(attempt, compiler.room, known, start=own // first.parts)
    found: dict[str, Any] = {"rows_a_device": rows, "seconds_a_device": rows * seconds, "needed": known.get(rows)}
    found |= {"overrides": [], "micro_batches": []}
    if rows:
        found["overrides"] = [f"data.batch_seconds={rows * parts * seconds:g}", f"data.row_multiple={parts}"]
    if first.needed > compiler.room:
        for part in (n for n in range(rows, 0, -1) if own % n == 0 and n < own):
            at_once = math.ceil(1000 * part * seconds) / 1000
            if compiler(shape, at_once).needed <= compiler.room:
                found["micro_batches"] = [f"train.device_seconds={at_once:.10g}"]
                break
    return found | {"compilations": len(compiler.steps)}


def refusal(result: dict[str, Any]) -> str:
    """One line: what does not fit, and what would."""
    memory, found = result["memory"], result["largest"]
    needed = f"{memory['needed'] / hardware.GIB:.2f} GiB" if memory["needed"] else "more than there is"
    does_not = f"the step needs {needed} of the {memory['device'] / hardware.GIB:.2f} GiB of a device"
    if not found["rows_a_device"]:
        return (
            f"{does_not}, nor fits one row of {result['batch']['seconds_a_row']:g} s a device: split the state with "
            "--mesh.fsdp=N, set --config.model.scan=True and --config.model.remat=True, or lower "
            "--config.data.crop_seconds"
        )
    flags = " ".join(f"--config.{text}" for text in found["overrides"])
    cut = f", or cut the batch: --config.{found['micro_batches'][0]}" if found["micro_batches"] else ""
    return f"{does_not}; the largest batch that fits: {flags}{cut} ({found['compilations']} compilations)"


# ---- what a person reads


def show(result: dict[str, Any]) -> None:
    """The description as a table on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    batch, memory, flops = result["batch"], result["memory"], dict(result["flops"])
    gib = lambda size: "-" if size is None else f"{size / hardware.GIB:.2f} GiB"  # noqa: E731
    table = Table(box=box.SIMPLE, show_header=False)
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    cut = f", in {batch['micro_batches']} micro-batches" * (batch["micro_batches"] > 1)
    table.add_row("hardware", f"{result['topology']}: {result['devices']} devices, mesh {mesh}")
    table.add_row("parameters", f"{result['parameters'] / 1e6:.2f} M")
    table.add_row(
        "batch", f"{batch['rows']} x {batch['seconds_a_row']:.2f} s, {batch['seconds_a_device']:.1f} s a device{cut}"
    )  # fmt: skip
    if "arguments" in memory:
        table.add_row(
            "memory a device", f"{gib(memory['needed'])} of {gib(memory['device'])}, "
            f"{memory['needed'] / memory['device']:.0%}: {gib(memory['arguments'])} of arguments, "
            f"{gib(memory['temporaries'])} of temporaries; at its peak {gib(memory['peak'])} in use",
        )  # fmt: skip
    else:
        table.add_row("memory a device", f"refused: needs about {gib(memory['needed'])} of {gib(memory['device'])}")
    if result["collectives"] is not None:
        kinds = [f"{x['count']} {kind} of {x['bytes'] / 1e6:,.1f} MB" for kind, x in result["collectives"].items()]
        table.add_row("collectives a step", ", ".join(kinds) or "none")
    total = flops.pop("total")
    shares = ", ".join(f"{part} {count / total:.1%}" for part, count in flops.items())
    table.add_row("model FLOPs a step", f"{total / 1e12:,.4g} T: {shares}")
    if least := result["least_step_seconds"]:
        rate = batch["seconds"] / least / 3600
        table.add_row(
            "step time", f"at least {1000 * least:,.3g} ms (peak in bfloat16): {rate:,.3g} h of audio a second"
        )
    table.add_row("compiled in", f"{result['compile_seconds']:.1f} s")
    Console().print(table)


def show_largest(found: dict[str, Any]) -> None:
    if not found["rows_a_device"]:
        print("largest batch: none fits")
        return
    needs = f", {found['needed'] / hardware.GIB:.2f} GiB"
    print(
        f"largest batch: {found['rows_a_device']} rows, {found['seconds_a_device']:.1f} s a device{needs} "
        f"({found['compilations']} compilations): {' '.join(f'--config.{text}' for text in found['overrides'])}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles and leaves with an exit code."""
    leave(
        lambda: run(argv), interrupted="nothing was written; give the same command again",
        full_disk="free some and give the same command again",
    )  # fmt: skip


if __name__ == "__main__":
    main()

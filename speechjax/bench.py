"""Measure parts of the stack on this machine.

    python -m speechjax.bench --what=train --config=configs/pretrain/wav2vec2.py:size=base
    python -m speechjax.bench --what=train --config=configs/pretrain/wav2vec2.py:size=base --peer=hf --json=train.json
    python -m speechjax.bench --what=inference --config=configs/pretrain/hubert.py:size=large --peer=hf
    python -m speechjax.bench --what=train --config=configs/pretrain/wav2vec2.py:size=large --peer=hf --dtype=bfloat16
    python -m speechjax.bench --what=input
    python -m speechjax.bench --what=input --source=folder:/data/speech --hours=2 --json=input.json

train: the update as training compiles it: its time and that of its parts, audio-hours a second, model FLOPs and their
share of what the device can multiply (MFU), compile time, memory.  inference: the encoder's forward pass on a padded
batch.  Both need neither recordings nor TensorFlow.  With --peer=hf the same work runs in transformers and torch, in
turns with ours, in a process of its own with as many threads, and ratios are shown with their spread; both compute the
same function, so what only our objectives have is switched off, and shown as changed.  Any key of the config is set as
--config.block.key=value.

input: audio-hours a core-minute from every kind of source, beside the bare decoder and what other loaders need for the
same files, interleaved in one run.  PyTorch and lhotse take part where they are installed.
"""

import argparse
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechjax.errors import UserError
from speechjax.verb import keep_memory, leave, split_overrides

log = logging.getLogger("speechjax")

KINDS = ("train", "inference", "input")
VARIANTS = ("eager", "compile", "bf16", "bf16+compile")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of what is measured; of a config `overrides` too, "--config." stripped."""
    name = "python -m speechjax.bench"
    first = argparse.ArgumentParser(prog=name, add_help=False, allow_abbrev=False)
    first.add_argument("--what", choices=KINDS)
    what = first.parse_known_args(argv)[0].what
    parser = argparse.ArgumentParser(
        prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--what", required=True, choices=KINDS, help="what to measure; with it, --help says more")
    parser.add_argument("--json", metavar="FILE", help="where every sample goes, as JSON")
    if what == "input":
        _add_input(parser)
    elif what:
        _add_model(parser)
    args, args.overrides = split_overrides(parser, argv) if what != "input" else (parser.parse_args(argv), [])
    for name in ("hours", "batch_seconds", "crop_seconds", "repeats", "passes", "threads"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')}={value}: must be positive")
    if what == "input":
        args.source = args.source or f"embedded:{args.hours:g}"
    else:
        args.variants = _variants(parser, args)
    return args


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", help="the recordings, as in config.data.source (default: the embedded corpus)")
    parser.add_argument("--hours", type=float, default=0.5, help="hours of it (default: %(default)s)")
    parser.add_argument("--batch-seconds", type=float, default=512.0, help="audio a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of everything (default: %(default)s)")
    parser.add_argument(
        "--passes", type=int, default=8, metavar="N",
        help="times a repeat reads all the audio; decoding FLAC half of that (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--keep", metavar="DIR", help="where the files go, and stay for the next time")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:ARG,...]", help="the experiment, or config.json of a run")
    add("--peer", choices=("hf",), help="what to compare with: transformers and torch, on the same device")
    add(
        "--variants", default="", metavar="A,B,...",
        help=f"of the peer, the first is the reference: {', '.join(VARIANTS)} (default: eager, or with bfloat16 bf16 "
        "and bf16+compile; all use its fused attention and optimizer)",
    )  # fmt: skip
    add("--dtype", default="", choices=("float32", "bfloat16"), help="to compute in (default: float32 on CPUs, "
        "elsewhere the config's)")  # fmt: skip
    add("--batch-seconds", type=float, metavar="S", help="audio a batch (default: 10 on CPUs, else 240 a device)")
    add("--crop-seconds", type=float, metavar="S", help="of the longest row (default: 5 on CPUs, else the config's)")
    add("--repeats", type=int, default=10, metavar="N", help="rounds (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of the CPU, for both sides; this process is bound to as many "
        "processors (default: all)")  # fmt: skip
    add("--tuned-malloc", action="store_true", help="let glibc keep freed memory for the peer too, as it does for us")
    add("--data", action="store_true", help="train: also measure the wait for batches of config.data.source")


def _variants(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[str, ...]:
    variants = tuple(filter(None, getattr(args, "variants", "").split(",")))
    if unknown := [name for name in variants if name not in VARIANTS]:
        parser.error(f"--variants={unknown[0]}: choose from {', '.join(VARIANTS)}")
    if variants and not args.peer:
        parser.error("--variants are of a --peer")
    if args.data and args.what != "train":
        parser.error("--data is of --what=train")
    return variants


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json={args.json}: no such folder: {Path(args.json).absolute().parent}")
    log.setLevel(logging.WARNING)  # what preparing and compiling say is not about the measurement
    return _measure_input(args) if args.what == "input" else _measure_model(args)


def _measure_input(args: argparse.Namespace) -> int:
    from speechjax.data import bench_input

    result = bench_input.measure(
        source=args.source, hours=args.hours, batch_seconds=args.batch_seconds, repeats=args.repeats,
        passes=args.passes, keep=args.keep,
    )  # fmt: skip
    bench_input.show(result)
    if args.json:
        bench_input.write(result, Path(args.json))
    return 0


def _measure_model(args: argparse.Namespace) -> int:
    if args.threads:
        _bind(args.threads)
    if args.peer and not os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"):
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")  # the other half is torch's
    import jax

    from speechjax.speed import measure, report

    jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the results
    keep_memory()
    options: dict[str, Any] = {name: getattr(args, name) or 0.0 for name in ("batch_seconds", "crop_seconds")}
    result = measure.measure(measure.Options(
        what=args.what, config=args.config, overrides=args.overrides, peer=bool(args.peer), variants=args.variants,
        dtype=args.dtype, repeats=args.repeats, data=args.data, tuned=args.tuned_malloc, **options,
    ))  # fmt: skip
    result["machine"]["tuned_malloc"] = args.tuned_malloc
    report.show(result)
    if args.json:
        report.write(result, Path(args.json))
    ours = result["runners"][0]
    if ours["error"]:
        raise UserError(f"our side failed ({ours['error']}); of memory a smaller --batch-seconds needs less")
    return 0


def _bind(threads: int) -> None:
    """Before anything starts threads: XLA and torch have one for each processor that the process may use."""
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--threads needs Linux: other systems bind no process to processors")
    there = sorted(os.sched_getaffinity(0))
    if threads > len(there):
        raise UserError(f"--threads={threads}: this process may use {len(there)} processors")
    os.sched_setaffinity(0, there[:threads])


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and leaves with an exit code; SIGTERM stops it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    again = "nothing was written; give the same command again"
    leave(lambda: run(argv), interrupted=again, full_disk="free some, or name a roomier folder with --keep")


if __name__ == "__main__":
    main()

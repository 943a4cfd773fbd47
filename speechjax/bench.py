"""Measure parts of the stack on this machine.

    python -m speechjax.bench --what=input
    python -m speechjax.bench --what=input --source=folder:/data/speech --hours=2 --json=input.json

input: audio-hours a core-minute from every kind of source, beside the bare decoder and what other loaders need for the
same files, interleaved in one run.  PyTorch and lhotse take part where they are installed.
"""

import argparse
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

from speechjax.errors import UserError
from speechjax.verb import leave

log = logging.getLogger("speechjax")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--what", required=True, choices=("input",), help="what to measure")
    parser.add_argument("--source", help="the recordings, as in config.data.source (default: the embedded corpus)")
    parser.add_argument("--hours", type=float, default=0.5, help="hours of it (default: %(default)s)")
    parser.add_argument("--batch-seconds", type=float, default=512.0, help="audio a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of everything (default: %(default)s)")
    parser.add_argument(
        "--passes", type=int, default=8, metavar="N",
        help="times a repeat reads all the audio; decoding FLAC half of that (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--keep", metavar="DIR", help="where the files go, and stay for the next time")
    parser.add_argument("--json", metavar="FILE", help="where every sample goes, as JSON")
    args = parser.parse_args(argv)
    for name in ("hours", "batch_seconds", "repeats", "passes"):
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')}={value}: must be positive")
    args.source = args.source or f"embedded:{args.hours:g}"
    return args


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json={args.json}: no such folder: {Path(args.json).absolute().parent}")
    from speechjax.data import bench_input

    log.setLevel(logging.WARNING)  # what preparing and planning say is not about the measurement
    result = bench_input.measure(
        source=args.source, hours=args.hours, batch_seconds=args.batch_seconds, repeats=args.repeats,
        passes=args.passes, keep=args.keep,
    )  # fmt: skip
    bench_input.show(result)
    if args.json:
        bench_input.write(result, Path(args.json))
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and leaves with an exit code; SIGTERM stops it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    again = "nothing was written; give the same command again"
    leave(lambda: run(argv), interrupted=again, full_disk="free some, or name a roomier folder with --keep")


if __name__ == "__main__":
    main()

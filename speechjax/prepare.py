"""Prepare recordings for training: decode once, into int16 shards with random access, and look at what is in them.

    python -m speechjax.prepare --source=folder:/data/speech --out=/data/prepared
    python -m speechjax.prepare --source="folder:/data/a?weight=2 + manifest:/data/b.jsonl" --out=/data/mixture
    python -m speechjax.main ... --config.data.source=shards:/data/prepared

Any source of config.data.source will do.  Parallel; interrupted, the same command goes on where it stopped, and repairs
what was damaged since.  DIR/index.html shows hours, lengths, rates, clipping, silence, and what was rejected and why.
"""

import argparse
import logging
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speechjax.errors import UserError
from speechjax.verb import leave_to_go_on

if TYPE_CHECKING:
    from speechjax.data.mixture import Part
    from speechjax.data.statistics import Statistics

log = logging.getLogger("speechjax")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--source", required=True, help="what to prepare, as in config.data.source")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="where the set goes; on a disk of the machine that reads it"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything that is there, repair what has changed")
    parser.add_argument(
        "--tfds", metavar="NAME", help="also write the set as TensorFlow data set NAME (ArrayRecord) in DIR/tfds"
    )
    parser.add_argument(
        "--runner",
        metavar="RUNNER",
        help="prepare on Apache Beam: DirectRunner, FlinkRunner, DataflowRunner, SparkRunner",
    )
    parser.add_argument(
        "beam", nargs="*", metavar="-- BEAM OPTIONS", help="what follows -- goes to Beam, e.g. -- --region=..."
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers={args.workers}: at least 1")
    if args.tfds and not re.fullmatch(r"[A-Za-z]\w*", args.tfds, re.ASCII):
        parser.error(f"--tfds={args.tfds}: a name of letters, digits and _ that begins with a letter")
    if args.beam and not args.runner:
        parser.error(f"{' '.join(args.beam)}: options for Beam need --runner")
    return args


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    from speechjax.data.mixture import parse_mixture
    from speechjax.data.shard_writer import statistics_of, write_json
    from speechjax.data.shards import MIXTURE
    from speechjax.data.statistics import write_page

    parts = parse_mixture(args.source)
    alone = len(parts) == 1 and parts[0].weight == 1 and parts[0].hours is None
    if "://" in args.out:
        return _prepare_remote(parts, args)
    out = Path(args.out).expanduser()
    if (out / (MIXTURE if alone else "preparing.json")).exists():
        raise UserError(f"{out} holds {'a mixture' if alone else 'a single source'}; use another folder, or empty it")
    folders = [out] if alone else [out / f"{k:02d}-{_slug(part.source)}" for k, part in enumerate(parts)]
    for part, folder in zip(parts, folders, strict=True):
        _prepare_part(part, folder, args)
    if not alone:
        weights = [
            {"folder": folder.name, "weight": part.weight, "hours": part.hours}
            for part, folder in zip(parts, folders, strict=True)
        ]
        write_json(out / MIXTURE, {"parts": weights})
    twice = len({part.source for part in parts}) < len(parts)
    names = [
        f"{part.source} ({folder.name})" if twice else part.source for part, folder in zip(parts, folders, strict=True)
    ]
    statistics = {name: statistics_of(folder) for name, folder in zip(names, folders, strict=True)}
    page = write_page(out, out.absolute().name, statistics)
    if args.tfds:
        from speechjax.data.array_record import write_tfds

        for folder in folders:
            name = args.tfds if alone else f"{args.tfds}_{folder.name.replace('-', '_')}"
            log.info("TFDS data set: %s", write_tfds(folder, out / "tfds", name))
    _show(statistics)
    log.info("statistics: %s", page)
    log.info("train on it with %s", shlex.quote(f"--config.data.source=shards:{out}"))
    return 0


def _slug(source: str) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "-", source.partition(":")[2].rstrip("/").rpartition("/")[2]).strip("-")
    return words[:40] or source.partition(":")[0]


def _prepare_remote(parts: "list[Part]", args: argparse.Namespace) -> int:
    """One source into a folder that only Beam's workers reach; it is looked at where it is copied to."""
    from speechjax.data.beam import check, prepare_on_beam
    from speechjax.data.sources import open_source

    if not args.runner:
        raise UserError(f"--out={args.out} is no folder of this machine; --runner prepares into remote storage")
    if len(parts) > 1 or args.verify or args.tfds:
        raise UserError(f"--out={args.out}: remote storage takes one source, without --verify and --tfds")
    check(parts[0].source, args.runner, args.beam)
    source = open_source(parts[0].source)
    prepare_on_beam(source, args.out, runner=args.runner, options=args.beam, copy=parts[0].copy)
    log.info("%s is whole; copy it to a local disk to train on it with --config.data.source=shards:DIR", args.out)
    return 0


def _prepare_part(part: "Part", folder: Path, args: argparse.Namespace) -> None:
    from speechjax.data import prepare, shards
    from speechjax.data.sources import open_source

    if args.runner:
        from speechjax.data.beam import check

        check(part.source, args.runner, args.beam)
    source = open_source(part.source)
    if args.verify:
        for name, fault in shards.damaged(folder).items():
            log.warning("%s: %s; it will be made again", folder / name, fault)
            (folder / name).with_suffix(".json").unlink(missing_ok=True)
            (folder / "dataset.json").unlink(missing_ok=True)
    if args.runner:
        from speechjax.data.beam import prepare_on_beam

        prepare_on_beam(source, folder, runner=args.runner, options=args.beam, copy=part.copy)
    else:
        prepare.prepare(source, folder, workers=args.workers, copy=part.copy)
    done = shards.Shards(folder)
    if not len(done):
        reasons = sorted({entry["reason"] for entry in done.rejected})
        raise UserError(f"{part.source}: no recording of it can be used: {', '.join(reasons) or 'it is empty'}")


def _show(statistics: "dict[str, Statistics]") -> None:
    """The summary on the console: a column a source, as on the page."""
    from rich.console import Console
    from rich.table import Table

    from speechjax.data.statistics_page import overview

    header, *rows = overview(statistics)
    table = Table(box=None)
    for name in header:
        table.add_column(name, overflow="fold", justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True, markup=False).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Prepares and leaves with an exit code."""
    leave_to_go_on(lambda: run(argv))


if __name__ == "__main__":
    main()

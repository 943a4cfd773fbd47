"""Fit a k-means codebook to speech and label every frame with its nearest centroid: the targets of HuBERT.

    python -m speechjax.label --source=shards:/data/prepared --features=mfcc --clusters=100 --out=/data/labels
    python -m speechjax.label --source=shards:/data/prepared --features=runs/first --layer=6 --clusters=500 \\
        --fraction=0.1 --out=/data/labels2
    python -m speechjax.label --source=folder:/data/more --codebook=/data/labels --out=/data/more_labels
    python -m speechjax.main ... --config.data.source=shards:/data/prepared --config.data.units=labels:/data/labels

Features are computed batch by batch on the devices and never stored.  Interrupted, the same command goes on where it
stopped.  DIR/index.html shows how the codes are used and, where recordings have phone labels, how well they agree.
"""

import argparse
import dataclasses
import logging
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speechjax.errors import UserError
from speechjax.verb import keep_compiled, leave_to_go_on

if TYPE_CHECKING:
    import jax
    import numpy as np

    from speechjax.data.records import Records
    from speechjax.labelling.codebook import Codebook
    from speechjax.labelling.features import Features

log = logging.getLogger("speechjax")

_FITTING = ("method", "fraction", "passes", "patience", "inits", "reassign", "seed")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.label", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--source", required=True, help="what to label, as in config.data.source")
    add("--exclude", default="", metavar="REGEX", help="recordings to leave out, by id, e.g. held-out speakers; as in "
        "config.data.exclude")  # fmt: skip
    add("--out", required=True, type=Path, metavar="DIR", help="where the codebook and the labels go")
    add("--features", metavar="WHAT", help="mfcc, or the workdir of a run, of which the best checkpoint is taken; "
        "RUNDIR@STEP and RUNDIR@newest take another")  # fmt: skip
    add("--layer", type=int, metavar="N", help="of the run's encoder: N-th layer's output; 0: their input")
    add("--clusters", type=int, metavar="K", help="size of the codebook (default: 100)")
    add("--codebook", type=Path, metavar="DIR", help="label with the codebook in DIR instead of fitting one")
    fit = parser.add_argument_group("fitting")
    add = fit.add_argument
    add("--method", help="minibatch (default), or lloyd: exact, one pass over the data an update")
    add("--fraction", type=float, help="of the audio to fit to, by a hash of the ids (default: 1)")
    add("--passes", type=int, metavar="N", help="over it at most (default: 100)")
    add("--patience", type=int, metavar="N", help="mini-batches without a better inertia that end it (default: 100)")
    add("--inits", type=int, metavar="N", help="k-means++ starts, of which the best is taken (default: 20)")
    add("--reassign", type=float, metavar="SHARE",
        help="move codes used less than this share of the most used one (default: 0, never; mini-batches)")  # fmt: skip
    add("--seed", type=int, help="of starts and order (default: 0)")
    parser.add_argument(
        "--batch-seconds", type=float, default=200.0, metavar="S", help="of audio a batch (default: %(default)g)"
    )
    args = parser.parse_args(argv)
    fitting = [name for name in ("clusters", *_FITTING) if getattr(args, name) is not None]
    if args.codebook and fitting:
        parser.error(f"--codebook labels with a codebook that is there: without --{', --'.join(fitting)}")
    if not args.codebook and not args.features:
        parser.error("say --features=mfcc, --features=RUNDIR --layer=N, or --codebook=DIR")
    if args.fraction is not None and not 0 < args.fraction <= 1:
        parser.error(f"--fraction={args.fraction}: above 0, at most 1")
    if not 0 < args.batch_seconds < float("inf"):
        parser.error(f"--batch-seconds={args.batch_seconds}: must be positive")
    return args


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    import jax

    keep_compiled()
    from speechjax import sharding
    from speechjax.data.prepare import locked
    from speechjax.data.records import open_records
    from speechjax.data.units import open_units
    from speechjax.labelling.assign import label
    from speechjax.labelling.report import measure, show, write_page

    out = args.out.expanduser()
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    with jax.set_mesh(mesh):
        features = _features(args, mesh)
        # Everything that a training run may use has units, whatever it filters.
        records = open_records(
            args.source, segment_seconds=1e9, min_seconds=0.0, max_bad_share=1.0, exclude=args.exclude
        )
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            codebook = _codebook(args, out, records, features, mesh)
            label(records, features, codebook, out, mesh, batch_seconds=args.batch_seconds)
            found = measure(open_units(out), records)
    show(found)
    page = write_page(out, found, codebook)
    log.info("page: %s", page)
    log.info("train on it with %s", shlex.quote(f"--config.data.units=labels:{out}"))
    return 0


def _features(args: argparse.Namespace, mesh: "jax.sharding.Mesh") -> "Features":
    """What the arguments name, or what the codebook was fitted to; UserError where these are not the same."""
    from speechjax.labelling.codebook import load_codebook
    from speechjax.labelling.features import open_features

    if not args.codebook:
        return open_features(args.features, args.layer, mesh)
    codebook = load_codebook(args.codebook.expanduser())
    if codebook is None:
        raise UserError(f"--codebook={args.codebook}: there is no codebook.json in it")
    definition = codebook.features
    layer = definition.get("layer") if args.layer is None else args.layer
    features = open_features(args.features or codebook.fit["features_from"], layer, mesh)
    if features.definition != definition:
        names = definition.keys() | features.definition.keys()
        other = sorted(n for n in names if definition.get(n) != features.definition.get(n))
        raise UserError(
            f"--codebook={args.codebook} was fitted to other features ({', '.join(other)} differ): it knows "
            f"{codebook.fit['features']}, these are {features.name}"
        )
    return features


def _codebook(
    args: argparse.Namespace, out: Path, records: "Records", features: "Features", mesh: "jax.sharding.Mesh"
) -> "Codebook":
    """The codebook to label with, in `out`: copied, finished before, or fitted now."""
    import numpy as np

    from speechjax.labelling import windows as cutting
    from speechjax.labelling.assign import source_digest
    from speechjax.labelling.codebook import Codebook, load_codebook
    from speechjax.labelling.fit import Material, Recipe, check_request, fit

    there = load_codebook(out)
    if args.codebook:
        given = load_codebook(args.codebook.expanduser())
        assert given is not None
        if there is not None and there.digest != given.digest:
            raise UserError(f"{out} holds another codebook than {args.codebook}; use another --out, or empty it")
        if there is None:
            given.save(out)
        return given
    options = {name: getattr(args, name) for name in _FITTING if getattr(args, name) is not None}
    fraction = options.pop("fraction", 1.0)
    recipe = Recipe(clusters=args.clusters or 100, **options)
    chosen = some(records.keys, records.lengths, fraction)
    windows = cutting.cut(records.lengths, hop=features.hop, extra=features.extra, context=features.context)
    windows = windows.of(np.isin(windows.recording, chosen))
    if not len(windows):
        raise UserError(f"{args.source}: no recording is long enough for a frame")
    shapes = cutting.shapes_of(
        windows, hop=features.hop, extra=features.extra, batch_seconds=args.batch_seconds, devices=mesh.size
    )
    request = {
        **dataclasses.asdict(recipe), "fraction": fraction, "features": features.definition,
        "source": source_digest(records), "batches": [[shape.rows, shape.samples] for shape in shapes],
    }  # fmt: skip
    if there is not None:
        check_request(out, there.fit.get("request", {}), request)
        shutil.rmtree(out / "fit", ignore_errors=True)
        return there
    if any(out.glob("shard-*")):
        raise UserError(f"{out} holds shards, but no codebook; use another --out, or empty it")
    plan = cutting.plan_of(windows, shapes, recipe.seed)
    hours = float(records.lengths[chosen].sum()) / 16000 / 3600
    log.info("fitting %d clusters to %s of %.2f h, %d mini-batches a pass", recipe.clusters, features.name, hours,
             plan.batches_per_epoch)  # fmt: skip
    clusters, progress = fit(Material(records, windows, plan, features, mesh), recipe, out / "fit", request)
    about = {
        "features": features.name, "features_from": args.features, "hours": hours, "batches": progress.batch,
        "inertia": float(clusters.inertia if progress.smoothed is None else progress.smoothed),
        "history": progress.inertia, "request": request,
    }  # fmt: skip
    codebook = Codebook(np.asarray(clusters.centroids), np.asarray(clusters.counts), features.definition, about)
    codebook.save(out)
    shutil.rmtree(out / "fit")
    log.info("fitted in %d batches", progress.batch)
    return codebook


def some(keys: "np.ndarray", lengths: "np.ndarray", fraction: float) -> "np.ndarray":
    """Numbers of the recordings that are `fraction` of the audio, at least one: the first in the order of a hash.

    A larger fraction only adds.  Not the hash that decides what is held out: the order is another one.
    """
    import numpy as np

    if fraction == 1:
        return np.arange(len(keys))
    order = np.argsort(keys * np.uint64(0x9E3779B97F4A7C15), kind="stable")
    fits = np.cumsum(lengths[order]) <= fraction * lengths.sum()
    return np.sort(order[: max(1, int(fits.sum()))])


def main(argv: Sequence[str] | None = None) -> None:
    """Labels and leaves with an exit code."""
    leave_to_go_on(lambda: run(argv))


if __name__ == "__main__":
    main()

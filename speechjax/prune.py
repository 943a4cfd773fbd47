"""Make a trained model smaller: without the attention heads, hidden units and layers that matter least.

    python -m speechjax.prune --workdir=runs/hubert --out=runs/hubert_small --heads=8 --mlp=2048
    python -m speechjax.main --config=configs/finetune/ctc.py --workdir=runs/small_ctc \\
        --config.init_from=runs/hubert_small ...

    python -m speechjax.prune --workdir=runs/hubert --out=runs/hubert_6 --layers=0,2,4,6,8,10
    python -m speechjax.prune --workdir=runs/hubert --out=runs/hubert_8 --layers=8 --config.data.source=folder:/data

--heads, --mlp and --layers say how many stay; every layer keeps its own most important heads and units, and equally
many.  Importance is measured by how the run's own loss, on batches of its own training data, would change without
(--importance=loss), or by the norms of weights alone, without data (--importance=norm).  DIR is like a run's folder:
all commands read it, and training begins with it by --config.init_from=DIR, which heals what pruning has hurt.  RUN is
only read; RUN@STEP, @best and @newest name a checkpoint of it.  --config.data.key=value says where the data is on this
machine.
"""

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechjax.errors import UserError
from speechjax.verb import keep_compiled, leave, split_overrides

log = logging.getLogger("speechjax")


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known flags and the overrides of the config, "--config." stripped."""
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.prune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--workdir", required=True, metavar="RUN", help="of the run")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--heads", type=int, default=0, metavar="K", help="attention heads a layer keeps (default: all)"
    )
    parser.add_argument("--mlp", type=int, default=0, metavar="N", help="hidden units a feed-forward branch keeps "
                        "(default: all)")  # fmt: skip
    parser.add_argument("--layers", default="", metavar="N|I,J,...", help="how many layers stay, or which, counted "
                        "from 0; one alone: I, (default: all)")  # fmt: skip
    parser.add_argument("--importance", choices=("loss", "norm"), default="loss", help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, default=16, metavar="N", help="of data, for --importance=loss (default: "
                        "%(default)s)")  # fmt: skip
    args, overrides = split_overrides(parser, argv, ("--config.data.",))
    for flag in ("heads", "mlp", "batches"):
        if getattr(args, flag) < (flag == "batches"):
            parser.error(f"--{flag}={getattr(args, flag)}: at least 1")
    if not (args.heads or args.mlp or args.layers):
        parser.error("say what to keep: --heads=K, --mlp=N or --layers=N")
    try:
        numbers = [int(text) for text in args.layers.split(",") if text.strip()]
    except ValueError:
        parser.error(f"--layers={args.layers}: a number, or numbers with commas between")
    args.layers = numbers if "," in args.layers or not numbers else numbers[0]
    if args.layers == 0:
        parser.error("--layers=0: at least one layer must stay (the first alone: --layers=0,)")
    if args.importance == "norm" and overrides:
        parser.error(f"--{overrides[0]}: --importance=norm looks at no data")
    return args, overrides


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args, overrides = parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out={args.out} is there already, and not empty: name a new folder")
    import jax
    import numpy as np

    from speechjax import pruning, runs, sharding
    from speechjax.adapter_files import read_vocabulary

    keep_compiled()
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    with jax.set_mesh(mesh):
        found: Any = runs.open_run(args.workdir, sharding.replicated(mesh))
        log.info("weights of step %d: %s", found.step, found.directory)
        if "encoder" not in found.variables["params"]:
            raise UserError(f"{args.workdir} has no encoder to prune: its task is {found.config.task.name}")
        model = found.config.model.to_dict()
        wish: dict[str, Any] = dict(heads=args.heads, mlp=args.mlp, layers=args.layers or 0)
        norms = pruning.weight_norms(found.variables["params"], model)
        # Before the data is read: what cannot go is a mistake whatever the loss says.
        known = pruning.Importance(norms.heads, norms.units, np.ones(model["layers"]))
        pruning.plan(known if args.importance == "loss" else norms, model, **wish)
        importance = norms if args.importance == "norm" else _by_loss(found, mesh, args.batches, overrides)
    chosen = pruning.plan(importance, model, **wish)
    smaller = pruning.cut(found.variables, model, chosen)
    config: Any = found.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(chosen.model)
    params = smaller.pop("params")
    _check(config, params, smaller)
    rows = chosen.kept(importance)
    pruned = dict(workdir=str(found.workdir), step=found.step, digest=found.digest, importance=args.importance,
                  layers=chosen.layers, heads=chosen.heads.tolist(), kept=rows)  # fmt: skip
    runs.write_run(
        args.out, config, params, smaller, source=dict(pruned=pruned), step=found.step,
        vocabulary=read_vocabulary(found.workdir),
    )  # fmt: skip
    _show(found, params, chosen, rows, importance)
    log.info("%s: begin with it by --config.init_from=%s", args.out, args.out)
    return 0


def _by_loss(found: Any, mesh: Any, count: int, overrides: Sequence[str]) -> Any:
    """Importance by the run's loss on `count` batches of its training data."""
    import jax
    from rich.progress import track

    from speechjax import config as configs
    from speechjax import sharding
    from speechjax.experiment import open_data
    from speechjax.pruning import Gradients

    config: Any = found.config.copy_and_resolve_references()
    config.lock()
    for override in overrides:
        configs.override(config, override)
    with config.unlocked():  # the run had other devices
        config.data.row_multiple = math.lcm(config.data.row_multiple, jax.device_count())
    data = open_data(config, found.task, found.workdir)
    read = data.train_batches(0, count, 0, 1)
    batches = (batch for batch, _ in sharding.on_device(mesh, read))
    measure = Gradients(found.task, found.variables, config.model.to_dict(), step=found.step, seed=config.train.seed)
    return measure(track(batches, total=count, description="importance", transient=True))


def _check(config: Any, params: Any, extra: Any) -> None:
    """UserError unless the smaller weights are those of the smaller config."""
    from speechjax import config as configs
    from speechjax.formats.flat import unlike

    configs.check(config)
    if difference := unlike(configs.make_task(config), params, extra):
        raise UserError(f"this model cannot be pruned that way: {difference}")


def _show(found: Any, params: Any, chosen: Any, rows: Sequence[dict[str, float]], importance: Any) -> None:
    """A table of what stays, layer by layer, and of the sizes before and after."""
    import jax
    from rich.console import Console
    from rich.table import Table

    names = list(rows[0])
    table = Table(title="What stays", title_justify="left")
    for column in ("layer", *(f"{name}, share of importance" for name in names)):
        table.add_column(column, justify="right")
    counts = {"heads": importance.heads.shape[1], **{name: units.shape[1] for name, units in importance.units.items()}}
    stay = {"heads": chosen.heads.shape[1], **{name: units.shape[1] for name, units in chosen.units.items()}}
    for layer, shares in zip(chosen.layers, rows, strict=True):
        table.add_row(str(layer), *(f"{stay[name]} of {counts[name]}, {shares[name]:.1%}" for name in names))
    Console().print(table)
    gone = sorted(set(range(found.config.model.layers)) - set(chosen.layers))
    if gone:
        log.info("layers that go: %s", ", ".join(map(str, gone)))
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    before, after = size(found.variables["params"]), size(params)
    log.info("parameters: %s of %s (%.1f %%)", f"{after:,}", f"{before:,}", 100 * after / before)


def main(argv: Sequence[str] | None = None) -> None:
    """Prunes and leaves with an exit code."""
    leave(lambda: run(argv), interrupted="nothing was written; give the same command again",
          full_disk="free some, or name another place with --out")  # fmt: skip


if __name__ == "__main__":
    main()

"""Score a checkpoint of a run: its losses on held-out speech, and tests of what its frames know.

    python -m speechjax.evaluate --workdir=runs/mine
    python -m speechjax.evaluate --workdir=runs/mine --evals=abx,units --evals.abx.source=embedded:0.1 \\
        --evals.units.source=embedded:0.1 --evals.abx.context=any --evals.abx.layers=all
    python -m speechjax.evaluate --workdir=runs/mine --checkpoint=none --evals=probe \\
        --evals.probe.source=folder:/data/fsdd

Without --evals all evaluators of the run's config take part, and those that an --evals.NAME.key=value names: loss,
picture, probe, abx, units; of fine-tuned tasks recognition, translation, classification, verification, frame_labels,
values, detection, robustness.  The run is only read, so it may be going on; results go to
WORKDIR/report/evaluate.json, pictures and tables into a folder beside it.  --config.data.key=value says where the data
is on this machine.
"""

import argparse
import inspect
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechjax.errors import UserError
from speechjax.verb import keep_compiled, leave, split_overrides

log = logging.getLogger("speechjax")

_NEED_DATA = (
    "loss",
    "picture",
    "recognition",
    "classification",
    "detection",
    "frame_labels",
    "robustness",
    "translation",
    "values",
    "verification",
)  # fmt: skip; of the evaluators: the run's own data, the others have a source


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known flags and the overrides of the config, "--config." stripped."""
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--workdir", required=True, type=Path, help="of the run")
    parser.add_argument(
        "--checkpoint", default="", metavar="WHICH",
        help="best, newest, a step, or none: random weights (default: best, or newest where none was judged yet)",
    )  # fmt: skip
    parser.add_argument("--evals", metavar="NAME,...", help="these evaluators only (default: those of the config)")
    parser.add_argument("--out", metavar="FILE", help="where the results go as JSON (default: see above)")
    args, overrides = split_overrides(parser, argv, ("--evals.", "--config.data.", "--config.evals."))
    if args.checkpoint not in ("", "best", "newest", "none") and not args.checkpoint.isdecimal():
        parser.error(f"--checkpoint={args.checkpoint}: best, newest, none, or the number of a step")
    return args, overrides


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args, overrides = parse_args(argv)
    out = Path(args.out) if args.out else args.workdir / "report" / "evaluate.json"
    if args.out and (out.is_dir() or out.suffix != ".json"):
        raise UserError(f"--out={args.out}: name a file that ends in .json")
    if args.out and not out.absolute().parent.is_dir():
        raise UserError(f"--out={args.out}: no such folder: {out.absolute().parent}")
    import jax

    from speechjax import config as configs
    from speechjax import distributed, runs, sharding
    from speechjax.experiment import open_data
    from speechjax.logs import Logs, replace_file
    from speechjax.train import Job

    config: Any = runs.read_config(args.workdir.expanduser().absolute())
    chosen = choose(config, args.evals, overrides)
    configs.check(config)
    distributed.init()
    keep_compiled()
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    with jax.set_mesh(mesh):
        task = configs.make_task(config)
        needed = [name for name in chosen if config.evals[name].name in _NEED_DATA]
        with config.unlocked():  # the run had other devices
            config.data.row_multiple = math.lcm(config.data.row_multiple, jax.device_count())
        data = open_data(config, task, args.workdir) if needed else None
        step, variables, digest = _weights(args, task, data, mesh)
        params, extra = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        folder = out.with_suffix("")
        with Logs(folder, total_steps=step, start_step=0, enabled=jax.process_index() == 0) as logs:
            job = Job(task, config, data, mesh, folder, logs)
            results = {name: _evaluate(job, name, params, extra, step) for name in chosen}
            _show(logs, step, results)
    if jax.process_index() == 0:
        model = configs.to_json(config)["model"]
        found = dict(workdir=str(args.workdir), checkpoint=args.checkpoint or "default", step=step, digest=digest,
                     evals=results, model=model)  # fmt: skip
        try:
            replace_file(out, json.dumps(found, indent=1, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; name another file with --out") from error
        log.info("results: %s, pictures and tables: %s", out, folder / "report")
    return 0


def choose(config: Any, evals: str | None, overrides: Sequence[str]) -> list[str]:
    """The evaluators to run, each with all of its options in `config`, overrides applied.

    Raises UserError for an evaluator or an option that does not exist, and for one asked for without a source.
    """
    from speechjax import config as configs

    named = [text.split(".")[1].partition("=")[0] for text in overrides if text.startswith("evals.")]
    asked = [name.strip() for name in evals.split(",") if name.strip()] if evals is not None else None
    if asked is not None and (extra := sorted(set(named) - set(asked))):
        raise UserError(f"--evals.{extra[0]}.*: {extra[0]} is not among --evals={evals}")
    chosen = list(dict.fromkeys([*config.evals, *named] if asked is None else asked))
    if not chosen:
        raise UserError("no evaluator: name some, e.g. --evals=loss,abx")
    config.unlock()
    blocks = {name: config.evals[name].to_dict() if name in config.evals else {"name": name} for name in chosen}
    # The run's others stay: one evaluator may name another, with its options.
    config.evals = config.evals.to_dict() | {
        name: _defaults(block["name"]) | block | {"every": 1} for name, block in blocks.items()
    }
    config.lock()
    for override in overrides:
        configs.override(config, override)
    for name in sorted({*named, *(asked or ())}):
        block: Any = config.evals[name]
        if "source" in block and not block.source:
            example = "folder:/data/fsdd" if block.name == "probe" else "embedded:0.1"
            raise UserError(f"{name} needs recordings: --evals.{name}.source={example}")
    return [name for name in chosen if config.evals[name].get("source", "none needed")]


def _defaults(name: str) -> dict[str, Any]:
    """The options of an evaluator that has any by default; those of a probe are the presets'."""
    from speechjax import config as configs
    from speechjax import presets

    parameters = inspect.signature(configs.eval_class(name)).parameters
    own = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    return own | next((block for block in presets.evals().values() if block["name"] == name), {"name": name})


def _weights(args: argparse.Namespace, task: Any, data: Any, mesh: Any) -> tuple[int, dict[str, Any], str | None]:
    """(step, variables, digest) of the checkpoint asked for, or of random weights."""
    import jax
    import jax.numpy as jnp

    from speechjax import runs, sharding
    from speechjax.step import stream_keys

    if args.checkpoint != "none":
        suffix = f"@{args.checkpoint}" if args.checkpoint else ""
        found = runs.open_run(f"{args.workdir}{suffix}", sharding.replicated(mesh))
        log.info("weights of step %d: %s", found.step, found.directory)
        return found.step, found.variables, found.digest
    spec = data.specs[0] if data else None

    def init():
        rngs = {"params": jax.random.key(0), **stream_keys(task, 0, jnp.int32(0))}
        if spec:
            batch = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in spec.items()}
            return task.init(rngs, batch, step=jnp.int32(0), train=False)
        hop, more = task.encoder.frame_len()
        batch = dict(
            audio=jnp.zeros((mesh.size, 64 * hop + more), jnp.int16), lengths=jnp.zeros(mesh.size, jnp.int32),
            mean=jnp.zeros(mesh.size), std=jnp.ones(mesh.size),
        )  # fmt: skip
        return task.init(rngs, batch, method="features")

    variables = dict(jax.jit(init, out_shardings=sharding.replicated(mesh))())
    variables.pop("sums", None)
    return 0, variables, None


def _evaluate(job: Any, name: str, params: Any, extra: Any, step: int) -> dict[str, Any]:
    """{"options", "metrics", "seconds"} of one evaluator; what is not finite is None, which JSON has a word for."""
    from speechjax import config as configs

    start = time.monotonic()
    options = job.config.evals[name].to_dict()
    kind = options.pop("name")
    metrics = configs.eval_class(kind)(job, **options)(params, extra, step, name)
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    return dict(name=kind, options=options, metrics=finite, seconds=round(time.monotonic() - start, 1))


def _show(logs: Any, step: int, results: dict[str, dict[str, Any]]) -> None:
    """The losses, beside their chance levels; the other evaluators have tables of their own."""
    from speechjax.display import display

    rows = []
    for name, result in results.items():
        metrics = result["metrics"] if result["name"] == "loss" else {}
        for key, value in metrics.items():
            if not key.startswith("chance_"):
                chance = f"chance_{key}"
                guessed = display(key).number(metrics[chance]) if chance in metrics else ""
                rows.append([name, display(key).title, display(key).number(value), guessed])
    if rows:
        logs.table(f"Held-out speech at step {step}", ["evaluator", "metric", "value", "chance"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates and leaves with an exit code."""
    leave(lambda: run(argv), interrupted="nothing was written; give the same command again",
          full_disk="free some, or name another place with --out")  # fmt: skip


if __name__ == "__main__":
    main()

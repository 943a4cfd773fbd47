"""Elastic weight consolidation: what mattered for earlier tasks is held fast while the next one is learnt.

    python -m speechjax.ewc --workdir=runs/first
    python -m speechjax.main ... --config.init_from=runs/first --config.optim.ewc=runs/first \\
        --config.optim.ewc_weight=100 --config.data.source=manifest:/data/second.jsonl

Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3: to the loss of the new task comes
weight / 2 * sum F (theta - theta_old)^2.  F is the diagonal of the empirical Fisher information: the mean over rows of
the squared gradient of each row's own loss (a sum in nats, the negative log-likelihood of its labels; nothing masked or
dropped).  It is measured on what the run was trained on and written, with theta_old, to WORKDIR/ewc.npz.  A run that
was itself held to earlier tasks hands them on: their penalties add up, and so do sums of quadratic functions.
"""

import argparse
import io
import json
import logging
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from speechjax.errors import UserError
from speechjax.paths import path_name, restacked
from speechjax.verb import keep_compiled, leave, split_overrides

log = logging.getLogger("speechjax")

FILE = "ewc.npz"
_FORMAT = 1
_PRECISION, _CENTRE = "precision/", "centre/"

Arrays = dict[str, np.ndarray]  # by the path of the parameter


class Memory(NamedTuple):
    """What is known of earlier tasks: how firmly each parameter is held, and where.  Both by path, or both trees."""

    precision: Any
    centre: Any


# ---- in the optimizer


def consolidate(weight: float) -> optax.GradientTransformation:
    """Adds the gradient of the penalty, weight * precision * (parameter - centre), to the updates.

    Its state is a `Memory` of nothing until `recall` fills it: arrays of a state are placed and saved like moments,
    constants of a program are not.  Raises UserError for a weight that is not above 0.
    """
    if not 0 < weight < math.inf:
        raise UserError(f"config.optim.ewc_weight={weight}: must be above 0 where config.optim.ewc names a run")

    def init(params):
        return Memory(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        held = jax.tree.map(
            lambda u, p, precision, centre: u + (weight * precision * (p - centre)).astype(u.dtype),
            updates, params, state.precision, state.centre,
        )  # fmt: skip
        return held, state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def recall(opt_state: Any, workdir: str) -> Any:
    """The optimizer's state with what `workdir` remembers in the place of `consolidate`'s zeros; once, before step 0.

    Parameters unknown to it, as those of another head, are free.  Raises UserError where nothing fits.
    """
    memory = load(Path(workdir).expanduser())
    fitted = 0

    def fill(tree: Any, known: Arrays) -> Any:
        names = dict.fromkeys(path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
        known = restacked(known, names)

        def leaf(path, x):
            nonlocal fitted
            found = known.get(path_name(path))
            if found is None or found.shape != x.shape:
                return x
            fitted += 1
            return jax.device_put(found.astype(x.dtype), x.sharding)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def state(x: Any) -> Any:
        return Memory(fill(x.precision, memory.precision), fill(x.centre, memory.centre)) if _is_memory(x) else x

    filled = jax.tree.map(state, opt_state, is_leaf=_is_memory)
    if not fitted:
        raise UserError(f"config.optim.ewc={workdir} knows no parameter of this model: go on from it with init_from")
    log.info("%d of %d parameter arrays that %s knows are held", fitted // 2, len(memory.centre), workdir)
    return filled


def _is_memory(x: Any) -> bool:
    return isinstance(x, Memory)


# ---- files


def save(workdir: Path, memory: Memory, about: dict[str, Any]) -> Path:
    """Writes WORKDIR/ewc.npz, whole or not at all."""
    from speechjax.logs import replace_file

    content = io.BytesIO()
    named = {_PRECISION + name: array for name, array in memory.precision.items()}
    named |= {_CENTRE + name: array for name, array in memory.centre.items()}
    np.savez(content, allow_pickle=False, about=json.dumps({**about, "format": _FORMAT}), **named)
    replace_file(workdir / FILE, content.getvalue())
    return workdir / FILE


def load(workdir: Path) -> Memory:
    """What a run remembers, by path; UserError where there is nothing, or it cannot be read."""
    file = workdir / FILE
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as content:
            if json.loads(str(content["about"]))["format"] != _FORMAT:
                raise UserError(f"{file} is of another version: write it again, python -m speechjax.ewc")
            names = [name.removeprefix(_CENTRE) for name in content.files if name.startswith(_CENTRE)]
            parts = [{name: content[kind + name] for name in names} for kind in (_PRECISION, _CENTRE)]
    except FileNotFoundError:
        raise UserError(f"{file} is missing: python -m speechjax.ewc --workdir={workdir} writes it") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read ({error}): write it again, python -m speechjax.ewc") from None
    return Memory(*parts)


def add(one: Memory, other: Memory) -> Memory:
    """The memory whose penalty is the sum of both, up to a constant: precisions add, centres are their mean.

    Where shapes differ, as of a head that began anew, `other` counts alone.
    """
    precision, centre = dict(one.precision), dict(one.centre)
    other = Memory(restacked(other.precision, precision), restacked(other.centre, precision))
    for name, held in other.precision.items():
        mine, at = precision.get(name), other.centre[name]
        if mine is None or mine.shape != held.shape:
            precision[name], centre[name] = held, at
            continue
        total = mine + held
        mean = (mine * centre[name] + held * at) / np.where(total > 0, total, 1)
        precision[name], centre[name] = total, np.where(total > 0, mean, at).astype(at.dtype)
    return Memory(precision, centre)


# ---- what mattered


def fisher(
    task: Any, variables: Any, batches: Iterable[dict[str, Any]], examples: int, *,
    step: int, seed: int, detach: Callable[[Any], Any] = lambda params: params,
) -> tuple[Any, int]:  # fmt: skip
    """(diagonal of the empirical Fisher information, a tree like the parameters; rows it is the mean of).

    Of the first `examples` rows or a few more, rows without a label left out.  `detach`: see speechjax.optim.detach.
    Raises UserError where no row has a label.
    """
    from speechjax.step import stream_keys

    extra = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params, extra, row, number):
        one = jax.tree.map(lambda x: x[None], row)
        variables, rngs = {"params": detach(params), **extra}, stream_keys(task, seed, number)
        losses, _ = task.apply(variables, one, step=jnp.int32(step), train=False, rngs=rngs)
        return sum(total for total, _ in losses.values()), sum(weight for _, weight in losses.values())

    @jax.jit
    def more(total, params, extra, batch, first):
        def row(total, numbered):
            squares, count = total
            number, one = numbered
            grads, weight = jax.grad(loss, has_aux=True)(params, extra, one, number)
            squares = jax.tree.map(lambda s, g: s + jnp.where(weight > 0, g * g, 0), squares, grads)
            return (squares, count + (weight > 0).astype(jnp.int32)), None

        numbers = first + jnp.arange(len(batch["audio"]), dtype=jnp.int32)
        return jax.lax.scan(row, total, (numbers, batch))[0]

    total = jax.tree.map(jnp.zeros_like, variables["params"]), jnp.int32(0)
    seen = 0
    for batch in batches:
        total = more(total, variables["params"], extra, batch, jnp.int32(seen))
        seen += len(batch["audio"])
        if int(total[1]) >= examples:
            break
    squares, count = total
    if not (count := int(count)):
        raise UserError(f"none of {seen} examples has a label: nothing says which parameters matter")
    return jax.tree.map(lambda s: s / count, squares), count


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.ewc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--workdir", required=True, help="of the run: the checkpoint that init_from will take, the "
                        "best; or WORKDIR@newest, WORKDIR@STEP")  # fmt: skip
    parser.add_argument("--examples", type=int, default=1000, metavar="N", help="to measure on (default: %(default)s)")
    args, overrides = split_overrides(parser, argv, ("--config.data.",))
    if args.examples < 1:
        parser.error(f"--examples={args.examples}: at least 1")
    return args, overrides


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args, overrides = parse_args(argv)
    from speechjax import config as configs
    from speechjax import runs
    from speechjax.experiment import check_needs, open_data
    from speechjax.labelling.progress import Bar
    from speechjax.optim import detach

    keep_compiled()
    run = runs.open_run(args.workdir, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    config: Any = run.config
    for override in overrides:
        configs.override(config, override)
    config.data.row_multiple = math.lcm(config.data.row_multiple, jax.device_count())
    data = open_data(config, run.task, run.workdir)
    check_needs(run.task, data)
    with Bar("examples", args.examples) as bar:

        def batches():
            for batch in data.train_batches(0, data.batches_per_epoch):
                yield batch
                bar.advance(len(batch["audio"]))

        found, count = fisher(
            run.task, run.variables, batches(), args.examples, step=run.step, seed=config.train.seed,
            detach=detach(config.optim.freeze),
        )  # fmt: skip
    memory = Memory(_named(found), _named(run.variables["params"]))
    before = config.optim.to_dict().get("ewc")
    if before:  # of an earlier version it may have none
        memory = add(load(Path(before).expanduser()), memory)
    about = dict(step=run.step, digest=run.digest, rows=count, before=before or "")
    log.info("%s: measured on %d rows", save(run.workdir, memory, about), count)
    return 0


def _named(tree: Any) -> Arrays:
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and leaves with an exit code."""
    leave(lambda: run(argv), interrupted="nothing was written; give the same command again",
          full_disk="free some and give the same command again")  # fmt: skip


if __name__ == "__main__":
    main()

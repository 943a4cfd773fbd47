"""Find a learning rate: train with a rate that grows from update to update, and see where the loss falls fastest.

    python -m speechjax.find_rate --config=configs/pretrain/hubert.py:size=tiny --out=runs/rate \\
        --config.data.source=folder:/path/to/recordings

The range test of Smith (2017, section 3.3).  A few hundred updates; writes DIR/rate.png and DIR/rate.json and prints
--config.optim.learning_rate=... to train with.  The rate found is right for the batch size it was found with.
"""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speechjax.errors import UserError
from speechjax.verb import keep_compiled, leave, split_overrides

log = logging.getLogger("speechjax")

DIVERGED = 3.0  # a loss this many times as far above the best as the first one was is the end
MEMORY = 0.9  # of the smoothed loss


class Found(NamedTuple):
    """Rates tried [N], the loss before each update [N] as it was and smoothed, and the rate to train with."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    suggestion: float


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.find_rate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG,...]", help="the experiment")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where picture and numbers go")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="updates (default: %(default)s)")
    parser.add_argument("--low", type=float, default=1e-6, metavar="RATE", help="first rate (default: %(default)s)")
    parser.add_argument("--high", type=float, default=1.0, metavar="RATE", help="last rate (default: %(default)s)")
    args, overrides = split_overrides(parser, argv)
    if args.steps < 20:
        parser.error(f"--steps={args.steps}: at least 20")
    if not 0 < args.low < args.high:
        parser.error(f"--low={args.low} --high={args.high}: rates above 0, the lower one first")
    return args, overrides


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args, overrides = parse_args(argv)
    from speechjax import config as configs
    from speechjax import distributed
    from speechjax.experiment import open_experiment

    distributed.init()
    keep_compiled()
    config: Any = configs.load(args.config, overrides)
    task, data = open_experiment(config, workdir=None)
    found = find_rate(task, config, data, steps=args.steps, low=args.low, high=args.high)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rate.json").write_text(json.dumps(found._asdict(), indent=1) + "\n")
    _draw(found, args.out / "rate.png")
    log.info("picture: %s", args.out / "rate.png")
    log.info("train with --config.optim.learning_rate=%.2g", found.suggestion)
    return 0


def find_rate(task: Any, config: Any, data: Any, *, steps: int, low: float, high: float) -> Found:
    """Trains a new model for at most `steps` updates at rates from `low` to `high`, evenly spaced in their logarithm.

    Ends early once the loss has diverged.  Raises UserError if it never fell.
    """
    import functools

    import jax
    from rich.progress import track

    from speechjax import sharding
    from speechjax.optim import detach, make_optimizer
    from speechjax.step import batch_shapes, compile_steps, init_state
    from speechjax.warm_start import fresh_state

    mesh = sharding.make_mesh(**config.mesh)
    growth = math.log(high / low) / (steps - 1)
    with jax.set_mesh(mesh):
        optim = config.optim.to_dict() | dict(learning_rate=1.0, warmup=0, hold=0, decay="constant")
        tx, _ = make_optimizer(steps=steps, **optim)
        tx = _scaled(tx, lambda count: low * jax.numpy.exp(growth * count.astype(jax.numpy.float32)))
        init = functools.partial(init_state, task, tx, config.train.seed, batch_shapes(data.specs[0], mesh))
        abstract = sharding.placed(mesh, jax.eval_shape(init))
        state = fresh_state(task, init, abstract, config, data)
        programs = compile_steps(
            task, tx, mesh, abstract, data.specs, config.train.seed, 1, config.train.device_seconds,
            detach(config.optim.freeze),
        )  # fmt: skip
        rates: list[float] = []
        losses: list[float] = []
        batches = sharding.on_device(mesh, data.train_batches(0, steps, *sharding.host_part(mesh)))
        for number, (batch, _) in enumerate(track(batches, total=steps, description="updates", transient=True)):
            state, meters = programs[batch["audio"].shape](state, batch)
            total, weight = jax.device_get(meters["loss"])
            loss = float(total / weight) if weight else math.inf
            rates.append(low * math.exp(growth * number))
            losses.append(loss)
            if _diverged(losses):
                break
    return judge(rates, losses)


def _scaled(tx: Any, scale: Any) -> Any:
    """`tx` with its updates times `scale(number of the update)`."""
    import optax

    return optax.chain(tx, optax.scale_by_schedule(scale))


def _diverged(losses: Sequence[float]) -> bool:
    smooth = _smooth(losses)
    if len(losses) < 10:
        return not math.isfinite(losses[-1])
    best = min(smooth)
    span = max(smooth[0] - best, 0.02 * abs(smooth[0]))
    return not math.isfinite(losses[-1]) or smooth[-1] > best + DIVERGED * span


def _smooth(losses: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias of its start; what is not finite is left out."""
    values, total, weight = [], 0.0, 0.0
    for loss in losses:
        if math.isfinite(loss):
            total, weight = MEMORY * total + loss, MEMORY * weight + 1
        values.append(total / weight if weight else math.inf)
    return values


def judge(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """The rate at which the smoothed loss falls fastest, per factor of the rate, before its minimum.

    Raises UserError where the loss never fell below where it began.
    """
    smooth = _smooth(losses)
    least = min(range(len(smooth)), key=lambda k: smooth[k])
    if least < 3 or smooth[least] >= smooth[0]:
        raise UserError("the loss did not fall at any rate: try a lower --low, more --steps, or look at the data")
    reach = max(2, len(smooth) // 40)
    slopes = {
        k: (smooth[min(k + reach, least)] - smooth[max(k - reach, 0)]) / (min(k + reach, least) - max(k - reach, 0))
        for k in range(1, least)
    }
    steepest = min(slopes, key=lambda k: slopes[k])
    return Found(list(rates), list(losses), smooth, rates[steepest])


def _draw(found: Found, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="C0", alpha=0.25, label="loss")
    axes.plot(found.rates, found.smooth, color="C0", label="smoothed")
    axes.axvline(found.suggestion, color="C1", linestyle="--", label=f"falls fastest: {found.suggestion:.2g}")
    low, high = min(found.smooth), found.smooth[0]
    axes.set_ylim(low - 0.3 * (high - low), high + 1.0 * (high - low))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Searches and leaves with an exit code."""
    leave(lambda: run(argv), interrupted="nothing was written", full_disk="free some and give the command again")


if __name__ == "__main__":
    main()

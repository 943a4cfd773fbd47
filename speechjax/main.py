"""Pretrain or fine-tune: the main job.

    python -m speechjax.main --config=configs/pretrain/wav2vec2.py:size=tiny --workdir=runs/mine \\
        --config.data.source=folder:/path/to/recordings --config.train.steps=2000

Any key of the config can be overridden as --config.block.key=value.  The job resumes by itself if the workdir
holds a checkpoint.  Exit codes: 0 done, 42 restart me (pre-empted, a process of the job lost or hanging), 3 stopped on
non-finite loss, 1 error.  Several processes are started by python -m speechjax.launch.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechjax.verb import keep_compiled, keep_memory, leave, split_overrides, step_in_main_thread


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known flags and the config overrides, "--config." stripped."""
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.main", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG,...]", help="the experiment")
    parser.add_argument("--workdir", required=True, type=Path, help="where everything of the run goes")
    limit = functools.partial(parser.add_argument, type=float, metavar="SECONDS")
    limit("--start-seconds", default=600.0, help="for all processes of the job to start (default: %(default)g)")
    limit("--peer-seconds", default=100.0, help="without a sign of life a process is lost (default: %(default)g)")
    limit("--stall-seconds", default=1800.0, help="a step may take, an evaluation ten times that; 0: for ever "
          "(default: %(default)g)")  # fmt: skip
    args, overrides = split_overrides(parser, argv)
    for name in ("start_seconds", "peer_seconds", "stall_seconds"):
        if not 0 <= getattr(args, name) < float("inf") or (not getattr(args, name) and name != "stall_seconds"):
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name):g}: must be positive")
    return args, overrides


def run(argv: Sequence[str] | None) -> int:
    """The job, from the command line to an exit code."""
    args, overrides = parse_args(argv)
    from speechjax import config as configs

    config: Any = configs.load(args.config, overrides)

    import jax

    from speechjax import distributed

    keep_compiled()
    step_in_main_thread()
    distributed.init(start_seconds=args.start_seconds, peer_seconds=args.peer_seconds)
    keep_memory()
    distributed.watchdog.patience = args.stall_seconds
    distributed.watchdog.expect("the data and the compiled step", times=10)
    distributed.agree("the settings", configs.digest(config))
    if jax.process_index() == 0:
        configs.claim_workdir(args.workdir, config)

    from speechjax.experiment import open_experiment
    from speechjax.train import train

    _, data = open_experiment(config, args.workdir)
    if jax.process_index() == 0:
        configs.claim_workdir(args.workdir, config)  # again: the data may have said how many classes there are
    return train(config, data, args.workdir)


def _lost(error: BaseException) -> bool:
    """Whether another process of the job is behind this."""
    from speechjax import distributed

    return distributed.is_lost(error)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the job and leaves with its exit code."""
    leave(
        lambda: run(argv),
        lost=_lost,
        interrupted="the same command resumes from the last checkpoint",
        full_disk="free some and give the same command again, it resumes",
    )


if __name__ == "__main__":
    main()

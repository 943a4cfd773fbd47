"""Run the main job on this machine, a cluster or a cloud.

    python -m speechjax.launch local --processes=2 --config=configs/pretrain/wav2vec2.py:size=tiny --workdir=runs/two
    python -m speechjax.launch slurm --nodes=4 --gpus-per-node=8 --time=24:00:00 --config=... --workdir=/shared/runs/a
    python -m speechjax.launch gke --tpu=v5e:8x8 --image=IMAGE --mount=/shared=CLAIM --config=... --workdir=/shared/a
    python -m speechjax.launch tpu-vm --tpu=v5e:4x4 --zone=europe-west4-b --config=... --workdir=/shared/runs/a
    python -m speechjax.launch skypilot --accelerators=H100:8 --mount=/shared=gs://BUCKET --config=... --workdir=...

TARGET --help lists the flags of a target; --config.key=value goes on to speechjax.main.  --dry-run prints exactly what
would be written and run.  Every target starts the job again while it ends with code 42 (pre-empted, a peer
lost, stalled), and never after an error, which the 42 of the other processes does not hide.  local and tpu-vm end with
the code of the job; slurm, gke and skypilot as soon as it is in the queue.
"""

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from speechjax.errors import UserError
from speechjax.launching import gke, local, skypilot, slurm, tpu_vm
from speechjax.launching.flags import name_of, natural
from speechjax.launching.render import ROOT, submit
from speechjax.verb import leave, split_overrides

JOB_FLAGS = ("start-seconds", "peer-seconds", "stall-seconds")  # of speechjax.main, which has their defaults
TARGETS = {"local": local, "slurm": slurm, "gke": gke, "tpu-vm": tpu_vm, "skypilot": skypilot}


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known flags, and the arguments of the main job."""
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET", help=", ".join(TARGETS))
    for name, target in TARGETS.items():
        one = targets.add_parser(name, description=target.SUMMARY, allow_abbrev=False)
        one.add_argument("--config", required=True, metavar="FILE.py[:ARG,...]", help="the experiment")
        one.add_argument("--workdir", required=True, help="where everything of the run goes; shared by all machines")
        one.add_argument("--dry-run", action="store_true", help="print what would be written and run")
        for flag in JOB_FLAGS:
            one.add_argument(f"--{flag}", type=float, metavar="SECONDS", help="as of speechjax.main")
        target.add_flags(one)
        if one.get_default("restarts") is not None:
            one.add_argument("--restarts", type=natural, default=one.get_default("restarts"), metavar="N",
                             help="after exit code 42 (default: %(default)s)")  # fmt: skip
        if target is not local:
            one.add_argument("--name", help="of the job (default: from --workdir)")
            one.add_argument("--file", type=Path, help="where the job file goes (default: runs/launch/NAME)")
    args, args.overrides = split_overrides(parser, argv)
    given = {flag: getattr(args, flag.replace("-", "_")) for flag in JOB_FLAGS}
    limits = [f"--{flag}={value:g}" for flag, value in given.items() if value is not None]
    overrides = [f"--config.{text}" for text in args.overrides]
    return args, [f"--config={args.config}", f"--workdir={args.workdir}", *limits, *overrides]


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args, job = parse_args(argv)
    target = TARGETS[args.target]
    if target is local:
        return local.run(args, job)
    plan = target.plan(args, job)
    if target is not slurm:
        check_travels(args.config)
    check_config(args.config, args.overrides)
    file = args.file or Path("runs/launch") / f"{name_of(args)}{plan.suffix}"
    return submit(plan, file, dry_run=args.dry_run)


def check_travels(config: str) -> None:
    """UserError unless the machines will have this file: the checkout goes there, and what is on a shared disk is."""
    path = Path(config.partition(":")[0])
    if path.suffix == ".py" and (path.is_absolute() or not (ROOT / path).is_file()):
        raise UserError(f"--config={config}: the machines have this checkout alone; name a file of it from {ROOT}")


def check_config(config: str, overrides: Sequence[str]) -> None:
    """UserError for what the main job would refuse: better now than hours later, at the head of a queue.

    What begins with another run can only be checked where that run is.
    """
    if config.partition(":")[0].endswith(".json") or any(text.startswith("init_from=") for text in overrides):
        return
    from speechjax import config as configs

    configs.load(config, overrides)


def main(argv: Sequence[str] | None = None) -> None:
    """Launches and leaves with an exit code; SIGTERM stops what is no job yet as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    leave(lambda: run(argv), interrupted="look at what is running with the tools of the target before the next start",
          full_disk="free some, or name another place with --workdir and --file")  # fmt: skip


if __name__ == "__main__":
    main()

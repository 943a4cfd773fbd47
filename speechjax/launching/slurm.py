"""SLURM: a batch script with one process a node, which puts itself back into the queue on exit code 42."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from speechjax.errors import UserError
from speechjax.launching.flags import count, name_of, natural, node_local
from speechjax.launching.render import FILE, Plan, fill, words

SUMMARY = "a batch job; put back into the queue while it ends with code 42"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=natural, default=0, metavar="N", help="(default: none, CPUs)")
    parser.add_argument("--cpus", type=count, metavar="N", help="cores a node (default: the partition's)")
    parser.add_argument("--time", metavar="[DAYS-]HH:MM:SS", help="until it is saved and queued again")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--sbatch", action="append", default=[], metavar="--FLAG=VALUE", help="any other option of "
                        "sbatch, as --sbatch=--qos=high; may be repeated")  # fmt: skip
    parser.add_argument("--setup", default="", metavar="COMMAND", help="runs in the job before it begins, e.g. "
                        "'module load cuda'")  # fmt: skip
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="(default: %(default)s)")
    parser.set_defaults(restarts=100)


def plan(args: argparse.Namespace, job: Sequence[str]) -> Plan:
    """The batch script and the command that submits it.  Raises UserError for what sbatch could not read."""
    logs = Path(args.workdir).absolute() / "logs"
    options = {
        "gpus-per-node": args.gpus_per_node or None,
        "cpus-per-task": args.cpus,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
    }
    lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
    for line in (*lines, *args.sbatch):
        if not re.fullmatch(r"--?[\w-]+([= ][^\s\"'\\#]*)?", line):
            raise UserError(f"{line!r}: an option of sbatch is --NAME=VALUE without blanks and quotes")
    if args.time and not re.fullmatch(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", args.time):
        raise UserError(f"--time={args.time}: minutes, HH:MM:SS or DAYS-HH:MM:SS")
    # A task sees but the GPU of its local number; this is for one process with all of them.
    devices = ",".join(map(str, range(args.gpus_per_node)))
    values = dict(
        name=name_of(args),
        nodes=str(args.nodes),
        output=_path(f"{logs}/slurm-", "--workdir").replace("%", "%%") + "%j.log",
        folder=_path(str(Path.cwd()), "the current folder"),
        options="\n".join(f"#SBATCH {line}" for line in (*lines, *args.sbatch)),
        restarts=str(args.restarts),
        devices=f"export JAX_LOCAL_DEVICE_IDS={devices}" if devices else "",
        cpus="export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" if args.cpus else "",
        setup=args.setup,
        main=words([args.python, "-m", "speechjax.main", *job]),
    )
    hints = ()
    if args.nodes > 1 and node_local(logs):
        hints = (f"--workdir={args.workdir} is on a disk of one node; all nodes must see the same folder",)
    return Plan(
        fill("slurm.sbatch", values), ".sbatch", ("sbatch", FILE), "submit from a login node of the cluster",
        folders=(logs,), hints=hints,
    )  # fmt: skip


def _path(text: str, what: str) -> str:
    """The inside of quotes in an #SBATCH line."""
    if not text.isprintable() or re.search(r"[\"\\]", text):
        raise UserError(f"{what}, {text!r}: sbatch cannot read quotes, backslashes and line breaks in a path")
    return text

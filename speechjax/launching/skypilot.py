"""SkyPilot: a managed job on any cloud, recovered on exit code 42 and when a spot machine is taken away."""

import argparse
import re
from collections.abc import Sequence

from speechjax.errors import UserError
from speechjax.launching.flags import count, covered, name_of, parse_mounts
from speechjax.launching.render import FILE, ROOT, Plan, fill, words, yaml

SUMMARY = "a managed job on any cloud; recovered while it ends with code 42"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--accelerators", metavar="NAME:COUNT", help="of each node, e.g. H100:8, tpu-v6e-8 (default: "
                        "none, CPUs)")  # fmt: skip
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--mount", action="append", default=[], metavar="PATH=STORE", help="a bucket (gs://..., "
                        "s3://...) where --workdir or data is; may be repeated")  # fmt: skip
    parser.add_argument("--infra", metavar="CLOUD[/REGION]", help="(default: the cheapest)")
    parser.add_argument("--spot", action="store_true", help="on spot machines")
    parser.set_defaults(restarts=None)


def plan(args: argparse.Namespace, job: Sequence[str]) -> Plan:
    """The task and the command that launches it.  Raises UserError for what SkyPilot would refuse."""
    accelerators = args.accelerators or ""
    if accelerators and not re.fullmatch(r"[\w.-]+(:\d+)?", accelerators):
        raise UserError(f"--accelerators={accelerators}: a name, : and how many a node has, e.g. H100:8")
    mounts = parse_mounts(args.mount)
    if not covered(args.workdir, mounts):
        raise UserError(
            f"--workdir={args.workdir} would vanish with its machine: put it into a bucket, e.g. "
            "--mount=/shared=gs://BUCKET --workdir=/shared/runs/NAME"
        )
    resources = {"accelerators": args.accelerators, "infra": args.infra, "use_spot": args.spot or None}
    tpu = accelerators.startswith("tpu")
    values = dict(
        name=name_of(args),
        nodes=str(args.nodes),
        root=yaml(str(ROOT)),
        mounts="\n".join(f"{yaml(path)}: {yaml(store)}" for path, store in mounts.items()),
        resources="\n".join(f"{key}: {yaml(value)}" for key, value in resources.items() if value is not None),
        install=fill("install.bash", dict(package=".[tpu]" if tpu else ".[gpu]" if accelerators else ".")),
        # The hosts of a TPU slice find each other; other nodes are told.
        exports="" if tpu else fill("skypilot_nodes.bash", {}),
        main=words([".venv/bin/python", "-m", "speechjax.main", *job]),
    )
    command = ("sky", "jobs", "launch", "--yes", FILE)
    return Plan(
        fill("skypilot.yaml", values), ".yaml", command, 'pip install "skypilot[gcp]" (or aws, kubernetes, ...)'
    )

"""Cloud TPU VMs: a script that asks for a slice, installs this checkout on it, and runs the job there to its end."""

import argparse
import re
import subprocess
from collections.abc import Sequence

from speechjax.errors import UserError
from speechjax.launching.flags import name_of, node_local
from speechjax.launching.render import FILE, ROOT, Plan, fill, quote, words
from speechjax.launching.tpus import parse_slice

SUMMARY = "a queued resource of the Cloud TPU API (v4 to v6e); this command waits for it and for the job"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tpu", required=True, metavar="TYPE:TOPOLOGY", help="e.g. v5e:4x4, v5p:2x2x2, v6e:4x8")
    parser.add_argument("--zone", required=True, metavar="ZONE", help="e.g. europe-west4-b")
    parser.add_argument("--project", metavar="ID", help="(default: gcloud's)")
    parser.add_argument("--spot", action="store_true", help="cheaper, may be taken away; then another one is asked for")
    parser.add_argument("--runtime-version", metavar="NAME", help="(default: the one for the generation)")
    parser.add_argument("--setup", default=":", metavar="COMMAND", help="runs on every host before the installation, "
                        "e.g. what mounts the shared disk")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="the slice stays, and costs, after the job (default: one "
                        "that this command has asked for is deleted)")  # fmt: skip
    parser.set_defaults(restarts=100)


def plan(args: argparse.Namespace, job: Sequence[str]) -> Plan:
    """The script that drives the slice from here.  Raises UserError for generations that the API does not serve."""
    tpu = parse_slice(args.tpu)
    if not tpu.names.api:
        raise UserError(
            f"--tpu={args.tpu}: the Cloud TPU API serves v4, v5e, v5p and v6e; for {tpu.generation} use gke"
        )
    for flag in ("zone", "project", "runtime_version"):
        if (value := getattr(args, flag)) and not re.fullmatch(r"[a-z][-a-z0-9.:]*", value):
            raise UserError(f"--{flag.replace('_', '-')}={value}: no name of Google Cloud")
    if "\n" in args.setup:
        raise UserError("--setup: one line; put more into a script on the shared disk")
    where = [f"--zone={args.zone}"] + ([f"--project={args.project}"] if args.project else [])
    asked = [
        f"--accelerator-type={tpu.accelerator_type}",
        f"--runtime-version={args.runtime_version or tpu.names.runtime}",
    ]
    values = dict(
        name=name_of(args),
        root=quote(str(ROOT)),
        restarts=str(args.restarts),
        keep="true" if args.keep else "false",
        where=" ".join(map(quote, where)),
        asked=" ".join(map(quote, asked + (["--spot"] if args.spot else []))),
        setup=args.setup,
        install=fill("install.bash", dict(package=".[tpu]")),
        main=words([".venv/bin/python", "-m", "speechjax.main", *job]),
    )
    return Plan(
        fill("tpu_vm.bash", values), ".bash", ("bash", FILE), "install bash",
        hints=tuple(_hints(args, tpu.hosts)),
    )  # fmt: skip


def _hints(args: argparse.Namespace, hosts: int) -> list[str]:
    found = []
    if hosts > 1 and (not args.workdir.startswith("/") or node_local(args.workdir)):
        found.append(
            f"--workdir={args.workdir} is on each host's own disk; all {hosts} must see the same folder: mount one "
            "with --setup, e.g. --setup='sudo mount -t nfs ADDRESS:/share /shared'"
        )
    changed = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain"], capture_output=True, text=True)
    if changed.stdout.strip():
        found.append(f"{len(changed.stdout.splitlines())} files differ from the last commit, and only that one goes")
    return found

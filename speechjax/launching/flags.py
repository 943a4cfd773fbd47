"""What the flags of several targets share: types of argparse, and names that every target accepts."""

import argparse
import re
from pathlib import Path

from speechjax.errors import UserError

NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def count(text: str) -> int:
    """At least 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """At least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is less than {least}")
    return number


def name_of(args: argparse.Namespace, longest: int = 63) -> str:
    """--name, or one made from the last part of --workdir; a name that Kubernetes, Google Cloud and SLURM accept.

    Raises UserError for a --name of other characters or more than `longest` of them.
    """
    if args.name is None:
        name = re.sub(r"[^a-z0-9]+", "-", Path(args.workdir).absolute().name.lower()).strip("-")
        name = name if re.match("[a-z]", name) else f"run-{name}"
        return name[:longest].strip("-")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", args.name) or len(args.name) > longest:
        raise UserError(
            f"--name={args.name}: at most {longest} of a-z, 0-9 and -, beginning with a letter, ending without -"
        )
    return args.name


def node_local(path: str | Path) -> bool:
    """Whether a path is surely not shared between machines."""
    return any(Path(path).is_relative_to(folder) for folder in NODE_LOCAL)


def covered(path: str, mounts: dict[str, str]) -> bool:
    """Whether a path lies on one of the mounts, {path: what}."""
    return any(Path(path).is_relative_to(mount) for mount in mounts)


def parse_mounts(texts: list[str]) -> dict[str, str]:
    """{path: what} of --mount=PATH=WHAT.  Raises UserError for anything else."""
    found = {}
    for text in texts:
        path, _, what = text.partition("=")
        if not path.startswith("/") or not what:
            raise UserError(f"--mount={text}: an absolute path, =, and what is mounted there")
        found[path] = what
    return found

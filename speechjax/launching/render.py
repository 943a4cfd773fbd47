"""Job files: templates of launch/ filled in, words quoted for bash and YAML, and how a file is handed over."""

import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechjax.errors import UserError

log = logging.getLogger("speechjax")

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
FILE = "{file}"  # stands for the job file in a plan's command

# What YAML forbids or reads as a line break, and JSON leaves as it is.
_NOT_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class Plan:
    """A job file, and the command that hands it over.

    `missing` says what to do where there is no such command; `folders` must be there before; `hints` are about what
    nobody can check from here.
    """

    text: str
    suffix: str
    command: tuple[str, ...]
    missing: str
    folders: tuple[Path, ...] = ()
    hints: tuple[str, ...] = ()


def submit(plan: Plan, file: Path, *, dry_run: bool) -> int:
    """Writes the job file and becomes the command, or prints both.

    Raises UserError where the command is not installed or the file cannot be written.
    """
    command = [str(file) if word == FILE else word for word in plan.command]
    for hint in plan.hints:
        log.warning("%s", hint)
    if dry_run:
        print(plan.text, end="")
        print(f"# Without --dry-run: this goes to {quote(str(file))}, then\n#   {shlex.join(command)}")
        return 0
    if not shutil.which(command[0]):
        raise UserError(f"there is no {command[0]} here: {plan.missing}, or look at the job with --dry-run")
    for folder in (file.parent, *plan.folders):
        folder.mkdir(parents=True, exist_ok=True)
    file.write_text(plan.text, encoding="utf-8")
    log.info("%s", shlex.join(command))
    sys.stdout.flush()
    os.execvp(command[0], command)  # which gets all signals from now on


def fill(name: str, values: Mapping[str, str]) -> str:
    """The template launch/<name> with every {{key}} replaced; one alone on its line gives its indentation to all lines.

    An empty value alone on its line takes the line with it.  Raises UserError outside of a checkout, KeyError where
    template and values do not fit.
    """
    path = ROOT / "launch" / name
    if not path.is_file():
        raise UserError(f"no template {path}: launch from a checkout of the repository (pip install --editable .)")
    text, used = path.read_text(encoding="utf-8"), set()

    def block(found: re.Match[str]) -> str:
        used.add(found[2])
        return "".join(f"{found[1]}{line}\n" for line in values[found[2]].splitlines())

    def word(found: re.Match[str]) -> str:
        used.add(found[1])
        return values[found[1]]

    lines = []
    for line in text.splitlines(keepends=True):  # line by line, so that nothing in a value is taken for a key
        alone = re.fullmatch(r"([ \t]*)\{\{(\w+)\}\}\n", line)
        lines.append(block(alone) if alone else re.sub(r"\{\{(\w+)\}\}", word, line))
    if unused := values.keys() - used:
        raise KeyError(f"{name} does not use {', '.join(sorted(unused))}")
    return "".join(lines)


def quote(text: str) -> str:
    """One word of bash that means exactly `text`, on one line, in printable characters whatever the locale."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = (
        char if char.isprintable() else "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in text.replace("\\", "\\\\").replace("'", "\\'")
    )  # fmt: skip
    return f"$'{''.join(escaped)}'"


def words(arguments: Sequence[str]) -> str:
    """Words of bash, one a line: the inside of an array."""
    return "\n".join(map(quote, arguments))


def yaml(value: object) -> str:
    """Any JSON value in one line of YAML.  Raises UserError for bytes that are no text."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{text!r} is not UTF-8, which a manifest must be") from None
    return _NOT_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def kubernetes_words(arguments: Sequence[str]) -> list[str]:
    """A container's command that means `arguments`: Kubernetes would expand $(NAME), and $$ is its plain $."""
    return [argument.replace("$", "$$") for argument in arguments]

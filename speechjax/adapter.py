"""Adapters of a fine-tuned run: into a small file, and from files into the weights of the run they were trained on.

    python -m speechjax.adapter save --workdir=runs/digits --out=digits.safetensors --include=. --name=digits
    python -m speechjax.adapter show digits.safetensors
    python -m speechjax.adapter merge --workdir=runs/hubert --adapter=digits.safetensors --out=runs/hubert_digits
    python -m speechjax.adapter merge --workdir=runs/digits --out=runs/digits_merged

    python -m speechjax.adapter save --workdir=runs/kids --out=kids.safetensors --name=kids
    python -m speechjax.adapter merge --workdir=runs/hubert --adapter=kids.safetensors --adapter=digits.safetensors \\
        --out=runs/hubert_kids_digits

save takes what learnt beside config.model.adapters, and of the head what --include names, with its state and with the
vocabularies of the run, which say what its classes are.  --name gives an adapter a name of its own: every trains= of
the configs calls its adapter "task", and of two that are stacked none may have the other's.

merge writes a folder that every command reads like a run's: its encoder has no adapters and does what the one with them
did; head, task and vocabularies are those of the file that brings a whole head, else those of --workdir.  Several
--adapter (files, or folders of peft) are merged in the order given, after those that the run itself has, into the run
that they were trained on, all at once: a merged encoder is another one, for which adapters of the first are refused.
WORKDIR is only read; WORKDIR@STEP, @best and @newest name a checkpoint of it.
"""

import argparse
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechjax.errors import UserError
from speechjax.verb import leave

log = logging.getLogger("speechjax")

_WORDS = ("text", "text_steps", "units", "label")  # of config.data: what the classes of a head are
# The vocabularies that a run has, by what there is of these.
_EXPECTED = {"text": ("vocab.json", ".+"), "units": ("phones.json", "phones|speech"), "label": ("labels.json", ".+")}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.adapter", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="save|show|merge")
    save = verbs.add_parser("save", help="write the adapters of a run into a file", allow_abbrev=False)
    save.add_argument("--workdir", required=True, help="of the run")
    save.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors")
    save.add_argument("--include", default="", metavar="REGEX", help="parameters of the head to put in, by path; . is "
                      "all of it (default: none)")  # fmt: skip
    save.add_argument("--name", action="append", default=[], metavar="[OLD=]NEW", help="what an adapter is called in "
                      "the file; may be given often")  # fmt: skip
    show = verbs.add_parser("show", help="say what a file holds", allow_abbrev=False)
    show.add_argument("file", type=Path, metavar="FILE")
    merge = verbs.add_parser("merge", help="write a run whose weights have the adapters in them", allow_abbrev=False)
    merge.add_argument("--workdir", required=True, help="of the run that the adapters were trained on, or have")
    merge.add_argument("--adapter", action="append", default=[], type=Path, metavar="FILE", help="may be given often")
    merge.add_argument("--vocabulary", type=Path, metavar="DIR", help="folder with the vocabulary of a head whose file "
                       "has none, as those of older versions")  # fmt: skip
    merge.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    if args.verb == "save" and args.out.suffix != ".safetensors":
        parser.error(f"--out={args.out}: name a file that ends in .safetensors")
    return args


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    {"save": save, "show": show, "merge": merge}[args.verb](args)
    return 0


def save(args: argparse.Namespace) -> None:
    """Writes the adapters of a run."""
    from flax.traverse_util import flatten_dict

    from speechjax.adapter_files import read_vocabulary, rename, save_adapter

    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out={args.out}: no such folder: {args.out.absolute().parent}")
    workdir, config, params, extra, step, _ = _open(args.workdir)
    adapters = config["model"].get("adapters")
    if not adapters:
        raise UserError(f"{args.workdir} was trained without config.model.adapters, so it has none to save")
    if inside := [path for path in flatten_dict(extra) if path[1] == "encoder"]:
        raise UserError(
            f"{args.workdir}: {'/'.join(inside[0])} is no parameter, and of the encoder an adapter has only these"
        )
    params, adapters = rename(params, adapters, _names(args.name, adapters))
    about = dict(
        task=config["task"], model={k: v for k, v in config["model"].items() if k != "adapters"},
        data={k: v for k, v in config["data"].items() if k in _WORDS}, step=step,
    )  # fmt: skip
    file = save_adapter(
        args.out, params, adapters, include=args.include, about=about, extra=extra, vocabulary=read_vocabulary(workdir)
    )  # fmt: skip
    log.info("%s: %s", args.out, _size(file))


def _names(given: Sequence[str], adapters: Sequence[Any]) -> dict[str, str]:
    """{old: new} of --name; UserError where it is not clear which adapter is meant."""
    names = {}
    for text in given:
        old, equals, new = text.rpartition("=")
        if not equals and len(adapters) > 1:
            there = ", ".join(block["name"] for block in adapters)
            raise UserError(f"--name={text}: this run has {len(adapters)} adapters ({there}): say --name=OLD={text}")
        names[old if equals else adapters[0]["name"]] = new
    return names


def show(args: argparse.Namespace) -> None:
    """Prints what a file holds."""
    from speechjax.adapter_files import load_adapter

    file = load_adapter(args.file)
    for block in file.adapters:
        options = {key: value for key, value in block.items() if key not in ("kind", "name")}
        print(f"{block['kind']:10} {block['name']}  {json.dumps(options)}")
    model = file.about["model"]
    with_it = [*sorted({name.split("/")[0] for name in file.state}), *file.vocabulary]
    print(f"{'holds':10} {_size(file)}; head: {file.head}{', with ' * bool(with_it)}{', '.join(with_it)}")
    print(f"{'task':10} {json.dumps(file.about['task'])}, step {file.about['step']}")
    print(f"{'model':10} {model['layers']} layers of width {model['width']}, encoder {file.base}")


def merge(args: argparse.Namespace) -> None:
    """Writes a folder like a run's, adapters merged into its weights."""
    from ml_collections import ConfigDict

    from speechjax import runs
    from speechjax.adapter_files import attach, attach_state, attach_vocabulary, load_adapter
    from speechjax.models import adapter_merge

    workdir, config, params, extra, step, digest = _open(args.workdir)
    files = [_peft(path, args.workdir) if path.is_dir() else load_adapter(path) for path in args.adapter]
    own = config["model"].get("adapters", ())
    adapters = [*own, *(block for file in files for block in file.adapters)]
    if not adapters:
        raise UserError(f"{args.workdir} has no adapters of its own; name files with --adapter")
    params = adapter_merge.merge(attach(params, files, own), adapters)
    extra = attach_state(extra, files)
    vocabulary = attach_vocabulary(workdir, files, args.vocabulary)
    for file in files:
        if file.head == "whole":
            config["task"] = file.about["task"]
            config["data"] |= file.about["data"]
            _check_vocabulary(file, vocabulary)
    config["model"]["adapters"] = ()
    merged = dict(workdir=str(args.workdir), digest=digest, adapters=adapters)
    runs.write_run(
        args.out, ConfigDict(config), params, extra, step=step, vocabulary=vocabulary, source=dict(merged=merged)
    )
    log.info("%s: %s in the weights of %s", args.out, ", ".join(f"{b['kind']} {b['name']!r}" for b in adapters),
             args.workdir)  # fmt: skip


def _peft(folder: Path, workdir: str) -> Any:
    """An adapter in the layout of peft, of the model in `workdir`."""
    import jax

    from speechjax import runs
    from speechjax.formats import peft

    return peft.read(folder, runs.open_run(workdir, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])))


def _check_vocabulary(file: Any, vocabulary: dict[str, bytes]) -> None:
    """UserError where the classes of a file's head have names that nobody knows; an evaluation would make up others."""
    for key, (name, pattern) in _EXPECTED.items():
        if re.fullmatch(pattern, file.about["data"].get(key, "")) and name not in vocabulary:
            raise UserError(
                f"{file.path} brings a head and not its {name}, as files of older versions do: save it anew from its "
                "run, or name the folder of that run with --vocabulary"
            )


def _open(which: str) -> tuple[Path, dict[str, Any], Any, Any, int, str]:
    """(workdir, config, params, extra, step, digest) of a run, its arrays on the host."""
    from speechjax import runs

    directory = runs.find_checkpoint(which)
    workdir = directory.parent.parent
    config = runs.read_config(workdir).to_dict()
    params, extra, digest = runs.read_weights(directory)
    return workdir, config, params, extra, int(directory.name), digest


def _size(file: Any) -> str:
    count = sum(leaf.size for leaf in file.leaves.values())
    return f"{len(file.leaves)} arrays of {count:,} parameters, {file.path.stat().st_size / 1e6:.2f} MB"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs and leaves with an exit code."""
    leave(lambda: run(argv), interrupted="give the same command again, with another --out where it had begun",
          full_disk="free some, or name another place with --out")  # fmt: skip


if __name__ == "__main__":
    main()

"""Features of recordings, of any layer of a trained model: for other programs to learn from.

    python -m speechjax.embed --workdir=runs/hubert --out=features.npz talks/ more/interview.wav
    python -m speechjax.embed --workdir=exported/wav2vec2 --layer=6 --out=features talks/
    python -m speechjax.embed --workdir=runs/hubert --layer=all --out=features.npz talk.mp3

--workdir is what speechjax.load takes: a run, WORKDIR@STEP, a folder of transformers, or one of speechjax.export
--format=safetensors.  --out=FILE.npz is one file with an array a recording, named by its path below the folder that
was given; --out=FILE.safetensors the same as safetensors; otherwise --out is a folder with a .npy for every recording,
where what is there already is skipped.  Arrays are float32 [frames, width], of --layer=all [layers + 1, frames, width].

A recording that cannot be read is named, the others are embedded, and the exit code is 1.  Each is heard whole, so its
length is limited by memory.
"""

import argparse
import logging
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.errors import UserError
from speechjax.verb import keep_compiled, leave

log = logging.getLogger("speechjax")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE|FOLDER", help="recordings, or folders of recordings")
    add("--workdir", required=True, help="of a run, or another folder with a model")
    add("--out", required=True, type=Path, metavar="FILE.npz|FILE.safetensors|DIR")
    add("--layer", default="last", metavar="N", help="last (the default), all, or a number: 0 is the input of the "
        "first layer, -1 the output of the last before a norm above it")  # fmt: skip
    args = parser.parse_args(argv)
    if args.layer not in ("last", "all") and not args.layer.removeprefix("-").isdecimal():
        parser.error(f"--layer={args.layer}: last, all or a number")
    return args


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    from speechjax.data.decode import BadAudio
    from speechjax.labelling.progress import Bar
    from speechjax.pretrained import load
    from speechjax.transcribe import find

    one_file = args.out.suffix in (".npz", ".safetensors")
    if one_file and args.out.exists():
        raise UserError(f"--out={args.out} is there already: name a new file")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out={args.out}: no such folder: {args.out.absolute().parent}")
    jobs, failed = find(args.inputs)
    twice = [name for name, count in Counter(name for _, name in jobs).items() if count > 1]
    if twice:
        raise UserError(f"several recordings would be called {twice[0]}: embed each folder into an --out of its own")
    keep_compiled()
    model = load(args.workdir)
    layer = None if args.layer in ("last", "all") else int(args.layer)
    if not one_file:
        jobs = [(path, name) for path, name in jobs if not (args.out / f"{name}.npy").exists()]

    def features() -> Iterator[tuple[str, np.ndarray]]:
        with Bar("embedding", len(jobs)) as bar:
            for path, name in jobs:
                try:
                    yield str(name), _features(model, path, layer, args.layer == "all")
                except (BadAudio, OSError) as error:
                    failed[path] = str(error)
                bar.advance()

    _WRITERS.get(args.out.suffix, _folder)(args.out, features())
    for path, reason in failed.items():
        log.error("%s: %s", path, reason)
    log.info("%s: %d recordings", args.out, len(jobs) - len(failed.keys() & {path for path, _ in jobs}))
    return 1 if failed else 0


def _features(model: Any, path: Path, layer: int | None, everything: bool) -> np.ndarray:
    from speechjax.data.decode import decode

    audio = decode(path)
    return np.stack(model.hidden_states(audio)) if everything else model.features(audio, layer=layer)


def _npz(out: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    """Array by array: all of them need not fit into memory."""
    partial = out.with_name(f".{out.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    partial.replace(out)


def _safetensors(out: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    from speechjax.formats.hf import safetensors

    library = safetensors()
    partial = out.with_name(f".{out.name}.partial")
    partial.write_bytes(library.numpy.save({name: np.asarray(array, order="C") for name, array in arrays}))
    partial.replace(out)


def _folder(out: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    for name, array in arrays:
        path = out / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as file:
            np.save(file, array, allow_pickle=False)
        partial.replace(path)


_WRITERS = {".npz": _npz, ".safetensors": _safetensors}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs and leaves with an exit code."""
    leave(lambda: run(argv), interrupted="the same command goes on in a folder, and begins a file anew",
          full_disk="free some, or name another place with --out")  # fmt: skip


if __name__ == "__main__":
    main()

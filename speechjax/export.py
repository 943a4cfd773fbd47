"""A trained run for other stacks: weights, or whole programs from raw audio to answers.

    python -m speechjax.export --workdir=runs/asr --format=hf --out=exported/asr_hf
    python -m speechjax.export --workdir=runs/asr --format=onnx --dtype=int8 --out=exported/asr_onnx
    python -m speechjax.export --workdir=runs/asr@2000 --format=stablehlo --out=exported/asr

hf           a folder for transformers' from_pretrained: weights, processor, tokenizer, model card; float32, bfloat16,
             float16.  Wav2Vec2, Hubert, WavLM, Data2VecAudio, Wav2Vec2Conformer, Wav2Vec2Bert, with the head of a ctc,
             classify, frames or speaker run.  Adapters are merged.  The way back is speechjax.convert.
onnx         a program for ONNX Runtime and, of ctc runs, sherpa-onnx: any batch, any length; float32, float16, int8
saved_model  a program for TensorFlow: any batch, any length; float32, bfloat16, int8 weights
stablehlo    a program for JAX on CPU, GPU and TPU without this package; float32, bfloat16, int8 weights
litert       a program for phones and small boards, for recordings of up to 4 and 16 s; float32, float16, int8
safetensors  all weights and the config, for speechjax.load and speechjax.convert; float32, bfloat16, float16, int8
peft         the adapters of a run alone, for the library peft

Every export but peft is loaded again and answers the same noise as the run, at two lengths and two batch sizes, one row
padded: a table says how far apart the answers are and how long they took.  Exit code 1 where float32 answers differ, or
others are no numbers.
"""

import argparse
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechjax.errors import UserError
from speechjax.verb import leave

log = logging.getLogger("speechjax")

# The module of speechjax.formats that writes a format, and the types it has.
FORMATS = {
    "hf": ("hf", ("float32", "bfloat16", "float16")),
    "onnx": ("onnx", ("float32", "float16", "int8")),
    "saved_model": ("saved_model", ("float32", "bfloat16", "int8")),
    "stablehlo": ("stablehlo", ("float32", "bfloat16", "int8")),
    "litert": ("litert", ("float32", "float16", "int8")),
    "safetensors": ("flat", ("float32", "bfloat16", "float16", "int8")),
    "peft": ("peft", ("float32",)),
}
_ONLY_HF = {"family": "", "encoder_only": False}  # options of some formats, and what they are unless said


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--workdir", required=True, help="of a run; WORKDIR@STEP, @best and @newest name a checkpoint of it")
    add("--format", required=True, choices=tuple(FORMATS))
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    add("--dtype", default="float32", help="of the weights (default: %(default)s)")
    add("--family", default="", metavar="TYPE", help="hf, peft: the model_type where several will do, e.g. wav2vec2 "
        "for a HuBERT (default: that of its pretraining)")  # fmt: skip
    add("--encoder-only", action="store_true", help="hf: the Model class, without the head")
    add("--no-check", action="store_false", dest="check", help="do not load and try what was written")
    args = parser.parse_args(argv)
    dtypes = FORMATS[args.format][1]
    if args.dtype not in dtypes:
        parser.error(f"--dtype={args.dtype}: --format={args.format} has {', '.join(dtypes)}")
    for name, default in _ONLY_HF.items():
        if getattr(args, name) != default and args.format not in ("hf", *(["peft"] if name == "family" else [])):
            parser.error(f"--{name.replace('_', '-')} is for --format=hf")
    return args


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out={args.out} is there already, and not empty: name a new folder")

    import jax

    from speechjax import runs

    found: Any = runs.open_run(args.workdir, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    if args.format == "hf" and found.config.model.get("adapters"):
        found = _merged(found)
    module: Any = importlib.import_module(f"speechjax.formats.{FORMATS[args.format][0]}")
    options = {name: getattr(args, name) for name in _ONLY_HF if args.format == "hf"}
    options |= {"family": args.family} if args.format == "peft" else {"dtype": args.dtype}
    log.info("writing step %d of %s", found.step, found.workdir)
    path = module.write(found, args.out, **options)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    log.info("%s: %.2f MB (%s %.2f MB)", args.out, size / 1e6, path.name, _size(path) / 1e6)
    return _check(args, found) if args.check and args.format != "peft" else 0


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def _merged(found: Any) -> Any:
    """The run with its adapters in the weights; UserError for kinds that are no change of weights."""
    import dataclasses

    from speechjax import config as configs
    from speechjax.models import adapter_merge

    config = found.config.copy_and_resolve_references()
    params = adapter_merge.merge(found.variables["params"], config.model.adapters)
    log.info("merged: %s", ", ".join(f"{block['kind']} {block['name']!r}" for block in config.model.adapters))
    config.model.adapters = ()
    return dataclasses.replace(
        found, config=config, task=configs.make_task(config), variables={**found.variables, "params": params}
    )


def _check(args: argparse.Namespace, found: Any) -> int:
    """Prints how answers of the export compare with those of the run; an exit code."""
    import json
    import math

    from speechjax.formats import trial

    if found.config.task.name == "language_model":
        log.warning("not tried: a language model does not listen")
        return 0
    encoder_only = False
    if args.format == "hf":  # what has no class there is written without its head
        name = json.loads((args.out / "config.json").read_text())["architectures"][0]
        encoder_only = name.endswith(("Model", "ForPreTraining"))
    try:
        theirs = trial.loader(args.format)(args.out)
    except trial.MissingLibraryError as error:
        log.warning("not tried: %s", error)
        return 0
    result = trial.compare(found, theirs, encoder_only=encoder_only)
    print(trial.table(result))
    if not math.isfinite(result.worst) or (args.dtype == "float32" and result.worst > trial.CLOSE):
        log.error("error: the export answers differently (%.1e): do not use it, and tell us", result.worst)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Runs and leaves with an exit code."""
    leave(lambda: run(argv), interrupted="give the same command again, with another --out where it had begun",
          full_disk="free some, or name another place with --out")  # fmt: skip


if __name__ == "__main__":
    main()

"""A model of another stack as a run here: to go on pretraining, to fine-tune, evaluate, transcribe or export it.

    python -m speechjax.convert --from=hf:facebook/wav2vec2-base --workdir=runs/w2v2
    python -m speechjax.convert --from=hf:/models/my_hubert_ctc --workdir=runs/hubert_ctc
    python -m speechjax.convert --from=fairseq:hubert_base_ls960.pt --workdir=runs/hubert
    python -m speechjax.convert --from=safetensors:exported/asr --workdir=runs/asr

    python -m speechjax.main --config=runs/w2v2/config.json --config.init_from=runs/w2v2 --workdir=runs/more \\
        --config.data.source=folder:/data/audio
    python -m speechjax.main --config=configs/finetune/ctc.py:labels=10h --config.init_from=runs/w2v2 \\
        --workdir=runs/asr --config.data.source=manifest:/data/train.jsonl

hf:           a folder that transformers' save_pretrained wrote, or a name on the hub: Wav2Vec2, Hubert, WavLM,
              Data2VecAudio, Wav2Vec2Conformer, Wav2Vec2Bert; Model, ForPreTraining, ForCTC,
              ForSequenceClassification, ForAudioFrameClassification, ForXVector.  What speechjax.export wrote comes
              back as it was, heads of its objective included.
fairseq:      a .pt of fairseq (wav2vec 2.0, HuBERT, data2vec; fine-tuned with CTC too), of Microsoft's WavLM, or what
              s3prl made of one (s3prl: says the same).  --dictionary names the dict.ltr.txt of old CTC models.
safetensors:  a folder of speechjax.export --format=safetensors.

An encoder without a head becomes a run of the objective that its family was pretrained with, head and codebooks drawn
at random where the file has none.  --encoder-only leaves a head behind.  Nothing in a file is executed: PyTorch's
pickles are read by a reader that cannot import or call anything.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechjax.errors import UserError
from speechjax.verb import leave

log = logging.getLogger("speechjax")

_HUB_FILES = ("*.json", "*.safetensors", "*.txt")
_PICKLES = ("pytorch_model*.bin",)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--from", required=True, dest="source", metavar="KIND:WHAT", help="hf:DIR, hf:ID, fairseq:FILE, s3prl:FILE or "
        "safetensors:DIR")  # fmt: skip
    add("--workdir", required=True, type=Path, metavar="DIR", help="a new folder")
    add("--encoder-only", action="store_true", help="leave the head of a fine-tuned model behind")
    add("--dictionary", type=Path, metavar="FILE", help="dict.ltr.txt of a CTC model of fairseq whose file has none")
    args = parser.parse_args(argv)
    kind, colon, args.what = args.source.partition(":")
    if not colon or not args.what or kind not in _KINDS:
        parser.error(f"--from={args.source}: say {', '.join(f'{kind}:...' for kind in _KINDS)}")
    if args.dictionary and kind not in ("fairseq", "s3prl"):
        parser.error("--dictionary is for fairseq: and s3prl:")
    args.kind = kind
    return args


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    if args.workdir.exists() and (not args.workdir.is_dir() or any(args.workdir.iterdir())):
        raise UserError(f"--workdir={args.workdir} is there already, and not empty: name a new folder")
    _KINDS[args.kind](args)
    return 0


def _hf(args: argparse.Namespace) -> None:
    from speechjax.formats import hf

    folder = Path(args.what).expanduser()
    if not folder.is_dir():
        folder = _download(args.what)
    log.info("reading %s", folder)
    read = hf.read(folder)
    _write(args, read, {}, dict(format="hf", source=args.what))


def _download(name: str) -> Path:
    """The files of a model on the hub, from its cache where they are there; never one that could hold code."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"--from=hf:{name}: no such folder")
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"--from=hf:{name}: no such folder, and to fetch it from the hub: pip install 'speechjax[hub]'"
        ) from None
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_HUB_FILES, *_PICKLES]))
    except Exception as error:  # the library raises many kinds, of its own and of the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"--from=hf:{name}: no such folder, and the hub did not give it ({reason})") from None
    return folder


def _fairseq(args: argparse.Namespace) -> None:
    from speechjax.formats import fairseq_heads, hf
    from speechjax.formats.fairseq import read_fairseq
    from speechjax.formats.families import complete

    log.info("reading %s", args.what)
    found = read_fairseq(Path(args.what).expanduser(), args.dictionary)
    for sentence in found.about["guessed"]:
        log.warning("%s", sentence)
    files = fairseq_heads.tokenizer_files(found)
    read = hf.opened(complete(found.config, {}), found.state, files, {}, {})
    about = {key: found.about[key] for key in ("source", "updates", "guessed")}
    _write(args, read, fairseq_heads.hubert_head(found), dict(format="fairseq", file=Path(args.what).name, **about))


def _write(args: argparse.Namespace, read: Any, more: dict[str, Any], source: dict[str, Any]) -> None:
    """A folder of theirs, and leaves that it has no place for, as a run."""
    import dataclasses

    from speechjax.formats import imports
    from speechjax.runs import write_run

    if args.encoder_only:
        read = dataclasses.replace(read, head=None, state=_encoder(read), ours={}, rest={})
    found: Any = imports.as_run(read)
    config, leaves, files = found
    if config.task.name == "hubert" and more:
        config.task.codes, config.task.projection = more["code_vectors"].shape
        leaves |= more
    params, extra, fresh = imports.variables(config, leaves)
    source |= dict(family=read.family.model_type)
    write_run(args.workdir, config, params, extra, source=source, vocabulary=files, step=read.ours.get("step", 0))
    _report(args.workdir, config, params, fresh)


def _encoder(read: Any) -> dict[str, Any]:
    """The arrays of the encoder alone: no others will be missed, and none is named as without a place."""
    model = read.family.read(read.hf)
    names = {row.theirs for row in read.family.encoder(model, "")}
    return {name: array for name, array in read.state.items() if name in names}


def _safetensors(args: argparse.Namespace) -> None:
    from speechjax.formats import flat
    from speechjax.runs import write_run

    found = flat.read(Path(args.what).expanduser())
    source = dict(format="safetensors", source=args.what)
    write_run(
        args.workdir, found.config, found.params, found.extra, source=source, vocabulary=found.vocabulary,
        step=found.about["step"],
    )  # fmt: skip
    _report(args.workdir, found.config, found.params, [])


def _report(workdir: Path, config: Any, params: Any, fresh: Sequence[str]) -> None:
    import jax

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    shown = ", ".join(fresh[:6]) + (", ..." if len(fresh) > 6 else "")
    log.info("%s: task %s, %.2f M parameters; drawn at random: %s", workdir, config.task.name, size / 1e6,
             shown or "none")  # fmt: skip
    log.info(
        "go on with: python -m speechjax.main --config=%s/config.json --config.init_from=%s --workdir=... "
        "--config.data.source=...", workdir, workdir,
    )  # fmt: skip


_KINDS = {"hf": _hf, "fairseq": _fairseq, "s3prl": _fairseq, "safetensors": _safetensors}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs and leaves with an exit code."""
    leave(lambda: run(argv), interrupted="give the same command again, with another --workdir where it had begun",
          full_disk="free some, or name another place with --workdir")  # fmt: skip


if __name__ == "__main__":
    main()

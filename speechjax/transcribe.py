"""Transcribe recordings of any length, folders of them, or speech as it comes, by a trained task.

    python -m speechjax.transcribe --workdir=runs/asr talk.mp3
    python -m speechjax.transcribe --workdir=runs/asr --format=srt --out=subtitles talks/ more/interview.wav
    python -m speechjax.transcribe --workdir=runs/asr --decode.search=beam --decode.lm=4gram.arpa --format=json talk.wav
    arecord -q -t raw -f S16_LE -r 16000 -c 1 | python -m speechjax.transcribe --workdir=runs/asr -

Without --out results go to standard output.  With it every file has one of its own, written as soon as it is done;
what is there already is skipped, so that the same command goes on after an interruption.  A recording that cannot be
read is named, the others are transcribed, and the exit code is 1.  Folders are searched for audio files.

txt   a line for what is said between two pauses
json  {"file", "seconds", "timing", "text", "segments": [{"start", "end", "text",
      "words": [{"word", "start", "end", "confidence"}]}]}; times in seconds; segments are parted by pauses.
      confidence, from 0 to 1, is the mean posterior of a word's tokens in the frames that emit them (null where the
      task has none).  timing is "frames", or "spread" where the model does not know when a token was said: then they
      are spread evenly over the piece of audio they come from.  Several files to standard output: one a line.
srt   subtitles (SubRip): at most 7 s and two lines of 42 characters each
vtt   subtitles (WebVTT)
ctm   file, channel, start, duration, word, confidence (NIST)

- reads raw 16 bit little-endian mono from standard input (--rate) and prints words (txt, ctm) once they are settled,
with --out to that file; Ctrl-C, or the end, prints the rest.  The last line says how fast it was, and how late.

--decode.NAME=VALUE, as in an evaluation: search (greedy, beam), beams, symbols, best, lm, lm_weight, token_bonus,
word_bonus, lexicon, hot_words, hot_word_bonus, ctc_weight.  With best=N the json of a file has "parts" too, [{"start",
"end", "hypotheses": [{"text", "posterior"}]}]: the N best of every part that was searched by itself, a short recording
being one, a long one several, parted in pauses.  Posteriors add up to 1 over these N, and know no other rival.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

from speechjax.errors import UserError
from speechjax.verb import keep_compiled, leave, split_overrides

log = logging.getLogger("speechjax")

_FORMATS = ("txt", "json", "srt", "vtt", "ctm")
_WINDOW, _OVERLAP, _LIVE_WINDOW = 20.0, 4.0, 8.0  # seconds
_AT_ONCE = ("txt", "ctm")  # formats that grow word by word


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known flags, and what --decode.* override."""
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.transcribe", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE|FOLDER|-", help="recordings, folders of recordings, or a pipe")
    add("--workdir", required=True, help="of a fine-tuned run: tasks ctc, seq2seq, transducer")
    add("--checkpoint", default="", metavar="WHICH", help="best, newest or a step (default: best, or newest where none "
        "was judged yet)")  # fmt: skip
    add("--adapter", action="append", default=[], type=Path, metavar="FILE", help="of speechjax.adapter save, put into "
        "the weights; a head in it comes with its vocabulary; may be given often")  # fmt: skip
    add("--vocabulary", type=Path, metavar="DIR", help="folder with its vocab.json (default: the workdir, or the file "
        "that brings the head)")  # fmt: skip
    add("--format", default="txt", choices=_FORMATS, help="(default: %(default)s)")
    add("--out", type=Path, metavar="DIR|FILE", help="a folder, or for one recording a file that ends in .FORMAT")
    add("--overwrite", action="store_true", help="make results that are there already again")
    add("--window", type=float, metavar="S", help="seconds the encoder hears at a time, at most (default: "
        f"{_WINDOW:g}; of a pipe {_LIVE_WINDOW:g})")  # fmt: skip
    add("--overlap", type=float, default=_OVERLAP, metavar="S", help="of two windows of a file (default: %(default)g)")
    add("--rows", type=int, default=8, metavar="N", help="windows computed at a time (default: %(default)s)")
    add("--rate", type=int, default=16_000, metavar="HZ", help="of a pipe (default: %(default)s)")
    add("--delay", type=float, default=2.0, metavar="S", help="of a pipe: a word waits so long for what follows it, at "
        "most (default: %(default)g)")  # fmt: skip
    args, overrides = split_overrides(parser, argv, ("--decode.",))
    if "" in args.inputs:
        parser.error("an empty name among the recordings; an unset variable?")
    for override in overrides:
        if "=" not in override:
            parser.error(f"--{override}: say --{override}=VALUE")
    args.window = args.window or (_LIVE_WINDOW if "-" in args.inputs else _WINDOW)
    if args.checkpoint not in ("", "best", "newest") and not args.checkpoint.isdecimal():
        parser.error(f"--checkpoint={args.checkpoint}: best, newest, or the number of a step")
    if "-" in args.inputs and len(args.inputs) > 1:
        parser.error("- is a pipe, and stands alone")
    for name, least in (("window", 0), ("overlap", -1), ("rows", 0), ("delay", 0)):
        if not least < getattr(args, name) < math.inf:
            parser.error(f"--{name}={getattr(args, name)}: too small, or not a number")
    if args.overlap < 0:
        parser.error(f"--overlap={args.overlap}: at least 0")
    if not 4_000 <= args.rate <= 384_000:
        parser.error(f"--rate={args.rate}: from 4000 to 384000")
    return args, overrides


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args, overrides = parse_args(argv)
    try:
        return _listen(args, overrides) if args.inputs == ["-"] else _all_files(args, overrides)
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# ---------------------------------------------------------------------------------------------- files


def _all_files(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from speechjax.subtitles import shown

    jobs, failed = find(args.inputs)
    outputs = name_outputs(args, jobs)
    todo = [path for path, _ in jobs if args.overwrite or not (outputs and outputs[path].exists())]
    for path, reason in failed.items():
        log.error("%s: %s", shown(path), reason)
    if skipped := len(jobs) - len(todo):
        log.info("%d of %d are there already; --overwrite makes them again", skipped, len(jobs))
    if todo:
        failed |= _files(args, overrides, todo, outputs, alone=len(jobs) + len(failed) == 1)
    if failed:
        log.error("%d of %d files failed", len(failed), len(failed.keys() | {path for path, _ in jobs}))
    return 1 if failed else 0


def find(inputs: Sequence[str]) -> tuple[list[tuple[Path, Path]], dict[Path, str]]:
    """[(file, what it is called below --out)] of files and folders, and {path: why there is nothing to transcribe}."""
    from speechjax.data.decode import EXTENSIONS

    found: dict[Path, Path] = {}
    failed = {}
    for path in map(Path, inputs):
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.is_file()]
            found |= {p: p.relative_to(path) for p in inside}
            if not inside:
                failed[path] = "no audio files in this folder"
        elif path.exists():
            found[path] = Path(path.name)
        else:
            failed[path] = "no such file"
    return list(found.items()), failed


def name_outputs(args: argparse.Namespace, jobs: Sequence[tuple[Path, Path]]) -> dict[Path, Path]:
    """Where the result of every file goes; {} for standard output.  Raises UserError for names that cannot be."""
    from speechjax.subtitles import ctm_name

    if args.out is None:
        same = Counter(ctm_name(str(name)) for _, name in jobs).most_common(1)
        if args.format == "ctm" and same and same[0][1] > 1:
            raise UserError(f"a CTM of several recordings that are all called {same[0][0]}: name a folder with --out")
        if args.format in ("srt", "vtt") and len(jobs) > 1:
            raise UserError(f"subtitles of {len(jobs)} files need files of their own: name a folder with --out")
        return {}
    if _is_one_file(args):
        if len(jobs) > 1:
            raise UserError(f"--out={args.out} is one file for {len(jobs)} recordings: name a folder")
        return {path: args.out for path, _ in jobs}
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out={args.out} is a file; name a folder, or a file that ends in .{args.format}")
    # talk.wav and talk.mp3 in one folder keep their endings.
    short = Counter(name.with_suffix("") for _, name in jobs)
    names = {
        path: Path(f"{name if short[name.with_suffix('')] > 1 else name.with_suffix('')}.{args.format}")
        for path, name in jobs
    }
    shared = [name for name, count in Counter(names.values()).items() if count > 1]
    if shared:
        raise UserError(f"several recordings would be written to {args.out / shared[0]}; give one --out to each folder")
    return {path: args.out / name for path, name in names.items()}


def _is_one_file(args: argparse.Namespace) -> bool:
    """Whether --out is a file, and no folder.  Raises UserError for one of another format, and one in no folder."""
    ending = args.out.suffix.removeprefix(".")
    if ending not in _FORMATS or args.out.is_dir():
        return False
    if ending != args.format:
        raise UserError(f"--out={args.out} would be {args.format}: add --format={ending}")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out={args.out}: no such folder: {args.out.absolute().parent}")
    return True


def _files(
    args: argparse.Namespace, overrides: Sequence[str], todo: Sequence[Path], outputs: dict[Path, Path], alone: bool
) -> dict[Path, str]:
    """Transcribes, writes, and gives {path: why it failed}."""
    import jax

    from speechjax.labelling.progress import Bar
    from speechjax.logs import replace_file
    from speechjax.subtitles import FORMATS, Transcript, as_json, shown

    known = [_seconds(path) for path in todo]
    # What is short needs no long windows, and what is little no full batch.
    longest = math.ceil(min(max(known), args.window))
    args.window = min(args.window, max(longest, 2 * args.overlap) + 1.0)
    step = max(args.window - args.overlap, 1.0)
    args.rows = math.ceil(min(args.rows, sum(max(1.0, seconds / step) for seconds in known)))
    failed = {}
    model = open_model(args, overrides)
    total = round(sum(seconds for seconds in known if seconds < math.inf))
    with jax.set_mesh(model.mesh), Bar("transcribing, seconds", total) as bar:
        for path, result in model(todo, bar.advance):
            if not isinstance(result, Transcript):
                failed[path] = result
                log.error("%s: %s", shown(path), result)
                continue
            if not result.words:
                log.warning("%s: no words in %.1f s", result.file, result.seconds)
            if outputs:
                outputs[path].parent.mkdir(parents=True, exist_ok=True)
                replace_file(outputs[path], FORMATS[args.format](result).encode())
            elif args.format == "json" and not alone:
                print(json.dumps(as_json(result), ensure_ascii=False), flush=True)
            elif args.format == "txt" and not alone:
                print(f"{result.file}\t{result.text}", flush=True)
            else:
                print(FORMATS[args.format](result), end="", flush=True)
    return failed


def _seconds(path: Path) -> float:
    """Of audio, by the header; infinity where that does not say."""
    import soundfile

    from speechjax.data.decode import for_soundfile

    if not path.is_file():  # a named pipe would wait for a writer
        return 0.0
    try:
        info = soundfile.info(for_soundfile(str(path)))
    except (RuntimeError, OSError):  # transcribing it will say what is wrong
        return 0.0
    return info.duration if 0 <= info.duration < 1e6 else math.inf


# ---------------------------------------------------------------------------------------------- the model


def open_model(args: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """The `Transcriber` that the arguments name; UserError where there is none."""
    import jax
    from ml_collections import ConfigDict

    from speechjax import config as configs
    from speechjax import runs, sharding
    from speechjax.data.text import load_tokenizer
    from speechjax.recognition import Decoding
    from speechjax.transcription import Transcriber

    block: Any = ConfigDict({"decode": dataclasses.asdict(Decoding())})
    for override in overrides:
        configs.override(block, override)
    decoding = Decoding(**block.decode)
    if decoding.best > 1 and (args.format != "json" or args.inputs == ["-"]):
        raise UserError(f"decode.best={decoding.best}: only --format=json of files has room for so many hypotheses")
    keep_compiled()
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    which = f"{args.workdir}@{args.checkpoint}" if args.checkpoint else args.workdir
    found = runs.open_run(which, sharding.replicated(mesh))
    task, variables = found.task, found.variables
    if args.adapter:
        task, variables, tokenizer = _adapted(args, found, sharding.replicated(mesh))
    else:
        tokenizer = load_tokenizer(args.vocabulary or found.workdir)
    if (classes := getattr(task, "classes", tokenizer.size)) != tokenizer.size:
        raise UserError(f"{args.workdir} was trained with {classes} tokens, and its vocabulary has {tokenizer.size}: "
                        "name the right one with --vocabulary")  # fmt: skip
    with jax.set_mesh(mesh):
        model = Transcriber(
            task, variables, tokenizer, decoding, mesh, seconds=args.window, overlap=args.overlap, rows=args.rows
        )
    log.info("%s at step %d, %s search", found.workdir, found.step, decoding.search)
    return model


def _adapted(args: argparse.Namespace, found: Any, place: Any) -> tuple[Any, dict[str, Any], Any]:
    """(task, variables, tokenizer) of a run with the adapters of files, and with the head that one of these brings."""
    import jax

    from speechjax import config as configs
    from speechjax.adapter_files import attach, attach_state, attach_vocabulary, load_adapter, write_vocabulary
    from speechjax.data.text import load_tokenizer

    files = [load_adapter(path) for path in args.adapter]
    config: Any = configs.ConfigDict(found.config.to_dict())
    own = config.model.to_dict().get("adapters", ())
    variables = jax.tree.map(jax.device_get, found.variables)
    params = attach(variables.pop("params"), files, own)
    extra = attach_state(variables, files)
    config.model.adapters = (*own, *(block for file in files for block in file.adapters))
    for file in files:
        if file.head == "whole":
            config.task = configs.ConfigDict(file.about["task"])
    folder = args.vocabulary or found.workdir
    vocabulary = attach_vocabulary(folder, files, args.vocabulary)
    if "vocab.json" not in vocabulary:  # of an older version, or of a run without
        log.warning("no adapter holds a vocabulary: that of %s is taken", folder)
        tokenizer = load_tokenizer(folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_vocabulary(Path(folder), vocabulary)
            tokenizer = load_tokenizer(folder)
    return configs.make_task(config), jax.device_put({"params": params, **extra}, place), tokenizer


# ---------------------------------------------------------------------------------------------- pipes


def _listen(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    if args.out and not _is_one_file(args):
        raise UserError(f"--out={args.out}: of a pipe a file that ends in .{args.format}")
    if args.out and args.out.exists() and not args.overwrite:
        raise UserError(f"--out={args.out} is there already; --overwrite makes it again")
    if sys.stdin is None:
        raise UserError("- reads audio from a pipe, and standard input is closed: put a recorder before it")
    if sys.stdin.isatty():
        raise UserError("- reads audio from a pipe, and standard input is a terminal: put a recorder before it")
    import jax

    from speechjax.live import Listener, Pipe, listen
    from speechjax.logs import replace_file
    from speechjax.subtitles import FORMATS, ctm_line

    pipe = Pipe(cast(BufferedIOBase, sys.stdin.buffer), args.rate)  # at once, since a recorder does not wait
    args.rows, args.overlap = 1, 0.0  # --delay says how windows of a pipe overlap
    model = open_model(args, overrides)

    def stop(*_: Any) -> None:
        pipe.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one ends it

    with jax.set_mesh(model.mesh):
        listener = Listener(model, args.delay)
        signal.signal(signal.SIGINT, stop)
        pipe.begin()
        at_once = args.format in _AT_ONCE
        line = None if args.format == "txt" else (lambda word: ctm_line("stdin", word) if at_once else "")
        with open(args.out, "w", encoding="utf-8") if args.out and at_once else nullcontext() as out:
            found = listen(listener, pipe, args.rate, model.spelling.joint, line, out)
    if at_once:
        return 0
    if args.out:
        replace_file(args.out, FORMATS[args.format](found).encode())
    else:
        print(FORMATS[args.format](found), end="", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Transcribes and leaves with an exit code."""
    pipe = "-" in (sys.argv[1:] if argv is None else argv)
    leave(
        lambda: run(argv),
        interrupted="a pipe cannot be gone on with; what was printed, or is in --out as txt or ctm, stays"
        if pipe
        else "with --out, the same command goes on where this one stopped",
        full_disk="free some and give the same command again",
    )


if __name__ == "__main__":
    main()

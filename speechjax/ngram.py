"""Train an n-gram language model for decoding: of characters, words, phones, or the tokens of a run.

    python -m speechjax.ngram --text=news.txt.gz --vocab=runs/mine --order=6 --out=lm.arpa.gz
    python -m speechjax.ngram --source=manifest:/data/train.jsonl --exclude=^test/ --unit=words --order=3 \\
        --normalize="nfkc lowercase no_punctuation single_spaces" --out=words.arpa.gz
    zcat wiki.txt.gz | python -m speechjax.ngram --text=- --unit=phonemes:de --out=phones.arpa

Interpolated modified Kneser-Ney, as KenLM's lmplz.  Writes an ARPA file, gzipped if its name ends in .gz, which other
toolkits read too (in it the space is spelled <space>), and prints the perplexity of texts that are held out.  No audio
is read.  Keep the transcripts that a recogniser is tested on out of its language model: --exclude.
"""

import argparse
import gzip
import logging
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speechjax.errors import UserError
from speechjax.verb import leave

if TYPE_CHECKING:
    from speechjax.decode.ngram import NGram

log = logging.getLogger("speechjax")

Symbols = Sequence[str | None]
_STEPS = "nfc single_spaces"
_UNITS = "characters, words or phonemes:VOICE"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.ngram", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", metavar="FILE", help="texts, one a line, in UTF-8 (.gz: gzipped; -: standard input)")
    given.add_argument("--source", help="transcripts of recordings, as in config.data.source")
    unit = parser.add_mutually_exclusive_group(required=True)
    unit.add_argument("--unit", metavar="UNIT", help=f"what the model is of: {_UNITS}, as eSpeak NG reads")
    unit.add_argument("--vocab", metavar="WORKDIR", help="of the tokens of a run (its vocab.json), normalised as there")
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="FILE", help="the model: .arpa or .arpa.gz")
    add("--order", type=int, default=5, metavar="N", help="longest n-grams (default: %(default)s)")
    add("--normalize", metavar="STEPS", help=f"of texts, as config.data.text_steps (default: {_STEPS})")
    add("--held-out", type=float, default=0.05, metavar="SHARE",
        help="of the texts, by a hash of each, so that all that are alike go there (default: %(default)s)")  # fmt: skip
    add("--field", default="text", help="where in a source's metadata the text is (default: %(default)s)")
    add("--include", default="", metavar="REGEX", help="recordings of a source to take, by id")
    add("--exclude", default="", metavar="REGEX", help="recordings of a source to leave out, by id")
    args = parser.parse_args(argv)
    if args.order < 1:
        parser.error(f"--order={args.order}: at least 1")
    if args.out.is_dir():
        parser.error(f"--out={args.out} is a folder: name a file in it, lm.arpa.gz say")
    if not 0 <= args.held_out < 1:
        parser.error(f"--held-out={args.held_out}: from 0 to below 1")
    if args.vocab and args.normalize:
        parser.error("--vocab says how texts are normalised: without --normalize")
    if args.text and (args.include or args.exclude):
        parser.error("--include and --exclude choose recordings of a --source")
    return args


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    from speechjax.data.shards import id_key
    from speechjax.decode.arpa import write_arpa
    from speechjax.decode.ngram import train

    symbols_of = _symbols(args)
    kept: list[Symbols] = []

    def training() -> Iterator[Symbols]:
        for text in _lines(args.text) if args.text else _transcripts(args):
            symbols = symbols_of(text)
            if symbols and id_key(text) < args.held_out * 2**64:
                kept.append(symbols)
            elif symbols:
                yield symbols

    model = train(training(), args.order)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_arpa(model, args.out)
    sizes = ", ".join(f"{len(keys):,}" for keys in model.keys)
    log.info("%s: %d symbols; n-grams of order 1 to %d: %s", args.out, len(model.symbols) - 3, model.order, sizes)
    _report(model, kept)
    return 0


def _report(model: "NGram", texts: list[Symbols]) -> None:
    if not texts:
        log.info("nothing is held out: no perplexity")
        return
    found = model.measure(texts)
    log.info(
        "held out, %d texts of %d symbols: perplexity %.2f a symbol; %.2f %% of them unknown, without these %.2f",
        len(texts), found.symbols, found.perplexity, 100 * found.unknown_share, found.perplexity_known,
    )  # fmt: skip


# ---- texts


def _lines(path: str) -> Iterator[str]:
    opened = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with sys.stdin.buffer if path == "-" else opened(path, "rb") as file:
            for line in file:
                number += 1
                yield line.decode("utf-8" if number > 1 else "utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}:{number}: not UTF-8; save the file in that encoding") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged, or not gzip ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"--text={path}: {error.strerror}") from None


def _transcripts(args: argparse.Namespace) -> Iterator[str]:
    """Of the recordings of a source, or of several, whose ids are wanted."""
    from speechjax.data.mixture import parse_mixture
    from speechjax.data.sources import open_source

    include, exclude = _pattern("include", args.include), _pattern("exclude", args.exclude)
    for part in parse_mixture(args.source):
        if part.weight != 1 or part.hours is not None:
            raise UserError(f"{part.source}: a language model reads every text once: leave out weight= and hours=")
        seen, found = 0, 0
        for item in open_source(part.source).items():
            if include.search(item.id) and not (args.exclude and exclude.search(item.id)):
                text = str(item.meta.get(args.field) or "")
                seen, found = seen + 1, found + bool(text)
                yield text
        if not found:
            what = f"none of its {seen} recordings has a {args.field!r}" if seen else "no id passes the filters"
            raise UserError(f"{part.source}: {what}")
        log.info("%s: %d texts of %d recordings", part.source, found, seen)


def _pattern(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"--{name}={pattern!r} is not a regular expression: {error}") from None


# ---- symbols


def _symbols(args: argparse.Namespace) -> Callable[[str], Symbols]:
    """From a text as it was written to the symbols of the model, None for those outside a vocabulary."""
    from speechjax.data.normalize import normalize, parse_steps

    if args.vocab:
        from speechjax.data.text import UNK, load_tokenizer

        tokenizer = load_tokenizer(args.vocab)
        names = [None if i == UNK else token for i, token in enumerate(tokenizer.tokens)]
        return lambda text: [names[i] for i in tokenizer.encode(text)]
    steps = " ".join(parse_steps(args.normalize or _STEPS))
    kind, _, voice = args.unit.partition(":")
    if args.unit == "characters":
        return lambda text: list(normalize(text, steps))
    if args.unit == "words":
        return lambda text: normalize(text, steps).split()
    if kind != "phonemes" or not voice:
        raise UserError(f"--unit={args.unit}: choose {_UNITS}")
    from speechjax.data.espeak import phonemize

    try:
        phonemize("", voice)
    except ValueError:
        raise UserError(f"--unit={args.unit}: eSpeak NG has no such voice; e.g. phonemes:de, phonemes:en-us") from None
    return lambda text: phonemize(normalize(text, steps), voice)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and leaves with an exit code."""
    leave(
        lambda: run(argv),
        interrupted="nothing is written; give the same command again",
        full_disk="free some and give the same command again",
    )


if __name__ == "__main__":
    main()

"""Transcribe recordings without transcripts: labels for a student, or the recordings a person should transcribe.

    python -m speechjax.pseudo_label --workdir=runs/teacher --source=folder:/data/untranscribed --out=labels.jsonl \\
        --min-confidence=0.8 --decode.search=beam --decode.lm=lm.arpa.gz
    python -m speechjax.main --config=configs/finetune/ctc.py:size=tiny --workdir=runs/student ... \\
        --config.data.source="manifest:/data/train.jsonl + manifest:labels.jsonl?weight=0.5"
    python -m speechjax.pseudo_label --workdir=runs/teacher --source=folder:/data/untranscribed --out=todo.tsv \\
        --select=200

Labels go to a manifest of the confident ones, {"audio_filepath", "duration", "text", "confidence", "teacher", ...} a
line.  The confidence of a transcript of U tokens is exp(log P / U), log P the score of the search (Kahn, Lee and
Hannun 2020, arXiv 1909.09116: the length-normalised log-likelihood).  With a language model its score is in it; the
score of a greedy search of CTC is that of its best path.  --select=N writes instead the N recordings that the model
knows least about as a table for annotators: they correct its column text, and it trains as manifest:todo.tsv.

Recordings are named by their files, so sources are folders and manifests.  What is longer than a row of the run
(config.data.crop_seconds) is cut into equal parts, wherever a word may be.  Interrupted, the same command goes on;
OUT.hypotheses.jsonl keeps every transcript, so that another threshold costs nothing.
"""

import argparse
import csv
import dataclasses
import io
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.verb import keep_compiled, leave_to_go_on, split_overrides

log = logging.getLogger("speechjax")

LEAST = {  # by which --select chooses: the value that is low where the model knows little, of a line
    "confidence": lambda line: line["confidence"],
    "margin": lambda line: line["margin"],
    "entropy": lambda line: -line["entropy"],
}
_UNKNOWN = "⁇"  # what the tokenizer writes for what it has no token for


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known flags, and overrides of decoding and data."""
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.pseudo_label", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="--decode.KEY=VALUE steers the search as options of the evaluator recognition do (search, beams, lm, "
        "lm_weight, ...); --config.data.KEY=VALUE chooses recordings (include, exclude, ...).",
    )  # fmt: skip
    add = parser.add_argument
    add("--workdir", required=True, help="of the teacher, a run that recognises; perhaps with @best, @newest or @STEP")
    add("--source", required=True, help="recordings, as in config.data.source")
    add("--out", required=True, type=Path, metavar="FILE", help="manifest .jsonl, or table .tsv with --select")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--min-confidence", type=float, metavar="C", help="keep transcripts as sure as this (default: "
                      "all that are not empty)")  # fmt: skip
    keep.add_argument("--share", type=float, metavar="S", help="keep the surest S of all that are not empty")
    keep.add_argument("--select", type=int, metavar="N", help="the N recordings to transcribe by hand")
    add("--by", choices=tuple(LEAST), help="--select those of least confidence (default), of least margin between the "
        "two best hypotheses, or of the highest entropy over the N best (Settles and Craven 2008, section 3; these "
        "need --decode.search=beam --decode.best=N)")  # fmt: skip
    args, overrides = split_overrides(parser, argv, ("--decode.", "--config.data."))
    for name, value in (("min-confidence", args.min_confidence), ("share", args.share)):
        if value is not None and not 0 < value <= 1:
            parser.error(f"--{name}={value}: above 0, at most 1")
    if args.select is not None and args.select < 1:
        parser.error(f"--select={args.select}: at least 1")
    if args.by and args.select is None:
        parser.error(f"--by={args.by} says what --select=N selects")
    suffix = ".jsonl" if args.select is None else ".tsv"
    if args.out.suffix != suffix:
        parser.error(f"--out={args.out}: name a file that ends in {suffix}")
    return args, overrides


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args, overrides = parse_args(argv)
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out={args.out}: no such folder: {args.out.absolute().parent}")
    lines = transcribe(args, overrides)
    if args.select is None:
        kept = confident(lines, args.min_confidence, args.share)
        content = "".join(map(entry, kept))
    else:
        kept = uncertain(lines, args.select, args.by or "confidence")
        content = table(kept)
    from speechjax.logs import replace_file

    print(summary(lines, kept), end="")
    if not kept:
        raise UserError("no transcript is kept: nothing is written; lower --min-confidence, or train a better teacher")
    replace_file(args.out, content.encode("utf-8", "surrogateescape"))
    log.info("%s: train on it with %s", args.out, f'--config.data.source="... + manifest:{args.out.absolute()}"')
    return 0


# ---- what to keep


def confident(
    lines: Sequence[dict[str, Any]], least: float | None = None, share: float | None = None
) -> list[dict[str, Any]]:
    """Labels: transcripts that say something, all of it in the vocabulary, of `least` confidence or the surest `share`.

    In the order of the recordings.
    """
    said = [line for line in lines if line["text"].strip() and _UNKNOWN not in line["text"]]
    if share is not None:
        order = sorted(said, key=lambda line: (-line["confidence"], line["example"]))
        said = sorted(order[: round(share * len(said))], key=lambda line: line["example"])
    return [line for line in said if line["confidence"] >= (least or 0.0)]


def uncertain(lines: Sequence[dict[str, Any]], count: int, by: str) -> list[dict[str, Any]]:
    """The `count` lines of which the model knows least, the worst first."""
    return sorted(lines, key=lambda line: (LEAST[by](line), line["example"]))[:count]


def entry(line: dict[str, Any]) -> str:
    """A line of the manifest."""
    part = {"offset": line["offset"]} if line["offset"] is not None else {}
    names = ("duration", "text", "confidence", "teacher", "id", *(k for k in ("speaker", "lang") if k in line))
    found = {"audio_filepath": line["path"], **part, **{name: line[name] for name in names}}
    try:
        (text := json.dumps(found, ensure_ascii=False)).encode()
    except UnicodeEncodeError:  # Linux lets a file's name hold any bytes
        text = json.dumps(found)
    return text + "\n"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """For annotators, and, once they have corrected the texts, for training: tab-separated, below a header."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerow(["id", "path", "offset", "duration", "confidence", "text"])
    for line in lines:
        offset = "" if line["offset"] is None else line["offset"]
        writer.writerow([line["id"], line["path"], offset, line["duration"], line["confidence"], line["text"]])
    return out.getvalue()


def summary(lines: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> str:
    """How many, how long, and how sure."""
    hours = lambda some: sum(line["duration"] for line in some) / 3600  # noqa: E731
    silent = sum(not line["text"].strip() for line in lines)
    text = [f"{len(lines):,} recordings or parts, {hours(lines):.2f} h; {silent:,} without a word",
            f"{len(kept):,} kept, {hours(kept):.2f} h", "confidence"]  # fmt: skip
    counts, _ = np.histogram([line["confidence"] for line in lines], bins=10, range=(0.0, 1.0))
    most = max(1, counts.max())
    for tenth, count in enumerate(counts.tolist()):
        bar = "#" * round(40 * count / most)
        text.append(f"  {tenth / 10:.1f}-{(tenth + 1) / 10:.1f} {count:>9,} {bar}".rstrip())
    return "\n".join(text) + "\n"


# ---- transcribing


def measures(scores: np.ndarray, length: int) -> dict[str, float | None]:
    """{confidence, margin, entropy} of N hypotheses, best first, by `scores` [N] in nats; the best has `length` tokens.

    Margin and entropy are of their posteriors among the N, and None where only one was asked for.  An empty transcript
    has confidence 0.
    """
    best = float(scores[0])
    sure = math.exp(min(best / length, 0.0)) if length and math.isfinite(best) else 0.0  # a fused score may be above 0
    found: dict[str, float | None] = dict(confidence=round(sure, 6), margin=None, entropy=None)
    if len(scores) > 1:
        there = scores[np.isfinite(scores)].astype(np.float64)
        posterior = np.exp(there - there.max()) / np.exp(there - there.max()).sum()
        second = float(posterior[1]) if len(posterior) > 1 else 0.0
        found["margin"] = round(float(posterior[0]) - second, 6)
        found["entropy"] = round(float(-np.sum(posterior * np.log(np.maximum(posterior, 1e-300)))), 6)
    return found


class Store:
    """FILE.hypotheses.jsonl: a line that says what the others are, then one an example, in any order.

    Lines are appended; the torn one of an interrupted process goes.  Raises UserError where it is of another teacher,
    source or search.
    """

    def __init__(self, out: Path, about: dict[str, Any]):
        self.file = out.with_name(f"{out.name}.hypotheses.jsonl")
        self.lines: dict[int, dict[str, Any]] = {}
        old = self.file.read_bytes() if self.file.exists() else b""
        whole = old[: old.rfind(b"\n") + 1]
        head, *rest = whole.splitlines() or [b""]
        if head and json.loads(head) != about:
            before = json.loads(head)
            other = sorted(key for key in before.keys() | about.keys() if before.get(key) != about.get(key))
            raise UserError(f"{self.file} has transcripts of another {other[0]}: use another --out, or delete it")
        for line in map(json.loads, rest):
            self.lines[line["example"]] = line
        self._out = open(self.file, "ab")
        self._out.truncate(len(whole))
        if not head:
            self._write([about])

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        self._write(lines)
        self.lines.update({line["example"]: line for line in lines})

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        self._out.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._out.flush()

    def close(self) -> None:
        self._out.close()


class Place(NamedTuple):
    """A file, or the part of one from `offset` on."""

    path: str
    offset: float
    duration: float | None


def places(records: Any) -> list[dict[str, Place]]:
    """{id: where it lies} for every part of a source; UserError for sources whose recordings are in no files."""
    from speechjax.data.sources import open_source

    found = []
    for opened in records.parts:
        own = {}
        for item in open_source(opened.part.source).items():
            if item.file is None:
                raise UserError(
                    f"{opened.part.source}: its recordings are in no files of their own, and a manifest could not name "
                    "them; give the folder: or manifest: they were made from"
                )
            own[item.id] = Place(*item.file)
        found.append(own)
    return found


def transcribe(args: argparse.Namespace, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """A line for every example that could be read, in their order: those there are, and those still missing."""
    import jax
    from ml_collections import ConfigDict

    from speechjax import config as configs
    from speechjax import runs, sharding
    from speechjax.data.records import open_records
    from speechjax.data.text import load_tokenizer
    from speechjax.recognition import Decoding, Recognizer

    keep_compiled()
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    with jax.set_mesh(mesh):
        teacher = runs.open_run(args.workdir, sharding.replicated(mesh))
        run_config: Any = teacher.config
        data = run_config.data.to_dict() | dict(source=args.source, include="", exclude="")
        given: Any = ConfigDict({"data": data, "decode": dataclasses.asdict(Decoding())})
        for override in overrides:
            configs.override(given, override)
        tokenizer = load_tokenizer(teacher.workdir)
        if tokenizer.kind == "phonemes" and args.select is None:
            raise UserError(f"{args.workdir} recognises phones, and a training reads texts: use --select, or a run on "
                            "characters")  # fmt: skip
        decoding = Decoding(**given.decode.to_dict())
        if args.by not in (None, "confidence") and decoding.best < 2:
            raise UserError(f"--by={args.by} compares hypotheses: --decode.search=beam --decode.best=8")
        decode = Recognizer(teacher.task, tokenizer, decoding, sharding.replicated(mesh))
        records = open_records(
            args.source, cache_dir=given.data.cache_dir or None, segment_seconds=given.data.crop_seconds,
            min_seconds=given.data.min_seconds, max_bad_share=1.0, include=given.data.include,
            exclude=given.data.exclude,
        )  # fmt: skip
        where = places(records)
        search = dataclasses.asdict(decoding)
        store = Store(args.out, dict(teacher=teacher.digest, recordings=records.digest, search=search))
        try:
            for examples, found in _hypotheses(records, given.data, teacher, decode, mesh, set(store.lines)):
                rows = zip(examples, *(x for x in found[:3]), strict=True)
                store.add([_line(records, where, teacher.digest, tokenizer, *row) for row in rows])
        finally:
            store.close()
    return [store.lines[example] for example in sorted(store.lines)]


def _hypotheses(
    records: Any, data: Any, teacher: Any, decode: Any, mesh: Any, done: set[int]
) -> Iterator[tuple[list[int], Any]]:
    """(examples, their `Hypotheses` on the host) of every batch in which one is not done, without the unreadable."""
    import jax

    from speechjax import sharding
    from speechjax.data.decode import SAMPLE_RATE
    from speechjax.data.pipeline import read_rows
    from speechjax.data.plan import Plan, plan_shapes
    from speechjax.labelling.progress import Bar

    hop, extra = teacher.task.encoder.frame_len()
    shapes = plan_shapes(
        records.lengths, crop=int(records.lengths.max()), shapes=data.shapes, quantum=hop, offset=extra,
        batch_samples=int(data.batch_seconds * SAMPLE_RATE), row_multiple=math.lcm(data.row_multiple, mesh.size),
    )  # fmt: skip
    everything = np.arange(len(records))
    lost: set[int] = set()

    def report(i: int, error: Exception) -> None:
        lost.add(i)
        log.warning("cannot read %s (%s): left out", records.id(i), error)

    with Bar("recordings", len(records), len(done)) as bar:
        for rows in Plan(records.lengths, shapes, seed=0).sweep():
            example = rows.example[:, 0]
            missing = np.array([i >= 0 and int(i) not in done for i in example])
            if not missing.any():
                continue
            batch = read_rows(records, everything, rows, lost=report)
            found = jax.device_get(decode(teacher.variables, sharding.global_batch(mesh, batch)))
            there = np.flatnonzero(missing & ~np.isin(example, list(lost)))
            yield example[there].tolist(), jax.tree.map(lambda x, there=there: np.asarray(x)[there], found)
            bar.advance(int(missing.sum()))


def _line(
    records: Any, where: Sequence[dict[str, Place]], teacher: str, tokenizer: Any,
    i: int, tokens: np.ndarray, lengths: np.ndarray, scores: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """What is known of example i after its search: tokens [N, U], lengths [N], scores [N]."""
    from speechjax.data.decode import SAMPLE_RATE
    from speechjax.data.split import recording_id

    name = recording_id(records, i)
    own = name.partition(":")[2] if len(records.parts) > 1 else name
    place = where[int(records.part[i])][own]
    begin, seconds = float(records.begin[i]) / SAMPLE_RATE, float(records.lengths[i]) / SAMPLE_RATE
    part = bool(place.offset) or place.duration is not None or records.piece[i] >= 0
    length = int(lengths[0])
    meta = {key: value for key, value in records.meta(i).items() if key in ("speaker", "lang")}
    return dict(
        example=i, id=records.id(i), path=os.path.abspath(place.path), offset=place.offset + begin if part else None,
        duration=round(seconds, 7), text=tokenizer.decode(tokens[0, :length].tolist()), **measures(scores, length),
        teacher=teacher, **meta,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Transcribes and leaves with an exit code."""
    leave_to_go_on(lambda: run(argv))


if __name__ == "__main__":
    main()

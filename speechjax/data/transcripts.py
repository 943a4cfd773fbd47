"""Transcripts as token ids, in memory, beside the batches of audio.

Shapes: R rows of this host, U tokens.
"""

import array
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from speechjax.data.plan import Batch, Rows, Shape, Spec
from speechjax.data.records import Records
from speechjax.data.text import UNK, Tokenizer, load_tokenizer, make_tokenizer
from speechjax.errors import UserError

log = logging.getLogger("speechjax")


class Transcripts(NamedTuple):
    """Transcripts as ids: those of example i of the records are `ids[bounds[i] : bounds[i + 1]]`."""

    tokenizer: Tokenizer
    ids: np.ndarray
    bounds: np.ndarray
    most: dict[Shape, int]

    def too_long(self, frames: np.ndarray) -> np.ndarray:
        """Examples whose transcript has more tokens than `frames` [examples], counting a blank between equal ones."""
        same = np.append((self.ids[1:] == self.ids[:-1]).astype(np.int64), 0)
        same[self.bounds[1:-1][self.bounds[1:-1] > 0] - 1] = 0  # not across examples
        repeats = np.diff(np.concatenate([[0], np.cumsum(same)])[self.bounds])
        return np.flatnonzero(np.diff(self.bounds) + repeats > frames)

    def spec(self, shape: Shape) -> Spec:
        return {"tokens": ((shape.rows, self.most[shape]), np.int32), "token_lengths": ((shape.rows,), np.int32)}

    def batch(self, records: Records, part: np.ndarray, rows: Rows) -> Batch:
        tokens = np.zeros((len(rows.example), self.most[rows.shape]), np.int32)
        lengths = np.zeros(len(rows.example), np.int32)
        for r in np.flatnonzero(rows.example[:, 0] >= 0):
            i = part[rows.example[r, 0]]
            ids = self.ids[self.bounds[i] : self.bounds[i + 1]]
            if rows.count[r, 0] == records.lengths[i]:  # of a part of it nobody knows the transcript
                tokens[r, : len(ids)], lengths[r] = ids, len(ids)
        return {"tokens": tokens, "token_lengths": lengths}


def read_transcripts(
    records: Records, shapes: Sequence[Shape], spec: str, steps: str, workdir: Path | None, field: str = "text"
) -> Transcripts:
    """Transcripts of all records; the vocabulary is the workdir's, or made of the transcripts.

    What the workdir's does not have becomes <unk>, and is listed.  Raises UserError where there are no transcripts.
    """
    if not any(_texts(records, field)):
        sources = ", ".join(opened.part.source for opened in records.parts)
        where = f" in the field {field!r}" if field != "text" else ""
        raise UserError(f"config.data.text={spec!r} needs transcripts{where}, and {sources} has none")
    if workdir and (workdir / "vocab.json").exists():
        tokenizer = load_tokenizer(workdir)
    else:
        tokenizer = make_tokenizer(spec, filter(None, _texts(records, field)), steps)
    ids, count = array.array("i"), np.zeros(len(records), np.int64)
    unknown: Counter[str] = Counter()
    for i, text in enumerate(_texts(records, field)):
        encoded = tokenizer.encode(text)
        ids.extend(encoded)
        count[i] = len(encoded)
        if UNK in encoded:
            unknown.update(tokenizer.unknown([text]))
    if unknown:
        shown = ", ".join(f"{symbol!r} {n:,}" for symbol, n in unknown.most_common(30))
        log.warning("not in the vocabulary of %s, so <unk> to the model: %s%s", workdir or "the workdir", shown,
                    ", ..." * (len(unknown) > 30))  # fmt: skip
    bounds = np.concatenate([[0], np.cumsum(count)])
    held = np.searchsorted([shape.samples for shape in shapes], np.minimum(records.lengths, shapes[-1].samples))
    most = {shape: max(8, -(-int(count[held == k].max(initial=0)) // 8) * 8) for k, shape in enumerate(shapes)}
    log.info("vocabulary: %d tokens (%s); %d of %d examples have text", tokenizer.size, spec, count.astype(bool).sum(),
             len(records))  # fmt: skip
    return Transcripts(tokenizer, np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32), bounds, most)


def _texts(records: Records, field: str) -> Iterator[str]:
    """The transcript, in this field of the metadata, of every example in order, "" where there is none.

    One pass over the lines, none is kept.
    """
    for number, opened in enumerate(records.parts):
        rows, entries = np.flatnonzero(records.part == number), enumerate(opened.shards.entries())
        at, meta = -1, {}
        for i in rows.tolist():
            while at < records.row[i]:
                at, entry = next(entries)
                meta = entry["meta"]
            yield str(meta.get(field) or "") if records.piece[i] < 0 else ""

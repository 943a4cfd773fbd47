"""Errors of recognised text against references: words (WER), characters (CER), phones or any other units (PER).

Alignments of least edit distance are jiwer's (extra `speechjax[eval]`, imported when first needed).  Texts are compared
as they are: normalise case and punctuation before.

Where several alignments have the least distance one of them is taken, so the sum of errors is unique and its parts are
not; sclite, to which a substitution costs 4 and the others 3, may count a little otherwise.
An empty reference counts nothing in the denominator, and each unit recognised there is an insertion in the sum.

Shapes: N utterances.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from rich.cells import cell_len

from speechjax.errors import UserError

Units = Sequence[str]


def words(text: str) -> list[str]:
    """What stands between white space."""
    return text.split()


def characters(text: str) -> list[str]:
    """Unicode code points, every run of white space as one space; composed and decomposed letters differ (see NFC)."""
    return list(" ".join(text.split()))


class Step(NamedTuple):
    """One step of an alignment: units and what they are to each other, "equal", "substitute", "insert" or "delete".

    An insertion has no reference, a deletion no hypothesis: None.
    """

    kind: str
    reference: str | None
    hypothesis: str | None


class Confusions(NamedTuple):
    """How often each unit was taken for another, left out, or put in."""

    substitutions: Counter[tuple[str, str]]
    deletions: Counter[str]
    insertions: Counter[str]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Units of references and hypotheses aligned, utterance by utterance, and what that counts: int64 [N] each.

    `errors` and `lengths` (units of the references) are what `bootstrap` and `groups` ask for.
    """

    references: list[list[str]]
    hypotheses: list[list[str]]
    _chunks: list[Any]  # of jiwer: for each utterance the stretches of one kind

    @cached_property
    def hits(self) -> np.ndarray:
        return self._count("equal")

    @cached_property
    def substitutions(self) -> np.ndarray:
        return self._count("substitute")

    @cached_property
    def insertions(self) -> np.ndarray:
        return self._count("insert")

    @cached_property
    def deletions(self) -> np.ndarray:
        return self._count("delete")

    @property
    def errors(self) -> np.ndarray:
        return self.substitutions + self.insertions + self.deletions

    @property
    def lengths(self) -> np.ndarray:
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors of all utterances over units of all references; above 1 where much is inserted.

        Raises UserError where all references are empty.
        """
        if not (total := int(self.lengths.sum())):
            raise UserError("all references are empty: an error rate needs transcripts to compare with")
        return int(self.errors.sum()) / total

    @property
    def sentence_rate(self) -> float:
        """Share of the utterances with any error."""
        return float(np.mean(self.errors > 0))

    def steps(self, row: int) -> Iterator[Step]:
        """The alignment of one utterance, unit by unit."""
        for chunk in self._chunks[row]:
            reference = self.references[row][chunk.ref_start_idx : chunk.ref_end_idx]
            hypothesis = self.hypotheses[row][chunk.hyp_start_idx : chunk.hyp_end_idx]
            width = max(len(reference), len(hypothesis))
            # A stretch of insertions or deletions has one side only.
            sides = zip(reference or [None] * width, hypothesis or [None] * width, strict=True)
            yield from (Step(chunk.type, *pair) for pair in sides)

    def confusions(self) -> Confusions:
        """Over all utterances."""
        found = Confusions(Counter(), Counter(), Counter())
        for row in range(len(self.references)):
            for kind, reference, hypothesis in self.steps(row):
                if kind == "substitute" and reference is not None and hypothesis is not None:
                    found.substitutions[reference, hypothesis] += 1
                elif kind == "delete" and reference is not None:
                    found.deletions[reference] += 1
                elif kind == "insert" and hypothesis is not None:
                    found.insertions[hypothesis] += 1
        return found

    def text(self, row: int, *, width: int = 120) -> str:
        """One utterance for the eye: lines of at most `width` columns, reference above hypothesis above S, I or D.

        Columns are as wide as a terminal shows them: combining marks of IPA have none, Chinese characters two, which
        is what jiwer's own picture does not know.
        """
        lines: list[list[str]] = []
        room = 0
        for kind, reference, hypothesis in self.steps(row):
            column = [reference or "", hypothesis or "", "" if kind == "equal" else kind[0].upper()]
            wide = max(cell_len(cell) for cell in column)
            fill = "*" * wide
            column = [cell if cell or number == 2 else fill for number, cell in enumerate(column)]
            if not lines or room + wide + 1 > width:
                lines, room = [*lines, ["REF:", "HYP:", "    "]], 4
            padded = (cell + " " * (wide - cell_len(cell)) for cell in column)
            lines[-1] = [f"{line} {cell}" for line, cell in zip(lines[-1], padded, strict=True)]
            room += wide + 1
        return "\n\n".join("\n".join(line.rstrip() for line in block).rstrip() for block in lines)

    def _count(self, kind: str) -> np.ndarray:
        def size(chunk: Any) -> int:
            return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)

        return np.array([sum(size(c) for c in row if c.type == kind) for row in self._chunks], np.int64)


def align(references: Sequence[Units], hypotheses: Sequence[Units]) -> Alignment:
    """Units against units, for the error rate of phones, say; `align_words` and `align_characters` split texts.

    Raises UserError without utterances or without jiwer, ValueError where there are not as many hypotheses as
    references, or a text instead of its units.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses")
    if not len(references):
        raise UserError("nothing to score: no references; is the test set empty?")
    if any(isinstance(units, str) for units in (*references, *hypotheses)):
        raise ValueError("a text is not a sequence of units: split it with words() or characters()")
    try:
        import jiwer
    except ImportError:
        raise UserError("jiwer is not installed: run `pip install 'speechjax[eval]'`") from None
    as_lists: Any = lambda rows: rows  # noqa: E731 - jiwer's place for normalisation; ours are units already
    sides: Any = ([list(units) for units in side] for side in (references, hypotheses))
    result = jiwer.process_words(*sides, reference_transform=as_lists, hypothesis_transform=as_lists)
    return Alignment(result.references, result.hypotheses, result.alignments)


def align_words(references: Sequence[str], hypotheses: Sequence[str]) -> Alignment:
    """Texts word by word: `.rate` is the word error rate."""
    return align([words(text) for text in references], [words(text) for text in hypotheses])


def align_characters(references: Sequence[str], hypotheses: Sequence[str]) -> Alignment:
    """Texts character by character, spaces included: `.rate` is the character error rate."""
    return align([characters(text) for text in references], [characters(text) for text in hypotheses])

"""BLEU and chrF by sacrebleu (extra `speechjax[eval]`, imported when first needed), with its signature.

Shapes: N utterances.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from speechjax.errors import UserError


class Translation:
    """One metric of N translations, from sums over utterances: `score(rows)` of any of them, also repeated ones.

    That makes `bootstrap.interval_of(translation.score, N)` affordable.  `signature` is what a paper must quote.
    """

    def __init__(self, metric: Any, hypotheses: Sequence[str], references: Sequence[Sequence[str]]):
        count = max(map(len, references))
        # sacrebleu wants each reference's whole column, None where an utterance has fewer.
        columns = [[row[k] if k < len(row) else None for row in references] for k in range(count)]
        self._metric = metric
        # The statistics that its own bootstrap resamples; they have no public name.
        self._sums = np.array(metric._extract_corpus_statistics(list(hypotheses), columns))
        self.signature = str(metric.get_signature())

    def score(self, rows: np.ndarray | None = None) -> float:
        """0 to 100, of the utterances with these numbers; None: of all."""
        chosen = self._sums if rows is None else self._sums[rows]
        return float(self._metric._compute_score_from_stats(chosen.sum(axis=0).tolist()).score)


def bleu(hypotheses: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]], *, tokenize: str = "13a"
         ) -> Translation:  # fmt: skip
    """BLEU (Papineni et al. 2002) of detokenised text; references: one an utterance, or several.

    tokenize: one of sacrebleu's, "13a" for languages with spaces, "zh", "ja-mecab", "char" ...
    Raises UserError without references, for an unknown tokenizer or one whose package is missing, or without
    sacrebleu; ValueError for another number of references.
    """
    pair = _checked(hypotheses, references)
    metric = _library().BLEU
    if tokenize not in metric.TOKENIZERS:
        raise UserError(f"BLEU has no tokenizer {tokenize!r}: choose one of {', '.join(metric.TOKENIZERS)}")
    try:
        return Translation(metric(tokenize=tokenize), *pair)
    except RuntimeError as error:
        raise UserError(f"BLEU's tokenizer {tokenize!r}: {' '.join(str(error).split())}") from error


def chrf(hypotheses: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]], *, word_order: int = 0
         ) -> Translation:  # fmt: skip
    """chrF (Popović 2015) of characters up to 6-grams; with `word_order` 2 chrF++ (Popović 2017).

    Raises UserError without references or without sacrebleu, ValueError for another number of them.
    """
    pair = _checked(hypotheses, references)
    return Translation(_library().CHRF(word_order=word_order), *pair)


def _library() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise UserError("sacrebleu is not installed: run `pip install 'speechjax[eval]'`") from None
    return metrics


def _checked(
    hypotheses: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]
) -> tuple[Sequence[str], list[list[str]]]:
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses")
    several = [[row] if isinstance(row, str) else list(row) for row in references]
    if not any(text.strip() for row in several for text in row):
        raise UserError("nothing to score: no references, or all are empty; does the test set have translations?")
    if bare := [n for n, row in enumerate(several) if not row]:
        raise UserError(f"utterance {bare[0]} and {len(bare) - 1} others have no reference: leave them out")
    return hypotheses, several

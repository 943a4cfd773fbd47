"""From a trained task to transcripts: which search, steered by what.

Shapes: B batch, T frames, N hypotheses, U tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from speechjax.decode import ctc
from speechjax.decode.bonus import Bonus
from speechjax.decode.types import Hypotheses, Scorer
from speechjax.errors import UserError

Decoder = Callable[[Any, dict[str, jax.Array]], Hypotheses]  # (variables, batch) -> transcripts; to be jitted


@dataclass(frozen=True)
class Decoding:
    """How to decode.  `search` "greedy", or "beam" with `beams` hypotheses, of which `best` are kept.

    A beam extends a hypothesis by the `symbols` likeliest tokens of a frame.  It may be steered: by a language model
    `lm`, an ARPA file of n-grams (over tokens; over words with a `lexicon`) or the workdir of a language_model run, at
    `lm_weight`; by `token_bonus` and `word_bonus` for every token and word; by `lexicon`, a file of the only words
    there are; by `hot_words`, a file with a phrase a line, at `hot_word_bonus` for each token of one.
    """

    search: str = "greedy"
    beams: int = 16
    symbols: int = 20
    best: int = 1
    lm: str = ""
    lm_weight: float = 0.5
    token_bonus: float = 0.0
    word_bonus: float = 0.0
    lexicon: str = ""
    hot_words: str = ""
    hot_word_bonus: float = 2.0

    def __post_init__(self):
        if self.search not in ("greedy", "beam"):
            raise UserError(f"search={self.search!r}: choose greedy or beam")
        steered = [name for name in ("lm", "lexicon", "hot_words") if getattr(self, name)]
        if self.search == "greedy" and steered:
            raise UserError(f"{steered[0]} steers a beam: set search=beam")
        if self.search == "greedy" and self.best > 1:
            raise UserError(f"best={self.best} hypotheses need a beam: set search=beam")


def make_decoder(task: Any, tokenizer: Any, decoding: Decoding) -> Decoder:
    """The decoder of a task that transcribes; UserError for one that does not."""
    kind = type(task).__name__.lower()
    if kind not in _DECODERS:
        raise UserError(f"the task {kind} gives no transcripts; those that do: {', '.join(_DECODERS)}")
    return _DECODERS[kind](task, decoding, scorers(tokenizer, decoding))


def scorers(tokenizer: Any, decoding: Decoding) -> tuple[tuple[Scorer, float], ...]:
    """What steers a beam, with weights."""
    found: list[tuple[Scorer, float]] = []
    if decoding.token_bonus or decoding.word_bonus:
        boundary = tokenizer.tokens.index(" ") if " " in tokenizer.tokens else -1
        found.append((Bonus(tokenizer.size, decoding.token_bonus, decoding.word_bonus, boundary), 1.0))
    return tuple(found)


def _ctc(task: Any, decoding: Decoding, steered: tuple[tuple[Scorer, float], ...]) -> Decoder:
    def decode(variables, batch):
        found = task.apply(variables, batch, method="answer")
        logits, lengths = found["logits"], found["lengths"]
        if decoding.search == "greedy":
            return ctc.greedy(logits, lengths)
        search = ctc.PrefixBeam(
            beams=decoding.beams, tokens=logits.shape[1], symbols=min(decoding.symbols, logits.shape[2] - 1),
            best=decoding.best, scorers=steered,
        )  # fmt: skip
        return search(logits, lengths)

    return decode


_DECODERS: dict[str, Callable[[Any, Decoding, Any], Decoder]] = {"ctc": _ctc}


def texts(tokenizer: Any, hypotheses: Hypotheses) -> list[list[tuple[str, float]]]:
    """Of every row the N best as (text, score), what does not exist left out."""
    return [
        [
            (tokenizer.decode(tokens[:length].tolist()), float(score))
            for tokens, length, score in zip(*row, strict=True)
            if jnp.isfinite(score)
        ]
        for row in zip(hypotheses.tokens, hypotheses.lengths, hypotheses.scores, strict=True)
    ]

"""From a trained task to transcripts: which search, steered by what.

Shapes: B batch, T frames, N hypotheses, U tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speechjax import runs
from speechjax.data.text import Tokenizer, load_tokenizer
from speechjax.decode import autoregressive, ctc, transducer
from speechjax.decode.arpa import read_arpa
from speechjax.decode.bonus import Bonus, Known
from speechjax.decode.hot_words import HotWords
from speechjax.decode.lexicon import LexiconScorer, read_lexicon
from speechjax.decode.neural_scorer import NeuralScorer
from speechjax.decode.ngram_scorer import NgramScorer
from speechjax.decode.types import Hypotheses, Scorer
from speechjax.errors import UserError

Steering = tuple[tuple[Scorer, float], ...]  # scorers and their weights


@dataclass(frozen=True)
class Decoding:
    """How to decode.  `search` "greedy", or "beam" with `beams` hypotheses, of which `best` are kept.

    A beam extends a hypothesis by the `symbols` likeliest tokens of a frame.  It may be steered: by a language model
    `lm`, an ARPA file of n-grams (over tokens; over words with a `lexicon`) or the workdir of a language_model run, at
    `lm_weight` (0: not at all); by `token_bonus` and `word_bonus` for every token and word; by `lexicon`, a file of the
    only words there are, whatever `lm_weight` is; by `hot_words`, a file with a phrase a line, at
    `hot_word_bonus` for each token of one.  The search of a seq2seq task that has learnt CTC too listens to it with
    `ctc_weight` (Watanabe et al. 2017, section III).

    Raises UserError for numbers that mean nothing, and for a greedy search that should be steered.
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
    ctc_weight: float = 0.3

    def __post_init__(self):
        if self.search not in ("greedy", "beam"):
            raise UserError(f"search={self.search!r}: choose greedy or beam")
        for name in ("beams", "symbols", "best"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("lm_weight", "token_bonus", "word_bonus", "hot_word_bonus", "ctc_weight"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)}: not a number")
        if self.lm_weight < 0:
            raise UserError(f"lm_weight={self.lm_weight}: at least 0, which leaves the model out")
        if not 0 <= self.ctc_weight <= 1:
            raise UserError(f"ctc_weight={self.ctc_weight}: from 0 to 1")
        if self.search == "beam" and self.best > self.beams:
            raise UserError(f"best={self.best} hypotheses of beams={self.beams}: lower the first")
        steered = [name for name in ("lm", "lexicon", "hot_words") if getattr(self, name)]
        if self.search == "greedy" and steered:
            raise UserError(f"{steered[0]} steers a beam: set search=beam")
        if self.search == "greedy" and self.best > 1:
            raise UserError(f"best={self.best} hypotheses need a beam: set search=beam")


class Recognizer:
    """Batches to transcripts, on device: `recognizer(variables, batch)` -> `Hypotheses`.

    Results go to `place`.  Raises UserError for a task that gives no transcripts, and for files that cannot steer.
    """

    def __init__(self, task: Any, tokenizer: Tokenizer, decoding: Decoding, place: Any = None):
        kind = type(task).__name__.lower()
        if kind not in _SEARCHES:
            raise UserError(f"the task {kind} gives no transcripts; those that do: {', '.join(_SEARCHES)}")
        steering = scorers(tokenizer, decoding)
        self._scorers, weights = tuple(s for s, _ in steering), tuple(w for _, w in steering)

        def decode(variables, scorers, batch):
            found = task.apply(variables, batch, method="answer")
            return _SEARCHES[kind](
                task, variables["params"], found, decoding, tuple(zip(scorers, weights, strict=True))
            )

        # Arguments, not constants: a language model may be large.
        self._decode = jax.jit(decode, out_shardings=place)

    def __call__(self, variables: Any, batch: dict[str, jax.Array]) -> Hypotheses:
        return self._decode(variables, self._scorers, batch)


def scorers(tokenizer: Tokenizer, decoding: Decoding) -> Steering:
    """What steers a beam; no weight is 0, at which what forbids would weigh minus infinity times nothing.

    Raises UserError for files that cannot be read, or are of another vocabulary.
    """
    tokens, found = tokenizer.tokens, []
    space = "<0x20>" if tokenizer.kind == "bytes" else " "
    boundary = tokens.index(space) if space in tokens else -1
    lm = decoding.lm if decoding.lm_weight else ""
    neural = lm and Path(lm.partition("@")[0]).expanduser().is_dir()
    model = read_arpa(lm) if lm and not neural else None
    if decoding.lexicon:
        if boundary < 0:
            raise UserError("lexicon: this vocabulary has no space between words; config.data.text=characters has")
        lexicon = read_lexicon(decoding.lexicon, tokens)
        scorer = LexiconScorer.build(lexicon, model, tokens=len(tokens), boundary=boundary)
        found.append((scorer, decoding.lm_weight if model else 1.0))
    elif model:
        found.append((NgramScorer.build(model, tokens), decoding.lm_weight))
    if neural:
        found.append((_neural(tokenizer, lm), decoding.lm_weight))
    if decoding.hot_words:
        try:
            lines = Path(decoding.hot_words).expanduser().read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"hot_words={decoding.hot_words}: {error}; a text file with a phrase a line") from None
        phrases = [line.strip() for line in lines if line.strip()]
        words = HotWords.build(
            [tokenizer.encode(phrase) for phrase in phrases], bonus=decoding.hot_word_bonus, tokens=len(tokens),
            boundary=boundary, names=phrases,
        )  # fmt: skip
        found.append((words, 1.0))
    if decoding.token_bonus or decoding.word_bonus:
        found.append((Bonus(len(tokens), decoding.token_bonus, decoding.word_bonus, boundary), 1.0))
    return ((Known(len(tokens)), 1.0), *found) if found else ()


def _neural(tokenizer: Tokenizer, workdir: str) -> NeuralScorer:
    run = runs.open_run(workdir, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    if type(run.task).__name__ != "LanguageModel":
        raise UserError(f"lm={workdir}: a run of the task {type(run.task).__name__.lower()}, not of language_model")
    if load_tokenizer(run.workdir).tokens != tokenizer.tokens:
        raise UserError(f"lm={workdir}: its vocabulary is another; train it with config.data.text of this run")
    return NeuralScorer(run.task.detached_decoder(), run.variables["params"]["token_decoder"], _LONGEST)


_LONGEST = 512  # tokens that a language model may have read


def ctc_beam(decoding: Decoding, tokens: int, classes: int, steering: Steering) -> ctc.PrefixBeam:
    """The beam search of CTC for transcripts of at most `tokens` tokens of a vocabulary of `classes`."""
    return ctc.PrefixBeam(
        beams=decoding.beams, tokens=tokens, best=decoding.best, scorers=steering,
        symbols=min(decoding.symbols, classes - ctc.BLANKS),
    )  # fmt: skip


def _ctc(task: Any, params: Any, found: dict[str, jax.Array], decoding: Decoding, steering: Steering) -> Hypotheses:
    logits, lengths = found["logits"], found["lengths"]
    if decoding.search == "greedy":
        return ctc.greedy(logits, lengths)
    # Longer transcripts than a token every other frame are not searched: room for them would cost as much as all else.
    return ctc_beam(decoding, (logits.shape[1] + 1) // 2, logits.shape[2], steering)(logits, lengths)


def _attention(
    task: Any, params: Any, found: dict[str, jax.Array], decoding: Decoding, steering: Steering
) -> Hypotheses:
    frames, lengths = found["frames"], found["lengths"]
    most = frames.shape[1]
    decoder = NeuralScorer.listening(task.detached_decoder(), params["token_decoder"], most, frames, lengths)
    heard = decoding.ctc_weight if "logits" in found else 0.0
    team: Steering = ((decoder, 1 - heard),)
    if heard:
        team = (*team, (autoregressive.CTCPrefixScorer(jax.nn.log_softmax(found["logits"]), lengths), heard))
    team = (*team, *steering)
    if decoding.search == "greedy":
        return autoregressive.greedy(team, lengths, max_tokens=most)
    return autoregressive.beam_search(team, lengths, max_tokens=most, beams=decoding.beams, best=decoding.best)


def _transducer(
    task: Any, params: Any, found: dict[str, jax.Array], decoding: Decoding, steering: Steering
) -> Hypotheses:
    network, most = task.detached_network(), found["frames"].shape[1]
    search: Any = transducer.Greedy(network, tokens=most)
    if decoding.search == "beam":
        search = transducer.Beam(network, decoding.beams, tokens=(most + 1) // 2, best=decoding.best, scorers=steering)
    return search(params["network"], found["frames"], found["lengths"])


_SEARCHES: dict[str, Callable[..., Hypotheses]] = {"ctc": _ctc, "seq2seq": _attention, "transducer": _transducer}


def texts(tokenizer: Tokenizer, hypotheses: Hypotheses) -> list[list[tuple[str, float]]]:
    """Of every row the N best as (text, score), what does not exist left out."""
    return [
        [
            (tokenizer.decode(tokens[:length].tolist()), float(score))
            for tokens, length, score in zip(*row, strict=True)
            if np.isfinite(score)
        ]
        for row in zip(hypotheses.tokens, hypotheses.lengths, hypotheses.scores, strict=True)
    ]

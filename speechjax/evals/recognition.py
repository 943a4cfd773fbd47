"""Error rates of the held-out transcripts: words, characters, phones, each with its interval, and by group."""

import json
from typing import Any

import jax
import numpy as np

from speechjax import sharding
from speechjax.errors import UserError
from speechjax.evals import _answers, _groups
from speechjax.logs import replace_file
from speechjax.recognition import Decoding, Recognizer
from speechjax.scoring import bootstrap, words
from speechjax.train import Job

_SHOWN = 5  # utterances on the console


class Recognition:
    """{error rate: value} over every held-out example that has a transcript and fits into a row; options beyond these
    are `Decoding`'s.

    Texts with words give `word_error` and `char_error`, phones `phone_error`, each with `_low` and `_high`, the limits
    of 95 % by bootstrap over utterances.  `group` names a label of the recordings, meta:FIELD or id:REGEX: error by
    group, with the worst and the gap.  Transcripts go to report/<name>.jsonl, worst first.
    """

    def __init__(
        self, job: Job, *, every: int, group: str = "", search: str = "greedy", beams: int = 16, symbols: int = 20,
        best: int = 1, lm: str = "", lm_weight: float = 0.5, token_bonus: float = 0.0, word_bonus: float = 0.0,
        lexicon: str = "", hot_words: str = "", hot_word_bonus: float = 2.0, ctc_weight: float = 0.3,
    ):  # fmt: skip
        self.job, self.every = job, every
        if job.data.transcripts is None:
            raise UserError("recognition needs transcripts: set config.data.text")
        self._groups = _groups.read(job.data.records, _answers.held_out(job), group)
        self.tokenizer = job.data.transcripts.tokenizer
        decoding = Decoding(
            search=search, beams=beams, symbols=symbols, best=best, lm=lm, lm_weight=lm_weight, token_bonus=token_bonus,
            word_bonus=word_bonus, lexicon=lexicon, hot_words=hot_words, hot_word_bonus=hot_word_bonus,
            ctc_weight=ctc_weight,
        )  # fmt: skip
        self._decode = Recognizer(job.task, self.tokenizer, decoding, sharding.replicated(job.mesh))

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        rows, variables = [], {"params": params, **extra}
        transcripts = self.job.data.transcripts
        for i, found in _answers.recognised(self.job, lambda batch: self._decode(variables, batch)):
            reference = transcripts.ids[transcripts.bounds[i] : transcripts.bounds[i + 1]].tolist()
            if reference:
                nbest = zip(found.tokens, found.lengths, found.scores, strict=True)
                best = [tokens[:length].tolist() for tokens, length, score in nbest if np.isfinite(score)]
                rows.append((i, reference, best or [[]], found.scores.tolist()))
        if not rows:
            raise UserError(f"{name}: no held-out recording with a transcript was heard whole; is the test set empty?")
        metrics, judged = {}, {}
        for kind, split in self._units().items():
            pairs = [(split(reference), split(best[0])) for _, reference, best, _ in rows]
            judged[kind] = words.align([p[0] for p in pairs], [p[1] for p in pairs])
            found = bootstrap.interval(judged[kind].errors, judged[kind].lengths)
            metrics |= {f"{kind}_error": found.value, f"{kind}_error_low": found.low, f"{kind}_error_high": found.high}
        first = next(iter(judged.values()))
        if self._groups:
            kind, examples = next(iter(judged)), [i for i, *_ in rows]
            labels = [self._groups[i] for i in examples]
            blocks = _groups.blocks(self.job.data.records, np.array(examples))
            metrics |= _groups.show(self.job, step, f"{kind}_error", first.errors, first.lengths, labels, blocks=blocks)
        self._show(step, name, rows, first)
        return metrics

    def _units(self) -> dict[str, Any]:
        """{name: token ids -> units} of what errors are counted in, the most telling first."""
        decode = self.tokenizer.decode
        if self.tokenizer.kind == "phonemes":
            return {"phone": lambda ids: decode(ids).split()}
        return {"word": lambda ids: words.words(decode(ids)), "char": lambda ids: words.characters(decode(ids))}

    def _show(self, step: int, name: str, rows: list[Any], judged: Any) -> None:
        """Some utterances on the console, all of them in a file."""
        if jax.process_index() or not self.job.logs.enabled:
            return
        decode, ids = self.tokenizer.decode, self.job.data.records
        shown = [[ids.id(i), decode(reference), decode(best[0])] for i, reference, best, _ in rows[:_SHOWN]]
        self.job.logs.table(f"{name} at step {step}", ["recording", "reference", "recognised"], shown)
        lines = []
        for row in np.argsort(-judged.errors, kind="stable").tolist():
            i, reference, best, scores = rows[row]
            nbest = [{"text": decode(tokens), "score": round(scores[n], 4)} for n, tokens in enumerate(best)]
            entry = dict(id=ids.id(i), reference=decode(reference), errors=int(judged.errors[row]), nbest=nbest)
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        folder = self.job.workdir / "report"
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{name}.jsonl", "".join(lines).encode())

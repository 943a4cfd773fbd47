"""How good held-out transcripts are as translations: BLEU and chrF."""

import json
from typing import Any

import jax

from speechjax import sharding
from speechjax.data.normalize import normalize
from speechjax.errors import UserError
from speechjax.evals import _answers, _groups
from speechjax.logs import replace_file
from speechjax.recognition import Decoding, Recognizer, texts
from speechjax.scoring import bootstrap, groups, translation
from speechjax.train import Job

_SHOWN = 5  # utterances on the console
_RESAMPLES = 1000


class Translation:
    """`bleu` and `chrf`, 0 to 100, over every held-out example with a text, with limits of 95 % (bootstrap over
    utterances), `_low` and `_high`.

    References are the field config.data.text_field of the metadata, as config.data.text_steps leave them: only texts
    that keep case and punctuation give numbers to compare with those of papers.  `tokenize` is sacrebleu's, "13a" for
    languages with spaces.  `group`, meta:FIELD or id:REGEX: BLEU by group of recordings, with the worst and the gap.
    `search`, `beams`, `token_bonus` and `ctc_weight` are `Decoding`'s.  Translations go to
    report/<name>.jsonl.
    """

    def __init__(
        self, job: Job, *, every: int, group: str = "", tokenize: str = "13a", search: str = "greedy", beams: int = 5,
        token_bonus: float = 0.0, ctc_weight: float = 0.0,
    ):  # fmt: skip
        self.job, self.every, self.tokenize = job, every, tokenize
        if job.data.transcripts is None:
            raise UserError("translation needs texts: set config.data.text and config.data.text_field")
        self._groups = _groups.read(job.data.records, _answers.held_out(job), group)
        self.tokenizer = job.data.transcripts.tokenizer
        decoding = Decoding(search=search, beams=beams, token_bonus=token_bonus, ctc_weight=ctc_weight)
        self._decode = Recognizer(job.task, self.tokenizer, decoding, sharding.replicated(job.mesh))

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        variables, rows, examples = {"params": params, **extra}, [], []
        records, bounds = self.job.data.records, self.job.data.transcripts.bounds
        field = self.job.config.data.text_field
        for i, found in _answers.recognised(self.job, lambda batch: self._decode(variables, batch)):
            if bounds[i + 1] > bounds[i]:
                reference = normalize(str(records.meta(i)[field]), self.tokenizer.steps)
                [best] = texts(self.tokenizer, jax.tree.map(lambda x: x[None], found))
                rows.append((records.id(i), reference, best[0][0] if best else ""))
                examples.append(i)
        if not rows:
            raise UserError(f"{name}: no held-out recording with a text was heard whole; is the test set empty?")
        _, references, hypotheses = (list(column) for column in zip(*rows, strict=True))
        scorers = {
            "bleu": translation.bleu(hypotheses, references, tokenize=self.tokenize),
            "chrf": translation.chrf(hypotheses, references),
        }
        metrics = {}
        for metric, scorer in scorers.items():
            found = bootstrap.interval_of(scorer.score, len(rows), resamples=_RESAMPLES)
            metrics |= _answers.limited(metric, found)
        if self._groups:
            names = [self._groups[i] for i in examples]
            by_group = groups.by_group(
                scorers["bleu"].score, names, min_size=_groups.enough(names), higher_is_better=True,
                resamples=_RESAMPLES,
            )  # fmt: skip
            metrics |= _groups.table(self.job, step, "bleu", by_group, scale=1.0)
        self._show(step, name, rows, scorers)
        _answers.show(self.job, step, name, metrics)
        return metrics

    def _show(self, step: int, name: str, rows: list[tuple[str, str, str]], scorers: Any) -> None:
        """Some on the console, all in a file, with the signatures that a paper must quote."""
        if jax.process_index() or not self.job.logs.enabled:
            return
        self.job.logs.table(f"{name} at step {step}", ["recording", "reference", "translation"], rows[:_SHOWN])
        lines = [json.dumps({metric: scorer.signature for metric, scorer in scorers.items()})]
        lines += [
            json.dumps(dict(zip(("id", "reference", "text"), row, strict=True)), ensure_ascii=False) for row in rows
        ]
        folder = self.job.workdir / "report"
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{name}.jsonl", "".join(f"{line}\n" for line in lines).encode())

"""Is it the same speaker?  How well embeddings tell.

Shapes: N recordings, E width of an embedding, P trials.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.data.label_spec import parse_labels
from speechjax.data.split import recording_id
from speechjax.errors import UserError
from speechjax.evals import _answers, _groups
from speechjax.scoring import report, verification
from speechjax.train import Job

log = logging.getLogger("speechjax")

_MOST = 3000  # recordings in all pairs: 4.5 million trials


class Verification:
    """Scores of the task speaker over held-out recordings: `eer`, the equal error rate, and the normalised minimum
    detection costs `min_dcf_01` and `min_dcf_05`, for which 1 and 5 % of the trials are of one speaker.

    A trial scores the cosine of two embeddings; a recording that was cut into segments has the mean of theirs.
    `trials` names a file of lines `1 id id` (0: two speakers), as VoxCeleb has them; without one every pair of
    recordings is a trial, of 3000 of them at most.  Speakers are then those of the label that the head learns from,
    known to the model or not, or of `speaker`, meta:FIELD or id:REGEX.  Recordings are heard up to
    config.data.crop_seconds; raise it to hear all of them.  `head` names a head of `several`.

    The trials of one recording are not independent, and there is no interval.  Raises UserError where trials of one
    speaker, or of two, are missing, and for a file that is wrong.
    """

    def __init__(self, job: Job, *, every: int, head: str = "", speaker: str = "", trials: str = ""):
        self.job, self.every = job, every
        self.head = _answers.find_head(job, "verification", head, ["speaker"])
        held_out = _answers.held_out(job).tolist()
        self._recording = {example: recording_id(job.data.records, example) for example in held_out}
        first: dict[str, int] = {}  # an example of each recording
        for example, recording in self._recording.items():
            first.setdefault(recording, example)
        self._number = {recording: n for n, recording in enumerate(first)}
        examples = list(first.values())
        self._trials = self._read(trials, examples) if trials else self._pairs(speaker, examples)
        self._compute = _answers.answerer(job)

    def _read(self, trials: str, examples: list[int]) -> verification.Trials:
        path = Path(trials).expanduser()
        if not path.is_file():
            raise UserError(f"verification: trials={trials}: there is no such file")
        return verification.read_trials(path, [_groups.name(self.job.data.records, i) for i in examples])

    def _pairs(self, speaker: str, examples: list[int]) -> verification.Trials:
        records = self.job.data.records
        who = np.array(_groups.labels(records, examples, speaker) if speaker else self._speakers(examples))
        known = np.flatnonzero(who != "")
        if not len(known):
            raise UserError("verification: no held-out recording has a speaker: set speaker=meta:FIELD or id:REGEX")
        if len(known) > _MOST:
            log.info("verification: all pairs of %d of the %d recordings", _MOST, len(known))
            keys = records.keys[np.array(examples)[known]]
            known = np.sort(known[np.argsort(keys, kind="stable")[:_MOST]])
        pairs = verification.all_pairs(who[known].tolist())
        return verification.Trials(known[pairs.first], known[pairs.second], pairs.target)

    def _speakers(self, examples: list[int]) -> list[str]:
        """The names that config.data.label gives, whether or not the model has a class for them."""
        specs = {spec.key: spec for spec in parse_labels(self.job.config.data.label)}
        read, records = specs[self.head.fields["label"]].read, self.job.data.records
        return [read(dict(id=_groups.name(records, i), meta=records.meta(i))) or "" for i in examples]

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        key = f"{self.head.prefix}embedding"
        examples, found = _answers.collect(self.job, self._compute, {"params": params, **extra}, [key])
        embeddings = np.zeros((len(self._number), found[key].shape[1]))
        rows = np.array([self._number[self._recording[example]] for example in examples.tolist()])
        np.add.at(embeddings, rows, found[key])  # each of length 1; of the sum only the direction counts
        heard = np.zeros(len(embeddings), bool)
        heard[rows] = True
        kept = heard[self._trials.first] & heard[self._trials.second]
        trials = verification.Trials(*(column[kept] for column in self._trials))
        errors = verification.error_rates(verification.cosine_scores(embeddings, trials), trials.target)
        one, two = int(trials.target.sum()), int((~trials.target).sum())
        title = f"{name} at step {step}: {one:,} trials of one speaker, {two:,} of two, {heard.sum():,} recordings"
        _answers.show_table(self.job, name, report.verification_costs(title, {name: errors}))
        if self.job.logs.enabled:
            from speechjax.scoring import figures

            self.job.logs.picture(step, name, figures.det_curves({name: errors}, f"step {step}"))
        return {
            "eer": verification.equal_error_rate(errors).rate,
            "min_dcf_01": verification.min_detection_cost(errors, p_target=0.01).cost,
            "min_dcf_05": verification.min_detection_cost(errors, p_target=0.05).cost,
        }

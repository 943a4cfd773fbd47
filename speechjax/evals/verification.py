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
from speechjax.scoring import groups, report, verification
from speechjax.scoring.bootstrap import Interval
from speechjax.train import Job

log = logging.getLogger("speechjax")

_MOST = 3000  # recordings in all pairs: 4.5 million trials


class Verification:
    """Scores of the task speaker over held-out recordings: `eer`, the equal error rate, and the normalised minimum
    detection costs `min_dcf_01` and `min_dcf_05`, for which 1 and 5 % of the trials are of one speaker.

    A trial scores the cosine of two embeddings; a recording that was cut into segments has the mean of theirs.
    `trials` names a file of lines `1 id id` (0: two speakers), as VoxCeleb has them; without one every pair of
    recordings is a trial, of 3000 of them at most.  Speakers are those of the label that the head learns from, known
    to the model or not, or of `speaker`, meta:FIELD or id:REGEX.  Recordings are heard up to config.data.crop_seconds;
    raise it to hear all of them.  `head` names a head of `several`.

    Each score has limits of 95 % by bootstrap over speakers, `_low` and `_high`; of a file's trials, recordings of one
    speaker are also those that a trial says are.  `group`, meta:FIELD or id:REGEX: `eer` by group, of the trials whose
    two recordings are both in it, with the worst and the gap.  Trials between groups, often easier, count in the score
    of all alone.

    Raises UserError where trials of one speaker, or of two, are missing, altogether or in every group, for a `speaker`
    or `group` that fits no recording, and for a file that is wrong.
    """

    def __init__(
        self, job: Job, *, every: int, head: str = "", speaker: str = "", trials: str = "", group: str = ""
    ):  # fmt: skip
        self.job, self.every = job, every
        self.head = _answers.find_head(job, "verification", head, ["speaker"])
        held_out = _answers.held_out(job).tolist()
        self._recording = {example: recording_id(job.data.records, example) for example in held_out}
        first: dict[str, int] = {}  # an example of each recording
        for example, recording in self._recording.items():
            first.setdefault(recording, example)
        self._number = {recording: n for n, recording in enumerate(first)}
        examples = list(first.values())
        records = job.data.records
        names = _groups.labels(records, examples, speaker, "speaker") if speaker else self._speakers(examples)
        self._trials = self._read(trials, examples) if trials else self._pairs(names, examples)
        self._speaker = verification.linked(self._trials, names)
        self._groups = np.array(_groups.labels(records, examples, group) if group else [])
        if group and not self._scored(self._trials):
            raise UserError(f"verification: no group of group={group!r} has both a trial of one speaker and one of two")
        self._compute = _answers.answerer(job)

    def _read(self, trials: str, examples: list[int]) -> verification.Trials:
        path = Path(trials).expanduser()
        if not path.is_file():
            raise UserError(f"verification: trials={trials}: there is no such file")
        return verification.read_trials(path, [_groups.name(self.job.data.records, i) for i in examples])

    def _pairs(self, names: list[str], examples: list[int]) -> verification.Trials:
        records, who = self.job.data.records, np.array(names)
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
        scores = verification.cosine_scores(embeddings, trials)
        errors = verification.error_rates(scores, trials.target)
        found = verification.cost_intervals(scores, trials, self._speaker)
        one, two = int(trials.target.sum()), int((~trials.target).sum())
        title = f"{name} at step {step}: {one:,} trials of one speaker, {two:,} of two, {heard.sum():,} recordings"
        _answers.show_table(self.job, name, report.verification_costs(title, {name: errors}, intervals=found))
        if self.job.logs.enabled:
            from speechjax.scoring import figures

            self.job.logs.picture(step, name, figures.det_curves({name: errors}, f"step {step}"))
        metrics = {
            **_answers.limited("eer", found.eer),
            **_answers.limited("min_dcf_01", found.min_dcf[0]),
            **_answers.limited("min_dcf_05", found.min_dcf[1]),
        }
        if len(self._groups):
            metrics |= self._by_group(scores, trials, np.flatnonzero(heard), found.eer, step)
        return metrics

    def _by_group(
        self, scores: np.ndarray, trials: verification.Trials, heard: np.ndarray, every: Interval, step: int
    ) -> dict[str, float]:
        within = self._within(trials)
        trials, scores = verification.Trials(*(column[within] for column in trials)), scores[within]
        names, scored = self._groups[heard], self._scored(trials)

        def eer(rows: np.ndarray) -> Interval:
            if len(rows) == len(heard):
                return every
            member = np.isin(np.arange(len(self._groups)), heard[rows])
            own = member[trials.first]
            part = verification.Trials(*(column[own] for column in trials))
            return verification.cost_intervals(scores[own], part, self._speaker, p_targets=()).eer

        size = _groups.enough([group for group in names.tolist() if group in scored])
        found = groups.scored_by_group(eer, len(heard), names.tolist(), min_size=size)
        return _groups.table(self.job, step, "eer", found)

    def _within(self, trials: verification.Trials) -> np.ndarray:
        """Which trials are of two recordings of one group."""
        first, second = (self._groups[side] for side in (trials.first, trials.second))
        return (first == second) & (first != "")

    def _scored(self, trials: verification.Trials) -> set[str]:
        """The groups that have trials of both kinds."""
        within, names = self._within(trials), self._groups[trials.first]
        kinds = (set(np.unique(names[within & kind]).tolist()) for kind in (trials.target, ~trials.target))
        return set.intersection(*kinds)

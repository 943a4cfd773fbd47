"""How good classifications of frames are: phones, speech and silence, who is on.

Shapes: N examples, R rows, T frames, V units, S speakers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.data.times import SPEECH
from speechjax.errors import UserError
from speechjax.evals import _answers, _groups
from speechjax.scoring import bootstrap, classes, report
from speechjax.tasks._units import frame_units
from speechjax.train import Job

_PICTURED = 60  # units up to which a confusion matrix can be read


class FrameLabels:
    """Scores of the task frames over all held-out frames with a unit, at the rate of the encoder's frames.

    One unit a frame: `accuracy` (chance: always the unit that is most frequent here) and `macro_f1`.  Of speech and
    nonspeech besides: `speech_f1`, `miss_rate` (share of the speech), `false_alarm_rate` (share of the nonspeech) and
    `detection_error`, (missed + falsely heard) / speech.  Turns: `der`, the diarisation error rate, (missed + falsely
    heard + confused speaker time) / speaker time, with its parts `der_missed`, `der_false_alarm` and `der_confusion`,
    in the order of the speakers of a recording that agrees with the reference longest (NIST RT-09 evaluation plan).  A
    speaker is on where the chance of it is above `threshold` after a median over `median` frames (odd; 1: none).
    Frames up to `collar` s from where anybody begins or ends are left out.

    All but chance have limits of 95 % by bootstrap over recordings, `_low` and `_high`.  `head` names a head of
    `several`.  `group`, meta:FIELD or id:REGEX: `accuracy`, `detection_error` or `der` by group of recordings, with the
    worst and the gap.

    Raises UserError where no held-out frame has a unit, all have the same, or nobody speaks, and for a `group` that
    fits no recording.
    """

    def __init__(
        self, job: Job, *, every: int, head: str = "", group: str = "", threshold: float = 0.5, median: int = 1,
        collar: float = 0.0,
    ):  # fmt: skip
        self.job, self.every = job, every
        self.head = _answers.find_head(job, "frame_labels", head, ["frames"])
        if not 0 < threshold < 1 or median < 1 or median % 2 == 0 or collar < 0:
            raise UserError(
                f"frame_labels: threshold={threshold} between 0 and 1, median={median} odd, collar={collar} not below 0"
            )
        self.median = median
        self._logit = float(np.log(threshold / (1 - threshold)))
        hop = job.task.encoder.frame_len()[0]
        self._collar = round(collar * job.data.sample_rate / hop)
        self._symbols = job.data.units.symbols
        self.turns = self.head.fields["loss"] == "turns"
        self.speech = self._symbols == SPEECH
        self._groups = _groups.read(job.data.records, _answers.held_out(job), group)
        self._compute = _answers.answerer(job, self._reduce)

    def _reduce(self, found: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Of every row the units [R, T], -1 for none, and the unit that is said, or of turns the logits [R, T, S]."""
        scores, lengths = (found[f"{self.head.prefix}{key}"] for key in ("scores", "lengths"))
        units = frame_units(self.job.task.encoder, batch, self.head.fields["unit_hop"], lengths, scores.shape[1])
        said = scores if self.turns else jnp.argmax(scores, axis=2).astype(jnp.int32)
        return {"units": units, "said": said}

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        variables = {"params": params, **extra}
        judge = self._judge_turns if self.turns else self._judge_units
        examples, rows = [], []
        for numbers, found in _answers.answers(self.job, lambda batch: self._compute(variables, batch)):
            for example, units, said, heard in zip(
                numbers, found["units"], found["said"], found["heard"], strict=True
            ):  # fmt: skip
                if heard and (units >= 0).any():
                    examples.append(int(example))
                    rows.append(judge(units, said))
        if not rows:
            raise UserError(f"{name}: no held-out frame has a unit (config.data.units={self.job.config.data.units!r})")
        examples = np.array(examples)
        make = self._turn_scores if self.turns else self._unit_scores
        blocks = _groups.blocks(self.job.data.records, examples)
        metrics, main, by_group = make(rows, blocks, step, name)
        if self._groups:
            groups = [self._groups[example] for example in examples.tolist()]
            better = main == "accuracy"
            metrics |= _groups.show(self.job, step, main, *by_group, groups, blocks=blocks, higher_is_better=better)
        _answers.show(self.job, step, name, metrics)
        return metrics

    # ---- one unit a frame

    def _judge_units(self, units: np.ndarray, said: np.ndarray) -> np.ndarray:
        """The confusions of a row, [V, V]."""
        known = units >= 0
        return classes.confusion_matrix(units[known], said[known], self.head.fields["classes"])

    def _unit_scores(
        self, rows: Sequence[np.ndarray], blocks: np.ndarray, step: int, name: str
    ) -> tuple[dict[str, float], str, tuple[np.ndarray, np.ndarray]]:
        from scipy.sparse import csr_array

        right, there, said = (
            np.array([part(row) for row in rows], np.float64)
            for part in (np.diagonal, lambda row: row.sum(axis=1), lambda row: row.sum(axis=0))
        )
        counts = np.sum(rows, axis=0)
        sparse = csr_array(right), csr_array(there), csr_array(said)
        macro = bootstrap.intervals_of(
            lambda weights: {"f1": classes.averages(*sparse, weights).macro_f1}, len(rows), blocks=blocks
        )["f1"]
        main, by_group = "accuracy", (right.sum(axis=1), there.sum(axis=1))
        metrics = {
            **_answers.limited("accuracy", bootstrap.interval(*by_group, blocks=blocks)),
            "chance_accuracy": float(counts.sum(axis=1).max() / counts.sum()),
            **_answers.limited("macro_f1", macro._replace(value=classes.macro_f1(counts))),
        }
        if self.speech:
            missed, alarms = (np.array([row[cell] for row in rows], np.float64) for cell in ((1, 0), (0, 1)))
            main, by_group = "detection_error", (missed + alarms, there[:, 1])
            ratios = {
                "detection_error": by_group,
                "speech_f1": (2 * right[:, 1], there[:, 1] + said[:, 1]),
                "miss_rate": (missed, there[:, 1]),
                "false_alarm_rate": (alarms, there[:, 0]),
            }
            for key, ratio in ratios.items():
                metrics |= _answers.limited(key, bootstrap.interval(*ratio, blocks=blocks))
        self._draw(counts, step, name)
        return metrics, main, by_group

    def _draw(self, counts: np.ndarray, step: int, name: str) -> None:
        if not self.job.logs.enabled:
            return
        from speechjax.scoring import figures

        symbols = self._symbols or [str(k) for k in range(len(counts))]
        symbols = [*symbols, *(f"({k})" for k in range(len(symbols), len(counts)))]
        there = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
        shown, names = counts[np.ix_(there, there)], [symbols[k] for k in there]
        if len(there) <= _PICTURED:
            self.job.logs.picture(step, name, figures.confusion_picture(shown, names, f"step {step}"))
        _answers.show_table(self.job, f"{name}_units", report.per_class(f"{name} at step {step}", shown, names))

    # ---- turns

    def _judge_turns(self, units: np.ndarray, logits: np.ndarray) -> "SpeakerTime":
        return speaker_time(units, _median(logits, self.median) > self._logit, self._collar)

    def _turn_scores(
        self, rows: Sequence["SpeakerTime"], blocks: np.ndarray, step: int, name: str
    ) -> tuple[dict[str, float], str, tuple[np.ndarray, np.ndarray]]:
        speech, missed, alarms, confused = (np.array(column, np.float64) for column in zip(*rows, strict=True))
        wrong = missed + alarms + confused
        if not speech.sum():
            raise UserError(f"{name}: nobody speaks in the held-out recordings, or within the collar alone")
        parts = {"der": wrong, "der_missed": missed, "der_false_alarm": alarms, "der_confusion": confused}
        metrics = {}
        for part, frames in parts.items():
            metrics |= _answers.limited(part, bootstrap.interval(frames, speech, blocks=blocks))
        return metrics, "der", (wrong, speech)


class SpeakerTime(NamedTuple):
    """Frames, counted once for every speaker: of the reference, and of each kind of error."""

    speech: int
    missed: int
    false_alarm: int
    confused: int


def speaker_time(units: np.ndarray, on: np.ndarray, collar: int = 0) -> SpeakerTime:
    """Of one recording: units int [T], bit k for speaker k, -1 for frames that do not count; who is said to be on, bool
    [T, S] in any order.  `collar` frames on either side of a change of the reference do not count.
    """
    from scipy.optimize import linear_sum_assignment

    S = on.shape[1]
    true, counts = (units[:, None] >> np.arange(S)) & 1 > 0, units >= 0
    changes = (np.diff(units) != 0) & counts[1:] & counts[:-1]
    for at in np.flatnonzero(changes) + 1 if collar else ():
        counts[max(0, at - collar) : at + collar] = False
    true, on = true[counts], on[counts]
    together = true.T.astype(np.int64) @ on.astype(np.int64)
    own, other = linear_sum_assignment(together, maximize=True)
    speaking, said = true.sum(axis=1), on.sum(axis=1)
    right = (true[:, own] & on[:, other]).sum(axis=1)
    return SpeakerTime(
        int(speaking.sum()),
        int(np.maximum(speaking - said, 0).sum()),
        int(np.maximum(said - speaking, 0).sum()),
        int((np.minimum(speaking, said) - right).sum()),
    )


def _median(logits: np.ndarray, frames: int) -> np.ndarray:
    """Median over time of [T, S]; the first and last frame stand for what lies beyond."""
    if frames == 1:
        return logits
    padded = np.pad(logits, ((frames // 2, frames // 2), (0, 0)), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, frames, axis=0), axis=-1)

"""What another evaluator says of the held-out recordings in noise and in rooms."""

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from speechjax import config as configs
from speechjax.display import display
from speechjax.errors import UserError
from speechjax.evals import _answers
from speechjax.logs import Logs
from speechjax.scoring import report, robustness
from speechjax.scoring.bootstrap import Interval
from speechjax.train import Job


class Robustness:
    """The evaluator `of` under conditions: white noise and babble at signal-to-noise ratios in dB, and rooms of
    reverberation times in s (speechjax.scoring.robustness), beside the clean recordings.

    `of` names an evaluator of this run with its options, or a kind with its defaults, such as recognition.  `metric` is
    the one of its metrics to follow (empty: its first).  Metrics: robust_clean, robust_white_<dB>, robust_babble_<dB>
    and robust_reverberation_<s>, with `_low` and `_high` where the evaluator has limits; and a picture of the curves.
    Every condition costs as much as one evaluation.

    Raises UserError for evaluators that hear other recordings than the held-out ones, and for a metric that there is
    not.
    """

    def __init__(
        self, job: Job, *, every: int, of: str = "recognition", metric: str = "",
        white: tuple[float, ...] = (20.0, 10.0, 0.0), babble: tuple[float, ...] = (20.0, 10.0, 0.0),
        reverberation: tuple[float, ...] = (0.3, 0.6, 1.2), talkers: int = 6, seed: int = 0,
    ):  # fmt: skip
        self.job, self.every, self.of, self.metric = job, every, of, metric
        voices = _voices(job, talkers) if babble else None
        self.conditions = robustness.conditions(
            white=white, babble=babble, reverberation=reverberation, voices=voices, talkers=talkers, seed=seed,
            sample_rate=job.data.sample_rate,
        )  # fmt: skip
        if len(self.conditions) < 2:
            raise UserError("robustness: no condition but clean; give white, babble or reverberation some levels")
        self._heard = _Heard(job.data)
        quiet = Logs(job.workdir, total_steps=0, start_step=0, enabled=False)
        self._judge = _evaluator(dataclasses.replace(job, data=self._heard, logs=quiet), of)

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        scores: dict[str, Interval] = {}
        for condition in self.conditions:
            self._heard.apply = condition.apply
            metrics = self._judge(params, extra, step, name)
            metric = self.metric or next(iter(metrics), "")
            if metric not in metrics:
                raise UserError(f"robustness: {self.of} has no metric {metric!r}; it has {', '.join(metrics)}")
            low, high = (metrics.get(f"{metric}_{side}", np.nan) for side in ("low", "high"))
            scores[condition.name] = Interval(metrics[metric], low, high)
        self._show(step, name, metric, scores)
        found = {}
        for condition in self.conditions:
            score = scores[condition.name]
            key = "_".join(["robust", condition.kind, *([] if np.isnan(condition.level) else [f"{condition.level:g}"])])
            found |= {key: score.value} if np.isnan(score.low) else _answers.limited(key, score)
        return found

    def _show(self, step: int, name: str, metric: str, scores: dict[str, Interval]) -> None:
        percent = display(metric).spec.endswith("%")
        scale, label = (100.0, f"{display(metric).title}, %") if percent else (1.0, display(metric).title)
        digits: Any = report.conditions(f"{name} at step {step}: {label}", {self.of: scores}, scale=scale)
        _answers.show_table(self.job, name, digits, rows=len(self.conditions))
        if self.job.logs.enabled:
            from speechjax.scoring import figures

            image = figures.condition_curves({self.of: scores}, self.conditions, label, f"step {step}", scale=scale)
            self.job.logs.picture(step, name, image)


class _Heard:
    """Data whose held-out recordings are heard under a condition, `apply`; all else is the data's own."""

    def __init__(self, data: Any):
        self._data = data
        self.apply: Any = copy.copy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def valid_batches(self, host: int = 0, hosts: int = 1) -> Iterator[Any]:
        return (self.apply(batch) for batch in self._data.valid_batches(host, hosts))


def _evaluator(job: Job, of: str) -> Any:
    """The evaluator of this name, else one of that kind."""
    block = job.config.evals[of].to_dict() if of in job.config.evals else {"name": of}
    kind = configs.eval_class(block.pop("name"))
    parameters = inspect.signature(kind).parameters
    if "source" in parameters or kind is Robustness:
        raise UserError(f"robustness: {of} does not hear the held-out recordings alone; choose one that does")
    options = block | {"every": 1}
    configs.check_kwargs(f"robustness of {of}", kind, options, given=("job",))
    return kind(job, **options)


def _voices(job: Job, talkers: int) -> Any:
    """The held-out batch with the most recordings, or the first with enough: all hosts read the same one."""
    best, most = None, -1
    for batch in job.data.valid_batches(0, 1):
        there = int(np.sum(batch["lengths"] > 0))
        if there > most:
            best, most = batch, there
        if most > 4 * talkers:
            break
    return best

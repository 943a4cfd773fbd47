"""How long a run goes on, how often what happens, and which of its evaluations is the best."""

import math
from dataclasses import dataclass
from typing import Any

from speechjax.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """The train block: how long, and how often what happens.

    `best_metric` names the evaluation metric whose best checkpoint is kept in `best/`, `best_mode` is "min" or
    "max"; after `patience` evaluations without a better one training stops (0: never).  `max_skipped`
    non-finite steps in a row end the run.  A device holds at most `device_seconds` of audio at once (0: its whole part
    of the batch); larger batches accumulate gradients.
    """

    steps: int
    seed: int
    log_every: int
    checkpoint_every: int
    eval_every: int
    keep: int
    best_metric: str
    best_mode: str
    patience: int
    max_skipped: int
    device_seconds: float = 0.0

    def __post_init__(self):
        for name in ("steps", "log_every", "checkpoint_every", "eval_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"config.train.{name}={getattr(self, name)}: must be at least 1")
        if self.best_mode not in ("min", "max"):
            raise UserError(f"config.train.best_mode={self.best_mode!r}: choose min or max")


class Best:
    """The best evaluation so far; lives in the checkpoints' meta, so a resumed run judges alike."""

    def __init__(self, schedule: Schedule, value: float | None = None, step: int = 0, worse: int = 0):
        self.schedule, self.value, self.step, self.worse = schedule, value, step, worse

    def update(self, step: int, metrics: dict[str, float]) -> bool:
        """True where `metrics` are the best yet; raises UserError where they lack the metric."""
        name = self.schedule.best_metric
        if name not in metrics:
            there = ", ".join(sorted(metrics)) or "no evaluations"
            raise UserError(f"config.train.best_metric={name!r} is not among the evaluations: {there}")
        sign, value = 1 if self.schedule.best_mode == "min" else -1, metrics[name]
        # A correlation of constant predictions is no number, and none is better than it.
        if math.isfinite(value) and (self.value is None or sign * value < sign * self.value):
            self.value, self.step, self.worse = value, step, 0
            return True
        self.worse += 1
        return False

    @property
    def exhausted(self) -> bool:
        return bool(self.schedule.patience) and self.worse >= self.schedule.patience

    def to_json(self) -> dict[str, Any]:
        return dict(value=self.value, step=self.step, worse=self.worse)

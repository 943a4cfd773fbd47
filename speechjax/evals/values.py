"""How near predicted numbers are: opinion scores, ages, ratios.  Shapes: N examples."""

from typing import Any

import numpy as np

from speechjax.errors import UserError
from speechjax.evals import _answers, _groups
from speechjax.pictures import figure_of, pixels
from speechjax.scoring import bootstrap, numbers
from speechjax.train import Job


class Values:
    """Scores of the task regress over every held-out example with a number: `mae` and `rmse` in the numbers' unit, and
    the correlations `pearson`, `spearman` and `ccc` (Lin's concordance).

    `chance_mae` is that of the median of these numbers.  The others have limits of 95 % by bootstrap over recordings,
    `_low` and `_high`.  Where all predictions are one number, two of the correlations have no value.  `head` names a
    head of `several`.  `group`, meta:FIELD or id:REGEX: `mae` by group of recordings, with the worst and the gap.

    Raises UserError where no held-out recording has a number, or all have the same, and for a `group` that fits none.
    """

    def __init__(self, job: Job, *, every: int, head: str = "", group: str = ""):
        self.job, self.every = job, every
        self.head = _answers.find_head(job, "values", head, ["regress"])
        label = _answers.find_label(job, self.head)
        self._numbers = label.table[label.codes].astype(np.float64)
        examples = _answers.held_out(job)
        examples = examples[np.isfinite(self._numbers[examples])]
        if len(found := np.unique(self._numbers[examples])) < 2:
            has = "has a number" if not len(found) else f"differs: all are {found[0]:.4g}"
            raise UserError(f"values: no held-out recording {has} (config.data.label={label.source!r})")
        self._groups = _groups.read(job.data.records, examples, group)
        self._compute = _answers.answerer(job)

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        key = f"{self.head.prefix}value"
        examples, found = _answers.collect(self.job, self._compute, {"params": params, **extra}, [key])
        true, predicted = self._numbers[examples], found[key].astype(np.float64)
        known = np.isfinite(true)
        examples, true, predicted = examples[known], true[known], predicted[known]
        off, ones = np.abs(predicted - true), np.ones(len(true))
        blocks = _groups.blocks(self.job.data.records, examples)
        found = bootstrap.intervals_of(
            lambda weights: numbers.agreements(true, predicted, weights), len(true), blocks=blocks
        )
        metrics = _answers.limited("mae", found["mae"])
        metrics["chance_mae"] = float(np.mean(np.abs(true - np.median(true))))
        for key in ("rmse", "pearson", "spearman", "ccc"):
            metrics |= _answers.limited(key, found[key])
        if self._groups:
            groups = [self._groups[example] for example in examples.tolist()]
            metrics |= _groups.show(self.job, step, "mae", off, ones, groups, blocks=blocks, scale=1.0)
        if self.job.logs.enabled:
            title = f"step {step}    MAE {metrics['mae']:.3g}, CCC {metrics['ccc']:.2f}"
            self.job.logs.picture(step, name, scatter(true, predicted, title))
        _answers.show(self.job, step, name, metrics)
        return metrics


def scatter(true: np.ndarray, predicted: np.ndarray, title: str) -> np.ndarray:
    """Predictions [N] over references [N], and the line where they would be equal: uint8 [H, W, 3]."""
    figure = figure_of((5.4, 5.0))
    axes = figure.subplots()
    low, high = float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))
    margin = 0.04 * (high - low)
    axes.plot([low, high], [low, high], color="0.4", linestyle="--", linewidth=1, label="equal")
    # Many dots would be one blot.
    axes.plot(true, predicted, "o", color="C0", markersize=3, alpha=float(np.clip(300 / len(true), 0.08, 0.7)))
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(low - margin, high + margin)
    axes.set_aspect("equal")
    axes.grid(alpha=0.25)
    axes.set_xlabel("reference")
    axes.set_ylabel("predicted")
    axes.legend(fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12, parse_math=False)
    return pixels(figure)

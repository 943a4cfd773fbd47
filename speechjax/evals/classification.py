"""How good classifications of utterances are, and whether their probabilities mean what they say.

Shapes: N examples, V classes or tags.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from speechjax.errors import UserError
from speechjax.evals import _answers, _groups
from speechjax.scoring import bootstrap, calibration, classes, report
from speechjax.train import Job

_PICTURED = 60  # classes up to which a confusion matrix can be read
_RANKED = 300_000_000  # scores in all resamples: about a second
_NONE = bootstrap.Interval(float("nan"), float("nan"), float("nan"))


class Classification:
    """Scores of the task classify, or of heads of `several` that are, over every held-out example with a label.

    One class an utterance: `accuracy` (chance: always the class that is most frequent here), `macro_f1`, `uar` (mean
    recall), `ece` (expected calibration error), `temperature`, by which logits are best divided, and `ece_scaled`, the
    error once they are; for it each half of the recordings is scaled with the temperature of the other, so that none is
    fit on what it is judged by.  Tags: `map` (mean average precision) and F1 of decisions at 0.5, `f1_macro` and
    `f1_micro`.  All but chance and temperature have limits of 95 % by bootstrap over recordings, `_low` and `_high`;
    those of `ece` are for the temperatures found, and too high where the error is small (scoring.calibration).

    `head` names a head of `several`, or more with commas between: then `accuracy` is that all of them are right, as
    SUPERB counts intents, and `accuracy_<head>` that of each.  `group`, meta:FIELD or id:REGEX: that score by group of
    recordings, with the worst and the gap.

    Raises UserError where no held-out recording has a label, all have the same class, or a label is unknown to the
    model, and for a `group` that fits none.
    """

    def __init__(self, job: Job, *, every: int, head: str = "", group: str = ""):
        self.job, self.every = job, every
        names = [name.strip() for name in head.split(",")]
        self.heads = {name: _answers.find_head(job, "classification", name, ["classify"]) for name in names}
        self.labels = {name: _answers.find_label(job, found) for name, found in self.heads.items()}
        self.tags = [name for name, found in self.heads.items() if found.fields["loss"] == "sigmoid"]
        if self.tags and len(names) > 1:
            raise UserError(f"classification: head={head!r}, but {self.tags[0]} has tags: judge it by itself")
        held_out = _answers.held_out(job)
        for name, label in self.labels.items():
            _check(label, held_out, several_needed=name not in self.tags)
        self._groups = _groups.read(job.data.records, held_out[self._known(held_out)], group)
        self._compute = _answers.answerer(job)

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        keys = [f"{head.prefix}scores" for head in self.heads.values()]
        examples, found = _answers.collect(self.job, self._compute, {"params": params, **extra}, keys)
        known = self._known(examples)
        examples, scores = examples[known], [found[key][known] for key in keys]
        if not len(examples):
            raise UserError(f"{name}: no held-out recording that could be read has a label")
        blocks = _groups.blocks(self.job.data.records, examples)
        [label, *_] = self.labels.values()
        if self.tags:
            truth = label.table[label.codes[examples]] > 0
            metrics, by_group = self._tag_scores(truth, scores[0][:, : truth.shape[1]], blocks, step, name)
        elif len(self.heads) == 1:
            metrics, by_group = self._class_scores(label, examples, scores[0], blocks, step, name)
        else:
            metrics, by_group = self._joint_scores(examples, scores, blocks)
        if self._groups:
            groups = [self._groups[example] for example in examples.tolist()]
            metric = "f1_micro" if self.tags else "accuracy"
            metrics |= _groups.show(self.job, step, metric, *by_group, groups, blocks=blocks, higher_is_better=True)
        _answers.show(self.job, step, name, metrics)
        return metrics

    def _known(self, examples: np.ndarray) -> np.ndarray:
        """Which of them have all labels."""
        return np.all([label.codes[examples] >= 0 for label in self.labels.values()], axis=0)

    # ---- one class

    def _class_scores(
        self, label: Any, examples: np.ndarray, scores: np.ndarray, blocks: np.ndarray, step: int, name: str
    ) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray]]:
        truth, said = label.codes[examples], scores.argmax(axis=1)
        counts = classes.confusion_matrix(truth, said, scores.shape[1])
        right = (said == truth).astype(np.float64)
        confidence = _softmax(scores).max(axis=1)
        table = calibration.reliability(confidence, right > 0)
        scaled = _scaled_confidence(scores, truth, self.job.data.records.keys[examples] % np.uint64(2) > 0)
        every = len(counts)
        sparse = (
            classes.indicators(truth, every, right), classes.indicators(truth, every), classes.indicators(said, every)
        )  # fmt: skip

        def resampled(weights: np.ndarray) -> dict[str, np.ndarray]:
            found = classes.averages(*sparse, weights)._asdict()
            for key, own in (("ece", confidence), ("ece_scaled", scaled)):
                if own is not None:
                    found[key] = calibration.calibration_errors(own, right, weights)
            return found

        found = bootstrap.intervals_of(resampled, len(truth), blocks=blocks)
        metrics = {
            **_answers.limited("accuracy", bootstrap.interval(right, np.ones_like(right), blocks=blocks)),
            "chance_accuracy": float(counts.sum(axis=1).max() / counts.sum()),
            **_answers.limited("macro_f1", found["macro_f1"]),
            **_answers.limited("uar", found["uar"]),
            **_answers.limited("ece", found["ece"]),
            **_answers.limited("ece_scaled", found.get("ece_scaled", _NONE)),
            "temperature": calibration.fit_temperature(scores, truth),
        }
        self._draw_classes(counts, table, label.names, step, name)
        return metrics, (right, np.ones_like(right))

    def _draw_classes(self, counts: np.ndarray, table: Any, names: Sequence[str], step: int, name: str) -> None:
        """Pictures of confusions and of calibration, and the classes, worst first."""
        if not self.job.logs.enabled:
            return
        from speechjax.scoring import figures

        every = [*names, *(f"({k})" for k in range(len(names), len(counts)))]  # the model may have room for more
        there = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
        there = there[np.argsort(np.nan_to_num(classes.class_scores(counts).f1[there]), kind="stable")]
        shown = np.sort(there)
        if len(shown) <= _PICTURED:
            image = figures.confusion_picture(counts[np.ix_(shown, shown)], [every[k] for k in shown], f"step {step}")
            self.job.logs.picture(step, name, image)
        image = figures.reliability_diagram({name: table}, f"Calibration at step {step}")
        self.job.logs.picture(step, f"{name}_calibration", image)
        worst = report.per_class(
            f"{name} at step {step}: classes, worst first", counts[np.ix_(there, there)], [every[k] for k in there]
        )
        _answers.show_table(self.job, f"{name}_classes", worst)

    def _joint_scores(
        self, examples: np.ndarray, scores: Sequence[np.ndarray], blocks: np.ndarray
    ) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray]]:
        """All heads right, and each."""
        joint = np.stack([label.codes[examples] for label in self.labels.values()], axis=1)
        each = np.stack([own.argmax(axis=1) for own in scores], axis=1) == joint
        right, ones = np.asarray(each.all(axis=1), np.float64), np.ones(len(examples))
        frequent = np.unique(joint, axis=0, return_counts=True)[1].max()
        metrics = {
            **_answers.limited("accuracy", bootstrap.interval(right, ones, blocks=blocks)),
            "chance_accuracy": float(frequent / len(examples)),
        }
        for name, own in zip(self.heads, each.T, strict=True):
            metrics |= _answers.limited(f"accuracy_{name}", bootstrap.interval(own, ones, blocks=blocks))
        return metrics, (right, ones)

    # ---- tags

    def _tag_scores(
        self, truth: np.ndarray, scores: np.ndarray, blocks: np.ndarray, step: int, name: str
    ) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray]]:
        said = scores >= 0
        either = truth.astype(np.int64) + said
        top, bottom = (np.asarray(x.sum(axis=1), np.float64) for x in (2 * (truth & said), either))
        micro = bootstrap.interval(top, bottom, blocks=blocks)
        precision = bootstrap.intervals_of(
            lambda weights: {"map": classes.mean_average_precisions(truth, scores, weights)}, len(truth),
            blocks=blocks, resamples=int(np.clip(_RANKED // scores.size, 200, bootstrap.RESAMPLES)),
        )["map"]  # fmt: skip
        macro = bootstrap.intervals_of(
            lambda weights: {"f1": classes.macro_f1_of_tags(truth, said, weights)}, len(truth), blocks=blocks
        )["f1"]
        metrics = {
            **_answers.limited("map", precision._replace(value=classes.mean_average_precision(truth, scores))),
            # Of a class that scores can only choose at random, the precision is its share, whatever the recall.
            "chance_map": float(truth.mean(axis=0)[truth.any(axis=0)].mean()),
            **_answers.limited("f1_macro", macro),
            **_answers.limited("f1_micro", micro),
        }
        self._list_tags(truth, scores, step, name)
        return metrics, (top, bottom)

    def _list_tags(self, truth: np.ndarray, scores: np.ndarray, step: int, name: str) -> None:
        """The tags that occur, by average precision."""
        if not self.job.logs.enabled:
            return
        names, rows = next(iter(self.labels.values())).names, []
        for k in np.flatnonzero(truth.any(axis=0)).tolist():
            one = (truth[:, k : k + 1], scores[:, k : k + 1])
            rows.append(
                [names[k], int(truth[:, k].sum()), classes.mean_average_precision(*one),
                 classes.multi_label_f1(*one, 0.0).macro]
            )  # fmt: skip
        rows.sort(key=lambda row: row[2])
        cells = [[tag, n, report.number(precision, 100), report.number(f1, 100)] for tag, n, precision, f1 in rows]
        columns = ["tag", "n", "average precision, %", "F1, %"]
        title = f"{name} at step {step}: tags, worst first"
        _answers.show_table(self.job, f"{name}_tags", dict(title=title, columns=columns, rows=cells))


def _check(label: Any, held_out: np.ndarray, *, several_needed: bool) -> None:
    """Raises UserError for labels that cannot be judged by, before anything is computed."""
    if label.strangers:
        shown = ", ".join(f"{name!r} ({n:,})" for name, n in sorted(label.strangers.items())[:6])
        raise UserError(
            f"classification: the model does not know {shown} of config.data.label={label.source!r}: leave those "
            "recordings out (config.data.exclude)"
        )
    codes = label.codes[held_out]
    known = np.unique(codes[codes >= 0])
    if not len(known):
        raise UserError(f"classification: no held-out recording has a label (config.data.label={label.source!r})")
    if several_needed and len(known) == 1:
        raise UserError(
            f"classification: all held-out recordings are {label.names[int(known[0])]!r}: hold out others too "
            "(config.data.valid, config.data.valid_seconds)"
        )


def _softmax(scores: np.ndarray) -> np.ndarray:
    from scipy.special import softmax

    return softmax(scores.astype(np.float64), axis=1)


def _scaled_confidence(scores: np.ndarray, truth: np.ndarray, half: np.ndarray) -> np.ndarray | None:
    """Confidence where each half is scaled by the temperature of the other; None without two halves."""
    if half.all() or not half.any():
        return None
    confidence = np.zeros(len(truth))
    for own in (half, ~half):
        confidence[own] = _softmax(scores[own] / calibration.fit_temperature(scores[~own], truth[~own])).max(axis=1)
    return np.minimum(confidence, 1.0)

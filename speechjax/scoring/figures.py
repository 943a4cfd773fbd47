"""Scores as pictures, uint8 [height, width, 3], for `Logs.picture`.

Shapes: K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from speechjax.curves import COLORS
from speechjax.pictures import figure_of, pixels
from speechjax.scoring import calibration, classes, detection, verification
from speechjax.scoring.bootstrap import Interval
from speechjax.scoring.robustness import BABBLE, CLEAN, REVERBERATION, WHITE, Condition

_NUMBERED = 20  # classes up to which a cell is large enough for a number
_PERCENTS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80)
_AXES = {WHITE: "SNR of white noise, dB", BABBLE: "SNR of babble, dB", REVERBERATION: "reverberation time, s"}


def reliability_diagram(tables: Mapping[str, calibration.Reliability], title: str) -> np.ndarray:
    """Accuracy over confidence, a panel a system, and below how many utterances are how sure."""
    figure = figure_of((3.9 * len(tables) + 0.6, 4.8))
    axes = figure.subplots(2, len(tables), sharex=True, squeeze=False, gridspec_kw={"height_ratios": [3, 1]})
    for (name, table), upper, lower in zip(tables.items(), axes[0], axes[1], strict=True):
        width, used = np.diff(table.edges), table.count > 0
        left = table.edges[:-1]
        upper.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1, label="calibrated")
        upper.bar(left[used], table.accuracy[used], width[used], align="edge", color="C0", alpha=0.35, edgecolor="C0")
        upper.plot(table.confidence[used], table.accuracy[used], "o", color="C0", markersize=4, label="mean of a bin")
        error = calibration.expected_calibration_error(table)
        upper.set_title(f"{name}: ECE {error:.1%}, {int(table.count.sum()):,} utterances", fontsize=10)
        upper.set_ylim(0, 1)
        lower.bar(left, table.count / table.count.sum(), width, align="edge", color="0.6", edgecolor="0.3")
        lower.set_xlim(0, 1)
        lower.set_xlabel("confidence")
        upper.legend(fontsize=8, frameon=False, loc="upper left")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share of\nutterances")
    return _finished(figure, title)


def confusion_picture(counts: np.ndarray, names: Sequence[str], title: str) -> np.ndarray:
    """A confusion matrix [K, K], each row in shares of its references; numbers in % where there is room."""
    counts = np.asarray(counts)
    there = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(there, 1)
    size = max(4.2, min(11.0, 1.8 + 0.45 * len(names)))
    figure = figure_of((size + 1.0, size))
    axes = figure.subplots()
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(shown, ax=axes, pad=0.02, fraction=0.045, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    places = range(len(names))
    axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8, parse_math=False)
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    if len(names) <= _NUMBERED:
        for row, column in np.argwhere(counts > 0):
            ink = "white" if share[row, column] > 0.55 else "black"
            percent = 100 * share[row, column]
            text = f"{percent:.0f}" if percent >= 1 else "<1"
            axes.text(column, row, text, color=ink, fontsize=8, ha="center", va="center")
    axes.set_xlabel("predicted")
    axes.set_ylabel("reference")
    return _finished(figure, f"{title}    accuracy {classes.accuracy(counts):.1%} of {int(counts.sum()):,}")


def det_curves(systems: Mapping[str, verification.Errors], title: str) -> np.ndarray:
    """Misses over false alarms, both on a normal-deviate scale (Martin et al. 1997), with the equal error rates."""
    from scipy.stats import norm

    figure = figure_of((6.2, 5.6))
    axes = figure.subplots()
    lowest = _PERCENTS[0] / 100
    axes.plot(*[norm.ppf([lowest, 0.8])] * 2, color="0.4", linestyle=":", linewidth=1)
    for color, (name, errors) in zip(_colors(len(systems)), systems.items(), strict=True):
        rate = verification.equal_error_rate(errors).rate
        # Rates of 0 and 1 are infinitely far away: they lie on the edge.
        x, y = (norm.ppf(np.clip(rates, lowest / 2, 0.9)) for rates in (errors.false_alarms, errors.misses))
        axes.plot(x, y, color=color, label=f"{name}: EER {rate:.2%}")
        axes.plot(*[norm.ppf(np.clip(rate, lowest / 2, 0.9))] * 2, "o", color=color, markersize=5)
    ticks, words = norm.ppf(np.array(_PERCENTS) / 100), [f"{p:g}" for p in _PERCENTS]
    axes.set_xticks(ticks, words)
    axes.set_yticks(ticks, words)
    axes.set_xlim(ticks[0], ticks[-1])
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_aspect("equal")
    axes.grid(alpha=0.25)
    axes.set_xlabel("false alarms, %")
    axes.set_ylabel("misses, %")
    axes.legend(fontsize=9, loc="upper right")
    return _finished(figure, title)


def false_reject_curves(curves: Mapping[str, detection.Curve], title: str) -> np.ndarray:
    """False rejects over false alarms an hour, the latter on a logarithmic scale; alarms of 0 lie on the left edge."""
    figure = figure_of((6.6, 4.2))
    axes = figure.subplots()
    rates = np.concatenate([curve.false_alarms for curve in curves.values()])
    lowest = rates[rates > 0].min() / 2 if (rates > 0).any() else 0.01
    for color, (name, curve) in zip(_colors(len(curves)), curves.items(), strict=True):
        x = np.maximum(curve.false_alarms, lowest)
        axes.plot(x, 100 * curve.false_rejects, color=color, drawstyle="steps-pre", label=name)
    axes.set_xscale("log")
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.25, which="both")
    axes.set_xlabel("false alarms an hour")
    axes.set_ylabel("false rejects, %")
    axes.legend(fontsize=9, frameon=False)
    return _finished(figure, title)


def condition_curves(
    scores: Mapping[str, Mapping[str, Interval]], conditions: Sequence[Condition], ylabel: str, title: str, *,
    scale: float = 100.0,
) -> np.ndarray:  # fmt: skip
    """A score against how bad the audio is, a panel a kind of harm, a colour a system, with intervals.

    scores: {system: {condition's name: score}}; what "clean" audio gives is a dashed line.  To the right it gets worse.
    """
    kinds = [kind for kind in _AXES if any(condition.kind == kind for condition in conditions)]
    figure = figure_of((4.0 * len(kinds) + 1.4, 3.8))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for kind, axes in zip(kinds, panels, strict=True):
        own = sorted((c for c in conditions if c.kind == kind), key=lambda c: c.level)
        levels = [condition.level for condition in own]
        for color, (system, found) in zip(_colors(len(scores)), scores.items(), strict=True):
            value, low, high = scale * np.array([found[condition.name] for condition in own]).T
            # A percentile interval may lie beside the score; without one there is no bar.
            errors = np.maximum(np.nan_to_num([value - low, high - value]), 0)
            label = system if kind == kinds[0] else None
            axes.errorbar(levels, value, yerr=errors, color=color, marker="o", markersize=4, capsize=3, label=label)
            axes.axhline(scale * found[CLEAN].value, color=color, linestyle="--", linewidth=1,
                         label=f"{system}, clean" if kind == kinds[0] else None)  # fmt: skip
        axes.set_xticks(levels, [f"{level:g}" for level in levels])
        if kind != REVERBERATION:  # the lower the ratio, the worse
            axes.invert_xaxis()
        axes.set_xlabel(_AXES[kind])
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(ylabel)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return _finished(figure, title)


def _colors(count: int) -> list[str]:
    return [COLORS[k % len(COLORS)] for k in range(count)]


def _finished(figure: Any, title: str) -> np.ndarray:
    figure.suptitle(title, fontsize=12, parse_math=False)
    return pixels(figure)

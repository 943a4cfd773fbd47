"""Metrics over time as figures, grouped by what they say, for whichever objective wrote them."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechjax.display import display
from speechjax.logs import replace_file

# Figures of related metrics: the first whose pattern a name fits has it.  What has a chance level is a loss or a score;
# what fits nothing goes to "other".
FIGURES = {
    "speed": r"steps_per_second|audio_hours_per_second|input_wait_share",
    "optimization": r"grad_norm|learning_rate|skipped|unread|gumbel_temperature|teacher_rate|(masked|labelled)_share",
    "codebook": r".*perplexity|diversity|commitment|.*codes|dead",
    "variation": r".*(variance|variation|deviation)",
    "probe": r"score|score_\d+_shot|within|across|pnmi|.*purity",
    "loss": r"loss|accuracy|.*_accuracy|similarity_\d+|.*penalty|.*error|.*error_rate|.*mse",
}
ORDER = ("loss", "codebook", "variation", "probe", "other", "optimization", "speed")
# What is drawn as a grey line in another metric's panel, for comparison, where that one is there.
REFERENCES = {
    "copy_error": "prediction", "linear_error": "prediction", "copy_rmse": "rmse", "linear_rmse": "rmse",
    "interpolation_error": "frame_error", "target_variance": "prediction_variance",
    "target_deviation": "output_deviation", "target_perplexity": "prediction_perplexity",
}  # fmt: skip
CONTROLS = re.compile(r"(?P<base>.+)_(random|log_mel|mfcc)")  # of evaluations
SCHEDULES = ("learning_rate", "gumbel_temperature", "teacher_rate")  # without noise: a smoothed line would lag
COLORS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")
_STYLES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))
_COLUMNS = 3

Series = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]  # {metric: {split: [(step, value), ...]}}


def chance_of(name: str, known: Any) -> str | None:
    """The metric among `known` that is the chance level of `name`: chance_<name>, or of all <name>_<number>."""
    for candidate in (f"chance_{name}", f"chance_{re.sub(r'_[0-9]+$', '', name)}"):
        if candidate in known and candidate != name:
            return candidate
    return None


def reference_of(name: str, known: Any) -> str | None:
    """The metric among `known` in whose panel `name` is a grey line; None: it has a panel of its own."""
    if name.startswith("chance_"):
        base = name.removeprefix("chance_")
        return next((other for other in known if chance_of(other, known) == name), base)
    control = CONTROLS.fullmatch(name)
    base = control["base"] if control else REFERENCES.get(name)
    return base if base in known else None


def figure_of(name: str, known: Any) -> str:
    """The figure of a metric."""
    for figure, pattern in FIGURES.items():
        if re.fullmatch(pattern, name):
            return figure
    return "loss" if chance_of(name, known) else "other"


def draw_all(folder: Path, series: Series) -> list[str]:
    """One PNG a figure that has something to show; the names of those, in the order to show them."""
    figures: dict[str, list[str]] = {figure: [] for figure in ORDER}
    for name in series:
        if name != "seconds" and reference_of(name, series) is None:
            figures[figure_of(name, series)].append(name)
    drawn = []
    for figure, metrics in figures.items():
        if metrics:
            metrics.sort(key=lambda name: (name != "loss", chance_of(name, series) is None, name))
            _draw(folder / f"curves_{figure}.png", metrics, series)
            drawn.append(f"curves_{figure}")
    return drawn


def _draw(path: Path, metrics: Sequence[str], series: Series) -> None:
    rows = -(-len(metrics) // _COLUMNS)
    figure = _figure(4.2 * _COLUMNS, 2.9 * rows)
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, _COLUMNS, index + 1)
        scale = display(metric).scale
        for color, (split, points) in zip(COLORS, series[metric].items(), strict=False):
            steps, values = zip(*points, strict=True)
            values = [v * scale for v in values]
            many = len(points) > 30 and metric not in SCHEDULES
            marker = "o" if len(points) < 3 else None
            axes.plot(steps, values, color=color, alpha=0.25 if many else 1, marker=marker, markersize=3,
                      label=None if many else split)  # fmt: skip
            if many:
                axes.plot(steps, _smooth(values), color=color, label=split)
        beside = [name for name in series if reference_of(name, series) == metric or name == chance_of(metric, series)]
        for style, name in zip(_STYLES, beside, strict=False):
            _draw_reference(axes, metric, name, series[name], style, scale)
        axes.set_title(display(metric).title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    _save(figure, path)


def _draw_reference(axes: Any, metric: str, name: str, splits: Mapping[str, Any], style: Any, scale: float) -> None:
    label: str | None = "chance" if name.startswith("chance_") else display(name).title
    if control := CONTROLS.fullmatch(name):
        label = {"random": "untrained", "log_mel": "log-mel", "mfcc": "MFCC"}[control[2]]
    for points in splits.values():
        steps, values = zip(*points, strict=True)
        values = [v * scale for v in values]
        marker = "_" if len(points) < 2 else None
        axes.plot(steps, values, color="0.4", linestyle=style, linewidth=1, marker=marker, label=label)
        label = None  # of the first split only


def _smooth(values: Sequence[float], memory: float = 0.85) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        smoothed.append(total / weight)
    return smoothed


def draw_plot(path: Path, plot: Mapping[str, Any]) -> None:
    """The plot of a table: `lines` {name: [y of each x]} over `x`, `levels` {name: y}, `spread` {name: [+- of each x]}.

    `xlabel` and `ylabel` name the axes.  The first line is the one in question and drawn in colour, as are others only
    where there are more than two: one beside it is its control.
    """
    figure = _figure(6.3, 3.4)
    axes = figure.add_subplot()
    x, lines = plot["x"], plot["lines"]
    colors = COLORS if len(lines) > 2 else (COLORS[0], "0.4")
    for color, (name, values) in zip(colors, lines.items(), strict=False):
        style = "-" if color != "0.4" else "--"
        axes.errorbar(x, values, yerr=plot.get("spread", {}).get(name), color=color, linestyle=style, marker="o",
                      markersize=4, capsize=3, label=name)  # fmt: skip
    for style, (name, level) in zip(_STYLES[1:], plot.get("levels", {}).items(), strict=False):
        axes.axhline(level, color="0.4", linestyle=style, linewidth=1, label=name)
    if min(x) > 0 and max(x) >= 10 * min(x):
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(x, [str(value) for value in x])
    axes.set_xlabel(plot["xlabel"])
    axes.set_ylabel(plot["ylabel"])
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # late: half a second

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    replace_file(path, buffer.getvalue())

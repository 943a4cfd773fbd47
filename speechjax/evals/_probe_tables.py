"""What a probe found as tables: dicts of title, columns, rows and, for the report page, a plot."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from speechjax.evals._linear_probe import ProbeResult

THIS, RANDOM, LOG_MEL, MFCC = "this encoder", "random-initialised encoder", "log-mel statistics", "MFCC statistics"
METRICS = {THIS: "score", RANDOM: "score_random", LOG_MEL: "score_log_mel", MFCC: "score_mfcc"}  # in %


class Scores(TypedDict):
    """What one seed found in one row's features; `shots` is {k: {speaker: % correct of each draw}}."""

    probe: ProbeResult
    shots: dict[str, dict[str, list[float]]]


Rows = Mapping[str, Sequence[Scores]]  # {row: scores of each seed}
Table = dict[str, Any]


def speakers(rows: Rows, step: int) -> Table:
    """Accuracy on each tested speaker."""
    names = sorted(rows[THIS][0]["probe"]["accuracy"])
    cells = []
    for row, seeds in rows.items():
        means = [seed["probe"]["mean"] for seed in seeds]
        each = [np.mean([seed["probe"]["accuracy"][name] for seed in seeds]) for name in names]
        cells.append([row, f"{np.mean(means):.1f}", f"{np.std(means):.1f}", *(f"{value:.1f}" for value in each)])
    title = f"Linear probe at step {step}: accuracy in % on each speaker, trained on all others"
    return dict(title=title, columns=["features", "mean", "std over seeds", *names], rows=cells)


def layers(rows: Rows, step: int) -> Table:
    """Accuracy of every hidden state by itself, mean over seeds and tested speakers."""
    means = {
        row: np.mean([[list(layer.values()) for layer in seed["probe"]["layers"]] for seed in seeds], axis=(0, 2))
        for row, seeds in rows.items()
    }
    lines = {row: values.round(2).tolist() for row, values in means.items() if row in (THIS, RANDOM)}
    levels = {row: round(float(values[0]), 2) for row, values in means.items() if row not in lines}
    beside = ", ".join(f"{row} {value:.1f}" for row, value in levels.items())
    title = f"Linear probe of each hidden state at step {step}: accuracy in %, mean over speakers; {beside}"
    cells = [[k, *(f"{values[k]:.1f}" for values in lines.values())] for k in range(len(lines[THIS]))]
    plot = dict(x=list(range(len(cells))), xlabel="hidden state", ylabel="accuracy in %", lines=lines, levels=levels)
    return dict(title=title, columns=["hidden state", *lines], rows=cells, plot=plot)


def shots(rows: Rows, step: int) -> Table:
    """Accuracy with few labels: mean and standard deviation over draws of the mean over tested speakers."""
    counts = list(rows[THIS][0]["shots"])
    found = {row: [_draws(seeds, k) for k in counts] for row, seeds in rows.items()}
    lines = {row: [round(float(draws.mean()), 2) for draws in each] for row, each in found.items()}
    spread = {row: [round(float(draws.std()), 2) for draws in each] for row, each in found.items()}
    cells = [
        [row, *(f"{mean:.1f} ± {std:.1f}" for mean, std in zip(lines[row], spread[row], strict=True))] for row in lines
    ]
    number = len(next(iter(found.values()))[0])
    title = f"Few labels at step {step}: accuracy in %, mean over speakers, ± standard deviation over {number} draws"
    plot = dict(
        x=[int(k) for k in counts], xlabel="labelled examples a class", ylabel="accuracy in %", lines=lines,
        spread=spread,
    )  # fmt: skip
    columns = ["features", *(f"{k} example{'s' * (k != '1')} a class" for k in counts)]
    return dict(title=title, columns=columns, rows=cells, plot=plot)


def _draws(seeds: Sequence[Scores], k: str) -> np.ndarray:
    """Mean over speakers of every draw of every seed, in %."""
    return np.concatenate([np.mean(list(seed["shots"][k].values()), axis=0) for seed in seeds])

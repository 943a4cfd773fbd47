"""What the units of a store are like: how evenly they are used, and how well they agree with phones.

Shapes: P phones, K units.
"""

import base64
import html
import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechjax import metrics
from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.records import Records
from speechjax.data.units import Units, identities
from speechjax.labelling.codebook import Codebook
from speechjax.labelling.fit import SAVE_EVERY
from speechjax.logs import replace_file
from speechjax.report import STYLE

_MOST = 20_000  # recordings with phones that are looked at
_LABELLED_UNITS = 130  # up to here each unit is wide enough to carry its number
_PHONES = 60  # that a picture has rows for
_FLOOR = 0.02  # of P(phone | unit): what is less is not drawn


@dataclass(frozen=True, eq=False)
class Found:
    """`counts` [K]: how often each unit occurs; `joint` [P, K] with `phones`, where there are any.

    `shuffled` [P, K] is `joint` with the units of all its frames in another order: what chance would give.
    """

    units: Units
    hours: float
    counts: np.ndarray
    phones: list[str]
    joint: np.ndarray
    shuffled: np.ndarray


def phone_of_units(phones: list[tuple[str, float, float]], symbols: dict[str, int], n: int, hop: int, extra: int
                   ) -> np.ndarray:  # fmt: skip
    """The phone int64 [n] at the centre of every unit's frame; -1 where none is: `phones` are (symbol, start s, end s).

    The frame of unit j takes samples [j hop, j hop + hop + extra).
    """
    centre = (np.arange(n) * hop + (hop + extra) / 2) / SAMPLE_RATE
    ends = np.array([end for _, _, end in phones])
    starts = np.array([start for _, start, _ in phones])
    at = np.searchsorted(ends, centre, side="right")
    inside = at < len(phones)
    at = np.minimum(at, len(phones) - 1)
    inside &= centre >= starts[at]
    return np.where(inside, np.array([symbols[symbol] for symbol, _, _ in phones])[at], -1)


def measure(units: Units, records: Records) -> Found:
    """Looks at a store and, of at most 20,000 recordings that have them, at the phones in the recordings' meta data."""
    counts = np.asarray(units.info["counts"], np.int64)
    rows = units.find(identities(records))
    known = np.flatnonzero(rows >= 0)
    aligned = []
    for i in known[:: max(1, len(known) // _MOST)].tolist():
        phones = _aligned(records.meta(i).get("phones"))
        if phones:
            aligned.append((phones, units.read(int(rows[i]))))
    symbols = sorted({symbol for phones, _ in aligned for symbol, _, _ in phones})
    number = {symbol: n for n, symbol in enumerate(symbols)}
    heard = [phone_of_units(phones, number, len(own), units.hop, units.extra) for phones, own in aligned]
    phone = np.concatenate([np.zeros(0, np.int64), *heard])
    unit = np.concatenate([np.zeros(0, np.int64), *(own for _, own in aligned)])
    mixed = np.random.default_rng(0).permutation(unit)
    hours = float(np.sum(units.index["samples"])) / SAMPLE_RATE / 3600
    tables = [metrics.joint_counts(phone, u, len(symbols), units.codes) for u in (unit, mixed)]
    return Found(units, hours, counts, symbols, *tables)


def _aligned(phones: Any) -> list[tuple[str, float, float]]:
    """Phones with times in their order; empty where they are not (symbols alone, or nothing)."""
    try:
        return sorted(((str(s), float(a), float(b)) for s, a, b in phones or []), key=lambda phone: phone[1])
    except (TypeError, ValueError):
        return []


def rows(found: Found) -> list[tuple[str, str]]:
    """(what, number) for people."""
    counts, codes = found.counts, len(found.counts)
    total = max(1, int(counts.sum()))
    rate = SAMPLE_RATE / found.units.hop
    shown = [
        ("Recordings", f"{len(found.units):,}"),
        ("Hours", f"{found.hours:,.2f}"),
        ("Units", f"{counts.sum():,} of {rate:g} Hz"),
        ("Codes", f"{codes:,}"),
        ("Perplexity", f"{metrics.perplexity(counts):.1f} of {codes:,}"),
        ("Dead codes", f"{int((counts == 0).sum()):,}"),
        ("Most used", f"code {counts.argmax()}: {counts.max() / total:.2%}"),
        ("Least used", f"code {counts.argmin()}: {counts.min() / total:.3%}"),
    ]
    if found.joint.sum():
        joint, mixed = found.joint, found.shuffled
        shown += [
            ("Phones", f"{len(found.phones)}, in {joint.sum():,} frames"),
            ("PNMI", f"{metrics.pnmi(joint):.3f} (units shuffled: {metrics.pnmi(mixed):.3f})"),
            ("Phone purity", f"{metrics.phone_purity(joint):.3f} (units shuffled: {metrics.phone_purity(mixed):.3f})"),
            ("Cluster purity", f"{metrics.cluster_purity(joint):.3f} (units shuffled: "
             f"{metrics.cluster_purity(mixed):.3f})"),
        ]  # fmt: skip
    return shown


def show(found: Found) -> None:
    """The numbers on the console."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for row in rows(found):
        table.add_row(*row)
    Console(stderr=True, markup=False).print(table)


def write_page(folder: Path, found: Found, codebook: Codebook) -> Path:
    """Writes `folder`/index.html, statistics.json and the pictures; the page's path."""
    numbers = dict(
        hours=found.hours, perplexity=metrics.perplexity(found.counts), dead=int((found.counts == 0).sum()),
        pnmi=metrics.pnmi(found.joint), phone_purity=metrics.phone_purity(found.joint),
        cluster_purity=metrics.cluster_purity(found.joint), pnmi_shuffled=metrics.pnmi(found.shuffled),
        phones=found.phones, joint=found.joint.tolist(), counts=found.counts.tolist(),
    )  # fmt: skip
    clean = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in numbers.items()}
    replace_file(folder / "statistics.json", (json.dumps(clean) + "\n").encode())
    pictures = {"usage": draw_usage(found.counts, codebook.fit.get("history", []), codebook.fit.get("request", {}))}
    if found.joint.sum():
        pictures["phones"] = draw_joint(found.joint, found.phones)
    images = []
    for name, png in pictures.items():
        replace_file(folder / f"{name}.png", png)
        data = base64.b64encode(png).decode()
        images.append(f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>')
    boxes = [f"<b>{html.escape(value)}</b><span>{html.escape(what)}</span>" for what, value in rows(found)]
    cards = "".join(f'<div class="card">{box}</div>' for box in boxes)
    fit = codebook.fit
    how = (
        f"{len(codebook.centroids):,} centroids of {codebook.centroids.shape[1]} dimensions, fitted to "
        f"{fit['features']}, {fit['hours']:.2f} h, in {fit['batches']:,} batches; mean squared distance "
        f"{fit['inertia']:.4g}. Codebook {codebook.digest[:16]}, labels {found.units.digest[:16]}."
    )
    note = (
        "PNMI is the share of the uncertainty about a frame's phone that its unit takes away, phone purity the "
        "accuracy of calling every unit by its likeliest phone, cluster purity the share of frames that have their "
        "phone's likeliest unit (Hsu et al. 2021, section IV-D). They depend on the number of codes, and on the phones."
        if found.joint.sum()
        else "The recordings have no phone labels with times, so nothing is said about phones; embedded:0.1 has them."
    )
    config = html.escape(json.dumps({"features": codebook.features, "fit": fit}, indent=1))
    title = html.escape(folder.absolute().name)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><h1>{title}</h1><p>{html.escape(how)}</p><div class="numbers">{cards}</div>{"".join(images)}'
        f"<p>{html.escape(note)}</p><details><summary>codebook.json</summary><pre>{config}</pre></details></body></html>\n"
    )
    replace_file(folder / "index.html", page.encode("utf-8", "backslashreplace"))
    return folder / "index.html"


def draw_usage(counts: np.ndarray, history: list[float], request: dict[str, Any]) -> bytes:
    """PNG: the share of every code, most used first, beside an even use; and how the fit went."""
    from matplotlib.figure import Figure  # late: half a second

    figure = Figure(figsize=(11, 3.2), layout="constrained", facecolor="white")
    usage, fit = figure.subplots(1, 2)
    share = 100 * np.sort(counts)[::-1] / max(1, counts.sum())
    usage.bar(np.arange(len(share)), share, width=1.0, color="C0")
    usage.axhline(100 / len(share), color="0.3", linestyle="--", linewidth=1, label="if all were used alike")
    usage.set(title="Use of the codes", xlabel="codes, most used first", ylabel="% of units")
    usage.set_xlim(-0.5, len(share) - 0.5)
    usage.legend(fontsize=8, frameon=False)
    lloyd = request.get("method") == "lloyd"
    fit.plot(
        np.arange(1, len(history) + 1) * (1 if lloyd else SAVE_EVERY), history, marker="o" if len(history) < 3 else None
    )
    fit.set(title="Mean squared distance while fitting", xlabel="passes" if lloyd else "batches")
    for axes in (usage, fit):
        axes.title.set_fontsize(11)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return _png(figure)


def draw_joint(joint: np.ndarray, phones: list[str]) -> bytes:
    """PNG of P(phone | unit): a column a unit, grouped by their likeliest phone; phones by frequency.

    Good units are dark in one place: the diagonal steps down, and the longer a step, the more units a phone has.
    """
    from matplotlib.figure import Figure  # late: half a second

    used = np.flatnonzero(joint.sum(axis=0))
    order = np.argsort(-joint.sum(axis=1), kind="stable")
    order = order[joint.sum(axis=1)[order] > 0][:_PHONES]
    share = joint[np.ix_(order, used)] / joint[:, used].sum(axis=0)
    names = [phones[p] for p in order]
    rare = int((joint.sum(axis=1) > 0).sum()) - len(order)
    if rare:
        share = np.concatenate([share, 1 - share.sum(axis=0, keepdims=True)])
        names.append(f"{rare} others")
    columns = np.lexsort((-share.max(axis=0), share.argmax(axis=0)))
    share = share[:, columns]
    wide = len(used) <= _LABELLED_UNITS
    figure = Figure(
        figsize=(float(np.clip(0.13 * len(used) + 2, 9, 18)), float(np.clip(0.155 * len(names) + 1.6, 4, 22))),
        layout="constrained", facecolor="white",
    )  # fmt: skip
    axes = figure.subplots()
    image = axes.imshow(
        np.ma.masked_less(share, _FLOOR), aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_yticks(np.arange(len(names)), names, fontsize=7, parse_math=False)
    if wide:
        axes.set_xticks(np.arange(len(used)), used[columns], fontsize=5, rotation=90)
    axes.set_xlabel(f"{len(used)} units, by their likeliest phone" + ("" if wide else " (numbers left out)"))
    axes.set_ylabel("phones, most frequent first")
    axes.set_title("P(phone | unit)", fontsize=11)
    axes.tick_params(length=1.5)
    axes.grid(alpha=0.12, linewidth=0.4)
    figure.colorbar(image, ax=axes, shrink=0.5, pad=0.01)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box will do
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

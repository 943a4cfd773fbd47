"""The statistics of a prepared data set for people: tables, a picture, and the page that holds them."""

import base64
import collections
import html
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.statistics import (
    QUANTILES,
    SILENCE_DBFS,
    TREBLE_DB,
    Statistics,
    largest,
    length_quantile,
    numbers,
)
from speechjax.data.statistics_measure import length_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ALL = "all"
_LINES = 8  # parts that a picture can tell apart; more are drawn as one
_ROWS = 30  # of a table of names
_RATES = 7  # bars
_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)  # s, bins that people like
_LOWEST_DRAWN = -100  # dBFS; the rounding to int16 lies here, and digital silence below
STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --line: #d9dde4; --ink: #17191e; --quiet: #667; }
@media (prefers-color-scheme: dark) {
  :root { --page: #13151a; --card: #1d2027; --line: #353a46; --ink: #e7e9ee; --quiet: #9aa; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 70rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
section, .cards div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
section { margin: .75rem 0; overflow-x: auto; padding: .75rem 1rem; }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.cards div { padding: .75rem 1rem; } .cards b { display: block; font-size: 1.3rem; }
.cards span, .quiet { color: var(--quiet); } img { background: #fff; border-radius: .4rem; max-width: 100%; }
table { border-collapse: collapse; } td, th { border-bottom: 1px solid var(--line); padding: .3rem .8rem;
  text-align: right; white-space: nowrap; } td:first-child, th:first-child { text-align: left; }
th { max-width: 16rem; min-width: 4rem; overflow-wrap: anywhere; vertical-align: bottom; white-space: normal; }
tr:last-child td { border-bottom: 0; } li { overflow-wrap: anywhere; } summary { cursor: pointer; }
"""


# ---- numbers


def with_all(parts: dict[str, Statistics]) -> dict[str, Statistics]:
    """The parts, and what they come to together unless there is just one."""
    if len(parts) == 1:
        return parts
    total = Statistics.new()
    for part in parts.values():
        total.merge(part)
    name = _ALL
    while name in parts:
        name += " parts"
    return {**parts, name: total}


def overview(parts: dict[str, Statistics]) -> list[list[str]]:
    """A table for people: a header, then a row for each number, with a column for each part and for all."""
    columns = with_all(parts)
    found = [numbers(part) for part in columns.values()]
    return [["", *columns], *([label, *(show(f) for f in found)] for label, show in _OVERVIEW.items())]


def _number(name: str, unit: str, digits: int = 1) -> Callable[[dict[str, Any]], str]:
    return lambda found: "–" if found[name] is None else f"{found[name]:,.{digits}f}{unit}"


def _percent(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda found: "–" if found[name] is None else f"{100 * found[name]:.3g} %"


def _range(unit: str, name: str, digits: int) -> Callable[[dict[str, Any]], str]:
    shown = [_number(f"{quantile}_{name}", "", digits) for quantile in QUANTILES]
    return lambda found: "–" if found[f"median_{name}"] is None else " / ".join(s(found) for s in shown) + unit


_OVERVIEW = {
    "Hours": _number("hours", " h", 2),
    "Recordings": _number("recordings", "", 0),
    "Rejected": _number("rejected", "", 0),
    "Length, 5 % / median / 95 %": _range(" s", "seconds", 1),
    "Mean length": _number("mean_seconds", " s", 1),
    "Longest": _number("longest_seconds", " s", 1),
    "Level, 5 % / median / 95 %": _range(" dBFS", "level_dbfs", 0),
    "Peak, median": _number("median_peak_dbfs", " dBFS", 0),
    "Samples at full scale": _percent("full_scale_share"),
    "Clipped recordings": _number("clipped_recordings", "", 0),
    f"Frames below {SILENCE_DBFS} dBFS": _percent("silent_share"),
    "Frames of zeros": _percent("digital_silence_share"),
    "Mostly silent recordings": _number("silent_recordings", "", 0),
    "Longest silence": _number("longest_silence_seconds", " s", 1),
    "Recordings with an offset": _number("offset_recordings", "", 0),
    "Sounding like 8 kHz": _number("upsampled_recordings", "", 0),
    "Speakers": _number("speakers", "", 0),
    "Languages": _number("languages", "", 0),
    "With speaker": _percent("with_speaker_share"),
    "With text": _percent("with_text_share"),
    "Characters": _number("characters", "", 0),
}
_NOTES = (
    "Levels are of the audio as stored: mono, 16 kHz, 16 bit; 0 dBFS is a constant full scale. A recording is clipped "
    "with more than 0.1 % of its samples at full scale, mostly silent with more than half of its 20 ms frames below "
    f"{SILENCE_DBFS} dBFS, and has an offset with a mean beyond 1 % of full scale. It sounds like 8 kHz when it came "
    f"at a higher or unknown rate and yet less than {TREBLE_DB} dB of its power lies above 4 kHz. Counts of more than "
    "1,024 speakers are estimates."
)


# ---- files


def write(folder: Path, title: str, parts: dict[str, Statistics]) -> Path:
    """Writes the JSON, the picture and the page of `statistics.write_page`, whose path comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    total = Statistics.new()
    for part in parts.values():
        total.merge(part)
    stored = {"title": title, "all": _stored(total), "parts": {name: _stored(part) for name, part in parts.items()}}
    _replace(folder / "statistics.json", (json.dumps(stored, indent=1) + "\n").encode())
    png = _draw(parts if len(parts) <= _LINES else {_ALL: total})
    _replace(folder / "statistics.png", png)
    # Names of files may hold bytes that are no text.
    _replace(folder / "index.html", _page(title, parts, total, png).encode("utf-8", "backslashreplace"))
    return folder / "index.html"


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all: where the disk is full, what was there stays."""
    # A name of this process, not *.tmp: another may be writing the same page, or tidying up before its own attempt.
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _stored(statistics: Statistics) -> dict[str, Any]:
    return {"numbers": numbers(statistics), "counts": statistics.to_json()}


def _page(title: str, parts: dict[str, Statistics], total: Statistics, png: bytes) -> str:
    found = numbers(total)
    names = ("Hours", "Recordings", "Rejected", "Speakers", "Languages", "Samples at full scale",
             f"Frames below {SILENCE_DBFS} dBFS")  # fmt: skip
    cards = "".join(f"<div><b>{_OVERVIEW[name](found)}</b><span>{name}</span></div>" for name in names)
    header, *rows = overview(parts)
    image = base64.b64encode(png).decode()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f'<div class="cards">{cards}</div>'
        f'<section><img src="data:image/png;base64,{image}" alt="distributions of the parts"></section>'
        f'<h2>Numbers</h2><section>{_table(header, rows)}<p class="quiet">{_NOTES}</p></section>'
        f"<h2>Where it comes from</h2>{_origins(parts)}{_rejected(total)}</body></html>\n"
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def _origins(parts: dict[str, Statistics]) -> str:
    """Tables of what the recordings were before they were prepared."""
    columns = with_all(parts)
    found = [numbers(part) for part in columns.values()]
    tables = []
    for name, title, unit, form in (
        ("rates", "Sample rate, Hz", "recordings", "{:,}"),
        ("channels", "Channels", "recordings", "{:,}"),
        ("formats", "Format", "recordings", "{:,}"),
        ("language_hours", "Language", "hours", "{:,.2f}"),
    ):
        keys = list(found[-1][name])
        rows = [[key, *(form.format(f[name][key]) if key in f[name] else "–" for f in found)] for key in keys[:_ROWS]]
        if len(keys) > _ROWS:
            rows.append([f"and {len(keys) - _ROWS:,} more in statistics.json", *("" for _ in found)])
        if rows:
            header = [title, *(f"{column}, {unit}" for column in columns)]
            tables.append(f"<section>{_table(header, rows)}</section>")
    return "".join(tables)


def _rejected(total: Statistics) -> str:
    if not total.rejected:
        return ""
    items = []
    for reason, count in list(largest(total.reasons, total.rejected).items())[:_ROWS]:
        ids = "".join(f"<li>{html.escape(id)}</li>" for id in total.examples.get(reason, []))
        more = "<li>…</li>" if ids and count > len(total.examples[reason]) else ""
        summary = f"<summary>{count:,} {html.escape(reason)}</summary>"
        items.append(f"<section><details>{summary}<ul>{ids}{more}</ul></details></section>")
    return f"<h2>Rejected</h2>{''.join(items)}"


# ---- picture


def _draw(parts: dict[str, Statistics]) -> bytes:
    """PNG of the distributions, each part's bins adding up to 100 %, so that parts of any size compare."""
    from matplotlib.figure import Figure  # late: half a second

    figure = Figure(figsize=(13, 7.4), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 3).ravel()
    _draw_lengths(axes[0], parts)
    _draw_levels(axes[1], parts, "levels", "Level of recordings (RMS)", "recordings")
    _draw_levels(axes[2], parts, "peaks", "Peaks of recordings", "recordings")
    _draw_levels(axes[3], parts, "frames", "Level of 20 ms frames", "frames", ("silence", SILENCE_DBFS))
    _draw_levels(axes[4], parts, "trebles", "Power above 4 kHz", "recordings", ("like 8 kHz", TREBLE_DB))
    axes[4].set_xlabel("dB relative to all power")
    _draw_rates(axes[5], parts)
    for each in axes:
        each.title.set_fontsize(11)
        each.tick_params(labelsize=8)
        each.grid(alpha=0.25)
        each.set_axisbelow(True)
        each.set_ylim(bottom=0)
    legend = figure.legend(
        axes[0].get_lines(),
        [_label(name, part) for name, part in parts.items()],
        loc="outside lower center", ncols=min(4, max(1, len(parts))), frameon=False, fontsize=9,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar in a name is a dollar
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box will do
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _label(name: str, part: Statistics) -> str:
    short = name if len(name) <= 44 else f"…{name[-43:]}"
    # The space: matplotlib leaves out labels that begin with an underscore.
    return f" {short.encode('utf-8', 'replace').decode()} ({part.samples / SAMPLE_RATE / 3600:,.2f} h)"


def _draw_lengths(axes: "Axes", parts: dict[str, Statistics]) -> None:
    """Up to the 99th percentile of the longest part, in about fifty bins."""
    end = max((length_quantile(part, 0.99) or 1.0 for part in parts.values()), default=1.0)
    step = next(step for step in _STEPS if end <= 50 * step or step == _STEPS[-1])
    edges = [step * k for k in range(math.ceil(end / step) + 1)]
    for part in parts.values():
        heights = [0.0] * (len(edges) - 1)
        for tenths, count in part.lengths.items():
            seconds = (tenths + length_width(tenths) / 2) / 10
            if seconds < edges[-1]:
                heights[int(seconds / step)] += 100 * count / part.recordings
        axes.step([*edges, edges[-1]], [0, *heights, 0], where="pre")
    axes.set(title="Length of recordings", xlabel="seconds", ylabel="% of recordings", xlim=(0, edges[-1]))


def _draw_levels(
    axes: "Axes", parts: dict[str, Statistics], field: str, title: str, unit: str, mark: tuple[str, int] | None = None
) -> None:
    edges = range(_LOWEST_DRAWN, 2)
    for part in parts.values():
        histogram = getattr(part, field)
        total = max(1, sum(histogram.values()))
        axes.step([*edges, 1], [0, *(100 * histogram[key] / total for key in edges[:-1]), 0], where="pre")
    if mark:
        axes.axvline(mark[1], color="0.4", linestyle="--", linewidth=1)
        axes.annotate(f"{mark[0]} ", (mark[1], 0.97), xycoords=("data", "axes fraction"), ha="right", va="top",
                      fontsize=8, color="0.3")  # fmt: skip
    axes.set(title=title, xlabel="dBFS", ylabel=f"% of {unit}", xlim=(_LOWEST_DRAWN, 1))


def _draw_rates(axes: "Axes", parts: dict[str, Statistics]) -> None:
    """A group of bars for each of the commonest rates."""
    found = [(largest(part.rates, part.recordings), max(1, part.recordings)) for part in parts.values()]
    common = collections.Counter[str]()
    for rates, _ in found:
        common.update(rates)
    names = sorted(
        (name for name, _ in common.most_common(_RATES)), key=lambda name: (not name.isdigit(), name.zfill(9))
    )
    width = 0.8 / max(1, len(found))
    for index, (rates, total) in enumerate(found):
        places = [k - 0.4 + width * (index + 0.5) for k in range(len(names))]
        axes.bar(places, [100 * rates.get(name, 0) / total for name in names], width)
    axes.set_xticks(range(len(names)), [f"{int(name) / 1000:g}" if name.isdigit() else name for name in names])
    axes.set(title="Sample rate before preparing", xlabel="kHz", ylabel="% of recordings")

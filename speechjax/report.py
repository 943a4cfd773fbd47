"""The report of a run: curves as PNG and one page, made of nothing but the workdir's files."""

import collections
import html
import io
import json
import math
from pathlib import Path
from typing import Any

from speechjax.display import display
from speechjax.logs import PICTURE_FILE, read_metrics, replace_file

# Figures of related metrics; what is in none of them goes to "other".
FIGURES = {
    "loss": ("loss", "contrastive", "accuracy"),
    "codebook": ("code_perplexity", "prob_perplexity", "diversity"),
    "optimization": ("grad_norm", "learning_rate", "skipped"),
    "speed": ("steps_per_second", "audio_hours_per_second", "input_wait_share"),
}
STYLE = """
:root { color-scheme: light dark; --card: #fff; --line: #d8dce3; --ink: #16181d; --page: #f4f5f7; --quiet: #667; }
@media (prefers-color-scheme: dark) { :root { --card: #1d2027; --line: #343945; --ink: #e7e9ee; --page: #13151a;
  --quiet: #9aa; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1.5rem; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.card b { display: block; font-size: 1.3rem; } .card span, caption, figcaption { color: var(--quiet); }
.alarm { border-left: .4rem solid #d33; } img { max-width: 100%; border-radius: .4rem; background: #fff; }
figure { margin: 1rem 0; } .scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } pre { overflow-x: auto; } audio { width: 100%; max-width: 30rem; }
"""


def write_report(workdir: Path) -> Path:
    """Draws `workdir/report/*.png` and writes `workdir/report/index.html`; returns the page's path.

    Works on a run that has only just started, and on one that is still running.
    """
    workdir = Path(workdir)
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    entries = read_metrics(workdir)
    series = _series(entries)
    curves = _draw_all(folder, series)
    sections = [
        _numbers(entries, series),
        _alarms(entries),
        *(f'<figure><img src="{name}.png" alt="{name} curves"></figure>' for name in curves),
        _table(_read(folder / "probe.json")),
        _pictures(folder),
        _rejected(workdir / "rejected.jsonl"),
        _config(workdir / "config.json"),
    ]
    title = html.escape(workdir.resolve().name)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(sections)}</body></html>\n"
    )
    replace_file(folder / "index.html", page.encode("utf-8", "backslashreplace"))  # ids need not be text
    return folder / "index.html"


Series = dict[str, dict[str, list[tuple[int, float]]]]


def _series(entries: list[dict[str, Any]]) -> Series:
    """{metric: {split: [(step, value), ...]}}, finite values only."""
    series: Series = collections.defaultdict(lambda: collections.defaultdict(list))
    for entry in entries:
        for name, value in entry.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name != "step" and number and math.isfinite(value):
                series[name][entry["split"]].append((entry["step"], float(value)))
    return series


def _draw_all(folder: Path, series: Series) -> list[str]:
    """One PNG a figure that has something to show; the names of those."""
    drawn = {name for names in FIGURES.values() for name in names} | {"seconds"}
    rest = tuple(n for n in sorted(series) if n not in drawn and not n.startswith("chance_"))
    names = []
    for figure, metrics in {**FIGURES, "other": rest}.items():
        present = [m for m in metrics if m in series]
        if present:
            _draw(folder / f"curves_{figure}.png", present, series)
            names.append(f"curves_{figure}")
    return names


def _draw(path: Path, metrics: list[str], series: Series) -> None:
    from matplotlib.figure import Figure  # late: half a second

    columns = 3
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained", facecolor="white")
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, index + 1)
        scale = display(metric).scale
        for color, (split, points) in zip(("C0", "C1", "C2", "C4", "C5"), series[metric].items(), strict=False):
            steps, values = zip(*points, strict=True)
            values = [v * scale for v in values]
            many = len(points) > 30
            marker = "o" if len(points) < 3 else None
            axes.plot(steps, values, color=color, alpha=0.25 if many else 1, marker=marker, markersize=3,
                      label=None if many else split)  # fmt: skip
            if many:
                axes.plot(steps, _smooth(values), color=color, label=split)
        chance = series.get(f"chance_{metric}", {})
        for split, points in chance.items():
            steps, values = zip(*points, strict=True)
            label = "chance" if split == next(iter(chance)) else None
            axes.plot(steps, [v * scale for v in values], color="0.4", linestyle="--", linewidth=1, label=label)
        axes.set_title(display(metric).title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    replace_file(path, buffer.getvalue())


def _smooth(values: list[float], memory: float = 0.85) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _numbers(entries: list[dict[str, Any]], series: Series) -> str:
    """The newest figures at the top of the page."""
    train = [e for e in entries if e["split"] == "train"]
    if not train:
        return '<p class="card">Nothing logged yet.</p>'
    last = train[-1]
    hours = sum((e.get("audio_hours_per_second") or 0) * (e.get("seconds") or 0) for e in train)
    cards = [("step", f"{last['step']:,}"), ("hours of audio", f"{hours:,.2f}")]
    for name in ("loss", "contrastive", "accuracy", "code_perplexity", "steps_per_second", "audio_hours_per_second"):
        if name in last:
            shown = display(name).number(last[name])
            if f"chance_{name}" in last:
                shown += f" (chance {display(name).number(last[f'chance_{name}'])})"
            cards.append((display(name).title, shown))
    boxes = "".join(f'<div class="card"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>' for k, v in cards)
    return f'<div class="numbers">{boxes}</div>'


def _alarms(entries: list[dict[str, Any]]) -> str:
    raised = [e for e in entries if e["split"] == "alarm" and e.get("message")]
    boxes = [
        f'<p class="card alarm">step {e["step"]}: <b>{html.escape(e["name"])}</b> {html.escape(e["message"])}</p>'
        for e in raised
    ]
    return "".join(["<h2>Alarms</h2>", *boxes]) if boxes else ""


def _table(table: dict[str, Any] | None) -> str:
    if not table:
        return ""
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in table["columns"])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in table["rows"]
    )
    title = html.escape(table["title"])
    return f'<h2>Probe</h2><p>{title}</p><div class="scroll card"><table><tr>{head}</tr>{body}</table></div>'


def _pictures(folder: Path) -> str:
    found = []
    for path in folder.glob("*.png"):
        match = PICTURE_FILE.fullmatch(path.name)
        if match:
            found.append((int(match["step"]), path))
    if not found:
        return ""
    figures = []
    for step, path in sorted(found, reverse=True):
        sound = path.with_suffix(".wav")
        audio = f'<br><audio controls preload="none" src="{html.escape(sound.name)}"></audio>' if sound.exists() else ""
        figures.append(
            f'<figure><img src="{html.escape(path.name)}" alt="step {step}"><figcaption>step {step}{audio}'
            "</figcaption></figure>"
        )
    return f"<h2>What it predicts</h2>{''.join(figures)}"


def _rejected(path: Path) -> str:
    if not path.exists():
        return ""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not entries:
        return ""
    counts = collections.Counter(e["reason"] for e in entries).most_common()
    summary = ", ".join(f"{n:,} {html.escape(reason)}" for reason, n in counts)
    shown = "".join(f"<li>{html.escape(e['id'])}: {html.escape(e['reason'])}</li>" for e in entries[:50])
    more = f"<li>and {len(entries) - 50:,} more in rejected.jsonl</li>" if len(entries) > 50 else ""
    return f"<h2>Left out</h2><details><summary>{summary}</summary><ul>{shown}{more}</ul></details>"


def _config(path: Path) -> str:
    config = _read(path)
    text = html.escape(json.dumps(config, indent=2))
    return f"<h2>Config</h2><details><summary>config.json</summary><pre>{text}</pre></details>" if config else ""


def _read(path: Path) -> Any:
    """A JSON file's content, None where it is absent or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None

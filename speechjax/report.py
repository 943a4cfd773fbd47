"""The report of a run: curves as PNG and one page, made of nothing but the workdir's files."""

import collections
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechjax import curves
from speechjax.display import display
from speechjax.logs import PICTURE_FILE, read_metrics, replace_file

# Metrics of training and of the evaluations that stand at the top of the page, beside those with a chance level.
TRAIN_CARDS = (
    "loss", "error_rate", "code_perplexity", "prediction_perplexity", "prediction_variance", "unused_codes",
    "steps_per_second", "audio_hours_per_second",
)  # fmt: skip
EVAL_CARDS = ("score", "within", "across", "pnmi")
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
    figures = curves.draw_all(folder, series)
    sections = [
        _numbers(entries),
        _alarms(entries),
        *(f'<figure><img src="{name}.png" alt="{name} curves"></figure>' for name in figures),
        *_tables(folder),
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


def _series(entries: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{metric: {split: [(step, value), ...]}}, finite values only."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for entry in entries:
        for name, value in entry.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name != "step" and number and math.isfinite(value):
                series[name][entry["split"]].append((entry["step"], float(value)))
    return series


def _numbers(entries: list[dict[str, Any]]) -> str:
    """The newest figures at the top of the page."""
    train = [e for e in entries if e["split"] == "train"]
    if not train:
        return '<p class="card">Nothing logged yet.</p>'
    last = train[-1]
    hours = sum((e.get("audio_hours_per_second") or 0) * (e.get("seconds") or 0) for e in train)
    cards = [("step", f"{last['step']:,}", ""), ("hours of audio", f"{hours:,.2f}", "")]
    judged = [name for name in last if curves.chance_of(name, last)]
    for name in dict.fromkeys(["loss", *judged, *TRAIN_CARDS]):
        if name in last:
            cards.append(_card(display(name).title, name, last, {curves.chance_of(name, last): "chance"}))
    newest = {e["split"]: e for e in entries if e["split"] not in ("train", "alarm")}
    for split, entry in newest.items():
        for name in EVAL_CARDS:
            if name in entry:
                controls = {f"{name}_random": "untrained", f"{name}_mfcc": "MFCC"}
                cards.append(_card(f"{split}: {display(name).title}", name, entry, controls))
    boxes = "".join(
        f'<div class="card"><b>{html.escape(value)}</b>{f"<div>{html.escape(beside)}</div>" if beside else ""}'
        f"<span>{html.escape(name)}</span></div>"
        for name, value, beside in cards
    )
    return f'<div class="numbers">{boxes}</div>'


def _card(title: str, name: str, entry: dict[str, Any], beside: Mapping[Any, str]) -> tuple[str, str, str]:
    """(title, value, what to compare it with) of a metric, the last as far as the entry has it: {metric: word}."""
    number = display(name).number
    known = ", ".join(f"{word} {number(entry[other])}" for other, word in beside.items() if other in entry)
    return title, number(entry[name]), known


def _alarms(entries: list[dict[str, Any]]) -> str:
    raised = [e for e in entries if e["split"] == "alarm" and e.get("message")]
    boxes = [
        f'<p class="card alarm">step {e["step"]}: <b>{html.escape(e["name"])}</b> {html.escape(e["message"])}</p>'
        for e in raised
    ]
    return "".join(["<h2>Alarms</h2>", *boxes]) if boxes else ""


def _tables(folder: Path) -> list[str]:
    """Every table that `Logs.save_json` left in the folder, with its plot if it has one."""
    found = []
    for path in sorted(folder.glob("*.json")):
        table = _read(path)
        if isinstance(table, dict) and {"title", "columns", "rows"} <= table.keys():
            picture = ""
            if table.get("plot"):
                name = f"table_{path.stem}.png"
                curves.draw_plot(folder / name, table["plot"])
                alt = html.escape(str(table["title"]))
                picture = f'<figure><img src="{html.escape(name)}" alt="{alt}"></figure>'
            found.append(_table(path.stem, table["title"], table["columns"], table["rows"]) + picture)
    return found


def _table(name: str, title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    heading, title = html.escape(_words(name)), html.escape(str(title))
    return f'<h2>{heading}</h2><p>{title}</p><div class="scroll card"><table><tr>{head}</tr>{body}</table></div>'


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _pictures(folder: Path) -> str:
    """The pictures of each name, the newest to be seen and the others behind a click."""
    found: dict[str, list[tuple[int, Path]]] = collections.defaultdict(list)
    for path in folder.glob("*.png"):
        match = PICTURE_FILE.fullmatch(path.name)
        if match:
            found[match["name"]].append((int(match["step"]), path))
    groups = []
    for name, paths in sorted(found.items()):
        newest, *older = [_picture(step, path) for step, path in sorted(paths, reverse=True)]
        before = f"<details><summary>{len(older)} before</summary>{''.join(older)}</details>" if older else ""
        heading = "What it predicts" if name == "picture" else html.escape(_words(name))
        groups.append(f"<h2>{heading}</h2>{newest}{before}")
    return "".join(groups)


def _picture(step: int, path: Path) -> str:
    sound = path.with_suffix(".wav")
    audio = f'<br><audio controls preload="none" src="{html.escape(sound.name)}"></audio>' if sound.exists() else ""
    name = html.escape(path.name)
    return f'<figure><img src="{name}" alt="step {step}"><figcaption>step {step}{audio}</figcaption></figure>'


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

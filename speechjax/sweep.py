"""Train one config with many settings, seeds or folds, and put the results into one table.

    python -m speechjax.sweep --config=configs/finetune/ctc.py:size=tiny --out=runs/rates \\
        --set optim.learning_rate=1e-4,3e-4,1e-3 --set arg.trains=all,lora --set train.seed=0,1,2 \\
        --config.init_from=runs/hubert --config.data.source=manifest:/data/train.jsonl
    python -m speechjax.sweep --config=... --out=runs/search --random=20 --seed=0 \\
        --set optim.learning_rate=1e-5..1e-2 --set task.mask_prob=0.1..0.6 --set task.mask_span=2,5,10
    python -m speechjax.sweep --config=... --out=runs/folds --folds=meta:speaker --fold-count=5

All combinations of the values of --set are trained, or N of them drawn at random: of LOW..HIGH evenly in the logarithm,
of two whole numbers whole ones.  Every setting is trained with every seed (--set train.seed=...) and on every fold, of
which it hears all but the recordings held out.  arg.KEY sets what follows the colon of the config file.  Without --set
and --folds it is what the config's file says, as configs/superb/ do of learning rates.

Every trial is a run of speechjax.main in DIR/<name>, its output in DIR/<name>.log.  Given again the command goes on:
what is done is read, what was interrupted resumes, what failed is tried again; more values are more trials.
DIR/sweep.md and sweep.json hold the table: of every trial the best value of the metric on what it held out, and where
seeds or folds vary the mean of every setting, with the sample standard deviation, and its worst fold.  The best value
of several evaluations flatters, the last one does not.
"""

import argparse
import hashlib
import itertools
import json
import logging
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speechjax.errors import UserError
from speechjax.trials import FOLD, SEED, Trial, make_trials, parse_axis, short_names, write_folds
from speechjax.verb import leave_to_go_on, split_overrides

log = logging.getLogger("speechjax")

_POLL = 0.2  # seconds between looks at the processes


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known flags and the overrides of the config, "--config." stripped."""
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:ARG,...]", help="the experiment")
    add("--out", required=True, type=Path, metavar="DIR", help="where trials and table go")
    add("--set", action="append", default=[], metavar="KEY=A,B,C", help="values of a key of the config, or LOW..HIGH; "
        "may be repeated")  # fmt: skip
    add("--random", type=int, metavar="N", help="train N settings drawn at random instead of all")
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s); a larger N only adds settings")
    add("--folds", metavar="GROUP", help="cross-validate: hold each group of recordings out once; meta:FIELD or "
        "id:REGEX (its first group) names them")  # fmt: skip
    add("--fold-count", type=int, metavar="K", help="deal the groups into K folds of about equal length (default: each "
        "group is a fold)")  # fmt: skip
    add("--metric", default="", metavar="EVAL/NAME", help="what counts (default: config.train.best_metric)")
    add("--mode", choices=("min", "max"), help="whether less of it is better, or more (default: train.best_mode)")
    add("--jobs", type=int, default=1, metavar="N", help="trials at a time (default: %(default)s); for several on one "
        "GPU set XLA_PYTHON_CLIENT_PREALLOCATE=false")  # fmt: skip
    args, overrides = split_overrides(parser, argv)
    if not args.set and not args.folds:
        args.set = published_axes(args.config)
    try:
        args.axes = [parse_axis(text) for text in args.set]
    except ValueError as error:
        parser.error(str(error))
    keys = [axis.key for axis in args.axes]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        parser.error(f"--set {twice[0]} is given twice: list all its values in one")
    if not keys and not args.folds:
        parser.error("nothing varies: give --set KEY=A,B or --folds=GROUP")
    for axis in args.axes:
        if axis.bounds and (args.random is None or axis.key == SEED):
            parser.error(f"--set {axis.key}: a range is drawn from: give --random=N, or list values")
    if args.random is not None and (args.random < 1 or set(keys) <= {SEED}):
        parser.error(f"--random={args.random}: at least 1 setting, of keys that --set varies")
    if args.fold_count is not None and (not args.folds or args.fold_count < 2):
        parser.error(f"--fold-count={args.fold_count}: at least 2, of --folds=GROUP")
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs}: at least 1")
    if args.folds:
        given = [*keys, *(text.partition("=")[0] for text in overrides)]
        if "data.valid" in given or "data.source" in keys:
            parser.error("--folds says what is held out of one source: without data.valid, and one data.source")
    return args, overrides


def published_axes(spec: str) -> list[str]:
    """What a config says should be swept, `SWEEP` of its file, {key: values}."""
    from speechjax.config import open_module

    return [f"{key}={','.join(values)}" for key, values in getattr(open_module(spec), "SWEEP", {}).items()]


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code; 1 where trials failed."""
    args, overrides = parse_args(argv)
    from speechjax import config as configs
    from speechjax.data.prepare import locked

    args.out.mkdir(parents=True, exist_ok=True)
    base: Any = configs.load(args.config, overrides)
    args.mode = args.mode or (base.train.best_mode if args.metric in ("", base.train.best_metric) else None)
    args.metric = args.metric or base.train.best_metric
    if args.mode is None:
        raise UserError(f"--metric={args.metric}: say whether less of it is better: --mode=min or --mode=max")
    with locked(args.out):
        every = make_trials(args, overrides, write_folds(args, base) if args.folds else {})
        # All configs before the first training: a mistake in the last value shows now.
        wanted = {trial.name: _digest(configs.to_json(configs.load(trial.spec, trial.overrides))) for trial in every}
        waiting = [trial for trial in every if not _done(args.out / trial.name, wanted[trial.name])]
        log.info("%d trials, %d of them done", len(every), len(every) - len(waiting))
        report = Report(args.out, every, args.metric, args.mode)
        report.write()
        ended = itertools.count(len(every) - len(waiting) + 1)

        def end(trial: Trial, code: int, seconds: float) -> None:
            nonlocal report
            _record(args.out / trial.name, wanted[trial.name], code, seconds)
            report = Report(args.out, every, args.metric, args.mode)
            report.write()
            row = report.rows[trial.name]
            said = row["message"] or f"{args.metric} {row['best']:.5g} at step {row['step']}"
            log.info("%d/%d %s: %s (%.0f s)", next(ended), len(every), trial.name, said, seconds)

        train_all(waiting, args.out, args.jobs, end)
    print(report.text, end="")
    log.info("table: %s", args.out / "sweep.md")
    failed = [name for name, row in report.rows.items() if row["message"]]
    if failed:
        log.error("%d of %d trials failed, e.g. %s", len(failed), len(every), args.out / f"{failed[0]}.log")
    return 1 if failed else 0


def command(trial: Trial, out: Path) -> list[str]:
    """What trains it."""
    flags = [f"--config.{text}" for text in trial.overrides]
    return [sys.executable, "-m", "speechjax.main", f"--config={trial.spec}", f"--workdir={out / trial.name}", *flags]


def train_all(
    waiting: Sequence[Trial], out: Path, jobs: int, end: Callable[[Trial, int, float], None]
) -> None:  # fmt: skip
    """Trains all, `jobs` at a time; `end(trial, exit code, seconds)` after each.  None outlives this call."""
    queue, running = deque(waiting), dict[subprocess.Popen, tuple[Trial, float]]()
    try:
        while queue or running:
            while queue and len(running) < jobs:
                trial = queue.popleft()
                line = command(trial, out)
                log.info("%s", shlex.join(["python", *line[1:]]))
                with open(out / f"{trial.name}.log", "ab") as file:
                    running[subprocess.Popen(line, stdout=file, stderr=file)] = trial, time.monotonic()
            time.sleep(_POLL)
            for process in [p for p in running if p.poll() is not None]:
                trial, start = running.pop(process)
                end(trial, process.returncode, time.monotonic() - start)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _done(workdir: Path, config: str) -> bool:
    """Whether exactly this was trained to its end; all else main resumes, or refuses."""
    before = _read(workdir)
    return before.get("config") == config and before.get("code") == 0


def _record(workdir: Path, config: str, code: int, seconds: float) -> None:
    from speechjax.logs import replace_file

    workdir.mkdir(parents=True, exist_ok=True)
    seconds += _read(workdir).get("seconds", 0.0)
    content = dict(config=config, code=code, seconds=round(seconds, 1))
    replace_file(workdir / "trial.json", json.dumps(content, indent=1).encode() + b"\n")


def _read(workdir: Path) -> dict[str, Any]:
    try:
        return json.loads((workdir / "trial.json").read_text())
    except (OSError, ValueError):
        return {}


# ---- what came of them


class Report:
    """The table of a sweep, read from the workdirs: {name: row} `rows`, and its `text` in Markdown.

    `settings` are the means over seeds and folds: over the seeds of a fold first, then over folds, whose sample
    standard deviation and worst are given; without folds over seeds.
    """

    def __init__(self, out: Path, trials: Sequence[Trial], metric: str, mode: str):
        self.out, self.metric, self.sign = out, metric, 1 if mode == "min" else -1
        self.rows = {trial.name: self._row(trial) for trial in trials}
        self.names = short_names(list(dict.fromkeys(key for trial in trials for key in trial.values)))
        self.settings = self._settings() if {SEED, FOLD} & self.names.keys() else []
        self.text = self._text()

    def _row(self, trial: Trial) -> dict[str, Any]:
        """Values, best and last value of the metric and their steps, and why there is none."""
        from speechjax.logs import read_metrics

        workdir = self.out / trial.name
        split, _, key = self.metric.partition("/")
        entries = [entry for entry in read_metrics(workdir) if entry["split"] == split and key in entry]
        found = [(entry[key], entry["step"]) for entry in entries if entry[key] is not None]
        row: dict[str, Any] = dict(values=trial.values, best=None, step=None, last=None, last_step=None, message="")
        if found:
            row["best"], row["step"] = min(found, key=lambda pair: self.sign * pair[0])
            row["last"], row["last_step"] = found[-1]
        record = _read(workdir)
        row["seconds"] = record.get("seconds")
        if "code" not in record:
            row["message"] = "not finished"
        elif record["code"]:
            row["message"] = f"exit code {record['code']}: {_last_line(self.out / f'{trial.name}.log')}"
        elif not found:
            row["message"] = f"no {self.metric} was measured"
        return row

    def _settings(self) -> list[dict[str, Any]]:
        together: dict[tuple[tuple[str, str], ...], dict[str, list[float]]] = {}
        for row in self.rows.values():
            setting = tuple((key, value) for key, value in row["values"].items() if key not in (SEED, FOLD))
            folds = together.setdefault(setting, {})
            if not row["message"]:
                folds.setdefault(row["values"].get(FOLD, ""), []).append(row["best"])
        return [self._setting(dict(setting), folds) for setting, folds in together.items()]

    def _setting(self, values: dict[str, str], folds: dict[str, list[float]]) -> dict[str, Any]:
        trials = sum(map(len, folds.values()))
        means = {fold: statistics.fmean(found) for fold, found in folds.items()}
        each = list(means.values()) if FOLD in self.names else folds.get("", [])
        found: dict[str, Any] = dict(values=values, trials=trials, mean=None, sd=None, worst=None, worst_fold=None)
        if each:
            found |= dict(mean=statistics.fmean(each), sd=statistics.stdev(each) if len(each) > 1 else None)
            if FOLD in self.names:
                found["worst_fold"], found["worst"] = max(means.items(), key=lambda pair: self.sign * pair[1])
        return found

    def _text(self) -> str:
        order = lambda row: (bool(row["message"]), self.sign * (row["best"] if row["best"] is not None else math.inf))  # noqa: E731
        columns = [*self.names.values(), self.metric, "at step", "last", "steps", "minutes"]
        lines = []
        for row in sorted(self.rows.values(), key=order):
            minutes = row["seconds"] and f"{row['seconds'] / 60:.1f}"
            numbers = [_number(row["best"]), row["step"], _number(row["last"]), row["last_step"], minutes]
            lines.append([*(row["values"].get(key) for key in self.names), *numbers, row["message"]])
        text = _markdown([*columns, ""], lines)
        if not self.settings:
            return text
        settings = sorted(self.settings, key=lambda s: math.inf if s["mean"] is None else self.sign * s["mean"])
        keys = [key for key in self.names if key not in (SEED, FOLD)]
        columns = [*(self.names[key] for key in keys), "trials", f"mean {self.metric}", "sd"]
        folds = ["worst", "worst fold"] if FOLD in self.names else []
        lines = [
            [*(s["values"][key] for key in keys), s["trials"], _number(s["mean"]), _number(s["sd"]),
             *([_number(s["worst"]), s["worst_fold"]] if folds else [])]
            for s in settings
        ]  # fmt: skip
        return f"{text}\n{_markdown([*columns, *folds], lines)}"

    def write(self) -> None:
        """sweep.json and sweep.md."""
        from speechjax.logs import replace_file

        content = dict(metric=self.metric, mode="min" if self.sign > 0 else "max", trials=self.rows,
                       settings=self.settings)  # fmt: skip
        replace_file(self.out / "sweep.json", json.dumps(content, indent=1).encode() + b"\n")
        replace_file(self.out / "sweep.md", self.text.encode("utf-8", "replace"))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [["" if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]]) + "\n"


def _last_line(file: Path) -> str:
    """What a process said last: its error."""
    lines = file.read_text(errors="replace").strip().splitlines() if file.exists() else []
    return lines[-1].removeprefix("error: ") if lines else f"no output in {file}"


def main(argv: Sequence[str] | None = None) -> None:
    """Sweeps and leaves with an exit code."""
    leave_to_go_on(lambda: run(argv))


if __name__ == "__main__":
    main()

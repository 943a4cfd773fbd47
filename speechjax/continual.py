"""Learn tasks one after the other, and measure what of the earlier ones is forgotten.

    python -m speechjax.continual --config=configs/finetune/ctc.py:size=tiny --out=runs/replay --method=replay:0.3 \\
        --config.init_from=runs/hubert --tasks read=manifest:/data/read.jsonl calls=manifest:/data/calls.jsonl

Methods:
    finetune        each task from the best checkpoint of the one before, and nothing else: what forgetting costs
    replay:SHARE    SHARE of what is heard is of the earlier tasks, by their hours (a mixture; ?hours=1 in a task's
                    source makes its memory small); the best checkpoint is that of all tasks so far
    ewc:WEIGHT      elastic weight consolidation (speechjax/ewc.py)
    adapters        every task an adapter and a head of its own on config.init_from, for a config that has adapters
                    (trains=lora): nothing is forgotten, but one has to know which task it is

After every task all are evaluated, on recordings that are held out of every training: config.data.valid of each source,
or some by a hash.  A vocabulary is made of all tasks' texts; classes of other labels must all occur in the first task.
Of R[i, j], the metric of task j after task i of T, with its sign turned where less is better: the average of the last
row; backward transfer, the mean of R[T, j] - R[j, j] over j < T (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, section
2); forgetting, the mean over j < T of max R[l, j] - R[T, j], l < T (Chaudhry et al. 2018, arXiv 1801.10112, section 3).

Interrupted, the same command goes on; with more tasks at the end it adds them.  DIR/continual.md and continual.json
hold the matrix, DIR/<number>-<task> the runs.
"""

import argparse
import json
import logging
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speechjax.errors import UserError
from speechjax.verb import call, leave_to_go_on, split_overrides

log = logging.getLogger("speechjax")

METHODS = ("finetune", "replay", "ewc", "adapters")


class Task(NamedTuple):
    """A task of the sequence, from 1: its workdir, its source, and the file of what is held out of it."""

    number: int
    name: str
    source: str
    workdir: Path
    held_out: Path


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known flags and the overrides of the config, "--config." stripped."""
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.continual", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:ARG,...]", help="the experiment, alike for all tasks")
    add("--out", required=True, type=Path, metavar="DIR", help="where runs and table go, of one method")
    add("--tasks", required=True, nargs="+", metavar="NAME=SOURCE", help="in the order of learning; sources as in "
        "config.data.source")  # fmt: skip
    add("--method", default="finetune", metavar="|".join(METHODS), help="(default: %(default)s)")
    add("--metric", default="", metavar="EVAL/NAME", help="what counts (default: config.train.best_metric)")
    add("--mode", choices=("min", "max"), help="whether less of it is better, or more (default: train.best_mode)")
    args, overrides = split_overrides(parser, argv)
    pairs = [text.partition("=") for text in args.tasks]
    if wrong := [text for text, (name, _, source) in zip(args.tasks, pairs, strict=True)
                 if not re.fullmatch(r"[\w-]+", name) or not source]:  # fmt: skip
        parser.error(f"--tasks {wrong[0]}: write NAME=SOURCE, the name of letters, digits, _ and -")
    args.tasks = {name: source for name, _, source in pairs}
    if len(args.tasks) < len(pairs) or len(pairs) < 2:
        parser.error("--tasks: at least two, of different names")
    args.method, colon, number = args.method.partition(":")
    args.number = _number(number)
    wants = {"replay": 0 < args.number < 1, "ewc": args.number > 0}.get(args.method, not colon)
    if args.method not in METHODS or not wants:
        parser.error(
            f"--method={args.method}{colon}{number}: choose finetune, replay:SHARE (between 0 and 1), ewc:WEIGHT "
            "(above 0) or adapters"
        )
    if given := [text for text in overrides if text.startswith("data.source=")]:
        parser.error(f"--config.{given[0]}: sources are those of --tasks")
    return args, overrides


def _number(text: str) -> float:
    """What a text says, -1 where it says no number."""
    try:
        return float(text)
    except ValueError:
        return -1.0


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args, overrides = parse_args(argv)
    from speechjax import config as configs
    from speechjax.data.prepare import locked

    first = next(iter(args.tasks.values()))
    config: Any = configs.load(args.config, [*overrides, f"data.source={first}"])
    args.mode = args.mode or (config.train.best_mode if args.metric in ("", config.train.best_metric) else None)
    args.metric = args.metric or config.train.best_metric
    evaluator = args.metric.partition("/")[0]
    if args.mode is None:
        raise UserError(f"--metric={args.metric}: say whether less of it is better: --mode=min or --mode=max")
    if evaluator not in config.evals:
        raise UserError(f"--metric={args.metric}: config.evals has {', '.join(config.evals)}")
    if args.method == "adapters" and not (config.init_from and config.model.to_dict().get("adapters")):
        raise UserError(
            "--method=adapters wants --config.init_from=RUN, on which all adapters are trained, and a config that has "
            "some, e.g. configs/finetune/ctc.py:trains=lora"
        )
    if args.method == "ewc":  # before the first training, not after it
        configs.load(args.config, [*overrides, f"optim.ewc={args.out}", f"optim.ewc_weight={args.number}"])
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out):
        claim(args, configs.to_json(config))
        tasks, corpora = prepare(args, config)
        matrix: list[list[float | None]] = []
        for task in tasks:
            train(task, tasks, corpora, args, overrides)
            matrix.append(evaluate(task, tasks, matrix, args))
            write(args, list(args.tasks), matrix)
    print((args.out / "continual.md").read_text(), end="")
    log.info("table: %s", args.out / "continual.md")
    return 0


def claim(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Says in DIR/plan.json what is learnt; UserError where an earlier start began with something else."""
    from speechjax.logs import replace_file

    config["data"].pop("source")
    method = f"{args.method}:{args.number:g}" if args.number >= 0 else args.method
    mine = dict(method=method, tasks=[list(pair) for pair in args.tasks.items()], config=config)
    file = args.out / "plan.json"
    if file.exists():
        before = json.loads(file.read_text())
        both = min(len(before["tasks"]), len(mine["tasks"]))
        if before["tasks"][:both] != mine["tasks"][:both]:
            raise UserError(f"{args.out} holds another sequence of tasks: use another --out, or add tasks at its end")
        if unlike := [key for key in ("method", "config") if before[key] != mine[key]]:
            raise UserError(f"{args.out} holds runs of another {unlike[0]}: use another --out")
    replace_file(file, json.dumps(mine, indent=1).encode() + b"\n")


# ---- the data of the tasks


class Corpus(NamedTuple):
    """What a task's source holds: how many parts, (part, id) of the held-out recordings, heard seconds to train on."""

    parts: int
    held_out: list[tuple[int, str]]
    seconds: float


def prepare(args: argparse.Namespace, config: Any) -> tuple[list[Task], list[Corpus]]:
    """The tasks, with what is held out of each written down, and, for methods of one head, a vocabulary of all."""
    from speechjax.data.records import open_records

    options = {name: config.data[name] for name in ("min_seconds", "max_bad_share", "include", "exclude")}
    options["segment_seconds"] = max(30.0, config.data.crop_seconds)  # as a training cuts them
    tasks, corpora, texts = [], [], []
    (args.out / "held_out").mkdir(exist_ok=True)
    for number, (name, source) in enumerate(args.tasks.items(), 1):
        records = open_records(source, cache_dir=config.data.cache_dir or None, **options)
        task = f"{number}-{name}"
        out = args.out.absolute()
        tasks.append(Task(number, name, source, out / task, out / "held_out" / f"{task}.txt"))
        corpora.append(read_corpus(records, config.data.valid_seconds, config.data.valid))
        _write_ids(tasks[-1].held_out, _ids(corpora[-1:]))
        for opened in records.parts:
            texts.append(opened.shards)
    if config.data.text and args.method != "adapters":
        _share_vocabulary(tasks[0].workdir, config.data, texts)
    return tasks, corpora


def read_corpus(records: Any, valid_seconds: float, valid: str) -> Corpus:
    """What is held out of some records as of a run's, and what remains."""
    import numpy as np

    from speechjax.data.decode import SAMPLE_RATE
    from speechjax.data.split import held_out, recording_id

    kept = held_out(records, valid_seconds, valid)
    several = len(records.parts) > 1
    ids = [(int(records.part[i]), recording_id(records, i)) for i in kept.tolist()]
    ids = [(part, name.partition(":")[2] if several else name) for part, name in ids]
    weights = np.array([opened.part.weight for opened in records.parts])
    train = np.delete(np.arange(len(records)), kept)
    seconds = float((records.lengths * weights[records.part])[train].sum()) / SAMPLE_RATE
    return Corpus(len(records.parts), sorted(set(ids)), seconds)


def _ids(corpora: Sequence[Corpus]) -> list[str]:
    """Ids of all that is held out, as the mixture of these sources has them."""
    first, found, several = 0, [], sum(corpus.parts for corpus in corpora) > 1
    for corpus in corpora:
        found += [f"{first + part}:{name}" if several else name for part, name in corpus.held_out]
        first += corpus.parts
    return found


def _write_ids(file: Path, ids: Sequence[str]) -> None:
    from speechjax.data.split import list_ids
    from speechjax.logs import replace_file

    content = list_ids(ids)
    if file.exists() and file.read_bytes() != content:
        raise UserError(f"{file} holds other recordings than would be held out now: use another --out")
    replace_file(file, content)


def _share_vocabulary(workdir: Path, data: Any, sets: Sequence[Any]) -> None:
    """What the tokens of the first task's run are, made of the texts of all prepared sets; later runs take it over."""
    from speechjax.data.text import make_tokenizer

    if not (workdir / "vocab.json").exists():
        texts = (str(entry["meta"].get(data.text_field) or "") for shards in sets for entry in shards.entries())
        make_tokenizer(data.text, filter(None, texts), data.text_steps).save(workdir)


def mixture(sources: Sequence[str], corpora: Sequence[Corpus], share: float) -> str:
    """The first source, and the others with weights that give them `share` of what is heard, by their hours."""
    from speechjax.data.mixture import parse_mixture

    factor = share / (1 - share) * corpora[0].seconds / sum(corpus.seconds for corpus in corpora[1:])
    parts = []
    for number, source in enumerate(sources):
        for part in parse_mixture(source):
            weight = part.weight * (factor if number else 1)
            hours = f"&hours={part.hours!r}" if part.hours is not None else ""
            parts.append(f"{part.source}?weight={weight:.6g}{hours}{'' if part.copy else '&copy=no'}")
    return " + ".join(parts)


# ---- training and evaluation


def train(
    task: Task, tasks: Sequence[Task], corpora: Sequence[Corpus], args: argparse.Namespace, overrides: Sequence[str]
) -> None:
    """Trains a task to its end, and measures what mattered for it, unless that was done."""
    done = task.workdir / "trained.json"
    before = tasks[task.number - 2] if task.number > 1 and args.method != "adapters" else None
    source, held_out = task.source, task.held_out
    own = []
    if before:
        own.append(f"init_from={before.workdir}")
    if before and args.method == "replay":
        order = [task.number - 1, *range(task.number - 1)]
        source = mixture([tasks[k].source for k in order], [corpora[k] for k in order], args.number)
        held_out = held_out.with_suffix(".replay.txt")
        _write_ids(held_out, _ids([corpora[k] for k in order]))
        own.append("data.temperature=1.0")  # what the weights are for
    if before and args.method == "ewc":
        own += [f"optim.ewc={before.workdir}", f"optim.ewc_weight={args.number}"]
    own += [f"data.source={source}", f"data.valid=@{held_out}"]
    flags = [f"--config.{text}" for text in (*overrides, *own)]
    if not done.exists():
        command = ["speechjax.main", f"--config={args.config}", f"--workdir={task.workdir}", *flags]
        call(command, task.workdir.with_suffix(".log"))
        done.write_text(json.dumps({"command": command}, indent=1) + "\n")
    if args.method == "ewc" and not (task.workdir / "ewc.npz").exists():
        call(["speechjax.ewc", f"--workdir={task.workdir}"], task.workdir.with_suffix(".ewc.log"))


def evaluate(
    task: Task, tasks: Sequence[Task], before: Sequence[Sequence[float | None]], args: argparse.Namespace
) -> list[float | None]:
    """The metric of every task after this one, computed unless it is there; of adapters each task's own, if it is."""
    if args.method == "adapters":
        known = list(before[-1][: task.number - 1]) if before else []
        return [*known, _score(task, task, args), *[None] * (len(tasks) - task.number)]
    return [_score(task, other, args) for other in tasks]


def _score(task: Task, other: Task, args: argparse.Namespace) -> float | None:
    evaluator, _, key = args.metric.partition("/")
    out = task.workdir / f"on_{other.number}-{other.name}.{evaluator}.json"
    if not out.exists():
        flags = [f"--config.data.source={other.source}", f"--config.data.valid=@{other.held_out}"]
        command = ["speechjax.evaluate", f"--workdir={task.workdir}", f"--evals={evaluator}", f"--out={out}", *flags]
        call(command, out.with_suffix(".log"))
    metrics = json.loads(out.read_text())["evals"][evaluator]["metrics"]
    if key not in metrics:
        raise UserError(f"--metric={args.metric}: {evaluator} measures {', '.join(sorted(metrics))}")
    log.info("after %s on %s: %s %s", task.name, other.name, args.metric, metrics[key])
    return metrics[key]


# ---- what is forgotten


def summarise(matrix: Sequence[Sequence[float | None]], mode: str) -> dict[str, float]:
    """{average, backward_transfer, forgetting} of R after T tasks, a row each, perhaps with columns of tasks to come.

    The average has the metric's sign, the others that of an accuracy, and after one task there are none; {} where a
    number of the last row is missing.
    """
    sign = -1 if mode == "min" else 1
    T = len(matrix)
    last = [value for value in matrix[-1][:T] if value is not None]
    if len(last) < T:
        return {}
    found = {"average": statistics.fmean(last)}
    if T == 1:
        return found
    learnt = [matrix[j][j] for j in range(T - 1)]
    best = [[sign * v for row in matrix[:-1] if (v := row[j]) is not None] for j in range(T - 1)]
    found["backward_transfer"] = statistics.fmean(
        sign * (last[j] - value) for j, value in enumerate(learnt) if value is not None
    )
    found["forgetting"] = statistics.fmean(max(best[j]) - sign * last[j] for j in range(T - 1))
    return found


def write(args: argparse.Namespace, names: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> None:
    """continual.json and continual.md."""
    from speechjax.logs import replace_file

    found = summarise(matrix, args.mode)
    method = f"{args.method}:{args.number:g}" if args.number >= 0 else args.method
    content = dict(method=method, metric=args.metric, mode=args.mode, tasks=names, matrix=matrix, **found)
    replace_file(args.out / "continual.json", json.dumps(content, indent=1).encode() + b"\n")
    cell = lambda value: "" if value is None else f"{value:.4g}"  # noqa: E731
    lines = [f"| {method}: {args.metric} | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    lines += [f"| after {name} | {' | '.join(map(cell, row))} |" for name, row in zip(names, matrix, strict=False)]
    about = {
        "average": f"average {args.metric} after the last task",
        "backward_transfer": "backward transfer (above 0: earlier tasks became better)",
        "forgetting": "forgetting (0: none)",
    }
    lines += ["", *(f"{about[key]}: {value:.4g}  " for key, value in found.items())]
    replace_file(args.out / "continual.md", ("\n".join(lines) + "\n").encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and leaves with an exit code."""
    leave_to_go_on(lambda: run(argv))


if __name__ == "__main__":
    main()

"""Train every objective on the same speech for the same hours of audio, and put what they learnt into one table.

    python -m speechjax.compare --source="folder:/data/fsdd + folder:/data/kerstin" --out=runs/compare \\
        --probe=folder:/data/fsdd --pattern='(?P<label>\\d)_(?P<speaker>[a-z]+)_' --held-out=nicolas,theo,yweweler

Every experiment is a run of its own in DIR/<name>: trained by speechjax.main at size tiny, judged by
speechjax.evaluate, its units made by speechjax.label.  Interrupted, the same command goes on; --only=NAME,NAME takes
some.  DIR/compare.md and compare.json hold the table: a linear probe of unheard speakers beside the same encoder as it
was before training, ABX and phone information on speech with phone labels, audio-hours a second, and memory.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speechjax.errors import UserError
from speechjax.verb import call, leave_to_go_on

log = logging.getLogger("speechjax")


class Experiment(NamedTuple):
    """A config file of configs/pretrain with its argument, and where its targets come from.

    `units`: "mfcc", or "NAME:LAYER" of an experiment before it.  `teacher`: an experiment before it.
    """

    config: str
    arg: str = "size=tiny"
    units: str = ""
    teacher: str = ""


EXPERIMENTS = {
    "wav2vec2": Experiment("wav2vec2"),
    "hubert_1": Experiment("hubert", "size=tiny,iteration=1", units="mfcc"),
    "hubert_2": Experiment("hubert", "size=tiny,iteration=2", units="hubert_1:2"),
    "wavlm": Experiment("wavlm", units="hubert_1:2"),
    "data2vec": Experiment("data2vec"),
    "data2vec2": Experiment("data2vec", "size=tiny2"),
    "best_rq": Experiment("best_rq"),
    "w2v_bert": Experiment("w2v_bert"),
    "spidr": Experiment("spidr"),
    "apc": Experiment("apc"),
    "mae": Experiment("mae"),
    "autoencode": Experiment("autoencode"),
    "phones": Experiment("phones"),
    "sounds": Experiment("sounds"),
    "distill": Experiment("distill", teacher="hubert_2"),
}
CLUSTERS = 100


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m speechjax.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--source", required=True, help="the speech to learn from, as in config.data.source")
    add("--out", required=True, type=Path, metavar="DIR", help="where runs and table go")
    add("--hours", type=float, default=4.0, help="of audio each sees, repeats counted (default: %(default)s)")
    add("--probe", default="", metavar="SOURCE", help="labelled recordings for the probe")
    add("--pattern", default="", metavar="REGEX", help="of their ids, with groups label and speaker")
    add("--held-out", default="", metavar="A,B", help="speakers kept out of training; the probe's score is theirs")
    add("--aligned", default="embedded:0.1", metavar="SOURCE", help="speech with phone labels, for ABX and units "
        "(default: %(default)s)")  # fmt: skip
    add("--only", default=",".join(EXPERIMENTS), metavar="NAMES", help="of the experiments (default: all)")
    add("--set", action="append", default=[], metavar="NAME:KEY=VALUE", help="overrides a value of one experiment's "
        "config (KEY arg: what follows the colon of its file), or of all with NAME *; may be repeated")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--configs", type=Path, default=Path("configs/pretrain"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := [name for name in args.only if name not in EXPERIMENTS]:
        parser.error(f"--only={','.join(unknown)}: there are {', '.join(EXPERIMENTS)}")
    for text in args.set:
        name, colon, rest = text.partition(":")
        if not colon or "=" not in rest or name not in (*EXPERIMENTS, "*"):
            parser.error(f"--set={text}: write NAME:KEY=VALUE, NAME an experiment or *")
    if not args.hours > 0:
        parser.error(f"--hours={args.hours}: must be above 0")
    return args


def run(argv: Sequence[str] | None) -> int:
    """The verb, from the command line to an exit code."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.only:
        workdir = args.out / name
        start = time.monotonic()
        _train(name, workdir, args)
        scores = _evaluate(workdir, args)
        rows.append({"name": name, **_speed(workdir), **scores})
        log.info("%s: done in %.0f s", name, time.monotonic() - start)
        (args.out / "compare.json").write_text(json.dumps(rows, indent=1) + "\n")
        (args.out / "compare.md").write_text(table(rows))
    print(table(rows), end="")
    log.info("table: %s", args.out / "compare.md")
    return 0


def _train(name: str, workdir: Path, args: argparse.Namespace) -> None:
    """Trains one experiment to its end, unless it is there already."""
    from speechjax import config as configs

    if (workdir / "trained.json").exists():
        return
    experiment = EXPERIMENTS[name]
    given = [text.partition(":")[2] for text in args.set if text.partition(":")[0] in (name, "*")]
    arg = next((text.removeprefix("arg=") for text in given if text.startswith("arg=")), experiment.arg)
    spec = f"{args.configs / experiment.config}.py:{arg}"
    overrides = [text for text in given if not text.startswith("arg=")]
    config: Any = configs.load(spec, overrides)
    steps = max(1, round(args.hours * 3600 / config.data.batch_seconds))
    own = [
        f"data.source={args.source}", f"train.steps={steps}", f"train.eval_every={steps}", f"train.seed={args.seed}",
    ]  # fmt: skip
    if args.held_out:
        own.append(f"data.exclude={_held_out(args)}")
    if experiment.units:
        own.append(f"data.units=labels:{_label(experiment.units, args)}")
    if experiment.teacher:
        own.append(f"task.teacher={_needed(experiment.teacher, name, args)}")
    flags = [f"--config.{override}" for override in (*own, *overrides)]  # the user's last: they win
    command = ["speechjax.main", f"--config={spec}", f"--workdir={workdir}", *flags]
    peak = call(command, args.out / f"{name}.log")
    (workdir / "trained.json").write_text(json.dumps({"peak_bytes": peak, "command": command}, indent=1) + "\n")


def _needed(name: str, by: str, args: argparse.Namespace) -> Path:
    """Workdir of an experiment that another one builds on."""
    if not (args.out / name / "trained.json").exists():
        raise UserError(f"{by} builds on {name}, which is not trained yet: --only={name},{by}")
    return args.out / name


def _label(units: str, args: argparse.Namespace) -> Path:
    """Folder of the units, made unless they are there."""
    features, _, layer = units.partition(":")
    out = args.out / f"units_{features}"
    command = ["speechjax.label", f"--source={args.source}", f"--clusters={CLUSTERS}", f"--out={out}"]
    if layer:
        command += [f"--features={_needed(features, 'another', args)}@newest", f"--layer={layer}"]
    else:
        command += [f"--features={features}"]
    if args.held_out:  # clusters are fitted to speech, too
        command.append(f"--exclude={_held_out(args)}")
    call(command, args.out / f"units_{features}.log")
    return out


def _held_out(args: argparse.Namespace) -> str:
    """Regex on the ids of the speakers kept out."""
    return f"_({'|'.join(args.held_out.split(','))})_"


def _evaluate(workdir: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Scores of a trained run, computed unless they are there."""
    out = workdir / "evaluate.json"
    if not out.exists():
        evals = {"abx": {"source": args.aligned}, "units": {"source": args.aligned}}
        if args.probe:
            held_out = tuple(filter(None, args.held_out.split(",")))
            evals["probe"] = {"source": args.probe, "held_out": str(held_out)} | (
                {"pattern": args.pattern} if args.pattern else {}
            )
        flags = [f"--evals.{name}.{key}={value}" for name, block in evals.items() for key, value in block.items()]
        command = ["speechjax.evaluate", f"--workdir={workdir}", "--checkpoint=newest", f"--evals={','.join(evals)}"]
        call([*command, f"--out={out}", *flags], workdir.parent / f"{workdir.name}.evaluate.log")
    evals = json.loads(out.read_text())["evals"]
    return {f"{name}/{key}": value for name, found in evals.items() for key, value in found["metrics"].items()}


def _speed(workdir: Path) -> dict[str, float]:
    """Median audio-hours a second over the log windows, peak memory in GiB, updates, and hours of audio."""
    from speechjax.logs import read_metrics

    train = [entry for entry in read_metrics(workdir) if entry["split"] == "train"]
    rates = [entry["audio_hours_per_second"] for entry in train]
    hours = sum(entry["audio_hours_per_second"] * entry["seconds"] for entry in train)
    peak = json.loads((workdir / "trained.json").read_text())["peak_bytes"] / 2**30
    return dict(audio_hours_per_second=statistics.median(rates), peak_gib=peak, steps=train[-1]["step"], hours=hours)


COLUMNS = {  # title: (key of a row, format)
    "objective": ("name", "{}"),
    "probe": ("probe/score", "{:.1f}"),
    "untrained": ("probe/score_random", "{:.1f}"),
    "gain": ("gain", "{:+.1f}"),
    "ABX within": ("abx/within", "{:.1f}"),
    "untrained ": ("abx/within_random", "{:.1f}"),
    "ABX across": ("abx/across", "{:.1f}"),
    "untrained  ": ("abx/across_random", "{:.1f}"),
    "PNMI": ("units/pnmi", "{:.3f}"),
    "untrained   ": ("units/pnmi_random", "{:.3f}"),
    "audio-h/s": ("audio_hours_per_second", "{:.4f}"),
    "GiB": ("peak_gib", "{:.1f}"),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line an experiment, then the features that were never trained; "" where something is missing."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    controls = []
    for control in ("log_mel", "mfcc"):
        found = next((row for row in rows if f"probe/score_{control}" in row or f"abx/within_{control}" in row), None)
        if found:
            own = {
                key: found.get(f"{key}_{control}") for key in ("probe/score", "abx/within", "abx/across", "units/pnmi")
            }
            controls.append({"name": f"({control.replace('_', '-')})", **own})
    for row in (*rows, *controls):
        row = dict(row)
        if None not in (row.get("probe/score"), row.get("probe/score_random")):
            row["gain"] = row["probe/score"] - row["probe/score_random"]
        cells = [(row.get(key), form) for key, form in COLUMNS.values()]
        lines.append("| " + " | ".join("" if value is None else form.format(value) for value, form in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Compares and leaves with an exit code."""
    leave_to_go_on(lambda: run(argv))


if __name__ == "__main__":
    main()

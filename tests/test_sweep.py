"""Sweeps: which trials there are, what is done again and what not, and the arithmetic of the table."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax import config as configs
from speechjax import sweep, trials
from speechjax.errors import UserError

REPO = Path(__file__).resolve().parent.parent
CONFIG = f"{REPO}/configs/finetune/ctc.py:smoke"
RATE = "optim.learning_rate"


def parsed(tmp_path, *flags: str):
    return sweep.parse_args([f"--config={CONFIG}", f"--out={tmp_path}/sweep", *flags])


def planned(tmp_path, *flags: str, folds=()):
    args, overrides = parsed(tmp_path, *flags)
    return trials.make_trials(args, overrides, dict(folds))


# ---- which trials


def test_a_grid_is_every_combination_by_readable_names(tmp_path):
    found = planned(tmp_path, "--set", f"{RATE}=1e-3,1e-4", "--set=train.seed=0,1", "--config.train.steps=4")
    assert [trial.name for trial in found] == [
        f"learning_rate={rate},seed={seed}" for rate in ("1e-3", "1e-4") for seed in "01"
    ]
    assert found[1].overrides == ["train.steps=4", f"{RATE}=1e-3", "train.seed=1"]  # the sweep's last: they win
    config = configs.load(found[3].spec, found[3].overrides)
    assert (config.optim.learning_rate, config.train.seed, config.train.steps) == (1e-4, 1, 4)


def test_folds_cross_everything(tmp_path):
    found = planned(tmp_path, "--set", f"{RATE}=1e-3,1e-4", "--folds=meta:speaker", folds={"ann": "@/a", "bob": "@/b"})
    assert [(t.values[RATE], t.values["fold"], t.overrides[-1]) for t in found] == [
        (rate, fold, f"data.valid=@/{fold[0]}") for rate in ("1e-3", "1e-4") for fold in ("ann", "bob")
    ]


def test_arguments_of_the_config_file_and_values_with_commas(tmp_path):
    found = planned(tmp_path, "--set=arg.trains=all,lora", "--set", "optim.freeze=(),(('^head', 0, -1), ('x', 0, 1))")
    assert [t.spec for t in found[::2]] == [f"{CONFIG},trains=all", f"{CONFIG},trains=lora"]
    assert [t.values["optim.freeze"] for t in found[:2]] == ["()", "(('^head', 0, -1), ('x', 0, 1))"]
    assert len({t.name for t in found}) == 4
    assert all(
        set(t.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.=,+-") for t in found
    )


def test_names_tell_keys_and_long_values_apart(tmp_path):
    assert trials.short_names(["task.mask_prob", "data.text", "optim.text", "text"]) == {
        "task.mask_prob": "mask_prob", "data.text": "data.text", "optim.text": "optim.text", "text": "text",
    }  # fmt: skip
    long = "x" * 300
    a, b = planned(tmp_path, f"--set=init_from={long}/a,{long}/b")
    assert a.name != b.name
    assert len(a.name) <= 100


def test_a_draw_is_the_beginning_of_a_larger_one_and_crossed_with_the_seeds(tmp_path):
    flags = ("--set", f"{RATE}=1e-5..1e-1", "--set=train.steps=10..1000", "--set=train.seed=0,1", "--seed=3")
    few, many = planned(tmp_path, "--random=5", *flags), planned(tmp_path, "--random=12", *flags)
    assert [t.name for t in few] == [t.name for t in many][:10]
    assert len({t.values[RATE] for t in many}) == 12
    assert [t.values["train.seed"] for t in few] == ["0", "1"] * 5
    config = configs.load(many[-1].spec, many[-1].overrides)
    assert 1e-5 <= config.optim.learning_rate <= 1e-1
    assert 10 <= config.train.steps <= 1000


def test_a_draw_from_lists_has_no_duplicates_and_at_most_the_grid(tmp_path, caplog):
    flags = ("--set", f"{RATE}=1e-3,1e-4,1e-5", "--set=task.mask_span=2,3")
    assert len({t.name for t in planned(tmp_path, "--random=4", *flags)}) == 4
    grid = {t.name for t in planned(tmp_path, *flags)}
    assert {t.name for t in planned(tmp_path, "--random=50", *flags)} == grid
    assert "only 6 different settings" in caplog.text


def test_a_range_is_even_in_the_logarithm():
    axis = trials.parse_axis("x=1e-4..1e-0")
    drawn = [math.log10(float(p["x"])) for p in trials.points([axis], 400, 0)]
    # a uniform variable on [-4, 0]: mean -2, and the mean of 400 has a deviation of 0.058
    assert abs(np.mean(drawn) + 2) < 0.25
    assert abs(np.std(drawn) - 4 / 12**0.5) < 0.15
    # were it uniform in the value itself, its mean would be about log10(e^-1) = -0.43


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abcdef", min_size=1), st.floats(0.1, 100), min_size=2, max_size=12), st.integers(2, 6))
def test_dealing_uses_every_group_once_and_evenly(seconds, count):
    if len(seconds) < count:
        with pytest.raises(UserError, match=f"{count} folds need as many groups"):
            trials.deal(seconds, count)
        return
    folds = trials.deal(seconds, count)
    assert sorted(g for groups in folds.values() for g in groups) == sorted(seconds)
    full = [sum(seconds[g] for g in groups) for groups in folds.values()]
    # Whoever is fullest was emptiest before its last group came (Graham 1969).
    assert max(full) - min(full) <= max(seconds.values()) + 1e-9
    assert trials.deal(seconds, None) == {g: [g] for g in sorted(seconds)}


@pytest.fixture
def speakers(tmp_path, monkeypatch):
    """A manifest of nine recordings of three speakers, and one of nobody."""
    monkeypatch.setenv("SPEECHJAX_CACHE", str(tmp_path / "cache"))
    lines, rng = [], np.random.default_rng(0)
    for i in range(10):
        soundfile.write(tmp_path / f"{i}.wav", rng.standard_normal(8000 + 100 * i) * 0.1, 16000)
        who = {} if i == 9 else {"speaker": ("ann", "bob", "eve")[i % 3]}
        lines.append(json.dumps({"audio_filepath": f"{i}.wav", "text": "a b", **who}) + "\n")
    (tmp_path / "list.jsonl").write_text("".join(lines))
    return tmp_path / "list.jsonl"


def test_folds_hold_out_every_speaker_once(tmp_path, speakers, caplog):
    args, overrides = parsed(tmp_path, "--folds=meta:speaker", f"--config.data.source=manifest:{speakers}")
    config = configs.load(args.config, overrides)
    folds = trials.write_folds(args, config)
    held = {fold: Path(valid[1:]).read_text().split() for fold, valid in folds.items()}
    assert held == {"ann": ["0.wav", "3.wav", "6.wav"], "bob": ["1.wav", "4.wav", "7.wav"],
                    "eve": ["2.wav", "5.wav", "8.wav"]}  # fmt: skip
    assert "1 examples have no meta:speaker" in caplog.text
    args.fold_count, args.out = 2, tmp_path / "two"
    held = [Path(valid[1:]).read_text().split() for valid in trials.write_folds(args, config).values()]
    assert sorted(map(len, held)) == [3, 6]
    (tmp_path / "two/folds/fold=1.txt").write_text("other\n")
    with pytest.raises(UserError, match="holds other recordings than this fold now has: use another --out"):
        trials.write_folds(args, config)
    args.folds = "meta:accent"
    with pytest.raises(UserError, match=r"--folds=meta:accent: .* fits no"):
        trials.write_folds(args, config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing varies"),
        (("--set=train.steps",), "write KEY=A,B,C or KEY=LOW..HIGH"),
        (("--set=train.steps=1,1",), "a value is there twice"),
        (("--set=train.steps=1,2", "--set=train.steps=3"), "given twice"),
        ((f"--set={RATE}=1e-5..1e-1",), "give --random=N"),
        ((f"--set={RATE}=1e-1..1e-5", "--random=2"), "the lower one first"),
        (("--set=train.seed=0,1", "--random=2"), "at least 1 setting, of keys that --set varies"),
        (("--set=train.seed=0,1", "--fold-count=2"), "of --folds=GROUP"),
        (("--set=train.seed=0,1", "--jobs=0"), "--jobs=0: at least 1"),
        (("--folds=meta:speaker", "--config.data.valid=x"), "without data.valid"),
        (("--set=fold=1,2",), "folds come from --folds"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        parsed(tmp_path, *flags)
    assert message in capsys.readouterr().err


def test_a_wrong_value_shows_before_the_first_training(tmp_path, fakes):
    with pytest.raises(UserError, match="has no 'learn_rate'"):
        run(tmp_path, "--set=optim.learn_rate=1,2")
    with pytest.raises(UserError, match="expected int"):
        run(tmp_path, "--set=train.steps=2,3,many")
    with pytest.raises(UserError, match=r"--metric=valid/accuracy: say whether .* --mode=min or --mode=max"):
        run(tmp_path, "--set=train.steps=2,3", "--metric=valid/accuracy")
    assert fakes() == []


# ---- what came of them, with trainings that only write what a training would


FAKE = r"""
import json, os, sys, time
workdir, values, calls = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
with open(calls, "a") as file:
    file.write(os.path.basename(workdir) + "\n")
os.makedirs(workdir, exist_ok=True)
if values.get("train.steps") == "13" and not os.path.exists(calls + ".repaired"):
    print("error: the thirteenth step is unlucky")
    sys.exit(1)
if values.get("train.steps") == "99":
    time.sleep(60)
base = 10 * float(values.get("optim.learning_rate", 0)) + float(values.get("train.seed", 0))
base += {"ann": 0, "bob": 100, "eve": 40}.get(values.get("fold"), 0)
with open(workdir + "/metrics.jsonl", "w") as file:
    for step, more in ((1, 2), (2, 0), (3, None), (4, 1)):
        entry = {"step": step, "split": "valid", "error_rate": None if more is None else base + more, "accuracy": step}
        file.write(json.dumps(entry) + "\n")
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Instead of main; gives the names of the trainings that were begun."""
    calls = tmp_path / "calls"

    def command(trial, out):
        return [sys.executable, "-c", FAKE, str(out / trial.name), json.dumps(trial.values), str(calls)]

    monkeypatch.setattr(sweep, "command", command)
    monkeypatch.setattr(sweep, "_POLL", 0.01)
    return lambda: calls.read_text().split() if calls.exists() else []


def run(tmp_path, *flags: str) -> int:
    return sweep.run([f"--config={CONFIG}", f"--out={tmp_path}/sweep", *flags])


def result(tmp_path):
    return json.loads((tmp_path / "sweep/sweep.json").read_text())


def test_best_step_and_mean_over_seeds(tmp_path, fakes, capsys):
    flags = ("--set", f"{RATE}=2.0,1.0", "--set=train.seed=0,1,5")
    assert run(tmp_path, *flags, "--jobs=3") == 0
    found = result(tmp_path)
    one = found["trials"]["learning_rate=1.0,seed=5"]
    assert (one["best"], one["step"], one["last"], one["last_step"]) == (15, 2, 16, 4)
    by_rate = {s["values"][RATE]: s for s in found["settings"]}
    assert by_rate["1.0"]["mean"] == 12  # of 10, 11 and 15
    assert by_rate["1.0"]["sd"] == pytest.approx(7**0.5)  # squares 4 + 1 + 9 over two degrees of freedom
    text = (tmp_path / "sweep/sweep.md").read_text()
    assert capsys.readouterr().out == text
    rates = [line.split("|")[1].strip() for line in text.splitlines() if line[2:3].isdigit()]
    assert rates == ["1.0"] * 3 + ["2.0"] * 3 + ["1.0", "2.0"]  # best first, in both tables


def test_more_can_be_better(tmp_path, fakes):
    assert run(tmp_path, "--set=train.seed=0,1", "--metric=valid/accuracy", "--mode=max") == 0
    assert {row["best"] for row in result(tmp_path)["trials"].values()} == {4}


def test_folds_count_alike_and_the_worst_is_named(tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(sweep, "write_folds", lambda args, config: {"ann": "@/a", "bob": "@/b", "eve": "@/e"})
    assert run(tmp_path, "--set=train.seed=0,2", "--folds=meta:speaker", "--jobs=3") == 0
    [setting] = result(tmp_path)["settings"]
    # over the seeds of a fold first: 1, 101 and 41
    assert setting["mean"] == pytest.approx(143 / 3)
    assert setting["sd"] == pytest.approx(np.std([1, 101, 41], ddof=1))
    assert (setting["worst_fold"], setting["worst"]) == ("bob", 101)
    assert setting["trials"] == 6


def test_what_is_done_is_read_and_what_failed_is_tried_again(tmp_path, fakes, caplog):
    flags = ("--set=train.steps=2,13",)
    assert run(tmp_path, *flags) == 1
    assert result(tmp_path)["trials"]["steps=13"]["message"] == "exit code 1: the thirteenth step is unlucky"
    assert "the thirteenth step is unlucky" in (tmp_path / "sweep/sweep.md").read_text()
    (tmp_path / "calls.repaired").touch()
    assert run(tmp_path, "--set=train.steps=2,13,4") == 0  # and one value more
    assert fakes() == ["steps=2", "steps=13", "steps=13", "steps=4"]
    # Another experiment under the same name is not what was done: main is asked, and refuses or goes on.
    assert run(tmp_path, *flags, "--config.optim.b1=0.5") == 0
    assert fakes()[4:] == ["steps=2", "steps=13"]


def test_a_metric_that_nobody_measured_is_said(tmp_path, fakes):
    assert run(tmp_path, "--set=train.seed=0,1", "--metric=valid/wer", "--mode=min") == 1
    assert {row["message"] for row in result(tmp_path)["trials"].values()} == {"no valid/wer was measured"}


def test_an_interrupted_sweep_leaves_no_process_and_loses_nothing(tmp_path, fakes):
    script = (
        "import sys\nfrom speechjax import sweep\n"
        f"sweep.command = lambda trial, out: [sys.executable, '-c', {FAKE!r}, str(out / trial.name), "
        f"__import__('json').dumps(trial.values), {str(tmp_path / 'calls')!r}]\n"
        "sweep.main(sys.argv[1:])"
    )
    argv = [f"--config={CONFIG}", f"--out={tmp_path}/sweep", "--set=train.steps=2,99,3"]
    process = subprocess.Popen([sys.executable, "-c", script, *argv], cwd=REPO, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while "steps=99" not in fakes() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=30)  # would wait for a process left behind, which holds the pipe
    assert process.returncode == 1
    assert said.splitlines()[-1] == "interrupted; the same command goes on where this one stopped"
    rows = result(tmp_path)["trials"]
    assert rows["steps=2"]["best"] == 0
    assert rows["steps=99"]["message"] == "not finished"
    assert run(tmp_path, "--set=train.steps=2,3") == 0
    assert fakes() == ["steps=2", "steps=99", "steps=3"]


@pytest.mark.slow
def test_real_trainings_over_two_folds(tmp_path, speakers, monkeypatch):
    """Main accepts what a sweep gives it, and hears nothing of a fold."""
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    flags = ("--folds=meta:speaker", "--fold-count=2", "--set=arg.trains=lora",
             f"--config.data.source=manifest:{speakers}", "--config.data.min_seconds=0.1")  # fmt: skip
    assert run(tmp_path, *flags) == 0
    found = result(tmp_path)
    assert [row["step"] for row in found["trials"].values()] == [2, 2]
    assert found["settings"][0]["mean"] > 0
    logs = [(tmp_path / f"sweep/{name}.log").read_text() for name in found["trials"]]
    assert sorted(int(re.findall(r"(\d+) recordings \(\d+ s\) held out", text)[0]) for text in logs) == [3, 6]
    before = (tmp_path / "sweep/sweep.json").read_bytes()
    assert run(tmp_path, *flags) == 0
    assert (tmp_path / "sweep/sweep.json").read_bytes() == before


def test_a_config_may_say_what_to_sweep(tmp_path):
    """SUPERB's rates, when nothing else is said."""
    args, _ = sweep.parse_args([f"--config={REPO}/configs/superb/ks.py:smoke", f"--out={tmp_path}/sweep"])
    assert [axis.key for axis in args.axes] == [RATE]
    assert args.axes[0].values == ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6", "1e-7")
    given = [f"--config={REPO}/configs/superb/ks.py", f"--out={tmp_path}", f"--set={RATE}=1e-2,1e-3"]
    args, _ = sweep.parse_args(given)
    assert args.axes[0].values == ("1e-2", "1e-3")

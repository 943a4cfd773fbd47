"""Speed of training and inference: turns are fair, batches those of the pipeline, failures one line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from speechjax import config as configs
from speechjax.data.pipeline import batch_spec
from speechjax.data.plan import Shape
from speechjax.errors import UserError
from speechjax.speed import ceiling, measure, ours, report, turns, work
from speechjax.speed.apart import Apart
from speechjax.speed.turns import Contestant, Timing

REPO = Path(__file__).resolve().parent.parent
TINY = f"{REPO}/configs/pretrain/wav2vec2.py:size=tiny,smoke"
HUBERT = f"{REPO}/configs/pretrain/hubert.py:size=tiny,smoke"


# ---- the other process


class Side:
    """Stands for a side of the peer."""

    def __init__(self, error=""):
        self.error, self.here = error, 0

    def open(self):
        if self.error:
            raise {"user": UserError, "value": ValueError}[self.error]("cannot\nbe opened")

    def run(self, steps):
        self.here += steps
        sum(range(2_000_000))

    def process(self):
        return os.getpid()

    def die(self):
        os._exit(7)


def test_the_peer_runs_in_another_process():
    other = Apart(Side)
    run = other.open()
    assert 0 < run(3) < 10, "its own CPU seconds"
    assert other.ask("here") == 3
    assert other.ask("process") != os.getpid()
    with pytest.raises(RuntimeError, match="AttributeError: 'Side' object has no attribute 'nothing'"):
        other.ask("nothing")
    assert other.ask("here") == 3, "it goes on after an error"
    with pytest.raises(RuntimeError, match="its process ended with code 7"):
        other.ask("die")
    other.close()
    other.close()


@pytest.mark.parametrize(("error", "kind"), [("user", UserError), ("value", RuntimeError)])
def test_what_fails_in_the_other_process_fails_here(error, kind):
    other = Apart(Side, error)
    with pytest.raises(kind, match="cannot\nbe opened"):
        other.open()
    other.close()


# ---- turns


class Clock:
    """Stands for the module time; two threads are busy while it passes."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return 2 * self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(turns, "time", found := Clock())
    return found


def contestant(name, seconds, said, clock, fails_at=-1):
    """Takes `seconds` a step, notes its turns, and fails at one of its calls."""
    calls = iter(range(1000))

    def run(steps):
        if next(calls) == fails_at:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating 1 GiB")
        said.append(name)
        clock.now += seconds * steps

    return Contestant(name, lambda: run, lambda: said.append(f"-{name}"))


def test_every_other_round_is_in_reverse_order(clock):
    said = []
    found = turns.take_turns([contestant("a", 3.0, said, clock), contestant("b", 0.1, said, clock)], repeats=3)
    assert "".join(said) == "aabb" + "ab" + "ba" + "ab"
    assert found[0].wall == pytest.approx([3.0] * 3)
    assert found[0].cpu == pytest.approx([6.0] * 3)
    assert found[1].median == pytest.approx(0.1)
    assert (found[0].steps, found[1].steps) == (1, 3), "a sample of a short step has several"


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_who_fails_is_out_and_the_others_go_on(clock, fails_at, caplog):
    said = []
    found = turns.take_turns(
        [contestant("a", 1.0, said, clock, fails_at), contestant("b", 1.0, said, clock)], repeats=4
    )  # fmt: skip
    assert found[0].error == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert len(found[0].wall) == max(0, fails_at - 2)
    assert len(found[1].wall) == 4
    assert not found[1].error
    assert said.count("-a") == 1
    assert "-b" not in said
    assert "a failed: RuntimeError: RESOURCE_EXHAUSTED: out of memory" in caplog.text


def test_a_mistake_of_the_users_is_no_failure():
    def open_():
        raise UserError("transformers has no such model")

    with pytest.raises(UserError, match="no such model"):
        turns.take_turns([Contestant("a", open_)], repeats=1)


def test_speedup_is_of_pairs():
    """One slow round hits both sides: the ratio of the medians would say 1.33."""
    us, them = (
        Timing("us", wall=[1.0, 3.0, 9.0], cpu=[1.0, 1.0, 1.0]),
        Timing("them", [2.0, 4.0, 18.0], [3.0, 3.0, 4.0]),
    )
    found = turns.speedup(us, them)
    assert found is not None
    assert found["pairs"] == pytest.approx([2.0, 4 / 3, 2.0])
    assert found["speedup"] == 2.0
    assert found["ratio"] == 0.5
    assert found["spread"] == pytest.approx([5 / 3, 2.0])
    assert (found["repeats"], found["cpu_speedup"]) == (3, 3.0)
    assert turns.speedup(us, Timing("nobody")) is None


# ---- what is measured


def opened(spec=TINY, overrides=(), dtype="", comparable=False):
    return work.open_config(spec, overrides, dtype, comparable=comparable)


def test_a_config_as_it_suits_a_cpu():
    config, changed = opened(TINY.replace("tiny", "base"))
    assert (config.model.dtype, config.model.scan, config.model.remat) == ("float32", False, False)
    assert config.model.layerdrop > 0
    assert changed == ["model.dtype=float32", "model.scan=False", "model.remat=False"]
    config, changed = opened(TINY.replace("tiny", "base"), ["model.scan=True"], "bfloat16", comparable=True)
    assert (config.model.dtype, config.model.scan) == ("bfloat16", True), "the command line has the last word"
    assert (config.model.layerdrop, config.task.feature_penalty, config.task.feature_grad_scale) == (0.0, 0.0, 1.0)
    assert {"model.layerdrop=0.0", "task.feature_penalty=0.0", "model.scan=True"} < set(changed)


def test_configs_that_leave_the_encoder_or_the_classes_open():
    config, _ = opened(f"{REPO}/configs/finetune/ctc.py:size=tiny,smoke")
    assert config.task.classes == 32
    assert configs.make_task(config).encoder.width == config.model.width
    with pytest.raises(UserError, match="no config file"):
        opened("nowhere.py")
    with pytest.raises(UserError, match="config has no 'modle'"):
        opened(overrides=["modle.width=3"])


def test_the_config_of_a_run(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configs.to_json(opened()[0])))
    config, changed = opened(str(file), ["model.width=64"])
    assert (config.model.width, changed) == (64, ["model.width=64"])


def test_batches_are_those_of_the_pipeline():
    config, _ = opened(HUBERT)
    task = configs.make_task(config)
    rows, samples = work.shape_of(task, 20.0, 5.0, 4)
    assert (rows, samples) == (4, 249 * 320 + 80)
    batch = work.make_batch(task, rows, samples, shortest=0.5)
    spec = batch_spec(Shape(rows, samples)) | {"units": ((rows, samples // 160), np.int32)}
    assert work.spec_of(batch) == {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in spec.items()}
    assert batch["lengths"].tolist()[::3] == [samples, samples // 2]
    heard = batch["audio"][3, : samples // 2] / 32768
    assert not batch["audio"][3, samples // 2 :].any()
    assert batch["mean"][3] == pytest.approx(heard.mean(), abs=1e-6)
    assert batch["std"][3] == pytest.approx(heard.std(), rel=1e-4)
    assert 0.01 < heard.std() < 0.2
    assert work.audio_seconds(batch) == pytest.approx(0.75 * rows * samples / 16000, rel=1e-4)
    with pytest.raises(UserError, match="shorter than one frame"):
        work.shape_of(task, 10.0, 0.02, 1)


@pytest.mark.parametrize("name", ["ctc", "classify", "regress"])
def test_tasks_get_what_they_learn_from(name):
    config, _ = opened(f"{REPO}/configs/finetune/{name}.py:size=tiny,smoke")
    task = configs.make_task(config)
    assert set(task.needs) <= set(work.make_batch(task, 2, 16080))


def test_flops_of_inference_leave_out_padding_gradients_and_heads():
    config, _ = opened()
    task = configs.make_task(config)
    full, half = (work.make_batch(task, 2, 32080, shortest) for shortest in (1.0, 0.5))
    whole = work.encoder_flops(config, full)
    assert 0.70 < work.encoder_flops(config, half) / whole < 0.76, "attention grows faster than the audio"
    assert 2.5 < work.train_flops(config, full) / whole < 3.5


# ---- the ceiling


def test_the_ceiling_is_measured_and_known(monkeypatch):
    monkeypatch.setattr(ceiling, "LARGE_ON_CPUS", 128)
    found = ceiling.measured(64, 32, 64, "float32", repeats=1)
    assert 0 < found["model"] <= found["flops_per_second"] == max(found["model"], found["large"])
    assert ceiling.published("NVIDIA H200") == ceiling.published("NVIDIA H100 80GB HBM3") == 989e12
    assert ceiling.published("NVIDIA H100 PCIe") == 756e12
    assert ceiling.published("TPU v5 lite") == 197e12
    assert ceiling.published("TPU v5p") == 459e12
    assert ceiling.published("cpu") is None


# ---- our side


def test_the_step_trains_and_its_parts_add_up(monkeypatch):
    monkeypatch.setattr(turns, "LEAST_SECONDS", 0.001)
    config, _ = opened(overrides=["model.width=16", "model.mlp=16", "optim.warmup=0"])
    side = ours.Training(config, work.make_batch(configs.make_task(config), 4, 16080))
    before = side.parameters_at_first()
    run = side.open()
    run(1)
    run(2)
    assert int(side.state.step) == 3
    assert side.first["loss"] == pytest.approx(side.first["contrastive"] + side.first["diversity"], rel=0.5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(side.state.params))
    assert max(jax.tree.leaves(moved)) > 0
    assert side.memory > 0
    parts = measure._parts(side, repeats=2)
    assert set(parts) == {*ours.PARTS, "prefixes"}
    longest = np.array(parts["prefixes"]["optimizer"])
    assert all(len(samples) == 3 for samples in parts["prefixes"].values())
    assert np.all(longest > 0)


def test_inference_hears_the_parameters():
    config, _ = opened()
    side = ours.Encoding(config, work.make_batch(configs.make_task(config), 4, 16080))
    side.open()(1)
    frames = side.frames()
    assert frames.shape == (4, 50, config.model.width)
    side.variables = jax.tree.map(lambda x: 1.1 * x, side.variables)
    assert np.abs(side.frames() - frames).max() > 1e-3


# ---- what is shown


def result(**changes):
    timings = [Timing("speechjax", [0.5] * 3, [0.9] * 3, 2.0), Timing("transformers eager", [1.0] * 3, [1.8] * 3, 3.0),
               Timing("transformers compile", error="RuntimeError: no compiler")]  # fmt: skip
    top = {"flops_per_second": 2e11, "model": 2e11, "large": 1e11, "published": None}
    runners = [measure._runner(timing, timings[0], 5e10, 10.0, top) for timing in timings]
    return {
        "what": "train", "config": "a.py", "changed": ["model.layerdrop=0.0"], "parameters": 2e6, "dtype": "float32",
        "batch": {"rows": 2, "samples": 79760, "audio_seconds": 10.0}, "runners": runners,
        "train_step": runners[0] | measure._against(timings), "parts": dict.fromkeys(ours.PARTS, 0.1), "input": {},
        "same": {"loss": [4.70, 4.72], "grad_norm": [3.0, 3.1]}, "compile_seconds": math.nan, "flops": 5e10,
        "memory": {"host": 2**30, "device": None, "planned": 2**29, "peer": None}, "flops_error": "",
        "ceiling": top, "versions": {"jax": "0"},
        "machine": {"processor": "a", "threads": 2, "device": "cpu", "devices": 1, "tuned_malloc": False,
                    "load_before": [0.1], "load_after": [0.2]},
    } | changes  # fmt: skip


def test_what_is_shown_and_written(capsys, tmp_path):
    report.show(result())
    said = capsys.readouterr().out
    for part in (
        "training step of a.py, float32, 2 x 5.0 s", "2.00 x", "50.0 %", "0.0056", "failed", "front end",
        "transformers compile: RuntimeError: no compiler", "loss 4.700 and 4.720", "layerdrop=0.0",
    ):  # fmt: skip
        assert part in said, part
    report.write(result(), tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["train_step"]["speedup"] == 2.0
    assert found["train_step"]["repeats"] == 3
    assert found["train_step"]["spread"] == [2.0, 2.0]
    assert found["train_step"]["mfu"] == 0.5
    assert found["train_step"]["reference"] == "transformers eager"
    assert found["compile_seconds"] is None
    assert found["runners"][1]["samples"] == [1.0] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"same": {"loss": [4.7, 5.4]}}, "may not do the same work: loss"),
        ({"same": {"loss": [4.7, math.nan]}}, "may not do the same work: loss"),
        ({"same": {"difference": 0.1}}, "may not do the same work: difference"),
        ({"same": {"difference": 0.1}, "dtype": "bfloat16"}, ""),
        ({"flops_error": "the FLOPs of this model cannot be counted"}, "cannot be counted"),
        ({"machine": {"load_before": [3.0], "threads": 2}}, "other programs run on this machine"),
    ],
)
def test_what_speaks_against_the_numbers_is_said(changes, words):
    found = [line for line in report.warnings(result(**changes)) if "no compiler" not in line]
    assert (words in found[0]) if words else not found


# ---- the command


def command(*arguments, block=(), devices="4"):
    """`bench` in a fresh process in which the libraries of `block` cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(block)!r})); from speechjax.bench import main; "
    return subprocess.run(
        [sys.executable, "-c", code + f"main({list(arguments)!r})"], capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": devices}, cwd=REPO,
    )  # fmt: skip


MISSING = ("tensorflow", "tensorflow_datasets", "librosa", "soundfile", "soxr", "tensorboardX", "torch", "transformers",
           "espeakng_loader", "matplotlib", "sklearn")  # fmt: skip


def test_runs_where_there_is_little_beside_jax(tmp_path):
    file = tmp_path / "a.json"
    done = command("--what=inference", f"--config={TINY}", "--repeats=2", "--batch-seconds=4", "--crop-seconds=1",
                   "--threads=1", f"--json={file}", block=MISSING)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "inference of" in done.stdout
    found = json.loads(file.read_text())
    assert len(found["inference"]["samples"]) == 2
    assert found["machine"]["threads"] == 1
    assert found["batch"]["rows"] == 4
    assert 0 < found["inference"]["mfu"] < 1


@pytest.mark.slow
def test_training_runs_where_there_is_little_beside_jax(tmp_path):
    file = tmp_path / "a.json"
    done = command("--what=train", f"--config={HUBERT}", "--repeats=2", "--data", "--tuned-malloc", f"--json={file}",
                   block=MISSING)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["train_step"]["seconds"] > 0
    assert found["machine"]["tuned_malloc"]
    assert "is not installed" in found["input"]["error"]
    assert f"input wait: not measured, {found['input']['error']}" in done.stdout


@pytest.mark.slow
def test_waiting_for_real_batches():
    done = command("--what=train", f"--config={TINY}", "--repeats=2", "--data", "--batch-seconds=8", "--crop-seconds=2")
    assert done.returncode == 0, done.stderr
    assert "% of the time" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "no config file 'nowhere.py'"),
        ([f"--config={TINY}", "--peer=hf"], "--peer=hf: torch is not installed: run `pip install torch transformers`"),
        ([f"--config={TINY}", "--threads=999"], "--threads=999: this process may use"),
        ([f"--config={TINY}", "--config.model.heads=3"], "no multiple of config.model.heads=3"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    done = command("--what=inference", *arguments, block=MISSING, devices="1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr

"""The main job as a person runs it: real processes, real files, kills, and every mistake a person can make."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax.logs import read_metrics
from tests.choice import some

REPO = Path(__file__).resolve().parent.parent
CONFIG = "configs/pretrain/wav2vec2.py:size=tiny,smoke"
TIMING = {"seconds", "steps_per_second", "input_wait_share", "audio_hours_per_second"}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """A folder of 24 short recordings of noise bursts."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for i in range(24):
        audio = rng.standard_normal(int(rng.integers(9000, 30000))) * 0.1
        soundfile.write(folder / f"{i % 3}_speaker{i % 4}_{i}.wav", audio, 16000)
    return folder


def command(workdir, *overrides, config=CONFIG):
    return [sys.executable, "-m", "speechjax.main", f"--config={config}", f"--workdir={workdir}",
            *(f"--config.{o}" for o in overrides)]  # fmt: skip


def environment(cache):
    # One device: a kill in the middle of a write is the same for four.
    return {**os.environ, "SPEECHJAX_CACHE": str(cache), "JAX_NUM_CPU_DEVICES": "1"}


def run(cache, workdir, *overrides, config=CONFIG):
    """(exit code, what it printed)."""
    done = subprocess.run(
        command(workdir, *overrides, config=config), cwd=REPO, env=environment(cache), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def one_line_error(output: str) -> str:
    """The error line; fails if a traceback came with it."""
    assert "Traceback" not in output, output
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def checkpoint_arrays(workdir, step):
    from tests.test_train import leaves

    return leaves(workdir, step)


@pytest.mark.parametrize("size", some(["tiny", "base", "large"], ["tiny"]))
def test_every_config_takes_two_smoke_steps_and_leaves_a_whole_workdir(cache, tmp_path, size):
    code, output = run(cache, tmp_path / "run", config=f"configs/pretrain/wav2vec2.py:size={size},smoke")
    assert code == 0, output
    workdir = tmp_path / "run"
    for name in ("config.json", "metrics.jsonl", "rejected.jsonl", "checkpoints/2", "best/2", "report/index.html"):
        assert (workdir / name).exists(), name
    assert list((workdir / "tensorboard").iterdir())
    assert list((workdir / "report").glob("picture_2.*"))
    entries = read_metrics(workdir)
    assert [e["step"] for e in entries if e["split"] == "train"] == [1, 2]
    assert all(e["loss"] is not None for e in entries if e["split"] == "train")


@pytest.mark.slow
def test_sigkill_twice_and_the_run_is_the_same_bitwise(cache, recordings, tmp_path):
    options = (f"data.source=folder:{recordings}", "train.steps=40", "train.checkpoint_every=5", "train.log_every=5",
               "train.eval_every=20", "optim.learning_rate=0.003")  # fmt: skip
    code, output = run(cache, tmp_path / "straight", *options)
    assert code == 0, output

    killed = tmp_path / "killed"
    kills = 0
    for after in (7, 21):  # steps
        process = subprocess.Popen(command(killed, *options), cwd=REPO, env=environment(cache), start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if any(e["step"] >= after and e["split"] == "train" for e in read_metrics(killed)):
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        process.wait(60)
    code, output = run(cache, killed, *options)
    assert code == 0, output
    assert kills == 2
    assert "resuming at step" in output

    a, b = checkpoint_arrays(tmp_path / "straight", 40), checkpoint_arrays(killed, 40)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)

    def stripped(workdir):
        return [{k: v for k, v in e.items() if k not in TIMING} for e in read_metrics(workdir)]

    assert stripped(killed) == stripped(tmp_path / "straight")


@pytest.mark.slow
def test_sigterm_saves_and_asks_for_a_restart(cache, recordings, tmp_path):
    options = (f"data.source=folder:{recordings}", "train.steps=4000", "train.checkpoint_every=3000",
               "train.log_every=2", "train.eval_every=4000")  # fmt: skip
    process = subprocess.Popen(command(tmp_path / "run", *options), cwd=REPO, env=environment(cache), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 42, output
    saved = int(re.search(r"step (\d+) is saved", output)[1])  # pyright: ignore[reportOptionalSubscript]
    assert (tmp_path / f"run/checkpoints/{saved}").is_dir()


def test_help_has_an_example():
    done = subprocess.run([sys.executable, "-m", "speechjax.main", "--help"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--config=configs/pretrain/wav2vec2.py" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.sorce=x"], r"'sorce'.*allowed: .*source"),
        (["train.steps=many"], r"train.steps=many: expected int"),
        (["task=3"], r"task is a block"),
        (["task.name=wav2vec9"], r"no tasks named 'wav2vec9'; there are: .*wav2vec2"),
        (["data.source=folder:/does/not/exist"], r"/does/not/exist"),
        (["data.source=disc:/x"], r"folder"),
        (["mesh.fsdp=3"], r"mesh.fsdp=3"),
        (["model.norm=middle"], r"model.norm='middle'.*post.*pre"),
        (["model.frontend.norm=batch"], r"frontend.norm='batch'.*group.*layer"),
        (["train.best_mode=most"], r"best_mode"),
    ],
)
def test_a_mistake_gets_one_clear_line(cache, tmp_path, overrides, expected):
    code, output = run(cache, tmp_path / "run", *overrides)
    assert code == 1
    assert re.search(expected, one_line_error(output)), output
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_missing_config_file(cache, tmp_path):
    code, output = run(cache, tmp_path / "run", config="configs/nothing.py")
    assert code == 1
    assert "configs/nothing.py" in one_line_error(output)


def test_workdir_of_another_experiment(cache, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"width": 512}}))
    (tmp_path / "metrics.jsonl").touch()
    code, output = run(cache, tmp_path)
    assert code == 1
    assert re.search(r"holds another experiment.*new --workdir", one_line_error(output))


def test_bad_files_are_listed_and_cost_nothing_else(cache, recordings, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(recordings, folder)
    (folder / "text.wav").write_text("this is no sound")
    (folder / "empty.flac").write_bytes(b"")
    (folder / "notes.txt").write_text("not audio at all")
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(folder / "stereo.wav", np.random.default_rng(1).standard_normal((44100, 2)) * 0.1, 44100)
    soundfile.write(folder / "short.wav", np.full(800, 0.1), 16000)
    options = (f"data.source=folder:{folder}", "data.max_bad_share=0.5", "data.min_seconds=0.25")
    code, output = run(cache, tmp_path / "run", *options)
    assert code == 0, output
    rejected = {
        e["id"]: e["reason"] for e in map(json.loads, (tmp_path / "run/rejected.jsonl").read_text().splitlines())
    }
    assert set(rejected) == {"text.wav", "empty.flac", "nan.wav", "short.wav"}
    assert "4 rejected" in output

    code, output = run(cache, tmp_path / "strict", *options, "data.max_bad_share=0.05")
    assert code == 1
    assert "max_bad_share" in one_line_error(output)
    assert len((tmp_path / "strict/rejected.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("what", ["workdir", "cache"])
def test_full_disk_ends_in_one_line(recordings, tmp_path, what):
    """A real file system of two megabytes."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        workdir = small / "run" if what == "workdir" else tmp_path / "run"
        cache = small if what == "cache" else tmp_path / "cache"
        code, output = run(cache, workdir, f"data.source=folder:{recordings}", "train.steps=8", "model.width=64")
        assert code == 1, output
        # The writers' threads may still print of their own end; the last word is the clear line.
        assert re.match(r"error: .*(space|room|disk)", output.rstrip().splitlines()[-1]), output
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)

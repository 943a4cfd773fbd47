"""The verb: what it prints, what it refuses, and two real processes of the main job."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speechjax import launch
from speechjax import main as main_job
from speechjax.errors import UserError
from speechjax.logs import read_metrics

REPO = Path(__file__).resolve().parent.parent
CONFIG = "--config=configs/pretrain/wav2vec2.py:size=tiny,smoke"
SLURM = ["slurm", "--nodes=2", CONFIG, "--workdir=/shared/runs/a"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "speechjax.launch", *arguments]


def test_a_dry_run_prints_the_file_and_the_command_and_does_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("it ran"))
    monkeypatch.chdir(REPO)
    file = tmp_path / "job file"
    assert launch.run([*SLURM, "--dry-run", f"--file={file}", "--config.train.steps=7"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash\n")
    assert "--config.train.steps=7\n" in printed
    assert printed.endswith(f"#   sbatch '{file}'\n")
    assert subprocess.run(["bash", "-n"], input=printed, text=True).returncode == 0  # it can go into a file
    assert not file.exists()


def test_without_it_the_file_is_written_and_the_command_takes_over(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(os, "execvp", lambda program, words: ran.append((program, words)))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.chdir(REPO)
    file, workdir = tmp_path / "new/job", tmp_path / "runs/a"
    arguments = ["slurm", CONFIG, f"--workdir={workdir}", f"--file={file}"]
    launch.run(arguments)
    assert ran == [("sbatch", ["sbatch", str(file)])]
    assert (workdir / "logs").is_dir()  # SLURM would not make it, and lose the job's output
    launch.run([*arguments, "--dry-run"])
    assert capsys.readouterr().out.startswith(file.read_text())


def test_a_missing_tool_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(REPO)
    with pytest.raises(UserError, match="there is no sbatch here: submit from a login node of the cluster"):
        launch.run([*SLURM, f"--file={tmp_path}/job"])
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["--config.train.stpes=7"], "'stpes'"), (["--config.train.best_mode=most"], "best_mode='most'")],
)
def test_a_wrong_config_never_reaches_the_queue(overrides, message, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(UserError, match=message):
        launch.run([*SLURM, "--dry-run", *overrides])


@pytest.mark.parametrize("config", [f"{REPO}/configs/pretrain/wav2vec2.py", "wav2vec2.py:size=tiny"])
def test_a_config_that_the_machines_would_not_have(config, monkeypatch):
    monkeypatch.chdir(REPO / "configs/pretrain")
    flags = ["--tpu=v5e:4x4", "--image=i", "--mount=/shared=claim", "--workdir=/shared/a", "--dry-run"]
    with pytest.raises(UserError, match="the machines have this checkout alone"):
        launch.run(["gke", *flags, f"--config={config}"])
    assert launch.run(["slurm", f"--config={config}", "--workdir=/shared/a", "--dry-run"]) == 0


def test_a_run_that_is_only_there_is_not_looked_for_here(monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    launch.run([*SLURM, "--dry-run", "--config.init_from=/shared/runs/other"])
    assert "--config.init_from=/shared/runs/other" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TARGET"),
        (["moon", CONFIG, "--workdir=a"], "invalid choice: 'moon'"),
        (["local", CONFIG], "--workdir"),
        (["local", "--workdir=a"], "--config"),
        (["local", CONFIG, "--workdir=a", "--processes=0"], "0 is less than 1"),
        (["local", CONFIG, "--workdir=a", "--devices=two"], "'two' is not a whole number"),
        (["local", CONFIG, "--workdir=a", "--grace=-1"], "-1 is less than 0"),
        ([*SLURM, "--nodse=2"], "unknown argument '--nodse=2'"),
        ([*SLURM, "--nod=2"], "unknown argument '--nod=2'"),
        ([*SLURM, "--stall-seconds=long"], "--stall-seconds"),
        (["gke", CONFIG, "--workdir=a"], "--image"),
    ],
)
def test_flags_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit):
        launch.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_flags_of_the_main_job_go_on():
    _, job = launch.parse_args([*SLURM, "--stall-seconds=60", "--config.train.steps", "7"])
    assert job == [*SLURM[2:], "--stall-seconds=60", "--config.train.steps=7"]
    args, overrides = main_job.parse_args(job)
    assert (args.stall_seconds, overrides) == (60, ["train.steps=7"])


def test_all_flags_of_the_main_job_can_be_given(capsys):
    with pytest.raises(SystemExit):
        main_job.parse_args(["--help"])
    theirs = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {"--config", "--workdir"} < theirs
    assert theirs - {"--config", "--workdir"} == {f"--{flag}" for flag in launch.JOB_FLAGS}


def test_help_of_every_target(capsys):
    for target in launch.TARGETS:
        with pytest.raises(SystemExit) as leaving:
            launch.parse_args([target, "--help"])
        assert leaving.value.code == 0
        assert "--config" in capsys.readouterr().out


def test_it_starts_without_jax():
    code = "import sys, speechjax.launch; sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {**os.environ, "SPEECHJAX_CACHE": str(tmp_path_factory.mktemp("cache")), "http_proxy": "http://127.0.0.1:9"}


@pytest.mark.slow
def test_two_processes_train_are_pre_empted_and_go_on(environment, tmp_path):
    workdir = tmp_path / "run"
    options = ["--config.train.steps=4000", "--config.train.checkpoint_every=4000", "--config.train.log_every=2",
               "--config.train.eval_every=4000"]  # fmt: skip
    arguments = ["local", "--processes=2", CONFIG, f"--workdir={workdir}", *options]
    process = subprocess.Popen(command(*arguments), cwd=REPO, env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while not read_metrics(workdir) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()  # and all processes of it
    assert process.returncode == 42, output
    [saved] = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert f"step {saved} is saved" in output
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == 4000

    arguments[-4] = f"--config.train.steps={saved + 2}"
    done = subprocess.run(command(*arguments), cwd=REPO, env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming at step {saved}" in done.stdout
    assert "'data': 2" in done.stdout  # a device of each process
    assert (workdir / "logs/process1.log").stat().st_size


@pytest.mark.slow
def test_an_error_ends_the_job(environment, tmp_path):
    arguments = ["local", "--processes=2", CONFIG, f"--workdir={tmp_path}/run", "--config.data.source=folder:/nowhere"]
    done = subprocess.run(command(*arguments), cwd=REPO, env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "/nowhere" in done.stdout
    assert "restart" not in done.stderr

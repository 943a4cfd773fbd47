"""A real SLURM of two nodes on loopback runs the rendered script: to the end, pre-empted and again, and with errors."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speechjax.logs import read_metrics
from tests.real import slurm

REPO = Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/pretrain/wav2vec2.py:size=tiny,smoke"
SECONDS = 900  # for anything; two processes compile on as many cores

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(slurm.missing()), reason=f"apt-get install slurm-wlm munge: no {', '.join(slurm.missing())}"
    ),
    pytest.mark.skipif(os.getuid() != 0, reason="slurmd needs root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    own = {"SPEECHJAX_CACHE": str(tmp_path_factory.mktemp("cache")), "JAX_NUM_CPU_DEVICES": "1"}
    with slurm.cluster() as environment:
        yield environment | own


def submit(cluster, workdir: Path, *arguments: str) -> str:
    """The number of a job of two nodes."""
    flags = ["--nodes=2", "--time=20:00", CONFIG, f"--workdir={workdir}", f"--file={workdir}.sbatch"]
    command = [sys.executable, "-m", "speechjax.launch", "slurm", *flags, *arguments]
    done = subprocess.run(command, cwd=REPO, env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return re.fullmatch(r"Submitted batch job (\d+)", done.stdout.strip())[1]  # pyright: ignore[reportOptionalSubscript]


def shown(cluster, job: str) -> dict[str, str]:
    """What SLURM knows of a job."""
    done = subprocess.run(["scontrol", "show", "job", job], env=cluster, capture_output=True, text=True, check=True)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout))


def wait(cluster, job: str, workdir: Path, ready) -> dict[str, str]:
    """What SLURM knows of a job as soon as that is `ready`."""
    deadline = time.monotonic() + SECONDS
    while not ready(found := shown(cluster, job)):
        assert time.monotonic() < deadline, f"{found}\n{log(workdir, job)}"
        time.sleep(0.2)
    return found


def log(workdir: Path, job: str) -> str:
    file = workdir / f"logs/slurm-{job}.log"
    return file.read_text() if file.exists() else ""


def ended(found: dict[str, str]) -> bool:
    return found["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_two_nodes_train_together(cluster, tmp_path):
    workdir = tmp_path / "a folder" / "100%"
    job = submit(cluster, workdir)
    found = wait(cluster, job, workdir, ended)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "0"), log(workdir, job)
    assert [entry["step"] for entry in read_metrics(workdir) if entry["split"] == "train"] == [1, 2]
    assert "'data': 2" in log(workdir, job)  # one device of each


def test_pre_empted_twice_and_restarted_once(cluster, tmp_path):
    workdir = tmp_path / "run"
    every = (f"--config.train.{name}_every=4000" for name in ("checkpoint", "eval"))
    job = submit(cluster, workdir, "--restarts=1", "--config.train.steps=4000", "--config.train.log_every=2", *every)

    def steps() -> list[int]:
        return [entry["step"] for entry in read_metrics(workdir) if entry["split"] == "train"]

    def preempt() -> None:
        """As SLURM does it before the time is up."""
        before = len(steps())
        found = wait(cluster, job, workdir, lambda found: ended(found) or len(steps()) > before)
        assert not ended(found), f"{found}\n{log(workdir, job)}\n{slurm.controller_log(cluster)}"
        subprocess.run(["scancel", "--signal=TERM", job], env=cluster, check=True)

    preempt()
    found = wait(cluster, job, workdir, lambda found: ended(found) or found["JobState"] == "PENDING")
    assert (found["JobState"], found["Restarts"]) == ("PENDING", "1"), log(workdir, job)
    [saved] = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert f"step {saved} is saved" in log(workdir, job)
    # SLURM holds what was put back for two minutes.  Not at once: within the second in which a node has ended a job, it
    # takes a new start for one of before, and SLURM fails the job ("Job credential revoked").
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+10"], env=cluster, check=True)

    preempt()
    found = wait(cluster, job, workdir, ended)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "42:0", "1"), log(workdir, job)
    assert f"resuming at step {saved} of 4000" in log(workdir, job)
    assert "ended with code 42 after 1 restarts" in log(workdir, job)
    assert steps() == sorted(set(steps()))  # nothing is logged twice


@pytest.mark.parametrize(
    ("code", "expected"),
    [("exit $((SLURM_PROCID ? 1 : 42))", "1:0"), ('((SLURM_PROCID)) || kill -KILL "$$"; sleep 2; exit 3', "3:0")],
    ids=["42 and an error", "killed and an error"],
)
def test_an_error_is_not_hidden_and_not_tried_again(cluster, tmp_path, code, expected):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{code}\n")
    python.chmod(0o755)
    job = submit(cluster, tmp_path / "run", f"--python={python}")
    found = wait(cluster, job, tmp_path / "run", ended)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", expected, "0")

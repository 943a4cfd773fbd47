"""Jobs of several real processes on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CONFIG = "configs/pretrain/wav2vec2.py:size=tiny,smoke"
# For what is noticed by waiting alone; a busy machine takes longer over a step than one would think.
LIMITS = ("--peer-seconds=10", "--stall-seconds=12")
FOREIGN = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "SPEECHJAX_", "JAX_", "XLA_")


class Job:
    """`processes` processes with `devices` virtual devices each; leaves none behind."""

    def __init__(
        self, workdir: Path, overrides: Sequence[str] = (), *, processes: int = 2, devices: int = 1,
        faults: Mapping[int, str] | None = None, own: Mapping[int, Sequence[str]] | None = None,
        absent: Sequence[int] = (), flags: Sequence[str] = (),
    ):  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = workdir.parent / f"{workdir.name}_logs_{time.monotonic_ns()}"
        self.logs.mkdir(parents=True)
        self.workers: dict[int, subprocess.Popen] = {}
        for i in range(processes):
            if i in absent:
                continue
            env = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN) and "proxy" not in k.lower()}
            env |= dict(
                SPEECHJAX_COORDINATOR=f"127.0.0.1:{port}", SPEECHJAX_PROCESSES=str(processes), SPEECHJAX_PROCESS=str(i),
                JAX_NUM_CPU_DEVICES=str(devices), JAX_PLATFORMS="cpu",
                JAX_COMPILATION_CACHE_DIR=os.environ["JAX_COMPILATION_CACHE_DIR"],
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", XLA_FLAGS=os.environ["XLA_FLAGS"],
                SPEECHJAX_CACHE=str(workdir.parent / "cache"),
            )  # fmt: skip
            command = [
                sys.executable, "-m", "tests.hosts.worker", (faults or {}).get(i, "none"), f"--config={CONFIG}",
                f"--workdir={workdir}", *flags, *(f"--config.{o}" for o in [*overrides, *(own or {}).get(i, ())]),
            ]  # fmt: skip
            with (self.logs / f"{i}.log").open("wb") as log:
                self.workers[i] = subprocess.Popen(
                    command, cwd=REPO, env=env, stdout=log, stderr=log, start_new_session=True
                )

    def wait(self, seconds: float = 180.0) -> dict[int, int | None]:
        """Exit codes, None of those that had to be killed after `seconds`."""
        end = time.monotonic() + seconds
        codes: dict[int, int | None] = {}
        try:
            for i, worker in self.workers.items():
                try:
                    codes[i] = worker.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    codes[i] = None
        finally:
            self.end()
        return codes

    def wait_after_first(self, seconds: float, first: int) -> dict[int, int | None]:
        """Exit codes of all that leave within `seconds` after process `first` has left, or has been stopped."""
        worker, end = self.workers[first], time.monotonic() + 180
        while worker.poll() is None and not self.stopped(first):
            assert time.monotonic() < end, self.output()
            time.sleep(0.02)
        return self.wait(seconds)

    def stopped(self, i: int) -> bool:
        try:
            return Path(f"/proc/{self.workers[i].pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    def end(self) -> None:
        for worker in self.workers.values():
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()

    def output(self) -> str:
        """What all of them have printed."""
        parts = [
            f"---- process {i}\n{(self.logs / f'{i}.log').read_text(errors='replace')[-6000:]}" for i in self.workers
        ]
        return "\n".join(parts)


def run(workdir: Path, overrides: Sequence[str] = (), **options) -> Job:
    """A job that must end well."""
    job = Job(workdir, overrides, **options)
    codes = job.wait()
    assert set(codes.values()) == {0}, f"{codes}\n{job.output()}"
    return job

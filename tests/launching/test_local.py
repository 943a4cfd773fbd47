"""Processes on this machine: what they are told, how they end together, and that nothing of them is left."""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from speechjax.errors import UserError
from speechjax.launching import local
from speechjax.launching.local import Job, free_port, telling

REPO = Path(__file__).resolve().parents[2]


def job(tmp_path, script: str, *, processes: int = 2, grace: float = 0.3, restarts: int = 0) -> Job:
    """Processes that run a script of sh."""
    command = ["/bin/sh", "-c", script]
    return Job(command, tmp_path / "logs", [{}] * processes, grace=grace, restarts=restarts)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def gone(pids: list[int], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def wait_for(paths: list[Path], seconds: float = 10) -> list[str]:
    """What is in files, as soon as all have a whole line."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [path.read_text() if path.exists() else "" for path in paths]
        if all(text.endswith("\n") for text in found):
            return [text.strip() for text in found]
        time.sleep(0.02)
    raise TimeoutError(paths)


# ---- what a process is told


def test_every_process_knows_its_place_and_nothing_of_other_jobs(tmp_path, monkeypatch):
    foreign = ("http_proxy", "HTTPS_PROXY", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK",
               "TPU_WORKER_ID", "JAX_PROCESS_ID", "MEGASCALE_SLICE_ID", "JAX_LOCAL_DEVICE_IDS",
               "JAX_COORDINATOR_ADDRESS", "SPEECHJAX_PROCESS")  # fmt: skip
    kept = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "SPEECHJAX_CACHE", "TPUS_OF_MINE")
    for name in foreign + kept:
        monkeypatch.setenv(name, "there")
    args = argparse.Namespace(gpus=False, devices=3, processes=2)
    one = Job(["/bin/sh", "-c", f"env > {tmp_path}/$SPEECHJAX_PROCESS"], tmp_path / "logs",
              [local.devices(args, i) for i in range(2)], grace=1, restarts=0)  # fmt: skip
    assert one.run() == 0
    told = [dict(line.split("=", 1) for line in (tmp_path / str(i)).read_text().splitlines()) for i in range(2)]
    for i, environment in enumerate(told):
        assert environment["SPEECHJAX_PROCESS"] == str(i)
        assert environment["SPEECHJAX_PROCESSES"] == "2"
        assert environment["JAX_NUM_CPU_DEVICES"] == "3"
        assert environment["JAX_PLATFORMS"] == "cpu"
        assert not (set(foreign) - {"SPEECHJAX_PROCESS"}) & environment.keys()
        assert {environment[name] for name in kept} == {"there"}
    assert told[0]["SPEECHJAX_COORDINATOR"] == told[1]["SPEECHJAX_COORDINATOR"]
    assert told[0]["SPEECHJAX_COORDINATOR"].startswith("127.0.0.1:")


@pytest.mark.parametrize(("visible", "expected"), [("", ["0,1", "2,3"]), ("7,5,3,1", ["7,5", "3,1"])])
def test_gpus_are_dealt_out(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    args = argparse.Namespace(gpus=True, devices=2, processes=2)
    assert [local.devices(args, i) for i in range(2)] == [{"CUDA_VISIBLE_DEVICES": found} for found in expected]


def test_too_few_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(UserError, match="has 3 GPUs, the processes need 4"):
        local.devices(argparse.Namespace(gpus=True, devices=2, processes=2), 0)


def test_a_port_is_nobody_elses():
    with free_port() as port, free_port() as other:
        assert port != other
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", port))
        with socket.socket() as coordinator:  # gRPC asks for ports that way
            coordinator.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            coordinator.bind(("127.0.0.1", port))
            coordinator.listen()
            with socket.create_connection(("127.0.0.1", port), 1) as peer:  # none of it is lost to the reserving one
                with coordinator.accept()[0] as accepted:
                    accepted.sendall(b"x")
                    assert peer.recv(1) == b"x"


# ---- how it ends


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([42, 0], 42), ([42, 1], 1), ([3, 42], 3), ([1, 3], 3), ([0, -9], 42), ([-6, 1], 1), ([2, 42], 2)],
)
def test_the_telling_code(codes, expected):
    assert telling(codes) == expected
    assert telling(codes[::-1]) == expected


@pytest.mark.parametrize(("codes", "expected"), [("0 0", 0), ("42 1", 1), ("0 3", 3)])
def test_the_job_ends_with_the_telling_code(tmp_path, codes, expected):
    script = f'echo >> {tmp_path}/starts$SPEECHJAX_PROCESS; set -- {codes}; shift "$SPEECHJAX_PROCESS"; exit "$1"'
    assert job(tmp_path, script, restarts=5).run() == expected
    assert (tmp_path / "starts0").read_text() == "\n"  # an error is not tried again


@pytest.mark.parametrize(("restarts", "expected", "starts"), [(5, 0, 3), (1, 42, 2), (0, 42, 1)])
def test_42_starts_all_again(tmp_path, restarts, expected, starts):
    file = f"{tmp_path}/starts$SPEECHJAX_PROCESS"
    script = f'echo "$SPEECHJAX_COORDINATOR" >> {file}; [ "$(wc -l < {file})" -ge 3 ] || exit 42'
    assert job(tmp_path, script, restarts=restarts, grace=5).run() == expected
    coordinators = [(tmp_path / f"starts{i}").read_text().split() for i in range(2)]
    assert coordinators[0] == coordinators[1]
    assert len(coordinators[0]) == starts


def test_a_signal_asks_for_a_restart(tmp_path):
    script = f'[ -e {tmp_path}/again ] && exit 0; touch {tmp_path}/again; kill -KILL "$$"'
    assert job(tmp_path, script, processes=1, restarts=1).run() == 0


def test_who_does_not_end_after_another_one_is_killed(tmp_path, caplog):
    script = '[ "$SPEECHJAX_PROCESS" = 1 ] && exit 3; trap "" TERM; while :; do sleep 60; done'
    began = time.monotonic()
    assert job(tmp_path, script).run() == 3
    assert 0.3 <= time.monotonic() - began < 20
    assert "process 0 did not end in 0.3 s after another one, and was killed" in caplog.text
    assert "process 1 ended with code 3" in caplog.text


def test_who_ends_in_the_grace_is_not_killed(tmp_path):
    script = f'[ "$SPEECHJAX_PROCESS" = 1 ] && exit 42; sleep 0.4; echo > {tmp_path}/saved; exit 42'
    assert job(tmp_path, script, grace=20).run() == 42
    assert (tmp_path / "saved").exists()


def test_after_a_good_end_the_others_have_all_the_time(tmp_path):
    script = f'[ "$SPEECHJAX_PROCESS" = 1 ] && exit 0; sleep 0.5; echo > {tmp_path}/report'
    assert job(tmp_path, script, grace=0).run() == 0
    assert (tmp_path / "report").exists()


def test_the_first_process_is_shown_and_the_errors_of_the_others(tmp_path, capfdbinary, caplog):
    script = 'echo "out $SPEECHJAX_PROCESS"; echo "err ä" >&2; exit $((SPEECHJAX_PROCESS * 3))'
    assert job(tmp_path, script, grace=5).run() == 3
    assert capfdbinary.readouterr().out.decode() == "out 0\nerr ä\n"
    assert "out 1" in caplog.text  # the end of its log
    assert (tmp_path / "logs/process1.log").read_text() == "out 1\nerr ä\n"
    assert job(tmp_path, script, grace=5).run() == 3
    assert capfdbinary.readouterr().out.decode() == "out 0\nerr ä\n"  # what was there before is not shown again
    assert (tmp_path / "logs/process0.log").read_text() == "out 0\nerr ä\n" * 2


def test_a_port_that_was_taken_is_tried_again(tmp_path, caplog):
    file = f"{tmp_path}/starts$SPEECHJAX_PROCESS"
    message = "jax.errors.JaxRuntimeError: UNKNOWN: Failed to start RPC server"
    script = f'echo x >> {file}; [ "$(wc -l < {file})" -ge 2 ] || {{ echo "{message}"; exit 1; }}'
    assert job(tmp_path, script, grace=5).run() == 0
    assert "again with another one" in caplog.text
    assert job(tmp_path, f'echo x >> {tmp_path}/tries; echo "{message}"; exit 1', processes=1).run() == 1
    assert (tmp_path / "tries").read_text() == "x\n" * (1 + local.PORTS)


def test_a_workdir_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        job(tmp_path / "file", "exit 0").run()


# ---- nothing is left


def test_what_a_process_leaves_behind_is_ended(tmp_path):
    script = f"sleep 1000 & echo $! > {tmp_path}/pid$SPEECHJAX_PROCESS"
    assert job(tmp_path, script).run() == 0
    assert gone([int((tmp_path / f"pid{i}").read_text()) for i in range(2)])


LAUNCHER = """
import sys
from pathlib import Path
from speechjax.launching.local import Job
sys.exit(Job(["/bin/sh", "-c", sys.argv[1]], Path(sys.argv[2]), [{}] * 2, grace=15, restarts=9).run())
"""
FAMILY = "sleep 1000 & echo $$ > {0}/parent$SPEECHJAX_PROCESS; echo $! > {0}/child$SPEECHJAX_PROCESS; {1} wait; wait"


@pytest.fixture
def launcher(tmp_path):
    """Starts a launcher of two processes with a child each: (the launcher, the pids of these four)."""
    started: list[int] = []

    def start(trap: str, signals: str = "--default-signal=INT,HUP") -> tuple[subprocess.Popen, list[int]]:
        """`signals` for `env`: what runs the tests in the background may have made it deaf to Ctrl-C."""
        script = FAMILY.format(shlex.quote(str(tmp_path)), trap)
        command = ["env", signals, sys.executable, "-c", LAUNCHER, script, str(tmp_path / "logs")]
        process = subprocess.Popen(command, cwd=REPO)
        started.append(process.pid)
        files = [tmp_path / f"{who}{i}" for who in ("parent", "child") for i in range(2)]
        pids = [int(text) for text in wait_for(files, seconds=60)]
        started.extend(pids)
        assert all(map(alive, pids))
        return process, pids

    yield start
    for pid in filter(alive, started):
        os.kill(pid, signal.SIGKILL)


def test_a_launcher_that_is_killed_takes_all_with_it(launcher):
    process, pids = launcher('trap "" TERM INT HUP;')
    process.kill()
    process.wait()
    assert gone(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_reach_every_process_and_end_the_restarts(launcher, tmp_path, number):
    heard = f"trap 'echo TERM > {tmp_path}/heard$SPEECHJAX_PROCESS; exit 42' TERM; "
    heard += f"trap 'echo INT > {tmp_path}/heard$SPEECHJAX_PROCESS; exit 42' INT;"
    process, pids = launcher(heard)
    process.send_signal(number)
    assert process.wait(20) == 42
    expected = "INT" if number == signal.SIGINT else "TERM"
    assert [(tmp_path / f"heard{i}").read_text().strip() for i in range(2)] == [expected] * 2
    assert gone(pids)


def test_the_second_signal_kills(launcher, tmp_path):
    heard = f"trap 'echo > {tmp_path}/heard$SPEECHJAX_PROCESS' TERM; while :; do wait; done;"
    process, pids = launcher(heard)
    process.terminate()
    wait_for([tmp_path / f"heard{i}" for i in range(2)])
    assert all(map(alive, pids[:2]))
    process.terminate()
    assert process.wait(20) == 42
    assert gone(pids)


def test_nohup_is_respected(launcher):
    process, pids = launcher("", signals="--ignore-signal=HUP")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    assert all(map(alive, pids))
    process.kill()
    process.wait()
    assert gone(pids)


# ---- what would run


def test_the_dry_run_is_what_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "there")
    one = Job(["/bin/sh", "-c", 'env > "$0$SPEECHJAX_PROCESS"', f"{tmp_path}/it's $HOME\n"], tmp_path / "lo gs",
              [{"JAX_NUM_CPU_DEVICES": "2"}] * 2, grace=1, restarts=1)  # fmt: skip
    script = one.script(4711)
    assert not (tmp_path / "lo gs").exists()
    subprocess.run(["bash", "-c", script], check=True)
    for i in range(2):
        environment = (tmp_path / f"it's $HOME\n{i}").read_text().splitlines()
        assert set(environment) > {
            f"SPEECHJAX_PROCESS={i}",
            "SPEECHJAX_COORDINATOR=127.0.0.1:4711",
            "JAX_NUM_CPU_DEVICES=2",
        }
        assert not any(line.startswith("http_proxy") for line in environment)
        assert (tmp_path / f"lo gs/process{i}.log").exists()

"""Processes on this machine: started together, watched, ended together, started again on exit code 42."""

import argparse
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from speechjax.errors import RESTART, UserError
from speechjax.launching.flags import count, natural
from speechjax.launching.render import quote

log = logging.getLogger("speechjax")

SUMMARY = "processes on this machine, on CPU devices or its GPUs"
PORTS = 3  # tries, where another process takes the port first
# What other launchers and clusters left in the environment would make JAX join their job; a proxy does not know
# loopback.
FOREIGN = re.compile(
    r"(?i:.*_proxy)|(SLURM|OMPI|PMI|PMIX|TPU|MEGASCALE|CLOUD_TPU)_.*|(JAX|SPEECHJAX)_(COORDINATOR|PROCESS).*"
    r"|JAX_LOCAL_DEVICE_IDS|JAX_PARTITION_INDEX"
)
PORT_TAKEN = re.compile(rb"failed to add port|failed to start RPC server|address already in use", re.IGNORECASE)
# Its standard input ends when the launcher does, however that ends; then the whole group goes.
GUARD = "trap '' TERM INT HUP; read -r _; kill -KILL 0"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=count, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--devices", type=count, default=1, metavar="K", help="of each process (default: %(default)s)")
    parser.add_argument("--gpus", action="store_true", help="the devices are GPUs, K after K (default: CPU devices)")
    parser.add_argument("--grace", type=natural, default=15, metavar="SECONDS", help="for the others after one process "
                        "ended badly (default: %(default)s)")  # fmt: skip
    parser.set_defaults(restarts=3)


def run(args: argparse.Namespace, job: Sequence[str]) -> int:
    """Runs the job, or prints what would run; its exit code."""
    command = [sys.executable, "-m", "speechjax.main", *job]
    processes = Job(
        command, Path(args.workdir) / "logs", [devices(args, i) for i in range(args.processes)], grace=args.grace,
        restarts=args.restarts,
    )  # fmt: skip
    if args.dry_run:
        with free_port() as port:
            print(processes.script(port), end="")
        return 0
    kind = "GPUs" if args.gpus else "CPU devices"
    log.info("processes: %d, %s of each: %d, logs: %s", args.processes, kind, args.devices, processes.logs)
    return processes.run()


def devices(args: argparse.Namespace, process: int) -> dict[str, str]:
    """The environment that gives a process its devices.  Raises UserError where CUDA_VISIBLE_DEVICES has too few."""
    if not args.gpus:
        return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
    needed = args.processes * args.devices
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        there = visible.split(",")
        if len(there) < needed:
            raise UserError(f"CUDA_VISIBLE_DEVICES={visible} has {len(there)} GPUs, the processes need {needed}")
    else:
        there = [str(i) for i in range(needed)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(there[process * args.devices : (process + 1) * args.devices])}


@contextmanager
def free_port() -> Iterator[int]:
    """A free port of loopback, which stays ours: bound and never listened to, it is given to nobody else.

    The coordinator can bind it all the same, for gRPC's sockets share ports.
    """
    with socket.socket() as probe:
        if hasattr(socket, "SO_REUSEPORT"):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def telling(codes: Sequence[int]) -> int:
    """The exit code of a job, from those of its processes; a negative one is a signal.

    An error (the largest code where there are several) comes before 42, for that is how peers answer it.  A process
    that a signal ended counts as 42: it did not say that another start would end alike.
    """
    errors = [code for code in codes if code > 0 and code != RESTART]
    return max(errors) if errors else RESTART if any(codes) else 0


class Job:
    """The same command in several processes.

    `environments` has what is particular to each.  `grace` seconds after one ended badly the others are killed;
    after code 42 all start again, `restarts` times.  Output goes to `logs`/process<i>.log, the first one's also to the
    terminal.  SIGTERM, SIGINT and SIGHUP (as SIGTERM) go on to all processes and end the restarts; a second one kills.
    """

    def __init__(
        self, command: Sequence[str], logs: Path, environments: Sequence[Mapping[str, str]], *, grace: float,
        restarts: int,
    ):  # fmt: skip
        self.command, self.logs, self.environments = list(command), logs, environments
        self.grace, self.restarts = grace, restarts
        self.processes: list[subprocess.Popen] = []
        self.signals = 0

    def run(self) -> int:
        """Runs it to its end; the code of the job, as `telling` says."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.logs}: {error.strerror}") from error
        code, restarts, ports = RESTART, 0, 0
        with self._handling_signals():
            while not self.signals:
                code, port_taken = self._attempt()
                if code and port_taken and ports < PORTS:
                    ports += 1
                    log.warning("another process took the coordinator's port: again with another one")
                elif code == RESTART and restarts < self.restarts and not self.signals:
                    restarts += 1
                    log.warning("the job asks for a restart: %d of %d", restarts, self.restarts)
                else:
                    break
        return code

    def environment(self, process: int, port: int) -> dict[str, str]:
        """What a process gets beside the environment of this one, less what is FOREIGN."""
        return {
            "SPEECHJAX_COORDINATOR": f"127.0.0.1:{port}",
            "SPEECHJAX_PROCESSES": str(len(self.environments)),
            "SPEECHJAX_PROCESS": str(process),
            "PYTHONUNBUFFERED": "1",
            **self.environments[process],
        }

    def script(self, port: int) -> str:
        """One start as a script of bash."""
        unset = [f"-u{name}" for name in sorted(os.environ) if FOREIGN.fullmatch(name)]
        lines = ["#!/bin/bash", f"mkdir -p {quote(str(self.logs))}"]
        for process in range(len(self.environments)):
            settings = [f"{key}={value}" for key, value in self.environment(process, port).items()]
            words = " ".join(map(quote, ["env", *unset, *settings, *self.command]))
            lines.append(f"{words} </dev/null >>{quote(str(self._log(process)))} 2>&1 &")
        again = f"# Code 42 of the job: all of it again, on another port, {self.restarts} times."
        return "\n".join([*lines, "wait", again, ""])

    def _log(self, process: int) -> Path:
        return self.logs / f"process{process}.log"

    def _attempt(self) -> tuple[int, bool]:
        """(code, whether the port was taken) of one start of all processes."""
        inherited = {key: value for key, value in os.environ.items() if not FOREIGN.fullmatch(key)}
        with free_port() as port, _group() as group, Tail(self._log(0)) as tail:
            try:
                for process in range(len(self.environments)):
                    if self.signals:
                        break
                    with open(self._log(process), "ab") as out:
                        self.processes.append(subprocess.Popen(
                            self.command, env=inherited | self.environment(process, port), stdin=subprocess.DEVNULL,
                            stdout=out, stderr=out, process_group=group,
                        ))  # fmt: skip
                if self.signals:  # the last one started before it could be told
                    self._send(signal.SIGTERM)
                killed = self._watch(tail)
            finally:
                for process in self.processes:  # those that are left
                    process.kill()
                    process.wait()
                codes, self.processes = [process.returncode for process in self.processes], []
            tail.show()
            self._tell(codes, killed)
            if len(codes) < len(self.environments):
                return RESTART, False
            return telling([0 if i in killed else code for i, code in enumerate(codes)]), tail.found_taken_port

    def _watch(self, tail: "Tail") -> set[int]:
        """Until all have ended; those that had to be killed because another had ended badly."""
        deadline = float("inf")
        while None in (codes := [process.poll() for process in self.processes]):
            tail.show()
            if any(codes):
                deadline = min(deadline, time.monotonic() + self.grace)
            if time.monotonic() > deadline:
                return {i for i, code in enumerate(codes) if code is None}
            time.sleep(0.05)
        return set()

    def _tell(self, codes: Sequence[int], killed: set[int]) -> None:
        """What became of the processes, where that is not plain."""
        for process, code in enumerate(codes):
            if process in killed:
                log.error("process %d did not end in %g s after another one, and was killed", process, self.grace)
            elif code:
                how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with code {code}"
                log.error("process %d ended %s; its log: %s", process, how, self._log(process))
                if process:  # the first one's output has been seen
                    for line in self._log(process).read_text(errors="replace").splitlines()[-5:]:
                        log.error("    %s", line)

    def _send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        def forward(number: int, _: object) -> None:
            self.signals += 1
            sent = signal.SIGTERM if number == signal.SIGHUP else number
            self._send(signal.SIGKILL if self.signals > 1 else sent)

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, forward) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _group() -> Iterator[int]:
    """A process group, all of which ends with this block, or with this process if that is killed."""
    guard = subprocess.Popen(
        ["/bin/sh", "-c", GUARD], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        process_group=0,
    )  # fmt: skip
    try:
        yield guard.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(guard.pid, signal.SIGKILL)
        guard.communicate()


class Tail:
    """Shows what is added to a file; a pipe would end with the launcher, and take the process with it."""

    def __init__(self, path: Path):
        self.path, self.found_taken_port = path, False
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Tail":
        self._file = open(self.path, "ab+")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def show(self) -> None:
        """Writes what is new to standard output; a terminal that is gone is none of the job's business."""
        assert self._file is not None
        new = self._file.read()
        self.found_taken_port = self.found_taken_port or bool(PORT_TAKEN.search(new))
        with suppress(OSError, ValueError):
            sys.stdout.buffer.write(new)
            sys.stdout.buffer.flush()

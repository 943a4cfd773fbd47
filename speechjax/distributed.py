"""Joining the other processes of a job, noticing when one of them is lost, and leaving in time.

A job ends as a whole: whoever cannot go on leaves at once (see verb.leave), and everybody else notices and leaves with
exit code 42, which asks the launcher to start the job again.  Who notices what:

    a peer died         the collective that waits for it raises (loopback, Ethernet: at once), or JAX's coordinator
                        misses its heartbeats (NCCL, TPU: after `peer_seconds`) and JAX aborts this process
    coordinator died    JAX aborts this process at once
    a peer hangs        the watchdog of every process: nobody gets past the step
    a peer never came   the watchdog, after `start_seconds`
"""

import ctypes
import faulthandler
import glob
import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

from speechjax.errors import RESTART, UserError

log = logging.getLogger("speechjax")

_LOST = re.compile(
    r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|coordination.?service|heartbeat|barrier|"
    r"connection (closed|reset|refused)|broken pipe|socket closed", re.IGNORECASE,
)  # fmt: skip


# ---- the start


def init(*, start_seconds: float = 600.0, peer_seconds: float = 100.0) -> None:
    """Connects this process to the job; a job of one process too, for else a pre-emption notice is never seen.

    Order: SPEECHJAX_COORDINATOR (host:port), SPEECHJAX_PROCESSES and SPEECHJAX_PROCESS; then what JAX detects by
    itself (TPU pods, SLURM, Open MPI); then a coordinator of our own on loopback.  Processes that are not all there
    after `start_seconds` leave with 42; one that was not heard of for `peer_seconds` is lost.
    """
    if jax.distributed.is_initialized():
        return
    # JAX's own limit would end the process without a word that one could catch.
    common: Any = dict(
        initialization_timeout=int(start_seconds) + 60, heartbeat_timeout_seconds=max(1, int(peer_seconds))
    )  # fmt: skip
    watchdog.expect("all processes of the job to start", start_seconds)
    if "SPEECHJAX_COORDINATOR" in os.environ:
        address, processes, process = (_variable(name) for name in ("COORDINATOR", "PROCESSES", "PROCESS"))
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not processes.isdecimal() or not process.isdecimal():
            raise UserError(
                f"SPEECHJAX_COORDINATOR={address} must be host:port, SPEECHJAX_PROCESSES={processes} and "
                f"SPEECHJAX_PROCESS={process} whole numbers"
            )
        if int(process) >= int(processes):
            raise UserError(
                f"SPEECHJAX_PROCESS={process} counts from 0 to SPEECHJAX_PROCESSES - 1={int(processes) - 1}"
            )
        bind = address if host in ("127.0.0.1", "localhost") else None  # else JAX listens to all the world
        jax.distributed.initialize(
            address, int(processes), int(process), cluster_detection_method="deactivate",
            coordinator_bind_address=bind, **common,
        )  # fmt: skip
    elif _in_cluster():
        jax.distributed.initialize(**common)
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        jax.distributed.initialize(address, 1, 0, coordinator_bind_address=address, **common)
    if jax.process_count() > 1:
        _restart_on_abort()
    watchdog.rest()


def _variable(name: str) -> str:
    try:
        return os.environ[f"SPEECHJAX_{name}"]
    except KeyError:
        raise UserError(f"SPEECHJAX_COORDINATOR is set, and SPEECHJAX_{name} is not: all three or none") from None


def _in_cluster() -> bool:
    """A launcher that JAX can read started this process."""
    slurm_step = "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ
    mpi = "OMPI_MCA_orte_hnp_uri" in os.environ
    tpu = importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return slurm_step or mpi or bool(tpu)


def agree(what: str, digest: str) -> None:
    """Raises UserError unless all processes have the same digest (hexadecimal) of something that all must share."""
    if jax.process_count() == 1:
        return
    found = _gather(np.frombuffer(bytes.fromhex(digest), np.uint8))
    others = np.flatnonzero((found != found[0]).any(axis=1))
    if len(others):
        raise UserError(
            f"{what} of process {', '.join(map(str, others))} are not those of process 0: give all hosts the same"
        )


def all_well(well: bool) -> bool:
    """Whether all processes say that all is well; every process must ask."""
    return well if jax.process_count() == 1 else bool(_gather(np.asarray([well])).all())


def _gather(mine: np.ndarray) -> np.ndarray:
    """What each process has, [processes, ...]."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(mine)).reshape(jax.process_count(), *mine.shape)


# ---- the end


def is_lost(error: BaseException) -> bool:
    """Whether `error` says that another process of the job is gone: nothing here is wrong."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1 or isinstance(error, UserError | OSError):
        return False
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError | ValueError) and _LOST.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _restart_on_abort() -> None:
    """JAX ends a process whose coordinator or peer is lost by abort(); from now on that is exit code 42.

    Its own callback for this cannot be set from Python (jaxlib 0.10 and 0.11 fail to convert its argument), and
    Python's signal handlers run too late for abort().  So a C handler enters Python on the aborting thread.
    """

    def end(_: int) -> None:
        os.write(2, b"a process of the job was lost: the last checkpoint is whole, exit code 42 asks for a restart\n")
        os._exit(RESTART)

    _restart_on_abort.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)  # type: ignore[attr-defined]  # keeps it
    try:
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, _restart_on_abort.handler)  # type: ignore[attr-defined]
    except (OSError, AttributeError):  # no POSIX: the launcher sees an abort
        pass


class Watchdog:
    """Ends the process with 42, and with every thread's stack, where what is expected does not happen in time.

    `patience`, in seconds, is for what is said to take no longer than a step; 0: for ever.  Time in which the process
    itself is stopped (Ctrl-Z, a laptop asleep) does not count.
    """

    def __init__(self) -> None:
        self.patience = 0.0
        self._expected = ("", 0.0, float("inf"))  # what, within how long, when by the clock of the thread
        self._clock = 0.0  # written by the thread alone, as `_expected` by the others alone
        self._thread: threading.Thread | None = None

    def expect(self, what: str, seconds: float = 0.0, *, times: int = 1) -> None:
        """From now on `what` has `seconds`, or `times` the patience, until the next call of `expect` or `rest`."""
        seconds = seconds or times * self.patience
        self._expected = (what, seconds, self._clock + (seconds or float("inf")))
        if self._thread is None and seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """Nothing is expected any more."""
        self._expected = ("", 0.0, float("inf"))

    def _watch(self) -> None:
        tick = 0.25
        while self._clock < self._expected[2]:
            began = time.monotonic()
            time.sleep(tick)
            self._clock += min(time.monotonic() - began, 2 * tick)
        what, seconds, _ = self._expected
        print(
            f"waited {seconds:g} s for {what}: stopping, exit code {RESTART} asks for a restart; what every "
            "thread was doing:", file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(all_threads=True)
        os._exit(RESTART)


watchdog = Watchdog()

"""Joining the other processes of a job, in an order that also works for one."""

import glob
import importlib.util
import os
import socket

import jax
import numpy as np

from speechjax.errors import UserError


def init() -> None:
    """Connects this process to the job; a job of one process too, for else a pre-emption notice is never seen.

    Order: SPEECHJAX_COORDINATOR (host:port), SPEECHJAX_PROCESSES and SPEECHJAX_PROCESS; then what JAX detects by
    itself (TPU pods, SLURM, Open MPI); then a coordinator of our own on loopback.
    """
    if jax.distributed.is_initialized():
        return
    if "SPEECHJAX_COORDINATOR" in os.environ:
        jax.distributed.initialize(
            coordinator_address=os.environ["SPEECHJAX_COORDINATOR"],
            num_processes=int(os.environ["SPEECHJAX_PROCESSES"]),
            process_id=int(os.environ["SPEECHJAX_PROCESS"]),
        )
    elif _in_cluster():
        jax.distributed.initialize()
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        jax.distributed.initialize(address, num_processes=1, process_id=0, coordinator_bind_address=address)


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
    from jax.experimental import multihost_utils

    found = np.asarray(multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8)))
    others = np.flatnonzero((found != found[0]).any(axis=1))
    if len(others):
        raise UserError(
            f"{what} of process {', '.join(map(str, others))} are not those of process 0: give all hosts the same data"
        )

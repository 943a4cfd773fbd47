"""A real SLURM on this machine: two nodes on loopback, from a folder of its own; nothing of /etc is used or changed.

    python tests/real/slurm.py COMMAND...    # runs it with sbatch, squeue, ... speaking to this cluster

Debian's packages slurm-wlm and munge.  Nodes are named by their addresses, 127.0.0.1 and 127.0.0.2, because processes
look for the first of them by its name.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "scontrol")
SETTINGS = """\
ClusterName=speechjax
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/slurmd-%n
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
    return [name for name in PROGRAMS if not shutil.which(name, path=path)]


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands reach a new cluster; all of it ends with the block."""
    import getpass

    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as running:
        folder = Path(name)
        folder.chmod(0o755)  # munge wants its socket to be reached by all
        for part in ("state", "slurmd-127.0.0.1", "slurmd-127.0.0.2"):
            (folder / part).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        control, first, second = _free_ports(3)
        (folder / "slurm.conf").write_text(SETTINGS.format(
            folder=folder, host=socket.gethostname().partition(".")[0], user=getpass.getuser(), control=control,
            first=first, second=second,
        ))  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        environment |= {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{os.environ['PATH']}{os.pathsep}/usr/sbin"}
        daemons = [
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
             f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "127.0.0.1"],
            ["slurmd", "-D", "-N", "127.0.0.2"],
        ]  # fmt: skip
        for daemon in daemons:
            running.enter_context(_running(daemon, environment, folder))
            _wait_for(lambda: (folder / "munge.socket").exists(), folder, "munged")
        _wait_for(lambda: _idle(environment) == 2, folder, "two idle nodes")
        yield environment
        subprocess.run(["scancel", "--full", "--signal=KILL", "--state=RUNNING"], env=environment, check=False)


def controller_log(environment: dict[str, str]) -> str:
    """What a running cluster's controller has decided, and why."""
    return (Path(environment["SLURM_CONF"]).parent / "slurmctld.log").read_text()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as sockets:
        found = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@contextmanager
def _running(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    with open(folder / f"{command[0]}.out", "ab") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle(environment: dict[str, str]) -> int:
    """How many nodes are ready."""
    seen = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
    return seen.stdout.split().count("idle")


def _wait_for(ready, folder: Path, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in
                             (*folder.glob("*.log"), *folder.glob("*.out")))  # fmt: skip
            raise TimeoutError(f"no {what} after {seconds:g} s\n{logs}")
        time.sleep(0.2)


if __name__ == "__main__":
    if absent := missing():
        sys.exit(f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)")
    with cluster() as environment:
        sys.exit(subprocess.run(sys.argv[1:], env=environment, check=False).returncode)

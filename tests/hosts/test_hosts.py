"""Jobs of several processes on loopback: what they learn, and that all leave in time when one is lost, and resume.

Real processes of the real job; every fault is set off at a chosen batch (see worker.py).
"""

import os
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from speechjax.logs import read_metrics
from tests.hosts.jobs import LIMITS, Job, run
from tests.test_train import TIMING, assert_same

pytestmark = pytest.mark.slow

RESTART, FAILED, KILLED = 42, 1, -signal.SIGKILL
SECONDS = 15.0  # in which all have left after one is lost
STEPS = ("train.steps=24", "train.checkpoint_every=4", "train.eval_every=100", "data.valid_seconds=5")


def learnt(workdir):
    """What the steps report, without times."""
    rows = [row for row in read_metrics(workdir) if row["split"] == "train"]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A job of two processes that nothing happens to."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(workdir, STEPS)
    return workdir


def arrays(workdir, step):
    """The arrays of a checkpoint by path, on one device whatever wrote them."""
    handlers = {"state": ocp.StandardCheckpointHandler()}
    with ocp.CheckpointManager((workdir / "checkpoints").absolute(), item_handlers=handlers) as manager:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        there = manager.item_metadata(step)["state"]
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), there)
        found = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(found)}


def resumes_bitwise(workdir, straight):
    """The same command again ends where the undisturbed job ended."""
    job = run(workdir, STEPS)
    assert learnt(workdir) == learnt(straight)
    assert_same(arrays(workdir, 24), arrays(straight, 24))
    return job


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 2, ()), (4, 1, ("mesh.fsdp=2",)), (2, 2, ("mesh.tensor=2",)), (4, 1, ("mesh.tensor=4",))],
)
def test_losses_are_those_of_one_process(processes, devices, mesh, tmp_path, tmp_path_factory):
    one = tmp_path_factory.getbasetemp() / "one_process"
    if not one.exists():
        run(one / "run", STEPS, processes=1, devices=4)
    run(tmp_path / "run", (*STEPS, *mesh), processes=processes, devices=devices)
    mine, theirs = learnt(tmp_path / "run"), learnt(one / "run")
    assert [row["step"] for row in mine] == list(range(1, 25))
    for row, wanted in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm", "contrastive"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-5), (row["step"], name)
    assert abs(theirs[0]["loss"] - theirs[-1]["loss"]) > 1e-2, "negative control: the losses change"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_and_it_resumes(victim, straight, tmp_path):
    """Process 0 is the coordinator."""
    job = Job(tmp_path / "run", STEPS, faults={victim: "kill@9"})
    codes = job.wait_after_first(SECONDS, victim)
    assert codes == {victim: KILLED, 1 - victim: RESTART}, job.output()
    assert "asks for a restart" in (job.logs / f"{1 - victim}.log").read_text()
    assert "Traceback" not in (job.logs / f"{1 - victim}.log").read_text(), job.output()
    resumes_bitwise(tmp_path / "run", straight)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_notice_stops_all_at_one_step(victim, straight, tmp_path):
    job = Job(tmp_path / "run", STEPS, faults={victim: "terminate@9"})
    codes = job.wait()
    assert codes == {0: RESTART, 1: RESTART}, job.output()
    assert "pre-empted" in job.output()
    again = resumes_bitwise(tmp_path / "run", straight)
    assert "resuming at step" in again.output()


@pytest.mark.parametrize("victim", [0, 1])
def test_an_exception_on_one_host_does_not_hang_the_others(victim, straight, tmp_path):
    job = Job(tmp_path / "run", STEPS, faults={victim: "raise@9"})
    codes = job.wait_after_first(SECONDS, victim)
    assert codes == {victim: FAILED, 1 - victim: RESTART}, job.output()
    assert "the machine is on fire" in (job.logs / f"{victim}.log").read_text()
    resumes_bitwise(tmp_path / "run", straight)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_hangs_is_noticed_by_all(victim, straight, tmp_path):
    job = Job(tmp_path / "run", STEPS, faults={victim: "stall@9"}, flags=LIMITS)
    codes = job.wait()
    assert codes == {0: RESTART, 1: RESTART}, job.output()
    for i in (0, 1):
        text = (job.logs / f"{i}.log").read_text()
        assert "waited 12 s for step" in text, job.output()
        assert "speechjax/train.py" in text, "where it hung"
    resumes_bitwise(tmp_path / "run", straight)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_host_is_noticed_by_the_others(victim, straight, tmp_path):
    job = Job(tmp_path / "run", STEPS, faults={victim: "stop@9"}, flags=LIMITS)
    codes = job.wait_after_first(SECONDS, victim)
    assert codes == {victim: None, 1 - victim: RESTART}, job.output()
    resumes_bitwise(tmp_path / "run", straight)


@pytest.mark.parametrize("absent", [0, 1])
def test_a_process_that_never_starts(absent, tmp_path):
    began = time.monotonic()
    job = Job(tmp_path / "run", STEPS, absent=[absent], flags=["--start-seconds=6"])
    assert job.wait(60) == {1 - absent: RESTART}, job.output()
    assert "waited 6 s for all processes of the job to start" in job.output()
    assert time.monotonic() - began < SECONDS + 15  # of which importing takes some


def test_other_settings_on_one_host_are_named(tmp_path):
    job = Job(tmp_path / "run", STEPS, own={1: ["train.seed=7"]})
    codes = job.wait()
    assert codes == {0: FAILED, 1: FAILED}, job.output()
    for i in (0, 1):
        assert "error: the settings of process 1 are not those of process 0" in (job.logs / f"{i}.log").read_text()


@pytest.mark.parametrize("what", ["truncated", "gone"])
def test_a_broken_newest_checkpoint_falls_back_on_all_hosts(what, straight, tmp_path):
    workdir = tmp_path / "run"
    run(workdir, ("train.steps=24", *STEPS[1:]))
    largest = max((workdir / "checkpoints/24/state").rglob("*"), key=lambda path: path.stat().st_size)
    if what == "truncated":
        os.truncate(largest, largest.stat().st_size // 2)
    else:
        largest.unlink()
    job = resumes_bitwise(workdir, straight)
    assert "checkpoint 24" in job.output()
    assert "set aside" in job.output()
    assert (workdir / "checkpoints/24.broken").is_dir()


def test_kills_at_random_moments_of_saving_lose_nothing_that_was_committed(straight, tmp_path):
    """Twenty times over: everything is killed while a checkpoint is being written, and the job goes on after it."""
    rng, workdir = np.random.default_rng(0), tmp_path / "run"
    steps = ("train.steps=400", "train.checkpoint_every=1", *STEPS[2:])
    committed, interrupted = 0, 0
    for _ in range(20):
        job = Job(workdir, steps)
        end = time.monotonic() + 120
        wanted = committed + 2 + int(rng.integers(3))
        while latest(workdir) < wanted:
            assert time.monotonic() < end, job.output()
            assert all(worker.poll() is None for worker in job.workers.values()), job.output()
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.3)))
        os.killpg(job.workers[int(rng.integers(2))].pid, signal.SIGKILL)
        job.wait(SECONDS)
        now = latest(workdir)
        interrupted += any(path.name.endswith("-tmp") for path in (workdir / "checkpoints").iterdir())
        assert now >= wanted > committed
        committed = now
        assert not list((workdir / "checkpoints").glob("*.broken"))
    print(f"{interrupted} of 20 kills left an unfinished save")
    job = run(workdir, (f"train.steps={committed + 1}", *steps[1:]))
    assert f"resuming at step {committed} of" in job.output()
    rows = [row["step"] for row in read_metrics(workdir) if row["split"] == "train"]
    assert rows == list(range(1, committed + 2))


def latest(workdir):
    """The newest committed step."""
    folder = workdir / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return max(steps, default=0)

"""THE loop, read top to bottom.  It knows a task as a module from batch to sums of losses and metrics, no more."""

import collections
import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from speechjax import config as configs
from speechjax import sharding
from speechjax.checkpoint import Checkpoints
from speechjax.clock import StepClock
from speechjax.compiles import Compiles
from speechjax.distributed import watchdog
from speechjax.errors import DONE, NOT_FINITE, RESTART
from speechjax.logs import Logs
from speechjax.optim import detach, make_optimizer
from speechjax.report import write_report
from speechjax.schedule import Best, Schedule
from speechjax.step import State, batch_shapes, compile_steps, init_state
from speechjax.warm_start import fresh_state

log = logging.getLogger("speechjax")


@dataclass
class Job:
    """What evaluators may use: the task, where it runs, and what it runs on."""

    task: Any
    config: Any
    data: Any
    mesh: jax.sharding.Mesh
    workdir: Path
    logs: Logs


def train(config: Any, data: Any, workdir: Path) -> int:
    """Trains `config` on `data` in `workdir`, resuming by itself; returns an exit code.

    `data` offers `specs`, `train_batches(start, stop, host, hosts)`, `valid_batches(host, hosts)`, `sample_rate` and
    `digest` (speechjax.data.pipeline.Data does).
    """
    schedule = Schedule(**config.train)
    mesh = sharding.make_mesh(**config.mesh)
    task = configs.make_task(config)
    tx, rate = make_optimizer(steps=schedule.steps, **config.optim)

    with jax.set_mesh(mesh):
        # Shapes first: eval_shape -> shardings -> jit(init), so no device ever holds more than its part.
        init = functools.partial(init_state, task, tx, schedule.seed, batch_shapes(data.specs[0], mesh))
        abstract = sharding.placed(mesh, jax.eval_shape(init))

        checkpoints = Checkpoints(workdir / "checkpoints", keep=schedule.keep, every=schedule.checkpoint_every)
        restored = checkpoints.restore(abstract)
        if restored is None:
            state = fresh_state(task, init, abstract, config, data)
            best, start = Best(schedule), 0
        else:
            state, meta = restored
            best, start = Best(schedule, **meta["best"]), meta["step"]
            log.info("resuming at step %d of %d", start, schedule.steps)
            if meta["data"] != data.digest:
                log.warning("the data is not what it was before step %d: from here on other examples come", start)
        size = sum(x.size for x in jax.tree.leaves(state.params))
        log.info("%.2f M parameters, mesh %s", size / 1e6, dict(mesh.shape))

        first = jax.process_index() == 0
        with Logs(workdir, total_steps=schedule.steps, start_step=start, enabled=first) as logs:
            job = Job(task, config, data, mesh, workdir, logs)
            specs = [] if start >= schedule.steps or best.exhausted else data.specs
            programs = compile_steps(
                task, tx, mesh, abstract, specs, schedule.seed, schedule.log_every, schedule.device_seconds,
                detach(config.optim.freeze),
            )  # fmt: skip
            code = Loop(job, schedule, rate, programs, checkpoints, best).run(state, start)
        if first:
            log.info("report: %s", write_report(workdir))
    return code


class Loop:
    """One run of the loop over a prepared job."""

    def __init__(self, job: Job, schedule: Schedule, rate: Any, programs: Any, checkpoints: Checkpoints, best: Best):
        self.job, self.schedule, self.rate, self.programs = job, schedule, rate, programs
        self.checkpoints, self.best = checkpoints, best
        self.best_checkpoint = Checkpoints(job.workdir / "best", keep=1, every=1)
        self.evaluators = {
            name: configs.eval_class(block["name"])(job, **{k: v for k, v in block.items() if k != "name"})
            for name, block in job.config.evals.to_dict().items()
        }
        self.clock, self.compiles = StepClock(), Compiles()
        self.window: tuple[int, Any] | None = None  # a log window that is over, but not fetched yet

    def run(self, state: State, start: int) -> int:
        """From step `start` to the end; an exit code.  Whatever ends it, saves under way are finished.

        Except where another process of the job may be gone, which every save would wait for.
        """
        try:
            code = self._run(state, start)
        except BaseException:
            if jax.process_count() == 1:
                self.close()
            raise
        self.close()
        return code

    def close(self) -> None:
        watchdog.expect("checkpoints to be written", times=10)
        self.compiles.close()
        self.checkpoints.close()
        self.best_checkpoint.close()
        watchdog.rest()

    def _run(self, state: State, start: int) -> int:
        steps, hosts = self.schedule.steps, sharding.host_part(self.job.mesh)
        with self.clock.pause():  # opening loads TensorFlow
            batches = sharding.on_device(self.job.mesh, self.job.data.train_batches(start, steps, *hosts))
        code, in_flight = DONE, collections.deque()
        if self.best.exhausted:  # stopped early before; given again, the command changes nothing
            return code
        for step in range(start + 1, steps + 1):
            watchdog.expect(f"step {step}")
            with self.clock.input_wait():
                batch, samples = next(batches)
            state, meters = self.programs[batch["audio"].shape](state, batch)
            self.clock.step(samples / self.job.data.sample_rate)
            in_flight.append(meters["skipped"])
            if len(in_flight) > 2:  # two queued steps keep a device busy; more only hold memory and blur the clock
                in_flight.popleft().block_until_ready()

            last = step == steps
            evaluate = last or step % self.schedule.eval_every == 0
            save = self.checkpoints.due(step)
            lost = self.log()  # the window before, now that this step is on its way
            if last or step % self.schedule.log_every == 0:
                self.window = (step, meters)
            if evaluate or save:  # what a checkpoint is behind of, a resumed run does not log again
                lost = self.log() or lost
            if lost:
                code = NOT_FINITE
                break
            if evaluate:
                self.evaluate(state, step)
            with self.clock.pause():
                if save or last or self.best.exhausted:
                    self.checkpoints.save(step, state, self.meta(), force=True)
            if self.checkpoints.preempted(step):
                log.warning("pre-empted: step %d is saved, exit code %d asks for a restart", step, RESTART)
                code = RESTART
                break
            if self.best.exhausted:
                log.info("stopped early: %s is best at step %d", self.schedule.best_metric, self.best.step)
                break
        self.log()
        return code

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of itself beside the state."""
        model = configs.to_json(self.job.config)["model"]
        return dict(best=self.best.to_json(), model=model, data=self.job.data.digest)

    def evaluate(self, state: State, step: int) -> None:
        """Runs the evaluators that are due, names their metrics <evaluator>/<metric>, keeps the best checkpoint."""
        number, found = step // self.schedule.eval_every, {}
        due = {n: e for n, e in self.evaluators.items() if number % e.every == 0 or step == self.schedule.steps}
        judge = self.schedule.best_metric.partition("/")[0]
        watchdog.expect(f"the evaluation at step {step}", times=10)
        with self.clock.pause():
            for name, evaluator in due.items():
                metrics = evaluator(state.params, state.extra, step, name)
                if metrics:
                    self.job.logs.write(step, name, metrics)
                    found.update({f"{name}/{k}": v for k, v in metrics.items()})
            waits = judge in self.evaluators and judge not in due  # not an evaluation without the metric
            if not waits and self.best.update(step, found):
                self.best_checkpoint.save(step, state, self.meta(), force=True)
            if jax.process_index() == 0:
                write_report(self.job.workdir)

    def log(self) -> bool:
        """Writes the finished log window, if any; True where too many steps in a row were not finite."""
        if self.window is None:
            return False
        (step, meters), self.window = self.window, None
        meters = jax.device_get(meters)
        skipped, in_row = int(meters.pop("skipped")), int(meters.pop("skipped_in_row"))
        metrics = {name: float(s / w) if w else math.nan for name, (s, w) in meters.items()}
        metrics |= {"learning_rate": float(self.rate(step - 1)), "skipped": skipped, **self.clock.read_and_reset()}
        alarms = self.job.task.health(metrics, step)
        if not metrics["unread"]:
            del metrics["unread"]
        else:
            alarms["unread"] = "examples could not be read and were left empty; is the disk of the data all right?"
        self.job.logs.write(step, "train", metrics)
        self.job.logs.progress(step, metrics)
        if again := self.compiles.again():
            shown = ", ".join(f"{name} ({seconds:.1f} s)" for name, seconds in again.items())
            alarms["recompiled"] = f"{shown} compiled again, which costs time: do the shapes of its batches change?"
        if skipped > 0.05 * step:
            alarms["not_finite"] = f"{skipped} of {step} steps were not finite and skipped; lower optim.learning_rate"
        self.job.logs.alarms(step, alarms)
        if in_row < self.schedule.max_skipped:
            return False
        log.error("%d non-finite steps in a row: stopping; the last checkpoints are from before them", in_row)
        return True

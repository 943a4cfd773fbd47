"""The train step of a config, compiled for devices that need not be here, and what it takes of their memory."""

import functools
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from speechjax import config as configs
from speechjax import sharding
from speechjax.ahead.batch import task_spec
from speechjax.data.plan import Shape
from speechjax.optim import detach, make_optimizer
from speechjax.schedule import Schedule
from speechjax.step import SAMPLE_RATE, batch_shapes, compile_steps, init_state, micro_batches


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: `arguments` (state, batch), `temporaries`, in use at the `peak`, and in all: `needed`.

    Temporaries are allocated as one, so more is needed than is ever in use where buffers do not pack well.
    """

    arguments: float
    temporaries: float
    peak: float
    needed: float


@dataclass(frozen=True)
class Step:
    """A compiled step on a global batch of `shape`, in `parts` micro-batches, and the `seconds` that compiling took.

    `needed` are the bytes of a device it needs, more than there is, perhaps infinite, where the compiler refused it;
    then `program` and `memory` are None.
    """

    shape: Shape
    parts: int
    seconds: float
    needed: float
    memory: Memory | None = None
    program: Any = None


class StepCompiler:
    """Compiles the train step of `config` on `mesh` as training does: the same function, optimizer and placement.

    A device has `room` bytes.
    """

    def __init__(self, config: Any, mesh: jax.sharding.Mesh, room: float):
        self.config, self.mesh, self.room = config, mesh, room
        self.task = configs.make_task(config)
        self.row_parts = sharding.row_parts(mesh)
        self.steps: list[Step] = []  # all that were compiled
        self._schedule = Schedule(**config.train)
        self._tx, _ = make_optimizer(steps=self._schedule.steps, **config.optim)
        with jax.set_mesh(mesh):
            spec = task_spec(config, self.task, Shape(self.row_parts, 4 * SAMPLE_RATE))
            init = functools.partial(init_state, self.task, self._tx, self._schedule.seed, batch_shapes(spec, mesh))
            self._state = sharding.placed(mesh, jax.eval_shape(init))
        self.parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(self._state.params))
        self.state_bytes = _bytes(self._state)  # of one device

    def __call__(self, shape: Shape, device_seconds: float) -> Step:
        """The step on batches of `shape`, of which a device holds at most `device_seconds` at once (0: all)."""
        spec = task_spec(self.config, self.task, shape)
        parts = micro_batches(spec, self.row_parts, device_seconds)
        begin = time.monotonic()
        program, needed = None, math.inf
        with jax.set_mesh(self.mesh):
            try:
                (program,) = compile_steps(
                    self.task, self._tx, self.mesh, self._state, [spec], self._schedule.seed, self._schedule.log_every,
                    device_seconds, detach(self.config.optim.freeze),
                ).values()  # fmt: skip
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                needed = needed_of(str(error), self.state_bytes + _bytes(batch_shapes(spec, self.mesh)))
                needed = max(needed, math.nextafter(self.room, math.inf))
        memory = memory_of(program) if program else None
        took = time.monotonic() - begin
        step = Step(shape, parts, took, memory.needed if memory else needed, memory, program)
        self.steps.append(step)
        return step


def memory_of(program: Any) -> Memory:
    """Memory of a compiled program; the new state lies where the old one did."""
    found = program.memory_analysis()
    arguments, temporaries = float(found.argument_size_in_bytes), float(found.temp_size_in_bytes)
    peak = float(found.peak_memory_in_bytes)  # with the program itself, but of CPUs without temporaries
    allocated = arguments + temporaries + found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(arguments, temporaries, peak, max(peak, allocated))


def needed_of(refusal: str, arguments: float) -> float:
    """Bytes that a program with so many of `arguments` needs, by a compiler's words; infinite where it does not say."""
    if total := re.search(rf"[Uu]sed {_SIZE} of {_SIZE} hbm", refusal):
        return _size(total[1])
    temporaries = re.search(rf"temporaries \({_SIZE}\) exceeds", refusal)
    return arguments + _size(temporaries[1]) if temporaries else math.inf


_SIZE = r"([\d.]+[KMGT])"


def _size(text: str) -> float:
    return float(text[:-1]) * 1024.0 ** ("KMGT".index(text[-1]) + 1)


def _bytes(tree: Any) -> float:
    """Of what one device holds of a tree of placed shapes."""
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    )

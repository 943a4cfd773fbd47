"""Our side: the train step as training compiles it, its parts, and the encoder's forward pass."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speechjax import config as configs
from speechjax import sharding
from speechjax.clock import StepClock
from speechjax.optim import detach, make_optimizer
from speechjax.speed.turns import Contestant, Run
from speechjax.speed.work import Batch, spec_of
from speechjax.step import batch_shapes, compile_steps, init_state, ratio, stream_keys

PARTS = ("front end", "encoder", "loss", "backward", "optimizer")


class Training:
    """The train step of a config on one batch, again and again; parameters are drawn as training draws them.

    Once `open` has run: `compile_seconds` and `memory`, the bytes of one device that the compiler plans with; after a
    step `first`, the losses and metrics of the first.
    """

    def __init__(self, config: Any, batch: Batch):
        self.config, self.task = config, configs.make_task(config)
        self.mesh = sharding.make_mesh(**config.mesh)
        self.batch = sharding.global_batch(self.mesh, batch)
        self.tx, _ = make_optimizer(steps=config.train.steps, **config.optim)
        self.state: Any = None
        self.meters: Any = None
        self.first: dict[str, float] = {}
        self.compile_seconds, self.memory = math.nan, 0
        with jax.set_mesh(self.mesh):
            spec = batch_shapes(spec_of(batch), self.mesh)
            init = functools.partial(init_state, self.task, self.tx, config.train.seed, spec)
            self._abstract = sharding.placed(self.mesh, jax.eval_shape(init))
        self._place = jax.tree.map(lambda x: x.sharding, self._abstract)
        self._init = jax.jit(init, out_shardings=self._place)
        self.parameters = sum(x.size for x in jax.tree.leaves(self._abstract.params))

    def begin(self) -> Any:
        """Fresh state, as a run begins with."""
        with jax.set_mesh(self.mesh):
            state = self._init()
        params, extra = self.task.start(state.params, state.extra)
        return jax.device_put(state.replace(params=params, extra=extra), self._place)

    def parameters_at_first(self) -> Any:
        """On the host."""
        return jax.device_get(self.begin().params)

    def open(self) -> Run:
        began = time.perf_counter()
        with jax.set_mesh(self.mesh):
            self.program = self._compile([spec_of(self.batch)])[self.batch["audio"].shape]
        self.compile_seconds = time.perf_counter() - began
        self.memory = planned_memory(self.program)
        self.state = self.begin()
        return self.run

    def _compile(self, specs: list[Any]) -> dict[tuple[int, ...], Any]:
        config = self.config
        return compile_steps(
            self.task, self.tx, self.mesh, self._abstract, specs, config.train.seed, 1, config.train.device_seconds,
            detach(config.optim.freeze),
        )  # fmt: skip

    def run(self, steps: int) -> None:
        """So many updates, each on what the one before has left."""
        for _ in range(steps):
            self.state, self.meters = self.program(self.state, self.batch)
        jax.block_until_ready(self.meters)
        if not self.first:
            meters = {name: pair for name, pair in jax.device_get(self.meters).items() if np.ndim(pair)}
            self.first = {name: float(total / weight) for name, (total, weight) in meters.items() if weight}

    def prefixes(self) -> list[Contestant]:
        """Programs of ever more of a step: what each costs beyond the one before is a part of `PARTS`."""
        programs = {
            "front end": lambda params, extra, batch: self._apply(params, extra, batch, _extract),
            "encoder": lambda params, extra, batch: self._apply(params, extra, batch, _encode),
            "loss": lambda params, extra, batch: self._loss(params, extra, batch),
            "backward": lambda params, extra, batch: jax.value_and_grad(self._loss)(params, extra, batch),
        }
        found = [Contestant(name, functools.partial(self._open_prefix, f)) for name, f in programs.items()]
        return [*found, Contestant("optimizer", lambda: self.run)]

    def _open_prefix(self, f: Callable[..., Any]) -> Run:
        with jax.set_mesh(self.mesh):
            program = jax.jit(f).lower(self.state.params, self.state.extra, self.batch).compile()

        def run(steps: int) -> None:
            out = None
            for _ in range(steps):
                out = program(self.state.params, self.state.extra, self.batch)
            jax.block_until_ready(out)

        return run

    def _apply(self, params, extra, batch, method=None):
        rngs = stream_keys(self.task, self.config.train.seed, jnp.int32(0))
        step = {} if method else {"step": jnp.int32(0)}
        variables = {"params": detach(self.config.optim.freeze)(params), **extra}
        return self.task.apply(
            variables, batch, train=True, rngs=rngs, mutable=["sums"], method=method, **step
        )[0]  # fmt: skip

    def _loss(self, params, extra, batch):
        losses, _ = self._apply(params, extra, batch)
        return sum(ratio(pair) for pair in losses.values())

    def loop(self, data: Any, steps: int) -> dict[str, float]:
        """`steps` updates on batches of `data`, fetched ahead as training does: rates, and the share of time waited.

        The first three batches, which a thread fetches while nothing runs, do not count.
        """
        with jax.set_mesh(self.mesh):
            programs = self._compile(data.specs)
        clock, batches = StepClock(), sharding.on_device(self.mesh, data.train_batches(0, steps + 3))
        for number, (batch, samples) in enumerate(_waiting(clock, batches)):
            self.state, meters = programs[batch["audio"].shape](self.state, batch)
            jax.block_until_ready(meters)
            clock.step(samples / data.sample_rate)
            if number == 2:
                clock.read_and_reset()
        return clock.read_and_reset()


def _waiting(clock: StepClock, batches: Any) -> Any:
    while True:
        with clock.input_wait():
            ready = next(batches, None)
        if ready is None:
            return
        yield ready


def _extract(task: Any, batch: Any, train: bool) -> Any:
    return task.encoder.extract(batch)


def _encode(task: Any, batch: Any, train: bool) -> Any:
    return task.encoder(batch, train=train).frames


class Encoding:
    """The encoder's forward pass, without dropout, masks or loss, on one batch: frames [B, T, D] of the last layer."""

    def __init__(self, config: Any, batch: Batch):
        self.task = configs.make_task(config)
        self.mesh = sharding.make_mesh(**config.mesh)
        self.batch = sharding.global_batch(self.mesh, batch)

        def init():
            rngs = dict.fromkeys(("params", *self.task.rngs), jax.random.key(config.train.seed))
            empty = {name: jnp.zeros(array.shape, array.dtype) for name, array in batch.items()}
            return self.task.init(rngs, empty, step=jnp.int32(0), train=False)

        with jax.set_mesh(self.mesh):
            self.variables = jax.jit(init, out_shardings=sharding.replicated(self.mesh))()
        self.parameters = sum(x.size for x in jax.tree.leaves(self.variables["params"]))
        self.compile_seconds, self.memory = math.nan, 0

    def parameters_at_first(self) -> Any:
        """On the host."""
        return jax.device_get(self.variables["params"])

    def open(self) -> Run:
        def forward(variables, batch):
            return self.task.apply(variables, batch, train=False, method=_encode)

        began = time.perf_counter()
        with jax.set_mesh(self.mesh):
            self.program = jax.jit(forward).lower(self.variables, self.batch).compile()
        self.compile_seconds = time.perf_counter() - began
        self.memory = planned_memory(self.program)
        return self.run

    def run(self, steps: int) -> None:
        """So many passes."""
        out = None
        for _ in range(steps):
            out = self.program(self.variables, self.batch)
        jax.block_until_ready(out)

    def frames(self) -> np.ndarray:
        """float32 [B, T, D]."""
        return np.asarray(self.program(self.variables, self.batch), np.float32)


def planned_memory(program: Any) -> int:
    """Bytes of one device that a compiled program needs: arguments, results that are not in their place, the rest."""
    found = program.memory_analysis()
    if found is None:
        return 0
    return (
        found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    )


def used_memory() -> int | None:
    """The most bytes that were in use on one device so far; None where it does not say (CPUs)."""
    found = jax.local_devices()[0].memory_stats()
    return int(found["peak_bytes_in_use"]) if found and "peak_bytes_in_use" in found else None

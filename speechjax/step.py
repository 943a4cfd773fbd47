"""One update: a pure function of state and batch, compiled for every batch shape before step 0."""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from speechjax import sharding
from speechjax.models.batch_norm import follow_batches

SAMPLE_RATE = 16000  # of every batch

log = logging.getLogger("speechjax")


@flax.struct.dataclass
class State:
    """Everything a checkpoint holds.  `meters` are the (sum, weight) pairs of the running log window."""

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    meters: dict[str, jax.Array]
    skipped: jax.Array
    skipped_in_row: jax.Array


def ratio(pair: Any) -> Any:
    """sum / weight, 0 where nothing was weighed."""
    total, weight = pair
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def stream_keys(task: Any, seed: int, number: jax.Array) -> dict[str, jax.Array]:
    """One key a random stream of the task, a pure function of (seed, number)."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(task.rngs)}


def init_state(task: Any, tx: optax.GradientTransformation, seed: int, batch: dict[str, Any]) -> State:
    """Fresh state for batches like `batch` (arrays or shapes).  Jit it with output shardings."""
    key = jax.random.key(seed)
    rngs = {"params": key, **stream_keys(task, seed, jnp.int32(0))}
    empty = {k: jnp.zeros(v.shape, v.dtype) for k, v in batch.items()}
    # Dropout is off for the shapes' sake only: init draws parameters, nothing else.
    (losses, metrics), variables = task.init_with_output(rngs, empty, step=jnp.int32(0), train=False)
    params = variables.pop("params")
    variables.pop("sums", None)
    names = ["loss", "grad_norm", "unread", *losses, *metrics]
    zero = jnp.int32(0)
    return State(
        step=zero, params=params, opt_state=tx.init(params), extra=variables,
        meters={name: jnp.zeros(2) for name in names}, skipped=zero, skipped_in_row=zero,
    )  # fmt: skip


def train_step(
    task: Any, tx: optax.GradientTransformation, seed: int, log_every: int, state: State, batch: dict[str, jax.Array],
    parts: int = 1, detach: Callable[[Any], Any] = lambda params: params,
) -> tuple[State, dict[str, jax.Array]]:  # fmt: skip
    """One update.  Non-finite steps change nothing but the counters.  Also returns the window's meters.

    The batch goes through in `parts` micro-batches of equally many rows.  `detach` takes the gradient from parameters
    that never train (speechjax.optim.detach).
    """
    grads, loss, pairs, sums = _gradients(task, stream_keys(task, seed, state.step), parts, state, batch, detach)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers; the rest here is strict
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    extra = follow_batches(task.after_step(params, state.extra, sums, state.step), sums)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731

    one = jnp.ones(())
    unread = jnp.sum(batch["unread"]).astype(jnp.float32)  # over all hosts, an average a step
    pairs = {"loss": (loss, one), "grad_norm": (grad_norm, one), "unread": (unread, one), **pairs}
    first = state.step % log_every == 0  # of a log window: the meters start anew
    meters = {}
    for name, (total, weight) in pairs.items():
        pair = jnp.where(finite, jnp.stack([total, weight]), 0.0)
        meters[name] = jnp.where(first, 0.0, state.meters[name]) + pair
    skip = jnp.where(finite, 0, 1)
    state = State(
        step=state.step + 1, params=keep(params, state.params), opt_state=keep(opt_state, state.opt_state),
        extra=keep(extra, state.extra), meters=meters, skipped=state.skipped + skip,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
    )  # fmt: skip
    # Copies, because the state itself is donated to the next step.
    return state, {**meters, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}


def _gradients(
    task: Any, rngs: Any, parts: int, state: State, batch: dict[str, jax.Array], detach: Callable[[Any], Any]
) -> tuple[Any, ...]:
    """(gradients, loss, {name: (sum, weight)} of losses and metrics, what the task has sown), in `parts` passes.

    Every loss is divided by its weight in the whole batch, so the parts' gradients add up to the batch's.  The weights
    come from a pass of their own, of which the compiler keeps only what they are made of: masks and lengths.
    """

    def forward(params, number, rows):
        keys = rngs if parts == 1 else {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
        variables = {"params": detach(params), **state.extra}
        out, sown = task.apply(variables, rows, step=state.step, train=True, rngs=keys, mutable=["sums"])
        losses, metrics = out
        return losses, metrics, sown.get("sums", {})

    def loss_fn(params, number, rows, weights):
        losses, metrics, sums = forward(params, number, rows)
        over = {name: total for name, (_, total) in losses.items()} if weights is None else weights
        loss = sum(ratio((total, over[name])) for name, (total, _) in losses.items())
        return loss, ({**losses, **metrics}, sums)

    def one(part, weights):
        (loss, (pairs, sums)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *part, weights)
        return grads, loss, pairs, sums

    if parts == 1:
        return one((jnp.int32(0), batch), None)

    # Every part takes every parts-th row, so that rows need not move between the devices.
    split = {k: jnp.moveaxis(v.reshape(-1, parts, *v.shape[1:]), 1, 0) for k, v in batch.items()}
    each = (jnp.arange(parts, dtype=jnp.int32), split)

    def weigh(part):
        losses, _, _ = forward(state.params, *part)
        return {name: weight for name, (_, weight) in losses.items()}

    weights = jax.tree.map(lambda w: jnp.sum(w, axis=0), lax.map(weigh, each))
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], each), weights)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = lax.scan(lambda sum_, part: (jax.tree.map(jnp.add, sum_, one(part, weights)), None), zeros, each)
    return total


def micro_batches(spec: Mapping[str, tuple], devices: int, seconds: float) -> int:
    """Parts into which a batch of `spec` is cut so that a device holds at most `seconds` of audio; 0: no limit.

    As few as divide the rows of a device; a part has at least one row a device.
    """
    rows, samples = spec["audio"][0]
    own = rows // devices
    fits = (n for n in range(1, own + 1) if own % n == 0 and own // n * samples <= seconds * SAMPLE_RATE)
    return next(fits, own) if seconds else 1


def batch_shapes(spec: Mapping[str, tuple], mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract global batch of {name: (shape, dtype)}."""
    place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in spec.items()}


def compile_steps(
    task: Any, tx: Any, mesh: Any, state: Any, specs: Sequence[Mapping[str, tuple]], seed: int, log_every: int,
    device_seconds: float = 0.0, detach: Callable[[Any], Any] = lambda params: params,
) -> dict[tuple[int, ...], Any]:  # fmt: skip
    """The train step compiled for batches of every spec, before step 0: {shape of the audio: program}.

    `device_seconds`: see `micro_batches`; `detach`: see `train_step`.
    """
    programs = {}
    for spec in specs:
        start = time.monotonic()
        rows, samples = spec["audio"][0]
        parts = micro_batches(spec, sharding.row_parts(mesh), device_seconds)
        step = jax.jit(
            functools.partial(train_step, task, tx, seed, log_every, parts=parts, detach=detach),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
        )
        program = step.lower(state, batch_shapes(spec, mesh)).compile()
        memory = program.memory_analysis()
        log.info(
            "compiled the step for %d x %d samples%s in %.1f s, %.2f GiB of temporaries a device",
            rows, samples, f" in {parts} micro-batches" * (parts > 1), time.monotonic() - start,
            (memory.temp_size_in_bytes if memory else math.nan) / 2**30,
        )  # fmt: skip
        programs[rows, samples] = program
    return programs

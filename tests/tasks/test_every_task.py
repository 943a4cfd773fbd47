"""What holds for every task alike: devices, padding, state, gradients, pictures; a new config is tested too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from speechjax import sharding
from speechjax.step import init_state, stream_keys, train_step
from tests.choice import some
from tests.tasks.experiments import EXPERIMENTS, HEADS, experiment, make_batch

# These mask the spectrogram, cut masked frames out, or mask nothing: they have no use for the encoder's mask token.
OWN_MASKS = ("apc", "autoencode", "best_rq", "data2vec-2", "distill", "mae")


def untouched(name: str) -> tuple[str, ...]:
    """What the paths of parameters begin with that an objective has no use for."""
    if name.startswith(OWN_MASKS):
        return ("encoder/mask_embedding",)
    if name == "spidr":  # reads the top layer's MLP before its residual sum and norm, as the teacher's
        return ("encoder/transformer/layer1/mlp_norm",)
    return ()


@functools.cache
def begun(name: str) -> tuple[Any, Any, Any]:
    """(task, optimizer, state of step 0)."""
    _, task = experiment(name)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9))
    state = jax.jit(functools.partial(init_state, task, tx, 0))(make_batch(task))
    params, extra = task.start(state.params, state.extra)
    return task, tx, state.replace(params=params, extra=extra)


@functools.cache
def program(name: str, devices: int) -> tuple[Any, Any]:
    """(mesh, the jitted step)."""
    task, tx, _ = begun(name)
    mesh = sharding.make_mesh(data=-1, fsdp=1, devices=jax.devices()[:devices])
    return mesh, jax.jit(functools.partial(train_step, task, tx, 0, 10))


@functools.cache
def stepped(name: str, devices: int) -> Any:
    """State and meters after two updates."""
    task, _, state = begun(name)
    mesh, step = program(name, devices)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, sharding.replicated(mesh))
        meters = None
        for number in range(2):
            state, meters = step(state, sharding.global_batch(mesh, make_batch(task, seed=number)))
        return jax.device_get((state, meters))


def losses_of(name: str, batch: dict[str, np.ndarray], train: bool = False) -> Any:
    _, _, state = begun(name)
    return _losses(name, train)(state.params, state.extra, batch)


@functools.cache
def _losses(name: str, train: bool) -> Any:
    _, task = experiment(name)

    def run(params, extra, batch):
        rngs = stream_keys(task, 0, jnp.int32(3))
        return task.apply({"params": params, **extra}, batch, step=jnp.int32(3), train=train, rngs=rngs)

    return jax.jit(run)


NAMES = [*sorted(EXPERIMENTS), *sorted(HEADS)]
each = pytest.mark.parametrize("name", some(NAMES, EXPERIMENTS))
few = pytest.mark.parametrize("name", some(NAMES, ("wav2vec2", "best_rq", "apc")))  # what compiles whole steps


@few
def test_one_device_is_four_devices(name):
    one, four = stepped(name, 1), stepped(name, 4)
    assert int(one[0].step) == 2
    assert int(one[0].skipped) == 0
    for meter in one[1]:
        # Sums in another order; what counts argmax hits may change by a frame where two candidates tie.
        np.testing.assert_allclose(four[1][meter], one[1][meter], rtol=2e-3, atol=2e-3, err_msg=meter)
    for tree in ("params", "extra"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-4),
            getattr(four[0], tree),
            getattr(one[0], tree),
        )


@few
def test_a_step_that_is_not_finite_leaves_teachers_and_codebooks_alone(name):
    task, _, state = begun(name)
    mesh, step = program(name, 1)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params)
    with jax.set_mesh(mesh):
        given = jax.device_put(state.replace(params=broken), sharding.replicated(mesh))
        after, _ = step(given, sharding.global_batch(mesh, make_batch(task)))
    assert int(after.skipped) == 1
    for tree in ("extra", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, tree), getattr(state, tree))


@few
def test_micro_batches_fit_every_task(name):
    """Traced only: what is in the batch can be cut into parts, and what is sown and weighed added up."""
    task, tx, state = begun(name)
    whole, cut = (
        jax.eval_shape(functools.partial(train_step, task, tx, 0, 10, parts=parts), state, make_batch(task))
        for parts in (1, 2)
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cut) == jax.tree.map(lambda x: (x.shape, x.dtype), whole)


@each
def test_every_parameter_gets_a_gradient(name):
    after = stepped(name, 1)[0]
    momentum = flatten_dict(optax.tree.get(after.opt_state, "trace"), sep="/")
    assert momentum.keys() == flatten_dict(after.params, sep="/").keys()
    without = {k for k, v in momentum.items() if not np.any(v)}
    assert without == {k for k in momentum if k.startswith(untouched(name))}
    assert all(np.all(np.isfinite(v)) for v in momentum.values())


@each
def test_noise_in_the_padding_changes_nothing(name):
    task, _, _ = begun(name)
    quiet = losses_of(name, make_batch(task))
    noisy = losses_of(name, make_batch(task, padding=1))
    other = losses_of(name, make_batch(task, seed=5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), noisy, quiet)
    total = lambda out: sum(float(s) for s, _ in out[0].values())  # noqa: E731
    assert abs(total(other) - total(quiet)) > 1e-4  # negative control


@each
def test_an_empty_batch_costs_nothing(name):
    """All rows empty, as when a disk fails: finite losses, no weight that counts frames."""
    task, _, _ = begun(name)
    batch = make_batch(task)
    batch["lengths"] = np.zeros_like(batch["lengths"])
    for key in ("units", "label"):
        if key in batch:
            batch[key] = np.full_like(batch[key], -1)
    if "tokens" in batch:
        batch["token_lengths"] = np.zeros_like(batch["token_lengths"])
    losses, _ = losses_of(name, batch)
    for loss, (total, weight) in losses.items():
        assert np.isfinite(total), loss
        assert float(weight) == 0 or abs(float(total)) < 1e-3, loss


@each
def test_state_beyond_parameters_gets_no_gradient(name):
    """Teachers, targets, codebooks and frozen arrays: what is not a parameter is no way for the loss."""
    task, _, state = begun(name)
    floats = {k: v for k, v in flatten_dict(state.extra).items() if jnp.issubdtype(v.dtype, jnp.floating)}
    if not floats:
        pytest.skip("no state beyond parameters")

    def loss(floats, batch):
        from flax.traverse_util import unflatten_dict

        extra = unflatten_dict({**flatten_dict(state.extra), **floats})
        rngs = stream_keys(task, 0, jnp.int32(0))
        losses, _ = task.apply({"params": state.params, **extra}, batch, step=jnp.int32(0), train=True, rngs=rngs)
        return sum(total for total, _ in losses.values())

    grads = jax.jit(jax.grad(loss))(floats, make_batch(task))
    for path, grad in grads.items():
        np.testing.assert_array_equal(grad, 0, err_msg="/".join(path))


@each
def test_metrics_have_their_chance_level_and_suit_the_alarms(name):
    task, _, _ = begun(name)
    losses, metrics = jax.device_get(losses_of(name, make_batch(task)))
    values = {k: float(s / w) if w else float("nan") for k, (s, w) in {**losses, **metrics}.items()}
    assert any(k.startswith("chance_") for k in metrics)
    assert not losses.keys() & metrics.keys()
    task.health({**values, "loss": sum(values[k] for k in losses), "grad_norm": 1.0}, 5000)


@each
def test_pictures_and_features_fit_the_frames(name):
    task, _, state = begun(name)
    batch = make_batch(task)

    def look(params, extra):
        variables = {"params": params, **extra}
        rngs = stream_keys(task, 0, jnp.int32(0))
        shown = task.apply(variables, batch, step=jnp.int32(0), rngs=rngs, method="predict")
        return shown, task.apply(variables, batch, method="features")

    shown, encoded = jax.jit(look)(state.params, state.extra)
    assert {"lengths"} < shown.keys()
    assert {"true", "predicted"} <= shown.keys() or {"target", "output"} <= shown.keys()
    frames = int(shown["lengths"][0])
    for key in ("true", "predicted", "target", "output", "mask"):
        assert key not in shown or shown[key].shape[1] >= frames, key
    assert len(encoded.hidden) >= 1
    assert all(h.shape[:2] == encoded.frames.shape[:2] for h in encoded.hidden)

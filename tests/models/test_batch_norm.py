"""Batch norm over valid places, and its running statistics, against plain NumPy."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.models.batch_norm import DECAY, EPSILON, BatchNorm, follow_batches
from speechjax.models.layers import frame_mask

B, T, F, C = 4, 6, 3, 5
LENGTHS = np.array([6, 2, 0, 5], np.int32)
VALID = np.arange(T) < LENGTHS[:, None]
PARAMS = dict(scale=np.linspace(0.5, 2, C, dtype=np.float32), bias=np.linspace(-1, 1, C, dtype=np.float32))
RUNNING = dict(mean=np.full(C, 0.3, np.float32), variance=np.full(C, 4.0, np.float32))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return (3 + 2 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@jax.jit
def trained(x, running):
    """Normalised x [B, T, ..., C], and the state after this batch alone."""
    variables = {"params": PARAMS, "batch_stats": running}
    y, sown = BatchNorm().apply(variables, x, frame_mask(jnp.asarray(LENGTHS), T), True, mutable=["sums"])
    return y, follow_batches({"batch_stats": running}, sown["sums"])["batch_stats"]


@jax.jit
def evaluated(x, running):
    return BatchNorm().apply({"params": PARAMS, "batch_stats": running}, x, jnp.asarray(VALID[: len(x)]), False)


@pytest.mark.parametrize("shape", [(B, T, C), (B, T, F, C)], ids=["frames", "frames and frequencies"])
def test_training_normalises_by_the_valid_places_of_the_batch(shape):
    x = noise(*shape)
    y, after = trained(x, RUNNING)
    seen = x[VALID].reshape(-1, C).astype(np.float64)
    mean, variance = seen.mean(axis=0), seen.var(axis=0)
    expected = (x - mean) / np.sqrt(variance + EPSILON) * PARAMS["scale"] + PARAMS["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)  # float32
    np.testing.assert_allclose(after["mean"], DECAY * 0.3 + (1 - DECAY) * mean, atol=1e-6)
    np.testing.assert_allclose(after["variance"], DECAY * 4 + (1 - DECAY) * variance, atol=1e-5)
    assert np.abs(x.reshape(-1, C).mean(axis=0) - mean).max() > 0.05, "negative control: padding would count"


def test_padding_counts_for_nothing():
    x = noise(B, T, C)
    other = np.where(VALID[..., None], x, 1e6).astype(np.float32)
    (y, after), (z, other_after) = trained(x, RUNNING), trained(other, RUNNING)
    np.testing.assert_array_equal(np.asarray(y)[VALID], np.asarray(z)[VALID])
    jax.tree.map(np.testing.assert_array_equal, after, other_after)


def test_evaluation_normalises_by_the_running_statistics():
    x = noise(B, T, C)
    expected = (x - 0.3) / np.sqrt(4 + EPSILON) * PARAMS["scale"] + PARAMS["bias"]
    np.testing.assert_allclose(evaluated(x, RUNNING), expected, atol=1e-5)
    np.testing.assert_allclose(evaluated(x[:1], RUNNING), expected[:1], atol=1e-5)  # whoever else is in the batch
    assert np.abs(trained(x, RUNNING)[0] - expected).max() > 0.1, "negative control"


def test_running_statistics_converge_to_those_of_the_data():
    """From far away, where sums of squares about 0 would lose the variance: mean 1000, standard deviation 0.1."""
    state: Any = dict(mean=jnp.zeros(C), variance=jnp.ones(C))
    x = (1000 + 0.1 * np.random.default_rng(0).normal(size=(B, T, C))).astype(np.float32)
    for _ in range(250):
        _, state = trained(x, state)
    seen = x[VALID].astype(np.float64)
    # A tenth of what is missing is added, rounded to 6e-5.
    np.testing.assert_allclose(state["mean"], seen.mean(axis=0), atol=4e-4)
    np.testing.assert_allclose(state["variance"], seen.var(axis=0), rtol=0.02)


def test_micro_batches_add_up_to_the_statistics_of_the_batch():
    x = noise(B, T, C)

    @jax.jit
    def sums(x, valid):
        variables = {"params": PARAMS, "batch_stats": RUNNING}
        return BatchNorm().apply(variables, x, valid, True, mutable=["sums"])[1]["sums"]

    parts = [sums(x[rows], VALID[rows]) for rows in (slice(0, 3), slice(3, 4))]
    extra: Any = {"batch_stats": RUNNING, "teacher": {"w": 1.0}}
    after = follow_batches(extra, jax.tree.map(jnp.add, *parts))
    whole = follow_batches(extra, sums(x, VALID))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, whole)
    assert after["teacher"] == {"w": 1.0}
    one = follow_batches(extra, parts[0])
    assert np.abs(one["batch_stats"]["mean"] - whole["batch_stats"]["mean"]).max() > 1e-3, "negative control"


def test_without_frames_or_sums_the_state_stays():
    extra: Any = {"batch_stats": {"a": {"norm": RUNNING}}}
    for sums in ({}, {"a": {"norm": {"moments": jnp.zeros((3, C))}}}, {"labels": jnp.ones(2)}):
        jax.tree.map(np.testing.assert_array_equal, follow_batches(extra, sums), extra)
    assert follow_batches({}, {"labels": jnp.ones(2)}) == {}


def test_stacked_layers_have_statistics_each():
    """Of a scan over two layers, what they would have one by one."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.sin(BatchNorm(name="norm")(x, jnp.asarray(VALID), True)), None

    axes: Any = {"params": 0, "batch_stats": 0, "sums": 0}
    stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)
    x = noise(B, T, C)
    variables: Any = jax.jit(lambda: stack(name=None).init(jax.random.key(0), x, None))()
    variables.pop("sums")
    (y, _), sown = jax.jit(lambda v: stack().apply(v, x, None, mutable=["sums"]))(variables)
    after = follow_batches({"batch_stats": variables["batch_stats"]}, sown["sums"])["batch_stats"]["norm"]
    z = x
    for i in range(2):
        seen = np.asarray(z)[VALID]
        np.testing.assert_allclose(after["mean"][i], (1 - DECAY) * seen.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(after["variance"][i], DECAY + (1 - DECAY) * seen.var(axis=0), atol=1e-6)
        normal = (z - seen.mean(axis=0)) / np.sqrt(seen.var(axis=0) + EPSILON)
        z = np.sin(normal)
    np.testing.assert_allclose(y, z, atol=1e-5)  # float32


def test_statistics_are_those_of_all_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = noise(B, T, C)
    y, after = trained(jax.device_put(x, place), RUNNING)
    z, expected = trained(x, RUNNING)
    np.testing.assert_allclose(y, z, atol=1e-5)  # sums in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, expected)

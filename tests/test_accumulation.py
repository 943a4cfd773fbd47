"""Micro-batches against the whole batch: gradients, losses, metrics, sown sums."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from speechjax import sharding
from speechjax.step import init_state, micro_batches, stream_keys, train_step
from speechjax.tasks._base import sow_sum


class Regression(nn.Module):
    """Two losses of unequal weights over rows of unequal lengths, and a running mean beside the parameters."""

    rngs = ("dropout",)

    @nn.compact
    def __call__(self, batch, *, step, train):
        x = batch["audio"].astype(jnp.float32) / 1000
        valid = jnp.arange(x.shape[1])[None] < batch["lengths"][:, None]
        y = nn.Dense(x.shape[1], name="dense")(x)
        self.variable("running", "total", lambda: jnp.zeros(()))
        sow_sum(self, "valid", jnp.sum(valid).astype(jnp.float32))
        n, rows = jnp.sum(valid).astype(jnp.float32), jnp.sum(batch["lengths"] > 4).astype(jnp.float32)
        error = jnp.sum(jnp.where(valid, jnp.square(y - x[:, ::-1]), 0))
        long = jnp.sum(jnp.where(batch["lengths"] > 4, jnp.square(y[:, 0]), 0))
        losses = {"error": (error, n), "long": (0.3 * long, rows)}
        return losses, {"size": (jnp.sum(jnp.abs(y)), n)}

    def after_step(self, params, extra, sums, step):
        return {"running": {"total": extra["running"]["total"] + sums["valid"]}}


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return dict(
        audio=rng.integers(-900, 900, (8, 6)).astype(np.int16),
        lengths=np.array([6, 1, 2, 6, 0, 5, 3, 6], np.int32),
        unread=np.zeros(8, np.int32),
    )


def step(parts: int, place=lambda b: b, task: Any = None) -> Any:
    batch = make_batch()
    task = task or Regression()
    tx = optax.sgd(0.1)
    state = init_state(task, tx, 0, batch)
    return jax.jit(functools.partial(train_step, task, tx, 0, 10, parts=parts))(state, place(batch))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_are_the_whole(parts):
    whole, cut = step(1), step(parts)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)  # sums in another order
    jax.tree.map(close, cut[0].params, whole[0].params)
    jax.tree.map(close, cut[1], whole[1])
    assert float(cut[0].extra["running"]["total"]) == 29 == float(whole[0].extra["running"]["total"])


def test_every_part_has_its_own_randomness_and_state_moves_once():
    """A task that masks at random and keeps a moving average, against a loop over the parts."""

    class Masked(Regression):
        def __call__(self, batch, *, step, train):
            drawn = jax.random.bernoulli(self.make_rng("dropout"), 0.5, batch["lengths"].shape)
            return super().__call__({**batch, "lengths": jnp.where(drawn, batch["lengths"], 0)}, step=step, train=train)

        def after_step(self, params, extra, sums, step):
            return {"running": {"total": 0.5 * extra["running"]["total"] + sums["valid"]}}

    task, batch, parts = Masked(), make_batch(), 4
    begun = init_state(task, optax.sgd(0.1), 0, batch)
    after, meters = step(parts, task=task)
    key = stream_keys(task, 0, jnp.int32(0))["dropout"]
    valid, pairs = [], []
    for part in range(parts):
        rows = {k: v[part::parts] for k, v in batch.items()}
        (losses, _), sown = task.apply(
            {"params": begun.params, **begun.extra}, rows, step=begun.step, train=True,
            rngs={"dropout": jax.random.fold_in(key, part)}, mutable=["sums"],
        )  # fmt: skip
        valid.append(float(sown["sums"]["valid"]))
        pairs.append(losses)
    assert len(set(valid)) > 1, "parts differ"
    assert float(after.extra["running"]["total"]) == sum(valid)  # 0.5 * 0 + all of them, once
    assert int(after.step) == 1
    for name in ("error", "long"):
        total = [sum(float(losses[name][i]) for losses in pairs) for i in (0, 1)]
        np.testing.assert_allclose(meters[name], total, rtol=1e-6)
    expected = sum(sum(float(p[n][0]) for p in pairs) / sum(float(p[n][1]) for p in pairs) for n in ("error", "long"))
    assert float(meters["loss"][0]) == pytest.approx(expected, rel=1e-6)


def test_parts_on_four_devices_are_the_whole():
    mesh = sharding.make_mesh(data=4, fsdp=1)
    with jax.set_mesh(mesh):
        cut = step(2, place=functools.partial(sharding.global_batch, mesh))
    whole = step(1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), cut[0].params, whole[0].params)


def test_a_mean_of_means_would_differ():
    """Negative control: each part's losses divided by its own weights give another update."""

    class MeanOfMeans(Regression):
        def __call__(self, batch, *, step, train):
            losses, metrics = super().__call__(batch, step=step, train=train)
            losses = {k: (s / jnp.maximum(w, 1), jnp.ones(())) for k, (s, w) in losses.items()}
            return losses, metrics

    whole, cut = step(1), step(4, task=MeanOfMeans())
    kernel = lambda s: np.asarray(s[0].params["dense"]["kernel"])  # noqa: E731
    assert np.abs(kernel(whole) - kernel(cut)).max() > 1e-3


@pytest.mark.parametrize(
    ("rows", "seconds", "devices", "limit", "parts"),
    [
        (64, 10, 4, 0.0, 1),  # no limit
        (64, 10, 4, 160.0, 1),  # 16 rows a device just fit
        (64, 10, 4, 159.0, 2),
        (64, 10, 4, 40.0, 4),
        (64, 10, 4, 35.0, 8),  # 3 rows would fit, but 16 do not divide by them
        (64, 10, 4, 1.0, 16),  # not even one row fits: one row a part
        (12, 10, 4, 20.0, 3),  # 3 rows a device, of which 2 fit
    ],
)
def test_number_of_micro_batches(rows, seconds, devices, limit, parts):
    spec = {"audio": ((rows, seconds * 16000), np.int16)}
    assert micro_batches(spec, devices, limit) == parts

"""Batches, parameters and a compiled step for the tiny wav2vec 2.0 of the tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.drawing import draw_params

SAMPLES, FRAMES = 500, 24
LENGTHS = np.array([500, 361, 0], np.int32)  # 24, 17 and no frames
STREAMS = ("mask", "gumbel", "dropout", "layerdrop")


def random_params(task) -> dict[str, Any]:
    """Parameters drawn around zero, scales around one; no compilation."""
    rngs = {name: jax.random.key(0) for name in ("params", *STREAMS)}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=True))["params"]
    return draw_params(shapes)


def make_batch(audio_seed: int = 0, lengths: np.ndarray = LENGTHS) -> dict[str, np.ndarray]:
    """int16 noise, in the padding too."""
    audio = np.random.default_rng(audio_seed).integers(-9000, 9000, (len(lengths), SAMPLES)).astype(np.int16)
    return dict(audio=audio, lengths=lengths)


def make_run(task):
    """Jitted `run(params, batch, seed, step)` -> (losses, metrics), gradient of the sum of the mean losses."""

    def total(params, batch, seed, step):
        rngs = {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(STREAMS)}
        losses, metrics = task.apply({"params": params}, batch, step=step, train=True, rngs=rngs)
        return sum(value / jnp.maximum(weight, 1) for value, weight in losses.values()), (losses, metrics)

    run = jax.jit(jax.value_and_grad(total, has_aux=True))

    def call(params, batch, seed=0, step=0):
        (_, aux), gradient = run(params, batch, jnp.int32(seed), jnp.int32(step))
        return *jax.tree.map(np.asarray, aux), jax.tree.map(np.asarray, gradient)

    return call


def assert_temperature_shapes_gradients(run, params) -> None:
    """Codes are hard, so the losses of both ends of the schedule are the same; the soft choice's gradient is not."""
    (hot, shown, first), (cold, end, last) = (run(params, make_batch(), step=step) for step in (0, 10**6))
    assert (shown["gumbel_temperature"][0], end["gumbel_temperature"][0]) == (2, 0.5)
    for name, (value, weight) in hot.items():
        assert cold[name] == (pytest.approx(value, rel=1e-6), weight), name
    first, last = (gradient["quantizer"]["logits"]["kernel"] for gradient in (first, last))
    assert np.linalg.norm(last - first) > 0.05 * np.linalg.norm(first)

"""Heads apart from the encoder: what they hear is given with the batch, so that little is compiled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny_hubert import BASE, FRAMES, SAMPLES, streams

from speechjax.models.encoder import Encoded, SpeechEncoder
from tests.drawing import draw_params

COUNTS = np.array([FRAMES, 17, 0], np.int32)  # frames of the rows; the last could not be read
HEAD: dict[str, Any] = dict(
    layers="last", mask_prob=0.0, mask_span=3, channel_mask_prob=0.0, channel_mask_span=4, head_dropout=0.0
)
POOLED: dict[str, Any] = HEAD | dict(label="label", projection=6, pooling="mean", pooling_hidden=4)


@functools.cache
def _deaf(kind: type) -> Any:
    class Heard(kind):
        def encode(self, batch, train):
            return Encoded(batch["frames"][0], batch["counts"], list(batch["frames"]))

    return Heard


def make_task(kind: type, **fields: Any) -> Any:
    """A task whose encoder's output is `frames` [L, B, T, D] of the batch."""
    return _deaf(kind)(encoder=SpeechEncoder(**BASE), **fields)


def make_batch(seed: int = 0, padding: float = 0.0, counts: np.ndarray = COUNTS, **more: Any) -> dict[str, np.ndarray]:
    """Frames of noise, `padding` beyond each row's."""
    rows = len(counts)
    frames = np.random.default_rng(seed).normal(size=(2, rows, FRAMES, BASE["width"])).astype(np.float32)
    inside = np.arange(FRAMES)[None] < counts[:, None]
    frames = np.where(inside[None, :, :, None], frames, np.float32(padding))
    return dict(audio=np.zeros((rows, SAMPLES), np.int16), frames=frames, counts=counts, **more)


def make_variables(task: Any, batch: Any) -> dict[str, Any]:
    """Parameters drawn around zero, other state zero; nothing is compiled."""
    rngs = {"params": jax.random.key(0), **streams(task)}
    shapes = dict(jax.eval_shape(lambda: task.init(rngs, batch, step=jnp.int32(0), train=False)))
    params = draw_params(shapes.pop("params"))
    shapes.pop("sums", None)
    return {"params": params, **jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)}


_PROGRAMS: dict[Any, Any] = {}  # with their task, so that no other takes its id


def run(task: Any, variables: Any, batch: Any) -> Any:
    """(losses, metrics, sums, answer, gradient of the sum of the mean losses), as numpy."""

    def total(params, extra, batch):
        given = {"params": params, **extra}
        (losses, metrics), sown = task.apply(given, batch, step=jnp.int32(0), train=False, mutable=["sums"])
        answer = task.apply(given, batch, method="answer")
        mean = sum(value / jnp.maximum(weight, 1e-6) for value, weight in losses.values())
        return mean, (losses, metrics, sown.get("sums", {}), answer)

    if id(task) not in _PROGRAMS:
        _PROGRAMS[id(task)] = jax.jit(jax.value_and_grad(total, has_aux=True)), task
    extra = {k: v for k, v in variables.items() if k != "params"}
    (_, aux), gradient = _PROGRAMS[id(task)][0](variables["params"], extra, batch)
    return *jax.tree.map(np.asarray, aux), jax.tree.map(np.asarray, gradient)


def look(task: Any, variables: Any, batch: Any) -> dict[str, np.ndarray]:
    """What a picture shows."""
    shown = jax.jit(functools.partial(task.apply, method="predict", step=jnp.int32(0)))(variables, batch)
    return jax.tree.map(np.asarray, shown)

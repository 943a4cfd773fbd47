"""Tasks, batches, parameters and a compiled step for the tiny HuBERT and WavLM of the tests: 20 samples a frame."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.models.encoder import SpeechEncoder
from speechjax.tasks.hubert import Hubert
from tests.drawing import draw_params

HOP, FIELD, SAMPLES, FRAMES = 20, 30, 500, 24
LENGTHS = np.array([500, 361, 0], np.int32)  # 24, 17 and no frames
CODES = 7

BASE: dict[str, Any] = dict(
    frontend=dict(name="waveform", channels=(16, 16, 16), kernels=(10, 3, 2), strides=(5, 2, 2), norm="group"),
    width=32, layers=1, heads=4, mlp=48, norm="post", positions=dict(kernel=6, groups=4), dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, scan=False, remat=False,
    dtype="float32",
)  # fmt: skip
# The kind that takes packed rows, and whose features know only their own samples: no norm over time.
LARGE: dict[str, Any] = BASE | dict(
    frontend=BASE["frontend"] | dict(norm="layer", bias=True, normalize=True), norm="pre", layers=2
)
SETTINGS: dict[str, Any] = dict(
    codes=CODES, unit_hop=10, projection=12, logit_temperature=0.1, mask_prob=0.65, mask_span=4, masked_weight=1.0,
    unmasked_weight=0.0, feature_penalty=10.0, feature_grad_scale=1.0,
)  # fmt: skip


def make_task(task_class: type = Hubert, encoder: dict[str, Any] = BASE, **settings: Any) -> Any:
    return task_class(encoder=SpeechEncoder(**encoder), **(SETTINGS | settings))


def make_batch(seed: int = 0, lengths: np.ndarray = LENGTHS, unit_hop: int = 10) -> dict[str, np.ndarray]:
    """int16 noise, in the padding too; of every ten units one is missing."""
    rng = np.random.default_rng(seed)
    audio = rng.integers(-9000, 9000, (len(lengths), SAMPLES)).astype(np.int16)
    units = rng.integers(0, CODES, (len(lengths), SAMPLES // unit_hop)).astype(np.int32)
    units = np.where(rng.random(units.shape) < 0.1, -1, units)
    row = np.ones(len(lengths), np.float32)
    return dict(audio=audio, lengths=lengths, units=units, mean=0.01 * row, std=0.2 * row)


def streams(task: Any, seed: Any = 0) -> dict[str, jax.Array]:
    return {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(task.rngs)}


def random_params(task: Any, batch: Any = None) -> dict[str, Any]:
    """Parameters drawn around zero, scales around one; no compilation."""
    batch = make_batch(unit_hop=task.unit_hop) if batch is None else batch
    rngs = {"params": jax.random.key(0), **streams(task)}
    shapes = jax.eval_shape(lambda: task.init(rngs, batch, step=jnp.int32(0), train=False))["params"]
    return draw_params(shapes)


def make_run(task: Any, train: bool = True) -> Any:
    """Jitted `run(params, batch, seed)` -> (losses, metrics), gradient of the sum of the mean losses."""

    def total(params, batch, seed):
        losses, metrics = task.apply(
            {"params": params}, batch, step=jnp.int32(0), train=train, rngs=streams(task, seed)
        )  # fmt: skip
        return sum(value / jnp.maximum(weight, 1) for value, weight in losses.values()), (losses, metrics)

    run = jax.jit(jax.value_and_grad(total, has_aux=True))

    def call(params, batch, seed=0):
        (_, aux), gradient = run(params, batch, jnp.int32(seed))
        return *jax.tree.map(np.asarray, aux), jax.tree.map(np.asarray, gradient)

    return call


def means(*sums: dict[str, Any]) -> dict[str, float]:
    """What the loop logs, and hands to `health`."""
    return {name: float(s / w) if w else float("nan") for part in sums for name, (s, w) in part.items()}


def equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)

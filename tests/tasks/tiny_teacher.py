"""Tiny encoders, batches and calls for the tasks with a teacher: 20 samples a frame."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.models.encoder import SpeechEncoder

ENCODER: dict[str, Any] = dict(
    frontend=dict(
        name="waveform", channels=(16, 16, 16), kernels=(10, 3, 2), strides=(5, 2, 2), norm="layer", bias=False,
        normalize=True,
    ),
    width=32, layers=3, heads=4, mlp=48, norm="post", positions=dict(kernel=3, groups=4, depth=2), dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, scan=False, remat=False,
    dtype="float32",
)  # fmt: skip
SAMPLES, LENGTHS = 500, np.array([500, 361, 0, 280], np.int32)  # 24, 17, 0 and 13 frames
FRAMES = np.array([24, 17, 0, 13])


def encoder(**changes: Any) -> SpeechEncoder:
    return SpeechEncoder(**(ENCODER | changes))


def make_batch(seed: int = 0, lengths: np.ndarray = LENGTHS) -> dict[str, np.ndarray]:
    """int16 noise, in the padding too."""
    audio = np.random.default_rng(seed).integers(-9000, 9000, (len(lengths), SAMPLES)).astype(np.int16)
    rows = np.ones(len(lengths), np.float32)
    return dict(audio=audio, lengths=lengths, mean=0 * rows, std=0.2 * rows, unread=np.zeros(len(lengths), np.int32))


def keys(task: Any, seed: int = 0) -> dict[str, jax.Array]:
    return {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(task.rngs)}


def init(task: Any) -> dict[str, Any]:
    """All variables of a fresh task, without what it has sown."""
    rngs = {"params": jax.random.key(7), **keys(task)}
    variables = jax.jit(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))()
    return {k: v for k, v in variables.items() if k != "sums"}


PROGRAMS: dict[Any, Any] = {}  # compiled calls; with their task, so that no other takes its id


def compiled(task: Any, method: str, train: bool) -> Any:
    """Jitted task.apply(variables, batch, rngs, step) -> (result, what was sown)."""
    key = (id(task), method, train)
    if key not in PROGRAMS:

        def run(variables, batch, rngs, step):
            options = dict(step=step, train=train) if method == "__call__" else {}
            more = () if options else (train,)
            return task.apply(variables, batch, *more, rngs=rngs, mutable=["sums"], method=method, **options)

        PROGRAMS[key] = (jax.jit(run), task)
    return PROGRAMS[key][0]


def call(task: Any, variables: Any, batch: Any, *, seed: int = 0, train: bool = True, step: int = 0) -> Any:
    """(losses, metrics), what was sown; as numpy."""
    out, sown = compiled(task, "__call__", train)(variables, batch, keys(task, seed), jnp.int32(step))
    return *jax.tree.map(np.asarray, out), jax.tree.map(np.asarray, sown.get("sums", {}))


def means(pairs: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """What the loop makes of sums and weights."""
    return {name: float(s / w) for name, (s, w) in pairs.items()}


def replaced(tree: Any, path: str, value: Any) -> Any:
    """`tree` with the leaf at `path`, keys joined by "/", replaced by `value` or by what that makes of it."""
    head, _, rest = path.partition("/")
    new = replaced(tree[head], rest, value) if rest else value(tree[head]) if callable(value) else value
    return {**tree, head: new}

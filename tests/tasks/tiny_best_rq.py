"""BEST-RQ tasks, batches, parameters and a compiled step for tests: 100 frames of 10 ms, four stacked."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings

from speechjax.models.encoder import SpeechEncoder
from speechjax.models.random_quantizer import RandomQuantizer
from speechjax.tasks.best_rq import BestRQ
from tests.drawing import draw_params

SAMPLES, MELS, K = 16_240, 100, 4  # one second and a window: 100 frames of 10 ms, 25 stacked
LENGTHS = np.array([16_240, 9_000, 0], np.int32)  # 100, 54 and no frames; 25 and 13 stacked
V, G, BANDS = 7, 2, 20
ENCODER: dict[str, Any] = dict(
    frontend=dict(name="mel", n_mels=BANDS, factor=K, subsample="stack"), width=32, layers=1, heads=2, mlp=32,
    norm="post", positions=dict(kernel=4, groups=2), dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    input_dropout=0.0, layerdrop=0.0, scan=False, remat=False, dtype="float32",
)  # fmt: skip
few = settings(max_examples=10, deadline=None, derandomize=True)


def make_task(encoder: dict[str, Any] | None = None, **changes: Any) -> BestRQ:
    tiny: dict[str, Any] = dict(
        mask_prob=0.03, mask_span=20, masked_share_needed=1.0, noise_std=0.1, codebooks=G, codes=V, code_dim=4,
        mixing=0.0, mixing_noise=0.0,
    )  # fmt: skip
    return BestRQ(encoder=SpeechEncoder(**(ENCODER | (encoder or {}))), **(tiny | changes))


def make_batch(seed: int = 0, lengths: np.ndarray = LENGTHS) -> dict[str, np.ndarray]:
    """Noise whose colour changes every 50 ms, in the padding too."""
    rng = np.random.default_rng(seed)
    audio = rng.normal(size=(len(lengths), SAMPLES))
    audio[:, 1:] += np.repeat(rng.uniform(-1, 1, (len(lengths), 21)), 800, axis=1)[:, : SAMPLES - 1] * audio[:, :-1]
    return dict(audio=(4000 * audio).clip(-32768, 32767).astype(np.int16), lengths=lengths)


def make_variables(task: BestRQ) -> dict[str, Any]:
    """Parameters drawn without compiling; what is frozen as the quantizer itself draws it."""
    rngs = {name: jax.random.key(1) for name in ("params", *task.rngs)}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=True))
    quantizer = RandomQuantizer(task.codebooks, task.codes, task.code_dim)
    width = shapes["frozen"]["quantizer"]["projection"].shape[1]
    frozen = quantizer.init(jax.random.key(1), jnp.zeros((1, width)))["frozen"]
    assert jax.tree.map(jnp.shape, {"quantizer": frozen}) == jax.tree.map(jnp.shape, dict(shapes["frozen"]))
    return dict(params=draw_params(shapes["params"]), frozen={"quantizer": frozen})


def make_run(task: BestRQ, train: bool = True, backward: bool = False):
    """Jitted `run(variables, batch, seed)` -> losses, metrics, gradient, and what went in and out of the parts."""

    def total(variables, batch, seed):
        seen: dict[str, Any] = {}

        def watch(call, args, kwargs, context):
            out = call(*args, **kwargs)
            name = (type(context.module).__name__, context.method_name)
            if name == ("SpeechEncoder", "embed"):
                seen["masked_input"] = args[0]
            if name in (("SpeechEncoder", "inputs"), ("SpeechEncoder", "embed")):
                seen.setdefault(context.method_name, []).append(out)
            if name[0] in ("Heads", "RandomQuantizer") and context.method_name == "__call__":
                seen[name[0]] = args
            if name == ("BestRQ", "_predict"):
                seen["out"] = out
            return out

        rngs = {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(task.rngs)}
        with nn.intercept_methods(watch):
            losses, metrics = task.apply(variables, batch, step=jnp.int32(0), train=train, rngs=rngs)
        loss, n = losses["prediction"]
        return loss / jnp.maximum(n, 1), (losses, metrics, seen)

    run = jax.jit(jax.value_and_grad(total, has_aux=True) if backward else lambda *args: (total(*args), None))

    def call(variables, batch, seed=0):
        (_, (losses, metrics, seen)), gradient = run(variables, batch, seed)
        return jax.tree.map(np.asarray, (losses, metrics, gradient, seen))

    return call


def means(losses, metrics) -> dict[str, float]:
    """What a log window shows."""
    return {k: float(s / w) if w else math.nan for k, (s, w) in (losses | metrics).items()}

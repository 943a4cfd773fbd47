"""The optimizer: optax AdamW behind path rules."""

from collections.abc import Sequence

import jax
import optax

from speechjax.paths import map_rules


def schedule(*, learning_rate: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` updates, then linear decay to zero at `steps` (wav2vec 2.0, section 4.2)."""
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup),
            optax.linear_schedule(learning_rate, 0.0, max(steps - warmup, 1)),
        ],
        [warmup],
    )


def make_optimizer(
    *,
    steps: int,
    learning_rate: float,
    warmup: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: Sequence[tuple[str, float]],
    clip_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with decoupled decay and its learning-rate schedule; `clip_norm` 0 turns clipping off.

    `weight_decay` holds (path regex, rate) rules; every parameter must be covered.  The published speech recipes
    decay everything, biases and norms included.
    """
    rate = schedule(learning_rate=learning_rate, warmup=warmup, steps=steps)
    rules = tuple((pattern, float(value)) for pattern, value in weight_decay)
    transforms = [
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(b1, b2, eps),
        _decay(rules),
        optax.scale_by_learning_rate(rate),
    ]
    return optax.chain(*transforms), rate


def _decay(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Adds rate * parameter to the update, the rate by path."""

    def update(updates, state, params=None):
        rates = map_rules(rules, params, "weight_decay")
        return jax.tree.map(lambda u, p, rate: u + rate * p, updates, params, rates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

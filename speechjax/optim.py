"""The optimizer: optax AdamW behind path rules."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from speechjax.errors import UserError
from speechjax.paths import map_rules, match, path_name

DECAYS = ("linear", "cosine", "exponential", "inverse_sqrt", "constant")


def schedule(
    *, learning_rate: float, warmup: int, steps: int, hold: int = 0, decay: str = "linear", floor: float = 0.0
) -> optax.Schedule:
    """Linear warm-up over `warmup` updates, `hold` at the peak, then decay to `floor` times the peak at `steps`.

    linear: wav2vec 2.0, section 4.2.  exponential, with hold: the tri-stage schedule of data2vec and SpidR.  cosine:
    data2vec 2.  inverse_sqrt: Noam's (Vaswani et al. 2017, section 5.3), peak * sqrt(warmup / update), which knows no
    end.  Raises UserError for another name, and for an exponential decay to zero.
    """
    if decay not in DECAYS:
        raise UserError(f"config.optim.decay={decay!r}: choose from {', '.join(DECAYS)}")
    if decay == "exponential" and not floor > 0:
        raise UserError(f"config.optim.floor={floor}: an exponential decay needs a floor above 0, e.g. 0.01")
    rest = max(steps - warmup - hold, 1)
    low = learning_rate * floor
    fall = {
        "linear": lambda: optax.linear_schedule(learning_rate, low, rest),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, floor),
        "exponential": lambda: optax.exponential_decay(learning_rate, rest, floor, end_value=low),
        "inverse_sqrt": lambda: (
            lambda t: learning_rate * jnp.sqrt(max(warmup, 1) / (jnp.maximum(t, 0) + max(warmup, 1)))
        ),
        "constant": lambda: optax.constant_schedule(learning_rate),
    }[decay]()
    stages = [optax.linear_schedule(0.0, learning_rate, warmup), optax.constant_schedule(learning_rate), fall]
    return optax.join_schedules(stages, [warmup, warmup + hold])


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
    hold: int = 0,
    decay: str = "linear",
    floor: float = 0.0,
    freeze: Sequence[tuple[str, int, int]] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with decoupled decay and its learning-rate schedule; `clip_norm` 0 turns clipping off.

    `weight_decay` holds (path regex, rate) rules; every parameter must be covered.  The published speech recipes
    decay everything, biases and norms included.  `freeze` holds (path regex, from update, to update) rules: in that
    time, -1 for ever, the first rule that matches a parameter keeps it as it is.
    """
    rate = schedule(learning_rate=learning_rate, warmup=warmup, steps=steps, hold=hold, decay=decay, floor=floor)
    rules = tuple((pattern, float(value)) for pattern, value in weight_decay)
    # What is frozen has no gradient, for clipping and momentum; and no update, whatever decay and old momentum say.
    frozen = [_freeze(freeze)] if freeze else []
    transforms = [
        *frozen,
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(b1, b2, eps),
        _decay(rules),
        optax.scale_by_learning_rate(rate),
        *frozen,
    ]
    return optax.chain(*transforms), rate


def _freeze(rules: Sequence[tuple[str, int, int]]) -> optax.GradientTransformation:
    """Updates of what is frozen become zero.  Raises UserError for a rule that fits no parameter."""
    times = (*((pattern, (begin, end)) for pattern, begin, end in rules), (".*", None))

    def update(updates, state, params=None):
        def apply(path, update):
            time = match(times, path_name(path), "freeze")
            if time is None:
                return update
            begin, end = time
            frozen = (state.count >= begin) & ((state.count < end) | (end == -1))
            return jnp.where(frozen, jnp.zeros((), update.dtype), update)

        updates = jax.tree_util.tree_map_with_path(apply, updates)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    def init(params):
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        if idle := [rule[0] for rule in rules if not any(re.search(rule[0], name) for name in names)]:
            raise UserError(f"config.optim.freeze: {idle[0]!r} fits no parameter, e.g. {names[0]!r}")
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def _decay(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Adds rate * parameter to the update, the rate by path."""

    def update(updates, state, params=None):
        rates = map_rules(rules, params, "weight_decay")
        return jax.tree.map(lambda u, p, rate: u + rate * p, updates, params, rates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

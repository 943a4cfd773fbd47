"""The optimizer: optax AdamW behind path rules."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from speechjax.errors import UserError
from speechjax.ewc import consolidate
from speechjax.paths import leaf_names, map_rules, match, path_name

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
    rates: Sequence[tuple[str, float]] = (),
    ewc: str = "",
    ewc_weight: float = 0.0,
    moment_dtype: str = "float32",
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with decoupled decay and its learning-rate schedule; `clip_norm` 0 turns clipping off.

    `weight_decay` holds (path regex, rate) rules; every parameter must be covered.  The published speech recipes
    decay everything, biases and norms included.  `freeze` holds (path regex, from update, to update) rules: in that
    time, -1 for ever, the first rule that matches a parameter keeps it as it is; 0, 0 is never, for what a later rule
    would freeze.  What is frozen for ever has no
    moments; see `detach` for its gradient.  `rates` holds (path regex, factor) rules for the learning rate, every
    parameter covered (discriminative fine-tuning, Howard and Ruder 2018, arXiv 1801.06146, section 3.2).  `ewc` names a
    run whose parameters are held fast with `ewc_weight` (see ewc.py).  `moment_dtype` is of the first moments: bfloat16
    saves 2 of Adam's 8 bytes a parameter.  The second ones stay float32: b2 near 1 changes them by less than bfloat16
    can tell.  Raises UserError for another type.
    """
    if moment_dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.optim.moment_dtype={moment_dtype!r}: choose float32 or bfloat16")
    rate = schedule(learning_rate=learning_rate, warmup=warmup, steps=steps, hold=hold, decay=decay, floor=floor)
    rules = tuple((pattern, float(value)) for pattern, value in weight_decay)
    # What is frozen has no gradient, for clipping and momentum; and no update, whatever decay and old momentum say.
    frozen = [_freeze(freeze)] if freeze else []
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=moment_dtype)
    if any(map(_always, freeze)):
        adam = optax.masked(adam, lambda params: jax.tree.map(lambda still: not still, _still(params, freeze)))
    transforms = [
        *([consolidate(ewc_weight)] if ewc else []),
        *frozen,
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        adam,
        _decay(rules),
        *([_factors(rates)] if rates else []),
        optax.scale_by_learning_rate(rate),
        *frozen,
    ]
    return optax.chain(*transforms), rate


def detach(freeze: Sequence[tuple[str, int, int]]) -> Callable[[Any], Any]:
    """Parameters -> the same, without a gradient where `freeze` keeps them for ever: nothing is computed for it."""
    if not any(map(_always, freeze)):
        return lambda params: params

    def cut(params):
        return jax.tree.map(lambda p, still: lax.stop_gradient(p) if still else p, params, _still(params, freeze))

    return cut


def _always(rule: tuple[str, int, int]) -> bool:
    _, begin, end = rule
    return begin <= 0 and end == -1


def _still(params: Any, rules: Sequence[tuple[str, int, int]]) -> Any:
    """A tree like `params` of bools: whether the first rule that fits keeps it for ever."""
    return map_rules((*((rule[0], _always(rule)) for rule in rules), (".*", False)), params, "freeze")


def _factors(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies the update by a factor, by path."""

    def update(updates, state, params=None):
        factors = map_rules(tuple((pattern, float(factor)) for pattern, factor in rules), params, "rates")
        return jax.tree.map(lambda u, factor: factor * u, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _freeze(rules: Sequence[tuple[str, int, int]]) -> optax.GradientTransformation:
    """Updates of what is frozen become zero.  Raises UserError for a rule that fits no parameter."""
    times = (*((pattern, (begin, end)) for pattern, begin, end in rules), (".*", (0, 0)))

    def update(updates, state, params=None):
        def apply(path, update):
            begin, end = when[path_name(path)]
            if _always(("", begin, end)):
                return jnp.zeros_like(update)  # known before it runs, so its gradient is never computed
            frozen = (state.count >= begin) & ((state.count < end) | (end == -1))
            return jnp.where(frozen, jnp.zeros((), update.dtype), update)

        when = {names[0]: match(times, names, "freeze") for names in leaf_names(updates)}
        updates = jax.tree_util.tree_map_with_path(apply, updates)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    def init(params):
        names = leaf_names(params)
        for pattern, *_ in rules:
            if not any(re.search(pattern, name) for either in names for name in either):
                hint = " (config.model.scan=False keeps layers apart)" if "layer" in pattern else ""
                raise UserError(f"config.optim.freeze: {pattern!r} fits no parameter, e.g. {names[0][0]!r}{hint}")
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def _decay(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Adds rate * parameter to the update, the rate by path."""

    def update(updates, state, params=None):
        rates = map_rules(rules, params, "weight_decay")
        return jax.tree.map(lambda u, p, rate: u + rate * p, updates, params, rates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

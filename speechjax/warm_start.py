"""Parameters of another run to begin with: continued pretraining, and models that contain another's encoder."""

import logging
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from speechjax.errors import UserError
from speechjax.runs import find_checkpoint, read_weights
from speechjax.step import State

log = logging.getLogger("speechjax")


def fresh_state(task: Any, init: Any, abstract: State, start_from: str) -> State:
    """State of step 0, placed as `abstract`: drawn by `init`, perhaps from `start_from`, then by the task's start."""
    place = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.jit(init, out_shardings=place)()
    params = warm_start(state.params, start_from) if start_from else state.params
    params, extra = task.start(params, state.extra)
    return jax.device_put(state.replace(params=params, extra=extra), place)


def warm_start(params: Any, source: str) -> Any:
    """`params` with everything that the checkpoint `source` has under the same path and in the same shape.

    Heads may differ: they begin anew.  Raises UserError where the encoders differ in shape, or share nothing.
    """
    checkpoint = find_checkpoint(source)
    theirs: dict[str, Any] = flatten_dict(read_weights(checkpoint)[0], sep="/")
    ours: dict[str, Any] = flatten_dict(params, sep="/")
    shared = [k for k in ours if k in theirs]
    other = [k for k in shared if ours[k].shape != theirs[k].shape]
    if unlike := [k for k in other if k.startswith("encoder/")]:
        shown = "; ".join(f"{k}: {theirs[k].shape} there, {ours[k].shape} here" for k in unlike[:2])
        raise UserError(f"config.train.start_from={source!r} has another encoder ({shown}); use its model block")
    taken = {k: theirs[k].astype(ours[k].dtype) for k in shared if k not in other}
    if not any(k.startswith("encoder/") for k in taken):
        raise UserError(f"config.train.start_from={source!r} shares no parameter of the encoder with this model")
    new = [k for k in ours if k not in taken]
    log.info(
        "%d of %d parameter arrays come from %s; new: %s",
        len(taken), len(ours), checkpoint, ", ".join(new[:6]) + (", ..." if len(new) > 6 else "") or "none",
    )  # fmt: skip
    return unflatten_dict(ours | taken, sep="/")

"""Parameters of another run to begin with: fine-tuning, continued pretraining, models that contain another's encoder.

Paths are those of the path grammar.  Layers that one model stacks (scan) and the other has one by one are the same.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

import jax

from speechjax.errors import UserError
from speechjax.ewc import recall
from speechjax.models.adapters import ADAPTER_LEAF
from speechjax.paths import path_name, restacked
from speechjax.runs import find_checkpoint, read_config, read_weights
from speechjax.step import State

log = logging.getLogger("speechjax")

_ABOUT_LABELS = ("prior", "scale")  # collections of heads: how often classes, and how large numbers are


def fresh_state(task: Any, init: Any, abstract: State, init_from: str, ewc: str = "", label: str = "") -> State:
    """State of step 0, placed as `abstract`: drawn by `init`, perhaps from `init_from`, then by the task's start.

    `ewc` names a run that the optimizer shall remember (see ewc.py); `label` is config.data.label of this run.
    """
    place = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.jit(init, out_shardings=place)()
    begun = (state.params, state.extra)
    params, extra = task.start(*(warm_start(*begun, init_from, label) if init_from else begun))
    opt_state = recall(state.opt_state, ewc) if ewc else state.opt_state
    return jax.device_put(state.replace(params=params, extra=extra, opt_state=opt_state), place)


def warm_start(params: Any, extra: Any, source: str, label: str = "") -> tuple[Any, Any]:
    """(params, extra) with everything that the checkpoint `source` has under the same path and in the same shape.

    Heads may differ: they begin anew.  The state beside the parameters comes along, because a head that has learnt the
    codes of one codebook knows nothing of another's; but not what it knows of labels other than `label`.  Raises
    UserError where the encoders differ in shape or layers, or share nothing.
    """
    checkpoint = find_checkpoint(source)
    saved = read_weights(checkpoint)
    ours = _named(params)
    theirs = restacked(_named(saved[0]), ours)
    encoder = [k for k in ours if k.startswith("encoder/")]
    if not any(k in theirs for k in encoder):
        raise UserError(f"config.init_from={source!r} shares no parameter of the encoder with this model")
    if unlike := [k for k in encoder if k in theirs and ours[k].shape != theirs[k].shape]:
        shown = "; ".join(f"{k}: {theirs[k].shape} there, {ours[k].shape} here" for k in unlike[:2])
        raise UserError(f"config.init_from={source!r} has another encoder ({shown}); use its model block")
    if lost := sorted(_layers(ours) - _layers(theirs)):
        raise UserError(f"config.init_from={source!r} has no {lost[0]}: use its config.model.layers")
    if dropped := [k for k in theirs if k.startswith("encoder/") and re.search(ADAPTER_LEAF, k) and k not in ours]:
        raise UserError(
            f"config.init_from={source!r} has adapters that this model lacks, e.g. {dropped[0]}: give it its "
            "config.model.adapters, or merge them first (python -m speechjax.adapter merge)"
        )
    new = [k for k in ours if not _fits(ours[k], theirs.get(k))]
    log.info(
        "%d of %d parameter arrays come from %s; new: %s",
        len(ours) - len(new), len(ours), checkpoint, ", ".join(new[:6]) + (", ..." if len(new) > 6 else "") or "none",
    )  # fmt: skip
    state = saved[1]
    if any(name in extra for name in _ABOUT_LABELS):
        before: Any = read_config(checkpoint.parent.parent)
        if before.data.get("label", "") != label:
            state = {name: tree for name, tree in state.items() if name not in _ABOUT_LABELS}
    return _over(params, theirs), _over(extra, restacked(_named(state), _named(extra)))


def _named(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _fits(ours: Any, theirs: Any) -> bool:
    return theirs is not None and ours.shape == theirs.shape


def _over(tree: Any, theirs: dict[str, Any]) -> Any:
    """`tree` with the leaves of `theirs` where they fit."""

    def leaf(path, ours):
        found: Any = theirs.get(path_name(path))
        return found.astype(ours.dtype) if _fits(ours, found) else ours

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _layers(names: Iterable[str]) -> set[str]:
    """Names of the encoder's layers; those of a scan have one name together."""
    return {found[0] for name in names if (found := re.match(r"encoder/transformer/layers?\d*(?=/)", name))}

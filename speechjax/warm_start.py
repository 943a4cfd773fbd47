"""Parameters of another run to begin with: fine-tuning, continued pretraining, models that contain another's encoder.

Paths are those of the path grammar.  Layers that one model stacks (scan) and the other has one by one are the same.
"""

import json
import logging
import re
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
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


def fresh_state(task: Any, init: Any, abstract: State, config: Any, data: Any) -> State:
    """State of step 0, placed as `abstract`: drawn by `init`, perhaps from config.init_from, then by the task's start.

    config.optim.ewc names a run that the optimizer shall remember (see ewc.py); `data` says what classes mean.
    """
    place = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.jit(init, out_shardings=place)()
    begun = (state.params, state.extra)
    if source := config.init_from:
        begun = warm_start(*begun, source, config.data.label, renamed(task, data, source))
    params, extra = task.start(*begun)
    opt_state = recall(state.opt_state, config.optim.ewc) if config.optim.ewc else state.opt_state
    return jax.device_put(state.replace(params=params, extra=extra, opt_state=opt_state), place)


def renamed(task: Any, data: Any, source: str) -> set[int]:
    """How many classes the heads have that meant something else in the run `source`: another vocabulary of one size."""
    there = find_checkpoint(source).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        data.save(Path(folder))
        for file in Path(folder).glob("*.json"):
            if (there / file.name).is_file() and _meaning(file) != _meaning(there / file.name):
                log.warning("%s of %s has other classes: what it learnt of them is left there", file.name, there)
                return {classes for _, classes in task.sizes().values()}
    return set()


def _meaning(file: Path) -> dict[str, Any]:
    """A vocabulary without how texts and times become numbers of it."""
    try:
        content = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged; restore it from a copy") from None
    return {key: value for key, value in content.items() if key not in ("format", "kind", "steps", "hop")}


def warm_start(
    params: Any, extra: Any, source: str, label: str = "", other_classes: Collection[int] = ()
) -> tuple[Any, Any]:
    """(params, extra) with everything that the checkpoint `source` has under the same path and in the same shape.

    Heads may differ: they begin anew, also where they have one of `other_classes` as a dimension.  The state beside
    the parameters comes along, because a head that has learnt the codes of one codebook knows nothing of another's;
    but not what it knows of labels other than `label`.  Raises UserError where the encoders differ in shape or layers,
    or share nothing.
    """
    checkpoint = find_checkpoint(source)
    saved = read_weights(checkpoint)
    ours = _named(params)
    theirs = _without(restacked(_named(saved[0]), ours), other_classes)
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
    return _over(params, theirs), _over(extra, _without(restacked(_named(state), _named(extra)), other_classes))


def _named(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _without(leaves: dict[str, Any], sizes: Collection[int]) -> dict[str, Any]:
    """`leaves` of the encoder, and others that have no dimension of `sizes`."""
    return {k: v for k, v in leaves.items() if k.startswith("encoder/") or not set(sizes) & set(v.shape)}


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

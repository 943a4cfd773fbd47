"""Adapters into the weights they change, and out of them again.

Parameters are nested dicts of arrays, of a task or of an encoder alone, with layers stacked by a scan or not.  Leaves
that change are computed in float64 on the host and come back as NumPy arrays of their own type.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from speechjax.errors import UserError
from speechjax.models.adapters import ADAPTER_LEAF, Adapter, Bias, parse


def merge(params: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters without adapters whose model does what the model with `adapters`, all that it has, did.

    Raises UserError for kinds that cannot be merged, shapes that do not fit, and adapters that `params` has not or has
    beyond those named.
    """
    flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
    for adapter in parse(adapters):
        if isinstance(adapter, Bias):
            continue  # the weights are those it changed
        for path, parts in _sites(flat, adapter).items():
            _fold(flat, adapter, path, parts, back=False)
        flat = {name: leaf for name, leaf in flat.items() if not re.search(adapter.own, name)}
    if left := [name for name in flat if re.search(ADAPTER_LEAF, name)]:
        raise UserError(f"{left[0]} belongs to an adapter that was not named: name all, in their order")
    return unflatten_dict(flat, sep="/")


def unmerge(
    params: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]], leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """What `merge` made its parameters of: `leaves` {path: array} are the adapters'.

    Raises UserError where that cannot be known again: biases that were replaced, scales of zero.
    """
    flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
    for adapter in reversed(parse(adapters)):
        if isinstance(adapter, Bias):
            raise UserError(f"{adapter} replaced the biases; what they were is in the checkpoint it began from")
        for path, parts in _sites(leaves, adapter).items():
            _fold(flat, adapter, path, parts, back=True)
        flat |= {name: leaf for name, leaf in leaves.items() if re.search(adapter.own, name)}
    return unflatten_dict(flat, sep="/")


def _sites(leaves: Mapping[str, Any], adapter: Adapter) -> dict[str, dict[str, np.ndarray]]:
    """{path of a module: {part: array}} of an adapter's leaves."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, leaf in leaves.items():
        if match := re.search(adapter.own, name):
            found.setdefault(match["site"], {})[match["part"]] = np.asarray(leaf)
    if not found:
        raise UserError(f"{adapter} is not among the parameters")
    return found


def _fold(flat: dict[str, Any], adapter: Adapter, path: str, parts: dict[str, np.ndarray], back: bool) -> None:
    """Changes kernel and bias of the module at `path`."""
    # Kinds that cannot be merged say so, whatever their modules have.
    old = {name: np.asarray(flat[f"{path}/{name}"]) for name in ("kernel", "bias") if f"{path}/{name}" in flat}
    wide = {name: leaf.astype(np.float64) for name, leaf in old.items()}
    new = adapter.fold(wide.get("kernel", np.zeros(())), wide.get("bias"), parts, path, back)
    for (name, leaf), value in zip(old.items(), new, strict=False):
        flat[f"{path}/{name}"] = np.asarray(value, leaf.dtype)

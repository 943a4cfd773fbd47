"""The path grammar: a parameter is named by its place in the tree, rules are regexes, and the first match wins.

A parameter's name is the keys of its path joined by "/", e.g. `encoder/transformer/layer3/mlp_up/kernel`; layers also
count from the end, so that in a model of twelve the same is `encoder/transformer/layer-9/mlp_up/kernel`.  One grammar
for sharding, weight decay, learning rates, freezing and names, so a person learns it once.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_LAYER = re.compile(r"^(.*layer)(\d+)(/.*)$")


def path_name(path: Sequence[Any]) -> str:
    """The "/"-joined name of a jax key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def match(rules: Sequence[tuple[str, Any]], names: str | Sequence[str], what: str) -> Any:
    """Value of the first rule whose regex is found in one of the `names` of a parameter.

    Raises ValueError when none is: a parameter nobody thought of is an error, not a default.
    """
    names = [names] if isinstance(names, str) else names
    for pattern, value in rules:
        if any(re.search(pattern, name) for name in names):
            return value
    raise ValueError(f"no {what} rule covers parameter {names[0]!r}; add one, e.g. ('.*', ...) at the end")


def leaf_names(tree: Any) -> list[list[str]]:
    """The names of every leaf, in the order of `jax.tree.leaves`: its path, and that with its layer from the end."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    layers = [_LAYER.match(name) for name in names]
    count: dict[str, int] = {}
    for found in filter(None, layers):
        count[found[1]] = max(count.get(found[1], 0), int(found[2]) + 1)
    return [
        [name, f"{found[1]}-{count[found[1]] - int(found[2])}{found[3]}"] if found else [name]
        for name, found in zip(names, layers, strict=True)
    ]


def map_rules(rules: Sequence[tuple[str, Any]], tree: Any, what: str) -> Any:
    """A tree like `tree` that holds, for every leaf, the value of its first matching rule."""
    return jax.tree.unflatten(jax.tree.structure(tree), [match(rules, names, what) for names in leaf_names(tree)])


_STACKED, _SINGLE = re.compile(r"^(.*transformer/)layers/"), re.compile(r"^(.*transformer/)layer(\d+)/")


def unstacked(leaves: dict[str, Any]) -> dict[str, Any]:
    """`leaves` with the layers of a stack one by one: "layers/..." [L, ...] becomes "layer0/..." and so on."""
    found = {k: _STACKED.match(k) for k in leaves}
    split = {k.replace("/layers/", f"/layer{i}/"): v[i] for k, v in leaves.items() if found[k] for i in range(len(v))}
    return {k: v for k, v in leaves.items() if not found[k]} | split


def restacked(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`theirs` with layers stacked, or one by one, as `ours` has them."""
    if any(map(_STACKED.match, theirs)) and any(map(_SINGLE.match, ours)):
        return unstacked(theirs)
    if any(map(_SINGLE.match, theirs)) and any(map(_STACKED.match, ours)):
        together: dict[str, list[Any]] = {}
        for k in sorted(filter(_SINGLE.match, theirs), key=lambda k: int(_SINGLE.match(k)[2])):  # type: ignore[index]
            together.setdefault(_SINGLE.sub(r"\1layers/", k), []).append(theirs[k])
        rest = {k: v for k, v in theirs.items() if not _SINGLE.match(k)}
        return rest | {k: np.stack(v) for k, v in together.items()}
    return theirs

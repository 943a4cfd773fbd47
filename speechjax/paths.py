"""The path grammar: ordered (regex, value) rules over parameter paths; the first match wins.

A path is the keys of a parameter joined by "/", e.g. `encoder/transformer/layer0/mlp_up/kernel`.  One grammar for
sharding, weight decay, freezing and names, so a person learns it once.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax


def path_name(path: Sequence[Any]) -> str:
    """The "/"-joined name of a jax key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def match(rules: Sequence[tuple[str, Any]], name: str, what: str) -> Any:
    """Value of the first rule whose regex is found in `name`.

    Raises ValueError when none is: a parameter nobody thought of is an error, not a default.
    """
    for pattern, value in rules:
        if re.search(pattern, name):
            return value
    raise ValueError(f"no {what} rule covers parameter {name!r}; add one, e.g. ('.*', ...) at the end")


def map_rules(rules: Sequence[tuple[str, Any]], tree: Any, what: str) -> Any:
    """A tree like `tree` that holds, for every leaf, the value of its first matching rule."""
    return jax.tree_util.tree_map_with_path(lambda path, _: match(rules, path_name(path), what), tree)

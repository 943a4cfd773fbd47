"""The path grammar: names of leaves, order of rules, and the error for what nobody covered."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
import pytest

from speechjax.errors import UserError
from speechjax.paths import map_rules, match, path_name


class Pair(NamedTuple):
    left: object
    right: object


@flax.struct.dataclass
class Holder:
    step: object
    params: object


def names(tree):
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_first_match_wins():
    rules = (("bias$", 0.0), ("layer1/", 0.5), (".*", 1.0))
    assert match(rules, "layer1/mlp/bias", "decay") == 0.0
    assert match(rules, "layer1/mlp/kernel", "decay") == 0.5
    assert match(rules, "layer10/mlp/kernel", "decay") == 1.0
    # The same rules, the general one first: order alone decides.
    assert match(rules[::-1], "layer1/mlp/bias", "decay") == 1.0


def test_a_rule_is_searched_anywhere_unless_anchored():
    assert match((("norm", 1), (".*", 2)), "encoder/norm/scale", "x") == 1
    assert match((("^norm", 1), (".*", 2)), "encoder/norm/scale", "x") == 2


def test_a_falsy_value_is_a_match():
    assert match((("a", None), (".*", 1)), "a", "x") is None


def test_uncovered_parameter_is_an_error_that_names_it():
    with pytest.raises((ValueError, UserError), match=r"no decay rule covers parameter 'head/kernel'"):
        map_rules((("^encoder", 1.0),), {"encoder": {"k": 1}, "head": {"kernel": 2}}, "decay")


def test_names_through_dicts_dataclasses_tuples_and_lists():
    tree = Holder(step=1, params={"layer0": {"kernel": 2, "bias": 3}, "stack": [Pair(4, 5), (6,)]})
    assert names(tree) == [
        "step", "params/layer0/bias", "params/layer0/kernel", "params/stack/0/left", "params/stack/0/right",
        "params/stack/1/0",
    ]  # fmt: skip


def test_names_of_optimizer_moments_end_like_their_parameters():
    params = {"layer0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    state = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()).init(params)
    for moment in ("mu", "nu"):
        found = [n.split(f"{moment}/")[1] for n in names(state) if f"/{moment}/" in n]
        assert found == names(params)
    assert "1/count" in names(state)


def test_map_rules_keeps_the_structure():
    tree = Holder(step=0, params={"kernel": 1, "bias": 2})
    assert map_rules((("bias", "b"), ("kernel", "k"), ("^step$", "s")), tree, "x") == Holder(
        step="s", params={"kernel": "k", "bias": "b"}
    )

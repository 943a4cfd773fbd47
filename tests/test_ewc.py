"""Elastic weight consolidation in closed form: the penalty, the Fisher information, its files."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from speechjax import config as configs
from speechjax import ewc
from speechjax.errors import UserError

REPO = Path(__file__).resolve().parent.parent
CONFIG = f"{REPO}/configs/finetune/ctc.py:smoke"


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {"head": {"kernel": draw(3, 2), "bias": draw(2)}, "gain": draw(3)}


def memory(seed):
    """By path, as in a file."""
    flat = lambda t: {"head/kernel": t["head"]["kernel"], "head/bias": t["head"]["bias"], "gain": t["gain"]}  # noqa: E731
    return ewc.Memory({name: x**2 for name, x in flat(tree(seed)).items()}, flat(tree(seed + 100)))


def penalty(params, known, weight):
    """The paper's: weight / 2 * sum F (theta - theta_old)^2."""
    flat = {"head/kernel": params["head"]["kernel"], "head/bias": params["head"]["bias"], "gain": params["gain"]}
    return weight / 2 * sum(jnp.sum(known.precision[k] * (flat[k] - known.centre[k]) ** 2) for k in flat)


def held(params, folder, weight):
    """The transform and its state, filled from the folder."""
    tx = ewc.consolidate(weight)
    return tx, ewc.recall(tx.init(params), str(folder))


def test_the_update_is_the_gradient_of_the_penalty(tmp_path):
    ewc.save(tmp_path, memory(1), {})
    params, grads = jax.tree.map(jnp.asarray, tree(7)), jax.tree.map(jnp.asarray, tree(8))
    tx, state = held(params, tmp_path, 3.0)
    updates, after = jax.jit(tx.update)(grads, state, params)
    expected = jax.tree.map(jnp.add, grads, jax.grad(penalty)(params, memory(1), 3.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), updates, expected)
    jax.tree.map(np.testing.assert_array_equal, after, state)  # the same at every step
    untouched, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, untouched, grads)  # of nothing remembered


def test_two_memories_added_are_two_penalties(tmp_path):
    one, two = memory(1), memory(2)
    one.precision["gain"][0] = two.precision["gain"][0] = 0  # in which nobody is interested
    both = ewc.add(one, two)
    params = jax.tree.map(jnp.asarray, tree(7))
    separate = jax.grad(lambda p: penalty(p, one, 1.0) + penalty(p, two, 1.0))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.grad(lambda p: penalty(p, both, 1.0))(params), separate,
    )  # fmt: skip
    last = jax.grad(lambda p: penalty(p, two, 1.0))(params)["gain"]
    assert not np.allclose(last, separate["gain"], rtol=1e-3)
    other_head = memory(3)._replace(precision=memory(3).precision | {"head/bias": np.ones(5, np.float32)})
    other_head.centre["head/bias"] = np.ones(5, np.float32)
    assert ewc.add(one, other_head).precision["head/bias"].shape == (5,)


def test_layers_that_were_stacked_are_remembered_one_by_one(tmp_path):
    both = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
    stacked = {"encoder/transformer/layers/up": both}
    ewc.save(tmp_path, ewc.Memory(stacked, stacked), {})
    params = {"encoder": {"transformer": {f"layer{i}": {"up": jnp.zeros(3)} for i in range(2)}}}
    held = ewc.recall(ewc.consolidate(1.0).init(params), str(tmp_path))
    layers = held.precision["encoder"]["transformer"]
    np.testing.assert_array_equal(
        [layers[f"layer{i}"]["up"] for i in range(2)], stacked["encoder/transformer/layers/up"]
    )
    single = ewc.Memory(*[{f"encoder/transformer/layer{i}/up": np.ones(3, np.float32) for i in range(2)}] * 2)
    total = ewc.add(single, ewc.load(tmp_path))
    np.testing.assert_array_equal(total.precision["encoder/transformer/layer1/up"], [5, 6, 7])


def test_training_ends_between_the_tasks_where_the_penalty_says(tmp_path):
    """Of a / 2 (x - b)^2 + weight / 2 F (x - c)^2 the minimum is (a b + weight F c) / (a + weight F)."""
    F, c = np.array([4.0, 0.0], np.float32), np.array([1.0, 1.0], np.float32)
    a, b, weight = 2.0, -2.0, 0.5
    ewc.save(tmp_path, ewc.Memory({"x": F}, {"x": c}), {})
    params = {"x": jnp.zeros(2)}
    tx = optax.chain(ewc.consolidate(weight), optax.sgd(0.1))
    state = ewc.recall(tx.init(params), str(tmp_path))
    for _ in range(200):
        updates, state = tx.update(jax.tree.map(lambda x: a * (x - b), params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["x"], (a * b + weight * F * c) / (a + weight * F), rtol=1e-5)
    assert float(params["x"][1]) == pytest.approx(b)  # what did not matter is free


class Regression(nn.Module):
    """Softmax regression of `lengths` inputs with the interface of a task; -1 is no label."""

    rngs = ("dropout",)

    @nn.compact
    def __call__(self, batch, *, step, train):
        assert not train
        logits = nn.Dense(3, use_bias=False)(batch["audio"])
        there = batch["label"] >= 0
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["label"], 0))
        return {"nll": (jnp.sum(jnp.where(there, each, 0)), jnp.sum(there).astype(jnp.float32))}, {}


def regression_batches():
    rng = np.random.default_rng(0)
    make = lambda labels: {"audio": rng.normal(size=(4, 2)).astype(np.float32), "label": np.array(labels)}  # noqa: E731
    return [make([0, 2, -1, 1]), make([1, 1, 0, -1])]


def test_fisher_of_softmax_regression():
    """The gradient of a row is x (p - y)': squares of rows, not of their mean; rows without a label do not count."""
    batches, task = regression_batches(), Regression()
    variables = {
        "params": {"Dense_0": {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), "float32")}}
    }
    found, count = ewc.fisher(task, variables, batches, 100, step=0, seed=0)
    weights = np.asarray(variables["params"]["Dense_0"]["kernel"])
    grads = []
    for batch in batches:
        for x, y in zip(batch["audio"], batch["label"], strict=True):
            if y >= 0:
                p = np.exp(x @ weights)
                grads.append(np.outer(x, p / p.sum() - np.eye(3)[y]))
    assert count == len(grads) == 6
    kernel = found["Dense_0"]["kernel"]
    np.testing.assert_allclose(kernel, np.mean(np.square(grads), axis=0), rtol=1e-5)
    assert not np.allclose(kernel, np.square(np.mean(grads, axis=0)), rtol=0.1)
    first, count = ewc.fisher(task, variables, batches, 2, step=0, seed=0)  # a batch is enough
    assert count == 3
    np.testing.assert_allclose(first["Dense_0"]["kernel"], np.mean(np.square(grads[:3]), axis=0), rtol=1e-5)
    still, _ = ewc.fisher(
        task, variables, batches, 2, step=0, seed=0, detach=lambda p: jax.tree.map(jax.lax.stop_gradient, p)
    )
    assert not np.any(still["Dense_0"]["kernel"])
    silent = [{**batches[0], "label": np.full(4, -1)}]
    with pytest.raises(UserError, match="none of 4 examples has a label"):
        ewc.fisher(task, variables, silent, 2, step=0, seed=0)


@pytest.mark.slow
def test_fisher_of_a_real_task_does_not_depend_on_its_neighbours():
    """Of CTC: rows with shorter ones beside them, or alone; padding and empty rows are nothing."""
    config = configs.load(CONFIG, ["task.classes=7"])
    task, rng = configs.make_task(config), np.random.default_rng(0)
    S, lengths, tokens = (
        6000,
        np.array([6000, 4000, 0], np.int32),
        np.array([[4, 5, 4], [6, 4, 0], [4, 4, 4]], np.int32),
    )
    batch = dict(
        audio=rng.integers(-9000, 9000, (3, S)).astype(np.int16), lengths=lengths, mean=np.zeros(3, np.float32),
        std=np.ones(3, np.float32), unread=np.zeros(3, np.int32), tokens=tokens,
        token_lengths=np.array([3, 2, 3], np.int32),
    )  # fmt: skip
    init = {"params": jax.random.key(0), "mask": jax.random.key(1), "dropout": jax.random.key(2),
            "layerdrop": jax.random.key(3)}  # fmt: skip
    variables = jax.jit(lambda: task.init(init, batch, step=jnp.int32(0), train=False))()
    measure = lambda b: ewc.fisher(task, variables, [b], 9, step=5, seed=0)  # noqa: E731
    together, count = measure(batch)
    assert count == 2
    noisy = {**batch, "audio": np.where(np.arange(S) < lengths[:, None], batch["audio"], 77).astype(np.int16)}
    other, _ = measure(noisy)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.max(a)))  # squares double float32's error
    twice, _ = measure({name: x[:1] for name, x in batch.items()})
    assert not np.allclose(twice["head"]["bias"], together["head"]["bias"], rtol=1e-2)


def test_files_and_what_they_refuse(tmp_path):
    with pytest.raises(UserError, match=r"python -m speechjax\.ewc --workdir="):
        ewc.load(tmp_path)
    ewc.save(tmp_path, memory(1), {"rows": 3})
    for mine, read in zip(memory(1), ewc.load(tmp_path), strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, read)
    with pytest.raises(UserError, match="knows no parameter of this model"):
        held({"else": jnp.zeros(3)}, tmp_path, 1.0)
    with pytest.raises(UserError, match="must be above 0"):
        ewc.consolidate(0.0)
    (tmp_path / ewc.FILE).write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"cannot be read .*: write it again"):
        ewc.load(tmp_path)

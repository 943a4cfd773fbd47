"""Classes and tags of utterances: losses and chance against a loop, weights, smoothing, and what teaches nothing."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
from tiny_heads import COUNTS, POOLED, look, make_batch, make_task, make_variables, run
from tiny_hubert import means

from speechjax.errors import UserError
from speechjax.tasks.classify import Classify

CLASSES = 5
LABEL = np.array([2, 4, 1], np.int32)
TAGS = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)  # one fewer than the model has room for
SEEN = np.array([3, 0, 10, 1, 2], np.int32)


@functools.cache
def made(loss: str = "softmax", smoothing: float = 0.0, weights: str = "none", **more: Any) -> Any:
    task = make_task(
        Classify, classes=CLASSES, loss=loss, label_smoothing=smoothing, class_weights=weights, **POOLED | more
    )
    batch = make_batch(label=LABEL if loss == "softmax" else TAGS)
    variables = make_variables(task, batch)
    prior = dict(counts=SEEN) | (dict(rows=np.array(14, np.int32)) if loss == "sigmoid" else {})
    return task, variables | {"prior": prior}, batch


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_the_cross_entropy_is_that_of_a_loop(weights, smoothing):
    task, variables, batch = made("softmax", smoothing, weights)
    losses, metrics, sums, answer, _ = run(task, variables, batch)
    x = answer["scores"].astype(np.float64)
    log = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    prior = (SEEN + 1) / (SEEN.sum() + CLASSES)
    weight = {r: 1 / prior[LABEL[r]] / CLASSES if weights == "balanced" else 1.0 for r in (0, 1)}

    def cost(log, r):
        target = np.full(CLASSES, smoothing / CLASSES)
        target[LABEL[r]] += 1 - smoothing
        return -weight[r] * target @ log[r]

    total = sum(weight.values())
    assert losses["classification"] == (pytest.approx(cost(log, 0) + cost(log, 1), rel=1e-5), pytest.approx(total))
    assert metrics["accuracy"] == (sum(x[r].argmax() == LABEL[r] for r in (0, 1)), 2)
    assert metrics["chance_accuracy"] == (1, 2)
    assert sums["labels"].tolist() == [0, 0, 1, 0, 1]
    # Chance is the best constant guess: where labels come as the prior says, no other does better.
    guess = prior if weights == "none" else np.where(SEEN > 0, 1.0, 1 / (SEEN.sum() + CLASSES))
    guess = (1 - smoothing) * guess / guess.sum() + smoothing / CLASSES
    chance = cost(np.log([guess, guess]), 0) + cost(np.log([guess, guess]), 1)
    assert metrics["chance_classification"] == (pytest.approx(chance, rel=1e-5), pytest.approx(total))


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_no_constant_guess_beats_chance_where_labels_are_as_before(weights):
    """Expected cost of the guess above under the shares of `seen` (all seen here), against random others."""
    seen = np.array([30, 5, 60, 5])
    share = (seen + 1) / (seen + 1).sum()
    weight = 1 / share if weights == "balanced" else np.ones(4)
    best = share if weights == "none" else np.full(4, 0.25)
    cost = lambda q: float((share * weight) @ -np.log(q))  # noqa: E731
    others = np.random.default_rng(0).dirichlet(np.full(4, 3.0), 200)
    assert all(cost(q) > cost(best) for q in others)
    if weights == "balanced":
        assert cost(share) > cost(best) + 0.1, "negative control: the prior is not the best guess there"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_tags_are_those_of_a_loop(weights, smoothing):
    task, variables, batch = made("sigmoid", smoothing, weights)
    losses, metrics, sums, answer, _ = run(task, variables, batch)
    x = answer["scores"].astype(np.float64)
    assert x.shape == (3, CLASSES)
    share = (SEEN + 1) / 16
    cost = chance = total = 0.0
    for r in (0, 1):
        for v in range(4):
            y, p = TAGS[r, v], 1 / (1 + math.exp(-x[r, v]))
            weight = 1.0 if weights == "none" else 0.5 / (share[v] if y else 1 - share[v])
            t = (1 - smoothing) * y + smoothing / 2
            guess = (1 - smoothing) * (share[v] if weights == "none" else 0.5) + smoothing / 2
            cost -= weight * (t * math.log(p) + (1 - t) * math.log(1 - p))
            chance -= weight * (t * math.log(guess) + (1 - t) * math.log(1 - guess))
            total += weight
    assert losses["classification"] == (pytest.approx(cost, rel=1e-5), pytest.approx(total, rel=1e-5))
    assert metrics["chance_classification"] == (pytest.approx(chance, rel=1e-5), pytest.approx(total, rel=1e-5))
    assert metrics["accuracy"] == (((x[:2, :4] > 0) == TAGS[:2]).sum(), 8)
    assert metrics["chance_accuracy"] == (((share[:4] > 0.5) == TAGS[:2]).sum(), 8)
    assert (metrics["tags_a_row"], metrics["labelled_share"]) == ((2, 2), (2, 2))
    assert sums["labels"].tolist() == [1, 0, 0, 1, 0]
    after = task.after_step(None, {"prior": variables["prior"]}, sums, 0)["prior"]
    assert after["counts"].tolist() == [4, 0, 10, 2, 2]
    assert int(after["rows"]) == 16


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_rows_without_a_label_teach_nothing(loss):
    task, variables, batch = made(loss)
    known = batch["label"]
    half, none = known.copy(), np.full_like(known, -1)
    half[0] = -1
    losses, metrics, *_ = run(task, variables, batch | {"label": half})
    assert metrics["labelled_share"] == (1, 2)
    assert losses["classification"][1] == (1 if loss == "softmax" else 4)
    other = make_batch(seed=7, label=half)
    other["frames"][:, 1] = batch["frames"][:, 1]
    again, *_ = run(task, variables, other)
    assert again["classification"][0] == pytest.approx(losses["classification"][0], rel=1e-5), "row 0 has no say"
    losses, metrics, _, _, gradient = run(task, variables, batch | {"label": none})
    assert losses["classification"] == (0, 0)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_nothing_in_the_padding_is_heard(pooling):
    task, variables, batch = made(pooling=pooling, layers="weighted")
    found, noisy = (run(task, variables, b) for b in (batch, make_batch(padding=np.nan, label=LABEL)))
    np.testing.assert_array_equal(noisy[3]["scores"][:2], found[3]["scores"][:2])
    assert noisy[0]["classification"] == found[0]["classification"]
    other = run(task, variables, make_batch(seed=1, label=LABEL))
    assert np.abs(other[3]["scores"] - found[3]["scores"]).max() > 1e-3, "negative control"
    assert found[4]["layer_weights"].any()
    assert found[4]["project"]["kernel"].any()


def test_pictures():
    task, variables, batch = made()
    shown, guess = look(task, variables, batch), run(task, variables, batch)[3]["scores"].argmax(axis=1)
    for row, n in enumerate(COUNTS[:2]):
        assert shown["true"][row].tolist() == [LABEL[row]] * n + [-1] * (24 - n)
        assert shown["predicted"][row].tolist() == [guess[row]] * n + [-1] * (24 - n)
    task, variables, batch = made("sigmoid")
    shown = look(task, variables, batch)
    np.testing.assert_array_equal(shown["target"][0], np.tile(TAGS[0], (24, 1)))
    assert shown["output"].shape == (3, 24, 4)


def test_mistakes_are_named():
    task, variables, batch = made()
    apply = functools.partial(task.apply, variables, step=0, train=False)
    with pytest.raises(UserError, match=r"config\.task\.label='label' must be a class here: set .*label=meta:FIELD"):
        apply(batch | {"label": TAGS})
    with pytest.raises(UserError, match=r"must be tags here: set config\.data\.label=who=tags:FIELD"):
        made("sigmoid")[0].clone(label="label_who").apply(
            made("sigmoid")[1], batch | {"label_who": LABEL}, step=0, train=False
        )
    for changes, message in (
        (dict(pooling="max"), "pooling='max': choose from mean, attention"),
        (dict(loss="hinge"), "loss='hinge': choose from softmax, sigmoid"),
        (dict(class_weights="x"), "class_weights='x': choose from none, balanced"),
    ):
        with pytest.raises(UserError, match=message):
            task.clone(**changes).apply(variables, batch, step=0, train=False)
    assert task.needs == ("label",)
    assert task.sizes() == {"label": ("config.task.classes", CLASSES)}


def test_alarms():
    task, variables, batch = made()
    batch = batch | {"counts": np.array([24, 17, 20], np.int32)}
    head = variables["params"]["head"]
    share = (SEEN + 1) / (SEEN + 1).sum()
    deaf = dict(kernel=np.zeros_like(head["kernel"]), bias=np.log(share).astype(np.float32))
    found = means(*run(task, {**variables, "params": {**variables["params"], "head": deaf}}, batch)[:2])
    assert found["classification"] == pytest.approx(found["chance_classification"], rel=1e-5)
    assert set(task.health(found, 1000)) == {"constant_prediction", "stuck_at_chance"}
    assert task.health(found, 999) == {}
    same = means(*run(task, variables, batch | {"label": np.full(3, 2, np.int32)})[:2])
    assert set(task.health(same, 0)) == {"one_class"}
    task, variables, batch = made("sigmoid")
    bias = np.full(CLASSES, -9, np.float32)
    head = dict(kernel=np.zeros_like(variables["params"]["head"]["kernel"]), bias=bias)
    silent = means(*run(task, {**variables, "params": {**variables["params"], "head": head}}, batch)[:2])
    assert set(task.health(silent, 1000)) == {"no_tags", "stuck_at_chance"}
    unknown = means(*run(task, variables, batch | {"label": np.full_like(TAGS, -1)})[:2])
    assert set(task.health(unknown, 0)) == {"unlabelled"}

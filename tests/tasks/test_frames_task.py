"""Classes of frames: one each against a loop, and turns against every order of the speakers."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_heads import HEAD, look, make_batch, make_task, make_variables, run
from tiny_hubert import FRAMES, SAMPLES, means

from speechjax.errors import UserError
from speechjax.tasks.frames import Frames, from_bits, in_best_order, score_turns, to_bits


@functools.cache
def made(loss: str = "softmax", classes: int = 4) -> Any:
    task = make_task(Frames, classes=classes, unit_hop=10, loss=loss, **HEAD)
    rng = np.random.default_rng(0)
    units = rng.integers(0, classes, (3, SAMPLES // 10)).astype(np.int32)
    batch = make_batch(units=np.where(rng.random(units.shape) < 0.1, -1, units))
    return task, make_variables(task, batch), batch


def at_frames(batch: Any, shift: int = 0) -> list[tuple[int, int, int]]:
    """(row, frame, unit) of all frames that have one: every second of the units."""
    every = [(b, t, int(batch["units"][b, 2 * t + shift])) for b, n in enumerate(batch["counts"]) for t in range(n)]
    return [x for x in every if x[2] >= 0]


def test_frames_are_scored_with_the_unit_that_begins_with_them():
    task, variables, batch = made()
    losses, metrics, _, answer, gradient = run(task, variables, batch)
    x = answer["scores"].astype(np.float64)
    log = x - np.log(np.exp(x).sum(axis=2, keepdims=True))
    known = at_frames(batch)
    cost = -sum(log[b, t, u] for b, t, u in known)
    assert losses["frames"] == (pytest.approx(cost, rel=1e-5), len(known))
    assert abs(-sum(log[b, t, u] for b, t, u in at_frames(batch, 1)) - cost) > 0.1, (
        "negative control: half a frame late"
    )
    assert metrics["accuracy"] == (sum(log[b, t].argmax() == u for b, t, u in known), len(known))
    count = np.bincount([u for *_, u in known])
    assert metrics["chance_accuracy"] == (count.max(), len(known))
    entropy = -sum(n / len(known) * math.log(n / len(known)) for n in count)
    assert metrics["chance_frames"] == (pytest.approx(entropy * len(known), rel=1e-5), len(known))
    assert metrics["labelled_share"] == (len(known), 41)
    assert gradient["head"]["kernel"].any()


@pytest.mark.parametrize("loss", ["softmax", "turns"])
def test_nothing_in_the_padding_counts_nor_frames_without_a_unit(loss):
    task, variables, batch = made(loss)
    found = run(task, variables, batch)
    noisy = make_batch(padding=5.0, units=batch["units"])
    for a, b in zip(jax.tree.leaves(run(task, variables, noisy)[:2]), jax.tree.leaves(found[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    other = run(task, variables, make_batch(1, units=batch["units"]))
    assert other[0]["frames"][0] != found[0]["frames"][0], "negative control"
    none = run(task, variables, batch | {"units": np.full_like(batch["units"], -1)})
    assert none[0]["frames"] == (0, 0)
    assert all(np.isfinite(g).all() and not g.any() for g in jax.tree.leaves(none[4]))


# ---- turns


@settings(max_examples=20, deadline=None)
@given(speakers=st.sampled_from([1, 2, 3]), seed=st.integers(0, 1000))
def test_turns_cost_what_their_best_order_costs(speakers, seed):
    """Every order tried, in float64; the error rate is missed, false and confused speakers of that order."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 7, speakers)).astype(np.float32) * 3
    units = rng.integers(-1, 2**speakers, (2, 7)).astype(np.int32)
    losses, metrics = jax.tree.map(np.asarray, _score(x, units))
    total = wrong = speaking = 0.0
    for b in range(2):
        known = units[b] >= 0
        y, mine = (units[b][known][:, None] >> np.arange(speakers)) & 1, x[b][known].astype(np.float64)

        def cost(order, x=mine, y=y):
            return np.mean(np.log1p(np.exp(x[:, order])) - y * x[:, order], axis=1).sum()

        orders = [list(order) for order in itertools.permutations(range(speakers))]
        best = min(orders, key=cost)
        total += cost(best)
        on = x[b][known][:, best] > 0
        for t in range(known.sum()):
            missed = max(0, int(y[t].sum() - on[t].sum()))
            false = max(0, int(on[t].sum() - y[t].sum()))
            confused = int(min(on[t].sum(), y[t].sum()) - (y[t] * on[t]).sum())
            wrong += missed + false + confused
        speaking += y.sum()
    n = (units >= 0).sum()
    assert losses["frames"] == (pytest.approx(total, rel=1e-4, abs=1e-4), n)
    assert metrics["error_rate"] == (wrong, speaking)
    share = speaking / max(n * speakers, 1)
    entropy = -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
    assert metrics["chance_frames"] == (pytest.approx(entropy * n, rel=1e-4, abs=1e-5), n)


_score = jax.jit(score_turns)


def test_the_order_of_the_speakers_has_no_say():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 9, 3)).astype(np.float32)
    units = rng.integers(0, 8, (3, 9)).astype(np.int32)
    bits = from_bits(jnp.asarray(units), 3)
    np.testing.assert_array_equal(to_bits(bits > 0), units)
    other = np.asarray(to_bits(bits[..., jnp.array([2, 0, 1])] > 0))
    assert (other != units).any()
    first, second = (jax.tree.map(np.asarray, _score(x, u)) for u in (units, other))
    assert first[0]["frames"][0] == pytest.approx(second[0]["frames"][0], rel=1e-6)
    best = np.asarray(in_best_order(jnp.asarray(x), jnp.asarray(units)))
    np.testing.assert_array_equal(np.sort(best, axis=2), np.sort(x, axis=2))
    # One speaker's frames alone are another's problem: time matters.
    assert _score(x, units[:, ::-1])[0]["frames"][0] != pytest.approx(first[0]["frames"][0], rel=1e-3)


def test_pictures_alarms_and_mistakes():
    task, variables, batch = made()
    shown = look(task, variables, batch)
    np.testing.assert_array_equal(shown["true"][0], batch["units"][0, ::2][:FRAMES])
    np.testing.assert_array_equal(shown["predicted"], run(task, variables, batch)[3]["scores"].argmax(axis=2))
    known = np.bincount([u for *_, u in at_frames(batch)])
    head = dict(kernel=np.zeros((32, 4), np.float32), bias=np.log(known / known.sum()).astype(np.float32))
    found = means(*run(task, {"params": {**variables["params"], "head": head}}, batch)[:2])
    assert set(task.health(found, 1000)) == {"constant_prediction", "stuck_at_chance"}
    assert task.health(found, 999) == {}
    unknown = run(task, variables, batch | {"units": np.full_like(batch["units"], -1)})
    assert set(task.health(means(*unknown[:2]), 0)) == {"unlabelled"}
    with pytest.raises(UserError, match=r"classes=5: turns of S speakers have 2\^S classes"):
        task.clone(loss="turns", classes=5).apply(variables, batch, step=0, train=False)
    with pytest.raises(UserError, match="choose softmax or turns"):
        task.clone(loss="ctc").apply(variables, batch, step=0, train=False)
    task, variables, batch = made("turns")
    shown = look(task, variables, batch)
    scores = run(task, variables, batch)[3]["scores"]
    assert scores.shape == (3, FRAMES, 2)
    assert set(np.unique(shown["predicted"])) <= {0, 1, 2, 3}
    task.health(means(*run(task, variables, batch)[:2]), 5000)

"""Numbers of utterances: losses in deviations, whose mean and size are those of all numbers so far."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from tiny_heads import COUNTS, POOLED, look, make_batch, make_task, make_variables, run
from tiny_hubert import means

from speechjax.errors import UserError
from speechjax.tasks.regress import Regress

NUMBER = np.array([3.5, 1.5, 9.0], np.float32)
SCALE = dict(count=np.array(4, np.int32), mean=np.array(2.0, np.float32), squares=np.array(4.0 * 0.25, np.float32))


@functools.cache
def made(loss: str = "mse", **more: Any) -> Any:
    task = make_task(Regress, loss=loss, **POOLED | more)
    batch = make_batch(label=NUMBER)
    return task, make_variables(task, batch) | {"scale": SCALE}, batch


def by_hand(loss: str, x: np.ndarray) -> float:
    if loss == "huber":
        return float(sum(0.5 * v * v if abs(v) < 1 else abs(v) - 0.5 for v in x))
    return float((x**2 if loss == "mse" else np.abs(x)).sum())


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_losses_are_those_of_deviations(loss):
    task, variables, batch = made(loss)
    losses, metrics, _, answer, _ = run(task, variables, batch)
    value = answer["value"].astype(np.float64)
    wanted, output = (NUMBER[:2] - 2) / 0.5, (value[:2] - 2) / 0.5
    assert losses["regression"] == (pytest.approx(by_hand(loss, output - wanted), rel=1e-5), 2)
    assert metrics["chance_regression"] == (pytest.approx(by_hand(loss, wanted), rel=1e-5), 2)
    assert metrics["mae"] == (pytest.approx(np.abs(value[:2] - NUMBER[:2]).sum(), rel=1e-5), 2)
    assert metrics["chance_mae"] == (pytest.approx(np.abs(NUMBER[:2] - 2).sum(), rel=1e-5), 2)
    assert metrics["target_deviation"] == (pytest.approx(wanted.std(), rel=1e-5), 1)
    assert metrics["output_deviation"] == (pytest.approx(output.std(), rel=1e-3), 1)
    assert metrics["labelled_share"] == (2, 2)


@pytest.mark.parametrize("offset", [0.0, 2000.0])
def test_mean_and_deviation_are_those_of_all_numbers_so_far(offset):
    """Also far from zero, where the difference of two mean squares would have lost the deviation."""
    task, variables, _ = made()
    rng = np.random.default_rng(0)
    extra = {"scale": jax.tree.map(np.zeros_like, SCALE)}
    heard: list[float] = []
    for k in range(6):
        number = (offset + rng.normal(size=3)).astype(np.float32)
        number[k % 2] = np.nan if k == 3 else number[k % 2]
        sums = run(task, variables | extra, make_batch(k, label=number))[2]
        extra = jax.tree.map(np.asarray, task.after_step(None, extra, sums, k))
        heard += [float(x) for x in number[:2] if not np.isnan(x)]
    scale = extra["scale"]
    assert int(scale["count"]) == len(heard) == 11
    assert float(scale["mean"]) == pytest.approx(np.mean(heard), rel=1e-6)
    # The first batch is measured around zero: float32 keeps offset^2 / 1e7 of it.
    assert float(scale["squares"]) == pytest.approx(np.var(heard) * 11, rel=1e-5 + (offset / 1e3) ** 2 * 0.05)
    if offset:
        ones = np.float32(heard)
        naive = float(np.mean(ones * ones, dtype=np.float32) - np.mean(ones, dtype=np.float32) ** 2)
        assert abs(naive - np.var(heard)) > 0.1 * np.var(heard), "negative control"
    # Who always says the mean has an mse of 1 over all of them.
    deviation = np.sqrt(scale["squares"] / 11)
    assert np.mean(((np.array(heard) - scale["mean"]) / deviation) ** 2) == pytest.approx(
        1, rel=0.25 if offset else 1e-4
    )


def test_the_unit_of_the_numbers_has_no_say():
    task, variables, batch = made()
    scaled = dict(count=SCALE["count"], mean=np.float32(2 * 1000 + 50), squares=np.float32(1e6))
    one = run(task, variables, batch)
    two = run(task, variables | {"scale": scaled}, batch | {"label": NUMBER * 1000 + 50})
    assert two[0]["regression"][0] == pytest.approx(one[0]["regression"][0], rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), two[4], one[4])
    np.testing.assert_allclose(two[3]["value"], one[3]["value"] * 1000 + 50, rtol=1e-4)
    moved = run(task, variables, batch | {"label": NUMBER * 1000 + 50})
    assert moved[0]["regression"][0] > 100 * one[0]["regression"][0], "negative control: the old scale"


def test_the_first_batch_is_measured_by_itself():
    task, variables, batch = made()
    nothing = {"scale": jax.tree.map(np.zeros_like, SCALE)}
    metrics = run(task, variables | nothing, batch)[1]
    assert metrics["chance_regression"] == (pytest.approx(2, rel=1e-5), 2)
    alike = run(task, variables | nothing, batch | {"label": np.full(3, 7, np.float32)})
    assert alike[1]["chance_regression"] == (0, 2)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(alike[4]))


def test_rows_without_a_number_teach_nothing():
    task, variables, batch = made()
    number = np.array([np.nan, 1.5, 9.0], np.float32)
    losses, metrics, _, answer, gradient = run(task, variables, batch | {"label": number})
    assert losses["regression"] == (pytest.approx(((answer["value"][1] - 1.5) / 0.5) ** 2, rel=1e-4), 1)
    assert metrics["labelled_share"] == (1, 2)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    losses, _, sums, _, gradient = run(task, variables, batch | {"label": np.full(3, np.nan, np.float32)})
    assert losses["regression"] == (0, 0)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))
    after = task.after_step(None, {"scale": SCALE}, sums, 0)["scale"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), SCALE)


def test_nothing_in_the_padding_is_heard():
    task, variables, batch = made()
    value = run(task, variables, batch)[3]["value"]
    np.testing.assert_array_equal(run(task, variables, make_batch(padding=np.nan, label=NUMBER))[3]["value"], value)
    assert np.abs(run(task, variables, make_batch(1, label=NUMBER))[3]["value"] - value).max() > 1e-3


def test_pictures_alarms_and_mistakes():
    task, variables, batch = made()
    shown = look(task, variables, batch | {"label": np.array([3.5, np.nan, 1], np.float32)})
    assert shown["target"].shape == shown["output"].shape == (3, 24, 1)
    assert shown["target"][:2, 0, 0].tolist() == [3.5, 2.0]
    assert shown["target"][1, COUNTS[1] :].tolist() == [[0.0]] * 7
    head = dict(kernel=np.zeros_like(variables["params"]["head"]["kernel"]), bias=np.zeros(1, np.float32))
    deaf = variables | {"params": {**variables["params"], "head": head}}
    found = means(*run(task, deaf, batch)[:2])
    assert set(task.health(found, 1000)) == {"constant_prediction", "stuck_at_chance"}
    assert task.health(found, 999) == {}
    same = means(*run(task, variables, batch | {"label": np.full(3, 2, np.float32)})[:2])
    assert set(task.health(same, 1000)) == {"one_number"}
    with pytest.raises(UserError, match="loss='rmse': choose from mse, l1, huber"):
        task.clone(loss="rmse").apply(variables, batch, step=0, train=False)
    with pytest.raises(UserError, match=r"must be a number here: set config\.data\.label=number:FIELD"):
        task.apply(variables, batch | {"label": np.zeros(3, np.int32)}, step=0, train=False)
    assert (task.needs, task.sizes()) == (("label",), {})

"""HuBERT learns from the context, and says when it cannot."""

import jax
import numpy as np
import optax
import pytest
from tiny_hubert import (
    CODES,
    LARGE,
    SAMPLES,
    make_batch,
    make_run,
    make_task,
    means,
    random_params,
)


@pytest.fixture(scope="module")
def model():
    """(task, parameters, jitted run) with published weights; features know only their own samples."""
    task = make_task(encoder=LARGE, feature_penalty=0.0)
    return task, random_params(task), make_run(task)


def train(batches, steps: int = 150) -> dict[str, float]:
    """Mean losses and metrics over the last ten of `steps` updates on batch after batch."""
    task = make_task(feature_penalty=0.0, unit_hop=20)
    params, tx, run = random_params(task), optax.adam(3e-3), make_run(task)
    state, seen = tx.init(params), []
    update = jax.jit(lambda gradient, state: tx.update(gradient, state))
    for step in range(steps):
        losses, metrics, gradient = run(params, next(batches), seed=step)
        with jax.numpy_dtype_promotion("standard"):
            changes, state = update(gradient, state)
        params = optax.apply_updates(params, changes)
        seen.append({**losses, **metrics})
    return means({name: np.sum([s[name] for s in seen[-10:]], axis=0) for name in seen[0]})


def pulses(rng, silent: bool):
    """Batches in which a row's one unit is the period of its pulses, or of rows that say nothing."""
    while True:
        unit = rng.integers(0, CODES, 8)
        noise = rng.normal(0, 500, (8, SAMPLES))
        time = np.arange(SAMPLES)
        audio = noise + 20000 * (time % (3 + unit[:, None]) == 0)
        units = np.repeat(unit[:, None], SAMPLES // 20, axis=1)
        if silent:
            audio, units = 0 * audio, rng.choice(CODES, units.shape, p=[0.4, *[0.1] * 6])
        yield dict(
            audio=audio.astype(np.int16), lengths=np.full(8, SAMPLES, np.int32), units=units.astype(np.int32)
        )  # fmt: skip


def test_it_learns_units_from_the_context_and_says_when_it_cannot():
    """Silence says nothing of its units, so all that can be learnt is their frequency: the collapse itself."""
    task = make_task()
    learnt = train(pulses(np.random.default_rng(0), silent=False))
    assert learnt["accuracy"] > 0.9 > 0.4 > learnt["chance_accuracy"]
    assert learnt["masked"] < 0.5 * learnt["chance_masked"]
    assert task.health(learnt, 2000) == {}

    collapsed = train(pulses(np.random.default_rng(0), silent=True))
    assert collapsed["accuracy"] == pytest.approx(collapsed["chance_accuracy"], abs=0.05)  # 1,500 draws, +-0.013
    alarms = task.health(collapsed, 2000)
    assert set(alarms) == {"constant_prediction", "stuck_at_chance"}
    assert "optim.learning_rate" in alarms["constant_prediction"]
    assert "task.unit_hop" in alarms["stuck_at_chance"]
    assert task.health(collapsed, 200) == {}, "early on every run is there"


def test_labels_that_cannot_teach_raise_alarms(model):
    task, params, run = model
    batch = make_batch()
    one = means(*run(params, batch | {"units": np.full_like(batch["units"], 2)})[:2])
    assert set(task.health(one, 2000)) == {"units_collapsed"}
    assert one["target_perplexity"] == pytest.approx(1)
    assert one["chance_accuracy"] == 1
    few = np.where(np.random.default_rng(0).random(batch["units"].shape) < 0.8, -1, batch["units"])
    assert "unlabelled" in task.health(means(*run(params, batch | {"units": few})[:2]), 10)
    assert task.health(means(*run(params, batch)[:2]), 10) == {}, "negative control"


def test_only_unmasked_training_has_its_own_alarms():
    task = make_task(masked_weight=0.0, unmasked_weight=1.0)
    values = dict(labelled_share=1.0, target_perplexity_unmasked=5.0, prediction_perplexity_unmasked=1.0)
    bad = values | dict(unmasked=1.7, chance_unmasked=1.7, accuracy_unmasked=0.3, chance_accuracy_unmasked=0.3)
    assert set(task.health(bad, 2000)) == {"constant_prediction", "stuck_at_chance"}
    # Answers that are right more often than a constant one have been learnt, whatever the loss.
    assert set(task.health(bad | dict(accuracy_unmasked=0.4), 2000)) == {"constant_prediction"}

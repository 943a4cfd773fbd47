"""The loop: resume is exact, the mesh does not matter, nothing recompiles, non-finite steps change nothing."""

import json
import logging
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from speechjax import config as configs
from speechjax import sharding
from speechjax.data.pipeline import batch_spec
from speechjax.data.plan import Plan, Shape
from speechjax.errors import DONE, NOT_FINITE, UserError
from speechjax.logs import read_metrics
from speechjax.optim import make_optimizer
from speechjax.schedule import Best, Schedule
from speechjax.step import batch_shapes, compile_steps, init_state, train_step
from speechjax.train import train
from tests.choice import some

TIMING = {"seconds", "steps_per_second", "input_wait_share", "audio_hours_per_second"}


def smoke_config(*overrides: str) -> ConfigDict:
    config = configs.load(
        "configs/pretrain/wav2vec2.py:size=tiny,smoke",
        ["optim.learning_rate=0.01", "train.log_every=2", "train.checkpoint_every=2", *overrides],
    )
    config.unlock()
    del config.evals["picture"], config.evals["probe"]
    return config


class Noise:
    """Synthetic recordings in memory, with the interface of speechjax.data.pipeline.Data."""

    sample_rate = 16000
    digest = "noise"

    def __init__(self, shapes=((4, 16080),), fail_at: int | None = None, poison: tuple[int, ...] = ()):
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(7000, 16000, 24)
        self.audio = [(rng.standard_normal(n) * 3000).astype(np.int16) for n in self.lengths]
        self.plan = Plan(self.lengths, [Shape(*s) for s in shapes], seed=0)
        self.specs = [batch_spec(shape) for shape in self.plan.shapes]
        self.fail_at, self.poison = fail_at, poison

    def read(self, rows):
        audio = np.zeros((rows.shape.rows, rows.shape.samples), np.int16)
        for r, (example, start, count) in enumerate(np.concatenate([rows.example, rows.start, rows.count], axis=1)):
            audio[r, :count] = self.audio[example][start : start + count]
        ones = np.ones(rows.shape.rows, np.float32)
        lengths = rows.count[:, 0].astype(np.int32)
        return dict(audio=audio, lengths=lengths, mean=0 * ones, std=0.1 * ones, unread=0 * lengths)

    def train_batches(self, start, stop, host=0, hosts=1):
        for k in range(start, stop):
            if k == self.fail_at:
                raise RuntimeError("the machine goes down here")
            batch = self.read(self.plan.batch(k))
            if k in self.poison:
                batch["std"] = batch["std"] * np.nan
            yield batch

    def valid_batches(self, host=0, hosts=1):
        yield self.read(self.plan.batch(10**6))


def leaves(workdir, step, item="checkpoints"):
    """The arrays of one checkpoint, by path."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((workdir / item).absolute()) as manager:
        found = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(found)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of five steps without interruption."""
    workdir = tmp_path_factory.mktemp("straight")
    config = smoke_config("train.steps=5", "train.eval_every=2")
    assert train(config, Noise(), workdir) == DONE
    return workdir


def test_a_resumed_run_says_when_the_data_has_changed(straight, tmp_path, caplog):
    shutil.copytree(straight, tmp_path / "run")
    config = smoke_config("train.steps=6", "train.eval_every=2")
    data = Noise()
    data.digest = "one file more"
    assert train(config, data, tmp_path / "run") == DONE
    assert "the data is not what it was before step 5" in caplog.text
    caplog.clear()
    assert train(config, data, tmp_path / "run") == DONE
    assert "the data is not what it was" not in caplog.text


@pytest.mark.parametrize("steps_done", some([2, 3], [3]))  # just saved; one step after
def test_interrupted_run_is_the_straight_one_bitwise(straight, tmp_path, steps_done):
    config = smoke_config("train.steps=5", "train.eval_every=2")
    # An error comes where its batch would have come.
    with pytest.raises(RuntimeError, match="goes down"):
        train(config, Noise(fail_at=steps_done + 1), tmp_path)
    assert train(config, Noise(), tmp_path) == DONE
    assert_same(leaves(straight, 5), leaves(tmp_path, 5))
    assert_same(leaves(straight, 2), leaves(tmp_path, 2))


@pytest.mark.slow
def test_other_data_order_differs(straight, tmp_path):
    """Negative control of the test above: another seed is another run."""
    train(smoke_config("train.steps=5", "train.eval_every=2", "train.seed=1"), Noise(), tmp_path)
    a, b = leaves(straight, 5), leaves(tmp_path, 5)
    assert any(not np.array_equal(a[k], b[k]) for k in a)


def test_metrics_are_logged_once_and_alike(straight, tmp_path):
    config = smoke_config("train.steps=5", "train.eval_every=2")
    with pytest.raises(RuntimeError):
        train(config, Noise(fail_at=4), tmp_path)  # step 3 is done, unsaved
    train(config, Noise(), tmp_path)

    def stripped(workdir):
        return [{k: v for k, v in e.items() if k not in TIMING} for e in read_metrics(workdir)]

    assert stripped(tmp_path) == stripped(straight)
    assert [(e["step"], e["split"]) for e in stripped(straight)] == [
        (2, "train"),
        (2, "valid"),
        (4, "train"),
        (4, "valid"),
        (5, "train"),
        (5, "valid"),
    ]


def test_metrics_say_loss_and_chance(straight):
    entry = read_metrics(straight)[0]
    assert {"loss", "contrastive", "chance_contrastive", "accuracy", "chance_accuracy"} <= entry.keys()
    assert {"code_perplexity", "prob_perplexity", "grad_norm", "input_wait_share", "learning_rate"} <= entry.keys()
    total = entry["contrastive"] + entry["diversity"] + entry["feature_penalty"]
    assert entry["loss"] == pytest.approx(total, rel=0.02)  # means of ratios against ratio of sums


def test_finished_run_is_left_alone(straight):
    before = (straight / "metrics.jsonl").read_bytes()
    assert train(smoke_config("train.steps=5", "train.eval_every=2"), Noise(), straight) == DONE
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_broken_newest_checkpoint_falls_back(straight, tmp_path, caplog):
    import shutil

    shutil.copytree(straight, tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/5/state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with caplog.at_level(logging.INFO, "speechjax"):
        assert train(smoke_config("train.steps=5", "train.eval_every=2"), Noise(), tmp_path / "run") == DONE
    assert "checkpoint 5" in caplog.text
    assert "resuming at step 4" in caplog.text
    assert (tmp_path / "run/checkpoints/5.broken").is_dir()
    assert_same(leaves(straight, 5), leaves(tmp_path / "run", 5))


def run_steps(mesh_options, steps=2, dtype="float32"):
    """Losses, gradient norms and parameters after a few steps on one mesh."""
    config = smoke_config(f"model.dtype={dtype}")
    task, data = configs.make_task(config), Noise()
    devices, data_axis, fsdp = mesh_options
    mesh = sharding.make_mesh(data=data_axis, fsdp=fsdp, devices=jax.devices()[:devices])
    tx, _ = make_optimizer(steps=10, **config.optim)
    with jax.set_mesh(mesh):
        init = lambda: init_state(task, tx, 0, batch_shapes(data.specs[0], mesh))  # noqa: E731
        place = sharding.state_sharding(mesh, jax.eval_shape(init), rules=((".*", "fsdp"),))
        state = jax.jit(init, out_shardings=place)()
        [program] = compile_steps(task, tx, mesh, state, data.specs, seed=0, log_every=100).values()
        for batch in data.train_batches(0, steps):
            state, meters = program(state, sharding.global_batch(mesh, batch))
        return jax.device_get((meters, state.params))


def test_one_device_is_four_devices_and_fsdp_changes_nothing(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 2)  # so that the miniature's parameters are split too
    one = run_steps((1, 1, 1))
    for mesh_options in ((4, 4, 1), (4, 2, 2)):
        other = run_steps(mesh_options)
        # Two steps of Adam at 0.01 from sums in another order: 1e-5 is rounding, a wrong reduction is 1e-1.
        for name in one[0]:
            np.testing.assert_allclose(other[0][name], one[0][name], rtol=2e-4, atol=1e-5, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3), other[1], one[1])
    fewer = run_steps((1, 1, 1), steps=1)  # negative control
    assert abs(fewer[0]["loss"][0] - one[0]["loss"][0]) > 0.1


def test_compiles_once_a_shape_and_never_again(tmp_path, caplog):
    data = Noise(shapes=((8, 11280), (4, 16080)))
    jax.clear_caches()
    with caplog.at_level(logging.INFO, "speechjax"), jax.log_compiles(False):
        assert train(smoke_config("train.steps=6", "train.eval_every=6"), data, tmp_path) == DONE
    assert caplog.text.count("compiled the step") == 2
    used = {data.plan.batch(k).shape for k in range(6)}
    assert len(used) == 2  # both shapes were really trained on


def test_non_finite_steps_change_nothing_but_the_counters():
    config = smoke_config()
    task, data = configs.make_task(config), Noise(poison=(1,))
    task = task.clone(encoder=task.encoder.clone(frontend={**dict(task.encoder.frontend), "normalize": True}))
    tx, _ = make_optimizer(steps=10, **config.optim)
    batches = list(data.train_batches(0, 3))
    state = init_state(task, tx, 0, {k: jnp.asarray(v) for k, v in batches[0].items()})
    step = jax.jit(lambda s, b: train_step(task, tx, 0, 100, s, b))
    after_good, _ = step(state, batches[0])
    after_bad, meters = step(after_good, batches[1])
    assert int(after_bad.skipped) == 1
    assert int(after_bad.step) == 2
    for part in ("params", "opt_state", "meters"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after_bad, part), getattr(after_good, part))
    assert int(meters["skipped_in_row"]) == 1
    after_more, _ = step(after_bad, batches[2])
    assert int(after_more.skipped_in_row) == 0
    assert optax.tree.norm(jax.tree.map(jnp.subtract, after_more.params, after_bad.params)) > 0


@pytest.mark.slow
def test_run_stops_when_nothing_is_finite(tmp_path):
    config = smoke_config("train.steps=20", "train.max_skipped=4", "train.eval_every=20")
    config.model.frontend.normalize = True
    data = Noise(poison=tuple(range(3, 20)))
    assert train(config, data, tmp_path) == NOT_FINITE
    entries = read_metrics(tmp_path)
    assert entries[-1]["step"] < 12
    assert any(e["split"] == "alarm" and e["name"] == "not_finite" for e in entries)


@pytest.mark.slow
def test_early_stopping_and_best_checkpoint(tmp_path):
    config = smoke_config(
        "train.steps=40", "train.eval_every=2", "train.patience=2", "train.best_mode=max",
        "train.best_metric=valid/gumbel_temperature",
    )  # fmt: skip
    assert train(config, Noise(), tmp_path) == DONE
    # The temperature falls from the start: the first evaluation stays the best, two more are waited for.
    assert max(e["step"] for e in read_metrics(tmp_path)) == 6
    assert [p.name for p in (tmp_path / "best").iterdir() if p.name.isdigit()] == ["2"]
    assert (tmp_path / "checkpoints/6").is_dir()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config, Noise(), tmp_path) == DONE  # given again: stopped is stopped
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "checkpoints/7").exists()


def test_best_metric_that_is_not_evaluated_is_named(tmp_path):
    with pytest.raises(UserError, match=r"best_metric='answers/accuracy': config\.evals has .*valid"):
        smoke_config("train.best_metric=answers/accuracy")
    config = smoke_config("train.best_metric=valid/wer", "train.eval_every=2")
    with pytest.raises(UserError, match=r"valid/wer.*valid/contrastive"):
        train(config, Noise(), tmp_path)


@pytest.mark.slow
def test_best_metric_of_an_evaluator_that_is_not_always_due(tmp_path):
    config = smoke_config("train.steps=4", "train.eval_every=1", "evals.valid.every=2")
    assert train(config, Noise(), tmp_path) == DONE
    assert [e["step"] for e in read_metrics(tmp_path) if e["split"] == "valid"] == [2, 4]


def test_no_number_is_no_best_and_others_still_are():
    best = Best(Schedule(1, 0, 1, 1, 1, 1, "a", "max", 3, 1))
    values = [math.nan, 0.5, math.nan, 0.7]
    assert [best.update(i, {"a": v}) for i, v in enumerate(values)] == [False, True, False, True]
    assert (best.value, best.step, best.worse) == (0.7, 3, 0)


def test_best_minimum_and_patience():
    schedule = Schedule(1, 0, 1, 1, 1, 1, "a", "min", 2, 1)
    best = Best(schedule)
    assert [best.update(i, {"a": v}) for i, v in enumerate([3.0, 2.0, 2.5])] == [True, True, False]
    assert not best.exhausted
    best = Best(schedule, **json.loads(json.dumps(best.to_json())))  # as a resumed run does
    best.update(3, {"a": 2.0})
    assert best.exhausted

"""The batches of a config without its data, against those that the pipeline makes."""

from typing import Any

import numpy as np
import pytest

from speechjax import config as configs
from speechjax.ahead.batch import longest_shape, task_spec
from speechjax.data.plan import Shape
from speechjax.errors import UserError
from speechjax.experiment import open_data
from tests.tasks.experiments import EXPERIMENTS, HEADS, REPO, experiment, make_batch


@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "classify", "several"])
def test_batches_are_those_that_the_pipeline_makes(name):
    """The embedded recordings are longer than a crop, so the longest shape is known without them."""
    theirs, config, task = of_the_pipeline(name, "data.crop_seconds=2.5")
    assert task_spec(config, task, longest_shape(config, task)) == theirs


@pytest.mark.parametrize("name", ["ctc", "phones-ctc"])
def test_transcripts_have_room(name):
    theirs, config, task = of_the_pipeline(name)
    ours = task_spec(config, task, Shape(*theirs["audio"][0]))
    assert ours.keys() == theirs.keys()
    (rows, most), dtype = theirs["tokens"]
    assert (ours["tokens"][0][0], ours["tokens"][1]) == (rows, dtype)
    assert most <= ours["tokens"][0][1] < 2 * most


def of_the_pipeline(name: str, *overrides: str) -> tuple[Any, Any, Any]:
    """What batches of an experiment are once its data is open; the experiment, and its task."""
    spec, more = HEADS[name] if name in HEADS else (EXPERIMENTS[name], [])
    config: Any = configs.load(spec, [*more, *overrides, "data.source=embedded:0.02"])
    task = configs.make_task(config)
    return open_data(config, task, None).specs[-1], config, task


def test_filled_rows_have_room_for_all_segments():
    config: Any = configs.load(
        f"{REPO}/configs/pretrain/wav2vec2.py:size=large,smoke", ["data.fill=True", "data.crop_seconds=10.0"]
    )
    task = configs.make_task(config)
    theirs, ours = open_data(config, task, None).specs[0], task_spec(config, task, longest_shape(config, task))
    assert theirs.keys() == ours.keys()
    assert theirs["audio"] == ours["audio"]
    assert 1 < theirs["starts"][0][1] <= ours["starts"][0][1] <= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXPERIMENTS, *HEADS])
def test_every_experiment_has_a_batch(name):
    config, task = experiment(name)
    spec, batch = task_spec(config, task, Shape(4, 20000)), make_batch(task)
    assert spec.keys() == batch.keys()
    assert {key: np.dtype(dtype) for key, (_, dtype) in spec.items()} == {key: x.dtype for key, x in batch.items()}


def test_what_only_the_data_knows_must_be_said():
    config: Any = configs.load(f"{REPO}/configs/finetune/ctc.py:size=tiny,smoke")
    shape = Shape(4, 20000)
    with pytest.raises(UserError, match=r"config\.task\.classes=0 leaves .* set --config\.task\.classes=N"):
        task_spec(config, configs.make_task(config), shape)
    config.task.classes = 9
    assert "tokens" in task_spec(config, configs.make_task(config), shape)
    config: Any = configs.load(f"{REPO}/configs/finetune/regress.py:size=tiny,smoke", ["data.label="])
    with pytest.raises(UserError, match=r"learns from 'label': set --config\.data\.label=meta:FIELD"):
        task_spec(config, configs.make_task(config), shape)
    config, task = experiment("wav2vec2")
    config = config.copy_and_resolve_references()
    config.data.crop_seconds = 0.0
    with pytest.raises(UserError, match=r"config\.data\.crop_seconds=0\.0: must be above 0"):
        longest_shape(config, task)

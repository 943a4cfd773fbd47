"""Fine-tuning configs: the encoder of a run, what trains, and what is left to the data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechjax.config import claim_workdir, load, to_json
from speechjax.errors import UserError
from speechjax.models.adapters import trainable_pattern
from speechjax.optim import schedule

REPO = Path(__file__).resolve().parent.parent
FINETUNE = str(REPO / "configs/finetune/ctc.py")


def a_run(folder: Path, spec: str = "configs/pretrain/apc.py:size=tiny,smoke", **model: Any) -> Path:
    """A workdir with a config and a checkpoint of which only the name is looked at."""
    (folder / "checkpoints" / "7").mkdir(parents=True)
    config = to_json(load(str(REPO / spec)))
    config["model"] |= model
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fine_tuning_takes_the_encoder_of_the_run_it_begins_with(tmp_path):
    run = a_run(tmp_path)
    found, there = (
        load(FINETUNE, [f"init_from={run}"]).model,
        load(str(REPO / "configs/pretrain/apc.py:size=tiny,smoke")),
    )
    assert (found.frontend.name, found.width, found.block.name) == ("mel", 32, "gru")
    assert found.frontend == there.model.frontend
    assert found.activation_dropout == 0.1  # how to train is fine-tuning's
    assert load(FINETUNE, [f"init_from={run}", "model.layers=5"]).model.layers == 5


def test_without_a_run_fine_tuning_begins_with_base_from_scratch():
    found = load(FINETUNE).model
    assert (found.width, found.layers, found.frontend.name) == (768, 12, "waveform")
    assert load(f"{FINETUNE}:size=tiny").model.width == 128


def test_the_recipe_for_a_cpu_trains_any_encoder(tmp_path):
    run = a_run(tmp_path)
    found, recipe = load(f"{FINETUNE}:size=tiny", [f"init_from={run}"]), load(f"{FINETUNE}:size=tiny")
    assert (found.model.frontend.name, found.model.width) == ("mel", 32)
    assert (found.data, found.optim, found.train) == (recipe.data, recipe.optim, recipe.train)
    assert found.model.dropout == recipe.model.dropout == 0.1


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(FINETUNE, [f"init_from={tmp_path / 'gone'}"])


@pytest.mark.parametrize(
    ("trains", "freeze"),
    [
        ("head", [("^encoder/", 0, -1)]),
        ("top2", [("/layer-(1|2)/", 0, 0), ("^encoder/", 0, -1)]),
        ("lora", [(trainable_pattern([dict(kind="lora", name="task")]), 0, 0), ("^encoder/", 0, -1)]),
    ],
)
def test_what_trains_is_said_in_the_path_grammar(trains, freeze):
    assert [tuple(rule) for rule in load(f"{FINETUNE}:size=tiny,trains={trains}").optim.freeze] == freeze


@pytest.mark.parametrize(
    ("arg", "gpus", "samples", "steps", "rate", "mask", "channels", "layerdrop", "wait"),
    [  # fairseq's configurations: base_*.yaml, vox_*.yaml, and HuBERT's base_10h.yaml
        ("labels=10m", 8, 3.2e6, 13_000, 5e-5, 0.65, 0.25, 0.1, 10_000),
        ("labels=10h,size=base", 8, 3.2e6, 20_000, 5e-5, 0.65, 0.5, 0.05, 10_000),
        ("labels=960h", 8, 3.2e6, 320_000, 1e-4, 0.5, 0.1, 0.1, 0),
        ("labels=10m,size=large", 20, 1.28e6, 13_000, 1e-4, 0.65, 0.25, 0.1, 10_000),
        ("labels=1h,recipe=large", 20, 1.28e6, 13_000, 3e-4, 0.75, 0.25, 0.1, 10_000),
        ("labels=10h,size=large", 20, 1.28e6, 20_000, 1e-4, 0.75, 0.25, 0.1, 10_000),
        ("labels=100h,size=large", 20, 1.28e6, 80_000, 3e-5, 0.5, 0.5, 0.1, 10_000),
        ("labels=960h,size=large", 24, 1.28e6, 320_000, 3e-5, 0.5, 0.25, 0.1, 10_000),
        ("labels=10h,recipe=hubert", 1, 3.2e6, 25_000, 2e-5, 0.75, 0.5, 0.1, 10_000),
    ],
)
def test_recipes_are_those_published(arg, gpus, samples, steps, rate, mask, channels, layerdrop, wait):
    config = load(f"{FINETUNE}:{arg}")
    assert config.data.batch_seconds == gpus * samples / 16000
    assert (config.train.steps, config.optim.learning_rate) == (steps, rate)
    assert (config.task.mask_prob, config.task.channel_mask_prob) == (mask, channels)
    assert (config.task.mask_span, config.task.channel_mask_span) == (10, 64)
    assert config.model.layerdrop == layerdrop
    waits = [rule[2] for rule in config.optim.freeze if rule[0] == "^encoder/"]
    assert waits == [wait] * bool(wait)


def test_huberts_schedule_stops_long_before_its_floor():
    optim = load(f"{FINETUNE}:labels=10h,recipe=hubert").optim
    rate = schedule(steps=25_000, **{key: optim[key] for key in ("learning_rate", "warmup", "hold", "decay", "floor")})
    published = 2e-5 * 0.05 ** (np.arange(0, 17_001, 1000) / 72_000)
    assert np.allclose(rate(np.arange(8000, 25_001, 1000)), published, rtol=1e-4)


def test_a_recipe_that_was_not_published_is_named():
    with pytest.raises(UserError, match="recipe=hubert: published for labels=10h, not 1h"):
        load(f"{FINETUNE}:labels=1h,recipe=hubert")


def test_what_cannot_train_is_named():
    with pytest.raises(UserError, match="trains='tail': choose from all, head, topK"):
        load(f"{FINETUNE}:size=tiny,trains=tail")


def test_classes_left_to_the_data_stay_what_the_data_said(tmp_path):
    """The command is the same when given again; what the run found out is in its config.json."""
    config = load(f"{FINETUNE}:size=tiny,smoke")
    claim_workdir(tmp_path, config)
    with config.unlocked():
        config.task.classes = 31
    claim_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("")
    again = load(f"{FINETUNE}:size=tiny,smoke")
    claim_workdir(tmp_path, again)
    assert again.task.classes == 31
    again.task.classes = 30
    with pytest.raises(UserError, match=r"task.classes: 31 -> 30"):
        claim_workdir(tmp_path, again)


def test_adapters_come_on_top_of_those_of_the_run(tmp_path):
    """Or the second user's adapter would be trained on a base that has lost the task's."""
    lora = dict(kind="lora", name="domain", rank=2)
    run = a_run(tmp_path, adapters=(lora,))
    plain, more = (load(f"{FINETUNE}:trains={what}", [f"init_from={run}"]).model.adapters for what in ("all", "lora"))
    assert [block["name"] for block in plain] == ["domain"]
    assert [block["name"] for block in more] == ["domain", "task"]

"""Fine-tuning configs: the encoder of a run, what trains, and what is left to the data."""

import json
from pathlib import Path
from typing import Any

import pytest

from speechjax.config import claim_workdir, load, to_json
from speechjax.errors import UserError
from speechjax.models.adapters import trainable_pattern

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

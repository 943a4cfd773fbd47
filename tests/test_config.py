"""Configs: all of the project's load, overrides keep their types, and every mistake is named in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from speechjax import config as configs
from speechjax.config import check_kwargs, claim_workdir, eval_class, load, parse_arg, task_class, to_json
from speechjax.errors import UserError

REPO = Path(__file__).resolve().parent.parent
FILES = sorted((REPO / "configs").rglob("*.py"))
TINY = f"{REPO}/configs/pretrain/wav2vec2.py:size=tiny"


def sizes(file: Path) -> list[str]:
    """The choices that the error for a wrong one lists."""
    with pytest.raises(UserError) as caught:
        load(f"{file}:size=?")
    return str(caught.value).split("choose from ")[1].split(", ")


def mistake(spec: str, *overrides: str) -> str:
    """The message of the UserError that loading ends in; always one line."""
    with pytest.raises(UserError) as caught:
        load(spec, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edited(tmp_path: Path, edit: str) -> str:
    """A config file of a user: the tiny one with one more statement."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from speechjax.config import load\n\n\n"
        f"def get_config(arg=''):\n    config = load({TINY!r}).copy_and_resolve_references()\n"
        f"    config.unlock()\n    {edit}\n    return config\n"
    )
    return str(file)


# ---- the project's own


@pytest.mark.parametrize("extra", ["", ",smoke"])
@pytest.mark.parametrize(
    ("file", "size"), [(f, s) for f in FILES for s in sizes(f)], ids=lambda x: x.stem if isinstance(x, Path) else x
)
def test_every_config_loads_and_builds_its_task(file, size, extra):
    config = load(f"{file}:size={size}{extra}")
    assert config.is_locked
    step, first = configs.make_task(config).encoder.frame_len()
    assert step > 0 <= first
    assert json.loads(json.dumps(to_json(config))) == to_json(config)


def test_without_arguments_it_is_the_published_base():
    file = REPO / "configs/pretrain/wav2vec2.py"
    assert to_json(load(str(file))) == to_json(load(f"{file}:size=base"))
    assert len(sizes(file)) == 3
    assert to_json(load(str(file))) != to_json(load(f"{file}:size=tiny"))


# ---- the argument after the colon


def test_arguments_take_the_type_of_their_default():
    allowed = dict(size=("base", "tiny"), smoke=False, layers=3, rate=0.1, name="x")
    assert parse_arg("", **allowed) == dict(size="base", smoke=False, layers=3, rate=0.1, name="x")
    found = parse_arg("size=tiny,smoke,layers=5,rate=2,name=a=b", **allowed)
    assert found == dict(size="tiny", smoke=True, layers=5, rate=2.0, name="a=b")
    assert isinstance(found["rate"], float)
    assert parse_arg("smoke=false", **allowed)["smoke"] is False
    assert parse_arg("smoke=true", **allowed)["smoke"] is True


@pytest.mark.parametrize(
    ("arg", "parts"),
    [
        ("sise=tiny", ["'sise'", "allowed: layers, size, smoke"]),
        ("size=huge", ["'huge'", "base, tiny"]),
        ("size", ["size", "base, tiny"]),
        pytest.param("layers=many", ["layers", "many"]),
        pytest.param("smoke=maybe", ["smoke", "maybe"]),
    ],
)
def test_wrong_arguments_are_named(arg, parts):
    with pytest.raises(UserError) as caught:
        parse_arg(arg, size=("base", "tiny"), smoke=False, layers=3)
    assert all(part in str(caught.value) for part in parts)


def test_a_missing_file_is_named():
    assert "no config file 'configs/none.py'" in mistake("configs/none.py:size=tiny")


# ---- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=7", 7),
        ("train.patience=-7", -7),
        ("optim.learning_rate=0.25", 0.25),
        ("optim.learning_rate=1e-4", 1e-4),
        ("optim.learning_rate=3", 3.0),
        ("model.scan=true", True),
        ("model.scan=True", True),
        ("model.frontend.bias=false", False),
        ("data.source=folder:/a/b=c", "folder:/a/b=c"),
        ("data.source=123", "123"),
        ("data.exclude=", ""),
        ("data.include=^true$", "^true$"),
        ("model.frontend.channels=(8, 16)", (8, 16)),
        ("model.frontend.channels=[8, 16]", (8, 16)),
        ("optim.weight_decay=(('bias', 0), ('.*', 0.1))", (("bias", 0), (".*", 0.1))),
        ("evals.probe.held_out=('anna',)", ("anna",)),
    ],
)
def test_overrides_of_every_type(override, value):
    key = override.split("=")[0]
    config: Any = load(TINY, [override])
    for part in key.split("."):
        config = config[part]
    assert config == value
    assert type(config) is type(value)


def test_later_overrides_win_and_nothing_else_changes():
    before = to_json(load(TINY))
    after = to_json(load(TINY, ["train.steps=5", "train.seed=1", "train.steps=6"]))
    before["train"].update(steps=6, seed=1)
    assert after == before


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=5", ["train has no 'stepz'", "allowed: ", "steps"]),
        (
            "trian.steps=5",
            ["the config has no 'trian'", "allowed: data, evals, init_from, mesh, model, optim, task, train"],
        ),
        ("model.frontend.kernel=3", ["model.frontend has no 'kernel'", "kernels"]),
        ("train.steps.more=5", ["train.steps has no 'more'"]),
        ("train.steps=many", ["train.steps=many", "expected int (now ", "), got str"]),
        ("train.steps=1.5", ["expected int", "got float"]),
        ("train.steps=true", ["expected int", "got bool"]),
        ("model.scan=1", ["expected bool", "got int"]),
        ("model.scan=yes", ["expected bool", "got str"]),
        ("optim.learning_rate=fast", ["expected float", "got str"]),
        ("optim.learning_rate=", ["expected float", "got str"]),
        ("model.frontend.channels=16", ["expected tuple", "got int"]),
        ("model=big", ["model is a block; set one of its keys: ", "width"]),
        ("model.frontend=waveform", ["model.frontend is a block", "channels"]),
        ("train.steps", ["write --config.train.steps=VALUE"]),
    ],
)
def test_wrong_overrides_are_named(override, parts):
    message = mistake(TINY, override)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("text", ["{[]: 1}", "1 +", "(", "\\", "[1, 2", "a.b", "lambda: 0", "9" * 5000])
def test_odd_values_are_a_type_error_of_the_user(text):
    assert "expected int" in mistake(TINY, f"train.steps={text}")


# ---- every block against its callable


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("task.name=wav2vec3", ["no tasks named 'wav2vec3'", "wav2vec2"]),
        ("evals.valid.name=lost", ["no evals named 'lost'", "loss", "picture"]),
        ("model.frontend.name=melody", ["config.model.frontend.name='melody'", "waveform"]),
    ],
)
def test_unknown_names_list_the_choices(override, parts):
    message = mistake(TINY, override)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        ("config.task.negativs = 5", ["config.task has no 'negativs'", "negatives"]),
        ("config.model.widht = 5", ["config.model has no 'widht'", "width"]),
        ("config.model.frontend.kernal = 5", ["config.model.frontend has no 'kernal'", "kernels"]),
        ("config.data.crop = 5", ["config.data has no 'crop'", "crop_seconds"]),
        ("config.optim.lr = 5", ["config.optim has no 'lr'", "learning_rate"]),
        ("config.mesh.expert = 5", ["config.mesh has no 'expert'", "data, fsdp, tensor"]),
        ("config.train.epochs = 5", ["config.train has no 'epochs'", "steps"]),
        ("config.evals.valid.often = 5", ["config.evals.valid has no 'often'", "every"]),
        ("config.extra = 5", ["a config has the blocks", "extra"]),
        ("del config.optim.b1", ["config.optim needs b1"]),
        ("del config.model.width", ["config.model needs width"]),
        ("del config.train.seed", ["config.train needs seed"]),
        ("del config['mesh']", ["a config has the blocks", "mesh"]),
        pytest.param(
            "config.model.positions.kernal = 5", ["config.model.positions has no 'kernal'", "kernel"],
        ),
        pytest.param(
            "del config.task['name']", ["config.task needs name"],
        ),
    ],
)  # fmt: skip
def test_a_typo_inside_a_block_is_named_with_what_is_allowed(tmp_path, edit, parts):
    message = mistake(edited(tmp_path, edit))
    assert all(part in message for part in parts), message


def test_the_edited_file_itself_is_fine(tmp_path):
    """The control of the test above."""
    assert to_json(load(edited(tmp_path, "pass"))) == to_json(load(TINY))


def test_what_the_program_gives_is_not_the_users_to_set():
    def target(*, a, b, c=3): ...

    check_kwargs("block", target, dict(a=1), given=("b",))
    check_kwargs("block", target, dict(a=1, c=1), given=("b",))
    with pytest.raises(UserError, match="block has no 'b'; allowed: a, c"):
        check_kwargs("block", target, dict(a=1, b=2), given=("b",))
    with pytest.raises(UserError, match="block needs a"):
        check_kwargs("block", target, dict(c=1), given=("b",))


@pytest.mark.parametrize(("room", "find"), [("tasks", task_class), ("evals", eval_class)])
def test_every_file_of_a_room_is_found_by_its_name(room, find):
    names = [p.stem for p in (REPO / "speechjax" / room).glob("*.py") if not p.stem.startswith("_")]
    used = {re.sub("_", "", n) for n in names}
    assert "wav2vec2" in used or "loss" in used
    for name in names:
        assert find(name).__module__ == f"speechjax.{room}.{name}"


# ---- the workdir


def test_claiming_writes_the_resolved_config(tmp_path):
    config = load(TINY, ["train.steps=5"])
    claim_workdir(tmp_path / "a" / "b", config)
    assert json.loads((tmp_path / "a/b/config.json").read_text()) == to_json(config)
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["config.json"]  # no scratch left


def test_the_same_experiment_may_go_on(tmp_path):
    """Tuples come back from JSON as lists; that is no difference."""
    config: Any = load(TINY)
    assert isinstance(config.model.frontend.channels, tuple)
    for _ in range(3):
        claim_workdir(tmp_path, load(TINY))


def begin(workdir):
    """A run that has logged something."""
    claim_workdir(workdir, load(TINY))
    (workdir / "metrics.jsonl").touch()


def test_a_run_that_never_began_binds_nobody(tmp_path):
    """What the message of a first failure advises must be possible."""
    claim_workdir(tmp_path, load(TINY))
    claim_workdir(tmp_path, load(TINY, ["data.exclude=broken", "data.source=folder:x"]))
    assert json.loads((tmp_path / "config.json").read_text())["data"]["exclude"] == "broken"


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=77", "train.log_every=3", "train.checkpoint_every=3", "train.eval_every=3", "train.keep=9",
        "mesh.data=1", "mesh.fsdp=2", "evals.valid.every=3", "evals.probe.source=folder:x",
        "data.cache_dir=elsewhere", "data.max_bad_share=0.7",
    ],
)  # fmt: skip
def test_where_how_long_and_how_often_may_change(tmp_path, override):
    begin(tmp_path)
    claim_workdir(tmp_path, load(TINY, [override]))
    key, value = override.split("=")
    config = json.loads((tmp_path / "config.json").read_text())
    for part in key.split("."):
        config = config[part]
    assert str(config) == value  # the newest is on record


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("train.seed=1", "train.seed: 0 -> 1"),
        ("optim.learning_rate=0.5", "optim.learning_rate: 0.001 -> 0.5"),
        ("data.source=folder:x", "data.source: 'embedded' -> 'folder:x'"),
        ("model.width=512", "model.width: 128 -> 512"),
        ("model.frontend.kernels=(10, 3)", "model.frontend.kernels: [10, 3, 3, 3, 3, 2, 2] -> [10, 3]"),
    ],
)
def test_another_experiment_is_refused_with_old_and_new(tmp_path, override, change):
    begin(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as caught:
        claim_workdir(tmp_path, load(TINY, [override]))
    assert change in str(caught.value)
    assert "new --workdir" in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_many_changes_are_cut_short(tmp_path):
    begin(tmp_path)
    with pytest.raises(UserError) as caught:
        claim_workdir(tmp_path, load(f"{REPO}/configs/pretrain/wav2vec2.py:size=large"))
    assert str(caught.value).count("->") == 6
    assert "; ..." in str(caught.value)


def test_a_key_that_is_gone_or_new_is_a_change(tmp_path):
    begin(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["data"]["shapes"]
    config["data"]["bucket"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"data.bucket: 3 -> 'absent'; data.shapes: 'absent' -> 3"):
        claim_workdir(tmp_path, load(TINY))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\0" * 100, b'{"train": {"seed": 0}, ', b"[]", b"3",
        pytest.param(b"\xff\xfe{"),
    ],
)  # fmt: skip
def test_a_torn_config_is_named(tmp_path, content):
    begin(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json|another experiment"):
        claim_workdir(tmp_path, load(TINY))
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_workdir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="run"):
        claim_workdir(tmp_path / "run", load(TINY))

"""The comparison: its list, its table, and one small run of the whole chain with real processes."""

import json
from pathlib import Path

import pytest

from speechjax import compare
from speechjax import config as configs
from speechjax.errors import UserError

REPO = Path(__file__).resolve().parent.parent


def arguments(tmp_path, *more: str):
    return compare.parse_args(["--source=embedded:0.05", f"--out={tmp_path}/compare", *more])


@pytest.mark.parametrize("name", sorted(compare.EXPERIMENTS))
def test_every_experiment_is_a_config(name):
    experiment = compare.EXPERIMENTS[name]
    config = configs.load(f"{REPO}/configs/pretrain/{experiment.config}.py:{experiment.arg}")
    assert config.data.batch_seconds == 16.0  # so that equal hours are equal updates, too
    earlier = list(compare.EXPERIMENTS)[: list(compare.EXPERIMENTS).index(name)]
    for other in (experiment.teacher, experiment.units.partition(":")[0]):
        assert other in ("", "mfcc", *earlier)
    if experiment.units:  # MFCC at 100 Hz, or the frames of the encoder that made them
        assert config.task.unit_hop == (160 if experiment.units == "mfcc" else 320)
        assert config.task.codes == compare.CLUSTERS


def test_every_objective_takes_part():
    tasks = {path.stem for path in (REPO / "configs/pretrain").glob("*.py")}
    assert tasks == {experiment.config for experiment in compare.EXPERIMENTS.values()}


def test_table_has_gains_and_the_untrained_features_last():
    rows = [
        {"name": "a", "probe/score": 61.0, "probe/score_random": 51.5, "probe/score_mfcc": 80.0, "peak_gib": 1.25},
        {"name": "b", "abx/within": 20.0},
    ]
    lines = compare.table(rows).splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    cells = [dict(zip(header, (c.strip() for c in line.strip("|").split("|")), strict=False)) for line in lines[2:]]
    assert cells[0]["gain"] == "+9.5"
    assert cells[0]["GiB"] == "1.2"
    assert cells[1]["ABX within"] == "20.0"
    assert cells[1]["gain"] == cells[1]["probe"] == ""
    assert cells[2]["objective"] == "(mfcc)"
    assert cells[2]["probe"] == "80.0"


def test_mistakes_are_named(tmp_path, capsys):
    for flags, message in {
        ("--only=hubret",): "--only=hubret: there are wav2vec2",
        ("--set=hubert_1",): "write NAME:KEY=VALUE",
        ("--hours=0",): "must be above 0",
    }.items():
        with pytest.raises(SystemExit):
            arguments(tmp_path, *flags)
        assert message in capsys.readouterr().err
    args = arguments(tmp_path, "--only=hubert_2")
    with pytest.raises(UserError, match="builds on hubert_1, which is not trained"):
        compare._label("hubert_1:1", args)


@pytest.mark.slow
def test_the_whole_chain(tmp_path, monkeypatch):
    """Units, a training of two steps, evaluation, table; a second call does nothing again."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(compare, "CLUSTERS", 5)
    call = compare.call  # in a corpus of one mini-batch a pass, the 100 passes are most of the time
    quick = {"speechjax.label": ["--passes=2", "--inits=2"]}
    monkeypatch.setattr(compare, "call", lambda command, log: call([*command, *quick.get(command[0], [])], log))
    smoke = {
        name: experiment._replace(arg=f"{experiment.arg},smoke", units=experiment.units.replace(":3", ":1"))
        for name, experiment in compare.EXPERIMENTS.items()
    }
    monkeypatch.setattr(compare, "EXPERIMENTS", smoke)
    argv = [
        "--source=embedded:0.03", f"--out={tmp_path}/compare", "--hours=0.006", "--aligned=embedded:0.03",
        "--only=hubert_1", "--set=hubert_1:task.codes=5", "--set=hubert_1:task.unit_hop=160",
    ]  # fmt: skip
    assert compare.run(argv) == 0
    rows = json.loads((tmp_path / "compare/compare.json").read_text())
    assert [row["name"] for row in rows] == ["hubert_1"]
    for row in rows:
        assert 0 <= row["abx/within"] <= 100
        assert row["peak_gib"] > 0.1
        assert row["steps"] >= 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "compare").rglob("trained.json")}
    assert compare.run(argv) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "compare").rglob("trained.json")}

"""`speechjax.evaluate`: the weights asked for are those scored, nothing of the run changes, mistakes are named."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax import config as configs
from speechjax import evaluate
from speechjax.data import pipeline
from speechjax.errors import DONE, UserError
from speechjax.logs import read_metrics
from speechjax.train import train

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(tmp_path_factory, cache):
    """The config of a run of three steps over some noise."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for i in range(16):
        audio = rng.standard_normal(int(rng.integers(9000, 20000))) * 0.1
        soundfile.write(folder / f"{i % 3}_speaker{i % 4}_{i}.wav", audio, 16000)
    overrides = [
        f"data.source=folder:{folder}", f"data.cache_dir={cache}", "train.steps=3", "train.eval_every=1",
        "train.checkpoint_every=1", "train.best_metric=valid/chance_accuracy",
    ]  # fmt: skip
    config = configs.load("configs/pretrain/wav2vec2.py:size=tiny,smoke", overrides)
    config.unlock()
    del config.evals["picture"], config.evals["probe"]
    return config


@pytest.fixture(scope="module")
def begun(tmp_path_factory, config):
    """A workdir in which nothing is but the config."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    configs.claim_workdir(folder, config)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config):
    """The run, finished; only ever read."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    configs.claim_workdir(workdir, config)
    encoder = configs.make_task(config).encoder
    options = dict(row_divisor=4, frame_len=encoder.frame_len(), segment_align=0, workdir=None)
    data = pipeline.open_data(seed=0, **options, **config.data.to_dict())
    assert train(config, data, workdir) == DONE
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of the run, in which a checkpoint is just being written."""
    copy = shutil.copytree(trained, tmp_path / "run")
    being_written = copy / "checkpoints" / "4.orbax-checkpoint-tmp"
    being_written.mkdir()
    (being_written / "data").write_text("half")
    return copy


def state(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "evaluate" not in str(path.relative_to(folder))
    }


def verb(*arguments, cache):
    """(exit code, output) of a real process."""
    done = subprocess.run(
        [sys.executable, "-m", "speechjax.evaluate", *map(str, arguments)], cwd=REPO, capture_output=True, text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4", "SPEECHJAX_CACHE": str(cache)}, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_every_checkpoint_scores_as_it_did_in_training(workdir, cache):
    before = state(workdir)
    during = {e["step"]: e for e in read_metrics(workdir) if e["split"] == "valid"}
    for which, step in ((["--checkpoint=newest"], 3), (["--checkpoint=1"], 1)):
        code, output = verb(f"--workdir={workdir}", *which, cache=cache)
        assert code == 0, output
        found = json.loads((workdir / "report" / "evaluate.json").read_text())
        assert (found["step"], list(found["evals"])) == (step, ["valid"])
        metrics = found["evals"]["valid"]["metrics"]
        assert metrics == pytest.approx({k: during[step][k] for k in metrics}, rel=1e-5)  # another compilation
    assert during[1]["contrastive"] != pytest.approx(during[3]["contrastive"], rel=1e-4)  # they do differ
    assert state(workdir) == before
    assert (workdir / "checkpoints" / "4.orbax-checkpoint-tmp" / "data").exists()


@pytest.mark.slow
def test_random_weights_need_neither_checkpoint_nor_the_runs_data(workdir, cache, tmp_path):
    shutil.rmtree(workdir / "checkpoints")
    shutil.rmtree(workdir / "best")
    out = tmp_path / "scores.json"
    code, output = verb(
        f"--workdir={workdir}", "--checkpoint=none", "--evals=abx", "--evals.abx.source=embedded:0.005",
        "--evals.abx.context=any", "--evals.abx.span=phone", "--evals.abx.max_items=2", f"--out={out}",
        "--config.data.source=folder:/nowhere", cache=cache,
    )  # fmt: skip
    assert code == 0, output
    found = json.loads(out.read_text())
    metrics = found["evals"]["abx"]["metrics"]
    assert found["step"] == 0
    assert found["evals"]["abx"]["options"]["max_items"] == 2
    assert metrics["within_log_mel"] < 30  # chance is 50
    assert 30 < metrics["within"] < 60
    assert (tmp_path / "scores" / "report" / "abx.json").exists()
    assert not (workdir / "report" / "evaluate.json").exists()


@pytest.mark.slow
def test_the_best_step_is_the_one_judged_best(trained):
    """Were both one step, the tests above would show nothing."""
    [best] = (trained / "best").iterdir()
    values = {e["step"]: e["chance_accuracy"] for e in read_metrics(trained) if e["split"] == "valid"}
    assert int(best.name) == min(values, key=lambda step: values[step])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evals=abcd"], "no evals named 'abcd'; there are: abx, classification"),
        (["--evals=abx"], "abx needs recordings: --evals.abx.source=embedded:0.1"),
        (["--evals=probe"], "probe needs recordings: --evals.probe.source=folder:/data/fsdd"),
        (["--evals="], "no evaluator: name some"),
        (["--evals=loss", "--evals.abx.source=embedded:0.1"], "abx is not among --evals=loss"),
        (["--evals.abx.sauce=embedded:0.1"], "evals.abx has no 'sauce'; allowed: context"),
        (["--evals.abx.layer=x", "--evals.abx.source=embedded"], "layer=x: expected int"),
        (["--config.data.sauce=x"], "data has no 'sauce'"),
        (["--out=/"], "name a file that ends in .json"),
        (["--out=/nowhere/at/all.json"], "no such folder: /nowhere/at"),
    ],
)
def test_mistakes_are_named(begun, arguments, message):
    with pytest.raises(UserError) as caught:
        evaluate.run([f"--workdir={begun}", *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_checkpoint_and_a_real_process(begun, cache):
    code, output = verb(f"--workdir={begun}", "--evals=abx", "--evals.abx.source=embedded:0.005", cache=cache)
    assert code == 1
    assert "Traceback" not in output
    assert f"error: {begun}: no such checkpoint" in output


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        evaluate.run([f"--workdir={tmp_path}"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not the config of a run"):
        evaluate.run([f"--workdir={tmp_path}"])


@pytest.mark.parametrize("arguments", [["--checkpoint=last"], ["--data.source=x"], ["--config.model.width=3"]])
def test_arguments_that_do_not_exist(arguments, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--workdir=x", *arguments])
    assert arguments[0].partition("=")[0] in capsys.readouterr().err


def test_options_are_defaults_then_config_then_command_line(begun):
    from speechjax import runs

    config = runs.read_config(begun)
    config.unlock()
    config.evals.units = dict(name="units", every=7, source="embedded:0.1", clusters=40)
    chosen = evaluate.choose(config, None, ["evals.abx.source=embedded:0.2", "evals.units.layer=2"])
    assert set(chosen) == {"valid", "units", "abx"}
    assert config.evals.units.to_dict() | {"max_frames": 0} == dict(
        name="units", every=1, source="embedded:0.1", layer=2, layers="one", clusters=40, max_frames=0, points=1000,
        seed=0,
    )  # fmt: skip
    configs.check(config)

"""The benchmark verb: its arguments, its mistakes, and its exit codes."""

import subprocess
import sys

import pytest

from speechjax import bench
from speechjax.errors import UserError


def test_the_default_source_has_the_hours_asked_for():
    assert bench.parse_args(["--what=input", "--hours=0.25"]).source == "embedded:0.25"
    assert bench.parse_args(["--what=input", "--source=folder:/a", "--hours=2"]).source == "folder:/a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--what"),
        (["--what=output"], "invalid choice: 'output'"),
        (["--what=input", "--hours=0"], "--hours=0.0: must be positive"),
        (["--what=input", "--hours=nan"], "--hours=nan: must be positive"),
        (["--what=input", "--batch-seconds=inf"], "--batch-seconds=inf: must be positive"),
        (["--what=input", "--repeats=0"], "--repeats=0: must be positive"),
        (["--what=input", "--passes=-1"], "--passes=-1: must be positive"),
        (["--what=input", "--repeats=half"], "invalid int value: 'half'"),
        (["--what=input", "--repeat=3"], "unrecognized arguments: --repeat=3"),
        (["--what=train"], "required: --config"),
        (["--what=train", "--config=a.py", "--hours=1"], "unknown argument '--hours=1'"),
        (["--what=train", "--config=a.py", "--threads=0"], "--threads=0: must be positive"),
        (["--what=train", "--config=a.py", "--batch-seconds=-1"], "--batch-seconds=-1.0: must be positive"),
        (["--what=train", "--config=a.py", "--peer=fairseq"], "invalid choice: 'fairseq'"),
        (["--what=train", "--config=a.py", "--peer=hf", "--variants=eager,fast"], "--variants=fast: choose from eager"),
        (["--what=train", "--config=a.py", "--variants=eager"], "--variants are of a --peer"),
        (["--what=inference", "--config=a.py", "--data"], "--data is of --what=train"),
        (["--what=input", "--config.train.seed=1"], "unrecognized arguments: --config.train.seed=1"),
    ],
)
def test_mistakes_in_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.parse_args(arguments)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "there", "not_there"),
    [
        ([], "--what", "--hours"),
        (["--what=train"], "--tuned-malloc", "--hours"),
        (["--what=input"], "--hours", "--peer "),
    ],
)
def test_help_has_examples_and_the_options_of_what_is_measured(arguments, there, not_there, capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.parse_args([*arguments, "--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert "python -m speechjax.bench --what=input\n" in said
    options = said[said.index("\noptions:") :]
    assert there in options
    assert not_there not in options


def test_overrides_of_the_config_are_kept_apart():
    args = bench.parse_args(
        ["--what=train", "--config=a.py", "--config.train.seed=1", "--peer=hf", "--variants=compile,bf16"]
    )
    assert args.overrides == ["train.seed=1"]
    assert args.variants == ("compile", "bf16")


def test_a_place_for_the_json_that_is_not_there_is_noticed_first(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        bench.run(["--what=input", "--source=folder:/nowhere", f"--json={tmp_path / 'deep' / 'file.json'}"])


def test_a_mistake_is_one_line_and_exit_code_1():
    done = subprocess.run(
        [sys.executable, "-m", "speechjax.bench", "--what=input", "--source=folder:/nowhere"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == "error: data source 'folder:/nowhere': no such folder: /nowhere"

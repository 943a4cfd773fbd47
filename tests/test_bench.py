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
    ],
)
def test_mistakes_in_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.parse_args(arguments)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.parse_args(["--help"])
    assert leaving.value.code == 0
    assert "python -m speechjax.bench --what=input\n" in capsys.readouterr().out


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

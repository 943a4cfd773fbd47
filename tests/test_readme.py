"""The README's commands are true: every flag loads, every target exists, every file it names is there."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from speechjax import config as configs
from speechjax import prepare
from speechjax.data.mixture import parse_mixture
from speechjax.main import parse_args

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every command line of the README, continuation lines joined, comments dropped."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def main_arguments() -> list[list[str]]:
    found = []
    for words in commands():
        if "speechjax.main" in words:
            found.append(words[words.index("speechjax.main") + 1 :])
        elif words[0] == "...":  # options added to the command before
            found.append(["--config=configs/pretrain/wav2vec2.py:size=tiny", "--workdir=x", *words[1:]])
    return found


def test_there_are_commands():
    assert len(main_arguments()) >= 3


@pytest.mark.parametrize("arguments", main_arguments(), ids=lambda a: a[-1][:40])
def test_every_main_command_loads_its_config(arguments):
    args, overrides = parse_args(arguments)
    overrides = [text for text in overrides if not text.startswith("init_from=")]  # a run of the reader's
    its_own = args.config.endswith(".json")  # of a run of the reader's, too
    config = configs.load(str(REPO / ("configs/pretrain/wav2vec2.py" if its_own else args.config)), overrides)
    for override in overrides:  # and really sets what it says
        node = config
        for key in override.partition("=")[0].split("."):
            node = node[key]
        assert str(node).replace("'", "") == override.partition("=")[2].replace("'", "")


def test_every_prepare_command_is_understood():
    found = [words for words in commands() if "speechjax.prepare" in words]
    assert found
    for words in found:
        args = prepare.parse_args(words[words.index("speechjax.prepare") + 1 :])
        assert parse_mixture(args.source)


@pytest.mark.parametrize("verb", ["convert", "export", "launch"])
def test_every_command_of_a_verb_is_understood(verb):
    module = importlib.import_module(f"speechjax.{verb}")
    found = [words for words in commands() if f"speechjax.{verb}" in words]
    assert found
    for words in found:
        assert module.parse_args(words[words.index(f"speechjax.{verb}") + 1 :])


def test_make_targets_exist():
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets == ["quickstart", "test"]
    for target in targets:
        dry = subprocess.run(["make", "--dry-run", target], cwd=REPO, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
        assert ".venv" in dry.stdout


def test_quickstart_command_loads_its_config():
    dry = subprocess.run(["make", "--dry-run", "quickstart"], cwd=REPO, capture_output=True, text=True).stdout
    line = next(line for line in dry.replace("\\\n", " ").splitlines() if "speechjax.main" in line)
    words = shlex.split(line)
    args, overrides = parse_args(words[words.index("speechjax.main") + 1 :])
    config = configs.load(str(REPO / args.config), overrides)
    assert config.data.source.startswith("embedded")
    assert args.workdir == Path("runs/quickstart")


def test_files_it_names_are_there():
    named = set(re.findall(r"\]\(([\w./]+)\)|`((?:speechjax|configs|launch)/[\w./]*)`", README))
    paths = {a or b for a, b in named}
    assert len(paths) >= 5
    for path in paths:
        assert (REPO / path).exists(), path


def test_ci_calls_the_readme_test_command():
    assert "make test" in (REPO / ".ci/run").read_text()


def test_launch_script_is_valid_shell():
    for script in (REPO / "launch").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        usage = subprocess.run(["bash", str(script)], capture_output=True, text=True)
        assert usage.returncode == 1
        assert f"launch/{script.name}" in usage.stderr

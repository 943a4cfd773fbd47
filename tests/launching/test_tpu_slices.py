"""TPU slices by name, and the script that drives one: run with stand-ins for gcloud and for the Python of its hosts."""

import json
import os
import shutil
import subprocess

import pytest

from speechjax.errors import UserError
from speechjax.launching import tpu_vm as target
from speechjax.launching import tpus
from tests.launching.plans import JOB, plan, script
from tests.launching.test_render import NASTY


@pytest.mark.parametrize(
    ("text", "hosts", "chips", "accelerator"),
    [
        ("v4:2x2x4", 4, 4, "v4-32"),
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v5e:2x4", 1, 8, "v5litepod-8"),
        ("v5e:4x4", 4, 4, "v5litepod-16"),
        ("v5p:8x8x8", 128, 4, "v5p-1024"),
        ("v6e:16x16", 64, 4, "v6e-256"),
    ],
)
def test_slices(text, hosts, chips, accelerator):
    found = tpus.parse_slice(text)
    assert (found.hosts, found.chips_per_host, found.accelerator_type) == (hosts, chips, accelerator)


@pytest.mark.parametrize("text", ["v5e", "v5e:4x4x4", "v5p:4x4", "v9:4x4", "v5e:0x4", "v5e:4x", "v6e:3x3", ""])
def test_no_slices(text):
    with pytest.raises(UserError, match=f"--tpu={text}"):
        tpus.parse_slice(text)


GCLOUD = """
printf '%s\\n' "$(printf '%q ' "$@")" >> "$FAKE/calls"
shift 2  # compute tpus
case "$1 $2" in
"queued-resources list")
    state=$(head -n 1 "$FAKE/states")
    (($(wc -l < "$FAKE/states") == 1)) || sed -i 1d "$FAKE/states"
    [[ $state == NONE ]] || echo "$state"
    ;;
"queued-resources describe") echo "no capacity" ;;
"tpu-vm scp") for host in 0 1; do cp "$3" "$FAKE/host$host/${4#*:}"; done ;;
"tpu-vm ssh")
    for last; do :; done
    code=0
    for host in 0 1; do  # as gcloud does: the first host's code that is not 0
        (cd "$FAKE/host$host" && HOME=$PWD HOST=$host bash -c "${last#--command=}") || ((code)) || code=$?
    done
    exit "$code"
    ;;
esac
"""
PYTHON = """
[[ $1 == -m ]] || exit 0
mkdir -p .venv/bin
echo 'echo "$@" > ~/pip' > .venv/bin/pip
cp "$FAKE/main" .venv/bin/python
sed -i '1i #!/bin/bash' .venv/bin/*
chmod +x .venv/bin/*
"""
MAIN = """
printf '%s\\0' "$@" > ~/heard
code=$(head -n 1 "$FAKE/codes$HOST")
sed -i 1d "$FAKE/codes$HOST"
exit "$code"
"""


@pytest.fixture(autouse=True, scope="module")
def checkout(tmp_path_factory):
    """A small one, where the TPU scripts come from."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_text("committed")
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "--no-verify", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    (folder / "pyproject.toml").write_text("changed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "ROOT", folder)
        yield


def tpu_vm(tmp_path, states: list[str], *codes: str, arguments: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    """(code, calls of gcloud) of the script with a slice of two hosts; `codes` has those of both for each start."""
    script(tmp_path / "bin", "gcloud", GCLOUD)
    script(tmp_path / "bin", "python3.11", PYTHON)
    (tmp_path / "main").write_text(MAIN)
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    for host in range(2):
        (tmp_path / f"host{host}").mkdir()
        (tmp_path / f"codes{host}").write_text("".join(f"{start.split()[host]}\n" for start in codes))
    text = plan("tpu-vm", "--setup=touch mounted", *arguments).text
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "FAKE": str(tmp_path), "LAUNCH_POLL_SECONDS": "0", "HOME": "/nowhere",
        "TMPDIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", text], env=environment, timeout=60, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert not list(tmp_path.glob("tmp.*"))  # it cleans up
    return done.returncode, [call.strip().removeprefix("compute tpus ") for call in calls]


def kinds(calls: list[str]) -> list[str]:
    """The steps of the script, without looking at the state."""
    steps = [" ".join(call.split()[:2]) for call in calls]
    return [step.rpartition(" ")[2] for step in steps if not step.endswith(("list", "scp"))]


def test_tpu_vm_from_nothing_to_done(tmp_path):
    code, calls = tpu_vm(tmp_path, ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], "0 0")
    assert code == 0
    assert kinds(calls) == ["create", "ssh", "ssh", "delete"]
    [created] = [call for call in calls if " create " in call]
    expected = (
        "create a --zone=us-east5-a --node-id=a --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --spot"
    )
    assert created == f"queued-resources {expected}"
    for host in range(2):
        home = tmp_path / f"host{host}"
        assert (home / "speechjax/pyproject.toml").read_text() == "committed"
        assert (home / "mounted").exists()
        assert "--constraint constraints.txt --editable .[tpu]" in (home / "pip").read_text()


def test_tpu_vm_hands_over_every_word(tmp_path):
    overrides = tuple(f"--config.data.exclude={text}" for text in NASTY)
    assert tpu_vm(tmp_path, ["ACTIVE"], "0 0", arguments=overrides)[0] == 0
    heard = (tmp_path / "host1/heard").read_bytes().decode().split("\0")[:-1]
    assert heard == ["-m", "speechjax.main", *JOB, *overrides]


@pytest.mark.parametrize(
    ("codes", "expected", "starts"),
    [
        (["42 42", "42 42", "0 0"], 0, 3),
        (["42 42"] * 4, 42, 3),
        (["42 1"], 1, 1),  # gcloud alone would say 42
        (["3 3"], 3, 1),
        (["42 137", "0 0"], 0, 2),
    ],
)
def test_tpu_vm_starts_again_for_42_alone(tmp_path, codes, expected, starts):
    code, calls = tpu_vm(tmp_path, ["ACTIVE"], *codes, arguments=("--restarts=2",))
    assert code == expected
    assert sum("job.bash" in call and " ssh " in call for call in calls) == starts
    assert not any(" delete " in call for call in calls)  # a slice that was there before stays


def test_tpu_vm_asks_again_when_the_slice_was_taken_away(tmp_path):
    code, calls = tpu_vm(tmp_path, ["NONE", "ACTIVE", "SUSPENDED", "DELETING", "NONE", "ACTIVE"], "42 42", "0 0")
    assert code == 0
    assert kinds(calls) == ["create", "ssh", "ssh", "ssh", "delete", "create", "ssh", "ssh", "delete"]


def test_tpu_vm_that_cannot_be_had(tmp_path):
    code, calls = tpu_vm(tmp_path, ["NONE", "FAILED"])
    assert code == 1
    assert kinds(calls) == ["create", "describe"]


def test_tpu_vm_says_what_does_not_travel():
    assert plan("tpu-vm").hints == ("1 files differ from the last commit, and only that one goes",)
    [disk, _] = plan("tpu-vm", "--workdir=runs/a").hints
    assert "all 2 must see the same folder" in disk


def test_tpu_vm_keeps_what_it_is_told_to_keep(tmp_path):
    code, calls = tpu_vm(tmp_path, ["NONE", "ACTIVE"], "0 0", arguments=("--keep",))
    assert code == 0
    assert "delete" not in kinds(calls)


@pytest.mark.slow
def test_gcloud_knows_every_flag(tmp_path):
    if not shutil.which("gcloud"):
        pytest.skip("no gcloud here")
    _, calls = tpu_vm(tmp_path, ["NONE", "ACTIVE", "SUSPENDED", "NONE", "FAILED"], "42 42")
    found = {call.split()[1]: f"gcloud compute tpus {call}" for call in calls}
    assert found.keys() == {"list", "create", "scp", "ssh", "delete", "describe"}
    environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}

    def problem(command: str) -> str | None:
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={command}"]
        done = subprocess.run(lint, env=environment, capture_output=True, text=True, check=True)
        [answer] = json.loads(done.stdout)
        return None if answer["success"] else answer["error_message"]

    for command in found.values():
        assert problem(command) is None
    assert "--spot" in str(problem(found["create"] + " --spott"))

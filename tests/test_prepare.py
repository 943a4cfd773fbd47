"""The preparing verb as a person runs it: real processes, interrupts, kills, and every mistake a person can make."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax import prepare as verb
from speechjax.data.records import open_records
from speechjax.data.shards import Shards
from speechjax.errors import UserError

REPO = Path(__file__).resolve().parent.parent
MARK = "SPEECHJAX_TEST_RUN"  # an environment variable by which a run's processes are known


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Path:
    """Twenty recordings and a text."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    for k in range(20):
        soundfile.write(folder / f"{k:02d}.wav", rng.standard_normal(9_000 + k) * 0.1, 16_000)
    (folder / "text.wav").write_text("no audio " * 9)
    return folder


@pytest.fixture(scope="session")
def much(tmp_path_factory) -> Path:
    """Work for some seconds: 400 names of three recordings that are laborious to decode."""
    folder = tmp_path_factory.mktemp("much")
    rng = np.random.default_rng(0)
    for k in range(3):
        soundfile.write(folder / f"a{k}.flac", rng.standard_normal((44_100 * 5, 2)) * 0.1, 44_100)
    for k in range(397):
        os.link(folder / f"a{k % 3}.flac", folder / f"b{k:03d}.flac")
    return folder


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "speechjax.prepare", *map(str, arguments)]


def run(*arguments: str | Path) -> tuple[int, str]:
    """(exit code, what it printed)."""
    done = subprocess.run(command(*arguments), cwd=REPO, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def start(folder: Path, speech: Path) -> subprocess.Popen:
    """A preparation by two workers, in a process group of its own as a terminal makes it.

    Where the tests run in the background of a script, interrupts are ignored, and the process would inherit that.
    """
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    prepare = command(f"--source=folder:{speech}", f"--out={folder}", "--workers=2")
    return subprocess.Popen(
        [sys.executable, "-c", listening, *prepare], cwd=REPO, text=True,
        env={**os.environ, MARK: str(folder)}, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for_shards(folder: Path, process: subprocess.Popen, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shard-*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def survivors(folder: Path) -> list[str]:
    """Processes of a run that are still there after a while that is ample for leaving."""
    mark = f"{MARK}={folder}".encode()
    deadline = time.monotonic() + 20
    while True:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text())
            except OSError:  # gone, or another user's
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def contents(folder: Path) -> dict[str, bytes]:
    """Without the statistics' page, which is drawn for people."""
    files = [path for pattern in ("shard-*", "index.npy", "*.json*") for path in folder.glob(pattern)]
    return {path.name: path.read_bytes() for path in files if path.name != "statistics.json"}


def one_line_error(output: str) -> str:
    """The error line; fails if a traceback came with it."""
    assert "Traceback" not in output, output
    [line] = [line for line in output.splitlines() if "error: " in line]
    return line


# ---- interrupted


@pytest.fixture(scope="session")
def uninterrupted(much, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, output = run(f"--source=folder:{much}", f"--out={folder}", "--workers=2")
    assert code == 0, output
    return contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["terminal", "process", "terminate"])
def test_ctrl_c_leaves_order_and_the_same_command_goes_on(much, uninterrupted, tmp_path, how):
    """A terminal sends the signal to the workers as well; a scheduler says SIGTERM to the first process."""
    folder = tmp_path / "set"
    process = start(folder, much)
    wait_for_shards(folder, process, 2)
    if how == "terminal":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT if how == "process" else signal.SIGTERM)
    asked = time.monotonic()
    _, output = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert process.returncode == 1
    assert output.splitlines()[-1] == "interrupted; the same command goes on where this one stopped"
    assert "Traceback" not in output
    assert not survivors(folder)
    assert not list(folder.glob("*.tmp"))
    assert not (folder / "dataset.json").exists()
    self_contained = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
    assert 2 <= len(self_contained) < 7
    code, output = run(f"--source=folder:{much}", f"--out={folder}", "--workers=2")
    assert code == 0, output
    assert contents(folder) == uninterrupted
    for name, when in self_contained.items():
        assert (folder / name).stat().st_mtime_ns == when


@pytest.mark.slow
def test_ctrl_c_while_the_workers_are_starting(much, tmp_path):
    folder = tmp_path / "set"
    process = start(folder, much)
    deadline = time.monotonic() + 60
    while not (folder / "preparing.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert not survivors(folder)


@pytest.mark.slow
def test_workers_leave_interrupts_to_the_first_process(much, uninterrupted, tmp_path):
    """Else each prints a traceback of its own, if it is faster than the first is in ending it."""
    folder = tmp_path / "set"
    process = start(folder, much)
    wait_for_shards(folder, process, 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    for child in children:
        os.kill(int(child), signal.SIGINT)
    _, output = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert contents(folder) == uninterrupted


@pytest.mark.slow
def test_sigkill_leaves_no_workers_and_the_same_command_goes_on(much, uninterrupted, tmp_path):
    folder = tmp_path / "set"
    for shards in (1, 3):
        process = start(folder, much)
        wait_for_shards(folder, process, shards)
        process.kill()
        process.communicate(timeout=60)
        assert not survivors(folder), "workers wait for a parent that is dead"
    code, output = run(f"--source=folder:{much}", f"--out={folder}", "--workers=2")
    assert code == 0, output
    assert contents(folder) == uninterrupted
    assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
def test_two_at_once(much, uninterrupted, tmp_path):
    both = [start(tmp_path / "set", much) for _ in range(2)]
    outputs = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("another process is preparing" in output for output in outputs) == 1
    assert contents(tmp_path / "set") == uninterrupted


@pytest.mark.slow
def test_a_full_disk_and_then_room(speech, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        arguments = (f"--source=folder:{speech}", f"--out={small / 'set'}", "--workers=2")
        code, output = run(*arguments)
        assert code == 1
        assert re.search(r"the disk is full: .* needs about 0.00038 GB in", one_line_error(output))
        assert "only 0.0002 GB are free" in output
        subprocess.run(["mount", "-o", "remount,size=9m", small], check=True)
        code, output = run(*arguments)
        assert code == 0, output
        assert len(Shards(small / "set")) == 20
    finally:
        subprocess.run(["umount", "-l", small], check=True)


# ---- as told


@pytest.mark.slow
def test_the_last_line_is_what_to_do_next_and_it_works(speech, tmp_path):
    folder = tmp_path / "my set"
    code, output = run(f"--source=folder:{speech}", f"--out={folder}", "--workers=1")
    assert code == 0, output
    assert (folder / "index.html").exists()
    found = re.fullmatch(r"train on it with (.*)", output.splitlines()[-1])
    assert found, output
    training = (
        f"{sys.executable} -m speechjax.main --config=configs/pretrain/wav2vec2.py:size=tiny,smoke "
        f"--workdir='{tmp_path / 'run'}' {found[1]}"
    )
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(training, shell=True, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "20 recordings" in done.stderr
    [rejected] = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected) == {"id": "text.wav", "reason": "not audio"}


def test_a_mixture_is_written_and_read(speech, tmp_path, caplog):
    out = tmp_path / "mixed"
    source = f"folder:{speech}?weight=2 + embedded:0.002?hours=0.001 + shards:{tmp_path / 'one'}?copy=yes"
    assert verb.run([f"--source=folder:{speech}", f"--out={tmp_path / 'one'}", "--workers=1"]) == 0
    with caplog.at_level("INFO", "speechjax"):
        assert verb.run([f"--source={source}", f"--out={out}", "--workers=1"]) == 0
    assert f"shards:{out}" in caplog.messages[-1]
    assert json.loads((out / "mixture.json").read_text()) == {
        "parts": [
            {"folder": f"00-{speech.name}", "weight": 2.0, "hours": None},
            {"folder": "01-0-002", "weight": 1.0, "hours": 0.001},
            {"folder": "02-one", "weight": 1.0, "hours": None},
        ]
    }
    records = open_records(f"shards:{out}?weight=3", min_seconds=0.0, max_bad_share=0.1)
    assert [opened.part.weight for opened in records.parts] == [6.0, 3.0, 3.0]
    assert np.bincount(records.part)[[0, 2]].tolist() == [20, 20]
    np.testing.assert_array_equal(records.read(0), records.read(len(records) - 20))
    with pytest.raises(UserError, match="holds a mixture; use another folder, or empty it"):
        verb.run([f"--source=folder:{speech}", f"--out={out}", "--workers=1"])
    with pytest.raises(UserError, match="holds a single source; use another folder, or empty it"):
        verb.run([f"--source={source}", f"--out={tmp_path / 'one'}", "--workers=1"])


def test_one_source_twice_under_a_name_with_brackets(speech, tmp_path):
    """Both are on the page, and no name is taken for markup."""
    odd = tmp_path / "a[/b]"
    odd.mkdir(parents=True)
    shutil.copy(speech / "00.wav", odd / "x.wav")
    assert verb.run([f"--source=folder:{odd} + folder:{odd}?weight=2", f"--out={tmp_path / 'out'}", "--workers=1"]) == 0
    stored = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert list(stored["parts"]) == [f"folder:{odd} (00-b)", f"folder:{odd} (01-b)"]
    assert stored["all"]["numbers"]["recordings"] == 2


@pytest.mark.slow
def test_a_tfds_data_set_comes_with_it(speech, tmp_path, monkeypatch):
    code, output = run(f"--source=folder:{speech}", f"--out={tmp_path / 'set'}", "--workers=1", "--tfds=mine")
    assert code == 0, output
    assert (tmp_path / "set" / "tfds" / "mine" / "1.0.0" / "dataset_info.json").exists()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "set" / "tfds"))
    records = open_records("tfds:mine:train", cache_dir=str(tmp_path / "cache"), min_seconds=0.0, max_bad_share=0.0)
    whole = Shards(tmp_path / "set")
    np.testing.assert_array_equal(records.lengths, whole.index["length"])


# ---- mistakes


def test_help_has_an_example():
    code, output = run("--help")
    assert code == 0
    assert "python -m speechjax.prepare --source=folder:/data/speech --out=/data/prepared" in output


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ([], 2, "required: --source, --out"),
        (["--source=embedded"], 2, "required: --out"),
        (["--out=OUT"], 2, "required: --source"),
        (["--source=embedded", "--out=OUT", "--wrokers=3"], 2, "unrecognized arguments: --wrokers=3"),
        (["--source=embedded", "--out=OUT", "--workers=0"], 2, "--workers=0: at least 1"),
        (["--source=embedded", "--out=OUT", "--workers=many"], 2, "invalid int value: 'many'"),
        (["--source=embedded", "--out=OUT", "stray"], 2, "stray: options for Beam need --runner"),
        (["--source=disc:/x", "--out=OUT"], 1, "unknown kind 'disc'"),
        (["--source=SPEECH", "--out=OUT"], 1, "did you mean folder:"),
        (["--source=folder:/does/not/exist", "--out=OUT"], 1, "no such folder: /does/not/exist"),
        (["--source=folder:SPEECH?wieght=2", "--out=OUT"], 1, "did you mean weight"),
        (["--source=folder:SPEECH +", "--out=OUT"], 1, "a part is empty"),
        (["--source=shards:SPEECH", "--out=OUT"], 1, "is no prepared set"),
        (["--source=embedded:0.001?copy=no", "--out=OUT"], 1, "leave out copy=no"),
        (["--source=folder:SPEECH", "--out=SPEECH/00.wav/set"], 1, "cannot write .*/00.wav/set.*: Not a directory"),
        (["--source=folder:SPEECH", "--out=SPEECH/00.wav"], 1, "cannot write .*/00.wav.*: "),
        (["--source=folder:SPEECH", "--out=gs://bucket/x"], 1, "no folder of this machine; --runner prepares"),
        (["--source=folder:SPEECH", "--out=OUT", "--tfds=no/name"], 2, "--tfds=no/name"),
    ],
)
def test_a_mistake_gets_one_clear_line(speech, tmp_path, arguments, code, expected):
    filled = [each.replace("SPEECH", str(speech)).replace("OUT", str(tmp_path / "set")) for each in arguments]
    found, output = run(*filled)
    assert found == code, output
    assert re.search(expected, one_line_error(output)), output
    assert not list(tmp_path.glob("set/shard-*"))


def test_nothing_usable(tmp_path):
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "a.wav").write_text("no audio " * 9)
    (tmp_path / "speech" / "b.wav").touch()
    code, output = run(f"--source=folder:{tmp_path / 'speech'}", f"--out={tmp_path / 'set'}", "--workers=1")
    assert code == 1
    assert one_line_error(output).endswith("no recording of it can be used: empty file, not audio")
    assert len((tmp_path / "set" / "rejected.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_not_ours(speech, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, output = run(f"--source=folder:{speech}", f"--out={tmp_path / 'locked' / 'set'}", "--workers=1")
    assert code == 1
    assert "Permission denied" in one_line_error(output)

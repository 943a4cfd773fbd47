"""Preparation on Beam: the same bytes as the local engine's, whoever runs it and however often it is interrupted."""

import concurrent.futures
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from beam_sets import RATE, contents, leave_lists, make_speech, on_beam

beam = pytest.importorskip("apache_beam")
sys.path.insert(0, str(Path(__file__).parent))

import fake_storage  # noqa: E402

from speechjax.data import beam as module  # noqa: E402
from speechjax.data.beam import add_steps, remote_folder, write  # noqa: E402
from speechjax.data.prepare import prepare  # noqa: E402
from speechjax.data.shards import Shards  # noqa: E402
from speechjax.data.sources import open_source  # noqa: E402
from speechjax.errors import UserError  # noqa: E402

LOOPBACK = ["--job_endpoint=embed", "--environment_type=LOOPBACK"]
TWO_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
REPO = Path(__file__).resolve().parents[2]


# ---- the same set


@pytest.mark.parametrize(
    ("runner", "options"),
    [("FnApiRunner", []), ("DirectRunner", []), ("FnApiRunner", TWO_PROCESSES), ("PortableRunner", LOOPBACK)],
    ids=["in memory", "DirectRunner", "two processes", "portable"],
)
def test_the_set_is_the_local_engines_byte_for_byte(speech, local, tmp_path, runner, options):
    on_beam(open_source(f"folder:{speech}"), tmp_path / "set", *options, runner=runner)
    made = contents(tmp_path / "set")
    assert made == contents(local)
    assert sum(name.endswith(".pcm") for name in made) == 3  # else there was nothing to spread


def test_the_comparison_sees_one_changed_recording(speech, local, tmp_path):
    other = make_speech(tmp_path / "speech")
    source = open_source(f"folder:{other}")
    # Same name and identity, so that only the audio differs.
    same = dataclasses.replace(source, name=f"folder:{speech}", fingerprint=open_source(f"folder:{speech}").fingerprint)
    on_beam(same, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(local)
    audio, _ = soundfile.read(other / "100.wav", dtype="int16")
    audio[5] += 1
    soundfile.write(other / "100.wav", audio, RATE)
    on_beam(same, tmp_path / "changed")
    assert contents(tmp_path / "changed") != contents(local)


def test_recordings_can_be_read_in_place(speech, tmp_path):
    source = open_source(f"folder:{speech}")
    prepare(source, tmp_path / "local", copy=False, progress=False)
    on_beam(source, tmp_path / "set", copy=False)
    assert contents(tmp_path / "set") == contents(tmp_path / "local")


def test_manifests_with_faulty_lines(speech, tmp_path):
    lines = [{"audio_filepath": str(path), "text": path.stem} for path in sorted(speech.glob("*.wav"))[:70]]
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    source = open_source(f"manifest:{manifest}")
    prepare(source, tmp_path / "local", progress=False)
    on_beam(source, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "local")


def test_real_speech(tmp_path):
    speech = Path(os.environ.get("SPEECHJAX_REAL_SPEECH", REPO.parent / "shared" / "data")) / "kerstin"
    if not speech.is_dir():
        pytest.skip(f"no real speech at {speech} (set SPEECHJAX_REAL_SPEECH)")
    (tmp_path / "speech").mkdir()
    for path in sorted(path for path in speech.rglob("*") if path.suffix in (".ogg", ".opus"))[:80]:
        (tmp_path / "speech" / path.name).symlink_to(path)
    source = open_source(f"folder:{tmp_path / 'speech'}")
    prepare(source, tmp_path / "local", progress=False)
    on_beam(source, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "local")
    assert len(Shards(tmp_path / "set")) == 80


# ---- again, and twice at a time


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def test_only_missing_and_damaged_shards_are_made_again(speech, local, tmp_path):
    source, folder = open_source(f"folder:{speech}"), tmp_path / "set"
    on_beam(source, folder)
    before = times(folder)
    (folder / "shard-00000.pcm").write_bytes(b"short")
    (folder / "shard-00002.json").unlink()
    (folder / "dataset.json").unlink()
    on_beam(source, folder)
    assert contents(folder) == contents(local)
    after = times(folder)
    assert {name[:11] for name in after if after[name] != before[name]} == {"shard-00000", "shard-00002"}
    on_beam(source, folder)
    assert times(folder) == after


def test_a_killed_launcher_leaves_finished_shards_and_the_next_makes_the_others(storage, tmp_path):
    make_speech(storage / "speech", 200)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import fake_storage\n"
        "from speechjax.data.beam import prepare_on_beam, remote_folder\n"
        "source = remote_folder('folder:fake://speech', 'fake://speech')\n"
        "prepare_on_beam(source, sys.argv[3], runner='FnApiRunner', options=[], copy=True)\n"
    )
    folder = tmp_path / "set"
    command = [sys.executable, "-c", code, str(REPO), str(Path(__file__).parent), str(folder)]
    # 64 recordings a shard, so each takes at least 0.6 s.
    with subprocess.Popen(command, env=os.environ | {fake_storage.SECONDS_A_RECORDING: "0.01"}) as launcher:
        deadline = time.monotonic() + 60
        while launcher.poll() is None and not list(folder.glob("shard-*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        launcher.send_signal(signal.SIGKILL)
    before = times(folder)
    done = {name[:11] for name in before if name.endswith(".json")}
    assert 0 < len(done) < 4
    assert not (folder / "dataset.json").exists()
    assert list((folder / ".beam").iterdir())  # what the killed one had in hand
    source = remote_folder("folder:fake://speech", "fake://speech")
    on_beam(source, folder)
    after = times(folder)
    assert {name[:11] for name in before if after[name] == before[name]} >= done
    assert {name[:11] for name in after} == {f"shard-{number:05d}" for number in range(4)}
    prepare(source, tmp_path / "local", progress=False)
    # Rates and formats: only workers hold the file long enough to ask for them.
    assert audio_of(folder) == audio_of(tmp_path / "local")
    assert not (folder / ".beam").exists()


def audio_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if Path(name).suffix in (".pcm", ".jsonl", ".npy")}


def test_workers_may_make_the_same_shard_at_the_same_time(speech, local, tmp_path):
    numbers = leave_lists(open_source(f"folder:{speech}"), tmp_path / "set")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: write(number, str(tmp_path / "set"), True), numbers * 4))
    assert contents_of_shards(tmp_path / "set") == contents_of_shards(local)
    assert {path.name for path in (tmp_path / "set" / ".beam").iterdir()} == {"00000", "00001", "00002"}


def contents_of_shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


def test_counters(speech, local, tmp_path):
    numbers = leave_lists(open_source(f"folder:{speech}"), tmp_path / "set")
    pipeline = beam.Pipeline("FnApiRunner")
    add_steps(pipeline, str(tmp_path / "set"), numbers, copy=True)
    result = pipeline.run()
    counters = {entry.key.metric.name: entry.committed for entry in result.metrics().query()["counters"]}
    info = json.loads((local / "dataset.json").read_text())
    # 140 files: one missing, one cut, one text.
    assert counters == {"recordings": 137, "rejected": 3, "samples": info["samples"]}


# ---- remote storage


def test_source_and_set_on_remote_storage(storage, tmp_path):
    speech = make_speech(storage / "in" / "speech")
    (speech / "071_gone.wav").unlink()  # a listing shows no dangling link
    (speech / "sub" / ".hidden.wav").write_bytes((speech / "000.wav").read_bytes())
    prepare(open_source(f"folder:{speech}"), tmp_path / "local", progress=False)
    source = remote_folder("folder:fake://in/speech", "fake://in/speech/")
    assert (source.total, source.ignored) == (139, 1)
    on_beam(source, "fake://out/set")
    assert contents_of_shards(storage / "out" / "set") == contents_of_shards(tmp_path / "local")
    made, wanted = contents(storage / "out" / "set"), contents(tmp_path / "local")
    assert {name for name in made if made[name] != wanted[name]} == {"preparing.json", "dataset.json"}  # its name
    assert made.keys() == wanted.keys()
    opened = Shards(storage / "out" / "set")
    assert len(opened) == 137
    assert not opened.damaged()
    # Without a pipeline, too.
    prepare(source, tmp_path / "fetched", progress=False)
    assert audio_of(tmp_path / "fetched") == audio_of(storage / "out" / "set")


def test_a_remote_set_is_completed_and_its_json_comes_last(storage, speech):
    source = open_source(f"folder:{speech}")
    on_beam(source, "fake://set")
    first = list(fake_storage.FakeStorage.created)
    for number in range(3):
        own = [path.rpartition(".")[2] for path in first if f"shard-{number:05d}" in path]
        assert sorted(own) == ["json", "jsonl", "npy", "pcm"]
        assert own[-1] == "json"
    assert first[-1] == "fake://set/dataset.json"
    whole = contents(storage / "set")
    (storage / "set" / "shard-00001.pcm").write_bytes(b"short")
    (storage / "set" / "dataset.json").unlink()
    fake_storage.FakeStorage.created.clear()
    on_beam(source, "fake://set")
    assert contents(storage / "set") == whole
    assert {path for path in fake_storage.FakeStorage.created if "shard-" in path} == {
        f"fake://set/shard-00001.{kind}" for kind in ("pcm", "jsonl", "npy", "json")
    }


def test_segments_of_one_remote_file_fetch_it_once(storage, tmp_path, monkeypatch):
    (storage / "long").mkdir(parents=True)
    audio = np.random.default_rng(1).integers(-9_000, 9_000, 4 * RATE).astype(np.int16)
    soundfile.write(storage / "long" / "a.wav", audio, RATE)
    path = "fake://long/a.wav"
    items = [module.file_item(f"a@{k}", path, {}, 0, float(k), 1.0) for k in range(4)]
    fetched = []
    monkeypatch.setattr(module, "_download", lambda *args, own=module._download: (fetched.append(args[0]), own(*args)))
    read = [item.read() for item in module._at_hand(items, tmp_path)]
    np.testing.assert_array_equal(np.concatenate(read), audio)
    assert fetched == [path]


def test_a_recording_that_vanishes_is_rejected_and_one_that_cannot_be_read_is_not(storage, tmp_path):
    make_speech(storage / "speech")
    source = remote_folder("folder:fake://speech", "fake://speech")
    (storage / "speech" / "005.wav").unlink()
    on_beam(source, tmp_path / "set")
    assert {"id": "005.wav", "reason": "no such file"} in Shards(tmp_path / "set").rejected
    fake_storage.FakeStorage.broken.add("fake://speech/006.wav")
    with pytest.raises(UserError, match=r"cannot read fake://speech/006.wav: 503 the bucket is on fire; finished"):
        on_beam(source, tmp_path / "other")


def test_a_portable_engine_reports_the_workers_reason(storage, tmp_path):
    make_speech(storage / "speech", 80)
    fake_storage.FakeStorage.broken.add("fake://speech/003.wav")
    source = remote_folder("folder:fake://speech", "fake://speech")
    with pytest.raises(UserError, match=r"^cannot read fake://speech/003.wav: 503 the bucket is on fire; finished"):
        on_beam(source, tmp_path / "set", *LOOPBACK, runner="PortableRunner")


def test_remote_folders_that_cannot_be_listed(storage):
    (storage / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="no audio files in fake://empty/"):
        remote_folder("folder:fake://empty", "fake://empty")
    with pytest.raises(UserError, match="fake://nothing does not exist"):
        remote_folder("folder:fake://nothing", "fake://nothing")
    with pytest.raises(UserError, match="cannot list other://bucket/"):
        remote_folder("folder:other://bucket", "other://bucket")


def test_storage_that_beam_does_not_know(speech):
    with pytest.raises(UserError, match=r"Path specified: other://bucket/set"):
        on_beam(open_source(f"folder:{speech}"), "other://bucket/set")

"""Preparation on Beam: the same bytes as the local engine's, whoever runs it and however often it is interrupted."""

import concurrent.futures
import dataclasses
import functools
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

beam = pytest.importorskip("apache_beam")
sys.path.insert(0, str(Path(__file__).parent))

import fake_storage  # noqa: E402
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PortableOptions  # noqa: E402

from speechjax.data import beam as module  # noqa: E402
from speechjax.data.beam import add_steps, check, prepare_on_beam, remote_folder, write  # noqa: E402
from speechjax.data.prepare import chunks, prepare  # noqa: E402
from speechjax.data.shards import Shards  # noqa: E402
from speechjax.data.sources import Source, open_source  # noqa: E402
from speechjax.errors import UserError  # noqa: E402

RATE = 16_000
LOOPBACK = ["--job_endpoint=embed", "--environment_type=LOOPBACK"]
TWO_PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
REPO = Path(__file__).resolve().parents[2]


def make_speech(folder: Path, count: int = 140) -> Path:
    """140 recordings make three shards; three of them are unusable, and one has another rate and two channels."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for k in range(count - 4):
        soundfile.write(folder / f"{k:03d}.wav", rng.integers(-9_000, 9_000, 900 + k).astype(np.int16), RATE)
    (folder / "sub").mkdir()
    soundfile.write(folder / "sub" / "stereo.flac", rng.uniform(-0.5, 0.5, (4_000, 2)), 44_100)
    (folder / "010_text.wav").write_text("no audio " * 99)
    (folder / "070_cut.wav").write_bytes((folder / "070.wav").read_bytes()[:500])
    (folder / "071_gone.wav").symlink_to(folder / "nowhere.wav")
    (folder / "readme.txt").touch()
    return folder


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Path:
    return make_speech(tmp_path_factory.mktemp("source") / "speech")


@pytest.fixture(scope="session")
def local(speech, tmp_path_factory) -> Path:
    """What the local engine makes of it."""
    folder = tmp_path_factory.mktemp("local")
    prepare(open_source(f"folder:{speech}"), folder, progress=False)
    return folder


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Path:
    """The folder behind fake://."""
    monkeypatch.setenv(fake_storage.ROOT, str(tmp_path / "storage"))
    monkeypatch.setattr(fake_storage.FakeStorage, "created", [])
    monkeypatch.setattr(fake_storage.FakeStorage, "broken", set())
    return tmp_path / "storage"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared set; the lock is no part of it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def on_beam(source: Source, folder: str | Path, *options: str, runner: str = "FnApiRunner", copy: bool = True) -> None:
    prepare_on_beam(source, folder, runner=runner, options=options, copy=copy)


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


def leave_lists(source: Source, folder: Path) -> list[int]:
    """What the launcher does before the pipeline runs."""
    folder.mkdir()
    shards, missing = module._hand_out(source, folder, str(folder), True)
    assert missing == list(range(shards))
    return missing


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


# ---- what is refused


@pytest.mark.parametrize("source", ["embedded:1", "tfds:spoken_digit:train", "shards:/data/set"])
def test_sources_without_files_are_for_the_local_engine(source):
    with pytest.raises(UserError, match="leave out --runner"):
        check(source, "DirectRunner", [])


def test_mistakes_in_runner_and_options(capfd):
    with pytest.raises(UserError, match="--runner=Nonsense: Unexpected pipeline runner"):
        check("folder:/x", "Nonsense", [])
    with pytest.raises(UserError, match="refuses --direct_num_workers=x"):
        check("folder:/x", "DirectRunner", ["--direct_num_workers=x"])
    assert "invalid int value: 'x'" in capfd.readouterr().err


def test_without_beam(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match="an environment of its own"):
        check("folder:/x", "DirectRunner", [])


def test_folders_of_something_else_are_named_as_the_user_knows_them(storage, speech, tmp_path):
    source = open_source(f"folder:{speech}")
    on_beam(source, "fake://set")
    other = dataclasses.replace(source, name="folder:/other", fingerprint="other")
    with pytest.raises(UserError, match=r"^fake://set was prepared from another source"):
        on_beam(other, "fake://set")
    with pytest.raises(UserError, match="the same with another copy="):
        on_beam(source, "fake://set", copy=False)


def test_storage_that_workers_do_not_share(speech, storage, tmp_path):
    source = open_source(f"folder:{speech}")
    with pytest.raises(UserError, match=r"do not see .*name a folder such as gs://"):
        on_beam(
            source,
            tmp_path / "set",
            "--project=some-project",
            "--region=r",
            "--temp_location=gs://bucket/t",
            runner="DataflowRunner",
        )
    with pytest.raises(UserError, match="name a folder that all workers share"):
        write(0, str(tmp_path / "elsewhere"), True)
    leave_lists(source, tmp_path / "handed")
    todo = tmp_path / "handed" / ".beam" / "00000"
    todo.write_text(json.dumps(json.loads(todo.read_text()) | {"witness": "/not/here.wav"}))
    with pytest.raises(UserError, match=r"does not see /not/here.wav"):
        write(0, str(tmp_path / "handed"), True)
    make_speech(storage / "speech", 80)
    with pytest.raises(UserError, match="leave out copy=no"):
        on_beam(remote_folder("folder:fake://speech", "fake://speech"), tmp_path / "inplace", copy=False)


class Job:
    """An engine's handle on a pipeline that fails."""

    def __init__(self, error: BaseException):
        self.error, self.cancelled = error, False

    def run(self) -> "Job":
        return self

    def wait_until_finish(self) -> None:
        raise self.error

    def cancel(self) -> None:
        self.cancelled = True


def test_what_engines_report_becomes_one_line(monkeypatch):
    monkeypatch.setattr(module, "add_steps", lambda *_: None)
    ending = "; finished shards stay, and the same command goes on from there"
    for report, line in {
        "no such jar": "no such jar",
        "Traceback:\n  File x\nOSError: disk [while running 'y']\n": "OSError: disk",
        "Traceback:\nspeechjax.errors.UserError: buy a disk [while running 'y']\nand more\n": "buy a disk",
    }.items():
        with pytest.raises(UserError) as found:
            module._run(Job(RuntimeError(report)), "", [], True)
        assert str(found.value) == line + ending


def test_stopping_the_launcher_stops_the_job(monkeypatch):
    monkeypatch.setattr(module, "add_steps", lambda *_: None)
    job = Job(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        module._run(job, "", [], True)
    assert job.cancelled


# ---- what a cluster gets


def test_options_reach_the_engine():
    options = ["--flink_master=head:8081", "--parallelism=64", "--environment_type=DOCKER", "--environment_config=img"]
    pipeline = module._pipeline("FlinkRunner", options)
    assert type(pipeline.runner).__name__ == "FlinkRunner"
    assert pipeline._options.view_as(FlinkRunnerOptions).flink_master == "head:8081"
    assert pipeline._options.view_as(PortableOptions).environment_config == "img"


@functools.cache
def description(numbers: int):
    pipeline = beam.Pipeline("FnApiRunner")
    add_steps(pipeline, "gs://bucket/set", range(numbers), copy=True)
    return pipeline.to_runner_api()


def test_the_pipeline_does_not_grow_with_the_source():
    """Dataflow takes descriptions of up to 10 MB; 10,000 shards are 40 million recordings."""
    assert description(10_000).ByteSize() < 200_000


def test_a_fresh_worker_unpickles_the_step_and_makes_the_shard(speech, local, tmp_path):
    numbers = leave_lists(open_source(f"folder:{speech}"), tmp_path / "set")
    pipeline = beam.Pipeline("FnApiRunner")
    add_steps(pipeline, str(tmp_path / "set"), numbers, copy=True)
    payloads = [
        beam.portability.api.beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload).do_fn.payload
        for transform in pipeline.to_runner_api().components.transforms.values()
        if transform.unique_name == "write shards"
    ]
    (tmp_path / "step").write_bytes(payloads[0])
    code = (
        "import sys; from apache_beam.internal import pickler\n"
        "step, args, *_ = pickler.loads(open(sys.argv[1], 'rb').read())\n"
        "print(type(step).__name__); list(step.process(1, *args))\n"
        "print(sorted({'jax', 'tensorflow', 'flax'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "step"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-2000:]


def test_chunks_are_the_local_engines():
    """The launcher must not cut the source in another way: shards of both engines can lie in one folder."""
    assert module.chunks is chunks

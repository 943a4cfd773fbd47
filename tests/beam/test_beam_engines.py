"""Preparation on Beam: what is refused, and what an engine is given."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from beam_sets import leave_lists, make_speech, on_beam

beam = pytest.importorskip("apache_beam")
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PortableOptions  # noqa: E402

from speechjax.data import beam as module  # noqa: E402
from speechjax.data.beam import add_steps, check, remote_folder, write  # noqa: E402
from speechjax.data.prepare import chunks  # noqa: E402
from speechjax.data.sources import open_source  # noqa: E402
from speechjax.errors import UserError  # noqa: E402

REPO = Path(__file__).resolve().parents[2]

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

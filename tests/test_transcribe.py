"""The verb as a person runs it: files, folders, pipes, mistakes."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import soundfile

from speechjax import config as configs
from speechjax import sharding, transcribe
from speechjax.data.decode import decode
from speechjax.data.text import make_tokenizer
from speechjax.errors import UserError
from speechjax.recognition import Decoding
from speechjax.runs import open_run
from tests.speaking import RATE, REPO, TOKENIZER, make_state, tiny_config, write, write_run


@pytest.fixture(scope="session")
def asr(tmp_path_factory) -> Path:
    """A run of a random tiny model, with its vocabulary."""
    config = tiny_config()
    return write_run(tmp_path_factory.mktemp("asr") / "run", config, make_state(config))


@pytest.fixture(scope="session")
def talks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    rng = np.random.default_rng(0)
    (folder / "more").mkdir()
    for name, seconds in (("one.wav", 1.5), ("more/two.flac", 3.0)):
        tone = np.sin(np.arange(round(seconds * RATE)) * 0.05) + 0.3 * rng.standard_normal(round(seconds * RATE))
        soundfile.write(folder / name, 0.2 * tone, RATE)
    (folder / "notes.txt").write_text("no recording")
    return folder


def run(*arguments: str | Path) -> int:
    return transcribe.run([*map(str, arguments)])


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPEECHJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.slow
def test_a_folder_is_transcribed_and_gone_on_with(asr, talks, tmp_path, caplog):
    from speechjax.recognition import Recognizer, texts

    given = (f"--workdir={asr}", "--format=json", f"--out={tmp_path}", talks)
    caplog.set_level(logging.INFO, "speechjax")
    assert run(*given) == 0
    outputs = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.json"))}
    assert [str(path.relative_to(tmp_path)) for path in outputs] == ["more/two.json", "one.json"]
    # What the checkpoint says of the whole recording at once, in a row of its own length.
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    found = open_run(str(asr), sharding.replicated(mesh))
    for path in outputs:
        (source,) = talks.rglob(f"{path.stem}.*")
        audio = decode(source)
        batch = dict(audio=audio[None], lengths=np.int32([len(audio)]), mean=np.float32([audio.mean() / 32768]),
                     std=np.float32([audio.std() / 32768]))  # fmt: skip
        ((text, _),) = texts(TOKENIZER, Recognizer(found.task, TOKENIZER, Decoding())(found.variables, batch))[0]
        result = json.loads(outputs[path])
        assert result["text"].split() == text.split()
        assert result["text"], "negative control: saying nothing would prove nothing"
        assert result["seconds"] == len(audio) / RATE

    (tmp_path / "one.json").unlink()
    (tmp_path / "more" / "two.json").write_text("mine")
    caplog.clear()
    assert run(*given) == 0
    assert "1 of 2 are there already; --overwrite makes them again" in caplog.text
    assert (tmp_path / "one.json").read_bytes() == outputs[tmp_path / "one.json"]
    assert (tmp_path / "more" / "two.json").read_text() == "mine"
    assert run(*given, "--overwrite") == 0
    assert {path: path.read_bytes() for path in outputs} == outputs


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(asr, talks, tmp_path, caplog, capsys):
    (tmp_path / "bad.wav").write_text("nothing")
    (tmp_path / "bare").mkdir()
    write(tmp_path / "still.wav", np.zeros(0, np.int16))
    caplog.set_level(logging.INFO, "speechjax")
    given = (tmp_path / "bad.wav", tmp_path / "gone.wav", talks / "one.wav", tmp_path / "bare", tmp_path / "still.wav")
    assert run(f"--workdir={asr}", *given) == 1
    for name, reason in (("bad.wav", "not audio"), ("gone.wav", "no such file"), ("bare", "no audio files"),
                         ("still.wav", "no words in 0.0 s")):  # fmt: skip
        assert f"{tmp_path / name}: {reason}" in caplog.text
    assert "3 of 5 files failed" in caplog.text
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(talks / "one.wav"), str(tmp_path / "still.wav")]
    assert lines[0].split("\t")[1]


@pytest.mark.slow
def test_an_adapter_brings_its_head_to_another_run(talks, tmp_path, capsys):
    pytest.importorskip("safetensors")
    from flax.traverse_util import flatten_dict, unflatten_dict

    from speechjax.adapter_files import save_adapter

    low = dict(kind="lora", name="low", targets="attention/(query|value)$", rank=2, alpha=6.0)
    config, plain = tiny_config(adapters=(low,)), tiny_config()
    state = make_state(config)
    state = state.replace(params=jax.tree.map(lambda x: 2 * x + 0.01, state.params))  # LoRA begins with nothing
    learnt = write_run(tmp_path / "learnt", config, state)
    about = {name: configs.to_json(config)[name] for name in ("task", "model", "data")} | {"step": 3}
    save_adapter(tmp_path / "low.safetensors", state.params, [low], include=".", about=about)
    other = make_state(plain, seed=1)
    mixed, same = flatten_dict(other.params), flatten_dict(state.params)
    mixed |= {name: same[name] for name in mixed if name[0] == "encoder"}
    base = write_run(tmp_path / "base", plain, other.replace(params=unflatten_dict(mixed)))

    def said(*arguments: str | Path) -> str:
        assert run(*arguments, talks / "more" / "two.flac") == 0
        return capsys.readouterr().out

    with_adapter = said(f"--workdir={base}", f"--adapter={tmp_path / 'low.safetensors'}")
    assert with_adapter == said(f"--workdir={learnt}")
    assert with_adapter != said(f"--workdir={base}"), "negative control"


def test_every_mistake_is_one_clear_line(asr, talks, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    make_tokenizer("characters", ["xyz"]).save(other)
    one, there = talks / "one.wav", tmp_path / "there.txt"
    there.touch()
    (other / "one.mp3").touch()
    for arguments, words in (
        (("--workdir=/nowhere", one), "no such folder"),
        ((f"--workdir={asr}", "--checkpoint=4", one), "no such checkpoint"),
        ((f"--workdir={asr}", f"--vocabulary={tmp_path}", one), "no vocabulary"),
        ((f"--workdir={asr}", f"--vocabulary={other}", one), "was trained with 13 tokens, and its vocabulary has 7"),
        ((f"--workdir={asr}", "--decode.search=best", one), "choose greedy or beam"),
        ((f"--workdir={asr}", "--decode.beam=3", one), "has no 'beam'"),
        ((f"--workdir={asr}", "--format=srt", talks), "need files of their own"),
        ((f"--workdir={asr}", f"--out={tmp_path / 'a.txt'}", talks), "one file for 2 recordings"),
        ((f"--workdir={asr}", f"--out={tmp_path / 'no' / 'a.txt'}", one), "no such folder"),
        ((f"--workdir={asr}", f"--adapter={tmp_path / 'a.safetensors'}", one), "no such file"),
        ((f"--workdir={asr}", f"--out={tmp_path}", one, talks / "more" / ".." / "one.wav"), "several recordings"),
        ((f"--workdir={asr}", f"--out={tmp_path}", "-"), "of a pipe a file"),
        ((f"--workdir={asr}", f"--out={tmp_path / 'no' / 'a.txt'}", "-"), "no such folder"),
        ((f"--workdir={asr}", f"--out={there}", "-"), "is there already; --overwrite makes it again"),
        ((f"--workdir={asr}", f"--out={tmp_path / 'a.srt'}", "-"), "add --format=srt"),
        ((f"--workdir={asr}", f"--out={tmp_path / 'a.srt'}", one), "add --format=srt"),
        ((f"--workdir={asr}", "--format=ctm", one, other / "one.mp3"), "recordings that are all called one"),
        ((f"--workdir={asr}", "--decode.search=beam", "--decode.best=2", one), "only --format=json of files has room"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value)
    for wrong in (("-", one), (one, "--rows=0"), (one, "--window=nan"), (one, "--rate=1"), ("-", "--delay=0"),
                  (one, "--format=doc"), (one, "--checkpoint=last"), (one, "")):  # fmt: skip
        with pytest.raises(SystemExit):
            run(f"--workdir={asr}", *wrong)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(f"--workdir={asr}", "--decode.search", "beam", one)
    assert "say --decode.search=VALUE" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        run(f"--workdir={asr}", "-")


def test_a_name_that_is_no_text_and_a_pipe_among_the_files(asr, talks, tmp_path, caplog, capsys):
    odd = tmp_path / os.fsdecode(b"caf\xe9.wav")
    odd.write_bytes((talks / "one.wav").read_bytes())
    os.mkfifo(tmp_path / "fifo.wav")
    assert run(f"--workdir={asr}", "--format=json", odd, tmp_path / "fifo.wav") == 1
    assert json.loads(capsys.readouterr().out)["file"] == f"{tmp_path}/caf\ufffd.wav"
    assert "fifo.wav: not a file" in caplog.text


def test_a_pipe_goes_to_its_file(asr, talks, tmp_path, monkeypatch):
    """With windows as short as the overlap of files would be; a file with a header leaves nothing behind."""

    def say(data: bytes, *arguments: str) -> int:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data)),
                                                          isatty=lambda: False))  # type: ignore[arg-type] # fmt: skip
        return run(f"--workdir={asr}", "--window=4", f"--out={tmp_path / 'a.ctm'}", "--format=ctm", *arguments, "-")

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(UserError, match="a file with a header"):
            say((talks / "one.wav").read_bytes())
        assert not (tmp_path / "a.ctm").exists()
        assert say(decode(talks / "one.wav").tobytes()) == 0
        written = (tmp_path / "a.ctm").read_text()
        assert all(re.fullmatch(r"stdin 1 [\d. ]+ \S+( [\d.]+)?", line) for line in written.splitlines())
        assert written
        assert say(decode(talks / "one.wav").tobytes(), "--overwrite") == 0
        assert (tmp_path / "a.ctm").read_text() == written
    finally:
        signal.signal(signal.SIGINT, before)


def test_names_of_results(tmp_path):
    args = SimpleNamespace(out=tmp_path, format="vtt")
    for name in ("a.wav", "a.mp3", "b.c.wav"):
        (tmp_path / name).touch()
    jobs, failed = transcribe.find([str(tmp_path)])
    assert not failed
    named: Any = transcribe.name_outputs(args, jobs)  # type: ignore[arg-type]
    assert sorted(path.name for path in named.values()) == ["a.mp3.vtt", "a.wav.vtt", "b.c.vtt"]


# ---- as processes


def start(*arguments: str | Path, **streams: Any) -> subprocess.Popen:
    """Listens to interrupts even where the tests run in the background of a script."""
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", listening, sys.executable, "-m", "speechjax.transcribe", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ),
                            start_new_session=True, **streams)  # fmt: skip


@pytest.mark.slow
def test_as_a_process(asr, talks, tmp_path):
    process = start(f"--workdir={asr}", "--format=vtt", f"--out={tmp_path}", talks, talks / "gone.wav")
    out, printed = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, b""), printed
    assert b"1 of 3 files failed" in printed
    assert b"Traceback" not in printed
    assert (tmp_path / "one.vtt").read_text().startswith("WEBVTT\n\n00:00:00.")


@pytest.mark.slow
def test_ctrl_c_prints_what_a_pipe_has_said(asr, talks):
    process = start(f"--workdir={asr}", "--format=ctm", "-", stdin=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    process.stdin.write(decode(talks / "more" / "two.flac").tobytes() * 5)
    process.stdin.flush()  # and it stays open
    first = process.stdout.readline()
    assert first.startswith(b"stdin 1 0.")
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.stderr
    printed = process.stderr.read()
    assert process.wait(60) == 0, printed
    assert b"real-time factor" in printed
    assert b"Traceback" not in printed
    assert float(re.search(rb"([\d.]+) s of audio in", printed)[1]) >= 2.0  # type: ignore[index]
    assert all(line.startswith(b"stdin 1 ") for line in rest.splitlines())
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()

"""Speech through a pipe: the words of the file, and soon."""

import io
import logging
import queue
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from speechjax import config as configs
from speechjax import sharding
from speechjax.decode import ctc
from speechjax.errors import UserError
from speechjax.live import Delays, Listener, Pipe, _look, listen
from speechjax.recognition import Decoding
from speechjax.transcription import Transcriber, pause
from tests.speaking import RATE, TOKENIZER, make_model, make_state, sound, text_of, tiny_config, transcripts, write


def test_a_stream_parts_in_the_middle_of_its_longest_pause():
    symbols = np.array([5, 5, 0, 0, 0, 0, 5, 6, 0, 0, 0, 7, 0, 7])
    anywhere = lambda before, after: True  # noqa: E731
    assert [pause(symbols, least, anywhere) for least in (1, 4, 6, 11, 13)] == [4, 9, 9, 12, 13]
    assert pause(np.array([5, 5, 6, 6, 7, 7]), 1, anywhere) == 4
    assert pause(np.array([5, 5, 5]), 1, anywhere) == 3
    # <s> and </s> are blanks to the searches.
    assert pause(np.array([5, 1, 2, 5, 0, 5]), 1, anywhere) == 2
    # Between words, even if it is shorter; elsewhere if there is none.
    assert pause(symbols, 1, lambda before, after: (before, after) == (6, 7)) == 9
    assert pause(symbols, 5, lambda before, after: (before, after) == (5, 5)) == 5
    assert pause(symbols, 1, lambda before, after: False) == 4


class Blocks:
    """A pipe that is read in blocks of any size."""

    def __init__(self, audio: np.ndarray, rate: int = RATE, size: int = 1001, odd: bytes = b""):
        self.data, self.size = audio.astype("<i2").tobytes() + odd, size

    def __iter__(self):
        return ((self.data[at : at + self.size], time.monotonic()) for at in range(0, len(self.data), self.size))


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_words_of_a_pipe_are_those_of_the_file_and_come_soon(search):
    said = text_of(40, seed=1)
    audio = np.concatenate([sound(said), np.zeros(2 * RATE, np.int16), sound("bad cab fed")])
    decoding = Decoding(search=search, beams=4 if search == "beam" else 16, symbols=4)
    listener, words, late = Listener(make_model(decoding=decoding), delay=0.4), [], []
    for at in range(0, len(audio), 999):
        new = listener.hear(audio[at : at + 999])
        late += [listener.seconds - word.end for word in new]
        words += new
    in_time = len(words)
    words += listener.finish()
    assert " ".join(word.text for word in words) == f"{said} bad cab fed"
    assert in_time >= 40, "words come before the end"
    # The delay, a block, and the space after a word; a beam may revise; the last word before a pause waits for it.
    revised = 1.5 if search == "beam" else 0.0
    assert np.median(late) < 0.4 + 0.07 + 0.1 + revised
    assert max(late) < 0.4 + 0.8 + 0.4 + revised


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_a_stream_without_a_pause_begins_anew_and_loses_nothing(monkeypatch, search):
    """Room for 60 tokens: the search begins anew every second or so, in tokens and between equal ones."""
    monkeypatch.setattr("speechjax.live._ROOM", 60)
    said, kept = text_of(60, seed=2), 0
    decoding = Decoding(search=search, beams=4 if search == "beam" else 16, symbols=4)
    listener, words = Listener(make_model(decoding=decoding), delay=0.4), []
    for block in np.array_split(sound(said), 70):
        words += listener.hear(block)
        kept = max(kept, len(listener._logits))
    assert " ".join(word.text for word in [*words, *listener.finish()]) == said
    assert len(said) > 3 * 60
    assert kept < 200, "what is kept of a stream is bounded"


def make_streaming(layers: str) -> Transcriber:
    """A real task with random weights, whose attention is limited to chunks of 8 frames and the 2 before."""
    config = tiny_config(attention=dict(positions="rotary", chunk=8, left=2))
    with config.unlocked():
        config.task.layers = layers
        config.model.frontend = dict(name="mel", n_mels=20, normalize="none")
        config.model.positions = dict(name="none")
    params = jax.tree.map(lambda x: 4 * x, make_state(config).params)  # so that frames differ
    task, mesh = configs.make_task(config), sharding.make_mesh(data=-1, fsdp=1)
    return Transcriber(task, {"params": params}, TOKENIZER, Decoding(), mesh, seconds=12.0, overlap=4.0, rows=1)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["last", "weighted"])
def test_an_encoder_that_can_stream_does(tmp_path, caplog, layers):
    """Frame by frame what it makes of the whole recording."""
    model, level = make_streaming(layers), np.repeat(np.random.default_rng(0).uniform(0, 9000, 52), 3200)
    audio = (level * np.random.default_rng(1).normal(size=len(level))).clip(-32768, 32767).astype(np.int16)[:-123]
    with caplog.at_level(logging.INFO, "speechjax"):
        listener = Listener(model, delay=2.0)
    assert type(listener._source).__name__ == "_Streamed"
    assert not caplog.text
    words = [word for block in np.array_split(audio, 37) for word in listener.hear(block)] + listener.finish()
    whole = transcripts(model, write(tmp_path / "a.wav", audio))[0]
    assert len(set(whole.text)) > 3
    assert len(whole.text) > 20
    assert " ".join(word.text for word in words) == whole.text
    assert [word.start for word in words] == [word.start for word in whole.words]


def test_what_comes_through_a_pipe_is_written_as_it_comes(tmp_path):
    """Word by word, so that a kill loses the last one at most."""
    path, seen = tmp_path / "a.txt", []

    def blocks():
        for block, when in Blocks(np.concatenate([sound("a bad cab"), np.zeros(RATE, np.int16), sound("fed")])):
            seen.append(path.read_text())
            yield block, when

    with open(path, "w") as out:
        listen(Listener(make_model(), 0.4), blocks(), RATE, " ", None, out)
    assert path.read_text() == "a bad cab\nfed\n"
    assert {"a", "a bad", "a bad cab"} <= set(seen)


def test_what_comes_through_a_pipe_is_printed_as_it_comes(capsys, caplog):
    model = make_model()
    with caplog.at_level(logging.INFO, "speechjax"):
        audio = np.concatenate([sound("a bad"), np.zeros(RATE, np.int16), sound("cab")])
        found = listen(Listener(model, 0.4), Blocks(audio, odd=b"x"), RATE, " ", None)
        assert capsys.readouterr().out == "a bad\ncab\n"
        assert [word.text for word in found.words] == ["a", "bad", "cab"]
        assert "middle of a sample" in caplog.text
        assert "real-time factor" in caplog.text
        assert "words came late by" in caplog.text
        caplog.clear()
        assert listen(Listener(model, 0.4), Blocks(audio[:0]), RATE, " ", None).words == []
        assert capsys.readouterr().out == ""
        assert "empty" in caplog.text
    # Half the rate, the same words.
    slow = sound("a bad", frames=8, gap=8)[::2]
    listen(Listener(model, 0.4), Blocks(slow), 8_000, " ", lambda word: f"<{word.text}>")
    assert capsys.readouterr().out == "<a><bad>"


def test_a_pipe_is_read_ahead_until_it_ends_or_is_stopped():
    data = bytes(range(256)) * 100
    assert b"".join(block for block, _ in Pipe(io.BufferedReader(io.BytesIO(data)))) == data
    assert list(Pipe(io.BufferedReader(io.BytesIO()))) == []


class Stream:
    """Gives what is put into it, a piece at a time, and stays open until that is nothing."""

    def __init__(self, *pieces: bytes):
        self.pieces: queue.Queue[bytes] = queue.Queue()
        for piece in pieces:
            self.pieces.put(piece)

    def read1(self, size: int) -> bytes:
        return self.pieces.get()


def piped(*pieces: bytes, rate: int = RATE) -> Any:
    return Pipe(Stream(*pieces), rate)  # type: ignore[arg-type]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_was_read_before_a_pipe_is_stopped_is_still_heard():
    pipe = piped(b"four", b"more")
    until(lambda: len(pipe._blocks) == 2)
    pipe.stopped = True
    assert b"".join(block for block, _ in pipe) == b"fourmore"


def test_a_pipe_reads_ahead_so_many_bytes_however_small_its_blocks(monkeypatch):
    monkeypatch.setattr("speechjax.live._AHEAD", 0.5)
    pieces = [bytes(20)] * 300
    pipe = piped(*pieces, b"", rate=4_000)  # of which half a second is 4000 bytes
    until(lambda: pipe._room < 20)
    time.sleep(0.2)
    assert sum(len(block) for block, _ in pipe._blocks) == 4_000
    assert [block for block, _ in pipe] == pieces, "and the rest comes later"


@pytest.mark.parametrize("head", [b"RIFF", b"fLaC", b"OggS", b"FORM", b"ID3\3"])
def test_a_file_with_a_header_is_no_raw_audio(head):
    with pytest.raises(UserError, match=r"raw 16 bit mono, and this pipe has a file with a header.*-f s16le"):
        piped(head[:1], head[1:] + bytes(50)).begin()
    pipe = piped(b"\0" + head, b"")
    pipe.begin()
    assert b"".join(block for block, _ in pipe) == b"\0" + head, "what was looked at is still heard"


def test_silence_costs_no_memory():
    delays = Delays()
    for second in range(1, 1000):
        delays.heard(second, 1000.0 + second)
    assert len(delays._read) < 200
    delays.given(995.5, 999.0, 2001.0)
    assert (delays.audio, delays.wall) == ([3.5], [5.0])


def test_what_a_scorer_remembers_stays_on_its_device():
    class Remembers:
        def __array__(self, *_, **__):
            raise AssertionError("copied to the host")

    state = ctc.PrefixBeam(beams=3, tokens=4, symbols=2, best=1).init(1)
    assert _look(state._replace(scorers=(Remembers(),)), 0) is not None
    with pytest.raises(AssertionError):
        jax.tree.map(np.asarray, state._replace(scorers=(Remembers(),)))

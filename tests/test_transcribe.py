"""Long recordings and pipes against what the whole recording gives at once, and the verb as a person runs it."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax import config as configs
from speechjax import sharding, transcribe, transcription
from speechjax.checkpoint import Checkpoints
from speechjax.cutting import Level, Pieces, Windows, pcm_blocks
from speechjax.data.decode import BadAudio, decode
from speechjax.data.pipeline import batch_spec
from speechjax.data.plan import Shape
from speechjax.data.text import make_tokenizer
from speechjax.decode.types import Hypotheses
from speechjax.errors import UserError
from speechjax.live import Listener, Pipe, listen
from speechjax.recognition import Decoding
from speechjax.runs import open_run
from speechjax.step import batch_shapes, init_state
from speechjax.transcription import Transcriber, pause

REPO = Path(__file__).resolve().parent.parent
HOP, EXTRA, RATE = 160, 80, 16_000
LETTERS = "abcdefgh"
TOKENIZER = make_tokenizer("characters", ["ab cdefgh"])
SPACE = TOKENIZER.encode("a a")[1]
LOUDNESS = np.float32([0, -9, -9, -9, *range(1, TOKENIZER.size - 3)])  # of every token, in thousands


class CTC:
    """A task whose encoder hears the loudness of the `reach` frames around each: loudness 1000 n says token n + 3."""

    def __init__(self, reach: int):
        self.reach = reach
        self.encoder: Any = SimpleNamespace(tokens=lambda: 1, frame_len=lambda: (HOP, EXTRA), attention={})

    def apply(self, variables, batch, method):
        assert method == "answer"
        audio, lengths = batch["audio"].astype(jnp.float32), jnp.maximum((batch["lengths"] - EXTRA) // HOP, 0)
        T = (audio.shape[1] - EXTRA) // HOP
        level = audio[:, : T * HOP].reshape(len(audio), T, HOP).mean(axis=2)
        level = jnp.where(jnp.arange(T)[None] < lengths[:, None], level, 0) / 1000
        span = 2 * self.reach + 1
        level = (
            sum(jnp.roll(jnp.pad(level, ((0, 0), (span, span))), k - self.reach, axis=1) for k in range(span)) / span
        )
        says = jnp.asarray([0.0, -9.0, -9.0, -9.0, *range(1, TOKENIZER.size - 3)])
        return {
            "logits": -8 * (level[:, span:-span, None] - says[None, None]) ** 2 * variables["sure"],
            "lengths": lengths,
        }


def make_model(reach: int = 0, decoding: Decoding | None = None, **options: Any) -> Transcriber:
    given: dict[str, Any] = dict(seconds=2.0, overlap=0.4, rows=4) | options
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    return Transcriber(CTC(reach), {"sure": jnp.ones(())}, TOKENIZER, decoding or Decoding(), mesh, **given)


def sound(text: str, frames: int = 4, gap: int = 2) -> np.ndarray:
    """int16: every character `frames` frames of its loudness, and as much as `gap` of silence."""
    said = [np.repeat([i - 3, 0], [frames, gap]) for i in TOKENIZER.encode(text)]
    return np.repeat(np.concatenate([*said, [0]]) * 1000, HOP).astype(np.int16)


def write(path: Path, audio: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, audio, rate, subtype="PCM_16")
    return path


def text_of(words: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return " ".join("".join(rng.choice(list(LETTERS), rng.integers(1, 7))) for _ in range(words))


def transcripts(model: Transcriber, *paths: Path) -> list[Any]:
    return [result for _, result in model(paths, lambda _: None)]


# ---- windows


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 900), st.integers(1, 30), st.integers(0, 8), st.integers(1, 5), st.integers(0, 12),
    st.lists(st.integers(1, 200), min_size=1, max_size=5),
)  # fmt: skip
def test_windows_have_every_frame_once_and_the_context_they_promise(samples, step, ahead, align, more, blocks):
    hop, extra, size = 4, 3, step + ahead + align + more
    audio = np.arange(samples, dtype=np.int16)
    cutter, done, at, n = Windows(hop, extra, size=size, step=step, ahead=ahead, first=size, align=align), 0, 0, 0
    windows = []
    while at < samples:
        windows += cutter.hear(audio[at : at + blocks[n % len(blocks)]])
        at, n = at + blocks[n % len(blocks)], n + 1
        assert len(cutter._pcm) // 2 <= (size + step) * hop + extra + max(blocks), "memory"
    total = max((samples - extra) // hop, 0)
    for window in [*windows, cutter.finish()]:
        assert window.start + window.low == done
        assert window.start % align == 0
        done = window.start + window.high
        np.testing.assert_array_equal(window.audio, audio[window.start * hop :][: len(window.audio)])
        heard = max((len(window.audio) - extra) // hop, 0)
        assert heard <= size
        assert window.low >= (size - step - ahead - align + 1 if window.start else 0)
        assert heard - window.high >= (0 if window.last else ahead)
    assert done == total


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 900), st.integers(1, 60), st.integers(1, 300))
def test_pieces_are_the_whole(samples, size, block):
    hop, extra = 4, 3
    audio = np.random.default_rng(samples).integers(-999, 999, samples).astype(np.int16)
    cutter, done = Pieces(hop, extra, size=size), 0
    pieces = [piece for at in range(0, samples, block) for piece in cutter.hear(audio[at : at + block])]
    for piece in [*pieces, cutter.finish()]:
        assert (piece.start, piece.low) == (done, 0)
        assert piece.high <= size
        done += piece.high
        np.testing.assert_array_equal(piece.audio, audio[piece.start * hop :][: len(piece.audio)])
    assert done == max((samples - extra) // hop, 0)


def test_pieces_are_cut_where_it_is_quiet():
    audio = np.random.default_rng(0).normal(0, 3000, 10 * RATE).astype(np.int16)
    for second in (3.5, 7.2):  # 0.4 s of quiet around these
        audio[int((second - 0.2) * RATE) : int((second + 0.2) * RATE)] //= 50
    cutter = Pieces(HOP, EXTRA, size=450)
    pieces = [*cutter.hear(audio), cutter.finish()]
    assert [piece.start * HOP / RATE for piece in pieces] == pytest.approx([0, 3.5, 7.2], abs=0.06)


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


# ---- reading


@pytest.mark.parametrize(("rate", "channels", "kind"), [(16_000, 1, "wav"), (44_100, 2, "flac"), (8_000, 1, "ogg")])
def test_blocks_are_what_decoding_at_once_gives(tmp_path, rate, channels, kind):
    audio = 0.1 * np.random.default_rng(0).normal(size=(rate * 9, channels))
    soundfile.write(tmp_path / f"a.{kind}", audio, rate)
    blocks = list(pcm_blocks(tmp_path / f"a.{kind}"))
    whole = decode(tmp_path / f"a.{kind}")
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    level = Level()
    for block in blocks:
        level.hear(block)
    exact = whole / 32768
    assert (level.mean, level.std) == pytest.approx((exact.mean(), exact.std()), rel=1e-9)


def test_silence_can_be_transcribed_and_damage_cannot(tmp_path):
    silent = write(tmp_path / "silent.wav", np.zeros(5000, np.int16))
    assert sum(map(len, pcm_blocks(silent))) == 5000
    (tmp_path / "cut.wav").write_bytes(silent.read_bytes()[:4000])
    (tmp_path / "text.wav").write_text("this is no audio")
    (tmp_path / "empty.wav").touch()
    for name, reason in (
        ("cut", "truncated"),
        ("text", "not audio"),
        ("empty", "empty file"),
        ("gone", "no such file"),
    ):
        with pytest.raises(BadAudio, match=reason):
            list(pcm_blocks(tmp_path / f"{name}.wav"))


# ---- stitching


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_a_long_recording_says_what_was_written_into_it(tmp_path, search):
    said = text_of(150)
    decoding = Decoding(search=search, beams=4 if search == "beam" else 16, symbols=4)
    found = transcripts(make_model(decoding=decoding), write(tmp_path / "a.wav", sound(said)))[0]
    assert found.text == said
    assert len(sound(said)) / RATE > 20 * 2, "negative control: one window would prove nothing"
    # Six frames of 10 ms a character; the space after a word ends it.
    starts = 0.06 * np.cumsum([0, *(len(word) + 1 for word in said.split())])
    np.testing.assert_allclose([word.start for word in found.words], starts[:-1] + EXTRA / 2 / RATE, atol=1e-9)
    np.testing.assert_allclose(
        [word.end for word in found.words[:-1]], starts[1:-1] - 0.06 + EXTRA / 2 / RATE, atol=1e-9
    )
    assert all(word.confidence is not None and word.confidence > 0.99 for word in found.words)
    assert found.timing == "frames"


def test_a_lexicon_meets_whole_words_in_every_part(tmp_path):
    """Its words are as far from each other as their letters, so that only spaces tell where to cut."""
    (tmp_path / "lexicon.txt").write_text("bad\ncab\nfed\nabc\n")
    (tmp_path / "hot.txt").write_text("cab fed\n")
    said = "bad cab fed abc " * 20
    options: dict[str, Any] = dict(search="beam", beams=4, symbols=4, word_bonus=0.5, best=2)
    files = dict(lexicon=str(tmp_path / "lexicon.txt"), hot_words=str(tmp_path / "hot.txt"))
    model = make_model(decoding=Decoding(**options, **files))
    assert transcripts(model, write(tmp_path / "a.wav", sound(said)))[0].text == said.strip()
    listener = Listener(model, delay=0.4)
    words = [word for block in np.array_split(sound(said), 60) for word in listener.hear(block)] + listener.finish()
    assert " ".join(word.text for word in words) == said.strip()


def test_stitched_windows_are_the_whole_where_the_overlap_reaches_as_far_as_the_encoder(tmp_path):
    reach = 15
    audio = np.repeat(np.random.default_rng(0).integers(0, 9000, 150), 30 * HOP).astype(np.int16)
    path = write(tmp_path / "a.wav", audio)
    once = transcripts(make_model(reach, seconds=60.0, rows=1), path)[0]
    assert len(once.text) > 200
    assert len(once.words) > 5
    for overlap in (0.3, 0.34, 0.8):
        assert transcripts(make_model(reach, overlap=overlap), path)[0] == once
    assert transcripts(make_model(reach, overlap=0.1), path)[0] != once, "negative control: less is not enough"


def test_several_recordings_share_batches_and_each_comes_when_it_is_done(tmp_path):
    said = [text_of(n, seed=n) for n in (3, 40, 1, 2, 25)]
    paths = [write(tmp_path / f"{n}.wav", sound(text)) for n, text in enumerate(said)]
    paths.insert(2, tmp_path / "gone.wav")
    seconds: list[float] = []
    model = make_model()
    found = list(model(paths, seconds.append))
    assert [path for path, _ in found] == paths
    assert [result if isinstance(result, str) else result.text for _, result in found] == [
        said[0], said[1], "no such file", *said[2:]
    ]  # fmt: skip
    assert sum(seconds) == pytest.approx(sum(len(sound(text)) for text in said) / RATE)


def test_memory_does_not_grow_with_the_recording(tmp_path):
    model = make_model()
    peaks = []
    for seconds in (2, 30, 300):  # the first compiles
        path = write(tmp_path / f"{seconds}.wav", np.tile(sound("ab "), 1 + seconds * RATE // len(sound("ab "))))
        tracemalloc.start()
        transcripts(model, path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 5 minutes of int16 are 9.6 MB; the text grows, at some hundred bytes a word.
    assert peaks[2] - peaks[1] < 3e6, peaks


def test_confidence_is_the_posterior_of_a_words_tokens(tmp_path):
    path = write(tmp_path / "a.wav", sound("a"))
    model = make_model()
    model.variables = {"sure": jnp.float32(0.1)}
    token = TOKENIZER.encode("a")[0]
    weights = np.exp(-0.8 * (LOUDNESS[token] - LOUDNESS) ** 2)
    expected = weights[token] / weights.sum()
    assert transcripts(model, path)[0].words[0].confidence == pytest.approx(expected, rel=1e-5)  # float32


def test_a_recording_without_a_frame_is_an_empty_transcript(tmp_path):
    paths = [write(tmp_path / f"{n}.wav", np.zeros(n, np.int16)) for n in (0, HOP + EXTRA - 1, 5000)]
    assert [(found.words, found.seconds) for found in transcripts(make_model(), *paths)] == [
        ([], 0.0), ([], (HOP + EXTRA - 1) / RATE), ([], 5000 / RATE)
    ]  # fmt: skip


class Seq2seq(CTC):
    """Stands for tasks whose pieces are searched by themselves."""


@pytest.mark.parametrize("timed", [True, False])
def test_other_tasks_transcribe_pieces(tmp_path, monkeypatch, timed):
    """Each piece says "a" for every full 0.1 s; only some decoders know when."""

    def recognizer(*_):
        def recognize(variables, batch):
            count = np.asarray(batch["lengths"]) // 1600
            ids = np.full((len(count), 1, 40), TOKENIZER.encode("a")[0])
            ids[:, 0, 1::2] = SPACE
            frames = np.broadcast_to(10 * np.arange(40), ids.shape) if timed else np.full(ids.shape, -1)
            return Hypotheses(*map(jnp.asarray, (ids, count[:, None], np.zeros(len(count)), frames)))

        return recognize

    monkeypatch.setattr(transcription, "Recognizer", recognizer)
    task, mesh = Seq2seq(0), sharding.make_mesh(data=-1, fsdp=1)
    model = Transcriber(task, {}, TOKENIZER, Decoding(), mesh, seconds=2.0, overlap=0.0, rows=1)
    audio = np.random.default_rng(0).normal(0, 3000, 3 * RATE).astype(np.int16)
    audio[int(1.4 * RATE) : int(1.8 * RATE)] = 0
    found = transcripts(model, write(tmp_path / "a.wav", audio))[0]
    # 1.6 s are 16 tokens, "a" and space by turns; 1.4 s are 14.
    assert found.text == "a " * 14 + "a"
    assert found.timing == ("frames" if timed else "spread")
    starts = [0.2 * n for n in range(8)] + [1.6 + 0.2 * n for n in range(7)]
    np.testing.assert_allclose([word.start for word in found.words], starts, atol=0.02 if timed else 0.06)


def test_windows_that_overlap_altogether_are_refused():
    with pytest.raises(UserError, match="too short"):
        make_model(overlap=2.0)


# ---- pipes


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
    pipe = Pipe(io.BufferedReader(io.BytesIO(data)))
    assert next(iter(pipe))
    pipe.stopped = True
    assert list(pipe) == []


# ---- the verb


def tiny_config(**model: Any) -> Any:
    config = configs.load(str(REPO / "configs/finetune/ctc.py:size=tiny,smoke"))
    with config.unlocked():
        config.task.classes = TOKENIZER.size
        config.model.update(model)
    return config


def make_state(config: Any, seed: int = 0) -> Any:
    task, mesh = configs.make_task(config), sharding.make_mesh(data=-1, fsdp=1)
    spec = batch_spec(Shape(4, 16_000)) | {"tokens": ((4, 5), np.int32), "token_lengths": ((4,), np.int32)}
    return jax.jit(lambda: init_state(task, optax.identity(), seed, batch_shapes(spec, mesh)))()


def write_run(folder: Path, config: Any, state: Any) -> Path:
    configs.claim_workdir(folder, config)
    TOKENIZER.save(folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, every=1)
    checkpoints.save(3, state, {"model": configs.to_json(config)["model"]}, force=True)
    checkpoints.close()
    return folder


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


def test_every_mistake_is_one_clear_line(asr, talks, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    make_tokenizer("characters", ["xyz"]).save(other)
    one = talks / "one.wav"
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
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value)
    for wrong in (("-", one), (one, "--rows=0"), (one, "--window=nan"), (one, "--rate=1"), ("-", "--delay=0"),
                  (one, "--format=doc"), (one, "--checkpoint=last")):  # fmt: skip
        with pytest.raises(SystemExit):
            run(f"--workdir={asr}", *wrong)


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

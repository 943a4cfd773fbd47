"""Transcripts of long recordings against what was written into them, and what the whole recording gives at once."""

import itertools
import tracemalloc
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from speechjax import sharding, transcription
from speechjax.decode.types import Hypotheses
from speechjax.errors import UserError
from speechjax.live import Listener
from speechjax.recognition import Decoding
from speechjax.subtitles import as_json
from speechjax.transcription import Transcriber
from tests.speaking import (
    CTC,
    EXTRA,
    HOP,
    LOUDNESS,
    RATE,
    SPACE,
    TOKENIZER,
    make_model,
    sound,
    text_of,
    transcripts,
    write,
)


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


def test_of_every_part_the_best_hypotheses_and_their_posteriors(tmp_path):
    """A short recording is one part, a long one several, which hold all that was said."""
    model = make_model(decoding=Decoding(search="beam", beams=4, symbols=4, best=3))
    model.variables = {"sure": jnp.float32(0.1)}
    said = text_of(20)
    paths = [write(tmp_path / "short.wav", sound("bad")), write(tmp_path / "long.wav", sound(said))]
    short, long = transcripts(model, *paths)
    (part,) = short.parts
    assert (part.hypotheses[0][0], len(part.hypotheses)) == (short.text, 3)
    assert len({text for text, _ in part.hypotheses}) == 3
    posteriors = [sure for _, sure in part.hypotheses]
    assert sum(posteriors) == pytest.approx(1, abs=1e-6)  # float32
    assert posteriors == sorted(posteriors, reverse=True)
    assert 0.01 < posteriors[1] < 0.5
    assert len(long.parts) > 2
    assert "".join(part.hypotheses[0][0] for part in long.parts).replace(" ", "") == long.text.replace(" ", "")
    assert all(before.end == after.start for before, after in itertools.pairwise(long.parts))
    written = as_json(short)["parts"]
    assert written[0]["hypotheses"][0] == dict(text=short.text, posterior=round(posteriors[0], 4))
    assert "parts" not in as_json(transcripts(make_model(), paths[0])[0])


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

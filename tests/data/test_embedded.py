"""The embedded corpus is the same bytes everywhere, and its labels describe its sound."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

espeakng_loader = pytest.importorskip("espeakng_loader")

from speechjax.data import embedded, espeak  # noqa: E402
from speechjax.errors import UserError  # noqa: E402

LANGUAGES = sorted({speaker.lang for speaker in embedded.speakers()})
GRUMPY = espeak.Voice("en-us+whisper", rate=130)  # noise from the random generator, from the first sample to the last


def digest(hours: float, seed: int) -> str:
    sha = hashlib.sha256(espeak.speak("Hush!", GRUMPY)[0].tobytes())
    for utterance in embedded.utterances(hours, seed):
        audio = utterance.pop("audio")
        sha.update(audio.tobytes() + repr(utterance).encode())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def corpus() -> list[dict]:
    return list(embedded.utterances(hours=0.12, seed=1))


@pytest.fixture
def fresh_worker():
    """No worker before or after, so that the test's own library or data are what gets loaded."""
    espeak._worker.cache_clear()
    yield
    espeak._worker.cache_clear()


def test_same_seed_same_bytes_in_another_process():
    espeak.speak("Something else before, said at length.", GRUMPY)
    # A second later, because eSpeak NG seeds its noise with the time of day in seconds.
    command = "import time; from tests.data.test_embedded import digest; time.sleep(1); print(digest(0.02, 7))"
    other = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert digest(0.02, 7) == other.stdout.strip()
    assert digest(0.02, 8) != other.stdout.strip()


@pytest.mark.parametrize("name", ["en-us+whisper", "fr+f5", "de+Andrea", "ru+adam"])
def test_speak_forgets_what_it_said(name: str):
    voice = espeak.Voice(name)
    first, phones = espeak.speak("Anna, Otto, Hannah.", voice)
    espeak.speak("One, two, three; testing.", GRUMPY)
    again, phones_again = espeak.speak("Anna, Otto, Hannah.", voice)
    assert np.array_equal(first, again)
    assert phones == phones_again
    changed, _ = espeak.speak("Anna, Otto, Hannah.", voice._replace(pitch=51))
    assert not np.array_equal(first, changed)


def test_more_hours_only_lengthen_the_list():
    short, long = (list(embedded.utterances(hours, seed=2)) for hours in (0.01, 0.02))
    assert sum(len(u["audio"]) for u in short) >= 0.01 * 3600 * embedded.SAMPLE_RATE
    assert len(short) < len(long)
    for a, b in zip(short, long, strict=False):
        assert np.array_equal(a.pop("audio"), b.pop("audio"))
        assert a == b


def test_global_random_state_is_left_alone_and_not_used():
    np.random.seed(0)
    before = digest(0.005, 3)
    assert np.random.randint(1 << 30) == np.random.RandomState(0).randint(1 << 30)
    assert digest(0.005, 3) == before


def test_cast_is_large_and_everyone_speaks(corpus):
    cast = embedded.speakers()
    assert len({speaker.voice.name for speaker in cast}) == len(cast) >= 24
    assert len(LANGUAGES) >= 6
    assert {u["speaker"] for u in corpus} == {speaker.voice.name for speaker in cast}
    assert {u["lang"] for u in corpus} == set(LANGUAGES)
    assert len({u["id"] for u in corpus}) == len(corpus)


def test_no_two_speakers_sound_alike():
    # eSpeak NG ignores a variant it does not know, so a lost voice file would show as a double.
    voices = [speaker.voice._replace(rate=175, pitch=50, range=50) for speaker in embedded.speakers()]
    assert len({espeak.speak("Mama", voice)[0].tobytes() for voice in set(voices)}) == len(voices)


def test_audio_is_sane(corpus):
    for u in corpus:
        audio = u["audio"]
        assert audio.dtype == np.int16
        assert audio.ndim == 1
        assert embedded.SHORTEST <= len(audio) / embedded.SAMPLE_RATE <= embedded.LONGEST
        # Levels are drawn between -16 and -1 dB of full scale, rounded to int16.
        assert 10 ** (-16 / 20) * 32767 - 1 <= np.abs(audio.astype(int)).max() <= 10 ** (-1 / 20) * 32767 + 1
        power = np.abs(np.fft.rfft(audio)) ** 2
        hertz = np.fft.rfftfreq(len(audio), 1 / embedded.SAMPLE_RATE)
        share = [power[(hertz >= low) & (hertz < high)].sum() / power.sum() for low, high in ((0, 50), (80, 4000))]
        assert share[0] < 0.02, u["id"]
        assert share[1] > 0.5, u["id"]
    assert len({len(u["audio"]) for u in corpus}) > 0.9 * len(corpus)


def test_every_sample_belongs_to_exactly_one_phone(corpus):
    for u in corpus:
        symbols, starts, ends = zip(*u["phones"], strict=True)
        assert starts[0] == 0.0
        assert ends[-1] == len(u["audio"]) / embedded.SAMPLE_RATE
        assert starts[1:] == ends[:-1]
        assert all(start < end for start, end in zip(starts, ends, strict=True))
        in_samples = np.array(ends) * embedded.SAMPLE_RATE
        assert np.abs(in_samples - np.rint(in_samples)).max() < 1e-6  # float64 rounding of 15 s times 16 kHz
        assert "sil" in symbols
        assert not any(a == b == "sil" for a, b in itertools.pairwise(symbols))
    inventory = {symbol for u in corpus for symbol, _, _ in u["phones"]}
    assert 60 < len(inventory) < 150
    assert not [symbol for symbol in inventory - {"sil"} if re.search(r"[^\w\u0300-\u036fː]", symbol)]


def labelled(corpus: list[dict], symbols: set[str], shift_s: float = 0.0) -> np.ndarray:
    """The samples of all phones among `symbols`, each utterance at unit power, with labels moved by `shift_s`."""
    pieces = []
    for u in corpus:
        audio = u["audio"] / u["audio"].std()
        for symbol, start, end in u["phones"]:
            if symbol in symbols:
                pieces.append(audio[round((start + shift_s) * 16000) : round((end + shift_s) * 16000)])
    return np.concatenate(pieces)


def test_labels_lie_where_the_sound_is(corpus):
    def brightness(audio: np.ndarray) -> float:
        """The power of the first difference over the signal's: 0 for low tones, 2 for white noise, 4 at most."""
        return float(np.mean(np.diff(audio) ** 2) / np.mean(audio**2))

    hiss, hum = {"s", "ʃ", "z"}, {"a", "o", "m", "u"}
    # Measured: 2.1 against 0.15 in place; 0.25 against 0.25 with the labels moved by 0.2 s, two or three phones.
    assert brightness(labelled(corpus, hiss)) > 10 * brightness(labelled(corpus, hum))
    assert brightness(labelled(corpus, hiss, 0.2)) < 2 * brightness(labelled(corpus, hum, 0.2))
    # Pauses hold at most a faint echo (0.02), unlike what is 0.2 s away from them (0.9).
    assert labelled(corpus, {"sil"}).std() < 0.05
    assert labelled(corpus, {"sil"}, 0.2).std() > 0.2


@pytest.mark.parametrize("lang", LANGUAGES)
def test_grammar_is_closed_and_varied(lang: str):
    grammar = embedded._grammar(lang)
    used = {slot for choices in grammar.values() for choice in choices for slot in re.findall(r"\{(.*?)\}", choice)}
    assert used | {"sentence"} == set(grammar)
    rng = np.random.default_rng(0)
    sentences = [embedded._expand("sentence", lang, rng) for _ in range(300)]
    # The shortest rules have some hundred fillings, so a few repeats are chance.
    assert len(set(sentences)) > 285
    written = embedded._written(lang)
    assert sum(len(sentence.split()) for sentence in written) > 240
    for sentence in (*sentences, *written):
        assert not re.search(r"[\d{}|#\n]|  ", sentence), sentence
        assert re.fullmatch(r"\W*(\w).*[.!?]", sentence)[1].isupper(), sentence  # pyright: ignore


def test_alignment_of_espeak_events():
    """Each oddity of the events on its own: lead-in, stress, modifier, merged phone, glide, pause, word boundary."""
    audio = np.full(1000, 1000, np.int16)
    audio[:50] = audio[700:900] = 0
    events = [("p", 50), ("ʲ", 100), ("ˈɛ", 150), ("l", 350), ("", 350), ("", 500), ("", 700), ("", 800), ("ə-", 900)]
    assert espeak._align(events, audio) == [
        ("sil", 0, 50), ("pʲ", 50, 150), ("ɛ", 150, 250), ("l", 250, 700), ("sil", 700, 900), ("ə", 900, 1000),
    ]  # fmt: skip


def test_without_espeak_the_user_learns_what_to_do(monkeypatch, fresh_worker):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install espeakng-loader.*--config.data.source=folder:DIR") as error:
        next(embedded.utterances())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("broken", ["get_library_path", "get_data_path"])
def test_a_broken_installation_is_named(monkeypatch, fresh_worker, tmp_path, broken):
    monkeypatch.setattr(espeakng_loader, broken, lambda: str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"does not load \(.*nothing.*pip install --force-reinstall"):
        next(embedded.utterances())


def test_data_under_a_very_long_path(monkeypatch, fresh_worker, tmp_path):
    deep = tmp_path / ("d" * 80) / ("e" * 80)
    deep.mkdir(parents=True)
    (deep / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(deep / "espeak-ng-data"))
    assert len(espeak.speak("hello", espeak.Voice("en-us"))[0]) > 5000


def test_unknown_voice_is_refused_and_the_next_one_spoken():
    with pytest.raises(ValueError, match="no voice 'xx-nowhere'"):
        espeak.speak("hello", espeak.Voice("xx-nowhere"))
    assert len(espeak.speak("hello", espeak.Voice("en-us"))[0]) > 5000


def test_a_killed_worker_is_replaced(fresh_worker):
    before, _ = espeak.speak("hello", espeak.Voice("en-us"))
    espeak._worker(os.getpid())._process.kill()
    espeak._worker(os.getpid())._process.wait()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        espeak.speak("hello", espeak.Voice("en-us"))
    assert np.array_equal(espeak.speak("hello", espeak.Voice("en-us"))[0], before)


def test_an_interrupted_answer_is_not_taken_for_the_next(monkeypatch, fresh_worker):
    expected, _ = espeak.speak("hello", espeak.Voice("en-us"))

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(espeak._Worker, "_read_header", interrupted)
        espeak.speak("a longer text than the other", espeak.Voice("en-us"))
    assert np.array_equal(espeak.speak("hello", espeak.Voice("en-us"))[0], expected)

"""The door to eSpeak NG: text in, speech and its aligned phones out, or phones alone; whatever was said before.

The library is process-wide, not re-entrant, changes the locale, and keeps state from one utterance to the next. So it
lives in a process of its own (`espeak_worker.py`), started at the first call and ended with this one.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from speechjax.errors import UserError

SAMPLE_RATE = 22050
SILENCE = "sil"
_OTHER_AUDIO = "or use your own audio with --config.data.source=folder:DIR"
_OTHER_TOKENS = "or choose characters instead of phonemes"
_LOCK = threading.Lock()

# What is left when stress is taken off: hyphens and carets of eSpeak's own notation, one vowel that has no IPA name
# there, and one diphthong that its 8-byte event names cut short.
_STRIP = str.maketrans("", "", "ˈˌ-^")
_RENAME = {'u"': "ʉ", "ɐ̃ʊ": "ɐ̃ʊ̃", "ss": "s"}
_MODIFIERS = ("ʲ",)
# Marks in phonemised text where eSpeak takes another language's rules for a word, and returns: (en) ... (ru).
_LANGUAGE = re.compile(r"\([a-z0-9-]+\)")


class Voice(NamedTuple):
    """A language or accent with a variant, such as "en-us+f3"; words a minute; pitch and its range in 0..99."""

    name: str
    rate: int = 175
    pitch: int = 50
    range: int = 50


class Phone(NamedTuple):
    """An IPA symbol, or "sil", and the samples [start, end) that it covers."""

    symbol: str
    start: int
    end: int


class _Unusable(Exception):  # noqa: N818 - half of a message, whose other half is the caller's
    """eSpeak NG is missing or does not load; the message says why, and how to get it."""


class _Worker:
    """A running `espeak_worker.py`. Raises _Unusable where eSpeak NG is missing or does not load."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise _Unusable("eSpeak NG is not installed: run `pip install espeakng-loader`") from None
        script = Path(__file__).with_name("espeak_worker.py")
        paths = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
        # A session of its own: Ctrl-C is for the caller, whose end closes the pipe and so ends the worker.
        self._process = subprocess.Popen(
            [sys.executable, "-IS", script, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(self.close)
        header = self._read_header()
        if "error" in header:
            raise _Unusable(
                f"eSpeak NG does not load ({header['error']}): run `pip install --force-reinstall espeakng-loader`"
            )
        if header["sample_rate"] != SAMPLE_RATE:
            raise RuntimeError(f"eSpeak NG speaks at {header['sample_rate']} Hz, expected {SAMPLE_RATE}")

    def _read_header(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the eSpeak NG process ended with exit code {self._process.wait()}")
        return json.loads(line)

    def ask(self, request: dict) -> tuple[list, np.ndarray]:
        """The answer's phonemes, as the worker gives them for this verb, and its int16 samples."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            header = self._read_header()
            pcm = self._process.stdout.read(header["bytes"]) if "bytes" in header else b""
        except BaseException:
            # Interrupted between question and answer: the next question must not get this one's answer.
            self.close()
            _worker.cache_clear()
            raise
        if "error" in header:
            raise ValueError(f"eSpeak NG {header['error']}")
        return header["phonemes"], np.frombuffer(pcm, "<i2")

    def close(self) -> None:
        """Ends the process; harmless in a fork of the one that started it."""
        with contextlib.suppress(BrokenPipeError), self._process:
            self._process.kill()


@functools.cache
def _worker(pid: int) -> _Worker:
    """This process's worker; by process id, because a fork must not write into its parent's pipes."""
    del pid
    return _Worker()


def speak(text: str, voice: Voice) -> tuple[np.ndarray, list[Phone]]:
    """Speech [S] int16 at 22050 Hz, and phones that cover every sample exactly once, in order.

    A pure function of its arguments (for one version of the library). Thread-safe, one utterance at a time.
    Stress marks are dropped; "sil" marks pauses. About one phone in 400, mostly an l after a vowel, has no samples of
    its own in eSpeak's events: it gets the second half of the phone that it is spoken with.

    Raises UserError without eSpeak NG, ValueError for a voice or a text that it refuses.
    """
    events, audio = _ask({"verb": "speak", "text": text, **voice._asdict()}, instead=_OTHER_AUDIO)
    return audio, _align(events, audio)


def phonemize(text: str, language: str) -> list[str]:
    """The phones of `text` as a voice of `language`, such as "de" or "en-us", would speak it; [] where it is silent.

    A pure function of its arguments (for one version of the library), thread-safe. Numbers, abbreviations and emoji
    are read out. Symbols are those of `speak`, IPA without stress marks, with neither word boundaries nor pauses; only
    the long consonants of Italian and some long vowels keep a length mark that eSpeak's events of speech lack.

    Raises UserError without eSpeak NG, ValueError for a language or a text that it refuses.
    """
    # To the library a zero byte is the text's end.
    request = {"verb": "phonemize", "text": text.replace("\0", " "), "name": language}
    clauses, _ = _ask(request, instead=_OTHER_TOKENS)
    names = re.split("[_ ]", " ".join(_LANGUAGE.sub("", clause) for clause in clauses))
    return [symbol for symbol in map(_symbol, names) if symbol]


def _ask(request: dict, instead: str) -> tuple[list, np.ndarray]:
    try:
        with _LOCK:
            return _worker(os.getpid()).ask(request)
    except _Unusable as error:
        raise UserError(f"{error}, {instead}") from None


def _symbol(name: str) -> str:
    name = name.translate(_STRIP)
    return _RENAME.get(name, name)


def _align(events: list[tuple[str, int]], audio: np.ndarray) -> list[Phone]:
    """Phones from eSpeak's events, whose unnamed ones are pauses, glides between vowels and word boundaries."""
    starts = [0, *(start for _, start in events), len(audio)]
    quiet = 0.1 * _rms(audio)
    phones: list[Phone] = []
    for name, start, end in zip(["", *(name for name, _ in events)], starts, starts[1:], strict=False):
        symbol = _symbol(name)
        if not symbol and start == end:
            continue
        if not symbol and (not phones or _rms(audio[start:end]) < quiet):
            symbol = SILENCE
        last = phones[-1] if phones else Phone("", 0, 0)
        if symbol in ("", *_MODIFIERS) or symbol == last.symbol == SILENCE:
            phones[-1] = Phone(last.symbol + symbol.replace(SILENCE, ""), last.start, end)
        elif start < end:
            phones.append(Phone(symbol, start, end))
        elif last.symbol != SILENCE and last.end - last.start > 1:
            middle = (last.start + last.end) // 2
            phones[-1:] = last._replace(end=middle), Phone(symbol, middle, end)
    return phones


def _rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))

"""The embedded corpus: speech that this machine synthesises at first use, with text, speaker, language and phones.

Every utterance is a pure function of (seed, index): a speaker from the fixed cast, sentences from a seeded grammar or
from running text, and a level. So a longer corpus begins with the shorter one, and nothing is downloaded.
Texts and grammars (the project's own) are in `embedded_text/`.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

from speechjax.data import espeak

SAMPLE_RATE = 16000
SHORTEST, LONGEST = 2.0, 15.0  # seconds
_TEXTS = Path(__file__).with_name("embedded_text")
_ACCENTS = {
    "en-us": "en", "en-gb-x-rp": "en", "de": "de", "fr": "fr", "es": "es", "it": "it", "pt-br": "pt", "ru": "ru",
}  # fmt: skip
# Variants that sound human: no whispers, robots or long echoes, and none that saturates in any of the accents.
_FEMALE = ("f1", "f2", "f3", "f4", "f5", "Annie", "Alicia", "Andrea", "belinda", "linda", "aunty", "shelby")
_MALE = (
    "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "Lee", "Mario", "Mike", "max", "adam", "david", "boris", "quincy",
)  # fmt: skip
_SPEAKERS_PER_ACCENT = 6


class Speaker(NamedTuple):
    """One of the cast, who always speaks with this voice."""

    lang: str
    voice: espeak.Voice


@functools.cache
def speakers() -> tuple[Speaker, ...]:
    """The cast, the same for every seed: half female, half male in each accent, each with a rate and a pitch."""
    cast = []
    variants = [itertools.cycle(group) for group in (_FEMALE, _MALE)]
    for accent, lang in _ACCENTS.items():
        for k in range(_SPEAKERS_PER_ACCENT):
            rng = np.random.default_rng(len(cast))
            name = f"{accent}+{next(variants[k % 2])}"
            cast.append(Speaker(lang, espeak.Voice(name, *rng.integers((145, 35, 35), (200, 65, 75)).tolist())))
    return tuple(cast)


def utterances(hours: float = 1.0, seed: int = 0) -> Iterator[dict]:
    """Utterances of 2 to 15 s until they add up to `hours`; more hours only lengthen the list.

    Yields dict(id str, audio int16 [S] at 16 kHz, text str, speaker str, lang str,
    phones [(symbol, start s, end s), ...]); the phones cover the audio, in order, pauses as "sil".
    Each speaker has one utterance in every round through the cast. Raises UserError without eSpeak NG.
    """
    cast = speakers()
    seconds = 0.0
    for take in itertools.count():
        for who in np.random.default_rng((seed, 0, take)).permutation(len(cast)).tolist():
            if seconds >= 3600 * hours:
                return
            rng = np.random.default_rng((seed, 1, take, who))
            utterance = _utterance(cast[who], rng)
            seconds += len(utterance["audio"]) / SAMPLE_RATE
            yield {"id": f"{utterance['speaker']}_{take:04d}", **utterance}


def _utterance(speaker: Speaker, rng: np.random.Generator) -> dict:
    while True:
        text = _text(speaker.lang, rng)
        speech, phones = espeak.speak(text, speaker.voice)
        if SHORTEST <= len(speech) / espeak.SAMPLE_RATE <= LONGEST:
            break
    audio = soxr.resample(speech / np.float32(32768), espeak.SAMPLE_RATE, SAMPLE_RATE, quality="HQ")
    peak = 10 ** (rng.uniform(-16.0, -1.0) / 20)
    audio = np.rint(audio * (32767 * peak / np.abs(audio).max())).astype(np.int16)
    ends = [round(phone.end * SAMPLE_RATE / espeak.SAMPLE_RATE) / SAMPLE_RATE for phone in phones]
    ends[-1] = len(audio) / SAMPLE_RATE
    return {
        "audio": audio,
        "text": text,
        "speaker": speaker.voice.name,
        "lang": speaker.lang,
        "phones": [(phone.symbol, start, end) for phone, start, end in zip(phones, [0.0, *ends], ends, strict=False)],
    }


def _text(lang: str, rng: np.random.Generator) -> str:
    """Whole sentences: consecutive ones of the running text, or the grammar's, up to a random length."""
    written = _written(lang)
    if rng.random() < 0.4:
        start = int(rng.integers(len(written)))
        source = itertools.islice(itertools.cycle(written), start, None)
    else:
        source = (_expand("sentence", lang, rng) for _ in itertools.count())
    wanted = rng.integers(10, 170)
    text = next(source)
    while len(text) < wanted:
        text += " " + next(source)
    return text


@functools.cache
def _written(lang: str) -> tuple[str, ...]:
    """The sentences of the running text."""
    text = " ".join((_TEXTS / f"{lang}.txt").read_text(encoding="utf-8").split())
    return tuple(re.split(r"(?<=[.!?]) ", text))


@functools.cache
def _grammar(lang: str) -> dict[str, tuple[str, ...]]:
    """Slot name -> alternatives, in which {slot} stands for one of that slot's."""
    text = (_TEXTS / f"{lang}.grammar.txt").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    rules = re.findall(r"^(\w+):((?:.*)(?:\n +.*)*)", lines, flags=re.MULTILINE)
    return {slot: tuple(" ".join(choice.split()) for choice in body.split("|")) for slot, body in rules}


def _expand(slot: str, lang: str, rng: np.random.Generator) -> str:
    """One sentence of the grammar, or a part of one."""
    choices = _grammar(lang)[slot]
    choice = choices[int(rng.integers(len(choices)))]
    text = re.sub(r"\{(\w+)\}", lambda found: _expand(found[1], lang, rng), choice)
    return re.sub(r"\w", lambda first: first[0].upper(), text, count=1) if slot == "sentence" else text

"""Phones of a text are those that eSpeak NG speaks, the same whatever was asked before."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("espeakng_loader")

from speechjax.data import espeak
from speechjax.data.text import make_tokenizer
from speechjax.errors import UserError

TEXTS = Path(espeak.__file__).with_name("embedded_text")


@pytest.mark.parametrize(
    ("voice", "text", "expected"),
    [
        ("de", "Hallo Welt", "h a l oː v ɛ l t"),
        ("en-us", "The church, chair.", "ð ə tʃ ɜː tʃ tʃ ɛɹ"),
        ("de", "3 %", "d ɾ aɪ p ɾ oː ts ɛ n t"),
        ("ru", "люблю weekend", "ɭʲ ʉ b ɭʲ ʉ w iː k ɛ n d"),  # a word by English rules, without its (en) and (ru)
        ("en-us", "a\0b", "ɐ b iː"),
        ("de", " ... ?!", ""),
    ],
)
def test_phones_of_known_words(voice, text, expected):
    assert " ".join(espeak.phonemize(text, voice)) == expected


@pytest.mark.parametrize(
    ("voice", "lang"), [("de", "de"), ("en-us", "en"), ("fr", "fr"), ("it", "it"), ("pt-br", "pt")]
)
def test_phones_are_those_that_are_spoken(voice, lang):
    for line in (TEXTS / f"{lang}.txt").read_text("utf-8").splitlines()[:5]:
        spoken = [phone.symbol for phone in espeak.speak(line, espeak.Voice(voice))[1] if phone.symbol != "sil"]
        phones = espeak.phonemize(line, voice)
        if lang in ("it", "pt"):  # whose events lack some length marks
            phones, spoken = ([symbol.replace("ː", "") for symbol in symbols] for symbols in (phones, spoken))
        assert phones == spoken


def test_phones_do_not_depend_on_what_was_asked_before():
    first = espeak.phonemize("Anna, Otto und Dr. 23.", "de")
    espeak.phonemize("]] [[h@'loU]] <b>x</b> 日本語 😀", "fr")
    espeak.speak("Hush!", espeak.Voice("en-us+whisper"))
    assert espeak.phonemize("Anna, Otto und Dr. 23.", "de") == first
    assert espeak.phonemize("Anna, Otto und Dr. 23.", "en-us") != first


def test_unknown_voice_is_named():
    with pytest.raises(UserError, match=r"no voice 'xx-nowhere'.*phonemes:de"):
        make_tokenizer("phonemes:xx-nowhere", ["Hallo"])


def test_phonemes_without_espeak(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    espeak._worker.cache_clear()
    with pytest.raises(UserError, match=r"pip install espeakng-loader`, or choose characters"):
        make_tokenizer("phonemes:de", ["Hallo"])

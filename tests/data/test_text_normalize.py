"""Normalisation does what its one-line descriptions say, once and for all, in every script."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.data.normalize import normalize, parse_steps
from speechjax.errors import UserError

STEPS = ("nfc", "nfkc", "lowercase", "no_punctuation", "single_spaces")
SPEECH = "nfkc lowercase no_punctuation"
# Where steps can get into each other's way: final sigma, dotted İ, ligatures, marks, joiners, apostrophes, surrogates.
TRICKY = st.text(
    st.one_of(st.sampled_from("aΣσİßẞﬁ℡ᴬ…'’＇·״\u0301\u0307\u0345\u200c\u200d\u00ad\ufe0f \n-_5½a"), st.characters())
)


@pytest.mark.parametrize(
    ("steps", "text", "expected"),
    [
        ("nfc", "e\u0301 ﬁ ①", "é ﬁ ①"),
        ("nfkc", "e\u0301 ﬁ ① Ａ …", "é fi 1 A ..."),
        ("lowercase", "STRASSE Straße ẞ Привет ΟΔΟΣ", "strasse straße ß привет οδος"),
        ("single_spaces", " a \t b\r\n\u00a0c\u2003d ", "a b c d"),
        ("no_punctuation", "Well-known, 50 %!", "Well known 50"),
        ("no_punctuation", "3.14 1,000 2:30", "3 14 1 000 2 30"),
        ("no_punctuation", "It’s 'quoted', the dogs' l'eau rock'n'roll", "It's quoted the dogs l'eau rock'n'roll"),
        ("no_punctuation", "¿Qué? «Non» „Ja“ – col·lecció", "Qué Non Ja col·lecció"),
        ("no_punctuation", "你好，世界。「再见」！", "你好 世界 再见"),
        ("no_punctuation", "مَرْحَبًا، كيف؟", "مَرْحَبًا كيف"),
        ("no_punctuation", "נאט״ו ג׳ירפה", "נאט״ו ג׳ירפה"),
        ("no_punctuation", "नमस्ते। क्‍ष", "नमस्ते क्‍ष"),
        ("no_punctuation", "می‌خواهم \u202bاست\u202c", "می‌خواهم است"),
        ("no_punctuation", "so\u00adft 👩‍💻 ❤️ 5️⃣ a_b\ufeff", "soft 5️⃣ a b"),
        (SPEECH, "ÜBER ﬁne… Ｈｉ！", "über fine hi"),
        ("lowercase nfkc", "℡", "tel"),  # nfkc makes capitals after lowercase was done
        ("", " As  it was…\n", " As  it was…\n"),
    ],
)  # fmt: skip
def test_examples(steps, text, expected):
    assert normalize(text, steps) == expected


@settings(max_examples=25, deadline=None)
@given(TRICKY, st.lists(st.sampled_from(STEPS), max_size=4))
def test_twice_is_once(text, names):
    steps = " ".join(names)
    once = normalize(text, steps)
    assert normalize(once, steps) == once


def test_every_character_settles_and_letters_stay():
    """All of Unicode, in blocks with a letter before and after: no step undoes another for ever, no letter is lost."""
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and unicodedata.category(chr(i)) != "Cn"]
    kept = [c for c in points if unicodedata.category(c)[0] in "LMN"]
    points = [c for c in points if unicodedata.category(c) != "Co"]  # private use: 137,000 characters, all alike
    for start in range(0, len(points), 4096):
        text = "".join(f"a{c}a " for c in points[start : start + 4096])
        settled = normalize(text, "lowercase nfkc no_punctuation")
        assert normalize(settled, "lowercase nfkc no_punctuation") == settled
    words = "".join(f"a{c}" for c in kept)
    assert normalize(words, "no_punctuation") == words


@settings(max_examples=25, deadline=None)
@given(TRICKY)
def test_no_punctuation_leaves_words_and_single_spaces(text):
    result = normalize(text, "no_punctuation")
    assert result == " ".join(result.split())
    for i, c in enumerate(result):
        if unicodedata.category(c)[0] not in "LMN" and c != " ":
            assert c in "'·״׳\u200c\u200d"
            assert result[i - 1] != " "
            assert unicodedata.category(result[i + 1])[0] in "LN"


def test_surrogates_are_joined_or_replaced():
    assert normalize("\ud83d\ude00 \ud83d.", "") == "😀 \ufffd."


def test_unknown_step_is_named():
    with pytest.raises(UserError, match=r"no step 'upper'; choose from nfc, nfkc, .*single_spaces"):
        normalize("a", "nfc upper")
    assert parse_steps(" nfc   lowercase ") == ("nfc", "lowercase")

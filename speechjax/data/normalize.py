"""Normalisation of transcripts: a few named steps that a config, and the vocabulary made with them, can spell out.

    nfc             one code point where Unicode has one for a letter with its accents: e + ´ becomes é
    nfkc            nfc, and lookalikes become what they look like: ﬁ ① Ａ … become fi 1 A ...
    lowercase       small letters by Unicode's rules, the same in every language (so I gives i in Turkish too); ß stays
    no_punctuation  only words are left, with single spaces between them: letters, marks and digits of all scripts, and
                    signs between two letters that belong to a word (l'eau, col·lecció); "well-known, 50 %!" becomes
                    "well known 50", 3.14 becomes 3 14: spell out what is spoken before using it
    single_spaces   runs of white space, line ends too, become one space; none at either end

Digits are never spelled out: how they were spoken ("1984", "2:30") is not in the text.
"""

import functools
import unicodedata
from collections.abc import Callable

from speechjax.errors import UserError

# What a word may hold between two letters (UAX #29, rules WB6, WB7 and WB7b): apostrophes, all written alike, the
# Catalan middle dot and the Hebrew geresh and gershayim.
_INSIDE_WORDS = {"'": "'", "’": "'", "＇": "'", "·": "·", "׳": "׳", "״": "״"}
# Invisible, and yet part of the spelling in Persian and in Indic scripts. All other format characters are not.
_JOINERS = ("\u200c", "\u200d")


def _only_words(text: str) -> str:
    visible = [c for c in text if unicodedata.category(c) != "Cf" or c in _JOINERS]
    kept: list[str] = []
    for c, after in zip(visible, [*visible, " "][1:], strict=True):
        in_word = bool(kept) and unicodedata.category(kept[-1])[0] in "LMN"
        group = unicodedata.category(c)[0]
        if group in "LN" or (group == "M" and in_word):
            kept.append(c)
        elif (c in _INSIDE_WORDS or c in _JOINERS) and in_word and unicodedata.category(after)[0] in "LN":
            kept.append(_INSIDE_WORDS.get(c, c))
        elif c not in _JOINERS:
            kept.append(" ")
    return _single_spaces("".join(kept))


def _single_spaces(text: str) -> str:
    return " ".join(text.split())


_STEPS: dict[str, Callable[[str], str]] = {
    "nfc": functools.partial(unicodedata.normalize, "NFC"),
    "nfkc": functools.partial(unicodedata.normalize, "NFKC"),
    "lowercase": str.lower,
    "no_punctuation": _only_words,
    "single_spaces": _single_spaces,
}


@functools.cache
def parse_steps(steps: str) -> tuple[str, ...]:
    """Names of the steps in `steps`, such as "nfkc lowercase"; raises UserError for one that does not exist."""
    names = tuple(steps.split())
    for name in names:
        if name not in _STEPS:
            raise UserError(f"normalisation {steps!r}: no step {name!r}; choose from {', '.join(_STEPS)}")
    return names


def normalize(text: str, steps: str) -> str:
    """`text` after the named steps, in their order, repeated until they change nothing more.

    Repeated, because one step may make work for an earlier one (nfkc turns ℡ into TEL, after lowercase was done);
    so normalising twice is the same as once. Surrogates that are no half of a pair, which no encoding can write,
    become U+FFFD. Raises UserError for an unknown step. The module's docstring describes the steps.
    """
    names = parse_steps(steps)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    before = None
    while text != before:
        before = text
        for name in names:
            text = _STEPS[name](text)
    return text

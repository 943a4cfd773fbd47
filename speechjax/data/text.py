"""Transcripts to integer ids and back: characters, bytes, SentencePiece pieces or phonemes.

In every vocabulary id 0 is <pad>, which is also the blank of CTC, 1 is <s> (begin), 2 is </s> (end) and 3 is <unk>;
the vocabulary's own tokens follow from 4 on. Text that holds the letters of "<pad>" is text like any other.
A vocabulary lies in a folder as `vocab.json`, which a person can read and which says how texts are normalised, and
for SentencePiece with `sentencepiece.model` beside it. The same texts, in any order, make the same bytes.
"""

import abc
import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from speechjax.data import espeak, pieces
from speechjax.data.normalize import normalize, parse_steps
from speechjax.errors import UserError

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
_UNKNOWN = "⁇"  # what an <unk> looks like in decoded text
_FORMAT = 1  # of vocab.json: count up when older code would misread it
_VOCAB, _MODEL = "vocab.json", "sentencepiece.model"


class _Damage(Exception):  # noqa: N818 - becomes a UserError that names the file
    """What is wrong with a stored vocabulary."""


class Tokenizer(abc.ABC):
    """Text to ids and back. `tokens` are all of them in the order of their ids, `steps` the normalisation."""

    kind: ClassVar[str]

    def __init__(self, tokens: Iterable[str], steps: str) -> None:
        """From the tokens after the specials."""
        self.tokens = (*SPECIALS, *tokens)
        self.steps = steps
        self._ids = {token: i for i, token in enumerate(self.tokens) if i >= len(SPECIALS)}
        if len(self._ids) + len(SPECIALS) != len(self.tokens):
            raise _Damage("a token is listed twice")

    @property
    def size(self) -> int:
        """Number of ids, specials included: the width of an output layer."""
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of the normalised text, without <s> and </s>; <unk> where it has no token, [] for empty text."""
        return [self._ids.get(symbol, UNK) for symbol in self._symbols(normalize(text, self.steps))]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids (any integers, NumPy's and JAX's too); <pad>, <s> and </s> are left out, <unk> becomes ⁇.

        Gives back the normalised text; from phonemes, the phones with spaces between them. Repeats are not merged.
        Raises ValueError for an id that the vocabulary does not have.
        """
        symbols = []
        for i in map(operator.index, ids):
            if not 0 <= i < self.size:
                raise ValueError(f"id {i} is not among the vocabulary's 0 to {self.size - 1}")
            if i >= len(SPECIALS):
                symbols.append(self.tokens[i])
            elif i == UNK:
                symbols.append(_UNKNOWN)
        return self._join(symbols)

    def unknown(self, texts: Iterable[str]) -> Counter[str]:
        """What of `texts` becomes <unk>, and how often: characters, phones, or SentencePiece's runs of characters."""
        symbols = (symbol for text in texts for symbol in self._symbols(normalize(text, self.steps)))
        return Counter(symbol for symbol in symbols if symbol not in self._ids)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the vocabulary into `folder`, which is made; nothing new where it is there already.

        Raises UserError where another vocabulary is: weights that were trained with it would lose their meaning.
        """
        folder = Path(folder)
        files = self._files()
        if (folder / _VOCAB).exists() and (folder / _VOCAB).read_bytes() != files[_VOCAB]:
            raise UserError(
                f"{folder / _VOCAB} is another vocabulary, to which trained weights may belong: choose a new workdir, "
                "or delete that file if none do"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            os.replace(partial, folder / name)

    @classmethod
    @abc.abstractmethod
    def learn(cls, texts: Iterable[str], steps: str, argument: str) -> Self:
        """The vocabulary of `texts`, with what the spec says after its colon. Raises UserError as `make_tokenizer`."""

    @classmethod
    def restore(cls, content: Mapping[str, Any], tokens: list[str], folder: Path) -> Self:
        """From the checked content of vocab.json, the tokens after the specials, and other files of the folder."""
        del folder
        return cls(tokens, content["steps"])

    @abc.abstractmethod
    def _symbols(self, text: str) -> Sequence[str]:
        """What becomes one id each."""

    @abc.abstractmethod
    def _join(self, symbols: list[str]) -> str:
        """Text of tokens that are no specials, and of ⁇."""

    def _details(self) -> dict[str, Any]:
        """What vocab.json holds for this kind alone."""
        return {}

    def _files(self) -> dict[str, bytes]:
        """Content of each file by name, vocab.json last: where it is, the others are."""
        content = {
            "format": _FORMAT,
            "kind": self.kind,
            **self._details(),
            "steps": self.steps,
            "specials": {token: i for i, token in enumerate(SPECIALS)},
            "tokens": self.tokens,
        }
        return {_VOCAB: (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()}


class Characters(Tokenizer):
    """One id a code point, in Unicode's order; accents that normalisation leaves apart have ids of their own."""

    kind = "characters"

    def __init__(self, tokens: Iterable[str], steps: str) -> None:
        super().__init__(tokens, steps)
        if any(len(token) != 1 for token in self._ids):
            raise _Damage("a token is not one character")

    @classmethod
    def learn(cls, texts: Iterable[str], steps: str, argument: str) -> Self:
        _refuse(argument, cls.kind)
        return cls(_inventory((normalize(text, steps) for text in texts), cls.kind), steps)

    def _symbols(self, text: str) -> str:
        return text

    def _join(self, symbols: list[str]) -> str:
        return "".join(symbols)


class Bytes(Tokenizer):
    """One id a byte of UTF-8, all 256, whatever the texts: nothing is ever unknown."""

    kind = "bytes"
    _ALL = tuple(f"<0x{byte:02X}>" for byte in range(256))

    def __init__(self, tokens: Iterable[str], steps: str) -> None:
        super().__init__(tokens, steps)
        if self.tokens[len(SPECIALS) :] != self._ALL:
            raise _Damage("tokens are not <0x00> to <0xFF>")

    @classmethod
    def learn(cls, texts: Iterable[str], steps: str, argument: str) -> Self:
        del texts
        _refuse(argument, cls.kind)
        return cls(cls._ALL, steps)

    def _symbols(self, text: str) -> list[str]:
        return [self._ALL[byte] for byte in text.encode()]

    def _join(self, symbols: list[str]) -> str:
        written = (_UNKNOWN.encode() if symbol == _UNKNOWN else bytes([int(symbol[1:-1], 16)]) for symbol in symbols)
        return b"".join(written).decode(errors="replace")


class Phonemes(Tokenizer):
    """One id a phone that eSpeak NG would speak, in Unicode's order; texts keep what it needs, such as punctuation."""

    kind = "phonemes"

    def __init__(self, tokens: Iterable[str], steps: str, voice: str) -> None:
        super().__init__(tokens, steps)
        self.voice = voice

    @classmethod
    def learn(cls, texts: Iterable[str], steps: str, argument: str) -> Self:
        try:
            espeak.phonemize("", argument)
        except ValueError:
            raise UserError(
                f"phonemes: eSpeak NG has no voice {argument!r}; name a language it knows, such as "
                "phonemes:en-us, phonemes:de or phonemes:cmn"
            ) from None
        phones = (espeak.phonemize(normalize(text, steps), argument) for text in texts)
        return cls(_inventory(phones, cls.kind), steps, argument)

    @classmethod
    def restore(cls, content: Mapping[str, Any], tokens: list[str], folder: Path) -> Self:
        del folder
        if not isinstance(content.get("voice"), str):
            raise _Damage("it names no voice")
        return cls(tokens, content["steps"], content["voice"])

    def _symbols(self, text: str) -> list[str]:
        return espeak.phonemize(text, self.voice)

    def _join(self, symbols: list[str]) -> str:
        return " ".join(symbols)

    def _details(self) -> dict[str, Any]:
        return {"voice": self.voice}


class Symbols(Tokenizer):
    """Tokens of any length, as models of other stacks bring them; a text is cut into the longest that fit."""

    kind = "symbols"

    def __init__(self, tokens: Iterable[str], steps: str) -> None:
        super().__init__(tokens, steps)
        self._longest = max(map(len, self._ids), default=1)

    @classmethod
    def learn(cls, texts: Iterable[str], steps: str, argument: str) -> Self:
        raise UserError(
            "tokenizer symbols: these come with a converted model (python -m speechjax.convert), not of texts"
        )

    def _symbols(self, text: str) -> list[str]:
        found, at = [], 0
        while at < len(text):
            ends = range(min(self._longest, len(text) - at), 0, -1)
            size = next((n for n in ends if text[at : at + n] in self._ids), 1)
            found.append(text[at : at + size])
            at += size
        return found

    def _join(self, symbols: list[str]) -> str:
        return "".join(symbols)


class SentencePiece(Tokenizer):
    """One id a piece of a SentencePiece model (Kudo and Richardson 2018), whose own specials become this module's.

    A model that was trained here has the same ids as its pieces; in one from elsewhere they move up past the specials.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, steps: str) -> None:
        """From a serialised model. Raises UserError without the sentencepiece library, ValueError for no model."""
        self._processor = pieces.load(model)
        self._model = model
        super().__init__(pieces.ordinary(self._processor), steps)

    @classmethod
    def learn(cls, texts: Iterable[str], steps: str, argument: str) -> Self:
        if argument.isdecimal():
            return cls(pieces.train([normalize(text, steps) for text in texts], int(argument)), steps)
        try:
            return cls(Path(argument).read_bytes(), steps)
        except OSError as error:
            raise UserError(
                f"sentencepiece: no model {argument!r} ({error.strerror}); say sentencepiece:500 to train one with 500 "
                "tokens, or sentencepiece:FILE.model to load one"
            ) from None
        except (ValueError, _Damage):
            raise UserError(f"sentencepiece:{argument} is not a SentencePiece model, or a damaged one") from None

    @classmethod
    def restore(cls, content: Mapping[str, Any], tokens: list[str], folder: Path) -> Self:
        try:
            model = (folder / _MODEL).read_bytes()
        except OSError as error:
            raise _Damage(f"{_MODEL} beside it: {error.strerror}") from error
        if hashlib.sha256(model).hexdigest() != content.get("model_sha256"):
            raise _Damage(f"{_MODEL} beside it is damaged, or belongs to another vocabulary")
        try:
            tokenizer = cls(model, content["steps"])
        except ValueError as error:
            raise _Damage(f"{_MODEL} beside it is not a model") from error
        if tokenizer.tokens[len(SPECIALS) :] != tuple(tokens):
            raise _Damage(f"its tokens are not those of {_MODEL}")
        return tokenizer

    def _symbols(self, text: str) -> list[str]:
        return self._processor.encode(text, out_type=str)

    def _join(self, symbols: list[str]) -> str:
        return self._processor.decode_pieces(symbols)

    def _details(self) -> dict[str, Any]:
        return {"model_sha256": hashlib.sha256(self._model).hexdigest()}

    def _files(self) -> dict[str, bytes]:
        return {_MODEL: self._model, **super()._files()}


_KINDS: dict[str, type[Tokenizer]] = {kind.kind: kind for kind in (Characters, Bytes, SentencePiece, Phonemes, Symbols)}


def make_tokenizer(spec: str, texts: Iterable[str], steps: str = "nfc single_spaces") -> Tokenizer:
    """The tokenizer that `spec` says, with the vocabulary of `texts`, which `steps` normalise first.

    `spec` is one of
        characters               the characters of the texts
        bytes                    UTF-8; the texts are not read
        sentencepiece:500        a unigram model with 500 tokens (specials included) trained on the texts
        sentencepiece:FILE.model one trained elsewhere; the texts are not read
        phonemes:de              the phones of the texts in the voice of eSpeak NG of that name, some ms a text
    `steps` are described in `speechjax.data.normalize`; phonemes want their text as it was written.

    Raises UserError for a spec or steps that mean nothing, texts that are all empty or too few for so many pieces, and
    where the library for the kind is missing.
    """
    kind, _, argument = spec.partition(":")
    if kind not in _KINDS:
        choices = "characters, bytes, sentencepiece:SIZE, sentencepiece:FILE.model or phonemes:VOICE"
        raise UserError(f"tokenizer {spec!r}: choose {choices}")
    return _KINDS[kind].learn(texts, " ".join(parse_steps(steps)), argument)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` left in `folder`; reads data only, nothing in it is run.

    Raises UserError where there is none, it is damaged, or code wrote it that has another format.
    """
    path = Path(folder) / _VOCAB
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"no vocabulary at {path} ({error.strerror}); is it the workdir of a run with one?") from None
    except (ValueError, RecursionError):
        content = None
    try:
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise _Damage("it is not the JSON that was saved")
        if content["format"] != _FORMAT:
            raise UserError(
                f"{path} has format {content['format']}, and this code reads {_FORMAT}: use the speechjax that wrote it"
            )
        return _restore(content, path.parent)
    except _Damage as damage:
        raise UserError(f"{path} is damaged: {damage}; restore the folder from a copy") from None


def _restore(content: dict[str, Any], folder: Path) -> Tokenizer:
    kind, steps, tokens = content.get("kind"), content.get("steps"), content.get("tokens")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _Damage(f"there is no kind {kind!r}")
    if not isinstance(steps, str):
        raise _Damage("it has no normalisation steps")
    try:
        parse_steps(steps)
    except UserError as error:
        raise _Damage(str(error)) from None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise _Damage("its tokens are not a list of strings")
    if tuple(tokens[: len(SPECIALS)]) != SPECIALS:
        raise _Damage(f"its tokens do not begin with {' '.join(SPECIALS)}")
    return _KINDS[kind].restore(content, tokens[len(SPECIALS) :], folder)


def _inventory(texts: Iterable[Iterable[str]], kind: str) -> list[str]:
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise UserError(f"{kind}: all texts are empty, or there are none; does the source have transcripts?")
    return sorted(found)


def _refuse(argument: str, kind: str) -> None:
    if argument:
        raise UserError(f"tokenizer {kind}:{argument}: say {kind} alone, it takes nothing after a colon")

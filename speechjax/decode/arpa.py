"""N-gram models as ARPA files: log10 probabilities and back-off weights, as KenLM, SRILM and others have them.

White space parts symbols there.  So a space is written <space>, as other toolkits name it; other white space, and a
space inside a symbol, \\u0020 and the like; a backslash is doubled, and one before "<" says that a symbol only looks
like <space>, <s>, </s> or <unk>.  ▁ is a letter like any other: pieces of SentencePiece stay as they are.

Shapes: V symbols, n_k n-grams of order k.
"""

import array
import codecs
import gzip
import io
import logging
import os
import re
import unicodedata
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np

from speechjax.decode.ngram import BEGIN, END, MARKS, UNKNOWN, NGram
from speechjax.errors import UserError

log = logging.getLogger("speechjax")

SPACE = "<space>"
_MISSING_UNKNOWN = -100.0  # log10, as in KenLM
_MARKS = {b"<unk>": UNKNOWN, b"<UNK>": UNKNOWN, b"<s>": BEGIN, b"</s>": END}


def escape(symbol: str) -> str:
    """A symbol as an ARPA file spells it."""
    if symbol == " ":
        return SPACE
    if symbol in (SPACE, *MARKS, "<UNK>"):
        return "\\" + symbol
    return "".join(
        "\\\\" if c == "\\" else f"\\u{ord(c):04x}" if c.isspace() or unicodedata.category(c) in ("Cc", "Cs") else c
        for c in symbol
    )


def unescape(name: str) -> str:
    """The symbol that `escape` spelled, and of other names themselves; files from elsewhere use no backslashes."""
    if name == SPACE:
        return " "
    return re.sub(r"\\(\\|u[0-9a-f]{4}|(?=<))", lambda m: chr(int(m[1][1:], 16)) if m[1][1:] else m[1], name)


def write_arpa(model: NGram, path: str | os.PathLike[str]) -> None:
    """Writes the model as an ARPA file, gzipped where the name ends in .gz; float32 come back exactly."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as raw:
        if path.suffix == ".gz":
            # Without a time or a name in it: the same model makes the same bytes.
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
                _write(model, file)
        else:
            _write(model, raw)
    os.replace(partial, path)


def _write(model: NGram, binary: BinaryIO | gzip.GzipFile) -> None:
    file = io.TextIOWrapper(binary, "utf-8", newline="\n")
    sizes = (f"ngram {k}={len(keys)}\n" for k, keys in enumerate(model.keys, 1))
    file.write("\\data\\\n" + "".join(sizes))
    names = [*MARKS, *map(escape, model.symbols[len(MARKS) :])]
    beginnings = [""]
    for k, keys in enumerate(model.keys, 1):
        parents, last = (x.tolist() for x in np.divmod(keys, len(names)))
        grams = [beginnings[p] + names[s] for p, s in zip(parents, last, strict=True)]
        file.write(f"\n\\{k}-grams:\n")
        columns = [_written(model.logp[k - 1]), grams]
        if k < model.order:
            columns.append(_written(model.backoff[k - 1]))
            beginnings = [f"{gram} " for gram in grams]
        file.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))
    file.write("\n\\end\\\n")
    file.flush()
    file.detach()


def _written(numbers: np.ndarray) -> list[str]:
    """With the nine digits that tell any two float32 apart."""
    return [f"{x:.9g}" for x in numbers.tolist()]


def read_arpa(path: str | os.PathLike[str]) -> NGram:
    """The model in an ARPA file of this module, KenLM, SRILM or others; gzipped where the name ends in .gz.

    Tabs or spaces; without a back-off weight an n-gram has 0; without <unk> it has -100, as in KenLM.  Raises
    UserError, with the number of the line, for a file that is damaged or no ARPA file.
    """
    opened = gzip.open if os.fspath(path).endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            return _Reader(os.fspath(path), file).read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged, or not gzip ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; which ARPA file?") from None


class _Section(NamedTuple):
    """n-grams of one order as they are in the file: log10 [n], back-offs [n], ids [n, k], numbers of the lines [n]."""

    logp: np.ndarray
    backoff: np.ndarray
    grams: np.ndarray
    lines: np.ndarray


class _Reader:
    """Reads a file once, from top to bottom; `number` is that of the line in hand."""

    def __init__(self, path: str, file: BinaryIO | gzip.GzipFile | io.BufferedReader) -> None:
        self._path, self._file, self._number = path, file, 0
        self._line = b""
        self._symbols = [*MARKS]
        self._ids: dict[bytes, int] = {}

    def read(self) -> NGram:
        sizes = self._header()
        model = self._unigrams(self._section(1, sizes[0]))
        for k in range(2, len(sizes) + 1):
            self._add(model, self._section(k, sizes[k - 1]))
        if self._line != b"\\end\\":
            self._fail(f"{self._shown()} where \\end\\ should be: the header names {len(sizes)} orders")
        used = max(k for k, keys in enumerate(model.keys, 1) if len(keys))
        return NGram(model.symbols, model.keys[:used], model.logp[:used], model.backoff[: used - 1])

    def _fail(self, fault: str, number: int | None = None) -> NoReturn:
        raise UserError(f"{self._path}:{number or self._number}: {fault}")

    def _shown(self) -> str:
        return repr(self._line[:60].decode(errors="replace"))

    def _next(self, where: str) -> bytes:
        """The next line that is not blank, without its end."""
        for raw in self._file:
            self._number += 1
            self._line = (raw if self._number > 1 else raw.removeprefix(codecs.BOM_UTF8)).strip()
            if self._line:
                return self._line
        self._fail(f"the file ends {where}; it is truncated")

    def _header(self) -> list[int]:
        """Numbers of n-grams, and on to the first section."""
        try:
            while self._next("") != b"\\data\\":
                pass
        except UserError:
            raise UserError(f"{self._path}: no line \\data\\ in it; is it an ARPA file?") from None
        sizes: list[int] = []
        while match := re.fullmatch(rb"ngram\s+(\d+)\s*=\s*(\d+)", self._next("in its header")):
            if int(match[1]) != len(sizes) + 1:
                self._fail(f"{self._shown()} where that of order {len(sizes) + 1} should be")
            sizes.append(int(match[2]))
        if not sizes:
            self._fail(f"{self._shown()} where 'ngram 1=...' should be")
        return sizes

    def _section(self, k: int, size: int) -> _Section:
        """Reads a section, and on to the line after it."""
        if self._line != b"\\%d-grams:" % k:
            self._fail(f"{self._shown()} where \\{k}-grams: should be")
        numbers, grams, lines = array.array("d"), array.array("i"), array.array("q")
        place = f"in \\{k}-grams:, which should have {size} lines"
        number_of = self._ids.__getitem__
        while not self._next(place).startswith(b"\\"):
            fields = self._line.split()
            if not k + 1 <= len(fields) <= k + 2:
                self._fail(f"{self._shown()} is not a number, {k} symbols, and perhaps a second number")
            if k == 1:
                self._name(fields[1])
            try:
                numbers.extend((float(fields[0]), float(fields[k + 1]) if len(fields) > k + 1 else 0.0))
                grams.extend(map(number_of, fields[1 : k + 1]))
            except ValueError:
                self._fail(f"{self._shown()} has no number where one should be")
            except KeyError as error:
                self._fail(f"{error.args[0].decode(errors='replace')!r} is not among the 1-grams")
            lines.append(self._number)
        if len(lines) != size:
            self._fail(f"\\{k}-grams: ends after {len(lines)} lines, where the header says {size}")
        logp, backoff = np.array(numbers, np.float64).reshape(-1, 2).T
        bad = np.flatnonzero(np.isnan(logp) | (logp > 0) | ~np.isfinite(backoff))
        if len(bad):
            self._fail("a log probability above 0, or not a number", lines[bad[0]])
        logp, backoff = (np.maximum(x, _MISSING_UNKNOWN).astype(np.float32) for x in (logp, backoff))
        return _Section(logp, backoff, np.array(grams, np.int64).reshape(-1, k), np.array(lines, np.int64))

    def _name(self, name: bytes) -> None:
        """Gives a 1-gram its id; that it may be there twice shows later."""
        if name not in self._ids:
            try:
                symbol = name.decode("utf-8")
            except UnicodeDecodeError:
                self._fail(f"{self._shown()} is not UTF-8; convert the file to that encoding")
            self._ids[name] = _MARKS.get(name, len(self._symbols))
            if name not in _MARKS:
                self._symbols.append(unescape(symbol))

    def _unigrams(self, section: _Section) -> NGram:
        """The model with its lowest order."""
        ids = section.grams[:, 0]
        self._check_once(ids, section)
        for id in (BEGIN, END):
            if id not in ids:
                self._fail(f"\\1-grams: has no {MARKS[id]}; a model of texts needs it")
        if UNKNOWN not in ids:
            log.info("%s has no <unk>: unknown symbols have probability 1e%d", self._path, _MISSING_UNKNOWN)
        V = len(self._symbols)
        logp, backoff = np.full(V, _MISSING_UNKNOWN, np.float32), np.zeros(V, np.float32)
        logp[ids], backoff[ids] = section.logp, section.backoff
        return NGram(tuple(self._symbols), [np.arange(V, dtype=np.int64)], [logp], [backoff])

    def _add(self, model: NGram, section: _Section) -> None:
        """The next order of the model, in the order of its keys."""
        k = section.grams.shape[1]
        rows = section.grams[:, 0]
        for length in range(2, k):
            rows = model.find(length, rows, section.grams[:, length - 1])
        lost = np.flatnonzero(rows < 0)
        if len(lost):
            self._fail(f"the first {k - 1} symbols of this {k}-gram are no {k - 1}-gram", int(section.lines[lost[0]]))
        keys = rows * len(model.symbols) + section.grams[:, -1]
        self._check_once(keys, section)
        order = np.argsort(keys)
        model.keys.append(keys[order])
        model.logp.append(section.logp[order])
        model.backoff.append(section.backoff[order])

    def _check_once(self, keys: np.ndarray, section: _Section) -> None:
        order = np.argsort(keys, kind="stable")
        twice = np.flatnonzero(np.diff(keys[order]) == 0)
        if len(twice):
            self._fail("this n-gram is there twice", int(section.lines[order[twice[0] + 1]]))

"""Manifests: files that list recordings, in the formats that other toolkits write, told apart by what is in them.

    NeMo           a JSON object a line: {"audio_filepath": "a.wav", "offset": 1.5, "duration": 3.0, "text": "..."}
    Hugging Face   metadata.jsonl, likewise with "file_name"; or a table (.csv, .tsv) with such columns in its header
    fairseq        a folder, then a line PATH<TAB>FRAMES each; transcripts beside it: NAME.wrd, NAME.ltr, NAME.phn
    LJSpeech       ID|TEXT|NORMALISED TEXT a line, recordings in wavs/ beside it

Paths are relative to the manifest's folder. What is wrong with one line rejects that line, as "FILE:LINE"; what is
wrong with the file as a whole is the user's mistake. fairseq's lines cannot name a file with a tab or a line break in
its name: write JSON for those.
"""

import array
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
import soundfile

from speechjax.data.decode import EXTENSIONS, SAMPLE_RATE, BadAudio, decode
from speechjax.data.sources import Item, Source, Status, digest, file_item, file_status, is_remote, with_standard_names
from speechjax.errors import UserError

_PATH_KEYS = ("audio_filepath", "audio", "path", "file", "file_name")
_TRANSCRIPTS = {".wrd": "text", ".ltr": "text", ".phn": "phones"}  # fairseq's, in order of preference
_JSON_EXAMPLE = '{"audio_filepath": "a.wav", "text": "..."}'


class _Line(NamedTuple):
    """A recording as a manifest lists it, or the fault that makes its line unusable.

    `path` from the manifest's folder on; `frames` at the file's own rate is what fairseq states instead of a duration.
    """

    id: str
    number: int
    path: str = ""
    offset: float = 0.0
    duration: float | None = None
    frames: int | None = None
    meta: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to it
    fault: str = ""


class _File(NamedTuple):
    """A manifest as it was read, without a byte order mark."""

    path: str
    data: bytes

    @property
    def text(self) -> str:
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            number = self.data.count(b"\n", 0, error.start) + 1
            raise UserError(f"{self.path}:{number}: not UTF-8; save the file in that encoding") from error

    @property
    def lines(self) -> list[str]:
        """str.splitlines would also break at separators that belong to a text."""
        return io.StringIO(self.text, newline=None).read().split("\n")

    def rejected(self, number: int, fault: str) -> _Line:
        return _Line(f"{os.path.basename(self.path)}:{number}", number, fault=fault)


class _Format(NamedTuple):
    """How to read a manifest, and what to show somebody who got it wrong."""

    read: Callable[[_File], Iterable[_Line]]
    example: str
    beside: tuple[str, ...] = ()


def open_manifest(source: str, rest: str) -> Source:
    """The source that the file `rest` lists.

    Raises `UserError` where it cannot be read, is in no known format, gives two lines the same id, or lists nothing
    that could be read.
    """
    if not rest:
        raise UserError(f"data source {source!r}: which file? Write manifest:FILE")
    path = os.path.abspath(os.path.expanduser(rest))
    data = _content(source, path)
    file = _File(path, data.removeprefix(b"\xef\xbb\xbf"))
    if not file.data.strip():
        raise UserError(f"{path}: the manifest is empty")
    form = _recognise(file)
    lines = sorted((_checked(file, line) for line in form.read(file)), key=lambda line: line.id)
    for one, other in itertools.pairwise(lines):
        if one.id == other.id:
            first, second = sorted((one.number, other.number))
            raise UserError(
                f"{path}: lines {first} and {second} have the same id {one.id!r}; list each recording once, or, in "
                'JSON or a table, give each line its own "id"'
            )
    sizes, missing, identities = array.array("q"), 0, hashlib.sha256()
    for line in lines:
        # Not kept: of a million lines the objects would take as much memory as the manifest.
        status = Status(line.fault, 0) if line.fault else file_status(_located(path, line))
        missing += status.missing or bool(line.fault)
        sizes.append(status.size)
        identities.update(status.identity.encode() + b"\0")
    if missing == len(lines):
        _refuse(path, lines, form)

    def items() -> Iterator[Item]:
        for line, size in zip(lines, sizes, strict=True):
            yield _item(line, _located(path, line), size)

    beside = [os.path.splitext(path)[0] + extension for extension in form.beside]
    contents = [data, *(_content(source, name) for name in beside if os.path.isfile(name))]
    hashes = [hashlib.sha256(content).hexdigest() for content in contents]
    return Source(source, digest(["manifest", path, *hashes, identities.hexdigest()]), items, len(lines))


def _located(manifest: str, line: _Line) -> str:
    if is_remote(line.path):
        return line.path
    home = line.path.startswith("~/")
    return os.path.join(os.path.dirname(manifest), os.path.expanduser(line.path) if home else line.path)


def _content(source: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"data source {source!r}: cannot read {path}: {error.strerror}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16; save it as UTF-8")
    return data


def _checked(file: _File, line: _Line) -> _Line:
    """The line, rejected if no file can have such a name (a lone surrogate, a NUL)."""
    try:
        fine = b"\0" not in os.fsencode(line.path)
        line.id.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        fine = False
    return line if fine else file.rejected(line.number, "bad path or id")


def _item(line: _Line, path: str, file_size: int) -> Item:
    if line.fault:
        # It has no file, but who sorts items by whether they lie in files must find it among its neighbours.
        return Item(line.id, functools.partial(refuse_line, line.fault), line.meta, file=(path, 0.0, None))
    if line.frames is not None:
        read = functools.partial(decode_whole, path, line.frames)
        return Item(line.id, read, line.meta, file_size, (path, 0.0, None))
    size = file_size if line.duration is None else round(2 * SAMPLE_RATE * line.duration)
    return file_item(line.id, path, line.meta, size, line.offset, line.duration)


def refuse_line(fault: str) -> NoReturn:
    raise BadAudio(fault)


def decode_whole(path: str, frames: int) -> np.ndarray:
    """`decode`, where the file must have as many frames as the manifest says, or 0.1 s fewer (MP3 is estimated)."""
    audio = decode(path)
    with open(path, "rb") as file:  # soundfile itself opens no name that is not Unicode
        rate = soundfile.info(file).samplerate
    if len(audio) / SAMPLE_RATE < frames / rate - 0.1:
        raise BadAudio("shorter than its stated duration")
    return audio


def _refuse(path: str, lines: list[_Line], form: _Format) -> NoReturn:
    if not lines:
        raise UserError(f"{path}: the manifest lists no recording; a line looks like {form.example}")
    first = min(lines, key=lambda line: line.number)
    raise UserError(
        f"{path}: none of its {len(lines)} lines is usable; line {first.number}: "
        + (first.fault or f"no such file: {_located(path, first)} (relative paths start at the manifest's folder)")
        + f"; a line looks like {form.example}"
    )


# ---- formats


def _recognise(file: _File) -> _Format:
    extension = os.path.splitext(file.path)[1].lower()
    first, second = [*file.data[: 1 << 16].splitlines(), b"", b""][:2]
    if extension in (".jsonl", ".json", ".ndjson") or file.data.lstrip().startswith(b"{"):
        return _Format(_read_json, _JSON_EXAMPLE)
    fairseq = _Format(_read_fairseq, "a.wav<TAB>16000, below a first line with the folder", tuple(_TRANSCRIPTS))
    if b"\t" not in first and re.fullmatch(rb"[^\t]+\t\d+\s*", second):
        return fairseq
    heading = first.decode("utf-8", "replace").strip()
    for delimiter in ",\t;|":
        if set(_PATH_KEYS) & set(_columns(heading, delimiter)):
            return _Format(functools.partial(_read_table, delimiter=delimiter), f"a.wav{delimiter}some text")
    if extension == ".tsv" and "\t" not in heading:
        return fairseq
    if "|" in heading:
        return _Format(_read_ljspeech, "LJ001-0001|some text|some text, with wavs/LJ001-0001.wav beside the manifest")
    shown = heading if len(heading) <= 80 else heading[:80] + "..."
    raise UserError(
        f"{file.path}:1: no known format: the header {shown!a} names no column of recordings (one of "
        f"{', '.join(_PATH_KEYS)}); without a header, write JSON lines such as {_JSON_EXAMPLE}"
    )


def _columns(heading: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([heading], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _read_json(file: _File) -> Iterator[_Line]:
    for number, row in enumerate(io.BytesIO(file.data), 1):
        if not row.strip():
            continue
        try:
            entry = json.loads(row)
        except (ValueError, RecursionError):
            yield file.rejected(number, "bad JSON")
            continue
        yield _line(file, number, entry) if isinstance(entry, dict) else file.rejected(number, "not a JSON object")


def _line(file: _File, number: int, entry: dict[str, Any]) -> _Line:
    key = next((key for key in _PATH_KEYS if isinstance(entry.get(key), str)), None)
    if key is None:
        return file.rejected(number, "no audio path")
    name = entry.pop(key)
    offset, duration = entry.pop("offset", None), entry.pop("duration", None)
    # Pieces of one file differ in their offset, so it belongs to the name.
    own_id = entry.pop("id", name if offset is None else f"{name}@{offset}")
    if not all(value is None or (type(value) in (int, float) and 0 <= value < 1e9) for value in (offset, duration)):
        return file.rejected(number, "bad offset or duration")
    meta = with_standard_names(entry)
    return _Line(str(own_id), number, name, offset or 0.0, duration, None, meta)


def _read_table(file: _File, delimiter: str) -> Iterator[_Line]:
    """Rows below a header that names the columns, quoted as RFC 4180 says; an empty field is an absent one."""
    reader = csv.reader(io.StringIO(file.text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    number = 1
    try:
        for row in reader:
            # A quoted field may span lines, so a row begins after the line where the one before it ended.
            begin, number = number, reader.line_num + 1
            if not columns:
                columns = [name.strip() for name in row]
                if len(set(columns)) < len(columns):
                    raise UserError(f"{file.path}:1: two columns of the same name in {delimiter.join(columns)!a}")
            elif row and len(row) != len(columns):
                yield file.rejected(begin, f"{'fewer' if len(row) < len(columns) else 'more'} fields than columns")
            elif row:
                yield _table_line(file, begin, dict(zip(columns, row, strict=True)))
    except csv.Error as error:
        raise UserError(
            f'{file.path}:{number}: {error}; a field with quotes in it is written "like ""this"" one"'
        ) from error


def _table_line(file: _File, number: int, row: dict[str, str]) -> _Line:
    entry: dict[str, Any] = {name: value for name, value in row.items() if value}
    try:
        entry |= {name: float(entry[name]) for name in ("offset", "duration") if name in entry}
    except ValueError:
        return file.rejected(number, "bad offset or duration")
    return _line(file, number, entry)


def _read_fairseq(file: _File) -> Iterator[_Line]:
    # Linux lets a file name hold any bytes, and scripts write them as they are.
    folder, *rows = [row.decode("utf-8", "surrogateescape") for row in file.data.rstrip().splitlines()]
    transcripts = _transcripts(file, len(rows))
    for k, row in enumerate(rows):
        match = re.fullmatch(r"([^\t]+)\t(\d{1,18})\s*", row)
        if match is None:
            yield file.rejected(k + 2, "not a path, a tab and a number of frames")
            continue
        meta = {key: values[k] for key, values in transcripts.items()}
        yield _Line(match[1], k + 2, os.path.join(folder.strip(), match[1]), frames=int(match[2]), meta=meta)


def _transcripts(file: _File, count: int) -> dict[str, list[Any]]:
    """{"text": [...], "phones": [...]} from the files beside a fairseq manifest, `count` lines each."""
    found: dict[str, list[Any]] = {}
    for extension, key in _TRANSCRIPTS.items():
        path = os.path.splitext(file.path)[0] + extension
        if key in found or not os.path.isfile(path):
            continue
        rows = _File(path, _content(path, path).removesuffix(b"\n")).lines
        if len(rows) != count:
            raise UserError(f"{path} has {len(rows)} lines for the {count} recordings of {file.path}")
        if extension == ".ltr":  # h e l l o | w o r l d |
            rows = [row.replace(" ", "").replace("|", " ").strip() for row in rows]
        found[key] = [row.split() for row in rows] if key == "phones" else rows
    return found


def _read_ljspeech(file: _File) -> Iterator[_Line]:
    # Quotes have no meaning here: the original has texts with a single one.
    for number, row in enumerate(file.lines, 1):
        fields = [field.strip() for field in row.split("|")]
        if not row.strip():
            continue
        if len(fields) not in (2, 3) or not fields[0]:
            yield file.rejected(number, "not id|text or id|text|normalised text")
            continue
        name = fields[0] if os.path.splitext(fields[0])[1].lower() in EXTENSIONS else f"{fields[0]}.wav"
        meta = with_standard_names(dict(zip(("text", "normalized_text"), fields[1:], strict=False)))
        yield _Line(fields[0], number, os.path.join("wavs", name), meta=meta)

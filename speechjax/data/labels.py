"""Labels beside the batches of audio: a unit every so many samples, and a class for a whole utterance.

Shapes: R rows of this host, G segments of a row, N units of a row.
"""

import array
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.plan import Batch, Rows, Shape, Spec
from speechjax.data.records import Records
from speechjax.data.shard_writer import write_json
from speechjax.data.sources import digest
from speechjax.data.units import COMMAND, identities, open_units
from speechjax.errors import UserError

log = logging.getLogger("speechjax")

PHONE_HOP = SAMPLE_RATE // 100
_FORMAT = 1  # of phones.json and labels.json
_PHONES, _LABELS = "phones.json", "labels.json"


@dataclass(frozen=True)
class UnitLabels:
    """Units of all records: one of `codes` every `hop` samples.

    `read(i, first, count)` gives units `first` to `first + count` of the recording that example i is a segment of,
    int [count], -1 where it has none.  `symbols` name the codes, if they have names.
    """

    hop: int
    codes: int
    digest: str
    read: Callable[[int, int, int], np.ndarray]
    symbols: list[str] | None = None

    def spec(self, shape: Shape) -> Spec:
        return {"units": ((shape.rows, shape.samples // self.hop), np.int32)}

    def batch(self, records: Records, part: np.ndarray, rows: Rows, lengths: np.ndarray) -> Batch:
        """{"units": int32 [R, N]}: unit j of a row covers its samples [j hop, (j + 1) hop); -1 where there is none.

        `lengths` int [R, G] are the samples that could be read, `part` maps the plan's examples to records.  A crop
        that begins between two units takes the nearer one for its first, the later of two that are as near: labels
        are then up to half a hop early or late.  Only units that lie wholly within a segment count.
        """
        units = np.full((len(rows.example), rows.shape.samples // self.hop), -1, np.int32)
        segments = np.stack([rows.example, rows.start, rows.at, lengths], axis=-1)
        for r, g in np.argwhere(lengths > 0).tolist():
            k, start, at, count = segments[r, g].tolist()
            i = int(part[k])
            first, stop = -(-at // self.hop), (at + count) // self.hop
            if first < stop:
                begin = int(records.begin[i]) + start - at  # of the row, as a sample of the recording
                shift = (2 * begin + self.hop) // (2 * self.hop)
                units[r, first:stop] = self.read(i, shift + first, stop - first)
        return {"units": units}

    def save(self, workdir: Path) -> None:
        """Names of the codes into `workdir`, if they have any; UserError where it has others."""
        if self.symbols is not None:
            _save(workdir / _PHONES, {"format": _FORMAT, "hop": self.hop, "symbols": self.symbols})


def read_units(records: Records, spec: str, workdir: Path | None) -> UnitLabels:
    """What config.data.units says: "labels:DIR", a store, or "phones", the times of phones in the recordings' metadata.

    The vocabulary of phones is the workdir's, or what occurs, sorted.  Raises UserError where recordings have no units.
    """
    kind, _, rest = spec.partition(":")
    if kind == "labels" and rest:
        return _stored(records, Path(rest))
    if spec == "phones":
        return _phones(records, workdir)
    raise UserError(f"config.data.units={spec!r}: use labels:DIR with units made by {COMMAND}, or phones, or nothing")


def _stored(records: Records, folder: Path) -> UnitLabels:
    store = open_units(folder)
    rows = store.find(identities(records))
    again = f"label them: {COMMAND} --source={_sources(records)!r} --codebook={folder} --out=ANOTHER_FOLDER"
    for state, what in ((-2, "have changed since they were labelled in"), (-1, "have no units in")):
        if len(bad := np.flatnonzero(rows == state)):
            raise UserError(
                f"{len(bad):,} of {len(rows):,} examples {what} {store.folder}, e.g. {records.id(int(bad[0]))!r}; "
                f"{again}"
            )
    log.info("units: %d codes, one every %.3g ms (%s)", store.codes, 1000 * store.hop / SAMPLE_RATE, store.folder)
    return UnitLabels(
        store.hop, store.codes, store.digest, lambda i, first, count: store.read(int(rows[i]), first, count)
    )


# ---- phones


def _phones(records: Records, workdir: Path | None) -> UnitLabels:
    """Phones at 100 Hz, in memory: 200 bytes a second."""
    number: dict[str, int] = {}
    frames, bounds, where = array.array("h"), [0], np.full(len(records), -1)
    samples = identities(records)["samples"]
    for examples, entry in _entries(records):
        if found := _phone_times(entry, int(samples[examples[0]])):
            where[examples] = len(bounds) - 1
            frames.frombytes(_phone_frames(found, int(samples[examples[0]]), number).tobytes())
            bounds.append(len(frames))
    have = int((where >= 0).sum())
    if not have:
        raise UserError(
            "config.data.units='phones' needs phones [[symbol, start s, end s], ...] of the recordings, and "
            f"{_sources(records)} has none"
        )
    symbols = _stored_names(workdir, _PHONES, "symbols") or sorted(number)
    codes = _recoded(np.array(frames, np.int16), number, symbols, f"{_PHONES} of {workdir}")
    log.info("units: %d phones, one every 10 ms; %d of %d examples have them", len(symbols), have, len(records))

    def read(i: int, first: int, count: int) -> np.ndarray:
        found = np.full(count, -1, np.int32)
        if (w := int(where[i])) >= 0:
            own = codes[bounds[w] + max(0, first) : min(bounds[w + 1], bounds[w] + max(0, first + count))]
            found[max(0, -first) :][: len(own)] = own
        return found

    return UnitLabels(PHONE_HOP, len(symbols), _digest("phones", symbols, where, codes), read, symbols)


def _phone_times(entry: dict[str, Any], samples: int) -> list[tuple[str, int, int]]:
    """(symbol, first sample, last sample + 1) of each phone in the order of time; [] where there are no times."""
    phones = entry["meta"].get("phones") or []
    if not isinstance(phones, list) or not phones or isinstance(phones[0], str):  # fairseq's have no times
        return []
    try:
        times = [(str(symbol), round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)) for symbol, start, end in phones]
    except (TypeError, ValueError, OverflowError):
        times = []
    if not times or min(start for _, start, _ in times) < 0:
        raise UserError(f"phones of {entry['id']!r} are not [[symbol, start s, end s], ...], as in [['a', 0.1, 0.25]]")
    last = max(end for _, _, end in times)
    if last > samples + SAMPLE_RATE // 2:  # milliseconds or samples, or times of a longer recording
        raise UserError(
            f"phones of {entry['id']!r} go on to {last / SAMPLE_RATE:g} s, and it has {samples / SAMPLE_RATE:g} s: "
            "give start and end in seconds from its beginning"
        )
    return sorted(times, key=lambda phone: phone[1])


def _phone_frames(phones: list[tuple[str, int, int]], samples: int, number: dict[str, int]) -> np.ndarray:
    """int16 [frames]: the phone at the centre of each, -1 for none, of two the one that began later."""
    frames = np.full(samples // PHONE_HOP, -1, np.int16)
    for symbol, *span in phones:
        # Frame j has its centre at sample (j + 1/2) hop.
        first, stop = (-((PHONE_HOP // 2 - at) // PHONE_HOP) for at in span)
        frames[first:stop] = number.setdefault(symbol, len(number))
    return frames


# ---- classes


@dataclass(frozen=True, eq=False)
class ClassLabels:
    """The class of every record: `codes` int32 [N] number `names`, -1 where it is unknown."""

    source: str
    names: list[str]
    codes: np.ndarray
    digest: str

    def spec(self, shape: Shape) -> Spec:
        return {"label": ((shape.rows,), np.int32)}

    def batch(self, part: np.ndarray, rows: Rows, lengths: np.ndarray) -> Batch:
        """{"label": int32 [R]}, -1 for unknown ones and rows without audio; `lengths` as for units, [R, 1]."""
        there = (rows.example[:, 0] >= 0) & (lengths[:, 0] > 0)
        return {"label": np.where(there, self.codes[part[np.maximum(rows.example[:, 0], 0)]], np.int32(-1))}

    def save(self, workdir: Path) -> None:
        """The names into `workdir`; UserError where it has others."""
        _save(workdir / _LABELS, {"format": _FORMAT, "label": self.source, "names": self.names})


def read_classes(records: Records, spec: str, workdir: Path | None) -> ClassLabels:
    """What config.data.label says: "meta:FIELD" of the metadata, or "id:REGEX", whose group `label` is searched in ids.

    Segments have the class of their recording.  The names are the workdir's, or what occurs, sorted.  Raises UserError
    where no recording has a class, all have the same, or the regex is none or has no such group.
    """
    kind, _, rest = spec.partition(":")
    if kind not in ("meta", "id") or not rest:
        raise UserError(
            f"config.data.label={spec!r}: use meta:FIELD, e.g. meta:speaker, or id:REGEX with a group (?P<label>...)"
        )
    classify = _field(rest) if kind == "meta" else _pattern(rest)
    number: dict[str, int] = {}
    codes, fields, example = np.full(len(records), -1, np.int32), set[str](), ""
    for examples, entry in _entries(records):
        fields |= {name for name, value in entry["meta"].items() if isinstance(value, str | int | float)}
        example = example or entry["id"]
        if name := classify(entry):
            codes[examples] = number.setdefault(name, len(number))
    if not number:
        known = f"there are {', '.join(sorted(fields)) or 'no fields'}" if kind == "meta" else f"e.g. {example!r}"
        raise UserError(f"config.data.label={spec!r}: no recording of {_sources(records)} has it; {known}")
    names = _stored_names(workdir, _LABELS, "names") or sorted(number)
    if len(names) < 2:
        raise UserError(f"config.data.label={spec!r}: all recordings are {names[0]!r}; at least two classes are needed")
    codes = _recoded(codes, number, names, f"{_LABELS} of {workdir}")
    log.info("labels: %d classes (%s); %d of %d examples have one", len(names), spec, (codes >= 0).sum(), len(codes))
    return ClassLabels(spec, names, codes, _digest(spec, names, codes))


def _field(name: str) -> Callable[[dict[str, Any]], str | None]:
    def classify(entry: dict[str, Any]) -> str | None:
        value = entry["meta"].get(name)
        return str(value) if isinstance(value, str | int | float) else None  # lists and None are no classes

    return classify


def _pattern(pattern: str) -> Callable[[dict[str, Any]], str | None]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"config.data.label={'id:' + pattern!r} is not a regular expression: {error}") from error
    if "label" not in regex.groupindex:
        raise UserError(f"config.data.label={'id:' + pattern!r} needs a group label, as in id:(?P<label>[^/]+)/")

    def classify(entry: dict[str, Any]) -> str | None:
        found = regex.search(entry["id"])
        return found["label"] if found else None

    return classify


# ---- both


def _entries(records: Records) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """(examples, entry) of every recording in use: one pass over the lines, none is kept."""
    for number, opened in enumerate(records.parts):
        own = np.flatnonzero(records.part == number)
        rows = records.row[own]
        begin = np.flatnonzero(np.diff(rows, prepend=-1))
        end = np.append(begin[1:], len(own))
        entries = enumerate(opened.shards.entries())
        for row, first, stop in zip(rows[begin].tolist(), begin.tolist(), end.tolist(), strict=True):
            entry = next(entry for at, entry in entries if at == row)
            yield own[first:stop], entry


def _recoded(codes: np.ndarray, number: dict[str, int], names: list[str], where: str) -> np.ndarray:
    """Codes in the order in which names were first seen -> in the order of `names`, -1 for what is not among them."""
    code = {name: k for k, name in enumerate(names)}
    if unknown := sorted(number.keys() - code.keys()):
        log.warning("%s not in %s: left without a label", ", ".join(map(repr, unknown[:6])), where)
    lookup = np.array([*(code.get(name, -1) for name in number), -1], codes.dtype)  # the last stands for none, -1
    return lookup[codes]


def _stored_names(workdir: Path | None, file: str, field: str) -> list[str] | None:
    """The vocabulary that an earlier start left in the workdir: weights belong to it."""
    if workdir is None or not (workdir / file).exists():
        return None
    try:
        content = json.loads((workdir / file).read_text(encoding="utf-8"))
        names = content[field] if content["format"] == _FORMAT else None
    except (ValueError, KeyError, TypeError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{workdir / file} is damaged; restore it from a copy, or use a new --workdir")
    return names


def _save(file: Path, content: dict[str, Any]) -> None:
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
        return
    except ValueError:
        before = None
    if before != content:
        raise UserError(
            f"{file} is another vocabulary, to which trained weights may belong: choose a new workdir, or delete that "
            "file if none do"
        )


def _sources(records: Records) -> str:
    return " + ".join(opened.part.source for opened in records.parts)


def _digest(spec: str, names: list[str], *arrays: np.ndarray) -> str:
    return digest([spec, *names, *(hashlib.sha256(np.ascontiguousarray(x).data).hexdigest() for x in arrays)])

"""Labels beside the batches of audio: a unit every so many samples, and classes or numbers for a whole utterance.

Shapes: R rows of this host, G segments of a row, N units of a row.
"""

import array
import collections
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.data import times
from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.label_spec import CLASS, NUMBER, TAGS, LabelSpec, parse_labels
from speechjax.data.plan import Batch, Rows, Shape, Spec
from speechjax.data.records import Records
from speechjax.data.shard_writer import write_json
from speechjax.data.sources import digest
from speechjax.data.units import COMMAND, identities, open_units
from speechjax.errors import UserError

log = logging.getLogger("speechjax")

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
    """What config.data.units says: "labels:DIR", a store, or what the recordings' metadata say by time.

    "phones": the phone that is on; the vocabulary is the workdir's, or what occurs, sorted.  "speech": 1 where somebody
    speaks, else 0.  "turns:N": who of up to N speakers does, bit k for the k-th that begins in the recording.  Raises
    UserError where recordings have no units.
    """
    kind, _, rest = spec.partition(":")
    if kind == "labels" and rest:
        return _stored(records, Path(rest))
    if re.fullmatch(r"phones|speech|turns:\d+", spec):
        return _timed(records, spec, workdir)
    raise UserError(
        f"config.data.units={spec!r}: use labels:DIR with units made by {COMMAND}, speech, turns:SPEAKERS, or phones, "
        "or nothing"
    )


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


# ---- units by time


def _timed(records: Records, spec: str, workdir: Path | None) -> UnitLabels:
    """Units at 100 Hz from times in the metadata, in memory: 200 bytes a second."""
    kind, _, argument = spec.partition(":")
    number: dict[str, int] = {}
    symbols, codes, needed = None, 0, "phones [[symbol, start s, end s], ...]"
    if kind == "phones":
        read = functools.partial(times.phone_frames, number=number)
    elif kind == "speech":
        read, symbols, codes = times.speech_frames, times.SPEECH, 2
        needed = "segments [[start s, end s], ...], or phones with times,"
    else:
        if not 1 <= (speakers := int(argument)) <= times.MOST_SPEAKERS:
            raise UserError(f"config.data.units={spec!r}: from 1 to {times.MOST_SPEAKERS} speakers can be told apart")
        read, codes = functools.partial(times.turn_frames, speakers=speakers), 2**speakers
        needed = "turns [[speaker, start s, end s], ...]"
    frames, bounds, where = array.array("h"), [0], np.full(len(records), -1)
    samples = identities(records)["samples"]
    for examples, entry in _entries(records):
        if (found := read(entry, int(samples[examples[0]]))) is not None:
            where[examples] = len(bounds) - 1
            frames.frombytes(found.tobytes())
            bounds.append(len(frames))
    have = int((where >= 0).sum())
    if not have:
        raise UserError(
            f"config.data.units={spec!r} needs {needed} of the recordings, and {_sources(records)} has none"
        )
    units = np.array(frames, np.int16)
    if kind == "phones":
        symbols = _stored_names(workdir, _PHONES, lambda content: content["symbols"]) or sorted(number)
        units, codes = _recoded(units, number, symbols, f"{_PHONES} of {workdir}"), len(symbols)
    log.info("units: %d of %s, one every 10 ms; %d of %d examples have them", codes, spec, have, len(records))

    def cut(i: int, first: int, count: int) -> np.ndarray:
        found = np.full(count, -1, np.int32)
        if (w := int(where[i])) >= 0:
            own = units[bounds[w] + max(0, first) : min(bounds[w + 1], bounds[w] + max(0, first + count))]
            found[max(0, -first) :][: len(own)] = own
        return found

    return UnitLabels(times.HOP, codes, _digest(spec, symbols or [], where, units), cut, symbols)


# ---- labels of whole recordings


@dataclass(frozen=True, eq=False)
class Label:
    """One label of every record: `key` in the batches, where row `codes`[i] of `table` is that of example i.

    The last row of `table`, that of code -1, stands for unknown: -1 among int32 [V + 1] classes, -1 everywhere among
    float32 [K + 1, V] sets of tags (else 1 for those that hold, 0 for the others), NaN among float32 [K + 1] numbers.
    `names` [V] are those of classes or tags.  `strangers` counts the examples of names that the workdir's vocabulary
    does not have.
    """

    key: str
    source: str
    names: list[str]
    codes: np.ndarray
    table: np.ndarray
    strangers: dict[str, int]
    digest: str


@dataclass(frozen=True, eq=False)
class Labels:
    """All labels of every record."""

    parts: list[Label]

    @property
    def names(self) -> dict[str, list[str]]:
        """{key in the batches: names of its classes or tags, [] for a number}."""
        return {label.key: label.names for label in self.parts}

    @property
    def digest(self) -> str:
        return self.parts[0].digest if len(self.parts) == 1 else digest([label.digest for label in self.parts])

    def spec(self, shape: Shape) -> Spec:
        return {x.key: ((shape.rows, *x.table.shape[1:]), x.table.dtype.type) for x in self.parts}

    def batch(self, part: np.ndarray, rows: Rows, lengths: np.ndarray) -> Batch:
        """{key: int32 [R], float32 [R, V] or float32 [R]}, unknown for rows without audio; `lengths` as for units."""
        there = (rows.example[:, 0] >= 0) & (lengths[:, 0] > 0)
        which = part[np.maximum(rows.example[:, 0], 0)]
        return {x.key: x.table[np.where(there, x.codes[which], -1)] for x in self.parts}

    def save(self, workdir: Path) -> None:
        """The names into `workdir`; UserError where it has others, or some of the recordings' names are not in it."""
        for label in self.parts:
            if label.strangers:
                shown = sorted(label.strangers.items(), key=lambda item: (-item[1], item[0]))
                raise UserError(
                    f"{workdir / _LABELS} has no {', '.join(f'{k!r} ({n:,} examples)' for k, n in shown[:6])}"
                    f"{', ...' if len(shown) > 6 else ''} for config.data.label={label.source!r}: a model keeps the "
                    "classes it began with; leave those recordings out (config.data.exclude) or use a new --workdir"
                )
        each = {label.key: {"label": label.source, "names": label.names} for label in self.parts}
        alone = len(each) == 1 and "label" in each
        _save(workdir / _LABELS, {"format": _FORMAT, **(each["label"] if alone else {"labels": each})})


def read_labels(records: Records, spec: str, workdir: Path | None) -> Labels:
    """What config.data.label says (speechjax.data.label_spec).

    Segments have the labels of their recording.  Names are the workdir's, or what occurs, sorted.  Raises UserError
    where no recording has a label, all have the same class, or the text means nothing.
    """
    specs = parse_labels(spec)
    numbers: list[dict[Any, int]] = [{} for _ in specs]
    fields: list[set[str]] = [set() for _ in specs]
    codes, example = np.full((len(specs), len(records)), -1, np.int32), ""
    for examples, entry in _entries(records):
        example = example or entry["id"]
        for own, number, known, one in zip(codes, numbers, fields, specs, strict=True):
            known |= one.fields(entry["meta"])
            if (value := one.read(entry)) is not None:
                own[examples] = number.setdefault(value, len(number))
    for number, known, one in zip(numbers, fields, specs, strict=True):
        if not any(value != () for value in number):
            there = (
                f"e.g. {example!r}"
                if one.text.startswith("id:")
                else f"there are {', '.join(sorted(known)) or 'no fields'}"
            )
            raise UserError(f"config.data.label={one.text!r}: no recording of {_sources(records)} has it; {there}")
    make = {CLASS: _class_label, TAGS: _tag_label, NUMBER: _number_label}
    parts = [make[one.kind](one, own, number, workdir) for one, own, number in zip(specs, codes, numbers, strict=True)]
    for label in parts:
        log.info(
            "labels: %s, %s (%s); %d of %d examples have one", label.key,
            f"{len(label.names)} classes" if label.names else "numbers", label.source,
            (label.codes >= 0).sum(), len(label.codes),
        )  # fmt: skip
    return Labels(parts)


def _class_label(spec: LabelSpec, codes: np.ndarray, number: dict[str, int], workdir: Path | None) -> Label:
    names = _label_names(spec, workdir) or sorted(number)
    if len(names) < 2:
        raise UserError(
            f"config.data.label={spec.text!r}: all recordings are {names[0]!r}; at least two classes are needed"
        )
    count = np.bincount(codes[codes >= 0], minlength=len(number))
    strangers = {name: int(count[k]) for name, k in number.items() if name not in set(names)}
    codes = _recoded(codes, number, names, f"{_LABELS} of {workdir}")
    table = np.array([*range(len(names)), -1], np.int32)
    return Label(spec.key, spec.text, names, codes, table, strangers, _digest(spec.text, names, codes))


def _tag_label(
    spec: LabelSpec, codes: np.ndarray, number: dict[tuple[str, ...], int], workdir: Path | None
) -> Label:  # fmt: skip
    count, occurs = np.bincount(codes[codes >= 0], minlength=len(number)), collections.Counter[str]()
    for tags, k in number.items():
        occurs.update(dict.fromkeys(tags, int(count[k])))
    names = _label_names(spec, workdir) or sorted(occurs)
    table = np.zeros((len(number) + 1, len(names)), np.float32)
    table[-1] = -1
    column = {name: v for v, name in enumerate(names)}
    for tags, k in number.items():
        table[k, [column[tag] for tag in tags if tag in column]] = 1
    strangers = {name: n for name, n in occurs.items() if name not in column}
    _warn_of(strangers, f"{_LABELS} of {workdir}")
    return Label(spec.key, spec.text, names, codes, table, strangers, _digest(spec.text, names, codes, table))


def _number_label(spec: LabelSpec, codes: np.ndarray, number: dict[float, int], workdir: Path | None) -> Label:
    table = np.array([*number, np.nan], np.float32)
    return Label(spec.key, spec.text, [], codes, table, {}, _digest(spec.text, [], codes, table))


def _label_names(spec: LabelSpec, workdir: Path | None) -> list[str] | None:
    """The names that the workdir has for a label; None where it has the label not."""

    def pick(content: dict[str, Any]) -> Any:
        both = content["labels"] if "labels" in content else {"label": content}
        return both[spec.key]["names"] if spec.key in both else None

    return _stored_names(workdir, _LABELS, pick)


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
    _warn_of(number.keys() - code.keys(), where)
    lookup = np.array([*(code.get(name, -1) for name in number), -1], codes.dtype)  # the last stands for none, -1
    return lookup[codes]


def _warn_of(unknown: Iterable[str], where: str) -> None:
    if found := sorted(unknown):
        log.warning("%s not in %s: left without a label", ", ".join(map(repr, found[:6])), where)


def _stored_names(workdir: Path | None, file: str, pick: Callable[[dict[str, Any]], Any]) -> list[str] | None:
    """The vocabulary that an earlier start left in the workdir, `pick` of the file: weights belong to it."""
    if workdir is None or not (workdir / file).exists():
        return None
    try:
        content = json.loads((workdir / file).read_text(encoding="utf-8"))
        if (names := pick(content) if content["format"] == _FORMAT else ()) is None:
            return None
    except (ValueError, KeyError, TypeError):
        names = ()
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

"""What config.data.label asks for: several labels, " ; " between them, each [NAME=]KIND:ARGUMENT.

    meta:FIELD    the class that a field of the metadata names
    id:REGEX      the class that the group `label` of a regular expression, searched in the id, names
    tags:FIELD    any number of classes: a list in the metadata, or a text with | between them
    number:FIELD  a number in the metadata

The label NAME is the batch's "label_NAME"; one without a name is "label".
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError

CLASS, TAGS, NUMBER = "class", "tags", "number"
_KINDS = {"meta": CLASS, "id": CLASS, "tags": TAGS, "number": NUMBER}


class LabelSpec(NamedTuple):
    """One label: its `key` in the batches, what was written as `text`, and what kind of label it is.

    `read` takes an entry of a prepared set and gives the label's value, None where it has none: a text for a class,
    sorted texts for tags, a float for a number.  `fields` are those of a recording's metadata that such a label may be.
    """

    key: str
    text: str
    kind: str
    read: Callable[[dict[str, Any]], Any]
    fields: Callable[[dict[str, Any]], set[str]]


def parse_labels(text: str) -> list[LabelSpec]:
    """The labels of config.data.label.  Raises UserError for what is none of them, and for a name given twice."""
    specs = [_parse(part.strip(), text) for part in re.split(r"\s;(?:\s|$)", text)]
    keys = [spec.key for spec in specs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(
            f"config.data.label={text!r} has {twice[0]!r} twice: give each label a name, NAME=KIND:ARGUMENT"
        )
    return specs


def _parse(part: str, text: str) -> LabelSpec:
    found = re.fullmatch(rf"(?:([A-Za-z]\w*)=)?({'|'.join(_KINDS)}):(.+)", part)
    if not found:
        raise UserError(
            f"config.data.label={text!r}: use meta:FIELD, e.g. meta:speaker, or id:REGEX with a group (?P<label>...), "
            "tags:FIELD, number:FIELD; several as NAME=meta:FIELD ; NAME=number:FIELD"
        )
    name, kind, argument = found.groups()
    read, types = {
        "meta": (_class, (str, int, float)),
        "id": (_pattern, (str, int, float)),
        "tags": (_tags, (str, int, float, list)),
        "number": (_number, (int, float)),
    }[kind]
    fields = lambda meta: {field for field, value in meta.items() if isinstance(value, types)}  # noqa: E731
    written = f"{kind}:{argument}"
    return LabelSpec(f"label_{name}" if name else "label", written, _KINDS[kind], read(argument), fields)


def _class(field: str) -> Callable[[dict[str, Any]], str | None]:
    def read(entry: dict[str, Any]) -> str | None:
        value = entry["meta"].get(field)
        return str(value) or None if isinstance(value, str | int | float) else None  # lists and None are no classes

    return read


def _pattern(pattern: str) -> Callable[[dict[str, Any]], str | None]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"config.data.label={'id:' + pattern!r} is not a regular expression: {error}") from error
    if "label" not in regex.groupindex:
        raise UserError(f"config.data.label={'id:' + pattern!r} needs a group label, as in id:(?P<label>[^/]+)/")

    def read(entry: dict[str, Any]) -> str | None:
        found = regex.search(entry["id"])
        return found["label"] or None if found else None

    return read


def _tags(field: str) -> Callable[[dict[str, Any]], tuple[str, ...] | None]:
    def read(entry: dict[str, Any]) -> tuple[str, ...] | None:
        value = entry["meta"].get(field)
        if value is None:
            return None
        tags = value.split("|") if isinstance(value, str) else value if isinstance(value, list) else [value]
        return tuple(sorted({str(tag).strip() for tag in tags} - {""}))  # () is known: none of them

    return read


def _number(field: str) -> Callable[[dict[str, Any]], float | None]:
    def read(entry: dict[str, Any]) -> float | None:
        value = entry["meta"].get(field)
        if value is None or value == "":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = np.inf
        if np.isnan(number):
            return None
        if abs(number) > float(np.finfo(np.float32).max):
            raise UserError(f"config.data.label='number:{field}': of {entry['id']!r} it is {value!r}, and no number")
        return number

    return read

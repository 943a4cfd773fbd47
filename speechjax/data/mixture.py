"""Several sources in one string, and how often each is heard.

    folder:/data/a?weight=2&hours=10 + manifest:/data/b.jsonl + shards:/prepared/c

Nothing is opened here: sources.py knows what the parts mean.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechjax.errors import UserError

_EXAMPLE = "e.g. folder:/data/a?weight=2&hours=10 + shards:/prepared/b"
_NAMES = ("weight", "hours", "copy")
# A plus sign in a file name is left alone unless what follows could be a source of its own.
_PLUS = re.compile(r"\s\+(?=\s+(?:\w+:|embedded\b|[/~.+])|\s*$)|^\+(?=\s)")
_OPTIONS = re.compile(r"(.*)\?((?:\w+=[^?&=]*)(?:&\w+=[^?&=]*)*)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    `weight` multiplies how often it is heard. At most `hours` of it are used, chosen by a hash of the id, so that a
    smaller number is a subset of a larger one (None: all). `copy` False reads the recordings where they lie instead
    of copying them as PCM.
    """

    source: str
    weight: float = 1.0
    hours: float | None = None
    copy: bool = True


def parse_mixture(text: str) -> list[Part]:
    """The parts of `SOURCE?option=value&... + SOURCE...`; options are weight, hours (both above 0) and copy (yes, no).

    What follows the last "?" of a part is its options if it reads name=value, and part of a file name otherwise; a
    file name that does read so is followed by an option, as in folder:/odd?name=x?weight=1.
    Raises `UserError` for an empty part, an unknown or repeated option, and a value out of range.
    """
    return [_part(part.strip(), text) for part in _PLUS.split(text)]


def _part(part: str, text: str) -> Part:
    match = _OPTIONS.fullmatch(part)
    source, options = (match[1], match[2].split("&")) if match else (part, [])
    if not source:
        raise UserError(f"data source {text!r}: a part is empty; {_EXAMPLE}")
    found: dict[str, float | bool] = {}
    for name, _, value in (option.partition("=") for option in options):
        if name not in _NAMES:
            close = difflib.get_close_matches(name, _NAMES, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"data source {part!r}: unknown option {name!r}{hint}; {_EXAMPLE}")
        if name in found:
            raise UserError(f"data source {part!r}: {name} is there twice; {_EXAMPLE}")
        found[name] = _yes(part, value) if name == "copy" else _positive(part, name, value)
    return Part(source, **found)  # type: ignore[arg-type]


def _yes(part: str, value: str) -> bool:
    if value not in ("yes", "no"):
        raise UserError(f"data source {part!r}: copy={value} is neither yes nor no; e.g. folder:/data/a?copy=no")
    return value == "yes"


def _positive(part: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"data source {part!r}: {name}={value} is not a positive number; {_EXAMPLE}")
    return number


def rates(hours: Sequence[float], weights: Sequence[float], temperature: float) -> np.ndarray:
    """float64 [sources]: how many times in an epoch each example of a source is heard.

    A source of h hours has a share of the epoch proportional to weight · h^(1/temperature), and the epoch is as long
    as all sources together. So temperature 1 and equal weights give 1 everywhere, infinity gives equal shares, and
    between them small sources are repeated and large ones thinned out.
    Raises `UserError` for a temperature below 1, which would make small sources smaller still.

    Arivazhagan et al. 2019, arXiv:1907.05019; with 1/temperature = alpha in XLM-R, arXiv:1911.02116 (0.3), and for
    speech in XLS-R, arXiv:2111.09296 (0.5).
    """
    if not temperature >= 1:
        raise UserError(
            f"temperature={temperature:g} of the mixture must be at least 1: 1 hears each source in proportion to its "
            "size, 2 evens them out, inf hears all equally"
        )
    size, weight = np.asarray(hours, np.float64), np.asarray(weights, np.float64)
    if size.shape != weight.shape or not size.size or not (size > 0).all() or not (weight > 0).all():
        raise ValueError(f"hours {hours} and weights {weights} must be as many, and positive")
    power = 1 / temperature
    # Not share · total / hours: so proportional sampling comes out as exactly 1.
    return weight * size ** (power - 1) * (size.sum() / (weight * size**power).sum())

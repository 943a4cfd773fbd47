"""Which trainings a sweep consists of: a grid or a draw of settings, with every seed, on every fold."""

import argparse
import hashlib
import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from speechjax.errors import UserError

log = logging.getLogger("speechjax")

SEED, FOLD = "train.seed", "fold"
_LONGEST = 100  # characters of a name: file systems allow 255 bytes


class Axis(NamedTuple):
    """What --set varies: a key and its values, or the bounds of a range, which may be of whole numbers."""

    key: str
    values: tuple[str, ...]
    bounds: tuple[float, float] | None = None
    whole: bool = False


class Trial(NamedTuple):
    """One training: its folder's name, the value of every key that varies, and what main is given."""

    name: str
    values: dict[str, str]
    spec: str
    overrides: list[str]


def parse_axis(text: str) -> Axis:
    """`key=a,b` or `key=low..high`; commas inside brackets part nothing.  Raises ValueError."""
    key, equals, rest = text.partition("=")
    if not equals or not rest or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ValueError(f"--set {text}: write KEY=A,B,C or KEY=LOW..HIGH")
    if key == FOLD:
        raise ValueError(f"--set {text}: folds come from --folds")
    if found := re.fullmatch(r"([-+.\de]*\d\.?)\.\.([-+.\d][-+.\de]*)", rest, re.IGNORECASE):
        try:
            low, high = map(float, found.groups())
        except ValueError:
            low = high = math.nan
        if not 0 < low < high < math.inf:
            raise ValueError(f"--set {text}: a range has two numbers above 0, the lower one first")
        return Axis(key, (), (low, high), all(re.fullmatch(r"\d+", bound) for bound in found.groups()))
    values, depth = [""], 0
    for letter in rest:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    values = tuple(value.strip() for value in values)
    if len(set(values)) < len(values):
        raise ValueError(f"--set {text}: a value is there twice")
    return Axis(key, values)


def points(axes: Sequence[Axis], count: int | None, seed: int) -> list[dict[str, str]]:
    """Settings, {key: value} each: all combinations, or `count` different ones at random, each with every seed.

    A larger count begins with the same settings.
    """
    crossed = [axis for axis in axes if axis.key == SEED or count is None]
    drawn = [axis for axis in axes if axis not in crossed]
    found: dict[tuple[str, ...], None] = {}
    if drawn:
        import numpy as np

        rng = np.random.default_rng(seed)
        finite = not any(axis.bounds for axis in drawn)
        room = math.prod(len(axis.values) for axis in drawn) if finite else 0
        for _ in range(100 * (count or 0) + 20 * room):  # of whole numbers, too, there may be fewer than are asked for
            if len(found) == count or len(found) == room > 0:
                break
            found[tuple(_draw(axis, rng) for axis in drawn)] = None
        if len(found) < (count or 0):
            log.warning("there are only %d different settings to draw", len(found))
    settings = [dict(zip([axis.key for axis in drawn], values, strict=True)) for values in found] or [{}]
    grid = list(itertools.product(*(axis.values for axis in crossed)))
    every = [s | dict(zip([axis.key for axis in crossed], values, strict=True)) for s in settings for values in grid]
    return [{axis.key: point[axis.key] for axis in axes} for point in every]


def _draw(axis: Axis, rng: Any) -> str:
    if axis.bounds is None:
        return axis.values[int(rng.integers(len(axis.values)))]
    low, high = axis.bounds
    value = math.exp(rng.uniform(math.log(low), math.log(high)))
    return str(round(value)) if axis.whole else f"{value:.3g}"  # three digits, so that the name says all of it


def deal(seconds: Mapping[str, float], count: int | None) -> dict[str, list[str]]:
    """{fold: its groups}: every group by itself, or `count` folds of about equal length, the longest groups first.

    Raises UserError for fewer groups than folds, and for fewer than two.
    """
    if len(seconds) < (count or 2):
        raise UserError(f"{count or 2} folds need as many groups of recordings; there are {len(seconds)}")
    if count is None:
        return {group: [group] for group in sorted(seconds)}
    folds: list[list[str]] = [[] for _ in range(count)]
    full = [0.0] * count
    for group in sorted(seconds, key=lambda g: (-seconds[g], g)):
        k = full.index(min(full))
        folds[k].append(group)
        full[k] += seconds[group]
    return {str(k + 1): sorted(groups) for k, groups in enumerate(folds)}


def write_folds(args: argparse.Namespace, config: Any) -> dict[str, str]:
    """{fold: value of data.valid}: the ids that each holds out, written to DIR/folds, in the order of training.

    Recordings without a group are in no fold.  Raises UserError where an earlier start dealt otherwise.
    """
    from speechjax.data.decode import SAMPLE_RATE
    from speechjax.data.records import open_records
    from speechjax.data.split import list_ids, recording_id
    from speechjax.evals._groups import labels
    from speechjax.logs import replace_file

    options = {name: config.data[name] for name in ("min_seconds", "max_bad_share", "include", "exclude")}
    records = open_records(config.data.source, cache_dir=config.data.cache_dir or None, **options)
    try:
        group = labels(records, range(len(records)), args.folds)
    except UserError as error:
        raise UserError(f"--folds={args.folds}: {error}") from None
    seconds: dict[str, float] = {}
    members: dict[str, list[str]] = {}
    for i, name in enumerate(group):
        seconds[name] = seconds.get(name, 0.0) + float(records.lengths[i]) / SAMPLE_RATE
        members.setdefault(name, []).append(recording_id(records, i))
    if without := len(members.pop("", ())):
        log.warning("%d examples have no %s: they are in no fold, every trial trains on them", without, args.folds)
        del seconds[""]
    folder = args.out.absolute() / "folds"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for fold, groups in deal(seconds, args.fold_count).items():
        file = folder / f"{_name({FOLD: fold}, [FOLD])}.txt"
        content = list_ids(name for g in groups for name in members[g])
        if file.exists() and file.read_bytes() != content:
            raise UserError(f"{file} holds other recordings than this fold now has: use another --out")
        replace_file(file, content)
        found[fold] = f"@{file}"
        shown = ", ".join(groups[:6]) + (", ..." if len(groups) > 6 else "")
        log.info("fold %s: %s (%.0f s)", fold, shown, sum(seconds[g] for g in groups))
    return found


def make_trials(args: argparse.Namespace, overrides: Sequence[str], folds: Mapping[str, str]) -> list[Trial]:
    """Every training of the sweep, in order: settings, then seeds, then folds."""
    keys = [axis.key for axis in args.axes] + [FOLD] * bool(folds)
    found = []
    for point in points(args.axes, args.random, args.seed):
        for fold, valid in folds.items() or [("", "")]:
            values = point | ({FOLD: fold} if fold else {})
            given = [f"{key.removeprefix('arg.')}={value}" for key, value in point.items() if key.startswith("arg.")]
            path, colon, arg = args.config.partition(":")
            spec = f"{path}:{','.join(filter(None, [arg, *given]))}" if given else f"{path}{colon}{arg}"
            own = [f"{key}={value}" for key, value in point.items() if not key.startswith("arg.")]
            held_out = [f"data.valid={valid}"] if fold else []
            found.append(Trial(_name(values, keys), values, spec, [*overrides, *own, *held_out]))
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """{key: its last parts, as many as tell it from the others}."""

    def short(key: str) -> str:
        parts = key.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        return next((e for e in ends if sum(k == e or k.endswith(f".{e}") for k in keys) == 1), key)

    return {key: short(key) for key in keys}


def _name(values: Mapping[str, str], keys: Sequence[str]) -> str:
    """A folder's name that says the values; with a digest where it cannot say all."""
    names = short_names(keys)
    whole = ",".join(f"{names[key]}={value}" for key, value in values.items())
    safe = re.sub(r"[^\w.=,+-]+", "_", whole)
    if safe == whole and len(safe.encode()) <= _LONGEST:
        return safe
    sha = hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{safe.encode('ascii', 'replace').decode().replace('?', '_')[: _LONGEST - 9]}-{sha}"

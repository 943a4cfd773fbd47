"""The ABX test (Schatz et al. 2013): is a phone nearer to another instance of itself than to another phone?

Shapes: A, B, X items of the three roles, I and J frames.

An item is a stretch of speech with a phone, its neighbours and a speaker.  In a triplet a and x have one phone, b
another; the error is the share of triplets with d(a, x) > d(b, x), ties counting half, so chance is one half.  Within
speakers, all three are one speaker's; across, x is another's.  In context "within", all three have the same
neighbours.  Distances are those of `_dtw`: dynamic time warping over frames, divided by the length of the path.

Triplets are averaged first over those of the same (phone of a, phone of b, context, speakers), these over contexts,
then over speakers (across: pairs of speakers), then over ordered pairs of phones: so frequent phones and talkative
speakers count no more than others.  As in ZeroSpeech (Nguyen et al. 2020, arXiv 2011.11588) and Libri-light (Kahn et
al. 2020, arXiv 1912.07875), where items are triphones and distances angular.
"""

import collections
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.evals._dtw import Warper, frame_distances
from speechjax.evals._frames import Phones

CONTEXTS, SPANS = ("within", "any"), ("triphone", "phone")
_SILENCE = {"", "sil", "sp", "spn", "spoken_noise", "pau", "<eps>", "h#", "_"}
_COLUMNS = "#file onset offset #phone prev-phone next-phone speaker"


class Item(NamedTuple):
    """`phone` between `before` and `after`, said by `speaker`, in [`onset`, `offset`) seconds of a recording."""

    recording: int
    onset: float
    offset: float
    phone: str
    before: str
    after: str
    speaker: str


class Block(NamedTuple):
    """Items to compare: those that are a or b, and those that are x, each sorted by phone.

    Within speakers the two are the same, and an item is not compared with itself.  `speakers` is one name, or that of a
    and b and that of x.
    """

    context: tuple[str, ...]
    speakers: tuple[str, ...]
    ab: np.ndarray
    x: np.ndarray

    @property
    def within(self) -> bool:
        return len(self.speakers) == 1


class Score(NamedTuple):
    """Mean error (0 to 1, nan without triplets), and of how many triplets."""

    error: float
    triplets: int


# ---- items


def items_of_phones(recording: int, phones: Phones, speaker: str, span: str, lang: str = "") -> list[Item]:
    """The items of one alignment: every phone with speech before and after it, its own time or all three phones'.

    Phones of different languages (`lang`) are never compared.
    """
    items = []
    for (before, start, _), (phone, onset, offset), (after, _, end) in zip(
        phones, phones[1:], phones[2:], strict=False
    ):
        if any(symbol.lower() in _SILENCE for symbol in (before, phone, after)):
            continue
        limits = (start, end) if span == "triphone" else (onset, offset)
        if lang:
            before, phone, after = (f"{lang}:{symbol}" for symbol in (before, phone, after))
        items.append(Item(recording, *limits, phone, before, after, speaker))
    return items


def read_items(path: str, recordings: Mapping[str, int]) -> tuple[list[Item], int]:
    """(items of a ZeroSpeech .item file, how many more are of recordings that are not there).

    The file begins with the line "#file onset offset #phone prev-phone next-phone speaker"; `recordings` maps the names
    of its first column to numbers.  Raises UserError for a file that cannot be read or has other columns.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the item file {path}: {getattr(error, 'strerror', None) or error}") from error
    if not lines or len(lines[0].split()) != 7 or not lines[0].startswith("#"):
        raise UserError(f"{path}:1: an item file begins with the line {_COLUMNS!r}")
    items, elsewhere = [], 0
    for number, line in enumerate(lines[1:], 2):
        fields = line.split()
        if not fields:
            continue
        try:
            name, onset, offset, phone, before, after, speaker = fields
            item = Item(recordings.get(name, -1), float(onset), float(offset), phone, before, after, speaker)
        except ValueError:
            raise UserError(f"{path}:{number}: expected {_COLUMNS!r} with times in seconds, got {line!r}") from None
        if item.recording < 0:
            elsewhere += 1
        else:
            items.append(item)
    return items, elsewhere


# ---- which to compare


def plan_blocks(
    items: Sequence[Item], *, context: str, max_items: int, max_speakers: int, seed: int
) -> tuple[list[Block], list[Block]]:
    """(blocks within speakers, blocks across speakers) of the items that have partners.

    At most `max_items` of a phone, context and speaker take part, and the items of a speaker are compared with those of
    at most `max_speakers` others in the same context; 0: all.  Which, `seed` draws.
    """
    rng = np.random.default_rng(seed)
    cells: dict[tuple[str, ...], dict[str, dict[str, list[int]]]] = {}
    for k, item in enumerate(items):
        place = (item.before, item.after) if context == "within" else ()
        phones = cells.setdefault(place, {}).setdefault(item.speaker, {})
        phones.setdefault(item.phone, []).append(k)
    within, across = [], []
    for place in sorted(cells):
        speakers = {
            name: {phone: _some(rng, found, max_items) for phone, found in sorted(phones.items())}
            for name, phones in sorted(cells[place].items())
        }
        for name, phones in speakers.items():
            if len(phones) < 2:  # no b for any a
                continue
            if any(len(found) > 1 for found in phones.values()):
                everything = _joined(phones.values())
                within.append(Block(place, (name,), everything, everything))
            others = [other for other in speakers if other != name and phones.keys() & speakers[other].keys()]
            for other in _some(rng, others, max_speakers):
                x = _joined(found for phone, found in speakers[other].items() if phone in phones)
                across.append(Block(place, (name, other), _joined(phones.values()), x))
    return within, across


def _some(rng: np.random.Generator, things: list, most: int) -> list:
    if not most or len(things) <= most:
        return things
    return [things[k] for k in sorted(rng.choice(len(things), most, replace=False).tolist())]


def _joined(parts: Iterable[list[int]]) -> np.ndarray:
    return np.array([k for part in parts for k in part], np.int64)


# ---- distances and errors


def distances(blocks: Sequence[Block], frames: Sequence[np.ndarray], distance: str) -> list[np.ndarray]:
    """Distance of every a or b to every x of each block, float32 [AB, X]; `frames` [T, D] of every item."""
    pairs = [len(b.ab) * (len(b.ab) - 1) // 2 if b.within else len(b.ab) * len(b.x) for b in blocks]
    first = np.cumsum([0, *pairs])
    warper = Warper(int(first[-1]))
    for block, begin in zip(blocks, first[:-1].tolist(), strict=True):
        row, column = _pairs(block)
        counts = [np.array([len(frames[k]) for k in side], np.int64) for side in (block.ab, block.x)]
        starts = [np.cumsum(count) - count for count in counts]
        left, right = (np.concatenate([frames[k] for k in side]) for side in (block.ab, block.x))
        cells = frame_distances(left, right, distance)
        warper.add(cells, (starts[0][row], starts[1][column]), (counts[0][row], counts[1][column]), begin)
    flat, tables = warper.result(), []
    for block, begin, end in zip(blocks, first[:-1].tolist(), first[1:].tolist(), strict=True):
        table = np.zeros((len(block.ab), len(block.x)), np.float32)
        table[_pairs(block)] = flat[begin:end]
        tables.append(table + table.T if block.within else table)  # both halves, from one
    return tables


def _pairs(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the pairs to compute."""
    if block.within:
        return np.triu_indices(len(block.ab), 1)
    row, column = np.indices((len(block.ab), len(block.x))).reshape(2, -1)
    return row, column


def score(blocks: Sequence[Block], tables: Sequence[np.ndarray], phones: list[str]) -> Score:
    """The error over all triplets, averaged as the module says; `phones` of every item."""
    by_speaker: dict[tuple, list[float]] = collections.defaultdict(list)  # (phone a, phone b, speakers): of contexts
    triplets = 0
    for block, table in zip(blocks, tables, strict=True):
        for a, b, error, count in _block_errors(
            table, [phones[k] for k in block.ab], [phones[k] for k in block.x], block.within
        ):
            by_speaker[a, b, block.speakers].append(error)
            triplets += count
    by_phones: dict[tuple, list[float]] = collections.defaultdict(list)
    for (a, b, _), errors in by_speaker.items():
        by_phones[a, b].append(float(np.mean(errors)))
    means = [float(np.mean(errors)) for errors in by_phones.values()]
    return Score(float(np.mean(means)) if means else float("nan"), triplets)


def _block_errors(
    table: np.ndarray, phones_ab: list[str], phones_x: list[str], within: bool
) -> list[tuple[str, str, float, int]]:
    """(phone of a and x, phone of b, error, triplets) of every ordered pair of phones that has triplets."""
    ab, x = np.array(phones_ab), np.array(phones_x)
    names, first, n_b = np.unique(ab, return_index=True, return_counts=True)  # ab is sorted by phone, so are these
    found = []
    for phone, begin, n_a in zip(names.tolist(), first.tolist(), n_b.tolist(), strict=True):
        column = np.flatnonzero(x == phone)
        usable = n_a * len(column) - (n_a if within else 0)
        if not usable:
            continue
        near, far = table[begin : begin + n_a, column], table[:, column]
        wrong = (near[:, None] > far[None]) + 0.5 * (near[:, None] == far[None])  # [A, AB, X]
        if within:
            wrong[np.arange(n_a), :, np.arange(n_a)] = 0  # a is x
        sums = np.add.reduceat(wrong.sum(axis=(0, 2)), first)
        for other, total, n in zip(names.tolist(), sums.tolist(), n_b.tolist(), strict=True):
            if other != phone:
                found.append((phone, other, total / (usable * n), usable * n))
    return found

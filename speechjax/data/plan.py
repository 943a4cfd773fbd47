"""Which examples make which batch: a pure function of (seed, batch number, lengths), so no state is ever saved.

Shapes: N examples, R rows of a batch, G segments of a row.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from speechjax.data.permutation import Words, permute, uniform

Batch = dict[str, np.ndarray]
Spec = dict[str, tuple[tuple[int, ...], type]]  # {name: (shape, dtype)} of a batch

BATCHES, BLOCKS, MEMBERS, CROPS, ROWS = range(5)  # what a random number is for: a word of its key
_CANDIDATES = 2048
_RUN = 64  # batches planned at once


@dataclass(frozen=True)
class Shape:
    """A static batch shape: `rows` (over all hosts) of `samples`, each holding up to `segments` examples."""

    rows: int
    samples: int
    segments: int = 1


class Rows(NamedTuple):
    """One batch: its `shape` and what its rows hold, each int64 [R, G].

    Samples `start` to `start + count` of `example` (-1: nothing) stand at samples `at` to `at + count` of the row.
    The segments of a row come in the order of `at`, empty ones last.
    """

    shape: Shape
    example: np.ndarray
    start: np.ndarray
    count: np.ndarray
    at: np.ndarray


def plan_shapes(
    lengths: np.ndarray, *, crop: int, batch_samples: int, shapes: int, row_multiple: int, quantum: int, offset: int,
    weights: np.ndarray | None = None,
) -> list[Shape]:  # fmt: skip
    """Up to `shapes` batch shapes with the least padding for these lengths, all in samples.

    Lengths above `crop` count as `crop`, every example as often as its `weights` [N] say.  A shape's samples are
    `quantum * n + offset` (n whole frames); its rows fill about `batch_samples` and are a multiple of
    `row_multiple`.  Exact up to 2048 candidate lengths; more are first rounded up to a coarser grid.
    """
    frames = np.maximum(1, -(-(np.minimum(lengths, crop) - offset) // quantum))
    step = -(-int(frames.max()) // _CANDIDATES)
    held = np.bincount(-(-frames // step), weights)
    candidates = np.flatnonzero(held)
    bounds = np.minimum(candidates * step, frames.max()) * quantum + offset
    chosen = _least_padding(bounds, np.cumsum(held[candidates]), shapes)
    return [
        Shape(int(max(1, round(batch_samples / bound / row_multiple)) * row_multiple), int(bound)) for bound in chosen
    ]


def _least_padding(bounds: np.ndarray, covered: np.ndarray, shapes: int) -> list[int]:
    """Dynamic program: at most `shapes` of `bounds`, the largest among them, with the fewest samples in total.

    `covered[j]` is how many examples are no longer than `bounds[j]`.
    """
    best = covered * bounds
    smaller: list[np.ndarray] = []  # of each shape after the first: the next bound below bound j, or -1 for none
    for _ in range(shapes - 1):
        cost, below = best.copy(), np.full(len(bounds), -1)
        for j in range(1, len(bounds)):
            costs = best[:j] + (covered[j] - covered[:j]) * bounds[j]
            i = int(costs.argmin())
            if costs[i] < cost[j]:
                cost[j], below[j] = costs[i], i
        best = cost
        smaller.append(below)
    j = len(bounds) - 1
    chosen = [int(bounds[j])]
    for below in reversed(smaller):
        if below[j] >= 0:
            j = below[j]
            chosen.append(int(bounds[j]))
    return chosen[::-1]


class Stream:
    """The endless order of the examples of some sources, entry by entry: blocks, shuffled one by one.

    `members` are the examples of the first source, then of the next; source s has `held[s]` of them and
    `round(rates[s] * held[s])` entries (at least one) in a block.  Each source runs through new permutations of its
    examples, wherever blocks end, so that all of them are seen equally often; with one source at rate 1 exactly
    once a block.
    """

    def __init__(self, members: np.ndarray, held: np.ndarray, rates: np.ndarray, key: Words):
        self.members, self._held, self._key = members, held, tuple(key)
        self._first = np.cumsum(held) - held
        self._quota = np.maximum(np.round(held * rates).astype(np.int64), 1)
        self._ends = np.cumsum(self._quota)
        self.block = int(self._ends[-1])

    def examples(self, entries: np.ndarray) -> np.ndarray:
        """The examples (int64 [E]) at `entries` [E] of the stream."""
        block, at = np.divmod(entries, self.block)
        at = permute(at, self.block, (*self._key, BLOCKS, block))
        source = np.searchsorted(self._ends, at, side="right")
        turn = (block + 1) * self._quota[source] + at - self._ends[source]
        held = self._held[source]
        turn, at = np.divmod(turn, held)
        at = permute(at, held, (*self._key, MEMBERS, source, turn))
        return self.members[self._first[source] + at].astype(np.int64)

    def average(self, x: np.ndarray) -> float:
        """The mean of `x` [N], a number for every example, over the entries."""
        means = [x[part].mean() for part in np.split(self.members, self._first[1:])]
        return float(np.average(means, weights=self._quota))


def streams(
    lengths: np.ndarray, shapes: Sequence[Shape], seed: int, source: np.ndarray | None, rates: Sequence[float] | None
) -> dict[int, Stream]:
    """For every shape that has examples, by its number, the stream of them; arguments as in `Plan`."""
    sources = 1 if source is None else int(source.max()) + 1
    rate = np.ones(sources) if rates is None else np.asarray(rates, float)
    number = len(shapes) * len(rate)
    group = np.zeros(len(lengths), np.min_scalar_type(number))  # few bits: sorting is then counting
    for shape in shapes[:-1]:
        group += lengths > shape.samples
    if source is not None:
        group = group * group.dtype.type(len(rate)) + source.astype(group.dtype)
    order = np.argsort(group, kind="stable").astype(np.min_scalar_type(-len(lengths)))
    held = np.bincount(group, minlength=number).reshape(len(shapes), len(rate))
    members = np.split(order, np.cumsum(held.sum(axis=1))[:-1])
    return {i: Stream(members[i], n[n > 0], rate[n > 0], (seed, i)) for i, n in enumerate(held) if n.any()}


class Plan:
    """The endless sequence of training batches over examples of known `lengths` (int [N], samples, 1 or more).

    Every example has a row of its own in the smallest of the `shapes` (in order of samples) that holds it; longer
    ones are cropped at random to the last.  `source` (int [N], all 0 if not given) says where an example is from
    and `rates[s]` how often an epoch each of source s is seen (once if not given).  The rows of a shape are its
    examples' `Stream`, none left out, so a shape with few examples has a batch in some epochs only; the batches of
    an epoch come in a shuffled order.  Setting up is one pass over the lengths; a batch costs the same wherever it
    is, and no more memory than the rows of a few hundred.
    """

    def __init__(
        self, lengths: np.ndarray, shapes: Sequence[Shape], seed: int,
        source: np.ndarray | None = None, rates: Sequence[float] | None = None,
    ):  # fmt: skip
        self.lengths, self.shapes, self.seed = lengths, list(shapes), seed
        self._streams = streams(lengths, self.shapes, seed, source, rates)
        self._blocks = [(stream.block, self.shapes[i].rows) for i, stream in self._streams.items()]
        self.batches_per_epoch = max(1, round(sum(block / rows for block, rows in self._blocks)))
        self._run = lru_cache(maxsize=4)(self._make_run)

    def _before(self, epoch: int) -> list[int]:
        """How many batches of each stream belong to the epochs before this one."""
        return [-(-epoch * block // rows) for block, rows in self._blocks]

    def _epoch_of(self, k: int) -> int:
        block, rows = max(self._blocks)
        most = (k + 1) * rows // block + 2  # this stream alone has more than k batches by then
        return bisect.bisect_right(range(most), k, key=lambda epoch: sum(self._before(epoch))) - 1

    def batch(self, k: int) -> Rows:
        """Batch number `k`, from 0."""
        return self._run(k // _RUN)[k % _RUN]

    def _make_run(self, run: int) -> list[Rows]:
        """Some batches in a row: numpy's calls cost more than the arithmetic of one."""
        k = np.arange(run * _RUN, (run + 1) * _RUN)
        which, number = np.zeros_like(k), np.zeros_like(k)  # of each batch: its stream, and which batch of that it is
        for epoch in range(self._epoch_of(int(k[0])), self._epoch_of(int(k[-1])) + 1):
            first, stop = np.array(self._before(epoch)), np.array(self._before(epoch + 1))
            ends = np.cumsum(stop - first)
            here = (k >= first.sum()) & (k < stop.sum())
            place = permute(k[here] - first.sum(), int(ends[-1]), (self.seed, BATCHES, epoch))
            which[here] = np.searchsorted(ends, place, side="right")
            number[here] = (stop - ends)[which[here]] + place
        batches: list[Rows] = [None] * _RUN  # type: ignore[list-item]
        for s, (index, stream) in enumerate(self._streams.items()):
            mine = np.flatnonzero(which == s)
            shape = self.shapes[index]
            entries = (number[mine, None] * shape.rows + np.arange(shape.rows)).ravel()
            example = stream.examples(entries)
            length = self.lengths[example].astype(np.int64)
            count = np.minimum(length, shape.samples)
            start = uniform(length - count + 1, (self.seed, CROPS, index, entries))
            columns = [x.reshape(-1, shape.rows, 1) for x in (example, start, count, np.zeros_like(start))]
            for j, *rows in zip(mine.tolist(), *columns, strict=True):
                batches[j] = Rows(shape, *rows)
        return batches

    def sweep(self) -> Iterator[Rows]:
        """Every example once, from its start, by shape; the last batch of a shape is filled with empty rows."""
        for i, stream in self._streams.items():
            shape, members = self.shapes[i], stream.members
            for first in range(0, len(members), shape.rows):
                part = members[first : first + shape.rows]
                example, count = np.full((shape.rows, 1), -1), np.zeros((shape.rows, 1), np.int64)
                example[: len(part), 0] = part
                count[: len(part), 0] = np.minimum(self.lengths[part], shape.samples)
                yield Rows(shape, example, np.zeros_like(count), count, np.zeros_like(count))

    def useful_share(self) -> tuple[float, float]:
        """(share of the batches' samples that is audio, share of the audio that cropping leaves), both 0 to 1."""
        audio = used = room = 0.0
        for i, stream in self._streams.items():
            shape = self.shapes[i]
            audio += stream.block * stream.average(self.lengths)
            used += stream.block * stream.average(np.minimum(self.lengths, shape.samples))
            room += stream.block * shape.samples
        return used / room, used / audio

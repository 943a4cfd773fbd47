"""Which examples make which batch: a pure function of (seed, batch number, lengths), so no state is ever saved.

Shapes: N examples, R rows of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A static batch shape: `rows` (over all hosts) of `samples`."""

    rows: int
    samples: int


class Rows(NamedTuple):
    """One batch: its `shape`, and for each row the `example` (-1: empty row), the `start` sample and the `count`."""

    shape: Shape
    example: np.ndarray
    start: np.ndarray
    count: np.ndarray


def plan_shapes(
    lengths: np.ndarray, *, crop: int, batch_samples: int, shapes: int, row_multiple: int, quantum: int, offset: int
) -> list[Shape]:
    """Up to `shapes` batch shapes with the least padding for these lengths, all in samples.

    Lengths above `crop` count as `crop`.  A shape's samples are `quantum * n + offset` (n whole frames); its rows
    fill about `batch_samples` and are a multiple of `row_multiple`.
    """

    def round_up(samples):
        return np.maximum(1, -(-(samples - offset) // quantum)) * quantum + offset

    cropped = np.minimum(lengths, crop)
    bounds = np.unique(round_up(np.quantile(cropped, np.linspace(0, 1, 65), method="higher")))
    covered = np.searchsorted(np.sort(cropped), bounds, side="right")
    chosen = _least_padding(bounds, covered, shapes)
    return [
        Shape(int(max(1, round(batch_samples / bound / row_multiple)) * row_multiple), int(bound)) for bound in chosen
    ]


def _least_padding(bounds: np.ndarray, covered: np.ndarray, shapes: int) -> list[int]:
    """Dynamic program: at most `shapes` of `bounds`, the largest among them, with the fewest samples in total.

    `covered[j]` is how many examples are no longer than `bounds[j]`.
    """
    best = [(int(n * b), [int(b)]) for n, b in zip(covered, bounds, strict=True)]
    for _ in range(shapes - 1):
        best = [
            min(
                [best[j]]
                + [
                    (best[i][0] + int((covered[j] - covered[i]) * bounds[j]), [*best[i][1], int(bounds[j])])
                    for i in range(j)
                ]
            )
            for j in range(len(bounds))
        ]
    return best[-1][1]


class Plan:
    """The endless sequence of training batches over examples of known `lengths` (int [N], samples).

    Every epoch is a new permutation; examples gather by shape, full batches are kept, the order of batches is
    shuffled again.  What does not fill a batch waits for another epoch's luck, except where a shape has fewer
    examples than rows: those repeat.
    """

    def __init__(self, lengths: np.ndarray, shapes: Sequence[Shape], seed: int):
        self.lengths, self.shapes, self.seed = lengths, list(shapes), seed
        bounds = [s.samples for s in self.shapes]
        self._shape_of = np.minimum(np.searchsorted(bounds, lengths), len(bounds) - 1)
        held = np.bincount(self._shape_of, minlength=len(bounds))
        self._batches = [max(n // s.rows, int(n > 0)) for n, s in zip(held, self.shapes, strict=True)]
        self.batches_per_epoch = sum(self._batches)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = rng.permutation(len(self.lengths))
        shape_of = self._shape_of[order]
        batches = []
        for i, shape in enumerate(self.shapes):
            members = np.resize(order[shape_of == i], self._batches[i] * shape.rows)
            batches += [(i, rows) for rows in members.reshape(-1, shape.rows)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, k: int) -> Rows:
        """Batch number `k`, from 0: crops are drawn from (seed, k) alone."""
        epoch, i = divmod(k, self.batches_per_epoch)
        index, example = self._epoch(epoch)[i]
        shape = self.shapes[index]
        length = self.lengths[example]
        count = np.minimum(length, shape.samples)
        u = np.random.Generator(np.random.Philox(key=[self.seed + 2**32, k])).random(shape.rows)
        return Rows(shape, example, (u * (length - count + 1)).astype(np.int64), count)

    def sweep(self) -> list[Rows]:
        """Every example once, from its start, by shape; the last batch of a shape is filled with empty rows."""
        batches = []
        for i, shape in enumerate(self.shapes):
            members = np.flatnonzero(self._shape_of == i)
            for at in range(0, len(members), shape.rows):
                example = np.full(shape.rows, -1)
                part = members[at : at + shape.rows]
                example[: len(part)] = part
                count = np.where(example >= 0, np.minimum(self.lengths[example], shape.samples), 0)
                batches.append(Rows(shape, example, np.zeros_like(example), count))
        return batches


def useful_share(lengths: np.ndarray, shapes: Sequence[Shape]) -> tuple[float, float]:
    """(share of the batches' samples that is audio, share of the audio that cropping leaves), both 0 to 1."""
    bounds = np.array([s.samples for s in shapes])
    bound = bounds[np.minimum(np.searchsorted(bounds, lengths), len(bounds) - 1)]
    used = np.minimum(lengths, bound)
    return float(used.sum() / bound.sum()), float(used.sum() / lengths.sum())

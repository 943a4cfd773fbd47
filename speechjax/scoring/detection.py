"""Wake words and keywords in streams: scores over time to detections, and what they miss and invent.

Times are seconds from a stream's begin.  Shapes: T frames, E events, D detections, K thresholds, B stretches of audio,
R resamples.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.scoring import _checks, bootstrap
from speechjax.scoring.bootstrap import RESAMPLES, Interval

POINTS = 200  # thresholds of a curve
_ENOUGH = 20  # streams to draw from
_STRETCH = 60.0  # seconds


class Stream(NamedTuple):
    """`scores` float [T] of one keyword, frame t at t * `hop` seconds, and when it was said: `events` [E, 2], start and
    end, [0, 2] in speech without it.
    """

    scores: np.ndarray
    hop: float
    events: np.ndarray


class Tally(NamedTuple):
    """Of each threshold [K], ascending, the last infinity, and each stretch of audio: `misses`, and `alarms` that no
    event explains, float64 [K, B]; of each stretch its `events` and `hours` [B].
    """

    thresholds: np.ndarray
    misses: np.ndarray
    alarms: np.ndarray
    events: np.ndarray
    hours: np.ndarray


class Curve(NamedTuple):
    """Float64 [thresholds] each, thresholds ascending, the last infinity (no detections at all)."""

    thresholds: np.ndarray
    false_rejects: np.ndarray  # share of the events
    false_alarms: np.ndarray  # an hour


class OperatingPoint(NamedTuple):
    """The least share of events rejected while false alarms are rare enough, and the threshold for it."""

    false_rejects: float
    false_alarms: float
    threshold: float


def detections(scores: Any, threshold: float, *, hop: float, refractory: float = 1.0) -> np.ndarray:
    """Times [D] at which a detector would fire: the score reaches `threshold`, not within `refractory` s of the last.

    As a device does it, in order and without looking ahead; a score that stays up fires again after that time.
    """
    above = np.flatnonzero(np.asarray(scores) >= threshold)
    # Not a frame more for 1.0000000001 frames.
    rest = max(1, math.ceil(refractory / hop - 1e-6))
    fired, at = [], 0
    while at < len(above):
        fired.append(above[at])
        at = int(np.searchsorted(above, above[at] + rest))
    return np.array(fired, np.int64) * hop


def match(times: Any, events: Any, *, tolerance: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Which detections [D] and which events [E] have a partner, bool each: one to one, and as many as possible.

    A detection fits an event from `tolerance` s before its start to `tolerance` s after its end.
    """
    times, events = np.asarray(times, np.float64), np.asarray(events, np.float64).reshape(-1, 2)
    first, last = events[:, 0] - tolerance, events[:, 1] + tolerance
    hit, found = np.zeros(len(times), bool), np.zeros(len(events), bool)
    open_ = np.searchsorted(np.sort(first), times, side="right") - np.searchsorted(np.sort(last), times, side="left")
    # In order of time, and of the events that fit the one that closes first: no other rule matches more.
    for d in sorted(np.flatnonzero(open_ > 0), key=lambda d: times[d]):
        fits = np.flatnonzero(~found & (first <= times[d]) & (times[d] <= last))
        if len(fits):
            found[fits[np.argmin(last[fits])]] = hit[d] = True
    return hit, found


def tally(
    streams: Sequence[Stream], *, thresholds: Any = None, refractory: float = 1.0, tolerance: float = 0.5
) -> Tally:
    """What is missed and invented, over thresholds.

    A second detection of an event is a false alarm: give `refractory` the length of the keyword to avoid it.  `hours`
    are all of the streams, events included.  A stretch is a stream; of fewer than 20 it is a minute of one, where
    events are by their start, and nothing is detected otherwise than in the whole stream.

    thresholds: by default up to 200 of the scores that occur, by rank from the highest, evenly on a logarithmic scale:
    false alarms are to be rare.  Infinity is added.
    Raises UserError without frames, without events, and for scores that are NaN or infinite.
    """
    if not sum(len(stream.scores) for stream in streams):
        raise UserError("nothing to score: no frames in any stream; is the test set empty?")
    if not sum(len(stream.events) for stream in streams):
        raise UserError("no events in any stream: a false-reject rate needs recordings that hold the keyword")
    scores = np.concatenate([np.asarray(stream.scores) for stream in streams])
    _checks.columns(scores=scores)
    if thresholds is None:
        ranks = np.unique(np.geomspace(1, len(scores), POINTS).astype(np.int64)) - 1
        thresholds = np.sort(scores)[::-1][ranks]
    thresholds = np.unique(np.append(np.asarray(thresholds, np.float64), np.inf))
    stretch = math.inf if len(streams) >= _ENOUGH else _STRETCH
    parts = [_tally_one(stream, thresholds, stretch, refractory, tolerance) for stream in streams]
    return Tally(thresholds, *(np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)))


def _tally_one(
    stream: Stream, thresholds: np.ndarray, stretch: float, refractory: float, tolerance: float
) -> tuple[np.ndarray, ...]:
    seconds = len(stream.scores) * stream.hop
    B = max(1, round(seconds / stretch))

    def place(times: np.ndarray) -> np.ndarray:
        number = np.clip((times * (B / max(seconds, stream.hop))).astype(np.int64), 0, B - 1)
        return np.bincount(number, minlength=B).astype(np.float64)

    starts = np.asarray(stream.events, np.float64).reshape(-1, 2)[:, 0]
    misses, alarms = [], []
    for threshold in thresholds:
        fired = detections(stream.scores, threshold, hop=stream.hop, refractory=refractory)
        hit, found = match(fired, stream.events, tolerance=tolerance)
        misses.append(place(starts[~found]))
        alarms.append(place(fired[~hit]))
    return np.array(misses), np.array(alarms), place(starts), np.full(B, seconds / B / 3600)


def curve(found: Tally) -> Curve:
    """False rejects against false alarms an hour.  Because of the refractory time neither is quite monotonic."""
    return Curve(
        found.thresholds,
        found.misses.sum(axis=1) / found.events.sum(),
        found.alarms.sum(axis=1) / found.hours.sum(),
    )


def at_false_alarms(found: Curve, per_hour: float) -> OperatingPoint:
    """The best point of a curve with at most `per_hour` false alarms an hour.

    Its resolution is that of the audio: h hours without a false alarm say that the rate is below 3 / h (95 % sure).
    Raises UserError for a negative rate.
    """
    allowed = np.flatnonzero(found.false_alarms <= per_hour)
    if not len(allowed):
        raise UserError(f"{per_hour} false alarms an hour: give 0 or more")
    # Of equal ones the highest threshold: the fewest alarms.
    best = allowed[::-1][int(np.argmin(found.false_rejects[allowed[::-1]]))]
    return OperatingPoint(*(float(x[best]) for x in (found.false_rejects, found.false_alarms, found.thresholds)))


def intervals(
    found: Tally, per_hour: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Interval, ...]:
    """Of the false rejects `at_false_alarms` of each of `per_hour`, by bootstrap over the stretches.

    Streams are drawn as wholes, for one speaker in one room makes all of their events easy or hard.  Too few streams
    are no choice to draw from; minutes, long beside all that a detection looks at, then stand for them (blocks of a
    series: Künsch 1989, "The jackknife and the bootstrap for general stationary observations"), and the interval says
    nothing of other speakers and rooms.  Every resample has false alarms of its own, and hence a threshold of its own:
    resampling events alone would take the threshold for known, though it hangs on a few false alarms.
    """

    def rejects(weights: np.ndarray) -> dict[str, np.ndarray]:
        misses, alarms, events, hours = (x @ weights for x in found[1:])
        shares = misses / np.where(events > 0, events, np.nan)
        allowed = [alarms <= rate * hours for rate in per_hour]
        return {str(n): np.where(own, shares, np.inf).min(axis=0) for n, own in enumerate(allowed)}

    every = bootstrap.intervals_of(rejects, len(found.events), level=level, resamples=resamples, seed=seed)
    return tuple(every[str(n)] for n in range(len(per_hour)))

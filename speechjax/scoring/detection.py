"""Wake words and keywords in streams: scores over time to detections, and what they miss and invent.

Times are seconds from a stream's begin.  Shapes: T frames, E events, D detections.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.scoring import _checks

POINTS = 200  # thresholds of a curve


class Stream(NamedTuple):
    """`scores` float [T] of one keyword, frame t at t * `hop` seconds, and when it was said: `events` [E, 2], start and
    end, [0, 2] in speech without it.
    """

    scores: np.ndarray
    hop: float
    events: np.ndarray


class Counts(NamedTuple):
    """Of one stream: `misses` among `events`, `alarms` that no event explains, in `hours` of audio."""

    misses: int
    events: int
    alarms: int
    hours: float


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


def count(stream: Stream, threshold: float, *, refractory: float = 1.0, tolerance: float = 0.5) -> Counts:
    """Of one stream at one threshold; sums of these over streams, or resamples of them, make the rates.

    A second detection of an event is a false alarm: give `refractory` the length of the keyword to avoid it.  `hours`
    are all of the stream, events included.
    """
    fired = detections(stream.scores, threshold, hop=stream.hop, refractory=refractory)
    hit, found = match(fired, stream.events, tolerance=tolerance)
    hours = len(stream.scores) * stream.hop / 3600
    return Counts(int((~found).sum()), len(found), int((~hit).sum()), hours)


def curve(
    streams: Sequence[Stream], *, thresholds: Any = None, refractory: float = 1.0, tolerance: float = 0.5
) -> Curve:
    """False rejects against false alarms an hour, over thresholds.

    thresholds: by default up to 200 of the scores that occur, by rank from the highest, evenly on a logarithmic scale:
    false alarms are to be rare.  Infinity is added.  Because of the refractory time neither rate is quite monotonic.
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
    rows = []
    for threshold in thresholds:
        counts = [count(stream, threshold, refractory=refractory, tolerance=tolerance) for stream in streams]
        misses, events, alarms, hours = (sum(column) for column in zip(*counts, strict=True))
        rows.append((misses / events, alarms / hours))
    return Curve(thresholds, *np.array(rows).T)


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

"""Where a run's time goes."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepClock:
    """Where the time goes, from the host's clock alone: no device is waited for.

    A step counts when the loop reports it.  Dispatch runs ahead of the device by as much as the loop allows, so
    rates are right over an interval, not for one step.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._paused = 0.0
        self._paused_at: float | None = None
        self._start_interval()

    def _start_interval(self) -> None:
        self._began = self._now()
        self._waited, self._steps, self._audio_seconds = 0.0, 0, 0.0

    def _now(self) -> float:
        """Seconds of training: the clock, less all pauses; stands still in a pause."""
        return (self._clock() if self._paused_at is None else self._paused_at) - self._paused

    @contextmanager
    def input_wait(self) -> Iterator[None]:
        """Time in here is spent waiting for the next batch."""
        began = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - began

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here (evaluation, checkpoints, compilation) belongs to no interval; pauses may nest."""
        if self._paused_at is not None:
            yield
            return
        self._paused_at = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - self._paused_at
            self._paused_at = None

    def step(self, audio_seconds: float) -> None:
        """One step is done; `audio_seconds` of valid audio over all hosts, padding not counted."""
        self._steps += 1
        self._audio_seconds += audio_seconds

    def read_and_reset(self) -> dict[str, float]:
        """Rates since the last call (NaN where no time has passed), and the `seconds` they are over."""
        seconds = self._now() - self._began
        per = 1.0 / seconds if seconds > 0 else math.nan
        rates = {
            "steps_per_second": self._steps * per,
            "audio_hours_per_second": self._audio_seconds / 3600.0 * per,
            "input_wait_share": self._waited * per,
            "seconds": seconds,
        }
        self._start_interval()
        return rates

"""A keyword in long recordings: how often it is missed while false alarms are rare.

Shapes: T windows of a stream, R windows of a batch, S samples of a window, V classes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speechjax import sharding
from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.records import Records, open_records
from speechjax.data.shards import UnreadableError
from speechjax.errors import UserError
from speechjax.evals import _answers, _groups
from speechjax.scoring import detection, report
from speechjax.train import Job

_LONGEST = 24 * 3600.0  # seconds of a recording
_BATCH_SECONDS = 60
_FORM = "ID<TAB>START<TAB>END, in seconds"


class Detection:
    """False rejections of `keyword` by the task classify, heard in windows of `window` s every `hop` s.

    `source` names the recordings (empty: no test), of any length; what is said in them besides the keyword is what
    false alarms come from.  When the keyword is said stands in the field `events` of their metadata, [[keyword, start
    s, end s], ...], or in a file `events` of lines ID<TAB>START<TAB>END; a recording without any has none.

    A window scores the chance of the keyword, averaged over the last `smooth` s (Chen et al. 2014, "Small-footprint
    keyword spotting using deep neural networks", section 2.3), at the time of its end.  A detection counts from
    `tolerance` s before an event to `tolerance` s after it; another comes `refractory` s later at the earliest
    (speechjax.scoring.detection).  Metrics: for each of `per_hour` false alarms `false_rejects_<per hour>`, a share of
    the events, `hours` of audio and the number of `events`.  `head` names a head of `several`.

    The shares have limits of 95 % by bootstrap over recordings, of fewer than 20 over minutes of them, `_low` and
    `_high`.  `group`, meta:FIELD or id:REGEX: each of them by group of recordings, at the threshold of all, as a device
    has one, with the worst and the gap.

    Raises UserError where there is no such keyword, no event, for events that are none, and for a `group` that fits no
    recording with an event, or where there is one recording.
    """

    def __init__(
        self, job: Job, *, every: int, source: str = "", keyword: str = "", events: str = "", head: str = "",
        window: float = 1.0, hop: float = 0.1, smooth: float = 0.3, tolerance: float = 0.5, refractory: float = 1.0,
        per_hour: tuple[float, ...] = (0.1, 0.5, 1.0), group: str = "",
    ):  # fmt: skip
        self.job, self.every, self.on = job, every, bool(source)
        if not source:
            return
        if not window >= hop > 0 or smooth < 0:
            raise UserError(f"detection: window={window}, hop={hop}, smooth={smooth}: a window of at least one hop")
        self.head = _answers.find_head(job, "detection", head, ["classify"])
        names = _answers.find_label(job, self.head).names
        if keyword not in names:
            raise UserError(f"detection: keyword={keyword!r} is none of the classes {', '.join(names[:30])}")
        self.keyword, self.column, self.per_hour = keyword, names.index(keyword), per_hour
        self.window, self.hop = round(window * SAMPLE_RATE), round(hop * SAMPLE_RATE)
        self.smooth = max(1, round(smooth / hop))
        self.matching = dict(refractory=refractory, tolerance=tolerance)
        data = job.config.data
        self.records = open_records(
            source, cache_dir=data.cache_dir or None, min_seconds=0.05, max_bad_share=data.max_bad_share,
            segment_seconds=_LONGEST,
        )  # fmt: skip
        self.events = read_events(events, self.records) if events else _events_of(self.records, keyword)
        if not sum(map(len, self.events)):
            raise UserError(f"detection: {source} has no event of {keyword!r}; give the field or the file events")
        self._groups = self._read_groups(group) if group else []
        self._rows = -(-round(_BATCH_SECONDS / window) // job.mesh.size) * job.mesh.size
        self._compute = _answers.answerer(job)

    def _read_groups(self, group: str) -> list[str]:
        """The label of every recording; one must have events and a label."""
        if len(self.records) < 2:
            raise UserError(f"detection: group={group!r}, but there is one recording: leave it empty")
        _groups.labels(self.records, [i for i, events in enumerate(self.events) if len(events)], group)
        return _groups.labels(self.records, range(len(self.records)), group)

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        if not self.on:
            return {}
        streams = list(self._streams({"params": params, **extra}))
        counts = detection.tally(streams, **self.matching)
        found, limits = detection.curve(counts), detection.intervals(counts, self.per_hour)
        table = report.false_rejects(
            f"{name} at step {step}: {self.keyword!r}", {name: found}, per_hour=self.per_hour, intervals=limits
        )
        _answers.show_table(self.job, name, table)
        if self.job.logs.enabled:
            from speechjax.scoring import figures

            self.job.logs.picture(step, name, figures.false_reject_curves({self.keyword: found}, f"step {step}"))
        metrics = {}
        for rate, interval in zip(self.per_hour, limits, strict=True):
            point = detection.at_false_alarms(found, rate)
            metrics |= _answers.limited(f"false_rejects_{rate:g}", interval._replace(value=point.false_rejects))
            if self._groups:
                metrics |= self._by_group(streams, point.threshold, f"false_rejects_{rate:g}", step)
        metrics["hours"] = sum(len(stream.scores) * stream.hop for stream in streams) / 3600
        metrics["events"] = float(sum(len(stream.events) for stream in streams))
        return metrics

    def _by_group(
        self, streams: Sequence[detection.Stream], threshold: float, metric: str, step: int
    ) -> dict[str, float]:
        rest, tolerance = self.matching["refractory"], self.matching["tolerance"]
        missed = []
        for stream in streams:
            fired = detection.detections(stream.scores, threshold, hop=stream.hop, refractory=rest)
            missed.append(~detection.match(fired, stream.events, tolerance=tolerance)[1])
        recording = np.repeat(np.arange(len(streams)), [len(own) for own in missed])
        names = [self._groups[i] for i in recording.tolist()]
        wrong = np.concatenate(missed).astype(np.float64)
        return _groups.show(self.job, step, metric, wrong, np.ones_like(wrong), names, blocks=recording)

    def _streams(self, variables: Any) -> Iterator[detection.Stream]:
        for i, events in enumerate(self.events):
            try:
                audio = self.records.read(i)
            except UnreadableError as error:
                raise UserError(f"detection: cannot read {self.records.id(i)!r}: {error}") from error
            scores = _trailing_mean(np.concatenate(list(self._scores(variables, audio))), self.smooth)
            # The first window ends at its length, and of a stream the first score is that of time 0.
            yield detection.Stream(scores, self.hop / SAMPLE_RATE, events - self.window / SAMPLE_RATE)

    def _scores(self, variables: Any, audio: np.ndarray) -> Iterator[np.ndarray]:
        """The chance of the keyword in every window of a recording, some windows at a time."""
        quantum, offset = self.job.task.encoder.frame_len()
        samples = -(-max(self.window - offset, 1) // quantum) * quantum + offset
        if len(audio) < self.window:
            audio = np.pad(audio, (0, self.window - len(audio)))
        windows = np.lib.stride_tricks.sliding_window_view(audio, self.window)[:: self.hop]
        host, hosts = sharding.host_part(self.job.mesh)
        mine = slice(host * self._rows // hosts, (host + 1) * self._rows // hosts)
        for first in range(0, len(windows), self._rows):
            own = windows[first : first + self._rows]
            batch = np.zeros((self._rows, samples), np.int16)
            batch[: len(own), : self.window] = own
            lengths = np.where(np.arange(self._rows) < len(own), self.window, 0).astype(np.int32)
            local = dict(audio=batch[mine], lengths=lengths[mine])  # mean and deviation are the window's own
            found = jax.device_get(self._compute(variables, sharding.global_batch(self.job.mesh, local)))
            yield self._chance(np.asarray(found[f"{self.head.prefix}scores"], np.float64)[: len(own)])

    def _chance(self, scores: np.ndarray) -> np.ndarray:
        """[R, V] -> [R]."""
        from scipy.special import expit, softmax

        tags = self.head.fields["loss"] == "sigmoid"
        return expit(scores[:, self.column]) if tags else softmax(scores, axis=1)[:, self.column]


def _trailing_mean(scores: np.ndarray, count: int) -> np.ndarray:
    """Mean of the last `count` scores at each time, of fewer at the beginning."""
    total = np.cumsum(np.concatenate([np.zeros(1), scores]))
    first = np.maximum(np.arange(1, len(total)) - count, 0)
    return (total[1:] - total[first]) / (np.arange(1, len(total)) - first)


# ---- events


def _events_of(records: Records, keyword: str) -> list[np.ndarray]:
    """Of every recording those of its metadata, float64 [E, 2]."""
    found = []
    for i in range(len(records)):
        events = records.meta(i).get("events") or []
        try:
            spans = [(float(start), float(end)) for name, start, end in events if str(name) == keyword]
        except (TypeError, ValueError):
            raise UserError(
                f"events of {records.id(i)!r} are not [[keyword, start s, end s], ...], as in [['hey', 1.0, 1.4]]"
            ) from None
        found.append(_checked(spans, records, i))
    return found


def read_events(file: str, records: Records) -> list[np.ndarray]:
    """Of every recording those of a file, float64 [E, 2].  Raises UserError, with the line, for what is wrong in it."""
    number = {_groups.name(records, i): i for i in range(len(records))}
    spans: list[list[tuple[float, float]]] = [[] for _ in number]
    try:
        lines = Path(file).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"events={file}: {error}; a file of lines {_FORM}") from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, start, end = line.split("\t")
            span = float(start), float(end)
        except ValueError:
            raise UserError(f"{file}, line {n}: want {_FORM}, not {line!r}") from None
        if name not in number:
            raise UserError(f"{file}, line {n}: there is no recording {name!r}, e.g. {next(iter(number))!r}")
        spans[number[name]].append(span)
    return [_checked(own, records, i) for i, own in enumerate(spans)]


def _checked(spans: Sequence[tuple[float, float]], records: Records, i: int) -> np.ndarray:
    found = np.array(sorted(spans), np.float64).reshape(-1, 2)
    seconds = float(records.lengths[i]) / SAMPLE_RATE
    if len(found) and not ((found[:, 0] >= 0) & (found[:, 1] >= found[:, 0]) & (found[:, 1] <= seconds + 0.5)).all():
        raise UserError(f"an event of {records.id(i)!r} is not within its {seconds:g} s: give start and end in seconds")
    return found

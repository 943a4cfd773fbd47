"""What a prepared data set is made of, counted by workers while they hold the audio.

Everything is an integer, a histogram over fixed bins, or a table bounded by its smallest keys. Adding up such counts is
exact, so neither the order of the recordings nor the cut into shards shows in the result. `statistics_page` draws it.

Shapes: S samples at 16 kHz, T frames of 20 ms. dBFS: 0 is a constant full scale, so a full-scale sine has -3.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.statistics_measure import FRAME, LOWEST_DBFS, length_bin, length_width, level_bins, measure

# Speech is recorded at about -26 dBov (the nominal level of ITU-T P.56 practice) and its weakest sounds lie some
# 30 dB below; what stays under -60 is a pause, or a microphone that was off.
SILENCE_DBFS = -60
OFFSET_DBFS = -40  # 1 % of full scale
# Between real and upsampled audio: of 1,374 readings at 16 kHz the darkest has -32 dB above 4 kHz, resampled from
# 8 kHz the brightest has -68, and telephone-like FSDD -52.
TREBLE_DB = -45

QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}

_KEPT = 1024  # names a table may hold
_EXAMPLES = 5  # ids of each reason
_MAXIMA = ("longest", "longest_silence")


class Histogram(Counter[int]):
    """{bin: count}. Bins of levels are named by their lower edge in dB, bins of lengths in tenths of a second."""

    def absorb(self, other: Mapping[int, int]) -> None:
        self.update(other)

    def to_json(self) -> dict[str, int]:
        return {str(key): self[key] for key in sorted(self)}

    def load(self, stored: Mapping[str, int]) -> None:
        self.update({int(key): count for key, count in stored.items()})


class Tally(Counter[str]):
    """{name: count} of at most 1024 names, the smallest by code point.

    A name among the smallest of the whole was among them in every part, so its count is exact however the parts were
    merged; which names are frequent could not be kept so. What the dropped ones sum to is the caller's total less
    these.
    """

    def count(self, name: Any, amount: int = 1) -> None:
        self[str(name)[:200]] += amount
        self._bound()

    def absorb(self, other: Mapping[str, int]) -> None:
        self.update(other)
        self._bound()

    load = absorb

    def _bound(self) -> None:
        for name in heapq.nlargest(len(self) - _KEPT, self):
            del self[name]

    def to_json(self) -> dict[str, int]:
        return {name: self[name] for name in sorted(self)}


class Examples(dict[str, list[str]]):
    """{name: its smallest ids}, bounded like a `Tally`."""

    def absorb(self, other: Mapping[str, list[str]]) -> None:
        for name, ids in other.items():
            self[name[:200]] = sorted([*self.get(name[:200], []), *ids])[:_EXAMPLES]
        for name in heapq.nlargest(len(self) - _KEPT, self):
            del self[name]

    load = absorb

    def to_json(self) -> dict[str, list[str]]:
        return {name: list(self[name]) for name in sorted(self)}


@dataclass
class Statistics:
    """Counts over recordings, as large for a thousand hours as for one.

    `samples`, `clipped_samples`, `longest` in samples, `longest_silence` in frames; `languages` in samples, the other
    tables in recordings, with "" for unknown. `speakers` is keyed by a hash of the name: the smallest 1024 of evenly
    spread hashes tell how many there are.
    """

    recordings: int = 0
    samples: int = 0
    longest: int = 0
    clipped_samples: int = 0
    clipped_recordings: int = 0  # more than 0.1 % of their samples at full scale
    silent_recordings: int = 0  # more than half of their frames silent
    longest_silence: int = 0
    upsampled_recordings: int = 0  # stored at more than 8 kHz, or unknown, without sound above 4
    with_speaker: int = 0
    with_text: int = 0
    characters: int = 0
    rejected: int = 0
    lengths: Histogram = field(default_factory=Histogram)
    levels: Histogram = field(default_factory=Histogram)  # RMS of recordings
    peaks: Histogram = field(default_factory=Histogram)
    offsets: Histogram = field(default_factory=Histogram)  # magnitude of the mean
    trebles: Histogram = field(default_factory=Histogram)  # power above 4 kHz over all power
    frames: Histogram = field(default_factory=Histogram)  # RMS of frames
    rates: Tally = field(default_factory=Tally)
    channels: Tally = field(default_factory=Tally)
    formats: Tally = field(default_factory=Tally)
    languages: Tally = field(default_factory=Tally)
    speakers: Tally = field(default_factory=Tally)
    reasons: Tally = field(default_factory=Tally)
    examples: Examples = field(default_factory=Examples)

    @classmethod
    def new(cls) -> "Statistics":
        return cls()

    def add(
        self,
        audio: np.ndarray,
        *,
        rate: int = 0,
        channels: int = 0,
        kind: str = "",
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Counts one recording: int16 [S] mono at 16 kHz, and the rate in Hz, channels and format it came with.

        0 and "" mean unknown. Of `meta`, `speaker`, `lang` and `text` are looked at. Raises ValueError for audio of
        another type or shape.
        """
        if audio.dtype != np.int16 or audio.ndim != 1:
            raise ValueError(f"statistics are of int16 [samples], not of {audio.dtype} {list(audio.shape)}")
        found = measure(audio)
        self.recordings += 1
        self.samples += len(audio)
        self.longest = max(self.longest, len(audio))
        self.lengths[length_bin(len(audio))] += 1
        self.clipped_samples += found.clipped
        self.clipped_recordings += found.clipped * 1000 > len(audio)
        level, peak, offset, treble = level_bins(np.array(found[:4])).tolist()
        self.levels[level] += 1
        self.peaks[peak] += 1
        self.offsets[offset] += 1
        self.trebles[treble] += 1
        self.upsampled_recordings += treble < TREBLE_DB and not 0 < rate <= SAMPLE_RATE // 2
        self._add_frames(level_bins(found.frames))
        self.rates.count(rate or "")
        self.channels.count(channels or "")
        self.formats.count(kind)
        self._add_meta(meta or {}, len(audio))

    def _add_frames(self, bins_t: np.ndarray) -> None:
        counts = np.bincount(bins_t - LOWEST_DBFS, minlength=1 - LOWEST_DBFS)
        present = np.flatnonzero(counts)
        self.frames.update(dict(zip((present + LOWEST_DBFS).tolist(), counts[present].tolist(), strict=True)))
        silent = bins_t < SILENCE_DBFS
        if silent.any():
            turns = np.flatnonzero(np.diff(silent, prepend=False, append=False))
            self.longest_silence = max(self.longest_silence, int((turns[1::2] - turns[::2]).max()))
            self.silent_recordings += 2 * int(np.count_nonzero(silent)) > len(silent)

    def _add_meta(self, meta: Mapping[str, Any], samples: int) -> None:
        speaker, lang, text = (meta.get(name) for name in ("speaker", "lang", "text"))
        self.languages.count("" if lang is None else lang, samples)
        if speaker is not None and speaker != "":
            name = str(speaker).encode("utf-8", "surrogatepass")
            self.speakers.count(hashlib.blake2b(name, digest_size=8).hexdigest())
            self.with_speaker += 1
        if isinstance(text, str) and text.strip():
            self.with_text += 1
            self.characters += len(text)

    def reject(self, id: str, reason: str) -> None:
        """Counts a recording that cannot be used, and keeps the smallest five ids of each reason."""
        self.rejected += 1
        self.reasons.count(reason)
        self.examples.absorb({reason: [id]})

    def merge(self, other: "Statistics") -> None:
        """Adds another's counts to these; in any order and grouping the result is the same."""
        for each in fields(self):
            own, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(own, int):
                setattr(self, each.name, max(own, theirs) if each.name in _MAXIMA else own + theirs)
            else:
                own.absorb(theirs)

    def to_json(self) -> dict[str, Any]:
        """All of it in plain types, equal for equal statistics byte for byte."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value if isinstance(value, int) else value.to_json() for name, value in values.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Statistics":
        """The statistics that `to_json` wrote down; KeyError where something is missing."""
        made = cls()
        for each in fields(cls):
            own, value = getattr(made, each.name), stored[each.name]
            if isinstance(own, int):
                setattr(made, each.name, int(value))
            else:
                own.load(value)
        return made


# ---- numbers


def numbers(statistics: Statistics) -> dict[str, Any]:
    """The numbers that describe a data set, units in their names; None where nothing was there to measure.

    Quantiles are interpolated within bins: of 0.1 s up to 40 s, 1 s up to 2 minutes, 10 s up to an hour, and 1 dB.
    """
    s, frames = statistics, sum(statistics.frames.values())
    lengths = {f"{name}_seconds": length_quantile(s, share) for name, share in QUANTILES.items()}
    return {
        "recordings": s.recordings,
        "hours": s.samples / SAMPLE_RATE / 3600,
        "mean_seconds": _share(s.samples, s.recordings * SAMPLE_RATE),
        **lengths,
        "longest_seconds": s.longest / SAMPLE_RATE if s.recordings else None,
        **{f"{name}_level_dbfs": _level_quantile(s.levels, share) for name, share in QUANTILES.items()},
        "median_peak_dbfs": _level_quantile(s.peaks, 0.5),
        "full_scale_share": _share(s.clipped_samples, s.samples),
        "clipped_recordings": s.clipped_recordings,
        "silent_share": _share(_below(s.frames, SILENCE_DBFS), frames),
        "digital_silence_share": _share(s.frames[LOWEST_DBFS], frames),
        "silent_recordings": s.silent_recordings,
        "longest_silence_seconds": min(s.longest_silence * FRAME, s.longest) / SAMPLE_RATE,
        "offset_recordings": s.recordings - _below(s.offsets, OFFSET_DBFS),
        "upsampled_recordings": s.upsampled_recordings,
        "speakers": _speakers(s),
        "languages": len(s.languages) - ("" in s.languages),
        "with_speaker_share": _share(s.with_speaker, s.recordings),
        "with_text_share": _share(s.with_text, s.recordings),
        "characters": s.characters,
        "rejected": s.rejected,
        "rates": largest(s.rates, s.recordings),
        "channels": largest(s.channels, s.recordings),
        "formats": largest(s.formats, s.recordings),
        "language_hours": {k: n / SAMPLE_RATE / 3600 for k, n in largest(s.languages, s.samples).items()},
        "rejected_reasons": largest(s.reasons, s.rejected),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _below(histogram: Histogram, edge: int) -> int:
    return sum(count for key, count in histogram.items() if key < edge)


def _quantile(histogram: Histogram, share: float, width: Callable[[int], int] = lambda key: 1) -> float | None:
    """Where `share` of the counts lie below, spread evenly over each bin."""
    wanted = share * sum(histogram.values())
    for key in sorted(histogram):
        if histogram[key] >= wanted:
            return key + width(key) * wanted / histogram[key]
        wanted -= histogram[key]
    return None


def _level_quantile(histogram: Histogram, share: float) -> float | None:
    level = _quantile(histogram, share)
    return None if level is None else min(level, 0.0)  # the bin at full scale has no width


def length_quantile(statistics: Statistics, share: float) -> float | None:
    tenths = _quantile(statistics.lengths, share, length_width)
    return None if tenths is None else min(tenths / 10, statistics.longest / SAMPLE_RATE)


def _speakers(statistics: Statistics) -> int:
    """How many distinct ones; beyond 1024 an estimate, 3 % off or so.

    n hashes spread over the unit interval have their k-th smallest at about k / n (Bar-Yossef et al. 2002).
    """
    kept = statistics.speakers
    if sum(kept.values()) == statistics.with_speaker:
        return len(kept)
    return round((len(kept) - 1) * 2**64 / int(max(kept), 16))


def largest(tally: Tally, total: int) -> dict[str, int]:
    """{name: count}, largest first, "unknown" for "", and "others" for what the table dropped."""
    counts = Counter(tally)
    if "" in counts:
        counts["unknown"] += counts.pop("")  # there may be a recording that says so itself
    rows = dict(sorted(counts.items(), key=lambda row: (-row[1], row[0])))
    rest = total - sum(tally.values())
    return {**rows, "others": rows.get("others", 0) + rest} if rest else rows


def write_page(folder: Path, title: str, parts: dict[str, Statistics]) -> Path:
    """Writes statistics.json, statistics.png and index.html into `folder`; returns the path of the page.

    The JSON holds {"title", "all", "parts"}, for each part and for all the "numbers" and the raw "counts" that
    `Statistics.from_json` takes.
    """
    from speechjax.data import statistics_page  # late: it is built on what this file counts

    return statistics_page.write(Path(folder), title, parts)

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
from typing import Any, NamedTuple

import numpy as np

from speechjax.data.decode import SAMPLE_RATE

FRAME = SAMPLE_RATE // 50  # samples, 20 ms
# Speech is recorded at about -26 dBov (the nominal level of ITU-T P.56 practice) and its weakest sounds lie some
# 30 dB below; what stays under -60 is a pause, or a microphone that was off.
SILENCE_DBFS = -60
LOWEST_DBFS = -120  # bin of digital silence: one nonzero sample lifts a 20 ms frame to -115
OFFSET_DBFS = -40  # 1 % of full scale
# Between real and upsampled audio: of 1,374 readings at 16 kHz the darkest has -32 dB above 4 kHz, resampled from
# 8 kHz the brightest has -68, and telephone-like FSDD -52.
TREBLE_DB = -45

QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}

_FULL_SCALE = 32_768
_CLIPPED = 32_767  # symmetric converters stop here at both ends
_CHUNK = 512 * FRAME  # its float copy stays in the CPU's cache
_KEPT = 1024  # names a table may hold
_EXAMPLES = 5  # ids of each reason
_MAXIMA = ("longest", "longest_silence")
# Up to `end`, in tenths of a second, bins of the length histogram are `width` wide: fine where training crops.
_LENGTHS = ((400, 1), (1_200, 10), (36_000, 100), (864_000, 6_000))

_WINDOW = 512  # samples of each spectrum that looks for treble
_WINDOWS = 16  # eight miss the fricatives of some utterances
_HANN = np.hanning(_WINDOW + 2)[1:-1].astype(np.float32)
_RUMBLE = 4  # bins of 31.25 Hz left out at the bottom: a DC offset would pass for a lack of treble
_TREBLE = 136  # from 4.25 kHz on, clear of the transition band of resamplers
_EDGES = 10.0 ** (np.arange(LOWEST_DBFS + 1, 1) / 10)  # power at the lower edges of the bins above the lowest


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
        found = _measure(audio)
        self.recordings += 1
        self.samples += len(audio)
        self.longest = max(self.longest, len(audio))
        self.lengths[length_bin(len(audio))] += 1
        self.clipped_samples += found.clipped
        self.clipped_recordings += found.clipped * 1000 > len(audio)
        level, peak, offset, treble = _level_bins(np.array(found[:4])).tolist()
        self.levels[level] += 1
        self.peaks[peak] += 1
        self.offsets[offset] += 1
        self.trebles[treble] += 1
        self.upsampled_recordings += treble < TREBLE_DB and not 0 < rate <= SAMPLE_RATE // 2
        self._add_frames(_level_bins(found.frames))
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
        **{f"{name}_level_dbfs": _quantile(s.levels, share) for name, share in QUANTILES.items()},
        "median_peak_dbfs": _quantile(s.peaks, 0.5),
        "full_scale_share": _share(s.clipped_samples, s.samples),
        "clipped_recordings": s.clipped_recordings,
        "silent_share": _share(_below(s.frames, SILENCE_DBFS), frames),
        "digital_silence_share": _share(s.frames[LOWEST_DBFS], frames),
        "silent_recordings": s.silent_recordings,
        "longest_silence_seconds": s.longest_silence * FRAME / SAMPLE_RATE,
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
    rows = {name or "unknown": count for name, count in sorted(tally.items(), key=lambda row: (-row[1], row[0]))}
    rest = total - sum(tally.values())
    return {**rows, "others": rows.get("others", 0) + rest} if rest else rows


def summary(statistics: Statistics) -> dict[str, str]:
    """The few numbers worth a line on the console."""
    found = numbers(statistics)
    length, level = ([found[f"{name}_{unit}"] for name in QUANTILES] for unit in ("seconds", "level_dbfs"))
    return {
        "recordings": f"{found['recordings']:,}",
        "hours": f"{found['hours']:,.2f}",
        "seconds (5 %, median, 95 %)": _listed(length, 1),
        "level, dBFS": _listed(level, 0),
        "clipped": f"{found['clipped_recordings']:,}",
        "silence": "–" if found["silent_share"] is None else f"{100 * found['silent_share']:.3g} %",
        "speakers": f"{found['speakers']:,}",
        "rejected": f"{found['rejected']:,}",
    }


def _listed(values: list[float | None], digits: int) -> str:
    return "–" if None in values else ", ".join(f"{value:.{digits}f}" for value in values)


def write_page(folder: Path, title: str, parts: dict[str, Statistics]) -> Path:
    """Writes statistics.json, statistics.png and index.html into `folder`; returns the path of the page.

    The JSON holds {"title", "all", "parts"}, for each part and for all the "numbers" and the raw "counts" that
    `Statistics.from_json` takes.
    """
    from speechjax.data import statistics_page  # late: it is built on what this file counts

    return statistics_page.write(Path(folder), title, parts)


# ---- bins


def length_bin(samples: int) -> int:
    """Lower edge of the bin of a length, in tenths of a second; from 24 h on there is one bin."""
    tenths = samples * 10 // SAMPLE_RATE
    return min(tenths // length_width(tenths) * length_width(tenths), _LENGTHS[-1][0])


def length_width(tenths: int) -> int:
    """Width of the bin at a length, both in tenths of a second."""
    return next((width for end, width in _LENGTHS if tenths < end), _LENGTHS[-1][1])


def _level_bins(power: np.ndarray) -> np.ndarray:
    """Whole dB, rounded down, of powers relative to full scale, between -120 and 0."""
    return np.searchsorted(_EDGES, power, side="right") + LOWEST_DBFS


# ---- measuring


class _Measured(NamedTuple):
    """Powers relative to full scale, `frames` float32 [T] with the last over its own length; `clipped` in samples."""

    level: float
    peak: float
    offset: float
    treble: float
    frames: np.ndarray
    clipped: int


def _measure(audio: np.ndarray) -> _Measured:
    """One pass over int16 [S] in pieces of 10 s, so that nothing as large as the audio is made.

    Squares and sums are those of float32 copies: int16 has no 32,768 for its -32,768, and its squares overflow. The
    sum of a frame is exact there (320 · 32,768 < 2^24), and so are its squares as far up as the silence threshold.
    """
    peak, clipped = 0, 0
    sums, energies = np.empty((2, -(-len(audio) // FRAME)), np.float32)
    buffer = np.empty((min(len(energies), _CHUNK // FRAME), FRAME), np.float32)
    ones = np.ones(FRAME, np.float32)
    for start in range(0, len(audio), _CHUNK):
        piece = audio[start : start + _CHUNK]
        low, high = int(piece.min()), int(piece.max())
        peak = max(peak, -low, high)
        if max(-low, high) >= _CLIPPED:
            clipped += int(np.count_nonzero(piece >= _CLIPPED)) + int(np.count_nonzero(piece <= -_CLIPPED))
        here = slice(start // FRAME, start // FRAME + -(-len(piece) // FRAME))
        block = buffer[: here.stop - here.start]
        flat = block.reshape(-1)
        flat[: len(piece)] = piece
        flat[len(piece) :] = 0
        np.vecdot(block, ones, out=sums[here])
        np.vecdot(block, block, out=energies[here])
    full, count = float(_FULL_SCALE) ** 2, max(1, len(audio))
    level = float(energies.sum(dtype=np.float64)) / count / full
    offset = (float(sums.sum(dtype=np.float64)) / count) ** 2 / full
    frames = energies / (FRAME * full)
    if len(audio) % FRAME:
        frames[-1] *= FRAME / (len(audio) % FRAME)
    return _Measured(level, peak**2 / full, offset, _treble(audio), frames, clipped)


def _treble(audio: np.ndarray) -> float:
    """Share of the power above 4.25 kHz in 32 ms windows spread evenly over int16 [S]; 1 where there is no power.

    Resampling from 8 kHz leaves that band empty, and no rate in a header tells.
    """
    if len(audio) < _WINDOW:
        audio = np.pad(audio, (0, _WINDOW - len(audio)))
    count = min(_WINDOWS, len(audio) // _WINDOW)
    step = len(audio) // count
    spectrum = np.fft.rfft(audio[: count * step].reshape(count, step)[:, :_WINDOW] * _HANN)
    treble = np.vdot(spectrum[:, _TREBLE:], spectrum[:, _TREBLE:]).real
    total = np.vdot(spectrum[:, _RUMBLE:], spectrum[:, _RUMBLE:]).real
    return float(treble / total) if total else 1.0

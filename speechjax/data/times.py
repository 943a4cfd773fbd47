"""What is known of a recording by time, as a unit every 10 ms: its phones, where somebody speaks, and who does.

Times are those of the metadata, in seconds from the recording's beginning.  A frame is what is on at its centre.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from speechjax.data.decode import SAMPLE_RATE
from speechjax.errors import UserError

HOP = SAMPLE_RATE // 100
# Symbols that forced alignments have for nobody speaking (TIMIT, Kaldi, Montreal Forced Aligner, eSpeak's here).
SILENCE = frozenset(("", "_", "<eps>", "epi", "h#", "pau", "sil", "sp"))
SPEECH = ["nonspeech", "speech"]
MOST_SPEAKERS = 5  # every order of them is tried

Span = tuple[str, int, int]  # what, first sample, last sample + 1


def phone_frames(entry: dict[str, Any], samples: int, number: dict[str, int]) -> np.ndarray | None:
    """int16 [frames]: number[phone] of each, -1 for none, of two the one that began later; None without times.

    New phones are added to `number`.  Raises UserError for times that are none.
    """
    phones = _phones(entry, samples)
    frames = np.full(samples // HOP, -1, np.int16)
    for symbol, *span in phones:
        frames[_frames(*span)] = number.setdefault(symbol, len(number))
    return frames if phones else None


def speech_frames(entry: dict[str, Any], samples: int) -> np.ndarray | None:
    """int16 [frames]: whether somebody speaks, 1 or 0; None where the metadata does not tell.

    It does by `segments` [[start s, end s], ...], what is between them being no speech; else by phones that are not
    silence.  Raises UserError for times that are none.
    """
    if (segments := entry["meta"].get("segments")) is not None:
        spans = _spans(entry, "segments", segments, samples)
    else:
        phones = _phones(entry, samples)
        if not phones:
            return None
        spans = [span for span in phones if span[0].lower() not in SILENCE]
    frames = np.zeros(samples // HOP, np.int16)
    for _, *span in spans:
        frames[_frames(*span)] = 1
    return frames


def turn_frames(entry: dict[str, Any], samples: int, speakers: int) -> np.ndarray | None:
    """int16 [frames]: who of up to `speakers` is on, bit k for the k-th to begin; None where nobody says.

    By `turns` [[speaker, start s, end s], ...].  Raises UserError for times that are none, and for more speakers.
    """
    if (turns := entry["meta"].get("turns")) is None:
        return None
    spans = _spans(entry, "turns", turns, samples)
    order = list(dict.fromkeys(who for who, *_ in spans))
    if len(order) > speakers:
        raise UserError(
            f"turns of {entry['id']!r} are of {len(order)} speakers: use config.data.units=turns:{len(order)} (at most "
            f"{MOST_SPEAKERS}), or leave it out (config.data.exclude)"
        )
    frames = np.zeros(samples // HOP, np.int16)
    for who, *span in spans:
        frames[_frames(*span)] |= 1 << order.index(who)
    return frames


def _frames(start: int, end: int) -> slice:
    """Those whose centre, sample (j + 1/2) hop of frame j, lies within."""
    first, stop = (-((HOP // 2 - at) // HOP) for at in (start, end))
    return slice(first, max(first, stop))


def _phones(entry: dict[str, Any], samples: int) -> list[Span]:
    phones = entry["meta"].get("phones") or []
    if not isinstance(phones, list) or not phones or isinstance(phones[0], str):  # fairseq's have no times
        return []
    return _spans(entry, "phones", phones, samples)


def _spans(entry: dict[str, Any], field: str, found: Any, samples: int) -> list[Span]:
    """In the order of time."""
    shape, example = {
        "phones": ("[symbol, start s, end s]", ["a", 0.1, 0.25]),
        "segments": ("[start s, end s]", [0.1, 2.5]),
        "turns": ("[speaker, start s, end s]", ["anna", 0.1, 2.5]),
    }[field]
    try:
        spans = list(_read(found, named=field != "segments"))
    except (TypeError, ValueError, OverflowError):
        spans = [("", -1, -1)]
    if min((start for _, start, _ in spans), default=0) < 0:
        raise UserError(f"{field} of {entry['id']!r} are not [{shape}, ...], as in {[example]}")
    last = max((end for *_, end in spans), default=0)
    if last > samples + SAMPLE_RATE // 2:  # milliseconds or samples, or times of a longer recording
        raise UserError(
            f"{field} of {entry['id']!r} go on to {last / SAMPLE_RATE:g} s, and it has {samples / SAMPLE_RATE:g} s: "
            "give start and end in seconds from its beginning"
        )
    return sorted(spans, key=lambda span: span[1])


def _read(found: Iterable[Any], named: bool) -> Iterable[Span]:
    for span in found:
        name, start, end = span if named else ("", *span)
        yield str(name), round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)

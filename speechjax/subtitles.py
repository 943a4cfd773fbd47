"""Words with their times, and the files they go to: plain text, JSON, SubRip, WebVTT and CTM.

All times are seconds from the beginning of the recording.
"""

import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speechjax.data.text import Tokenizer

PAUSE = 0.8  # a longer one ends a segment
LONGEST_CUE, SHORTEST_CUE = 7.0, 1.0  # seconds that one is shown at most, and at least where there is room
LINE, LINES = 42, 2  # characters and lines of a cue
_TAIL = 0.2  # a word's last token is a peak; it sounds on for at most this long, or to the next token


class Token(NamedTuple):
    """One id of a transcript, the frame that emits it, and how sure that is (None: unknown)."""

    id: int
    frame: int
    confidence: float | None


class Word(NamedTuple):
    """`confidence` from 0 to 1 is the mean of its tokens', None where these have none."""

    text: str
    start: float
    end: float
    confidence: float | None


class Part(NamedTuple):
    """What a search heard at once, from second to second: (text, posterior among them) of its best hypotheses."""

    start: float
    end: float
    hypotheses: list[tuple[str, float]]


class Transcript(NamedTuple):
    """Of one recording of so many `seconds`.

    `joint` stands between words: nothing for characters of a script that writes none.  `timing` is "frames", or
    "spread" where a model does not know its tokens' times and they are spread evenly over the piece they were heard in.
    `parts` are there where several hypotheses were asked for.
    """

    file: str
    seconds: float
    words: list[Word]
    joint: str
    timing: str
    parts: Sequence[Part] = ()

    @property
    def text(self) -> str:
        """All of it in one line."""
        return self.joint.join(word.text for word in self.words)


class Cue(NamedTuple):
    """What is shown from `start` to `end`, in milliseconds."""

    start: int
    end: int
    lines: list[str]


class Spelling:
    """From tokens to words: what separates them, and when a frame is.

    Characters and bytes are words between spaces, SentencePiece's begin with ▁; phones, and characters of a vocabulary
    without the space, are words each by itself.  Frame t is the `hop` samples around the centre of what it hears, the
    `hop` + `extra` samples from t `hop` on, of `rate` a second.
    """

    def __init__(self, tokenizer: Tokenizer, hop: int, extra: int, rate: int):
        self.tokenizer, self._hop, self._extra, self._rate = tokenizer, hop, extra, rate
        tokens = tokenizer.tokens
        self._space = next((tokens.index(space) for space in (" ", "<0x20>") if space in tokens), -1)
        self._pieces = frozenset(
            i for i, token in enumerate(tokens) if tokenizer.kind == "sentencepiece" and token.startswith("▁")
        )
        self._alone = self._space < 0 and not self._pieces
        self.joint = "" if self._alone and tokenizer.kind == "characters" else " "

    def time(self, frame: int) -> float:
        """When it begins."""
        return (frame * self._hop + self._extra / 2) / self._rate

    def parts(self, before: int, after: int) -> bool:
        """Whether a word ends between these two ids, and another search may begin: after a space, not before it."""
        return before == self._space or after in self._pieces or self._alone

    def bounds(self, tokens: Sequence[Token]) -> list[tuple[int, int]]:
        """Where each word begins and ends in `tokens`; the last may go on, unless something follows its end."""
        found, first = [], 0
        for i, token in enumerate(tokens):
            if token.id == self._space:
                found.append((first, i))
                first = i + 1
            elif i > first and (self._alone or token.id in self._pieces):
                found.append((first, i))
                first = i
        return [(a, b) for a, b in [*found, (first, len(tokens))] if b > a]

    def finished(self, tokens: Sequence[Token]) -> int:
        """How many of `tokens` are of words that have ended, or between words."""
        bounds = self.bounds(tokens)
        return bounds[-1][0] if bounds and bounds[-1][1] == len(tokens) else len(tokens)

    def words(self, tokens: Sequence[Token], seconds: float, *, whole: bool = True) -> list[Word]:
        """Words of a recording, or of what has been heard of it, of so many `seconds`.

        Unless the tokens are `whole`, without a last word that may go on.
        """
        found = []
        for first, after in self.bounds(tokens):
            if after == len(tokens) and not whole:
                continue
            part = tokens[first:after]
            text = self.tokenizer.decode([token.id for token in part]).strip()
            if not text:
                continue
            last = part[-1].frame
            end = self.time(last + 1) + _TAIL
            if after < len(tokens):
                end = min(end, self.time(max(tokens[after].frame, last + 1)))
            start = min(self.time(part[0].frame), seconds)
            sure = [token.confidence for token in part if token.confidence is not None]
            confidence = sum(sure) / len(sure) if sure else None
            found.append(Word(text, start, max(start, min(end, seconds)), confidence))
        return found


def shown(path: Path) -> str:
    """A file's name as text, which a name that is not UTF-8 cannot be: � stands for what is not."""
    return os.fsencode(path).decode("utf-8", "replace")


def ctm_name(file: str) -> str:
    """What a CTM calls a recording: its name without folder and ending."""
    return re.sub(r"\s+", "_", Path(file).stem) or "audio"


def segments(transcript: Transcript) -> list[list[Word]]:
    """Words between pauses."""
    found: list[list[Word]] = []
    for word in transcript.words:
        if found and word.start - found[-1][-1].end <= PAUSE:
            found[-1].append(word)
        else:
            found.append([word])
    return found


def cues(transcript: Transcript) -> list[Cue]:
    """Subtitles: segments, those too long for one parted at their longest pauses; none overlaps the next."""
    joint = transcript.joint
    parts = [part for segment in segments(transcript) for part in _parts(segment, joint)]
    starts = [round(1000 * start) for start in [*(part[0].start for part in parts), transcript.seconds]]
    found = []
    for part, start, following in zip(parts, starts[:-1], starts[1:], strict=True):
        shown = max(round(1000 * part[-1].end), start + round(1000 * SHORTEST_CUE))
        # What begins with the next one, or with the end of the recording, is still seen for a moment.
        end = max(min(shown, following), start + 1)
        found.append(Cue(start, end, _lines(part, joint)))
    return found


def _lines(words: Sequence[Word], joint: str) -> list[str]:
    return textwrap.wrap(
        joint.join(word.text for word in words), LINE, break_long_words=not joint, break_on_hyphens=False
    )


def _parts(words: list[Word], joint: str) -> Iterator[list[Word]]:
    """The words in parts that fit a cue, or are single words."""
    short = words[-1].end - words[0].start <= LONGEST_CUE
    if len(words) == 1 or (short and len(_lines(words, joint)) <= LINES):
        yield words
        return
    # Not near either end, where a word would stand alone; of equal pauses the one in the middle.
    edge = len(words) // 4
    places = range(max(1, edge), min(len(words) - 1, len(words) - edge) + 1)

    def worth(place: int) -> tuple[float, float]:
        return round(words[place].start - words[place - 1].end, 3), -abs(place - len(words) / 2)

    cut = max(places, key=worth)
    yield from _parts(words[:cut], joint)
    yield from _parts(words[cut:], joint)


def as_json(transcript: Transcript) -> dict[str, Any]:
    """The transcript as `--format=json` has it."""

    def word(w: Word) -> dict[str, Any]:
        sure = None if w.confidence is None else round(w.confidence, 4)
        return dict(word=w.text, start=round(w.start, 3), end=round(w.end, 3), confidence=sure)

    parts = [
        dict(start=round(part[0].start, 3), end=round(part[-1].end, 3),
             text=transcript.joint.join(w.text for w in part), words=[word(w) for w in part])
        for part in segments(transcript)
    ]  # fmt: skip
    found = dict(file=transcript.file, seconds=round(transcript.seconds, 3), timing=transcript.timing,
                 text=transcript.text, segments=parts)  # fmt: skip
    if transcript.parts:
        found["parts"] = [
            dict(start=round(part.start, 3), end=round(part.end, 3),
                 hypotheses=[dict(text=text, posterior=round(sure, 4)) for text, sure in part.hypotheses])
            for part in transcript.parts
        ]  # fmt: skip
    return found


def ctm_line(file: str, word: Word) -> str:
    """NIST's time-marked conversation: file, channel, start, duration, word and, where known, confidence."""
    sure = "" if word.confidence is None else f" {word.confidence:.3f}"
    return f"{ctm_name(file)} 1 {word.start:.3f} {word.end - word.start:.3f} {word.text}{sure}\n"


def _txt(transcript: Transcript) -> str:
    return "".join(transcript.joint.join(word.text for word in part) + "\n" for part in segments(transcript))


def _json(transcript: Transcript) -> str:
    return json.dumps(as_json(transcript), ensure_ascii=False, indent=1) + "\n"


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{rest:03}"


def _srt(transcript: Transcript) -> str:
    shown = enumerate(cues(transcript), 1)
    return "".join(
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n" + "\n".join(cue.lines) + "\n\n"
        for number, cue in shown
    )


def _vtt(transcript: Transcript) -> str:
    escape = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    return "WEBVTT\n" + "".join(
        f"\n{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n" + "\n".join(cue.lines).translate(escape) + "\n"
        for cue in cues(transcript)
    )


def _ctm(transcript: Transcript) -> str:
    return "".join(ctm_line(transcript.file, word) for word in transcript.words)


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": _txt, "json": _json, "srt": _srt, "vtt": _vtt, "ctm": _ctm}

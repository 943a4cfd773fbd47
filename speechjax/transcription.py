"""Recordings of any length to transcripts, in memory that does not grow with them.

Frames of CTC are independent of each other given what the encoder hears around them, so a long recording becomes
windows that overlap; of each the frames in its middle count, which make one stream of logits.  That is parted in the
middle of pauses (longest runs of the blank between words), and the parts are searched.  Where the encoder hears no
further than the overlap reaches, and normalises nothing over the window, the stream is what it would make of the whole
recording, and the best path that of the whole.  Attention decoders and transducers have no such frames: their audio is
cut where it is quietest, and the pieces are transcribed one by one.

Shapes: R rows, T frames of a window, V vocabulary, U tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from speechjax import sharding
from speechjax.cutting import Level, Pieces, Window, Windows
from speechjax.data.decode import SAMPLE_RATE, BadAudio, pcm_blocks
from speechjax.data.text import Tokenizer
from speechjax.decode import ctc
from speechjax.decode.confidence import hypothesis_confidence
from speechjax.decode.types import Hypotheses
from speechjax.errors import UserError
from speechjax.recognition import Decoding, Recognizer, ctc_beam, scorers, texts
from speechjax.subtitles import Part, Spelling, Token, Transcript, shown

Item = TypeVar("Item")


def pause(symbols: np.ndarray, least: int, parts: Callable[[int, int], bool]) -> int:
    """Frame at which a stream of CTC's best symbols, int [T], parts best: the middle of its longest run of blanks.

    Of the runs between two words, where there are any, as `parts` says of two tokens; at least `least`, which is above
    0.  Without a blank it is the last change of symbols, which no token reaches over either; T if there is none.
    """
    blank = np.concatenate([[False], symbols[least:] < ctc.BLANKS, [False]])
    edges = least + np.flatnonzero(blank[1:] != blank[:-1]).reshape(-1, 2)
    if len(edges):
        spoken = np.concatenate([[ctc.BLANK], symbols[symbols >= ctc.BLANKS], [ctc.BLANK]])
        number = np.cumsum(symbols >= ctc.BLANKS)[edges[:, 0] - 1]  # of spoken frames before the run
        between = np.array([parts(int(spoken[n]), int(spoken[n + 1])) for n in number])
        first, after = max(edges[between] if between.any() else edges, key=lambda run: run[1] - run[0])
        return int(first + after) // 2
    changes = np.flatnonzero(symbols[least:] != symbols[least - 1 : -1])
    return least + int(changes[-1]) if len(changes) else len(symbols)


def confidence(logits: np.ndarray, frames: np.ndarray, ids: Sequence[int]) -> list[float]:
    """Posteriors of tokens in the frames that emit them, from logits [T, V] of CTC."""
    there = logits[frames]
    there = np.exp(there - there.max(axis=1, keepdims=True))
    return (there[np.arange(len(ids)), ids] / there.sum(axis=1)).tolist()


@dataclass(eq=False)
class _Job:
    """A recording on its way: `tokens` in lists, between which words end; `stream` holds logits not yet parted."""

    path: Path
    cutter: Windows | Pieces
    level: Level = field(default_factory=Level)
    tokens: list[list[Token]] = field(default_factory=list)
    stream: list[np.ndarray] = field(default_factory=list)
    parted: int = 0
    spread: bool = False
    parts: list[Part] = field(default_factory=list)
    error: str = ""


class _Part(NamedTuple):
    """What a search gets: audio int16 [S] or logits float32 [frames, V] of a recording from the frame `start` on."""

    job: _Job
    heard: np.ndarray
    start: int
    frames: int
    last: bool


class _Found(NamedTuple):
    """Of a part: its tokens, whether their times are known, and its hypotheses where several were asked for."""

    tokens: list[Token]
    timed: bool
    hypotheses: list[tuple[str, float]]


class Transcriber:
    """A trained task that transcribes.  Called with paths it gives their transcripts, each as soon as it is done.

    Windows are `seconds` long and overlap by `overlap` seconds; `rows` of them, rounded up to the devices of `mesh`,
    are computed at a time.  A word's confidence is the mean posterior of its tokens in the frames that emit them, of
    CTC; other tasks give none.  Raises UserError for tasks without transcripts, and windows that are too short.
    """

    def __init__(
        self, task: Any, variables: Any, tokenizer: Tokenizer, decoding: Decoding, mesh: Mesh, *, seconds: float,
        overlap: float, rows: int,
    ):  # fmt: skip
        self.task, self.variables, self.tokenizer = task, variables, tokenizer
        self.decoding, self.mesh = decoding, mesh
        if (tokens := task.encoder.tokens()) > 1:
            raise UserError(f"this encoder has {tokens} tokens at one time; transcripts need one")
        self.hop, self.extra = task.encoder.frame_len()
        self.frames = round(seconds * SAMPLE_RATE / self.hop)
        self.ahead = round(overlap / 2 * SAMPLE_RATE / self.hop)
        # Chunks of attention begin with the utterance, so windows begin with a chunk.
        self.align = max(dict(task.encoder.attention).get("chunk", 0), 1)
        if self.frames - 2 * self.ahead - self.align < 1:
            raise UserError(f"windows of {seconds:g} s, of which {overlap:g} s overlap, are too short")
        self.rows = -(-rows // mesh.size) * mesh.size
        self.spelling = Spelling(tokenizer, self.hop, self.extra, SAMPLE_RATE)
        self.streams = type(task).__name__ == "CTC"
        # With a lexicon a text is whole words, so parts join between words.
        self.joins = self.streams and not decoding.lexicon
        place = sharding.replicated(mesh)
        if not self.streams:
            self._recognize = Recognizer(task, tokenizer, decoding, place)
            return
        steering = scorers(tokenizer, decoding)
        self.steering, self._weights = tuple(s for s, _ in steering), tuple(weight for _, weight in steering)
        answer = lambda variables, batch: task.apply(variables, batch, method="answer")["logits"]  # noqa: E731
        self._encode = jax.jit(answer, out_shardings=place)
        self._search = jax.jit(self._best, out_shardings=place)

    def search(self, tokens: int, steering: tuple[Any, ...]) -> Any:
        """CTC's greedy or beam search with room for U tokens; `steering` are the scorers, inside jit."""
        if self.decoding.search == "greedy":
            return ctc.Greedy(tokens=tokens)
        weighted = tuple(zip(steering, self._weights, strict=True))
        return ctc_beam(self.decoding, tokens, self.tokenizer.size, weighted)

    def _best(self, steering: tuple[Any, ...], logits: jax.Array, lengths: jax.Array) -> Hypotheses:
        B, T, _ = logits.shape
        search = self.search(T if self.decoding.search == "greedy" else (T + 1) // 2, steering)
        return search.result(search.step(search.init(B), logits, lengths))

    def __call__(
        self, paths: Iterable[Path], progress: Callable[[float], None]
    ) -> Iterator[tuple[Path, Transcript | str]]:
        """(path, transcript, or why there is none), in order; `progress` gets the seconds of each block read."""
        for group in _batched(self._parts(paths, progress), self.rows):
            for part, (tokens, timed, hypotheses) in zip(group, self.decode(group), strict=True):
                job = part.job
                if hypotheses and part.frames:
                    end = self.spelling.time(part.start + part.frames)
                    job.parts.append(Part(self.spelling.time(part.start), end, hypotheses))
                job.spread = job.spread or not timed
                if self.joins and job.tokens:
                    job.tokens[-1] += tokens
                else:
                    job.tokens.append(tokens)
                if part.last:
                    yield job.path, job.error or self._finished(job)

    def _finished(self, job: _Job) -> Transcript:
        seconds = job.level.samples / SAMPLE_RATE
        words = [word for tokens in job.tokens for word in self.spelling.words(tokens, seconds)]
        timing = "spread" if job.spread else "frames"
        return Transcript(shown(job.path), seconds, words, self.spelling.joint, timing, job.parts)

    def _parts(self, paths: Iterable[Path], progress: Callable[[float], None]) -> Iterator[_Part]:
        """What is to be searched, in order."""
        windows = self._windows(paths, progress)
        if not self.streams:
            yield from (piece(job, window) for job, window in windows)
            return
        for group in _batched(windows, self.rows):
            for (job, window), logits in zip(group, self.logits(group), strict=True):
                job.stream.append(logits[window.low : window.high])
                yield from self._part(job, window.last)

    def _windows(self, paths: Iterable[Path], progress: Callable[[float], None]) -> Iterator[tuple[_Job, Window]]:
        """Every recording twice: for its level, so that one with a damaged end is known before, and for its windows."""
        for path in paths:
            job = _Job(path, self._cutter())
            try:
                for block in pcm_blocks(path):
                    job.level.hear(block)
                for block in pcm_blocks(path):
                    for window in job.cutter.hear(block):
                        yield job, window
                    progress(len(block) / SAMPLE_RATE)
                yield job, job.cutter.finish()
            except (BadAudio, OSError) as error:
                job.error = str(error) if isinstance(error, BadAudio) else error.strerror or str(error)
                yield job, Window(np.zeros(0, np.int16), 0, 0, 0, last=True)

    def _cutter(self) -> Windows | Pieces:
        if not self.streams:
            return Pieces(self.hop, self.extra, size=self.frames)
        step = self.frames - 2 * self.ahead - self.align + 1
        return Windows(
            self.hop, self.extra, size=self.frames, step=step, ahead=self.ahead, first=self.frames, align=self.align
        )

    def _part(self, job: _Job, last: bool) -> Iterator[_Part]:
        """Parts of a stream of logits of which enough is there; all of it where nothing follows."""
        stream = np.concatenate(job.stream)
        while last or len(stream) >= self.frames:
            ends = last and len(stream) <= self.frames
            cut = len(stream) if ends else self._pause(stream[: self.frames])
            yield _Part(job, stream[:cut], job.parted, cut, ends)
            stream, job.parted = stream[cut:], job.parted + cut
            if ends:
                break
        job.stream = [stream]

    def _pause(self, stream: np.ndarray) -> int:
        return pause(np.argmax(stream, axis=1), len(stream) // 4 + 1, self.spelling.parts)

    def logits(self, group: Sequence[tuple[Any, Window]]) -> np.ndarray:
        """float32 [len(group), T, V] of windows, and of those whose `level` they have."""
        found = self._encode(self.variables, self._batch([(job.level, window.audio) for job, window in group]))
        return np.asarray(found)[: len(group)]

    def _batch(self, group: Sequence[tuple[Level, np.ndarray]]) -> dict[str, jax.Array]:
        size = (self.frames + 1) * self.hop + self.extra  # with what is too short for one frame more
        batch = dict(audio=np.zeros((self.rows, size), np.int16), lengths=np.zeros(self.rows, np.int32),
                     mean=np.zeros(self.rows, np.float32), std=np.ones(self.rows, np.float32))  # fmt: skip
        for row, (level, audio) in enumerate(group):
            batch["audio"][row, : len(audio)] = audio
            batch["lengths"][row] = len(audio)
            batch["mean"][row], batch["std"][row] = level.mean, level.std
        return sharding.global_batch(self.mesh, batch)

    def decode(self, group: Sequence[_Part]) -> list[_Found]:
        """What was said in every part."""
        if self.streams:
            batch = dict(logits=np.zeros((self.rows, self.frames, self.tokenizer.size), np.float32),
                         lengths=np.zeros(self.rows, np.int32))  # fmt: skip
            for row, part in enumerate(group):
                batch["logits"][row, : part.frames] = part.heard
                batch["lengths"][row] = part.frames
            given = sharding.global_batch(self.mesh, batch)
            found = self._search(self.steering, given["logits"], given["lengths"])
        else:
            found = self._recognize(self.variables, self._batch([(part.job.level, part.heard) for part in group]))
        found = jax.tree.map(np.asarray, found)
        several = [[]] * len(group) if self.decoding.best == 1 else self._several(found)
        return [_Found(*self._tokens(part, found, row), several[row]) for row, part in enumerate(group)]

    def _several(self, found: Hypotheses) -> list[list[tuple[str, float]]]:
        """Of every row the texts of its hypotheses, and their posteriors among them."""
        posteriors = np.asarray(hypothesis_confidence(found))
        return [
            [(text.strip(), float(sure)) for (text, _), sure in zip(said, row, strict=False)]
            for said, row in zip(texts(self.tokenizer, found), posteriors, strict=True)
        ]

    def _tokens(self, part: _Part, found: Hypotheses, row: int) -> tuple[list[Token], bool]:
        count = int(found.lengths[row, 0])
        ids, frames = np.asarray(found.tokens)[row, 0, :count].tolist(), np.asarray(found.frames)[row, 0, :count]
        timed = bool((frames >= 0).all())
        if not timed:
            frames = np.arange(count) * part.frames // count
        sure = confidence(part.heard, frames, ids) if self.streams else [None] * count
        return [Token(*token) for token in zip(ids, (part.start + frames).tolist(), sure, strict=True)], timed


def piece(job: Any, window: Window) -> _Part:
    """A window to be searched by itself."""
    return _Part(job, window.audio, window.start, window.high, window.last)


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    group: list[Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group

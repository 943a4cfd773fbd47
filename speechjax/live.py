"""Speech as it comes: words as soon as they are settled, how late they are, and the pipe they come through."""

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import soxr

from speechjax.cutting import Level, Pieces, Window, Windows
from speechjax.data.decode import SAMPLE_RATE
from speechjax.decode import ctc
from speechjax.errors import UserError
from speechjax.models.streaming import Streamer
from speechjax.subtitles import PAUSE, Token, Transcript, Word
from speechjax.transcription import Transcriber, confidence, piece

log = logging.getLogger("speechjax")

_ROOM = 512  # tokens of a search; without a pause for so long it begins anew, with scorers that remember nothing
_REVISED = 1.5  # seconds after which a token of the best hypothesis is settled, and those without it are given up
_BLOCK = 1 << 13  # bytes read of a pipe at a time, at most
_AHEAD = 300.0  # seconds read ahead: then the pipe waits
_LATEST = 120.0  # seconds of audio after which no word comes any more
_HEADERS = {b"RIFF": "WAV", b"RF64": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"FORM": "AIFF", b"ID3": "MP3"}


class _Windowed:
    """Logits from overlapping windows: every `delay` / 2 seconds those older than another `delay` / 2."""

    def __init__(self, model: Transcriber, delay: float, level: Level):
        step = max(round(delay / 2 * SAMPLE_RATE / model.hop), 1)
        if 2 * step + model.align > model.frames:
            raise UserError(f"a delay of {delay:g} s needs longer windows")
        self._model, self.level, self.most = model, level, 2 * step
        self._cutter = Windows(
            model.hop, model.extra, size=model.frames, step=step, ahead=step, first=2 * step, align=model.align
        )

    def hear(self, pcm: np.ndarray) -> Iterator[np.ndarray]:
        return (self._logits(window) for window in self._cutter.hear(pcm))

    def finish(self) -> np.ndarray:
        return self._logits(self._cutter.finish())

    def warm_up(self) -> None:
        self._logits(Window(np.zeros(0, np.int16), 0, 0, 0, last=True))

    def _logits(self, window: Window) -> np.ndarray:
        return self._model.logits([(self, window)])[0][window.low : window.high]


class _Streamed:
    """Logits from an encoder that remembers what it needs: see `Streamer`, which raises UserError for others."""

    def __init__(self, model: Transcriber):
        task, weights = model.task, model.variables
        if getattr(task, "recurrent_layers", 0):
            raise UserError("config.task.recurrent_layers are bidirectional: they read an utterance from its end too")
        encoder = {name: tree["encoder"] for name, tree in weights.items() if "encoder" in tree}
        self._streamer = Streamer(task.encoder, encoder, 1, hidden=task.layers == "weighted")
        self._respond = jax.jit(lambda weights, encoded: task.apply(weights, encoded, method="respond")["logits"])
        self._weights, self._classes, self.most = weights, model.tokenizer.size, self._streamer.frames
        self._pcm, self._state = np.zeros(0, np.int16), None

    def hear(self, pcm: np.ndarray) -> Iterator[np.ndarray]:
        self._pcm = np.concatenate([self._pcm, pcm])
        first, step = self._streamer.first_samples, self._streamer.samples_per_step
        if self._state is None and len(self._pcm) >= first:
            self._state, self._pcm = self._streamer.init(jnp.asarray(self._pcm[None, :first])), self._pcm[first:]
        while self._state is not None and len(self._pcm) >= step:
            audio, self._pcm = self._pcm[:step], self._pcm[step:]
            yield self._step(audio)

    def finish(self) -> np.ndarray:
        return np.zeros((0, self._classes), np.float32) if self._state is None else self._step(self._pcm)

    def warm_up(self) -> None:
        self._state = self._streamer.init(jnp.zeros((1, self._streamer.first_samples), jnp.int16))
        self._step(np.zeros(0, np.int16))
        self._state = None

    def _step(self, audio: np.ndarray) -> np.ndarray:
        whole = np.zeros((1, self._streamer.samples_per_step), np.int16)
        whole[0, : len(audio)] = audio
        self._state, encoded = self._streamer.step(self._state, jnp.asarray(whole), jnp.int32([len(audio)]))  # type: ignore
        return np.asarray(self._respond(self._weights, encoded))[0, : int(encoded.lengths[0])]


def _source(model: Transcriber, delay: float, level: Level) -> _Windowed | _Streamed:
    if model.align > 1:
        try:
            return _Streamed(model)
        except UserError as error:
            log.info("windows instead of a stream: %s", error)
    return _Windowed(model, delay, level)


class Listener:
    """Speech as it comes: `hear` takes int16 [S] at 16 kHz and gives the words that will not change any more.

    Of CTC the logits come from a `Streamer`, where attention is limited to chunks and nothing else in the model looks
    at the whole recording, otherwise from windows of the last seconds, one every `delay` / 2; then the level of the
    recording, which front ends may want, is that of all heard so far.  Words are given once all hypotheses of a beam
    have them: after a pause, or 1.5 s at the latest.  Other tasks transcribe the pieces of `Pieces`.  Everything is
    compiled at once, so that no word waits for it.  Raises UserError for a delay that windows are too short for.
    """

    def __init__(self, model: Transcriber, delay: float):
        self.level, self.timing, self._model = Level(), "frames", model
        if not model.streams:
            self._cutter = Pieces(model.hop, model.extra, size=model.frames)
            self._transcribe(Window(np.zeros(0, np.int16), 0, 0, 0, last=True))
            return
        self._source: _Windowed | _Streamed = _source(model, delay, self.level)
        self._begin = jax.jit(lambda given: model.search(_ROOM, given).init(1))
        self._step = jax.jit(lambda given, state, *chunk: model.search(_ROOM, given).step(state, *chunk))
        self._result = jax.jit(lambda given, state: model.search(_ROOM, given).result(state))
        second = SAMPLE_RATE / model.hop
        self._pause, self._revised = round(PAUSE * second), round(_REVISED * second)
        self._word: list[Token] = []  # what is settled of a word that may go on
        self._blanks = 0
        self._anew(0, {})
        self._source.warm_up()
        self._read(np.zeros((0, model.tokenizer.size), np.float32), last=True)

    @property
    def seconds(self) -> float:
        """Heard so far."""
        return self.level.samples / SAMPLE_RATE

    def hear(self, pcm: np.ndarray) -> list[Word]:
        """Words that are settled now."""
        self.level.hear(pcm)
        if not self._model.streams:
            return [word for window in self._cutter.hear(pcm) for word in self._transcribe(window)]
        return [word for logits in self._source.hear(pcm) for word in self._read(logits, last=False)]

    def finish(self) -> list[Word]:
        """The rest, when nothing follows."""
        if not self._model.streams:
            return self._transcribe(self._cutter.finish())
        return self._read(self._source.finish(), last=True)

    def _anew(self, base: int, after: dict[str, Any]) -> None:
        """A search from the frame `base` on, whose logits are kept for what they say of its tokens."""
        self._base, self._logits, self._taken = base, np.zeros((0, self._model.tokenizer.size), np.float32), 0
        self._state = self._begin(self._model.steering)._replace(**after)

    def _transcribe(self, window: Window) -> list[Word]:
        found = self._model.decode([piece(self, window)])[0]
        self.timing = self.timing if found.timed else "spread"
        return self._model.spelling.words(found.tokens, self.seconds)

    def _read(self, logits: np.ndarray, last: bool) -> list[Word]:
        """Words that are settled after these frames, float32 [n, V], `most` of the source or fewer."""
        model = self._model
        chunk = np.zeros((1, self._source.most, logits.shape[1]), np.float32)
        chunk[0, : len(logits)] = logits
        self._state = self._step(model.steering, self._state, chunk, np.array([len(logits)], np.int32))
        self._logits = np.concatenate([self._logits, logits])
        spoken = np.flatnonzero(np.argmax(logits, axis=1) >= ctc.BLANKS)
        self._blanks = len(logits) - 1 - int(spoken[-1]) if len(spoken) else self._blanks + len(logits)

        rests = last or self._blanks >= self._pause
        best, full = _look(self._state, len(self._logits) - self._revised), False
        self._state = self._state._replace(**best.only)
        count = best.settled
        if rests:
            found = jax.tree.map(np.asarray, self._result(model.steering, self._state))
            if (length := int(found.lengths[0, 0])) >= count:
                count, best = length, best._replace(ids=found.tokens[0, 0], frames=found.frames[0, 0])
        elif full := best.longest > _ROOM - self._source.most:
            count = len(best.ids)
        ids, frames = best.ids[self._taken : count].tolist(), best.frames[self._taken : count]
        for token, frame, sure in zip(ids, frames.tolist(), confidence(self._logits, frames, ids), strict=True):
            self._word.append(Token(token, self._base + frame, sure))
        self._taken = count
        if rests or full:
            self._anew(self._base + len(self._logits), best.after if full else {})
        return self._words(whole=rests)

    def _words(self, whole: bool) -> list[Word]:
        spelling, tokens = self._model.spelling, self._word
        words = spelling.words(tokens, self.seconds, whole=whole)
        self._word = [] if whole else tokens[spelling.finished(tokens) :]
        return words


class _Best(NamedTuple):
    """Of a stream the best hypothesis, of which all others have the first `settled` tokens, and the longest's length.

    Changes of the state: `only` gives up hypotheses that lack old tokens of the best, and `after` makes a fresh one go
    on in the token that the best is in.
    """

    ids: Any
    frames: Any
    settled: int
    longest: int
    only: dict[str, Any]
    after: dict[str, Any]


def _look(state: Any, old: int) -> _Best:
    """Tokens from before the frame `old` are no longer revised."""
    # Not the scorers' states: that of a language model is large, and stays where it is.
    state = jax.tree.map(np.asarray, state if isinstance(state, ctc.GreedyState) else state._replace(scorers=()))
    if isinstance(state, ctc.GreedyState):
        count = int(state.lengths[0])
        return _Best(state.tokens[0, :count], state.times[0, :count], count, count, {}, {"last": state.last})
    total = np.logaddexp(*state.total)[0]
    alive = total + state.steer[0] > -np.inf
    if not alive.any():
        return _Best(state.tokens[0, 0, :0], state.times[0, 0, 0, :0], 0, 0, {}, {})
    best = int(np.argmax(alive))  # beams are in order
    count, tokens = int(state.lengths[0, best]), state.tokens[0]
    in_token = int(state.path.token[0, best] > state.path.blank[0, best])
    frames = state.times[0, best, in_token, :count]
    fixed = int((frames < old).sum())
    alive &= (tokens[:, :fixed] == tokens[best, :fixed]).all(axis=1) & (state.lengths[0] >= fixed)
    same = (tokens[alive] == tokens[best]).all(axis=0)[: state.lengths[0, alive].min()]
    lost = lambda mass: jax.tree.map(lambda x: np.where(alive[None], x, np.float32(-np.inf)), mass)  # noqa: E731

    def first(mass: ctc.Mass, own: Any) -> ctc.Mass:
        """Of all beams the first one, with the mass of the best, which is 1."""
        rest = np.full(len(total) - 1, -np.inf, np.float32)
        return jax.tree.map(lambda x: np.concatenate([x[0, [best]] - own, rest])[None].astype(np.float32), mass)

    return _Best(
        tokens[best, :count],
        frames,
        settled=len(same) if same.all() else int(np.argmin(same)),
        longest=int(state.lengths[0, alive].max()),
        only=dict(total=lost(state.total), path=lost(state.path)),
        after=dict(
            last=np.where(np.arange(len(total)) == 0, state.last[0, best], 0)[None].astype(np.int32),
            total=first(state.total, total[best]),
            path=first(state.path, np.maximum(*(x[0, best] for x in state.path))),
        ),
    )


class Pipe:
    """Blocks of a stream of 16 bit mono, read by a thread so that none waits, and when each came.

    Some minutes at `rate` Hz are read ahead, however small the blocks are.
    """

    def __init__(self, stream: BufferedIOBase, rate: int = SAMPLE_RATE):
        self._stream, self._room = stream, round(2 * rate * _AHEAD)  # bytes
        self._blocks: deque[tuple[bytes, float]] = deque()
        self._changed = threading.Condition()
        self.stopped = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        data = self._stream.read1(_BLOCK)
        while 0 < len(data) < 4 and (more := self._stream.read1(_BLOCK)):
            data += more  # `begin` wants a header's mark whole
        while True:
            when = time.monotonic()
            with self._changed:
                # Not woken when stopped, since a signal's handler had better take no lock.
                while self._room < len(data) and not self.stopped:
                    self._changed.wait(0.1)
                if self.stopped:
                    return
                self._room -= len(data)
                self._blocks.append((data, when))
                self._changed.notify()
            if not data:
                return
            data = self._stream.read1(_BLOCK)

    def _next(self, take: bool) -> tuple[bytes, float] | None:
        """The next block, empty at the end, which stays unless taken; None once `stopped` and nothing is left."""
        with self._changed:
            while not self._blocks:
                if self.stopped:
                    return None
                self._changed.wait(0.1)
            if not take:
                return self._blocks[0]
            self._room += len(self._blocks[0][0])
            self._changed.notify()
            return self._blocks.popleft()

    def begin(self) -> None:
        """Waits for the first block.  Raises UserError for that of a file that is no raw audio."""
        head = (self._next(take=False) or (b"", 0.0))[0]
        for mark, name in _HEADERS.items():
            if head.startswith(mark):
                raise UserError(
                    f"- reads raw 16 bit mono, and this pipe has a file with a header ({name}): name the file instead, "
                    f"or pipe `ffmpeg -i FILE -f s16le -ac 1 -ar {SAMPLE_RATE} -`"
                )

    def __iter__(self) -> Iterator[tuple[bytes, float]]:
        """Until the end; once `stopped`, what had been read till then."""
        while (block := self._next(take=True)) and block[0]:
            yield block


class Delays:
    """How late words are: since they were said, in seconds of audio, and since they were read, on the clock."""

    def __init__(self):
        self._read: deque[tuple[float, float]] = deque()  # (seconds heard so far, when)
        self.audio: list[float] = []
        self.wall: list[float] = []

    def heard(self, seconds: float, when: float) -> None:
        self._read.append((seconds, when))
        while self._read[0][0] < seconds - _LATEST:  # nobody speaks
            self._read.popleft()

    def given(self, end: float, seconds: float, when: float) -> None:
        """A word that was said by `end`, after `seconds` of audio."""
        while len(self._read) > 1 and self._read[0][0] < end:
            self._read.popleft()
        self.audio.append(seconds - end)
        self.wall.append(when - self._read[0][1])

    def __str__(self) -> str:
        if not self.audio:
            return "no words"
        first, middle = ((self.audio[0], self.wall[0]), (statistics.median(self.audio), statistics.median(self.wall)))
        tell = lambda pair: f"{pair[0]:.2f} s of audio, {pair[1]:.2f} s on the clock"  # noqa: E731
        return f"words came late by {tell(middle)} (median of {len(self.audio)}); the first by {tell(first)}"


def listen(
    listener: Listener, pipe: Iterable[tuple[bytes, float]], rate: int, joint: str,
    line: Callable[[Word], str] | None, out: TextIO | None = None,
) -> Transcript:  # fmt: skip
    """What comes through a pipe until it ends, as blocks of 16 bit mono at `rate` Hz and when they came.

    Words are printed at once: one a line by `line`, or without that as text, a line for what is between two pauses; to
    `out`, or to standard output.
    """
    delays, said, busy, rest = Delays(), [], 0.0, b""
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="int16", quality="HQ")

    def tell(words: list[Word]) -> None:
        for word in words:
            delays.given(word.end, listener.seconds, time.monotonic())
            between = "\n" if said and word.start - said[-1].end > PAUSE else joint
            print(line(word) if line else f"{between if said else ''}{word.text}", end="", file=out, flush=True)
            said.append(word)

    for data, when in pipe:
        begin = time.monotonic()
        data = rest + data
        data, rest = data[: len(data) // 2 * 2], data[len(data) // 2 * 2 :]
        pcm = np.frombuffer(data, "<i2").astype(np.int16)
        pcm = pcm if rate == SAMPLE_RATE else resampler.resample_chunk(pcm)
        delays.heard(listener.seconds + len(pcm) / SAMPLE_RATE, when)
        tell(listener.hear(pcm))
        busy += time.monotonic() - begin
    begin = time.monotonic()
    if rate != SAMPLE_RATE:
        pcm = resampler.resample_chunk(np.zeros(0, np.int16), last=True)
        delays.heard(listener.seconds + len(pcm) / SAMPLE_RATE, begin)
        tell(listener.hear(pcm))
    tell(listener.finish())
    busy += time.monotonic() - begin
    if said and not line:
        print(file=out, flush=True)
    if rest:
        log.warning("the pipe ended in the middle of a sample")
    seconds = listener.seconds
    if seconds:
        log.info("%.1f s of audio in %.1f s (real-time factor %.2f); %s", seconds, busy, busy / seconds, delays)
    else:
        log.warning("the pipe was empty")
    return Transcript("stdin", seconds, said, joint, listener.timing)

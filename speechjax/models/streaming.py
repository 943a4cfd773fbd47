"""An encoder that hears speech as it comes.  Shapes: B rows (streams), S samples and T frames of a step, D width.

Frames of a step are those that the encoder makes of the whole recording, to rounding: an encoder trained on whole
utterances with limited context (`attention` with `chunk` and `left`) is served as it is.  What layers look back at
they recall themselves (see recall.py), so that a step has one shape, and a stream as much memory on its first day as
on its last.

What cannot be streamed is whatever looks at the whole recording: attention without chunks or with all of the past,
normalisation over the utterance, group norm, a backward direction that is not limited to chunks.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from speechjax.audio.features import CONVENTIONS
from speechjax.errors import UserError
from speechjax.models.encoder import FRONTENDS, Encoded, SpeechEncoder
from speechjax.models.frontend import as_float
from speechjax.models.recall import STREAM
from speechjax.models.relative import AttentionOptions

SAMPLE_RATE = 16000
FRONTS = ("waveform", "mel")
BLOCKS = ("transformer", "conformer", "gru", "blstm")


class StreamState(NamedTuple):
    """Of B streams, which come first in every array: samples that belong to frames to come, and what layers recall."""

    heard: jax.Array
    memory: Any


class Streamer:
    """An encoder for B streams: `state = init(audio)`, then `state, encoded = step(state, audio, lengths)`.

    A stream begins with its first `first_samples`, what the front end looks ahead.  Each step takes `samples_per_step`
    more and gives `frames` frames, a multiple of the encoder's chunk (0: that chunk); with `hidden` those of the layers
    too.  Heads that take each frame by itself, such as a linear CTC, may be applied to what a step gives.  Audio is
    int16, or float in [-1, 1), at 16 kHz.

    `variables` are the encoder's own, of a task that was trained {"params": params["encoder"]}.  Where the front end
    has `normalize=True`, `statistics` are the mean and standard deviation all streams are taken to have, since those of
    the recording are not known before its end: frames are those of a recording that comes with these.

    Raises UserError for encoders that need more than a bounded past, naming the option.
    """

    def __init__(
        self,
        encoder: SpeechEncoder,
        variables: Mapping[str, Any],
        rows: int,
        *,
        frames: int = 0,
        statistics: tuple[float, float] | None = None,
        hidden: bool = False,
    ):
        _check(encoder, statistics)
        chunk = AttentionOptions(**encoder.attention).chunk
        self.frames = frames or chunk
        if self.frames < 1 or self.frames % max(chunk, 1):
            raise UserError(
                f"steps of {self.frames} frames: give a multiple of config.model.attention.chunk={chunk}, at least 1"
            )
        hop, self.first_samples = encoder.frame_len()
        self.samples_per_step = self.frames * hop
        self._encoder, self._variables, self._statistics, self._hidden = encoder, variables, statistics, hidden
        audio = [jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (self.first_samples, self.samples_per_step)]
        lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
        nothing: Any = (audio[0], {})
        self._shapes = jax.eval_shape(self._encode, variables, StreamState(*nothing), audio[1], lengths)[0].memory
        self._step, self._reset = jax.jit(self._advance), jax.jit(self._begin)

    @property
    def latency_seconds(self) -> float:
        """From the beginning of a step's first frame to the last sample that its frames wait for."""
        return (self.samples_per_step + self.first_samples) / SAMPLE_RATE

    def init(self, audio: jax.Array) -> StreamState:
        """The beginning of B streams: their first samples [B, first_samples]."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes)
        return StreamState(as_float(jnp.asarray(audio)), zeros)

    def reset(self, state: StreamState, rows: jax.Array, audio: jax.Array) -> StreamState:
        """New streams in the rows where bool [B] is true, whose first samples are in those of [B, first_samples]."""
        return self._reset(state, rows, audio)

    def step(self, state: StreamState, audio: jax.Array, lengths: jax.Array) -> tuple[StreamState, Encoded]:
        """The next samples [B, samples_per_step], valid ones int32 [B] -> the next frames [B, frames, D].

        `Encoded.lengths` says how many frames are valid.  A row's state moves on with a whole step only.  With fewer
        samples it gets the frames it would have if the stream ended there: all that are left where it does, a look
        ahead where it does not, and with none the row waits.
        """
        return self._step(self._variables, state, audio, lengths)

    def _begin(self, state, rows, audio):
        return _choose(rows, self.init(audio), state)

    def _advance(self, variables, state, audio, lengths):
        after, encoded = self._encode(variables, state, audio, lengths)
        return _choose(lengths == self.samples_per_step, after, state), encoded

    def _encode(self, variables, state, audio, lengths):
        window = jnp.concatenate([state.heard, as_float(audio)], axis=1)
        batch = dict(audio=window, lengths=self.first_samples + lengths)
        if self._statistics is not None:
            batch |= {name: jnp.full(len(audio), x) for name, x in zip(("mean", "std"), self._statistics, strict=True)}
        found: Any = self._encoder.apply(
            {**variables, STREAM: state.memory}, batch, hidden=self._hidden, mutable=[STREAM]
        )
        encoded, changed = found
        return StreamState(window[:, self.samples_per_step :], changed.get(STREAM, {})), encoded


def _choose(rows: jax.Array, new: StreamState, old: StreamState) -> StreamState:
    """`new` in the rows where bool [B] is true."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), new, old)


def _check(encoder: SpeechEncoder, statistics: Any) -> None:
    """UserError for a front end or block that looks at the whole recording; other layers say so themselves."""
    options, block = dict(encoder.frontend), encoder.block["name"]
    where, name = "config.model.frontend", options.pop("name")
    if name not in FRONTS:
        raise UserError(f"{where}.name={name!r} cannot be streamed: there are {', '.join(FRONTS)}")
    if block not in BLOCKS:
        raise UserError(f"config.model.block.name={block!r} cannot be streamed: there are {', '.join(BLOCKS)}")
    front: Any = FRONTENDS[name](**options, parent=None)
    if name == "waveform":
        if front.norm == "group":
            raise UserError(f"{where}.norm='group' normalises over the recording, which a stream cannot: use 'layer'")
        if front.normalize and statistics is None:
            raise UserError(
                f"{where}.normalize=True takes mean and deviation of the recording, which a stream does not know: give "
                "the Streamer statistics, those of the training data for example"
            )
        return
    if front.normalize == "utterance":
        raise UserError(
            f"{where}.normalize='utterance' is by the whole recording, which a stream does not know: use 'online' or "
            "'none', in training too"
        )
    how = CONVENTIONS.get(front.convention)
    if how is not None and (how.framing != "whole" or how.decades < math.inf):
        raise UserError(
            f"{where}.convention={front.convention!r} looks beyond the ends of the recording and at its loudest frame, "
            "which a stream cannot: use 'kaldi'"
        )

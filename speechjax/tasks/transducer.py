"""Transducers: transcripts without times from the frames of an encoder and the text so far.

Shapes: B batch, T frames, D width, U tokens, V classes, R durations.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.errors import UserError
from speechjax.models.encoder import Encoded
from speechjax.models.layers import fan_in_uniform, frame_mask
from speechjax.models.transducer import BLANK, TransducerNetwork
from speechjax.tasks import _ctc, _transducer_loss
from speechjax.tasks._base import Sums
from speechjax.tasks._head import Head

KINDS = ("rnnt", "tdt")


class Transducer(Head):
    """Batch of `SpeechEncoder` with transcripts -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `tokens` int32 [B, U] with `token_lengths` [B] (config.data.text): `kind` "rnnt" is the loss of Graves 2012 (arXiv
    1211.3711), "tdt" that of Xu et al. 2023 (arXiv 2304.06795), whose tokens and blanks skip as many frames as one of
    `durations` says (ascending, 1 among them; "rnnt" has no use for them).  Both in nats a token, over all tokens of
    the batch.  Rows without a transcript, crops among them, carry no loss.

    `predictor`, `predictor_width`, `predictor_depth`, `joint_width`: see `TransducerNetwork`.  `chunk` frames at a time
    meet all prefixes of the text, so memory holds `chunk` * (U + 1) * V logits of a row.  `sigma` and `fastemit`: see
    `transducer_loss`.

    `ctc_weight` adds so much of a CTC loss from the same frames by a linear layer, as in ESPnet's and icefall's
    recipes; 0: there is none.  With it come its metrics, `error_rate` of its best path among them; `ctc` in the log and
    its chance are weighted.

    `classes` counts the blank and other specials of a vocabulary, 0 leaves it to the data; id 0 is the blank.
    """

    kind: str
    classes: int
    durations: tuple[int, ...]
    predictor: str
    predictor_width: int
    predictor_depth: int
    joint_width: int
    chunk: int
    sigma: float
    fastemit: float
    ctc_weight: float

    needs = ("tokens",)

    def setup(self):
        super().setup()
        self.network = TransducerNetwork(**self._options())
        if self.ctc_weight:
            init = fan_in_uniform(self.encoder.width)
            self.ctc_head = nn.Dense(self.classes, kernel_init=init, bias_init=init, dtype=jnp.float32)

    def _durations(self) -> tuple[int, ...]:
        """Those of the loss: () for the plain transducer."""
        if self.kind not in KINDS:
            raise UserError(f"config.task.kind={self.kind!r}: choose from {', '.join(KINDS)}")
        found = tuple(self.durations)
        if self.kind == "tdt" and (1 not in found or min(found) < 0 or list(found) != sorted(set(found))):
            raise UserError(
                f"config.task.durations={found}: numbers of frames, ascending, 1 among them, as (0, 1, 2, 3)"
            )
        return found if self.kind == "tdt" else ()

    def _options(self) -> dict[str, Any]:
        return dict(
            classes=self.classes, durations=self._durations(), predictor=self.predictor, width=self.joint_width,
            predictor_width=self.predictor_width, predictor_depth=self.predictor_depth,
        )  # fmt: skip

    def detached_network(self) -> TransducerNetwork:
        """The network by itself, for decoders (speechjax.decode.transducer); its parameters are params["network"]."""
        return TransducerNetwork(**self._options(), parent=None)

    def sizes(self) -> dict[str, tuple[str, int]]:
        return {"tokens": ("config.task.classes", self.classes)}

    def score(
        self, encoded: Encoded, batch: dict[str, jax.Array], *, step: jax.Array, train: bool
    ) -> tuple[Sums, Sums]:
        """The losses, and what they are worth: chance is who says the same of every frame and prefix."""
        x, lengths = self.mix(encoded, train), encoded.lengths
        heard = lengths > 0
        # A row that could not be read still has its transcript.
        text = batch["tokens"], jnp.where(heard, batch["token_lengths"], 0)
        there, durations = text[1] > 0, self._durations()
        fitting = _transducer_loss.fits(lengths, text[1], durations)
        total = lambda x: jnp.sum(x).astype(jnp.float32)  # noqa: E731
        tokens = total(jnp.where(fitting, text[1], 0))
        loss = _transducer_loss.transducer_loss(
            *self._met(x, text[0]), lengths, *text, durations=durations, chunk=self.chunk, sigma=self.sigma,
            fastemit=self.fastemit,
        )  # fmt: skip
        chance = _transducer_loss.constant_loss(self.classes, lengths, *text, durations)
        losses, metrics = {self.kind: (jnp.sum(loss), tokens)}, {f"chance_{self.kind}": (jnp.sum(chance), tokens)}
        if self.ctc_weight:
            fitting = fitting & _ctc.fits(lengths, *text)
            more = _ctc.score(self.ctc_head(x), lengths, *text, self.ctc_weight)
            losses, metrics = losses | more[0], metrics | more[1]
        metrics["too_long_share"] = (total(there & ~fitting), total(there))
        metrics["transcribed_share"] = (total(there), total(heard))
        return losses, metrics

    def _met(self, x: jax.Array, tokens: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """What the losses begin with: the joint, frames and texts."""
        return self.network.joint(), self.network.frames(x), self.network.texts(tokens)

    def respond(self, encoded: Encoded) -> dict[str, jax.Array]:
        """What decoders need: `frames` float32 [B, T, D], `lengths` [B], and of the CTC `logits` float32 [B, T, V]."""
        x = self.mix(encoded, train=False)
        found = {"frames": x, "lengths": encoded.lengths}
        return found | {"logits": self.ctc_head(x)} if self.ctc_weight else found

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows, by frame int32 [B, T]: a token where it is emitted, -1 elsewhere.

        A transcript has no times: its tokens are in the frames where the model's own alignments have them.  What is
        recognised is the likeliest, one token a frame at most because the picture has place for one.
        """
        found = self.answer(batch)
        lengths, text = found["lengths"], (batch["tokens"], batch["token_lengths"])
        frames = _transducer_loss.token_frames(
            *self._met(found["frames"], text[0]), lengths, *text, durations=self._durations(), chunk=self.chunk
        )
        T = found["frames"].shape[1]
        here = frames[:, None] == jnp.arange(T, dtype=jnp.int32)[None, :, None]
        last = jnp.max(jnp.where(here, jnp.arange(1, frames.shape[1] + 1)[None, None], 0), axis=2)
        true = jnp.where(last > 0, jnp.take_along_axis(text[0], jnp.maximum(last - 1, 0), axis=1), -1)
        predicted = jnp.where(frame_mask(lengths, T), self._recognise(found["frames"]), -1)
        return dict(lengths=lengths, true=true.astype(jnp.int32), predicted=predicted)

    def _recognise(self, x: jax.Array) -> jax.Array:
        """The likeliest token of each frame after those before it, or -1: [B, T, D] -> int32 [B, T]."""
        frames, join = self.network.frames(x), self.network.joint()
        durations = jnp.array(self._durations() or (1,), jnp.int32)
        network, variables = self.network.unbind()

        def step(carry, frame):
            state, texts, wait = carry
            logits = join(frame, texts)
            best = jnp.argmax(logits[:, : self.classes], axis=1).astype(jnp.int32)
            spans = logits[:, self.classes :]
            span = durations[jnp.argmax(spans, axis=1)] if spans.shape[1] else jnp.ones_like(best)
            says = (wait == 0) & (best != BLANK)
            after = network.apply(variables, state, best, method="step")
            there = lambda new, old: jnp.where(says.reshape(-1, *(1,) * (new.ndim - 1)), new, old)  # noqa: E731
            state, texts = jax.tree.map(there, after, (state, texts))
            wait = jnp.where(wait == 0, jnp.maximum(span, 1), wait) - 1
            return (state, texts, wait), jnp.where(says, best, -1)

        start = network.apply(variables, x.shape[:1], method="begin")
        _, best = lax.scan(step, (*start, jnp.zeros(len(x), jnp.int32)), frames.transpose(1, 0, 2))
        return best.T

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        nothing = dict(blank_share=0.0, ctc=0.0, chance_ctc=1.0)  # without CTC there is nothing of it to fail
        found = _ctc.alarms({**nothing, **metrics}, step)
        if step >= 1000 and metrics[self.kind] > 0.98 * metrics[f"chance_{self.kind}"]:
            found["stuck_at_chance"] = (
                f"loss {metrics[self.kind]:.3f} a token is that of who does not listen, "
                f"{metrics[f'chance_{self.kind}']:.3f}: do the transcripts belong to this audio? Then check the "
                "learning rate, and try config.task.ctc_weight=0.3"
            )
        return found

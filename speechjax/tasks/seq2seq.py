"""Attention encoder-decoder: a transcript, or a translation, a token at a time, perhaps jointly with CTC.

Shapes: B batch, T frames, D width, U tokens, V classes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.decoder import TransformerDecoder, make_decoder
from speechjax.models.encoder import Encoded
from speechjax.models.layers import fan_in_uniform
from speechjax.tasks import _ctc
from speechjax.tasks._base import Sums
from speechjax.tasks._head import Head
from speechjax.tasks.language_model import Text, text_alarms


class Seq2seq(Head):
    """Batch of `SpeechEncoder` with transcripts -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    A Transformer decoder (Vaswani et al. 2017) that attends to the encoder's frames predicts each of `tokens` int32
    [B, U] with `token_lengths` [B] (config.data.text) from those before it, and the end.  Rows without a transcript,
    crops among them, carry no loss.  Speech translation is the same with other texts: config.data.text_field names
    the field of the metadata that has them.

    Losses are in nats a token and have the weights with which they are added up (multi-task learning of Watanabe et
    al. 2017): 1 - `ctc_weight` times `attention`, the cross-entropy with `label_smoothing` (Szegedy et al. 2016,
    section 7), and `ctc_weight` times `ctc`, from a linear map of the frames, over the transcripts that fit.  0: no
    CTC, which suits translation, whose order is another.  The metric `cross_entropy` has neither weight nor smoothing;
    `accuracy` is that of the next token, all before it known; `error_rate` is CTC's alone, as in the task ctc.

    `decoder` is the block of `TransformerDecoder`; `classes` counts the specials of a vocabulary, 0 leaves it to the
    data.  Raises UserError for weights out of range and packed rows.
    """

    classes: int
    decoder: Mapping[str, Any]
    label_smoothing: float
    ctc_weight: float

    needs = ("tokens",)

    def setup(self):
        super().setup()
        for name in ("ctc_weight", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"config.task.{name}={getattr(self, name)}: at least 0 and less than 1")
        self.token_decoder = self._decoder()
        if self.ctc_weight:
            init = fan_in_uniform(self.encoder.width)
            self.ctc_head = nn.Dense(self.classes, kernel_init=init, bias_init=init, dtype=jnp.float32)

    def _decoder(self, **module: Any) -> TransformerDecoder:
        return make_decoder(self.decoder, classes=self.classes, listens=True, dtype=self.encoder.dtype, **module)

    def detached_decoder(self) -> TransformerDecoder:
        """The decoder by itself, whose parameters are `token_decoder`: for searches."""
        return self._decoder(parent=None)

    def sizes(self) -> dict[str, tuple[str, int]]:
        return {"tokens": ("config.task.classes", self.classes)}

    def score(
        self, encoded: Encoded, batch: dict[str, jax.Array], *, step: jax.Array, train: bool
    ) -> tuple[Sums, Sums]:
        """Losses and metrics; see the class."""
        frames, heard = self.mix(encoded, train), encoded.lengths > 0
        # A row that could not be read still has its transcript.
        token_lengths = jnp.where(heard, batch["token_lengths"], 0)
        text = Text.of(batch["tokens"], token_lengths)
        logits = self._spell(text, frames, encoded.lengths, train)
        metrics = text.metrics(logits)
        n = metrics["cross_entropy"][1]
        share = lambda part, whole: (jnp.sum(part).astype(jnp.float32), jnp.sum(whole).astype(jnp.float32))  # noqa: E731
        metrics |= {"transcribed_share": share(token_lengths > 0, heard)}
        losses = {"attention": ((1 - self.ctc_weight) * text.surprise(logits, self.label_smoothing), n)}
        if not self.ctc_weight:
            return losses, metrics

        more = _ctc.score(self.ctc_head(frames), encoded.lengths, batch["tokens"], token_lengths, self.ctc_weight)
        return losses | more[0], metrics | more[1]

    def _spell(self, text: Text, frames: jax.Array, lengths: jax.Array, train: bool) -> jax.Array:
        """float32 [B, U + 1, V]: of every next token."""
        return self.token_decoder(text.inputs, self.token_decoder.listen(frames, lengths), train=train)

    def respond(self, encoded: Encoded) -> dict[str, jax.Array]:
        """What searches need: `frames` float32 [B, T, D] with `lengths` [B]; `logits` [B, T, V] of CTC if it is there.

        See speechjax.decode.autoregressive, and `detached_decoder`.
        """
        frames = self.mix(encoded, train=False)
        found = {"frames": frames, "lengths": encoded.lengths}
        return found | ({"logits": self.ctc_head(frames)} if self.ctc_weight else {})

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: see `Text.shown`."""
        encoded = self.encode(batch, train=False)
        text = Text.of(batch["tokens"], jnp.where(encoded.lengths > 0, batch["token_lengths"], 0))
        return text.shown(self._spell(text, self.mix(encoded, train=False), encoded.lengths, train=False))

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        return (_ctc.alarms(metrics, step) if self.ctc_weight else {}) | text_alarms(metrics, step)

"""Connectionist temporal classification: transcripts without times from the frames of an encoder.

Shapes: B batch, T frames, D width, U tokens, V classes.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.models.encoder import Encoded
from speechjax.models.layers import fan_in_uniform
from speechjax.models.recurrent import BiLSTM
from speechjax.tasks import _ctc
from speechjax.tasks._base import Sums
from speechjax.tasks._head import Head


class CTC(Head):
    """Batch of `SpeechEncoder` with transcripts -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `tokens` int32 [B, U] with `token_lengths` [B] (config.data.text; characters, SentencePiece, phonemes): the CTC loss
    (Graves et al. 2006) in nats a token, over all tokens of the batch.  Rows without a transcript, crops among them,
    carry no loss; nor do transcripts with more tokens than the row has frames, counted as `too_long_share`.
    `error_rate` is that of the best path: (substitutions + insertions + deletions) / tokens, 1 for saying nothing.

    The head is linear, on `recurrent_layers` bidirectional LSTM layers of `recurrent_width` a direction (none:
    wav2vec 2.0, section 3.3; two: SUPERB's recognition, arXiv 2105.01051), `head_dropout` after each.  `classes` counts
    the blank and other specials of a vocabulary, 0 leaves it to the data; id 0 is the blank.
    """

    classes: int
    recurrent_layers: int
    recurrent_width: int

    needs = ("tokens",)
    aligns = True

    def setup(self):
        super().setup()
        if self.recurrent_layers:
            self.recurrent = BiLSTM(self.recurrent_layers, self.recurrent_width, self.head_dropout)
        init = fan_in_uniform(2 * self.recurrent_width if self.recurrent_layers else self.encoder.width)
        self.head = nn.Dense(self.classes, kernel_init=init, bias_init=init, dtype=jnp.float32)

    def sizes(self) -> dict[str, tuple[str, int]]:
        return {"tokens": ("config.task.classes", self.classes)}

    def _logits(self, encoded: Encoded, train: bool) -> jax.Array:
        """float32 [B, T, V]."""
        x = self.mix(encoded, train)
        if self.recurrent_layers:
            x = self.recurrent(x, encoded.lengths, train)
        return self.head(x)

    def score(
        self, encoded: Encoded, batch: dict[str, jax.Array], *, step: jax.Array, train: bool
    ) -> tuple[Sums, Sums]:
        """The loss, and what it is worth: chance is who says the same of every frame."""
        logits, lengths = self._logits(encoded, train), encoded.lengths
        heard = lengths > 0
        # A row that could not be read still has its transcript.
        text = batch["tokens"], jnp.where(heard, batch["token_lengths"], 0)
        losses, metrics = _ctc.score(logits, lengths, *text)
        share = jnp.sum(text[1] > 0).astype(jnp.float32), jnp.sum(heard).astype(jnp.float32)
        metrics["transcribed_share"] = share
        return losses, metrics

    def respond(self, encoded: Encoded) -> dict[str, jax.Array]:
        """What decoders need: `logits` float32 [B, T, V] with `lengths` [B]."""
        return {"logits": self._logits(encoded, train=False), "lengths": encoded.lengths}

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows, by frame int32 [B, T]: the class, and the likeliest one; -1: none, or blank.

        A transcript has no times: its class of a frame is the likeliest by the model's own alignment.
        """
        found = self.answer(batch)
        logits, lengths = found["logits"], found["lengths"]
        true = _ctc.alignment(logits, lengths, batch["tokens"], batch["token_lengths"])
        spoken = lambda symbols: jnp.where(symbols == _ctc.BLANK, -1, symbols).astype(jnp.int32)  # noqa: E731
        return dict(lengths=lengths, true=spoken(true), predicted=spoken(jnp.argmax(logits, axis=2)))

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        return _ctc.alarms(metrics, step)

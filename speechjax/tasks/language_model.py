"""A language model of the transcripts, for decoders to weigh what they hear by; and how next tokens are scored.

Shapes: B batch, U tokens, V classes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.decoder import TransformerDecoder, make_decoder
from speechjax.models.encoder import Encoded
from speechjax.models.layers import frame_mask
from speechjax.models.quantizer import perplexity
from speechjax.tasks._base import Sums, Task

PAD, BOS, EOS = 0, 1, 2  # of every vocabulary (speechjax.data.text)


class Text(NamedTuple):
    """Transcripts for teacher forcing: `inputs` <s> and tokens, `targets` tokens and </s>, int32 [B, U + 1], of which
    those that `count` do; none of a row without a transcript.
    """

    inputs: jax.Array
    targets: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, tokens: jax.Array, lengths: jax.Array) -> "Text":
        """From `tokens` int32 [B, U] and `lengths` int32 [B]."""
        inside = frame_mask(lengths, tokens.shape[1])
        tokens = jnp.pad(jnp.where(inside, tokens, PAD), ((0, 0), (1, 1)))
        slot = jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32)[None]
        targets = jnp.where(slot == lengths[:, None], EOS, tokens[:, 1:])
        count = (slot <= lengths[:, None]) & (lengths > 0)[:, None]
        return cls(tokens[:, :-1].at[:, 0].set(BOS), targets, count)

    def surprise(self, logits: jax.Array, smoothing: float = 0.0) -> jax.Array:
        """Cross-entropy in nats, summed over what counts: float32 [B, U + 1, V] -> [].

        With label smoothing the target has 1 - `smoothing` of the probability and all V share the rest (Szegedy et
        al. 2016, section 7).
        """
        log_probs = jax.nn.log_softmax(logits)
        of_target = jnp.take_along_axis(log_probs, self.targets[..., None], axis=2)[..., 0]
        if smoothing:
            of_target = (1 - smoothing) * of_target + smoothing * jnp.mean(log_probs, axis=2)
        return -jnp.sum(jnp.where(self.count, of_target, 0))

    def metrics(self, logits: jax.Array) -> Sums:
        """How good the next tokens are, `cross_entropy` included; chance knows how frequent this batch's tokens are."""
        n = jnp.sum(self.count).astype(jnp.float32)
        guess = jnp.argmax(logits, axis=2).astype(jnp.int32)
        frequency = jnp.zeros(logits.shape[2]).at[self.targets].add(self.count.astype(jnp.float32))
        entropy = jnp.log(perplexity(frequency / jnp.maximum(n, 1)))
        return {
            "cross_entropy": (self.surprise(jax.lax.stop_gradient(logits)), n),
            "chance_cross_entropy": (entropy * n, n),
            "accuracy": (jnp.sum(self.count & (guess == self.targets)).astype(jnp.float32), n),
            "chance_accuracy": (jnp.max(frequency), n),
        }

    def shown(self, logits: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: true and likeliest token, one after the other; a text has no times."""
        guess = jnp.argmax(logits, axis=2).astype(jnp.int32)
        lengths = jnp.sum(self.count, axis=1).astype(jnp.int32)
        where = lambda x: jnp.where(self.count, x, -1)  # noqa: E731
        return dict(lengths=lengths, true=where(self.targets), predicted=where(guess))


def text_alarms(metrics: Mapping[str, float], step: int) -> dict[str, str]:
    """Known ways that learning the next token fails, {alarm: message}."""
    alarms = {}
    if metrics["transcribed_share"] < 0.25:
        alarms["untranscribed"] = (
            f"only {metrics['transcribed_share']:.0%} of the rows have a transcript, the others teach nothing; crops "
            "have none: raise config.data.crop_seconds, or take a source with more transcripts"
        )
    if step >= 1000 and metrics["cross_entropy"] > 0.98 * metrics["chance_cross_entropy"]:
        alarms["stuck_at_chance"] = (
            f"cross-entropy {metrics['cross_entropy']:.3f} a token is that of who only knows how frequent tokens are, "
            f"{metrics['chance_cross_entropy']:.3f}: lower optim.learning_rate or lengthen optim.warmup"
        )
    return alarms


class LanguageModel(Task):
    """Batch with transcripts -> ({loss: (sum, weight)}, {metric: (sum, weight)}); its audio is not used.

    The decoder of Vaswani et al. 2017 without its attention to an encoder predicts each of `tokens` int32 [B, U] with
    `token_lengths` [B] (config.data.text) from those before it, and the end: cross-entropy in nats a token, </s> among
    them.  Rows without a transcript, crops among them, carry no loss.  `perplexity` is that of a batch, averaged over
    tokens; that of all text is exp(cross_entropy).

    `decoder` is the block of `TransformerDecoder`; `classes` counts the specials of a vocabulary, 0 leaves it to the
    data.  The encoder has no parameters.  UserError for packed rows.
    """

    classes: int
    decoder: Mapping[str, Any]

    needs = ("tokens",)

    def setup(self):
        self.token_decoder = self._decoder()

    def _decoder(self, **module: Any) -> TransformerDecoder:
        return make_decoder(
            self.decoder, classes=self.classes, listens=False, dtype=self.encoder.dtype, **module
        )  # fmt: skip

    def detached_decoder(self) -> TransformerDecoder:
        """The decoder by itself, whose parameters are `token_decoder`: for decoders."""
        return self._decoder(parent=None)

    def sizes(self) -> dict[str, tuple[str, int]]:
        return {"tokens": ("config.task.classes", self.classes)}

    def features(self, batch: dict[str, jax.Array]) -> Encoded:
        """Raises UserError: there are none."""
        raise UserError("the task language_model does not listen, so it has no frames to be probed")

    def _read(self, batch, train) -> tuple[Text, jax.Array]:
        if "starts" in batch:
            raise UserError("the task language_model needs one utterance a row: set config.data.fill=False")
        text = Text.of(batch["tokens"], batch["token_lengths"])
        return text, self.token_decoder(text.inputs, None, train=train)

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        text, logits = self._read(batch, train)
        metrics = text.metrics(logits)
        _, n = metrics.pop("cross_entropy")
        surprise = text.surprise(logits)
        there = batch["token_lengths"] > 0
        planned = there | (batch["lengths"] > 0)  # the others fill up the batch
        # A run that diverges has losses beyond the range of exp in float32.
        average = jnp.minimum(surprise / jnp.maximum(n, 1), 80.0)
        metrics |= {
            "perplexity": (jnp.exp(average) * n, n),
            "transcribed_share": (jnp.sum(there).astype(jnp.float32), jnp.sum(planned).astype(jnp.float32)),
        }
        return {"cross_entropy": (surprise, n)}, metrics

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: see `Text.shown`."""
        text, logits = self._read(batch, train=False)
        return text.shown(logits)

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        return text_alarms(metrics, step)

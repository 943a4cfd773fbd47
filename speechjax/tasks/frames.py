"""Classes of single frames: phones, speech and silence, and who of several speakers is on.

Shapes: B batch, T frames, N units of a row, V units there are, S speakers.
"""

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.encoder import Encoded
from speechjax.models.layers import frame_mask
from speechjax.models.quantizer import perplexity
from speechjax.tasks import _classes
from speechjax.tasks._base import Sums
from speechjax.tasks._head import Head
from speechjax.tasks._units import frame_units


class Frames(Head):
    """Batch of `SpeechEncoder` with units -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `units` int32 [B, N] are one a `unit_hop` samples of the row, -1 for none; a frame takes the unit that begins where
    the frame does.  The scores are a linear map of the frames.

    `loss` "softmax": a unit is one of `classes`, phones (config.data.units=phones), units of a codebook (labels:DIR),
    or speech and nonspeech (speech), and costs its cross-entropy.

    `loss` "turns": bit k of a unit says whether speaker k is on (config.data.units=turns:S), so `classes` is 2^S.  An
    utterance costs the binary cross-entropy a frame and speaker of that order of the speakers which makes it least
    (Fujita et al. 2019, arXiv 1909.05952, equation 3).  `error_rate` is the diarisation error rate by frame, without a
    collar, in the same order: (missed + falsely heard + confused speakers) / speakers, 1 for saying nothing.

    Chance is the best constant guess about this batch.
    """

    classes: int
    unit_hop: int
    loss: str

    needs = ("units",)

    @property
    def packed(self) -> bool:
        """Of turns the order of the speakers is a matter of an utterance."""
        return self.loss == "softmax"

    def setup(self):
        super().setup()
        if self.loss not in ("softmax", "turns"):
            raise UserError(f"config.task.loss={self.loss!r}: choose softmax or turns")
        if self.loss == "turns" and self.classes not in (2, 4, 8, 16, 32):
            raise UserError(f"config.task.classes={self.classes}: turns of S speakers have 2^S classes, S at most 5")
        speakers = self.classes.bit_length() - 1
        self.head = _classes.linear(self.encoder.width, speakers if self.loss == "turns" else self.classes)

    def sizes(self) -> dict[str, tuple[str, int]]:
        return {"units": ("config.task.classes", self.classes)}

    def score(
        self, encoded: Encoded, batch: dict[str, jax.Array], *, step: jax.Array, train: bool
    ) -> tuple[Sums, Sums]:
        scores = self.head(self.mix(encoded, train))
        units = self._units(encoded, batch)
        losses, metrics = (score_turns if self.loss == "turns" else score_frames)(scores, units)
        inside = jnp.sum(frame_mask(encoded.lengths, units.shape[1]))
        metrics["labelled_share"] = (jnp.sum(units >= 0).astype(jnp.float32), inside.astype(jnp.float32))
        return losses, metrics

    def _units(self, encoded: Encoded, batch: dict[str, jax.Array]) -> jax.Array:
        """int32 [B, T]."""
        return frame_units(self.encoder, batch, self.unit_hop, encoded.lengths, encoded.frames.shape[1])

    def respond(self, encoded: Encoded) -> dict[str, jax.Array]:
        """`scores`, logits float32 [B, T, V] (turns: [B, T, S]), with `lengths` [B]."""
        return {"scores": self.head(self.mix(encoded, train=False)), "lengths": encoded.lengths}

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows, by frame int32 [B, T]: the unit, and the likeliest one; turns in their best order."""
        encoded = self.encode(batch, train=False)
        scores, units = self.respond(encoded)["scores"], self._units(encoded, batch)
        if self.loss == "turns":
            likeliest = to_bits(in_best_order(scores, units) > 0)
        else:
            likeliest = jnp.argmax(scores, axis=2).astype(jnp.int32)
        return dict(lengths=encoded.lengths, true=units, predicted=likeliest)

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        alarms = {}
        if metrics["labelled_share"] < 0.25:
            alarms["unlabelled"] = (
                f"only {metrics['labelled_share']:.0%} of the frames have a unit, the others teach nothing: does "
                "config.data.units fit this source?"
            )
        if step < 1000:
            return alarms
        alarms |= _classes.stuck_alarm(metrics, "frames")
        if self.loss == "softmax" and metrics["prediction_perplexity"] < 1 + 0.05 * (metrics["target_perplexity"] - 1):
            alarms["constant_prediction"] = (
                f"all frames get the same few of {metrics['target_perplexity']:.1f} units in use (perplexity "
                f"{metrics['prediction_perplexity']:.2f}): the encoder's output has collapsed; lower "
                "optim.learning_rate or lengthen optim.warmup"
            )
        return alarms


def score_frames(logits: jax.Array, units: jax.Array) -> tuple[Sums, Sums]:
    """Losses and metrics of one class a frame: [B, T, V], int32 [B, T], -1 for frames that do not count."""
    V, counts = logits.shape[2], units >= 0
    n = jnp.sum(counts).astype(jnp.float32)
    some = (n > 0).astype(jnp.float32)
    guess = jnp.where(counts, jnp.argmax(logits, axis=2).astype(jnp.int32), -1)
    frequency, guessed = (jnp.sum(jax.nn.one_hot(x, V), axis=(0, 1)) for x in (units, guess))
    target_perplexity = perplexity(frequency / jnp.maximum(n, 1))
    own = jnp.take_along_axis(logits, jnp.maximum(units, 0)[..., None], axis=2)[..., 0]
    surprise = jnp.where(counts, jax.nn.logsumexp(logits, axis=2) - own, 0)
    metrics = {
        "chance_frames": (jnp.log(target_perplexity) * n, n),
        "accuracy": (jnp.sum(counts & (guess == units)).astype(jnp.float32), n),
        "chance_accuracy": (jnp.max(frequency), n),
        "target_perplexity": (target_perplexity * some, some),
        "prediction_perplexity": (perplexity(guessed / jnp.maximum(n, 1)) * some, some),
    }
    return {"frames": (jnp.sum(surprise), n)}, metrics


# ---- turns


def to_bits(active: jax.Array) -> jax.Array:
    """bool [B, T, S] -> int32 [B, T]: bit k is speaker k."""
    order = jnp.arange(active.shape[2], dtype=jnp.int32)[None, None]
    return jnp.sum(active.astype(jnp.int32) << order, axis=2)


def from_bits(units: jax.Array, speakers: int) -> jax.Array:
    """int32 [B, T] -> float32 [B, T, S], 1 for who is on; 0 for units below 0."""
    order = jnp.arange(speakers, dtype=jnp.int32)[None, None]
    return ((jnp.maximum(units, 0)[..., None] >> order) & 1).astype(jnp.float32)


def _cost(logits: jax.Array, active: jax.Array) -> jax.Array:
    return jax.nn.softplus(logits) - active * logits


def in_best_order(logits: jax.Array, units: jax.Array) -> jax.Array:
    """Logits [B, T, S] with each row's speakers in the order in which they cost `units` int32 [B, T] least."""
    S = logits.shape[2]
    orders = jnp.array(list(itertools.permutations(range(S))), jnp.int32)
    counts = (units >= 0).astype(jnp.float32)
    # Of output i for speaker j: softplus(x) - y x, of which only the second part knows j.
    gain_BxSxS = jnp.einsum("bti,btj,bt->bij", logits, from_bits(units, S), counts)
    gain = jnp.sum(gain_BxSxS[:, orders, jnp.arange(S)[None]], axis=2)
    best = orders[jnp.argmax(gain, axis=1)]
    return jnp.take_along_axis(logits, best[:, None], axis=2)


def score_turns(logits: jax.Array, units: jax.Array) -> tuple[Sums, Sums]:
    """Losses and metrics of who is on: [B, T, S], int32 [B, T] of bits, -1 for frames that do not count."""
    S, counts = logits.shape[2], units >= 0
    n = jnp.sum(counts).astype(jnp.float32)
    over = lambda x: jnp.sum(jnp.where(counts, x, 0))  # noqa: E731
    true, ordered = from_bits(units, S), in_best_order(logits, units)
    heard = (ordered > 0).astype(jnp.float32)
    speaking, guessed, right = (jnp.sum(x, axis=2) for x in (true, heard, true * heard))
    rate = over(speaking) / jnp.maximum(n * S, 1)
    tiny = jnp.finfo(jnp.float32).tiny
    entropy = -sum(p * jnp.log(jnp.maximum(p, tiny)) for p in (rate, 1 - rate))
    metrics = {
        "chance_frames": (entropy * n, n),
        "error_rate": (over(jnp.maximum(speaking, guessed) - right), over(speaking)),
        "speakers_a_frame": (over(speaking), n),
        "heard_a_frame": (over(guessed), n),
    }
    return {"frames": (over(jnp.mean(_cost(ordered, true), axis=2)), n)}, metrics

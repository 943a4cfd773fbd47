"""Supervised phone recognition, an upper bound for what learns without labels: by transcripts (CTC) or by frame.

Shapes: B batch, S samples, T frames, N units of a row, U tokens, V classes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.layers import fan_in_uniform, frame_mask
from speechjax.models.masking import span_mask
from speechjax.models.quantizer import perplexity
from speechjax.tasks import _ctc
from speechjax.tasks._base import Sums, Task
from speechjax.tasks._units import frame_units

NEEDS = {"ctc": ("tokens",), "frames": ("units",)}


class Phones(Task):
    """Batch of `SpeechEncoder` with phones -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `mode` "ctc" learns from transcripts, `tokens` int32 [B, U] with `token_lengths` [B] (config.data.text; phonemes,
    or characters): the CTC loss in nats a token, over all tokens of the batch.  Rows without a transcript, crops among
    them, carry no loss; nor do transcripts with more tokens than the row has frames, counted as `too_long_share`.
    `error_rate` is that of the best path: (substitutions + insertions + deletions) / tokens, 1 for saying nothing.
    Rows hold one utterance: UserError for packed ones.

    `mode` "frames" learns from `units` int32 [B, N], one a `unit_hop` samples of the row, -1 for none
    (config.data.units=phones): cross-entropy a labelled frame.  A frame takes the unit that begins where the frame
    does, as HuBERT's do; packed rows are welcome.

    In training spans of `mask_span` frames, `mask_prob` of all, are hidden from the encoder (as in SpecAugment, but in
    its input; 0: none).  `classes` counts the blank and other specials of a vocabulary in "ctc"; id 0 is the blank.
    """

    mode: str
    classes: int
    unit_hop: int
    mask_prob: float
    mask_span: int

    def setup(self):
        if self.mode not in NEEDS:
            raise UserError(f"config.task.mode={self.mode!r}: choose from {', '.join(NEEDS)}")
        init = fan_in_uniform(self.encoder.width)
        self.head = nn.Dense(self.classes, kernel_init=init, bias_init=init, dtype=jnp.float32)

    @property
    def needs(self) -> tuple[str, ...]:
        return NEEDS.get(self.mode, ())

    def sizes(self) -> dict[str, tuple[str, int]]:
        return {key: ("config.task.classes", self.classes) for key in self.needs}

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        logits, lengths = self._logits(batch, train)
        score = self._score_transcripts if self.mode == "ctc" else self._score_frames
        return score(batch, logits, lengths)

    def _logits(self, batch, train) -> tuple[jax.Array, jax.Array]:
        """float32 [B, T, V] and lengths."""
        if self.mode == "ctc" and "starts" in batch:
            raise UserError("config.task.mode='ctc' needs one utterance a row: set config.data.fill=False")
        features, lengths = self.encoder.extract(batch)
        mask = None
        if train and self.mask_prob:
            spans: dict[str, Any] = dict(prob=self.mask_prob, span=self.mask_span, min_spans=0)
            mask = span_mask(self.make_rng("mask"), lengths, features.shape[1], **spans)
        encoded = self.encoder.contextualize(self.encoder.feature_norm(features), lengths, mask=mask, train=train)
        return self.head(encoded.frames.astype(jnp.float32)), encoded.lengths

    def _score_transcripts(self, batch, logits, lengths) -> tuple[Sums, Sums]:
        heard = lengths > 0
        # A row that could not be read still has its transcript.
        text = batch["tokens"], jnp.where(heard, batch["token_lengths"], 0)
        there, fitting = text[1] > 0, _ctc.fits(lengths, *text)
        frames = frame_mask(lengths, logits.shape[1]) & there[:, None]
        blank = frames & (jnp.argmax(logits, axis=2) == _ctc.BLANK)
        total = lambda x: jnp.sum(x).astype(jnp.float32)  # noqa: E731
        tokens = total(jnp.where(fitting, text[1], 0))
        fixed = jax.lax.stop_gradient(logits)
        losses = {"ctc": (jnp.sum(_ctc.ctc_loss(logits, lengths, *text)), tokens)}
        metrics = {
            "chance_ctc": (jnp.sum(_ctc.constant_loss(self.classes, logits.shape[1], lengths, *text)), tokens),
            "error_rate": (total(jnp.where(there, _ctc.greedy_errors(fixed, lengths, *text), 0)), total(text[1])),
            "blank_share": (total(blank), total(frames)),
            "too_long_share": (total(there & ~fitting), total(there)),
            "transcribed_share": (total(there), total(heard)),
        }
        return losses, metrics

    def _score_frames(self, batch, logits, lengths) -> tuple[Sums, Sums]:
        """Chance is what the best constant guess about this batch achieves."""
        units = frame_units(self.encoder, batch, self.unit_hop, lengths, logits.shape[1])
        counts = units >= 0
        n = jnp.sum(counts).astype(jnp.float32)
        some = (n > 0).astype(jnp.float32)
        guess = jnp.where(counts, jnp.argmax(logits, axis=2).astype(jnp.int32), -1)
        frequency, guessed = (jnp.sum(jax.nn.one_hot(x, self.classes), axis=(0, 1)) for x in (units, guess))
        target_perplexity = perplexity(frequency / jnp.maximum(n, 1))
        of_unit = jnp.take_along_axis(logits, jnp.maximum(units, 0)[..., None], axis=2)[..., 0]
        surprise = jnp.where(counts, jax.nn.logsumexp(logits, axis=2) - of_unit, 0)
        inside = jnp.sum(frame_mask(lengths, logits.shape[1])).astype(jnp.float32)
        losses = {"frames": (jnp.sum(surprise), n)}
        metrics = {
            "chance_frames": (jnp.log(target_perplexity) * n, n),
            "accuracy": (jnp.sum(counts & (guess == units)).astype(jnp.float32), n),
            "chance_accuracy": (jnp.max(frequency), n),
            "target_perplexity": (target_perplexity * some, some),
            "prediction_perplexity": (perplexity(guessed / jnp.maximum(n, 1)) * some, some),
            "labelled_share": (n, inside),
        }
        return losses, metrics

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows, by frame int32 [B, T]: the class, and the likeliest one; -1: none, or blank.

        A transcript has no times: its class of a frame is the likeliest by the model's own alignment.
        """
        logits, lengths = self._logits(batch, train=False)
        predicted = jnp.argmax(logits, axis=2).astype(jnp.int32)
        if self.mode == "frames":
            true = frame_units(self.encoder, batch, self.unit_hop, lengths, logits.shape[1])
            return dict(lengths=lengths, true=true, predicted=predicted)
        true = _ctc.alignment(logits, lengths, batch["tokens"], batch["token_lengths"])
        spoken = lambda symbols: jnp.where(symbols == _ctc.BLANK, -1, symbols)  # noqa: E731
        return dict(lengths=lengths, true=spoken(true), predicted=spoken(predicted))

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        return _ctc.alarms(metrics, step) if self.mode == "ctc" else _frame_alarms(metrics, step)


def _frame_alarms(metrics: Mapping[str, float], step: int) -> dict[str, str]:
    alarms = {}
    if metrics["labelled_share"] < 0.25:
        alarms["unlabelled"] = (
            f"only {metrics['labelled_share']:.0%} of the frames have a phone, the others teach nothing: take a source "
            "whose recordings have phones with times, or config.task.mode=ctc"
        )
    if step >= 1000:
        true, guessed = metrics["target_perplexity"], metrics["prediction_perplexity"]
        if guessed < 1 + 0.05 * (true - 1):
            alarms["constant_prediction"] = (
                f"all frames get the same few of {true:.0f} phones in use (perplexity {guessed:.1f}): the encoder's "
                "output has collapsed; lower optim.learning_rate or lengthen optim.warmup"
            )
        if metrics["frames"] > 0.98 * metrics["chance_frames"]:
            alarms["stuck_at_chance"] = (
                f"loss {metrics['frames']:.3f} is no better than a constant guess, {metrics['chance_frames']:.3f}: do "
                "the phones belong to this audio? Then check the learning rate"
            )
    return alarms

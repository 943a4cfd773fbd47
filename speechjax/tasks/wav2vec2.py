"""wav2vec 2.0 (Baevski et al. 2020, arXiv 2006.11477): contrastive prediction of quantized masked features.

Shapes: B batch, T frames, M masked slots, K negatives, G codebooks, V codes, C feature channels, P projection.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.models.layers import frame_mask, scale_gradient
from speechjax.models.masking import max_masked, sample_negatives, span_mask
from speechjax.models.quantizer import GumbelQuantizer
from speechjax.tasks._base import Sums, Task
from speechjax.tasks._contrastive import (
    EXCLUDED,
    Slots,
    code_id,
    codebook_perplexity,
    contrast,
    gumbel_temperature,
    projection,
)


class Wav2Vec2(Task):
    """Batch of `SpeechEncoder`, packed or not -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    Every segment of a packed row is an utterance of its own: masks, negatives and context stay inside.  Sums run
    over the whole global batch, so the loop's one division is by the global masked count (section 3.2, and the
    published training code).  Randomness: streams `mask`, `gumbel`, `dropout`, `layerdrop`.
    """

    mask_prob: float
    mask_span: int
    negatives: int
    logit_temperature: float
    codebooks: int
    codes: int
    code_dim: int
    projection: int
    gumbel_start: float
    gumbel_floor: float
    gumbel_decay: float
    diversity: float
    feature_penalty: float
    feature_grad_scale: float
    feature_dropout: float

    rngs = ("dropout", "gumbel", "layerdrop", "mask")

    def setup(self):
        self.quantizer = GumbelQuantizer(self.codebooks, self.codes, self.code_dim)
        self.project_context = projection(self.projection, self.encoder.width)
        self.project_target = projection(self.projection, self.code_dim)
        self.feature_drop = nn.Dropout(self.feature_dropout)

    def gumbel_temperature(self, step: jax.Array) -> jax.Array:
        return gumbel_temperature(step, self.gumbel_start, self.gumbel_floor, self.gumbel_decay)

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        out = self._contrast(batch, step, train)
        slots, found = out["slots"], out["contrast"]
        n = jnp.sum(slots.valid).astype(jnp.float32)
        total = self.codebooks * self.codes
        prob_perplexity = codebook_perplexity(out["probs"], slots.valid)
        code_perplexity = codebook_perplexity(jax.nn.one_hot(out["codes"], self.codes), slots.valid)
        diversity = (total - prob_perplexity) / total

        losses = {
            "contrastive": (slots.sum(found.loss), n),
            "diversity": (self.diversity * diversity * n, n),
            "feature_penalty": (self.feature_penalty * out["energy"] * n, n),
        }
        one = jnp.ones(())
        metrics = {
            **found.metrics(slots),
            "code_perplexity": (code_perplexity, one),
            "prob_perplexity": (prob_perplexity, one),
            "gumbel_temperature": (self.gumbel_temperature(step), one),
            "masked_share": (n, out["frames"]),
        }
        return losses, metrics

    def _contrast(self, batch, step, train) -> dict[str, Any]:
        """Everything the loss, the metrics and the pictures are made of, by masked slot [B, M]."""
        features, lengths = self.encoder.extract(batch)
        features = scale_gradient(features, self.feature_grad_scale)
        T, C = features.shape[1:]
        frames = jnp.sum(frame_mask(lengths, T)).astype(jnp.float32)
        energy = jnp.sum(jnp.square(features.astype(jnp.float32))) / (jnp.maximum(frames, 1) * C)  # padding is zero
        features = self.encoder.feature_norm(features)

        mask_key, negative_key = jax.random.split(self.make_rng("mask"))
        masking: dict[str, Any] = dict(prob=self.mask_prob, span=self.mask_span)
        segments = batch["starts"].shape[1] if "starts" in batch else 1
        mask = span_mask(mask_key, lengths, T, **masking)
        slots = Slots.of(mask, lengths, max_masked(T, segments=segments, **masking))

        # Targets see the unmasked features; only masked frames are quantized.
        targets = self.feature_drop(slots.take(features), deterministic=not train)
        quantized = self.quantizer(targets, self.gumbel_temperature(step), train=train)
        context = self.encoder.contextualize(features, lengths, mask=mask, train=train)
        code = code_id(quantized.codes, self.codes)
        found = contrast(
            self.project_context(slots.take(context.frames).astype(jnp.float32)),
            self.project_target(quantized.vectors), code, slots,
            sample_negatives(negative_key, slots.peers, self.negatives), self.logit_temperature,
        )  # fmt: skip
        return dict(
            slots=slots, contrast=found, lengths=lengths, frames=frames, energy=energy, codes=quantized.codes,
            code=code, probs=quantized.probs,
        )  # fmt: skip

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows, by frame [B, T]: mask, true and predicted code ids (-1 where not masked).

        The predicted code is that of the most similar target among all masked frames of the utterance.
        """
        out = self._contrast(batch, step, train=False)
        slots, code = out["slots"], out["code"]
        similar = jnp.where(slots.peers, out["contrast"].similar, EXCLUDED)
        predicted = jnp.take_along_axis(code, jnp.argmax(similar, axis=2), axis=1)
        return dict(
            mask=slots.mask, lengths=out["lengths"], true=slots.to_frames(code), predicted=slots.to_frames(predicted)
        )

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        alarms = {}
        total = self.codebooks * self.codes
        if metrics["code_perplexity"] < max(1.5 * self.codebooks, 0.02 * total):
            alarms["codebook_collapse"] = (
                f"code perplexity {metrics['code_perplexity']:.1f} of {total}: the codebook has collapsed; "
                "raise task.diversity, lower optim.learning_rate, or lengthen optim.warmup"
            )
        if step >= 1000 and metrics["contrastive"] > 0.98 * metrics["chance_contrastive"]:
            alarms["stuck_at_chance"] = (
                f"contrastive loss {metrics['contrastive']:.3f} is at its chance level "
                f"{metrics['chance_contrastive']:.3f}: nothing learnt yet; check the audio, then the learning rate"
            )
        if metrics["accuracy"] > 0.98 and metrics["chance_contrastive"] < 0.5 * math.log1p(self.negatives):
            alarms["shortcut"] = (
                "nearly all frames share their codes, so the task has become trivial: this is collapse, not success"
            )
        return alarms

"""Supervised classification of whole utterances: speakers, languages, words, or kinds of sound.

Shapes: B batch, T frames, D width, L layers, V classes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.layers import fan_in_uniform
from speechjax.models.masking import span_mask
from speechjax.models.pooling import AttentiveStatistics, mean_pool
from speechjax.tasks import _classes
from speechjax.tasks._base import Sums, Task


class Sounds(Task):
    """Batch of `SpeechEncoder` with labels -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `label` int32 [B] is the class of a row, -1 for none (config.data.label); those without carry no loss.  Frames
    become a vector by `pooling`, "mean" or "attention" (mean and deviation, weighted by a layer of `pooling_hidden`
    units), the vector logits by a linear map; the loss is the cross-entropy a labelled row.  With `layer_sum` the
    frames are a learned average of all layers' outputs (as in SUPERB, arXiv 2105.01051), not those of the last.

    In training spans of `mask_span` frames, `mask_prob` of all, are hidden from the encoder (0: none).

    A batch holds few labels of many, so its own most frequent one would be a flattering chance level.  Here chance is
    what the labels of all batches before are worth as a guess: their counts are the collection "prior".  UserError for
    packed rows.
    """

    classes: int
    pooling: str
    pooling_hidden: int
    layer_sum: bool
    mask_prob: float
    mask_span: int

    needs = ("label",)

    def setup(self):
        if self.pooling not in ("mean", "attention"):
            raise UserError(f"config.task.pooling={self.pooling!r}: choose mean or attention")
        attends = self.pooling == "attention"
        if attends:
            self.statistics = AttentiveStatistics(self.pooling_hidden)
        init = fan_in_uniform(self.encoder.width * (1 + attends))
        self.head = nn.Dense(self.classes, kernel_init=init, bias_init=init, dtype=jnp.float32)
        if self.layer_sum:
            self.layer_weights = self.param("layer_weights", nn.initializers.zeros, (self.encoder.layers + 1,))
        self.seen = self.variable("prior", "counts", lambda: jnp.zeros(self.classes, jnp.int32))

    def sizes(self) -> dict[str, tuple[str, int]]:
        return {"label": ("config.task.classes", self.classes)}

    def _logits(self, batch, train) -> tuple[jax.Array, jax.Array, int]:
        """float32 [B, V], lengths [B], T."""
        if "starts" in batch:
            raise UserError("the task sounds needs one utterance a row: set config.data.fill=False")
        features, lengths = self.encoder.extract(batch)
        T, mask = features.shape[1], None
        if train and self.mask_prob:
            spans: dict[str, Any] = dict(prob=self.mask_prob, span=self.mask_span, min_spans=0)
            mask = span_mask(self.make_rng("mask"), lengths, T, **spans)
        features = self.encoder.feature_norm(features)
        encoded = self.encoder.contextualize(features, lengths, mask=mask, train=train, hidden=self.layer_sum)
        frames = encoded.frames.astype(jnp.float32)
        if self.layer_sum:
            weights = jax.nn.softmax(self.layer_weights)
            frames = jnp.einsum("l,lbtd->btd", weights, jnp.stack(encoded.hidden).astype(jnp.float32))
        pooled = self.statistics(frames, lengths) if self.pooling == "attention" else mean_pool(frames, lengths)
        return self.head(pooled), lengths, T

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        logits, lengths, _ = self._logits(batch, train)
        label, seen = jnp.where(lengths > 0, batch["label"], -1), self.seen.value
        metrics = _classes.class_metrics(self, logits, label, lengths, seen)
        n = metrics["accuracy"][1]
        surprise = jax.nn.logsumexp(logits, axis=1) - _classes.at_label(logits, label)
        chance = -_classes.log_prior(seen)[jnp.maximum(label, 0)]
        losses = {"classification": (_classes.over_labelled(label, surprise), n)}
        return losses, {"chance_classification": (_classes.over_labelled(label, chance), n), **metrics}

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """The labels of this batch are known from now on."""
        return _classes.count_labels(extra, sums)

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: class and likeliest class of the utterance, at each of its frames [B, T]."""
        logits, lengths, T = self._logits(batch, train=False)
        true, predicted = (_classes.spread(x, lengths, T) for x in (batch["label"], jnp.argmax(logits, axis=1)))
        return dict(lengths=lengths, true=true, predicted=predicted)

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        return _classes.class_alarms(metrics, step, "classification")

"""Classes of whole utterances: keywords, intents, emotions, languages, accents, kinds of sound.

Shapes: B batch, T frames, V classes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.encoder import Encoded
from speechjax.models.layers import frame_mask
from speechjax.tasks import _classes
from speechjax.tasks._base import Sums, sow_sum


class Classify(_classes.ClassHead):
    """Batch of `SpeechEncoder` with labels -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    With `loss` "softmax" an utterance has one class, int32 [B], -1 for none (config.data.label=meta: or id:), and costs
    its cross-entropy.  With "sigmoid" it has any number of tags, float32 [B, V] of ones and zeros, a row of -1 where
    they are unknown (tags:), and costs the mean binary cross-entropy over the tags.  The scores are a linear map of the
    pooled frames (`PooledHead`).

    Targets are smoothed by `label_smoothing`: that share goes to all classes alike (Szegedy et al. 2016, arXiv
    1512.00567, section 7).  With `class_weights` "balanced" every class weighs as much as any other: an utterance
    counts as 1 / how often its class has been seen, and a tag and its absence count by halves; "none" leaves them as
    frequent as they are.  Chance is the best constant guess under the same weights and smoothing, by all labels of the
    batches before.
    """

    loss: str
    label_smoothing: float
    class_weights: str

    def setup(self):
        super().setup()
        for name, choices in (("loss", ("softmax", "sigmoid")), ("class_weights", ("none", "balanced"))):
            if getattr(self, name) not in choices:
                raise UserError(f"config.task.{name}={getattr(self, name)!r}: choose from {', '.join(choices)}")
        self.head = _classes.linear(self.pooled_width, self.classes)
        if self.loss == "sigmoid":
            self.rows_seen = self.variable("prior", "rows", lambda: jnp.zeros((), jnp.int32))

    def score(
        self, encoded: Encoded, batch: dict[str, jax.Array], *, step: jax.Array, train: bool
    ) -> tuple[Sums, Sums]:
        logits = self.head(self.pool(encoded, train))
        score = self._score_classes if self.loss == "softmax" else self._score_tags
        return score(logits, encoded, batch)

    def _score_classes(self, logits: jax.Array, encoded: Encoded, batch) -> tuple[Sums, Sums]:
        label, seen = self.known(encoded, batch), self.seen.value
        guess, weight = _classes.log_prior(seen), jnp.ones(self.classes)
        if self.class_weights == "balanced":
            weight = jnp.exp(-guess) / self.classes
            # Classes that never occur cost a constant guess nothing.
            guess = jax.nn.log_softmax(jnp.where(seen > 0, 0.0, guess))
        weight = weight[jnp.maximum(label, 0)]
        constant = jnp.log((1 - self.label_smoothing) * jnp.exp(guess) + self.label_smoothing / self.classes)
        total = _classes.over_labelled(label, weight)
        loss = _classes.over_labelled(label, weight * self._surprise(logits, label))
        chance = _classes.over_labelled(
            label, weight * self._surprise(jnp.broadcast_to(constant[None], logits.shape), label)
        )
        metrics = _classes.class_metrics(self, logits, label, encoded.lengths, seen)
        return {"classification": (loss, total)}, {"chance_classification": (chance, total), **metrics}

    def _surprise(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        """Cross-entropy with smoothed targets, [B]."""
        log = jax.nn.log_softmax(logits)
        return -(1 - self.label_smoothing) * _classes.at_label(log, label) - self.label_smoothing * jnp.mean(
            log, axis=1
        )

    def _score_tags(self, logits: jax.Array, encoded: Encoded, batch) -> tuple[Sums, Sums]:
        tags = self.target(batch, "tags")
        logits = logits[:, : tags.shape[1]]  # the model may have room for more than occur
        there = (encoded.lengths > 0) & jnp.all(tags >= 0, axis=1)
        tags = jnp.where(there[:, None], tags, 0)
        share = (self.seen.value[: tags.shape[1]].astype(jnp.float32) + 1) / (
            self.rows_seen.value.astype(jnp.float32) + 2
        )
        guess = share = jnp.broadcast_to(share[None], tags.shape)
        weight = jnp.ones_like(tags)
        if self.class_weights == "balanced":
            weight, guess = 0.5 * (tags / share + (1 - tags) / (1 - share)), jnp.full_like(share, 0.5)
        wanted = (1 - self.label_smoothing) * tags + 0.5 * self.label_smoothing
        constant = (1 - self.label_smoothing) * guess + 0.5 * self.label_smoothing
        over = lambda x: jnp.sum(jnp.where(there[:, None], x.astype(jnp.float32), 0))  # noqa: E731
        cost = lambda x: over(weight * (jax.nn.softplus(x) - wanted * x))  # noqa: E731
        rows, total = jnp.sum(there).astype(jnp.float32), over(weight)
        unused = self.classes - tags.shape[1]
        sow_sum(self, "labels", jnp.pad(jnp.sum(tags, axis=0), (0, unused)))
        sow_sum(self, "rows", rows)
        metrics = {
            "chance_classification": (cost(jnp.log(constant) - jnp.log1p(-constant)), total),
            "accuracy": (over((logits > 0) == (tags > 0)), over(jnp.ones_like(tags))),
            "chance_accuracy": (over((share > 0.5) == (tags > 0)), over(jnp.ones_like(tags))),
            "tags_a_row": (over(tags), rows),
            "predicted_tags_a_row": (over(logits > 0), rows),
            "labelled_share": (rows, jnp.sum(encoded.lengths > 0).astype(jnp.float32)),
        }
        return {"classification": (cost(logits), total)}, metrics

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """The labels of this batch are known from now on."""
        extra = super().after_step(params, extra, sums, step)
        if self.loss == "softmax":
            return extra
        rows = extra["prior"]["rows"] + jnp.rint(sums["rows"]).astype(jnp.int32)
        return {**extra, "prior": {**extra["prior"], "rows": rows}}

    def respond(self, encoded: Encoded) -> dict[str, jax.Array]:
        """`scores`, the logits float32 [B, V]."""
        return {"scores": self.head(self.pool(encoded, train=False))}

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows at each frame of the utterance: class and likeliest class, or tags and their chances."""
        encoded = self.encode(batch, train=False)
        scores, lengths, T = self.respond(encoded)["scores"], encoded.lengths, encoded.frames.shape[1]
        if self.loss == "softmax":
            true, predicted = (_classes.spread(x, lengths, T) for x in (batch[self.label], jnp.argmax(scores, axis=1)))
            return dict(lengths=lengths, true=true, predicted=predicted)
        tags = jnp.maximum(batch[self.label], 0)
        valid = frame_mask(lengths, T)[..., None]
        at_frames = lambda x: jnp.where(valid, x[:, None], 0)  # noqa: E731
        return dict(
            lengths=lengths, target=at_frames(tags), output=at_frames(jax.nn.sigmoid(scores[:, : tags.shape[1]]))
        )

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        if self.loss == "softmax":
            return _classes.class_alarms(metrics, step, "classification")
        alarms = _classes.unlabelled_alarm(metrics)
        if step >= 1000:
            alarms |= _classes.stuck_alarm(metrics, "classification")
            true, guessed = metrics["tags_a_row"], metrics["predicted_tags_a_row"]
            if guessed < 0.05 * true:
                alarms["no_tags"] = (
                    f"of {true:.2f} tags a row {guessed:.2f} are found: rare ones are never the likelier answer; set "
                    "config.task.class_weights=balanced, or read the scores instead of decisions"
                )
        return alarms

"""HuBERT (Hsu et al. 2021, arXiv 2106.07447): prediction of the discrete units of masked frames.

Shapes: B batch, S samples, T frames, M masked slots, N units of a row, V codes, C feature channels, P projection.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.layers import frame_mask, scale_gradient
from speechjax.models.masking import masked_slots, max_masked, span_mask
from speechjax.models.quantizer import perplexity
from speechjax.tasks._base import Sums, Task
from speechjax.tasks._contrastive import projection, unit
from speechjax.tasks._units import frame_units


class Hubert(Task):
    """Batch of `SpeechEncoder` with units, packed or not -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `units` int32 [B, N] hold one of `codes` for every `unit_hop` samples of a row, -1 for none.  A frame takes the
    unit that begins where the frame does, as the published code: of labels at 100 Hz every second one.  Frames
    without a unit are masked as others, but carry no loss.

    The losses are cross-entropies over cosines / `logit_temperature` (section II-C), "masked" on masked frames and
    "unmasked" on the others, each its weight times a mean over all its frames of the global batch.  (The paper adds
    the two sums first; with the published weights, 1 and 0, that is the same.)  Raises UserError for units at another
    rate than `unit_hop`.
    """

    codes: int
    unit_hop: int
    projection: int
    logit_temperature: float
    mask_prob: float
    mask_span: int
    masked_weight: float
    unmasked_weight: float
    feature_penalty: float
    feature_grad_scale: float

    needs = ("units",)

    def setup(self):
        if min(self.masked_weight, self.unmasked_weight) < 0 or self.masked_weight + self.unmasked_weight == 0:
            raise UserError(
                f"config.task: masked_weight={self.masked_weight} and unmasked_weight={self.unmasked_weight}: one must "
                "be above 0 and none below"
            )
        self.project = projection(self.projection, self.encoder.width)
        # As published.  All cosines begin near 3/4, so at first every frame has nearly the same logits.
        self.code_vectors = self.param("code_vectors", nn.initializers.uniform(1.0), (self.codes, self.projection))

    def sizes(self) -> dict[str, tuple[str, int]]:
        return {"units": ("config.task.codes", self.codes)}

    def heard(self, batch: dict[str, jax.Array], *, train: bool) -> dict[str, jax.Array]:
        """The batch as the encoder hears it; the units stay those of `batch`."""
        return batch

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        out = self._hide(batch, train)
        at_slots = lambda x: jnp.take_along_axis(x, out["positions"], axis=1)  # noqa: E731
        targets = jnp.where(out["valid"], at_slots(out["units"]), -1)
        losses, metrics = self._score(self._logits(out["masked_frames"]), targets, "masked")
        if self.unmasked_weight:
            rest = jnp.where(out["mask"], -1, out["units"])
            more_losses, more_metrics = self._score(self._logits(out["frames"]), rest, "unmasked")
            losses, metrics = losses | more_losses, metrics | more_metrics

        n = metrics["accuracy"][1]
        if self.feature_penalty:
            over = n if self.masked_weight else metrics["accuracy_unmasked"][1]
            losses["feature_penalty"] = (self.feature_penalty * out["energy"] * over, over)
        masked = jnp.sum(out["valid"]).astype(jnp.float32)
        metrics |= {"masked_share": (masked, out["count"]), "labelled_share": (n, masked)}
        return losses, metrics

    def _hide(self, batch, train) -> dict[str, jax.Array]:
        """Encodes the masked batch: what losses and pictures are made of, by frame [B, T] and masked slot [B, M]."""
        features, lengths = self.encoder.extract(self.heard(batch, train=train))
        features = scale_gradient(features, self.feature_grad_scale)
        T, C = features.shape[1:]
        count = jnp.sum(frame_mask(lengths, T)).astype(jnp.float32)
        energy = jnp.sum(jnp.square(features.astype(jnp.float32))) / (jnp.maximum(count, 1) * C)  # padding is zero
        masking: dict[str, Any] = dict(prob=self.mask_prob, span=self.mask_span)
        mask = span_mask(self.make_rng("mask"), lengths, T, **masking)
        segments = batch["starts"].shape[1] if "starts" in batch else 1
        positions, valid = masked_slots(mask, max_masked(T, segments=segments, **masking))
        features = self.encoder.feature_norm(features)
        frames = self.encoder.contextualize(features, lengths, mask=mask, train=train).frames
        units = frame_units(self.encoder, batch, self.unit_hop, lengths, T)
        return dict(
            mask=mask, lengths=lengths, count=count, energy=energy, positions=positions, valid=valid, units=units,
            frames=frames, masked_frames=jnp.take_along_axis(frames, positions[..., None], axis=1),
        )  # fmt: skip

    def _logits(self, frames: jax.Array) -> jax.Array:
        """Cosines with all codes over the temperature: [B, T, D] -> float32 [B, T, V]."""
        vectors = unit(self.project(frames.astype(jnp.float32)))
        return jnp.einsum("btp,vp->btv", vectors, unit(self.code_vectors)) / self.logit_temperature

    def _score(self, logits: jax.Array, targets: jax.Array, name: str) -> tuple[Sums, Sums]:
        """Loss `name`, if it has a weight, and its metrics: [B, T, V], [B, T] with -1 for frames that do not count.

        Chance is what the best constant guess about this batch achieves: its most frequent unit, and the entropy of
        its units.
        """
        counts = targets >= 0
        n = jnp.sum(counts).astype(jnp.float32)
        over = lambda x: jnp.sum(jnp.where(counts, x, 0))  # noqa: E731
        of_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=2)[..., 0]
        guess = jnp.argmax(logits, axis=2).astype(jnp.int32)
        frequency = _frequency(targets, self.codes)
        target_perplexity = perplexity(frequency / jnp.maximum(n, 1))
        guess_perplexity = perplexity(_frequency(jnp.where(counts, guess, -1), self.codes) / jnp.maximum(n, 1))
        some = (n > 0).astype(jnp.float32)

        weight = self.masked_weight if name == "masked" else self.unmasked_weight
        losses: Sums = {}
        tail = "" if name == "masked" else f"_{name}"
        metrics: Sums = {
            f"accuracy{tail}": (over((guess == targets).astype(jnp.float32)), n),
            f"chance_accuracy{tail}": (jnp.max(frequency), n),
            f"target_perplexity{tail}": (target_perplexity * some, some),
            f"prediction_perplexity{tail}": (guess_perplexity * some, some),
        }
        if weight:
            losses[name] = (weight * over(jax.nn.logsumexp(logits, axis=2) - of_target), n)
            metrics[f"chance_{name}"] = (weight * jnp.log(target_perplexity) * n, n)
        return losses, metrics

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows, by frame [B, T]: mask, units, and where masked the likeliest unit (else -1)."""
        out = self._hide(batch, train=False)
        guess = jnp.argmax(self._logits(out["frames"]), axis=2).astype(jnp.int32)
        predicted = jnp.where(out["mask"], guess, -1)
        return dict(mask=out["mask"], lengths=out["lengths"], true=out["units"], predicted=predicted)

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        alarms = {}
        tail, name = ("", "masked") if self.masked_weight else ("_unmasked", "unmasked")
        true, guessed = metrics[f"target_perplexity{tail}"], metrics[f"prediction_perplexity{tail}"]
        if metrics["labelled_share"] < 0.5:
            alarms["unlabelled"] = (
                f"only {metrics['labelled_share']:.0%} of the masked frames have a unit, the others teach nothing: are "
                "config.data.units the labels of this data?"
            )
        if true < max(1.5, 0.02 * self.codes):
            alarms["units_collapsed"] = (
                f"the units of a batch have a perplexity of {true:.1f} of {self.codes}: nearly all frames are one "
                "cluster, so there is nothing to learn; look at the labels' report and cluster other features"
            )
        elif step >= 1000:  # before, guessing the most frequent unit is a stage every run goes through
            if guessed < max(1.5, 0.02 * true):
                alarms["constant_prediction"] = (
                    f"all frames get the same few of {true:.0f} units in use (perplexity {guessed:.1f}): the encoder's "
                    "output has collapsed; lower optim.learning_rate or lengthen optim.warmup"
                )
            # Both: a small batch has an entropy below its corpus', so the loss alone would ask too much.
            no_better = metrics[f"accuracy{tail}"] < 1.1 * metrics[f"chance_accuracy{tail}"]
            if no_better and metrics[name] > 0.98 * metrics[f"chance_{name}"]:
                alarms["stuck_at_chance"] = (
                    f"{name} loss {metrics[name]:.3f} is no better than a constant guess, "
                    f"{metrics[f'chance_{name}']:.3f}: check that config.data.units belong to this audio and that "
                    "task.unit_hop is theirs, then the learning rate"
                )
        return alarms


def _frequency(codes: jax.Array, total: int) -> jax.Array:
    """How often each code occurs, negative ones aside: int32 [B, T] -> float32 [V]."""
    # XLA compares and sums in one loop; a histogram by scatter is slow on accelerators.
    return jnp.sum(
        (codes[..., None] == jnp.arange(total, dtype=jnp.int32)[None, None]).astype(jnp.float32), axis=(0, 1)
    )

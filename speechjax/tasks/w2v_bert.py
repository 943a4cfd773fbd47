"""w2v-BERT (Chung et al. 2021, arXiv 2108.06209): contrastive learning of codes, masked prediction of those codes.

Shapes: B batch, T frames, M masked slots, K negatives, V codes, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.layers import LayerNorm, frame_mask
from speechjax.models.masking import max_masked, sample_negatives, span_mask
from speechjax.models.quantizer import GumbelQuantizer, perplexity
from speechjax.tasks._base import Sums, Task
from speechjax.tasks._contrastive import (
    Slots,
    codebook_perplexity,
    contrast,
    gumbel_temperature,
    mean_use,
    projection,
)


class W2vBert(Task):
    """Batch of `SpeechEncoder`, packed where it packs -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    The first `contrastive_layers` layers tell the quantized features of a masked frame from those of others, as in
    wav2vec 2.0 with one codebook (section 2.2, equation 1).  The rest, on top of them, predict which code it was
    (section 2.3).  Both losses train the whole stack below them; the codes to predict carry no gradient.  The codes
    are the quantizer's likeliest, not those its noise drew in training: one frame has one code.

    Masked frames become the encoder's learnt embedding, not random vectors.  A layer norm on the contrastive layers'
    output stands in for the last one of a pre-norm stack.  Sums run over the whole global batch, as in wav2vec 2.0.
    Randomness: streams `mask`, `gumbel`, `dropout`, `layerdrop`.  Raises UserError where no layer would be left for
    one of the modules.
    """

    contrastive_layers: int
    mask_prob: float
    mask_span: int
    negatives: int
    logit_temperature: float
    codes: int
    code_dim: int
    projection: int
    gumbel_start: float
    gumbel_floor: float
    gumbel_decay: float
    diversity: float
    contrastive_weight: float
    prediction_weight: float

    rngs = ("dropout", "gumbel", "layerdrop", "mask")

    def setup(self):
        self.quantizer = GumbelQuantizer(1, self.codes, self.code_dim)
        self.context_norm = LayerNorm()
        self.project_context = projection(self.projection, self.encoder.width)
        self.project_target = projection(self.projection, self.code_dim)
        self.head = projection(self.codes, self.encoder.width)

    def gumbel_temperature(self, step: jax.Array) -> jax.Array:
        return gumbel_temperature(step, self.gumbel_start, self.gumbel_floor, self.gumbel_decay)

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        out = self._predict(batch, step, train)
        slots, found, code, guess = (out[name] for name in ("slots", "contrast", "code", "guess"))
        n = jnp.sum(slots.valid).astype(jnp.float32)
        one_hot = lambda codes: jax.nn.one_hot(codes, self.codes)[:, :, None]  # noqa: E731
        use_V = mean_use(one_hot(code), slots.valid)[0]
        prob_perplexity = codebook_perplexity(out["probs"], slots.valid)
        diversity = (self.codes - prob_perplexity) / self.codes
        losses = {
            "contrastive": (self.contrastive_weight * slots.sum(found.loss), n),
            "diversity": (self.contrastive_weight * self.diversity * diversity * n, n),
            "prediction": (self.prediction_weight * slots.sum(out["loss"]), n),
        }
        one = jnp.ones(())
        metrics = {
            **found.metrics(slots),
            "prediction_accuracy": (slots.sum((guess == code).astype(jnp.float32)), n),
            # Of the best constant answers: one code, and one distribution over codes.
            "chance_prediction_accuracy": (jnp.max(use_V) * n, n),
            "chance_prediction": (self.prediction_weight * jnp.log(perplexity(use_V)) * n, n),
            "prediction_perplexity": (codebook_perplexity(one_hot(guess), slots.valid), one),
            "code_perplexity": (perplexity(use_V), one),
            "prob_perplexity": (prob_perplexity, one),
            "gumbel_temperature": (self.gumbel_temperature(step), one),
            "masked_share": (n, out["frames"]),
        }
        total, weight = metrics["chance_contrastive"]
        return losses, metrics | {"chance_contrastive": (self.contrastive_weight * total, weight)}

    def _predict(self, batch, step, train) -> dict[str, Any]:
        """Everything the losses, the metrics and the pictures are made of, by masked slot [B, M]."""
        n = self.contrastive_layers
        if not 0 < n < self.encoder.layers:
            raise UserError(f"config.task.contrastive_layers={n}: must be 1 to {self.encoder.layers - 1}, layers - 1")
        features, lengths = self.encoder.extract(batch)
        features = self.encoder.feature_norm(features)
        T = features.shape[1]
        mask_key, negative_key = jax.random.split(self.make_rng("mask"))
        masking: dict[str, Any] = dict(prob=self.mask_prob, span=self.mask_span)
        segments = batch["starts"].shape[1] if "starts" in batch else 1
        mask = span_mask(mask_key, lengths, T, **masking)
        slots = Slots.of(mask, lengths, max_masked(T, segments=segments, **masking))

        # Targets see the unmasked features; only masked frames are quantized.
        quantized = self.quantizer(slots.take(features), self.gumbel_temperature(step), train=train)
        context = self.encoder.contextualize(features, lengths, mask=mask, train=train, hidden=True)
        found = contrast(
            self.project_context(self.context_norm(slots.take(context.hidden[n]))),
            self.project_target(quantized.vectors), quantized.codes[..., 0], slots,
            sample_negatives(negative_key, slots.peers, self.negatives), self.logit_temperature,
        )  # fmt: skip
        code = jnp.argmax(quantized.probs[:, :, 0], axis=2).astype(jnp.int32)
        logits_BxMxV = self.head(slots.take(context.frames).astype(jnp.float32))
        picked = jnp.take_along_axis(logits_BxMxV, code[..., None], axis=2)[..., 0]
        return dict(
            slots=slots, contrast=found, lengths=lengths, frames=jnp.sum(frame_mask(lengths, T)).astype(jnp.float32),
            probs=quantized.probs, code=code, guess=jnp.argmax(logits_BxMxV, axis=2).astype(jnp.int32),
            loss=jax.nn.logsumexp(logits_BxMxV, axis=2) - picked,
        )  # fmt: skip

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows, by frame [B, T]: mask, true and predicted code (-1 where not masked)."""
        out = self._predict(batch, step, train=False)
        slots = out["slots"]
        return dict(
            mask=slots.mask, lengths=out["lengths"], true=slots.to_frames(out["code"]),
            predicted=slots.to_frames(out["guess"]),
        )  # fmt: skip

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        alarms = {}
        if metrics["code_perplexity"] < max(1.5, 0.02 * self.codes):
            alarms["codebook_collapse"] = (
                f"code perplexity {metrics['code_perplexity']:.1f} of {self.codes}: the codebook has collapsed, and "
                "predicting its codes teaches nothing; raise task.diversity, lower optim.learning_rate, or lengthen "
                "optim.warmup"
            )
        if metrics["prediction_accuracy"] > 0.98 and step >= 100:
            alarms["shortcut"] = (
                f"{metrics['prediction_accuracy']:.1%} of the codes of masked frames are predicted, a constant answer "
                f"gets {metrics['chance_prediction_accuracy']:.1%}: the task has become trivial; this is collapse, not "
                "success: raise task.diversity or lower task.prediction_weight"
            )
        if step < 1000:
            return alarms
        for name, remedy in (
            ("contrastive", "check the audio, then the learning rate"),
            ("prediction", "codes may change faster than they can be learnt: lower optim.learning_rate"),
        ):
            chance = metrics[f"chance_{name}"]
            accuracy = "accuracy" if name == "contrastive" else "prediction_accuracy"
            learnt = metrics[accuracy] > 1.1 * metrics[f"chance_{accuracy}"]
            if chance and metrics[name] > 0.98 * chance and not learnt:
                alarms[f"stuck_at_chance_{name}"] = (
                    f"{name} loss {metrics[name]:.3f} is at its chance level {chance:.3f}: nothing learnt; {remedy}"
                )
        return alarms

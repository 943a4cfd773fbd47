"""wav2vec 2.0 (Baevski et al. 2020, arXiv 2006.11477): contrastive prediction of quantized masked features.

Shapes: B batch, T frames, M masked slots, K negatives, G codebooks, V codes, C feature channels, P projection.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.models.encoder import Encoded, SpeechEncoder
from speechjax.models.layers import fan_in_uniform, frame_mask, scale_gradient
from speechjax.models.masking import masked_slots, max_masked, sample_negatives, slot_peers, span_mask
from speechjax.models.quantizer import GumbelQuantizer, perplexity

Sums = dict[str, tuple[jax.Array, jax.Array]]
EXCLUDED = -1e30  # finite: -inf minus -inf would be NaN in the gradient


class Wav2Vec2(nn.Module):
    """Batch of `SpeechEncoder`, packed or not -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    Every segment of a packed row is an utterance of its own: masks, negatives and context stay inside.  Sums run
    over the whole global batch, so the loop's one division is by the global masked count (section 3.2, and the
    published training code).  Randomness: streams `mask`, `gumbel`, `dropout`, `layerdrop`.
    """

    encoder: SpeechEncoder
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
        self.project_context = _projection(self.projection, self.encoder.width)
        self.project_target = _projection(self.projection, self.code_dim)
        self.feature_drop = nn.Dropout(self.feature_dropout)

    def gumbel_temperature(self, step: jax.Array) -> jax.Array:
        """Falls by a constant factor an update to a floor (section 4.2)."""
        # Not decay ** step: float32 rounds 0.999995, and 400 000 updates turn that into 0.3 %.
        decayed = self.gumbel_start * jnp.exp(step.astype(jnp.float32) * math.log(self.gumbel_decay))
        return jnp.maximum(decayed, self.gumbel_floor)

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        out = self._contrast(batch, step, train)
        n = jnp.sum(out["valid"]).astype(jnp.float32)
        sum_slots = lambda x: jnp.sum(jnp.where(out["valid"], x, 0))  # noqa: E731
        G, V = self.codebooks, self.codes

        chosen_GxV = jnp.einsum("bmgv,bm->gv", jax.nn.one_hot(out["codes"], V), out["valid"].astype(jnp.float32))
        probs_GxV = jnp.einsum("bmgv,bm->gv", out["probs"], out["valid"].astype(jnp.float32))
        count = jnp.maximum(n, 1)
        prob_perplexity = jnp.sum(perplexity(probs_GxV / count))
        code_perplexity = jnp.sum(perplexity(chosen_GxV / count))
        diversity = (G * V - prob_perplexity) / (G * V)

        losses = {
            "contrastive": (sum_slots(out["loss"]), n),
            "diversity": (self.diversity * diversity * n, n),
            "feature_penalty": (self.feature_penalty * out["energy"] * n, n),
        }
        answerable = sum_slots(out["answerable"].astype(jnp.float32))
        one = jnp.ones(())
        metrics = {
            "accuracy": (sum_slots(out["correct"].astype(jnp.float32)), answerable),
            "chance_accuracy": (sum_slots(jnp.where(out["answerable"], out["chance"], 0)), answerable),
            "chance_contrastive": (sum_slots(jnp.log1p(out["candidates"])), n),
            "code_perplexity": (code_perplexity, one),
            "prob_perplexity": (prob_perplexity, one),
            "gumbel_temperature": (self.gumbel_temperature(step), one),
            "masked_share": (n, out["frames"]),
        }
        return losses, metrics

    def _contrast(self, batch, step, train) -> dict[str, jax.Array]:
        """Everything the loss, the metrics and the pictures are made of, by masked slot [B, M]."""
        features, lengths = self.encoder.extract(batch)
        features = scale_gradient(features, self.feature_grad_scale)
        T, C = features.shape[1:]
        frames = jnp.sum(frame_mask(lengths, T)).astype(jnp.float32)
        energy = jnp.sum(jnp.square(features.astype(jnp.float32))) / (jnp.maximum(frames, 1) * C)  # padding is zero
        features = self.encoder.feature_norm(features)

        mask_key, negative_key = jax.random.split(self.make_rng("mask"))
        masking: dict[str, Any] = dict(prob=self.mask_prob, span=self.mask_span)
        mask = span_mask(mask_key, lengths, T, **masking)
        segments = batch["starts"].shape[1] if "starts" in batch else 1
        positions, valid = masked_slots(mask, max_masked(T, segments=segments, **masking))
        peers = slot_peers(lengths, positions, valid)
        at_slots = lambda x: jnp.take_along_axis(x, positions[..., None], axis=1)  # noqa: E731

        # Targets see the unmasked features; only masked frames are quantized.
        targets = self.feature_drop(at_slots(features), deterministic=not train)
        quantized = self.quantizer(targets, self.gumbel_temperature(step), train=train)
        target_BxMxP = _unit(self.project_target(quantized.vectors))
        context = self.encoder.contextualize(features, lengths, mask=mask, train=train)
        context_BxMxP = _unit(self.project_context(at_slots(context.frames).astype(jnp.float32)))

        similar_BxMxM = jnp.einsum("bmp,bnp->bmn", context_BxMxP, target_BxMxP) / self.logit_temperature
        code = _code_id(quantized.codes, self.codes)
        same_BxMxM = code[:, :, None] == code[:, None, :]
        drawn = sample_negatives(negative_key, peers, self.negatives)
        # A negative with the target's own codes would be a second right answer: excluded, as published.
        usable_BxMxM = peers & ~same_BxMxM
        negative_BxMxK = jnp.take_along_axis(jnp.where(usable_BxMxM, similar_BxMxM, EXCLUDED), drawn, axis=2)
        positive_BxM = jnp.einsum("bmm->bm", similar_BxMxM)
        logits = jnp.concatenate([positive_BxM[..., None], negative_BxMxK], axis=-1)
        candidates = jnp.sum(negative_BxMxK > EXCLUDED / 2, axis=-1).astype(jnp.float32)
        return dict(
            mask=mask, lengths=lengths, frames=frames, positions=positions, valid=valid, peers=peers,
            codes=quantized.codes, code=code, probs=quantized.probs, energy=energy, similar=similar_BxMxM,
            candidates=candidates,
            loss=jax.nn.logsumexp(logits, axis=-1) - positive_BxM,
            correct=(positive_BxM > jnp.max(negative_BxMxK, axis=-1)) & (candidates > 0),
            answerable=candidates > 0,
            chance=_chance_accuracy(same_BxMxM, valid, peers, self.negatives),
        )  # fmt: skip

    def features(self, batch: dict[str, jax.Array]) -> Encoded:
        """Unmasked features of every layer, for probes: `Encoded` with all hidden states."""
        return self.encoder(batch, train=False, hidden=True)

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows, by frame [B, T]: mask, true and predicted code ids (-1 where not masked).

        The predicted code is that of the most similar target among all masked frames of the utterance.
        """
        out = self._contrast(batch, step, train=False)
        similar = jnp.where(out["peers"], out["similar"], EXCLUDED)
        predicted = jnp.take_along_axis(out["code"], jnp.argmax(similar, axis=2), axis=1)
        B, T = out["mask"].shape
        rows = jnp.arange(B)[:, None]
        at = jnp.where(out["valid"], out["positions"], T)
        to_frames = lambda c: jnp.full((B, T), -1, jnp.int32).at[rows, at].set(c, mode="drop")  # noqa: E731
        return dict(
            mask=out["mask"], lengths=out["lengths"], true=to_frames(out["code"]), predicted=to_frames(predicted)
        )

    def after_step(self, params: Any, extra: Any, step: jax.Array) -> Any:
        """No state beyond the parameters."""
        return extra

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


def _projection(width: int, fan_in: int) -> nn.Dense:
    init = fan_in_uniform(fan_in)
    return nn.Dense(width, kernel_init=init, bias_init=init, dtype=jnp.float32)


def _unit(x: jax.Array) -> jax.Array:
    """Unit length along the last axis; float32, because cosine over 0.1 amplifies rounding tenfold."""
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-16))


def _code_id(codes: jax.Array, codes_per_book: int) -> jax.Array:
    """One integer for the G codes of a frame: int32 [..., G] -> int32 [...]."""
    combined = codes[..., 0]
    for g in range(1, codes.shape[-1]):
        combined = combined * codes_per_book + codes[..., g]
    return combined


def _chance_accuracy(same: jax.Array, valid: jax.Array, peers: jax.Array, negatives: int) -> jax.Array:
    """Accuracy of guessing among the different candidates: bool [B, M, M], [B, M], [B, 1 or M, M] -> [B, M].

    1 / (1 + expected number of distinct wrong codes among the drawn negatives).  Repeated draws and repeated codes
    make it higher than 1 / (1 + K), most of all in short utterances.
    """
    same = same & peers & valid[:, :, None]
    twins = jnp.sum(same, axis=2).astype(jnp.float32)  # frames with this slot's code, itself included
    others = jnp.maximum(jnp.sum(peers, axis=2) - 1, 1).astype(jnp.float32)
    drawn = 1 - jnp.maximum(1 - twins / others, 0) ** negatives  # P(a code with that many frames is drawn)
    first = valid & ~jnp.any(jnp.tril(same, -1), axis=2)
    distinct = jnp.sum(jnp.where(peers & first[:, None, :], drawn[:, None, :], 0), axis=2)
    return 1 / (1 + jnp.maximum(distinct - drawn, 0))

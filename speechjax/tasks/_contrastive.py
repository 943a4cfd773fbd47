"""What wav2vec 2.0 and w2v-BERT share: masked slots, and the contrast of context with quantized features there.

Shapes: B batch, T frames, M masked slots, K negatives, G codebooks, V codes, P projection.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.models.layers import fan_in_uniform
from speechjax.models.masking import masked_slots, slot_peers
from speechjax.models.quantizer import perplexity

EXCLUDED = -1e30  # finite: -inf minus -inf would be NaN in the gradient


class Slots(NamedTuple):
    """The masked frames of a batch in static shapes: `mask` bool [B, T], and what masking.py makes of it.

    `positions` int32 [B, M] of the frames in the slots, `valid` bool [B, M], `peers` bool [B, 1 or M, M].
    """

    mask: jax.Array
    positions: jax.Array
    valid: jax.Array
    peers: jax.Array

    @classmethod
    def of(cls, mask: jax.Array, lengths: jax.Array, most: int) -> "Slots":
        """bool [B, T], int32 [B] or [B, T], M -> Slots."""
        positions, valid = masked_slots(mask, most)
        return cls(mask, positions, valid, slot_peers(lengths, positions, valid))

    def take(self, x: jax.Array) -> jax.Array:
        """Frames [B, T, D] at the slots: [B, M, D]."""
        return jnp.take_along_axis(x, self.positions[..., None], axis=1)

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum over the valid slots: [B, M] -> []."""
        return jnp.sum(jnp.where(self.valid, x, 0))

    def to_frames(self, values: jax.Array) -> jax.Array:
        """int32 [B, M] by slot -> [B, T] by frame, -1 where not masked."""
        B, T = self.mask.shape
        at = jnp.where(self.valid, self.positions, T)
        return jnp.full((B, T), -1, jnp.int32).at[jnp.arange(B)[:, None], at].set(values, mode="drop")


class Contrast(NamedTuple):
    """What `contrast` finds, by slot [B, M]; `similar` float32 [B, M, M] is every context with every target.

    `candidates` counts the negatives that are none of the target's own code; where there is none, a slot is not
    `answerable`.  `chance` is the accuracy of guessing among the candidates.
    """

    similar: jax.Array
    candidates: jax.Array
    loss: jax.Array
    correct: jax.Array
    answerable: jax.Array
    chance: jax.Array

    def metrics(self, slots: Slots) -> dict[str, tuple[jax.Array, jax.Array]]:
        """accuracy, its chance level, and the loss's: {name: (sum, weight)}."""
        answerable = slots.sum(self.answerable.astype(jnp.float32))
        return {
            "accuracy": (slots.sum(self.correct.astype(jnp.float32)), answerable),
            "chance_accuracy": (slots.sum(jnp.where(self.answerable, self.chance, 0)), answerable),
            "chance_contrastive": (
                slots.sum(jnp.log1p(self.candidates)), jnp.sum(slots.valid).astype(jnp.float32)
            ),
        }  # fmt: skip


def contrast(
    context_BxMxP: jax.Array, target_BxMxP: jax.Array, code: jax.Array, slots: Slots, drawn: jax.Array,
    temperature: float,
) -> Contrast:  # fmt: skip
    """Cosine of context and target against that with K negatives (wav2vec 2.0 equation 3).

    `code` int32 [B, M] names the targets; `drawn` int32 [B, M, K] are the slots of the negatives.
    """
    similar_BxMxM = jnp.einsum("bmp,bnp->bmn", unit(context_BxMxP), unit(target_BxMxP)) / temperature
    same_BxMxM = code[:, :, None] == code[:, None, :]
    # A negative with the target's own codes would be a second right answer: excluded, as published.
    usable_BxMxM = slots.peers & ~same_BxMxM
    negative_BxMxK = jnp.take_along_axis(jnp.where(usable_BxMxM, similar_BxMxM, EXCLUDED), drawn, axis=2)
    positive_BxM = jnp.einsum("bmm->bm", similar_BxMxM)
    logits = jnp.concatenate([positive_BxM[..., None], negative_BxMxK], axis=-1)
    candidates = jnp.sum(negative_BxMxK > EXCLUDED / 2, axis=-1).astype(jnp.float32)
    return Contrast(
        similar=similar_BxMxM,
        candidates=candidates,
        loss=jax.nn.logsumexp(logits, axis=-1) - positive_BxM,
        correct=(positive_BxM > jnp.max(negative_BxMxK, axis=-1)) & (candidates > 0),
        answerable=candidates > 0,
        chance=chance_accuracy(same_BxMxM, slots.valid, slots.peers, drawn.shape[-1]),
    )


def projection(width: int, fan_in: int) -> nn.Dense:
    """Linear, float32, as wav2vec 2.0 starts it."""
    init = fan_in_uniform(fan_in)
    return nn.Dense(width, kernel_init=init, bias_init=init, dtype=jnp.float32)


def unit(x: jax.Array) -> jax.Array:
    """Unit length along the last axis; float32, because cosine over 0.1 amplifies rounding tenfold."""
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-16))


def code_id(codes: jax.Array, codes_per_book: int) -> jax.Array:
    """One integer for the G codes of a frame: int32 [..., G] -> int32 [...]."""
    combined = codes[..., 0]
    for g in range(1, codes.shape[-1]):
        combined = combined * codes_per_book + codes[..., g]
    return combined


def gumbel_temperature(step: jax.Array, start: float, floor: float, decay: float) -> jax.Array:
    """Falls by a constant factor an update to a floor (wav2vec 2.0 section 4.2)."""
    # Not decay ** step: float32 rounds 0.999995, and 400 000 updates turn that into 0.3 %.
    return jnp.maximum(start * jnp.exp(step.astype(jnp.float32) * math.log(decay)), floor)


def mean_use(weights: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over the valid slots, float32 [B, M, G, V], bool [B, M] -> [G, V]: how often every code is used."""
    count = jnp.maximum(jnp.sum(valid).astype(jnp.float32), 1)
    return jnp.einsum("bmgv,bm->gv", weights, valid.astype(jnp.float32)) / count


def codebook_perplexity(weights: jax.Array, valid: jax.Array) -> jax.Array:
    """Codes effectively in use over the valid slots, added up over the codebooks: see `mean_use` -> []."""
    return jnp.sum(perplexity(mean_use(weights, valid)))


def chance_accuracy(same: jax.Array, valid: jax.Array, peers: jax.Array, negatives: int) -> jax.Array:
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

"""What every task that learns from labels has in common: frames of an encoder, masks of them, and a head.

Shapes: B batch, T frames, D width, L layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.encoder import Encoded
from speechjax.models.masking import span_mask
from speechjax.tasks._base import Sums, Task


class Head(Task):
    """A task over the frames of an encoder: subclasses define `score` and `respond`, and call `super().setup()`.

    `layers` "last" takes the frames of the last layer; "weighted" a learned average of all layers' outputs, the input
    of the first among them (SUPERB, Yang et al. 2021, arXiv 2105.01051, section 3).

    In training spans of `mask_span` frames, `mask_prob` of all, become the mask embedding, and spans of
    `channel_mask_span` channels, `channel_mask_prob` of all, zero (the fine-tuning of wav2vec 2.0, section 4.3; after
    SpecAugment, Park et al. 2019).  0 turns either off.  `head_dropout` is that of the frames the head gets.
    """

    layers: str
    mask_prob: float
    mask_span: int
    channel_mask_prob: float
    channel_mask_span: int
    head_dropout: float

    packed = False  # whether rows may hold several utterances

    def setup(self):
        if self.layers not in ("last", "weighted"):
            raise UserError(f"config.task.layers={self.layers!r}: choose last or weighted")
        if self.layers == "weighted":
            self.layer_weights = self.param("layer_weights", nn.initializers.zeros, (self.encoder.layers + 1,))
        self.head_drop = nn.Dropout(self.head_dropout)

    def encode(self, batch: dict[str, jax.Array], train: bool) -> Encoded:
        """Frames of the encoder, masked in training; UserError for packed rows where the head does not know them."""
        if "starts" in batch and not self.packed:
            raise UserError("this task needs one utterance a row: set config.data.fill=False")
        features, lengths = self.encoder.extract(batch)
        B, T, _ = features.shape
        mask = channels = None
        if train and self.mask_prob:
            mask = self._spans(self.mask_prob, self.mask_span, lengths, T)
        if train and self.channel_mask_prob:
            width = jnp.full(B, self.encoder.width, jnp.int32)
            channels = self._spans(self.channel_mask_prob, self.channel_mask_span, width, self.encoder.width)
        features = self.encoder.feature_norm(features)
        hidden = self.layers == "weighted"
        return self.encoder.contextualize(
            features, lengths, mask=mask, channel_mask=channels, train=train, hidden=hidden
        )

    def _spans(self, prob: float, span: int, lengths: jax.Array, size: int) -> jax.Array:
        spans: dict[str, Any] = dict(prob=prob, span=span, min_spans=0)
        return span_mask(self.make_rng("mask"), lengths, size, **spans)

    def mix(self, encoded: Encoded, train: bool) -> jax.Array:
        """What the head gets, float32 [B, T, D]."""
        x = encoded.frames.astype(jnp.float32)
        if self.layers == "weighted":
            weights = jax.nn.softmax(self.layer_weights)
            x = jnp.einsum("l,lbtd->btd", weights, jnp.stack(encoded.hidden).astype(jnp.float32))
        return self.head_drop(x, deterministic=not train)

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        return self.score(self.encode(batch, train), batch, step=step, train=train)

    def score(
        self, encoded: Encoded, batch: dict[str, jax.Array], *, step: jax.Array, train: bool
    ) -> tuple[Sums, Sums]:
        """Losses and metrics of what the encoder made of a batch; apart from `__call__`: heads may share an encoder."""
        raise NotImplementedError

    def respond(self, encoded: Encoded) -> dict[str, jax.Array]:
        """What the task answers, for evaluators and for users: logits, embeddings, values; never a loss."""
        raise NotImplementedError

    def answer(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """`respond` to a batch, nothing masked."""
        return self.respond(self.encode(batch, train=False))

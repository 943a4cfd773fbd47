"""data2vec 2.0 (Baevski et al. 2022, arXiv 2212.07525): several masks an utterance, and only visible frames encoded.

Shapes: B batch, M masks an utterance, R = B M rows (an utterance's rows are neighbours), T frames, D width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.ema import time_variation
from speechjax.models.layers import frame_mask
from speechjax.models.visible import ConvDecoder, attend_visible, block_mask, masked_counts
from speechjax.tasks.data2vec import Data2Vec


class Data2Vec2(Data2Vec):
    """`Data2Vec` with `masks` masks an utterance that share one pass of the teacher; rows must not be packed.

    Each mask hides exactly floor(mask_prob * t) of an utterance's t frames, in spans (`block_mask`).  The student's
    layers see the other frames only, at their distances in the utterance (ALiBi); convolutional positions come
    before the cut and see zeros in its place.  A convolutional decoder gets the result with noise of deviation
    `mask_noise` in the masked places and predicts the targets there (sections 3.1 and 3.2, and the published code).
    The teacher averages the positions too.

    Of the published code this leaves out: its fp16 teacher, and a layer drop that skips the work.
    """

    mask_adjust: float
    masks: int
    mask_noise: float
    decoder_layers: int
    decoder_width: int
    decoder_kernel: int
    decoder_groups: int
    decoder_dropout: float

    own_positions = True

    def setup(self):
        self.check_layers()
        if not (0 < self.mask_prob < 1 and self.masks > 0):
            raise UserError(f"config.task: mask_prob={self.mask_prob} must be in (0, 1), masks={self.masks} above 0")
        self.decoder = ConvDecoder(
            self.decoder_layers, self.decoder_width, self.decoder_kernel, self.decoder_groups, self._dtype()
        )
        self.decoder_drop = nn.Dropout(self.decoder_dropout)

    def _dtype(self):
        return jnp.dtype(self.encoder.dtype)

    def _regress(self, batch, train) -> dict[str, Any]:
        if "starts" in batch:
            raise UserError("config.task.name=data2vec2 cannot encode packed rows: set data.fill=False")
        features, lengths = self.encoder.extract(batch)
        T = features.shape[1]
        features = self.encoder.feature_norm(features)
        if self.is_initializing():
            self.encoder.contextualize(features, lengths, train=False)  # draws the parameters used below
        x = self.encoder.projection(features)
        variation = time_variation(x, lengths)
        x = self.encoder.input_drop(x, deterministic=not train)

        rows = lambda x: jnp.repeat(x, self.masks, axis=0)  # noqa: E731
        lengths_R = rows(lengths)
        mask_key, noise_key = jax.random.split(self.make_rng("mask"))
        mask = block_mask(
            mask_key, lengths_R, T, prob=self.mask_prob, span=self.mask_span, adjust=self.mask_adjust
        )  # fmt: skip
        slots = T - int(masked_counts(T, self.mask_prob)[T])
        keys = {name: self.make_rng(name) for name in ("dropout", "layerdrop")} if train else {}
        x = attend_visible(self.encoder.transformer, rows(x), lengths_R, mask, slots, keys)
        x = self.decoder_drop(x, deterministic=not train)
        noise = self.mask_noise * jax.random.normal(noise_key, x.shape, x.dtype)
        output = self.decoder(jnp.where(mask[..., None], noise, x), lengths_R)
        return dict(
            mask=mask, lengths=lengths, variation=variation, output=output,
            frames=self.masks * jnp.sum(frame_mask(lengths, T)).astype(jnp.float32),
            target=rows(self._targets(features, lengths, 1)),
        )  # fmt: skip

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: targets and outputs [B, T, D] under the first mask."""
        out = self._regress(batch, train=False)
        first = {name: out[name][:: self.masks] for name in ("mask", "target", "output")}
        return {"lengths": out["lengths"], **first}

"""Speaker embeddings: vectors that are near where one person speaks, learnt by telling many persons apart.

Shapes: B batch, T frames, C channels, E the embedding's width, V speakers.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.encoder import Encoded
from speechjax.models.layers import frame_mask, zero_padding
from speechjax.tasks import _classes
from speechjax.tasks._base import Sums

# Frames a layer sees, and how far apart: Snyder et al. 2018, table 1.
TDNN = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))
EDGE = sum((size - 1) * dilation for size, dilation in TDNN) // 2  # 7 frames a side


class Speaker(_classes.ClassHead):
    """Batch of `SpeechEncoder` with speakers -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `label` int32 [B] is the speaker, -1 for none.  A linear layer makes the embedding, `embedding` wide, of the pooled
    frames: "mean" and "attention" as in `PooledHead`, or "xvector": time-delay layers of `tdnn` channels, the last of
    `tdnn_top`, then mean and deviation over frames (Snyder et al. 2018, ICASSP, table 1; as in SUPERB without batch
    norm).  With `second_layer` a linear layer stands between embeddings and scores, which only training passes (as
    published, and in transformers).  Embeddings answer with length 1.

    `loss` "softmax" is the cross-entropy of a linear map of the embedding.  The others compare directions, the scores
    being `scale` times cosines to a vector a speaker, and make the right one worse by `margin`: "am" takes it from the
    cosine (Wang et al. 2018, arXiv 1801.05599, equation 6), "aam" adds it to the angle (ArcFace, Deng et al. 2019,
    arXiv 1801.07698, equation 3).  Beyond pi such an angle would score better the worse it is: there, as in the
    published code, the cosine loses margin * sin(margin).  `accuracy` knows no margin.

    Chance is that of the frequencies of all batches before, with the margin at right angles, where vectors in many
    dimensions begin.
    """

    embedding: int
    tdnn: int
    tdnn_top: int
    loss: str
    margin: float
    scale: float
    second_layer: bool = False

    poolings = ("mean", "attention", "xvector")

    def setup(self):
        super().setup()
        if self.loss not in ("softmax", "am", "aam"):
            raise UserError(f"config.task.loss={self.loss!r}: choose from softmax, am, aam")
        if not 0 <= self.margin < math.pi / 2:
            raise UserError(f"config.task.margin={self.margin}: must be at least 0 and below pi / 2")
        width = self.pooled_width
        if self.pooling == "xvector":
            self.xvector = XVector(self.tdnn, self.tdnn_top)
            width = 2 * self.tdnn_top
        self.embed = _classes.linear(width, self.embedding)
        if self.second_layer:
            self.second = _classes.linear(self.embedding, self.embedding)
        if self.loss == "softmax":
            self.head = _classes.linear(self.embedding, self.classes)
        else:
            shape = (self.embedding, self.classes)
            self.prototypes = self.param("prototypes", nn.initializers.glorot_normal(), shape)

    def _embedding(self, encoded: Encoded, train: bool) -> jax.Array:
        """float32 [B, E], of any length."""
        if self.pooling != "xvector":
            return self.embed(self.pool(encoded, train))
        x = self.mix(encoded, train)
        x = self.project(x) if self.projection else x
        return self.embed(self.xvector(x, encoded.lengths))

    def _scores(self, embedding: jax.Array) -> jax.Array:
        """Of every speaker, without margin or scale: [B, E] -> [B, V]."""
        x = self.second(embedding) if self.second_layer else embedding
        return self.head(x) if self.loss == "softmax" else unit(x) @ unit(self.prototypes, axis=0)

    def score(
        self, encoded: Encoded, batch: dict[str, jax.Array], *, step: jax.Array, train: bool
    ) -> tuple[Sums, Sums]:
        label, seen = self.known(encoded, batch), self.seen.value
        scores = logits = self._scores(self._embedding(encoded, train))
        lost = 0.0
        if self.loss != "softmax":
            logits = margin_logits(scores, label, self.loss, self.margin, self.scale)
            lost = self.scale * (self.margin if self.loss == "am" else math.sin(self.margin))
        n = _classes.over_labelled(label, jnp.ones_like(label))
        surprise = jax.nn.logsumexp(logits, axis=1) - _classes.at_label(logits, label)
        # Logits log p, that of the right class less `lost`: log(p exp(-lost) + 1 - p) - log p + lost.
        log_p = _classes.log_prior(seen)[jnp.maximum(label, 0)]
        chance = jnp.log1p(jnp.exp(log_p) * math.expm1(-lost)) - log_p + lost
        metrics = {
            "chance_speaker": (_classes.over_labelled(label, chance), n),
            **_classes.class_metrics(self, scores, label, encoded.lengths, seen),
        }
        return {"speaker": (_classes.over_labelled(label, surprise), n)}, metrics

    def respond(self, encoded: Encoded) -> dict[str, jax.Array]:
        """`embedding` float32 [B, E] of length 1: the cosine of two is their dot product."""
        return {"embedding": unit(self._embedding(encoded, train=False))}

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: speaker and likeliest speaker of the utterance, at each of its frames [B, T]."""
        encoded = self.encode(batch, train=False)
        scores = self._scores(self._embedding(encoded, train=False))
        true, predicted = (
            _classes.spread(x, encoded.lengths, encoded.frames.shape[1])
            for x in (batch[self.label], jnp.argmax(scores, axis=1))
        )
        return dict(lengths=encoded.lengths, true=true, predicted=predicted)

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        return _classes.class_alarms(metrics, step, "speaker")


class XVector(nn.Module):
    """The frame layers of x-vectors and their statistics: [B, T, D], int32 [B] -> float32 [B, 2 top].

    Pooled are frames whose whole context of 15 lies within the utterance; of shorter ones all, beside zeros.
    """

    width: int
    top: int

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        for k, (size, dilation) in enumerate(TDNN):
            width = self.top if k == len(TDNN) - 1 else self.width
            conv = nn.Conv(
                width, (size,), kernel_dilation=(dilation,), padding="SAME", dtype=jnp.float32, name=f"tdnn_{k + 1}"
            )
            x = nn.relu(conv(zero_padding(x, lengths)))
        T = x.shape[1]
        whole = frame_mask(lengths - EDGE, T) & (jnp.arange(T) >= EDGE)[None]
        inside = jnp.where((lengths > 2 * EDGE)[:, None], whole, frame_mask(lengths, T))
        return statistics(x, inside)


def statistics(x: jax.Array, inside: jax.Array) -> jax.Array:
    """Mean and (sample) standard deviation over the frames of `inside`: [B, T, C], bool [B, T] -> float32 [B, 2 C].

    A row without such frames has the mean 0.
    """
    x = jnp.where(inside[..., None], x.astype(jnp.float32), 0)
    count = jnp.maximum(jnp.sum(inside, axis=1), 1).astype(jnp.float32)[:, None]
    mean = jnp.sum(x, axis=1) / count
    off = jnp.where(inside[..., None], x - mean[:, None], 0)
    # sqrt has no slope at zero.
    return jnp.concatenate(
        [mean, jnp.sqrt(jnp.sum(jnp.square(off), axis=1) / jnp.maximum(count - 1, 1) + 1e-12)], axis=1
    )


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """x scaled to length 1; zero stays zero, and has a gradient."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def margin_logits(cosine: jax.Array, label: jax.Array, loss: str, margin: float, scale: float) -> jax.Array:
    """Scaled cosines [B, V], that of the class `label` int32 [B] made worse by the margin of `loss` "am" or "aam"."""
    if loss == "am":
        worse = cosine - margin
    else:
        # The root has no slope where vectors point the same way.
        sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosine), 1e-6))
        worse = cosine * math.cos(margin) - sine * math.sin(margin)
        worse = jnp.where(cosine > math.cos(math.pi - margin), worse, cosine - margin * math.sin(margin))
    own = jax.nn.one_hot(label, cosine.shape[1]) > 0
    return scale * jnp.where(own, worse, cosine)

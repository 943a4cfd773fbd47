"""Positions inside attention: what a query gives a key for their distance.

Shapes: B batch, T frames (queries), S keys, H heads, E head width.  Queries are at the last T of the S keys, which are
the T frames themselves outside streams.  J = S + T - 1 distances: key before query by S - 1 up to after by T - 1.

Only differences of positions enter, so rows packed with several utterances need nothing special here.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speechjax.errors import UserError
from speechjax.models.attention_kernels import IMPLS
from speechjax.models.positions import angles
from speechjax.models.recall import streams

KINDS = ("none", "rotary", "rotary_inputs", "alibi", "buckets", "relative", "shaw")


@dataclass(frozen=True)
class AttentionOptions:
    """The attention block of a config: which positions attention knows, how far it sees, and what computes it.

    positions  "none"; "rotary" (RoFormer, arXiv 2104.09864), "rotary_inputs" the same on what is projected to queries
               and keys (fairseq's conformers); "alibi" (arXiv 2108.12409, symmetric and with a learned
               scale a head, as data2vec 2.0, arXiv 2212.07525, has it); "buckets" (T5, arXiv 1910.10683, section 2.1);
               "relative" (Transformer-XL, arXiv 1901.02860, section 3.3, as in conformers); "shaw" (arXiv 1803.02155,
               equation 4, as in w2v-BERT 2.0): a vector a distance, met by the query
    gated      of "buckets": every query weighs the bias by a gate (WavLM, arXiv 2110.13900, section 3.1)
    before     of "shaw": keys so many frames before their query, or more, share one vector; `after`: after it
    buckets    of "buckets": how many, half of them for keys to the right; `max_distance` and beyond share one
    chunk      0: all frames see all; n: a frame sees its chunk of n frames and those before it, so 1 is causal
    left       of chunks: how many earlier ones are seen, -1 for all
    impl       "auto": a fused kernel where there is one for the hardware and for all that is asked, else "xla"; or a
               kernel by name, "splash", "flash", "cudnn" (see attention_kernels.py), to compare: it must fit wherever
               the model is used
    """

    positions: str = "none"
    gated: bool = False
    buckets: int = 320
    max_distance: int = 800
    before: int = 64
    after: int = 8
    chunk: int = 0
    left: int = -1
    impl: str = "auto"

    def __post_init__(self):
        where = "config.model.attention"
        if self.impl not in IMPLS:
            raise UserError(f"{where}.impl={self.impl!r}: there are {', '.join(IMPLS)}")
        if self.positions not in KINDS:
            raise UserError(f"{where}.positions={self.positions!r}: there are {', '.join(KINDS)}")
        if self.gated and self.positions != "buckets":
            raise UserError(f"{where}.gated=True needs positions='buckets', not {self.positions!r}")
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise UserError(
                f"{where}: buckets={self.buckets} must be a multiple of 4 and max_distance={self.max_distance} more "
                "than a quarter of it"
            )
        if min(self.before, self.after) < 0:
            raise UserError(f"{where}: before={self.before} and after={self.after} must be at least 0")
        if self.chunk < 0 or self.left < -1 or (self.left >= 0 and not self.chunk):
            raise UserError(
                f"{where}: chunk={self.chunk} must be at least 0 and left={self.left} at least -1; left needs a chunk"
            )

    @property
    def causal(self) -> bool:
        """Whether nothing else in the model may see the future either."""
        return self.chunk > 0

    @property
    def past(self) -> int:
        """Frames before a chunk that are seen from it; UserError where they are not limited."""
        if self.chunk and self.left >= 0:
            return self.left * self.chunk
        raise UserError(
            f"config.model.attention: chunk={self.chunk} and left={self.left} see no bounded past, which a stream "
            "needs: set both, in training too"
        )


def relative_shift(scores: jax.Array) -> jax.Array:
    """Scores by distance become scores by key: [..., T, J] -> [..., T, S], out[t, s] = scores[t, T - 1 + s - t].

    A pad and two reshapes: row t moves left by T - 1 - t without a gather, whose gradient would be a scatter.
    """
    *rest, T, J = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(rest) + 1) + [(1, 0)])
    return padded.reshape(*rest, J + 1, T)[..., 1:, :].reshape(*rest, T, J)[..., : J - T + 1]


def rotate(x: jax.Array, first: int = 0) -> jax.Array:
    """Rotary positions: [B, T, H, E] -> [B, T, H, E], each pair (e, e + E/2) turned by its angle.

    The first frame is at position `first`.  Float32 inside: bfloat16 angles are off by a radian after 256 frames.
    """
    T, E = x.shape[1], x.shape[-1]
    if E % 2:
        raise UserError(f"config.model.attention.positions='rotary' needs an even width of a head, not {E}")
    angle = angles(jnp.arange(first, first + T, dtype=jnp.int32), E // 2)[None, :, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """How fast attention of each head decays with distance (section 3): float64 [H].

    A geometric series down to 2^-8; where H is no power of two, that of the next lower one, then every other slope of
    the next higher one.
    """
    power = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([slopes, between[: heads - power]])


def distance_buckets(distances: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of key minus query: half of the buckets a side, of these half exact, half logarithmic."""
    side = buckets // 2
    exact = side // 2
    far = np.maximum(np.abs(distances), 1).astype(np.float32)
    # In float32, as published weights were trained: elsewhere a distance may round into the neighbouring bucket.
    steps = np.log(far / np.float32(exact)) / np.float32(np.log(max_distance / exact)) * np.float32(side - exact)
    large = np.minimum((np.float32(exact) + steps).astype(np.int32), side - 1)
    return np.where(distances > 0, side, 0) + np.where(np.abs(distances) < exact, np.abs(distances), large)


class SharedBias(nn.Module):
    """Attention bias that all layers share, by options: T -> float32 [H, T, S], or None where there is none.

    It lives beside the layers, not in the first: so it can be handed to layers whose parameters are stacked.
    """

    heads: int
    options: AttentionOptions

    @nn.compact
    def __call__(self, frames: int) -> jax.Array | None:
        if self.options.positions not in ("alibi", "buckets"):
            return None
        past = self.options.past if streams(self) else 0
        distances = jnp.arange(1 - frames - past, frames, dtype=jnp.int32)  # symbolic in exported programs
        if self.options.positions == "alibi":
            scale = self.param("scale", nn.initializers.ones, (self.heads,))
            slopes = jnp.maximum(scale, 0) * jnp.asarray(alibi_slopes(self.heads), jnp.float32)
            by_distance = -slopes[:, None] * jnp.abs(distances)[None].astype(jnp.float32)
        else:
            shape = (self.options.buckets, self.heads)
            table = self.param("table", nn.initializers.normal(0.02), shape)
            far = self.options.max_distance  # and beyond are one bucket
            bucket = jnp.asarray(distance_buckets(np.arange(-far, far + 1), self.options.buckets, far), jnp.int32)
            by_distance = table[bucket[jnp.clip(distances, -far, far) + far]].T
        rows = jnp.broadcast_to(by_distance[:, None], (self.heads, frames, distances.shape[0]))
        return relative_shift(rows)

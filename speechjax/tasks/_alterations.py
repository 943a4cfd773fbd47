"""How masked autoencoders of spectra spoil their input: pure functions of a key, inside the valid frames of each row.

Shapes: B batch, N frames, F features, T patches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.errors import UserError
from speechjax.models.layers import frame_mask, zero_padding
from speechjax.models.masking import span_mask


class Altered(NamedTuple):
    """`frames` float32 [B, N, F] as the model sees them; `chosen` bool [B, N], altered in time; `judged` bool
    [B, N, F], where the loss is taken."""

    frames: jax.Array
    chosen: jax.Array
    judged: jax.Array


@dataclass(frozen=True)
class Mockingjay:
    """Mockingjay (Liu et al. 2019, arXiv 1910.12638, section 2.2): runs of frames, one of three things done to them.

    prob    share of the frames in runs (see `span_mask`; overlaps make it a little less)
    span    frames in a run
    zero    probability that all runs of an utterance become zero
    random  that each of their frames becomes any one of the utterance (the published code: each run another run); else
            they stay as they are, and are judged all the same
    """

    prob: float = 0.15
    span: int = 7
    zero: float = 0.8
    random: float = 0.1

    def __post_init__(self):
        shares = (self.prob, self.zero, self.random)
        if not all(0 <= share <= 1 for share in shares) or self.zero + self.random > 1 or self.span < 1:
            raise UserError(
                f"config.task.alteration: prob={self.prob}, zero={self.zero} and random={self.random} are "
                f"probabilities, the last two together at most 1; span={self.span} is at least 1"
            )

    def __call__(self, key: jax.Array, x: jax.Array, lengths: jax.Array) -> Altered:
        B, N, _ = x.shape
        span_key, case_key, other_key = jax.random.split(key, 3)
        chosen = span_mask(span_key, lengths, N, prob=self.prob, span=self.span, min_spans=1)
        case = jax.random.uniform(case_key, (B, 1, 1))
        # u * length may round up to the length in float32.
        drawn = jnp.floor(jax.random.uniform(other_key, (B, N)) * lengths[:, None].astype(jnp.float32))
        other = jnp.clip(drawn.astype(jnp.int32), 0, jnp.maximum(lengths - 1, 0)[:, None])
        replaced = jnp.take_along_axis(x, other[..., None], axis=1)
        spoilt = jnp.where(case < self.zero, 0.0, jnp.where(case < self.zero + self.random, replaced, x))
        judged = jnp.broadcast_to(chosen[..., None], x.shape)
        return Altered(jnp.where(chosen[..., None], spoilt, x), chosen, judged)


@dataclass(frozen=True)
class Tera(Mockingjay):
    """TERA (Liu et al. 2020, arXiv 2007.06028, section III-B): Mockingjay's runs, a block of bins, and noise.

    channels    the block of neighbouring features that are zero in all frames of an utterance has up to this share
                of them, any width equally likely, none included
    noise_prob  probability that an utterance gets noise, which is not judged
    noise_std   its standard deviation
    """

    channels: float = 0.2
    noise_prob: float = 0.15
    noise_std: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.channels <= 1 and 0 <= self.noise_prob <= 1 and self.noise_std >= 0):
            raise UserError(
                f"config.task.alteration: channels={self.channels} and noise_prob={self.noise_prob} are from 0 to 1, "
                f"noise_std={self.noise_std} is at least 0"
            )

    def __call__(self, key: jax.Array, x: jax.Array, lengths: jax.Array) -> Altered:
        B, N, F = x.shape
        key, width_key, place_key, case_key, noise_key = jax.random.split(key, 5)
        frames, chosen, judged = super().__call__(key, x, lengths)
        # Over the row as a whole, so a draw does not depend on how long the row is.
        width = jax.random.randint(width_key, (B, 1), 0, int(self.channels * F) + 1)
        first = jnp.floor(jax.random.uniform(place_key, (B, 1)) * (F + 1 - width).astype(jnp.float32))
        first = jnp.minimum(first.astype(jnp.int32), F - width)
        bins = jnp.arange(F, dtype=jnp.int32)[None]
        block = ((bins >= first) & (bins < first + width))[:, None] & frame_mask(lengths, N)[..., None]
        frames = jnp.where(block, 0.0, frames)
        noisy = jax.random.uniform(case_key, (B, 1, 1)) < self.noise_prob
        noise = jnp.where(noisy, self.noise_std * jax.random.normal(noise_key, x.shape), 0.0)
        return Altered(zero_padding(frames + noise, lengths), chosen, judged | block)


@dataclass(frozen=True)
class Patches:
    """Audio-MAE (Huang et al. 2022, arXiv 2207.06405, section 3): what the encoder does not see, and who restores it.

    share                      of the patches that is hidden, at random
    layers, width, heads, mlp  of the transformer that restores them
    """

    share: float = 0.8
    layers: int = 8
    width: int = 512
    heads: int = 16
    mlp: int = 2048

    def __post_init__(self):
        if not 0 < self.share < 1 or self.width % 4:
            raise UserError(
                f"config.task.alteration: share={self.share} must be between 0 and 1, width={self.width} a multiple of "
                "4, for the positions"
            )

    def hidden_counts(self, patches: int) -> np.ndarray:
        """How many are hidden of 0 to T: int32 [T + 1]."""
        # 0.8 * 10 is 8, whatever float says.
        return np.array([int(self.share * t + 1e-6) for t in range(patches + 1)], np.int32)

    def __call__(self, key: jax.Array, lengths: jax.Array, patches: int) -> jax.Array:
        """Exactly floor(share * t) of the t patches of each row, at random: int32 [B] -> bool [B, T]."""
        u = jax.random.uniform(key, (len(lengths), patches))
        order = jnp.argsort(jnp.where(frame_mask(lengths, patches), u, 2.0), axis=1)
        return jnp.argsort(order, axis=1) < jnp.asarray(self.hidden_counts(patches))[lengths][:, None]


ALTERATIONS = {"mockingjay": Mockingjay, "tera": Tera, "patches": Patches}


def make_alteration(options: Mapping[str, Any]) -> Any:
    """The alteration of a config's block; raises UserError where the block does not fit."""
    options = dict(options)
    name = options.pop("name", None)
    if name not in ALTERATIONS:
        raise UserError(f"config.task.alteration.name={name!r}: there are {', '.join(ALTERATIONS)}")
    allowed = [field.name for field in fields(ALTERATIONS[name])]
    for key in options:
        if key not in allowed:
            raise UserError(f"config.task.alteration has no {key!r}; allowed: {', '.join(sorted(allowed))}")
    return ALTERATIONS[name](**options)

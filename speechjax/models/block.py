"""What every block of an encoder has in common: its arguments, and layer drop.  Shapes: B batch, T frames, D width."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """The base of a block: `layer(x, lengths, train, bias) -> (output, feed-forward branch)`, [B, T, D] each.

    `bias` is that of `SharedBias`, `head_width` that of `SelfAttention`; blocks that have no use for an argument ignore
    it.
    """

    heads: int
    mlp: int
    norm: str
    dropout: float
    attention_dropout: float
    activation_dropout: float
    layerdrop: float
    dtype: Any
    attention: Mapping[str, Any] = field(default_factory=dict)
    head_width: int = 0

    def unless_dropped(self, y: jax.Array, x: jax.Array, train: bool) -> jax.Array:
        """The block's output `y`, or at times in training its input `x`."""
        if not (train and self.layerdrop):
            return y
        # One draw for the whole global batch, so every device drops the same layers.  The layer is computed and
        # discarded: branching would save 5 % of the work and cost a second program.
        return jnp.where(jax.random.bernoulli(self.make_rng("layerdrop"), 1 - self.layerdrop), y, x)

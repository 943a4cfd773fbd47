"""What layers remember between the steps of a stream.  Shapes: B rows, T frames of a step, P frames before it.

A stream is encoded in steps (see streaming.py).  A step is a pass that may change the collection "stream": a layer that
looks back finds there what it needs of the steps before, and leaves what the next one will need.  Rows come first in
every array, and zeros are the state in which a stream begins.  In any other pass nothing is recalled.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STREAM = "stream"


def streams(module: nn.Module) -> bool:
    """Whether this pass is a step of a stream."""
    return module.is_mutable_collection(STREAM) and not module.is_initializing()


def recall(module: nn.Module, name: str, x: jax.Array, frames: int) -> tuple[jax.Array, int]:
    """`x` behind what came before it: [B, T, ...] -> ([B, P + T, ...], P), where P is `frames`, in other passes 0.

    Before the first frame of a stream there are zeros.
    """
    if not frames or not streams(module):
        return x, 0
    past: Any = module.variable(STREAM, name, jnp.zeros, (len(x), frames, *x.shape[2:]), x.dtype)
    x = jnp.concatenate([past.value, x], axis=1)
    past.value = x[:, -frames:]
    return x, frames


def kept(module: nn.Module, name: str, start: Callable[[], Any]) -> Any:
    """A variable, its `value` zeros like `start()` at first, that the next step finds as this one leaves it.

    In other passes None.
    """
    return module.variable(STREAM, name, start) if streams(module) else None

"""Batch normalisation whose running statistics are state beyond parameters.  Shapes: C channels, L stacked layers.

The statistics are constant in the forward pass, like all such state here: a layer sows what it has seen of the batch
into "sums", and `follow_batches` advances "batch_stats" after the update.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

DECAY = 0.9  # of the running statistics a step, and the epsilon: PyTorch's, which published models were trained with
EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Mean 0 and variance 1 of every channel over all valid places: [..., C], bool [...] -> [..., C] of `out_dtype`.

    Ioffe and Szegedy 2015 (arXiv 1502.03167).  Over the frames as well as the rows of a batch it is Deep Speech 2's
    sequence-wise normalisation (Amodei et al. 2016, arXiv 1512.02595, section 3.2).  `valid` may lack the last axes
    before C, such as frequency.  Padding takes no part.

    With `train` the statistics are those of the batch, over all devices, of the micro-batch where there are several;
    otherwise the running ones.  Float32 whatever the dtype of the input.
    """

    out_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, train: bool) -> jax.Array:
        C = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,))
        offset = self.param("bias", nn.initializers.zeros, (C,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (C,)).value
        variance = self.variable("batch_stats", "variance", jnp.ones, (C,)).value
        x = x.astype(jnp.float32)
        channels = lambda v: v.reshape((1,) * (x.ndim - 1) + (C,))  # noqa: E731
        if train:
            running = mean
            valid = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim))
            axes = tuple(range(x.ndim - 1))
            n = jnp.sum(jnp.broadcast_to(valid, (*x.shape[:-1], 1)).astype(jnp.float32))
            average = lambda v: jnp.sum(jnp.where(valid, v, 0), axis=axes) / jnp.maximum(n, 1)  # noqa: E731
            mean = average(x)
            variance = average(jnp.square(x - channels(mean)))
            # About the running mean, not about 0: sums of squares would cancel.
            shift = mean - running
            moments = jnp.stack([jnp.ones(C), shift, variance + jnp.square(shift)]) * n
            self.sow("sums", "moments", lax.stop_gradient(moments), reduce_fn=lambda a, b: a + b, init_fn=lambda: 0.0)
        y = (x - channels(mean)) * channels(lax.rsqrt(variance + EPSILON) * scale) + channels(offset)
        return y.astype(self.out_dtype)


def follow_batches(extra: Any, sums: Any) -> Any:
    """State beyond parameters whose running statistics have followed the batch: old `extra`, `sums` -> new `extra`.

    Layers that have sown nothing, or seen no frame, keep what they had.
    """
    if "batch_stats" not in extra:
        return extra
    return {**extra, "batch_stats": _follow(extra["batch_stats"], sums)}


def _follow(running: Any, sums: Any) -> Any:
    """One module's statistics, or a tree of modules; those of a scan are [L, C], and its sums [L, 3, C]."""
    if "variance" not in running:
        return {name: _follow(inside, sums.get(name, {})) for name, inside in running.items()}
    if "moments" not in sums:
        return running
    n, first, second = (sums["moments"][..., i, :] for i in range(3))
    shift = first / jnp.maximum(n, 1)
    variance = jnp.maximum(second / jnp.maximum(n, 1) - jnp.square(shift), 0)
    rate = jnp.where(n > 0, 1 - DECAY, 0.0)
    return dict(
        mean=running["mean"] + rate * shift, variance=running["variance"] + rate * (variance - running["variance"])
    )

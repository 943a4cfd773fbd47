"""One attention function for every model.  Shapes: B batch, T frames, H heads, E head width."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.models.layers import frame_mask


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    dropout: nn.Dropout | None = None,
    deterministic: bool = True,
) -> jax.Array:
    """Scaled dot-product attention over the valid keys: [B, T, H, E] x 3, int32 [B] or [B, T] -> [B, T, H, E].

    Keys of another segment of a packed row are not valid (`lengths`: see layers.py).  Softmax runs in float32
    whatever the compute dtype.  A frame without any valid key attends evenly and stays finite.
    """
    logits_BxHxTxT = jnp.einsum("bthe,bshe->bhts", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    valid = frame_mask(lengths, k.shape[1])[:, None, None, :]
    if lengths.ndim == 2:
        valid = valid & (lengths[:, None, :, None] == lengths[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(valid, logits_BxHxTxT, jnp.finfo(jnp.float32).min)).astype(v.dtype)
    if dropout is not None:
        weights = dropout(weights, deterministic=deterministic)
    return jnp.einsum("bhts,bshe->bthe", weights, v)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017): [B, T, D], [B] or [B, T] -> [B, T, D]."""

    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, *, train: bool) -> jax.Array:
        B, T, D = x.shape
        init = nn.initializers.normal(0.02)

        def project(name):
            return nn.Dense(D, dtype=self.dtype, kernel_init=init, name=name)

        q, k, v = (project(n)(x).reshape(B, T, self.heads, D // self.heads) for n in ("query", "key", "value"))
        dropout = nn.Dropout(self.dropout) if self.dropout else None
        y = attention(q, k, v, lengths=lengths, dropout=dropout, deterministic=not train)
        return project("out")(y.reshape(B, T, D))

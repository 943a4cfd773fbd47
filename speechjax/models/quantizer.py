"""Vector quantizers.  Shapes: N any leading shape, D input width, G codebooks, V codes a codebook, C code width."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Quantized(NamedTuple):
    """`vectors` [..., C], chosen `codes` int32 [..., G], and `probs` [..., G, V]: softmax without noise."""

    vectors: jax.Array
    codes: jax.Array
    probs: jax.Array


class GumbelQuantizer(nn.Module):
    """Product quantizer with Gumbel-softmax and straight-through gradients (wav2vec 2.0 section 2, equation 1).

    Training adds Gumbel noise and divides by `temperature`; evaluation takes the most likely code.  float32
    throughout: noise and temperature are lost in bfloat16.
    """

    codebooks: int = 2
    codes: int = 320
    dim: int = 256

    @nn.compact
    def __call__(self, x: jax.Array, temperature: jax.Array, *, train: bool) -> Quantized:
        G, V = self.codebooks, self.codes
        dense = nn.Dense(G * V, kernel_init=nn.initializers.normal(1.0), dtype=jnp.float32, name="logits")
        logits = dense(x.astype(jnp.float32)).reshape(*x.shape[:-1], G, V)
        codebook_GxVxC = self.param("codebook", nn.initializers.uniform(1.0), (G, V, self.dim // G))
        probs = jax.nn.softmax(logits)
        if train:
            noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape)
            soft = jax.nn.softmax((logits + noise) / temperature)
            codes = jnp.argmax(soft, axis=-1).astype(jnp.int32)
            # Straight through: the value is one-hot, the gradient that of the soft choice.
            choice = jax.nn.one_hot(codes, V) + (soft - lax.stop_gradient(soft))
        else:
            codes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            choice = jax.nn.one_hot(codes, V)
        vectors = jnp.einsum("...gv,gvc->...gc", choice, codebook_GxVxC)
        return Quantized(vectors.reshape(*x.shape[:-1], self.dim), codes, probs)


def perplexity(mean_probs: jax.Array) -> jax.Array:
    """exp of the entropy, [..., V] -> [...]: the number of codes effectively in use."""
    # Not xlogy: its gradient is NaN where a probability has underflowed to zero.
    log = jnp.log(jnp.maximum(mean_probs, jnp.finfo(mean_probs.dtype).tiny))
    return jnp.exp(-jnp.sum(mean_probs * log, axis=-1))

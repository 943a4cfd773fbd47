"""The random-projection quantizer of BEST-RQ.  Shapes: F features, G codebooks, V codes a codebook, C code width."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.audio.waveform import EXACT
from speechjax.errors import UserError


class RandomQuantizer(nn.Module):
    """Nearest code of a fixed random projection: float [..., F] -> int32 [..., G] (Chiu et al. 2022, section 3.1).

    The projection is Xavier uniform, the codebook standard normal; both are drawn once, from the "params" key of
    `init`, into the collection "frozen": saved with a checkpoint, but neither trained nor decayed.  More than one
    codebook, each with a projection of its own, is USM's (Zhang et al. 2023, section 2.2.2).  Inputs of all zeros
    have code 0.

    Features must have mean zero and about unit variance, or a few codes attract everything (section 3.1).  Raises
    UserError unless all sizes are positive.
    """

    codebooks: int = 1
    codes: int = 8192
    dim: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        G, V, C, F = self.codebooks, self.codes, self.dim, x.shape[-1]
        if min(G, V, C) < 1:
            raise UserError(f"config.task: codebooks={G}, codes={V} and code_dim={C} must be at least 1")
        xavier = nn.initializers.xavier_uniform(batch_axis=(0,))
        draw = lambda init, shape: lambda: init(self.make_rng("params"), shape)  # noqa: E731
        projection_GxFxC = self.variable("frozen", "projection", draw(xavier, (G, F, C))).value
        codebook_GxVxC = self.variable("frozen", "codebook", draw(nn.initializers.normal(1.0), (G, V, C))).value
        x = x.astype(jnp.float32)

        # The distance of unit vectors is 2 - 2 times their product, so the nearest is the largest product: a matrix
        # product instead of [..., V, C] differences.  The input's length scales all products alike.
        def nearest(book):
            projection, codebook = book
            unit = codebook / jnp.linalg.norm(codebook, axis=-1, keepdims=True)
            products = jnp.dot(jnp.dot(x, projection, precision=EXACT), unit.T, precision=EXACT)
            return jnp.argmax(products, axis=-1).astype(jnp.int32)

        # One codebook after the other: only one [..., V] at a time.
        codes = lax.map(nearest, (projection_GxFxC, codebook_GxVxC))
        return lax.stop_gradient(jnp.moveaxis(codes, 0, -1))


def code_counts(codes: jax.Array, valid: jax.Array, size: int) -> jax.Array:
    """How often each code occurs where `valid`: int32 [..., G], bool [...] -> float32 [G, size]."""
    G = codes.shape[-1]
    flat = codes.reshape(-1, G) + size * jnp.arange(G, dtype=jnp.int32)[None]
    weights = jnp.broadcast_to(valid.reshape(-1, 1), flat.shape).astype(jnp.float32)
    return jnp.zeros(G * size, jnp.float32).at[flat].add(weights).reshape(G, size)

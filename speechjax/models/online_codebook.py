"""Codebooks that follow what is assigned to them, without gradients.

Shapes: N any leading shape, K codebooks, V codes, D width.  A codebook is {sums [K, V, D], counts [K, V]}: running
sums of the vectors assigned to each code and how many; the codeword is their quotient.
"""

import jax
import jax.numpy as jnp

Codebook = dict[str, jax.Array]


def new_codebook(key: jax.Array, books: int, codes: int, width: int) -> Codebook:
    """Normal codewords, each feature normalised over the codes of a book; counts of one (DinoSR's published code)."""
    sums = jax.random.normal(key, (books, codes, width))
    sums = sums - jnp.mean(sums, axis=1, keepdims=True)
    sums = sums / jnp.sqrt(jnp.mean(jnp.square(sums), axis=1, keepdims=True) + 1e-5)
    return dict(sums=sums, counts=jnp.ones((books, codes)))


def nearest(codebook: Codebook, book: int, x: jax.Array) -> jax.Array:
    """Code of the codeword next to each vector (Euclidean): float32 [..., D] -> int32 [...]."""
    words_VxD = codebook["sums"][book] / codebook["counts"][book][:, None]
    # Full float32: the fast products of accelerators would assign vectors near a border at random.
    inner = jnp.einsum("...d,vd->...v", x, words_VxD, precision=jax.lax.Precision.HIGHEST)
    half = 0.5 * jnp.sum(jnp.square(words_VxD), axis=1)
    return jnp.argmax(inner - half.reshape((1,) * (x.ndim - 1) + half.shape), axis=-1).astype(jnp.int32)


def assigned_sums(x: jax.Array, chosen: jax.Array) -> Codebook:
    """What one book is given: vectors [B, T, D], one-hot codes [B, T, V] (else 0) -> sums [V, D], counts [V]."""
    return dict(
        sums=jnp.einsum("btv,btd->vd", chosen, x, precision=jax.lax.Precision.HIGHEST),
        counts=jnp.sum(chosen, axis=(0, 1)),
    )


def follow(codebook: Codebook, given: Codebook, decay: float) -> Codebook:
    """Codebook after a batch that gave it `given`: moving averages with `decay`.

    Codes that were given nothing stay as they are, sum and count (DinoSR, arXiv 2305.10005, section 3.2): decayed,
    a code out of use would vanish by and by, and its first new vector would take its place at once.
    """
    keep = jnp.where(given["counts"] > 0, decay, 1.0)
    return dict(
        sums=keep[..., None] * codebook["sums"] + (1 - keep)[..., None] * given["sums"],
        counts=keep * codebook["counts"] + (1 - keep) * given["counts"],
    )

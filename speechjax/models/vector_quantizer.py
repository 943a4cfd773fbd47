"""The vector quantizer of VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937), its codebook a moving average.

Shapes: B batch, T frames, V codes, C width.  A codebook is {sums [V, C], counts [V]}: running sums of the vectors
assigned to each code, and how many (appendix A.1 there).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.audio.waveform import EXACT

Codebook = dict[str, jax.Array]
FIRST_COUNT = 0.01  # so that its first vectors decide where a code is, and codes without any soon die out
SMOOTHING = 1e-5  # Laplace's, of the counts: an unused code is divided by something


class Assigned(NamedTuple):
    """`vectors` [B, T, C], the codewords, their gradient handed to the input; `codes` int32 [B, T]; `distance` [B, T],
    the mean square between input and codeword, whose gradient moves the input alone; `given`, what `follow` takes."""

    vectors: jax.Array
    codes: jax.Array
    distance: jax.Array
    given: Codebook


class VectorQuantizer(nn.Module):
    """Nearest of V codewords: float32 [B, T, C], valid bool [B, T] -> `Assigned` (equations 1 to 3).

    The codebook is the collection "codebook", drawn normal from the "params" key of `init`; it has no gradient, and
    whoever owns this module lets it `follow` what is `given`: vectors of valid frames, summed by code.
    """

    codes: int

    @nn.compact
    def __call__(self, z: jax.Array, valid: jax.Array) -> Assigned:
        V, C = self.codes, z.shape[-1]
        draw = lambda: FIRST_COUNT * jax.random.normal(self.make_rng("params"), (V, C))  # noqa: E731
        book = dict(
            sums=self.variable("codebook", "sums", draw).value,
            counts=self.variable("codebook", "counts", jnp.full, V, FIRST_COUNT).value,
        )
        words_VxC = lax.stop_gradient(codewords(book))
        fixed = lax.stop_gradient(z)
        # Full float32: fast products would assign vectors near a border at random.
        inner = jnp.einsum("btc,vc->btv", fixed, words_VxC, precision=EXACT)
        codes = jnp.argmax(inner - 0.5 * jnp.sum(jnp.square(words_VxC), axis=1)[None, None], axis=2).astype(jnp.int32)
        nearest = words_VxC[codes]
        chosen_BxTxV = jax.nn.one_hot(codes, V) * valid[..., None].astype(jnp.float32)
        given = dict(
            sums=jnp.einsum("btv,btc->vc", chosen_BxTxV, fixed, precision=EXACT),
            counts=jnp.sum(chosen_BxTxV, axis=(0, 1)),
        )
        return Assigned(z + (nearest - fixed), codes, jnp.mean(jnp.square(z - nearest), axis=2), given)


def codewords(book: Codebook) -> jax.Array:
    """The mean of what each code was given, counts smoothed by Laplace's rule: -> [V, C]."""
    counts, V = book["counts"], len(book["counts"])
    total = jnp.sum(counts)
    smoothed = (counts + SMOOTHING) / (total + V * SMOOTHING) * total
    return book["sums"] / smoothed[:, None]


def follow(book: Codebook, given: Codebook, decay: float) -> Codebook:
    """Moving averages of sums and counts (equations 6 and 7)."""
    return {name: decay * book[name] + (1 - decay) * given[name] for name in ("sums", "counts")}


def revive(book: Codebook, key: jax.Array, share: float) -> Codebook:
    """Codes with less than `share` of an even part of the counts are put beside the most used ones and take half.

    The most used code is split first, each once; what is split needs nothing of the batch, so hosts and micro-batches
    agree.  The distance is a hundredth of the codewords' root mean square: any splits a cell in two.  Published
    restarts take a random input instead (Dhariwal et al. 2020, arXiv 2005.00341, section 3.1).
    """
    counts, V = book["counts"], len(book["counts"])
    words = codewords(book)
    dead = counts < share * jnp.sum(counts) / V
    most_used = jnp.argsort(-counts)
    donor = most_used[jnp.maximum(jnp.cumsum(dead.astype(jnp.int32)) - 1, 0)]
    dead = dead & ~dead[donor]  # where more than half are dead, the rest waits
    # One donor to a dead code, so nothing is halved twice; those that are not dead write nowhere.
    halved = {k: x.at[jnp.where(dead, donor, V)].multiply(0.5, mode="drop") for k, x in book.items()}
    spread = jnp.sqrt(jnp.mean(jnp.square(words)))
    beside = words[donor] + 0.01 * spread * jax.random.normal(key, words.shape)
    counts = jnp.where(dead, halved["counts"][donor], halved["counts"])
    return dict(sums=jnp.where(dead[:, None], beside * counts[:, None], halved["sums"]), counts=counts)

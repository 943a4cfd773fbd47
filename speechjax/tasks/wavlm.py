"""WavLM (Chen et al. 2021, arXiv 2110.13900): HuBERT that hears its utterances mixed with others, or with noise.

Shapes: B batch, S samples.
"""

import jax
import jax.numpy as jnp

from speechjax.audio.augment_mixing import colored_noise, mix_utterances
from speechjax.errors import UserError
from speechjax.tasks.hubert import Hubert

NOISES = 8  # drawn a step; with the published probabilities one row in fifty takes one
STEEPEST = 2.0  # noise is between white and brown


class WavLM(Hubert):
    """`Hubert` on rows not packed, mixed by algorithm 1 while it trains; the units to predict stay those of the row.

    With probability `mix_prob` a row gets, over at most half of its length, part of another row at a ratio of -5 to
    5 dB, or with probability `noise_prob` of noise at -5 to 20 dB.  The paper takes noise from recordings; here it is
    generated, Gaussian with a spectrum of power 1 / f ** U(0, 2), so results with `noise_prob` > 0 are not the
    paper's.  The other half of WavLM, its gated relative position bias, is the encoder's (config.model.attention).

    Raises UserError for packed rows: a row is what is mixed.  Randomness: those of `Hubert`, and `mixing`.
    """

    mix_prob: float
    noise_prob: float

    rngs = (*Hubert.rngs, "mixing")

    def heard(self, batch: dict[str, jax.Array], *, train: bool) -> dict[str, jax.Array]:
        """The batch with other audio mixed in; lengths and statistics are the row's own."""
        if "starts" in batch:
            raise UserError("config.task.name=wavlm mixes whole rows, not packed ones; set config.data.fill=False")
        if not train or not self.mix_prob:
            return batch
        audio, lengths = batch["audio"], batch["lengths"]
        row_key, noise_key = jax.random.split(self.make_rng("mixing"))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(row_key, jnp.arange(len(audio), dtype=jnp.int32))
        noise = self._noise(noise_key, audio.shape[1]) if self.noise_prob else None
        mixed, _ = mix_utterances(audio, lengths, keys, prob=self.mix_prob, noise=noise, noise_prob=self.noise_prob)
        return batch | {"audio": mixed}

    def _noise(self, key, samples):
        """Clips of noise [NOISES, samples], and their lengths."""
        color_key, key = jax.random.split(key)
        exponents = jax.random.uniform(color_key, (NOISES,), maxval=STEEPEST)
        return colored_noise(jax.random.split(key, NOISES), samples, exponents), jnp.full(NOISES, samples, jnp.int32)

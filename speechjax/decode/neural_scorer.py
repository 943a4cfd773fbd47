"""A Transformer decoder as a `Scorer`: a language model, or with the frames of an encoder the recogniser itself.

Shapes: B batch, K beams, V vocabulary.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from speechjax.decode.types import SPECIALS
from speechjax.models.decoder import Cache, Memory, TransformerDecoder

BOS, EOS = 1, 2  # <s>, </s> (speechjax.data.text)


class NeuralState(NamedTuple):
    """What was read so far, and the log-probabilities of the next token, float32 [B, K, V]."""

    cache: Cache
    log_probs: jax.Array


@flax.struct.dataclass
class NeuralScorer:
    """Log-probabilities of a decoder with `params`, which hears `memory` (see `listen`); None: a language model.

    Exact: the scores of a sequence's tokens and the final one add up to the log-probability that training computes
    for it.  After `max_tokens` tokens, for which there is room, all others have -inf, and only the end is left.
    """

    decoder: TransformerDecoder = flax.struct.field(pytree_node=False)
    params: Any
    max_tokens: int = flax.struct.field(pytree_node=False)
    memory: Memory | None = None

    @classmethod
    def listening(
        cls, decoder: TransformerDecoder, params: Any, max_tokens: int, frames: jax.Array, lengths: jax.Array
    ) -> "NeuralScorer":
        """Over the frames of an encoder, [B, T, D] of which `lengths` int32 [B] count."""
        memory = decoder.apply({"params": params}, frames, lengths, method="listen")
        return cls(decoder, params, max_tokens, memory)  # type: ignore[arg-type]

    def start(self, rows: int, beams: int) -> NeuralState:
        """After <s>."""
        cache = self.decoder.start(rows, beams, self.max_tokens + 1)
        return self._read(jnp.full((rows, beams), BOS, jnp.int32), cache)

    def _read(self, tokens, cache) -> NeuralState:
        out: Any = self.decoder.apply({"params": self.params}, tokens, cache, self.memory, method="step")
        logits, cache = out
        return NeuralState(cache, jax.nn.log_softmax(logits))

    def scores(self, state: NeuralState) -> jax.Array:
        """float32 [B, K, V], 0 for specials."""
        full = state.cache.position > self.max_tokens
        return jnp.where(full[..., None], -jnp.inf, state.log_probs).at[..., :SPECIALS].set(0.0)

    def advance(self, state: NeuralState, tokens: jax.Array) -> NeuralState:
        """After `tokens` int32 [B, K]; where they are negative nothing changes."""
        new = self._read(tokens, state.cache)
        return NeuralState(new.cache, jnp.where((tokens >= 0)[..., None], new.log_probs, state.log_probs))

    def final(self, state: NeuralState) -> jax.Array:
        """float32 [B, K]: of </s>."""
        return state.log_probs[..., EOS]

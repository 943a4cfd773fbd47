"""The networks of a transducer beside its encoder: predictor and joiner.

Shapes: B batch, T frames, U tokens, D width of the encoder, P of the predictor, J of the joiner, V vocabulary with the
blank, R durations.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.layers import fan_in_uniform

BLANK = 0  # <pad> of every vocabulary; to the predictor it is the beginning
PREDICTORS = ("stateless", "lstm")


class TransducerNetwork(nn.Module):
    """Predictor of the text so far, and joiner of it with a frame (Graves 2012, arXiv 1211.3711, section 2).

    `predictor` "lstm" has `predictor_depth` layers of `predictor_width`, as Graves'.  "stateless" knows the last
    `predictor_depth` tokens: one, by its embedding alone (Ghodsi et al. 2020, "RNN-transducer with stateless prediction
    network", ICASSP), or more, by a convolution over their embeddings and a ReLU (icefall has 2, and groups of
    channels; here all channels mix).

    The joiner is one hidden layer: tanh(W f + P g + b), then logits (Graves, Mohamed and Hinton 2013, arXiv 1303.5778,
    section 3.2).  A token-and-duration transducer (Xu et al. 2023, arXiv 2304.06795) has a logit for each of
    `durations` beside those of the `classes`, with a softmax of their own; () is the plain transducer.  All is float32.

    The parts are methods, so that a search may call them one by one: `frames` and `texts` project into the joiner's
    width, `joint` is what the two meet in, `begin` and `step` are the predictor token by token.
    """

    classes: int
    durations: Sequence[int]
    predictor: str
    predictor_width: int
    predictor_depth: int
    width: int

    def setup(self):
        if self.predictor not in PREDICTORS or self.predictor_depth < 1:
            raise UserError(
                f"config.task.predictor={self.predictor!r} of predictor_depth={self.predictor_depth}: choose from "
                f"{', '.join(PREDICTORS)}, with a depth of at least 1"
            )
        P = self.predictor_width
        self.embedding = nn.Embed(self.classes, P)
        if self.predictor == "lstm":
            self.recurrent = [nn.RNN(nn.OptimizedLSTMCell(P)) for _ in range(self.predictor_depth)]
        elif self.predictor_depth > 1:
            init = fan_in_uniform(P * self.predictor_depth)
            self.convolution = nn.Dense(P, kernel_init=init, bias_init=init)
        self.text_projection = nn.Dense(self.width, use_bias=False, kernel_init=fan_in_uniform(P))
        self.frame_projection = nn.Dense(self.width)
        init = fan_in_uniform(self.width)
        self.kernel = self.param("kernel", init, (self.width, self.classes + len(self.durations)))
        self.bias = self.param("bias", init, (self.classes + len(self.durations),))

    def frames(self, x: jax.Array) -> jax.Array:
        """Frames of the encoder for the joiner: float32 [..., D] -> [..., J]."""
        return self.frame_projection(x)

    def texts(self, tokens: jax.Array) -> jax.Array:
        """What is predicted after 0, 1, ... U tokens, for the joiner: int32 [B, U] -> float32 [B, U + 1, J]."""
        if self.predictor == "lstm":
            x = self.embedding(jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=BLANK))
            for layer in self.recurrent:
                x = jnp.asarray(layer(x))
            return self.text_projection(x)
        U, seen = tokens.shape[1], self.predictor_depth
        before = jnp.pad(tokens, ((0, 0), (seen, 0)), constant_values=BLANK)
        return self._from_window(jnp.stack([before[:, i : i + U + 1] for i in range(seen)], axis=2))

    def _from_window(self, tokens: jax.Array) -> jax.Array:
        """int32 [..., predictor_depth], the last token last -> float32 [..., J]."""
        x = self.embedding(tokens)
        x = x.reshape(*x.shape[:-2], -1)
        return self.text_projection(nn.relu(self.convolution(x)) if self.predictor_depth > 1 else x)

    def begin(self, shape: tuple[int, ...]) -> tuple[Any, jax.Array]:
        """State before the first token, a pytree of arrays [*shape, ...], and float32 [*shape, J] for the joiner."""
        if self.predictor == "lstm":
            zeros = jnp.zeros((*shape, self.predictor_width))
            return self.step([(zeros, zeros)] * self.predictor_depth, jnp.full(shape, BLANK, jnp.int32))
        state = jnp.full((*shape, self.predictor_depth), BLANK, jnp.int32)
        return state, self._from_window(state)

    def step(self, state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        """One more token for every row: state, int32 [...] -> new state, float32 [..., J]."""
        if self.predictor == "lstm":
            x, after = self.embedding(tokens), []
            for layer, carry in zip(self.recurrent, state, strict=True):
                carry, x = layer.cell(carry, x)
                after.append(carry)
            return after, self.text_projection(x)
        state = jnp.concatenate([state[..., 1:], tokens[..., None]], axis=-1)
        return state, self._from_window(state)

    def joint(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """A function without Flax in it, for use inside scans: float32 [..., J] x 2 -> logits [..., V + R]."""
        kernel, bias = self.kernel, self.bias

        def join(frames, texts):
            logits = jnp.tanh(frames + texts) @ kernel
            return logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))

        return join

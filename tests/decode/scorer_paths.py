"""What a scorer gives whole paths, to be compared with what they are worth."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def path_weight(scorer, tokens: np.ndarray) -> np.ndarray:
    """float64 [N]: of paths int32 [N, U], each of which ends where a token is negative, with the end's."""

    def step(state, column):
        ids = column[:, None]
        scores = jnp.take_along_axis(scorer.scores(state), jnp.maximum(ids, 0)[..., None], axis=2)[..., 0]
        return scorer.advance(state, ids), jnp.where(ids < 0, 0.0, scores)

    @jax.jit
    def total(tokens):
        state, scores = jax.lax.scan(step, scorer.start(len(tokens), 1), tokens.T)
        return jnp.sum(scores, axis=0)[:, 0] + scorer.final(state)[:, 0]

    return np.asarray(total(jnp.asarray(tokens)), np.float64)


def all_paths(tokens, longest: int) -> np.ndarray:
    """int32 [N, U]: every sequence of up to so many tokens, then -1."""
    paths = [path for n in range(longest + 1) for path in itertools.product(tokens, repeat=n)]
    return np.array([[*path, *[-1] * (longest - len(path))] for path in paths], np.int32)

"""Evaluators without models: recordings in memory, and a task that answers what a table says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class Encoder:
    """A frame of 160 samples, as labels at 100 Hz have."""

    def frame_len(self):
        return 160, 0

    def tokens(self):
        return 1


class Oracle:
    """A task that answers `answer(batch)`."""

    encoder = Encoder()

    def __init__(self, answer: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]):
        self._answer = answer

    def apply(self, variables: Any, batch: dict[str, jax.Array], *, method: str) -> dict[str, jax.Array]:
        assert method == "answer"
        return self._answer(batch)


def table(**answers: Any) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """{name: row i of its table [N, ...]} for the i-th recording, which `memory_records` writes into its mean."""
    answers = {name.replace("__", "/"): jnp.asarray(x) for name, x in answers.items()}
    return lambda batch: {name: x[batch["mean"].astype(jnp.int32)] for name, x in answers.items()}

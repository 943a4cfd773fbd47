"""What every task has in common: the interface the loop knows, and the pieces most objectives share."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from speechjax.models.encoder import Encoded, SpeechEncoder

Sums = dict[str, tuple[jax.Array, jax.Array]]  # {name: (sum, weight)} over the whole global batch


class Task(nn.Module):
    """A learning problem over one encoder; subclasses define `__call__` and `predict`.

    `__call__(batch, *, step, train)` -> ({loss: (sum, weight)}, {metric: (sum, weight)}): the loop divides each sum by
    its weight once, over the whole global batch, and adds up the losses.  `predict(batch, *, step)` -> what a picture
    shows, by frame: `lengths` [B], perhaps `mask` bool [B, T], and `true`, `predicted` int32 [B, T] (-1: none) or
    `target`, `output` float [B, T, F].

    State beyond parameters is a Flax collection of its own.  It is constant in the forward pass; what `after_step`
    needs of the batch is sown as additive sums into the collection "sums".
    """

    encoder: SpeechEncoder

    rngs = ("dropout", "layerdrop", "mask")  # random streams
    needs = ()  # batch keys beyond audio and lengths
    aligns = False  # whether every token of a transcript takes a frame

    def sizes(self) -> dict[str, tuple[str, int]]:
        """{batch key: (config key, how many classes the model has for it)}: the data may not have more."""
        return {}

    def features(self, batch: dict[str, jax.Array]) -> Encoded:
        """Unmasked features of every layer, for probes: `Encoded` with all hidden states."""
        return self.encoder(batch, train=False, hidden=True)

    def start(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """(params, extra) a new run begins with, from fresh ones or those it continues; called once, outside jit."""
        return params, extra

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """State beyond parameters after an update: new `params`, old `extra`, the batch's `sums` -> new `extra`."""
        return extra

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        return {}


def sow_sum(module: nn.Module, name: str, value: jax.Array) -> None:
    """Hands `value`, a sum over this batch, to `after_step` as sums[name]; micro-batches add up."""
    module.sow("sums", name, value, reduce_fn=lambda a, b: a + b, init_fn=lambda: 0.0)

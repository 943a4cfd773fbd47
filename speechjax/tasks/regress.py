"""Numbers of whole utterances: opinion scores, signal-to-noise ratios, ages.

Shapes: B batch, T frames.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from speechjax.errors import UserError
from speechjax.models.encoder import Encoded
from speechjax.models.layers import frame_mask
from speechjax.tasks import _classes
from speechjax.tasks._base import Sums, sow_sum

LOSSES = {
    "mse": jnp.square,
    "l1": jnp.abs,
    "huber": lambda x: jnp.where(jnp.abs(x) < 1, 0.5 * jnp.square(x), jnp.abs(x) - 0.5),  # Huber 1964, with k = 1
}


class Regress(_classes.PooledHead):
    """Batch of `SpeechEncoder` with numbers -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `label` float32 [B] is the number, NaN for none (config.data.label=number:FIELD).  A linear map of the pooled frames
    (`PooledHead`) predicts it in deviations from the mean of the numbers of all batches before, and `loss`, "mse", "l1"
    or "huber", is that of the deviations: of the unit a number is in nothing depends, and who always says the mean has
    an mse of 1.  Count, mean and sum of squared differences from it are the collection "scale"; the first batch is
    measured by itself.  `mae` is the mean absolute error in the number's unit.
    """

    loss: str

    def setup(self):
        super().setup()
        if self.loss not in LOSSES:
            raise UserError(f"config.task.loss={self.loss!r}: choose from {', '.join(LOSSES)}")
        self.head = _classes.linear(self.pooled_width, 1)
        self.count = self.variable("scale", "count", lambda: jnp.zeros((), jnp.int32))
        self.mean = self.variable("scale", "mean", lambda: jnp.zeros(()))
        self.squares = self.variable("scale", "squares", lambda: jnp.zeros(()))

    def _moments(self, number: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and deviation that outputs are in."""
        n = jnp.sum(there).astype(jnp.float32)
        mean = jnp.sum(number) / jnp.maximum(n, 1)
        variance = jnp.sum(jnp.where(there, jnp.square(number - mean), 0)) / jnp.maximum(n, 1)
        known = self.count.value > 0
        before = self.squares.value / jnp.maximum(self.count.value, 1).astype(jnp.float32)
        mean, variance = jnp.where(known, self.mean.value, mean), jnp.where(known, before, variance)
        return lax.stop_gradient(mean), lax.stop_gradient(_deviation(variance))

    def score(
        self, encoded: Encoded, batch: dict[str, jax.Array], *, step: jax.Array, train: bool
    ) -> tuple[Sums, Sums]:
        number = self.target(batch, "number")
        there = (encoded.lengths > 0) & jnp.isfinite(number)
        number = jnp.where(there, number, 0)
        mean, deviation = self._moments(number, there)
        output, wanted = self.head(self.pool(encoded, train))[:, 0], (number - mean) / deviation
        over = lambda x: jnp.sum(jnp.where(there, x, 0))  # noqa: E731
        n = over(jnp.ones_like(number))
        # Around the mean so far, so that the squares of large numbers do not drown what they differ by.
        off = number - self.mean.value
        for name, value in (("count", n), ("first", over(off)), ("second", over(jnp.square(off)))):
            sow_sum(self, name, value)
        losses = {"regression": (over(LOSSES[self.loss](output - wanted)), n)}
        metrics = {
            "chance_regression": (over(LOSSES[self.loss](wanted)), n),
            "mae": (over(jnp.abs(output - wanted)) * deviation, n),
            "chance_mae": (over(jnp.abs(wanted)) * deviation, n),
            "target_deviation": _spread(wanted, there),
            "output_deviation": _spread(lax.stop_gradient(output), there),
            "labelled_share": (n, jnp.sum(encoded.lengths > 0).astype(jnp.float32)),
        }
        return losses, metrics

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """The numbers of this batch join those before (Chan et al. 1983, The American Statistician 37, section 2)."""
        old, n = extra["scale"], sums["count"]
        before = old["count"].astype(jnp.float32)
        share = n / jnp.maximum(before + n, 1)
        off = sums["first"] / jnp.maximum(n, 1)  # of this batch's mean
        within = jnp.maximum(sums["second"] - n * jnp.square(off), 0)
        scale = {
            "count": old["count"] + jnp.rint(n).astype(jnp.int32),
            "mean": old["mean"] + share * off,
            "squares": old["squares"] + within + jnp.square(off) * before * share,
        }
        return {**extra, "scale": scale}

    def respond(self, encoded: Encoded) -> dict[str, jax.Array]:
        """`value` float32 [B], in the unit of the numbers."""
        variance = self.squares.value / jnp.maximum(self.count.value, 1).astype(jnp.float32)
        output = self.head(self.pool(encoded, train=False))[:, 0]
        return {"value": self.mean.value + _deviation(variance) * output}

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: number and predicted number of the utterance, at each of its frames [B, T, 1]."""
        encoded = self.encode(batch, train=False)
        value, number = self.respond(encoded)["value"], batch[self.label]
        valid = frame_mask(encoded.lengths, encoded.frames.shape[1])
        at_frames = lambda x: jnp.where(valid, x[:, None], 0)[..., None]  # noqa: E731
        target = jnp.where(jnp.isfinite(number), number, self.mean.value)
        return dict(lengths=encoded.lengths, target=at_frames(target), output=at_frames(value))

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        alarms = _classes.unlabelled_alarm(metrics)
        if metrics["target_deviation"] < 0.05:
            alarms["one_number"] = (
                "nearly all numbers of a batch are the same: there is nothing to learn; use another config.data.label, "
                "or even out the source"
            )
        elif step >= 1000:
            if metrics["output_deviation"] < 0.05 * metrics["target_deviation"]:
                alarms["constant_prediction"] = (
                    f"all utterances of a batch get the same number (deviation {metrics['output_deviation']:.3g} of "
                    f"{metrics['target_deviation']:.3g}): pooling or encoder have collapsed; lower "
                    "optim.learning_rate or lengthen optim.warmup"
                )
            alarms |= _classes.stuck_alarm(metrics, "regression")
        return alarms


def _deviation(variance: jax.Array) -> jax.Array:
    """Its root; 1 for numbers that do not differ."""
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1)


def _spread(x: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The deviation of x [B] over rows that are `there`, as a metric."""
    n = jnp.sum(there).astype(jnp.float32)
    mean = jnp.sum(jnp.where(there, x, 0)) / jnp.maximum(n, 1)
    square = jnp.sum(jnp.where(there, jnp.square(x - mean), 0)) / jnp.maximum(n, 1)
    return jnp.sqrt(square), (n > 0).astype(jnp.float32)

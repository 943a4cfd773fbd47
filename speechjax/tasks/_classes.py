"""Heads over whole utterances: one vector of each, and what classes are worth as a guess.

Shapes: B batch, T frames, D width, P the pooled vector's width, V classes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.encoder import Encoded
from speechjax.models.layers import fan_in_uniform, frame_mask
from speechjax.models.pooling import AttentiveStatistics, mean_pool
from speechjax.models.quantizer import perplexity
from speechjax.tasks._base import Sums, sow_sum
from speechjax.tasks._head import Head

KINDS = {
    "class": ("a class", "meta:FIELD or id:REGEX", (jnp.integer, 1)),
    "tags": ("tags", "tags:FIELD", (jnp.floating, 2)),
    "number": ("a number", "number:FIELD", (jnp.floating, 1)),
}


class PooledHead(Head):
    """A head on one vector an utterance, which learns from `label` of the batch.

    Frames pass a linear layer of `projection` units (0: none; SUPERB has 256, Yang et al. 2021, arXiv 2105.01051, in
    its published code) and become a vector by `pooling`: "mean", or "attention", the mean and the deviation, frames
    weighted by a layer of `pooling_hidden` units (Okabe et al. 2018).
    """

    label: str
    projection: int
    pooling: str
    pooling_hidden: int

    poolings = ("mean", "attention")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.label,)

    def setup(self):
        super().setup()
        if self.pooling not in self.poolings:
            raise UserError(f"config.task.pooling={self.pooling!r}: choose from {', '.join(self.poolings)}")
        if self.projection:
            self.project = linear(self.encoder.width, self.projection)
        if self.pooling == "attention":
            self.statistics = AttentiveStatistics(self.pooling_hidden)

    @property
    def pooled_width(self) -> int:
        """P."""
        width = self.projection or self.encoder.width
        return 2 * width if self.pooling == "attention" else width

    def pool(self, encoded: Encoded, train: bool) -> jax.Array:
        """The vector of each utterance, float32 [B, P]."""
        x = self.mix(encoded, train)
        x = self.project(x) if self.projection else x
        return self.statistics(x, encoded.lengths) if self.pooling == "attention" else mean_pool(x, encoded.lengths)

    def target(self, batch: dict[str, jax.Array], kind: str) -> jax.Array:
        """The label, of one of `KINDS`; UserError where the batch has another kind."""
        found = batch[self.label]
        what, how, (dtype, rank) = KINDS[kind]
        if not (jnp.issubdtype(found.dtype, dtype) and found.ndim == rank):
            name = self.label.removeprefix("label").removeprefix("_")
            raise UserError(
                f"config.task.label={self.label!r} must be {what} here: set config.data.label="
                f"{f'{name}=' if name else ''}{how}, or choose the task that suits the label"
            )
        return found


def linear(inputs: int, outputs: int) -> nn.Dense:
    """A linear layer in float32, with a head's initialisation."""
    init = fan_in_uniform(inputs)
    return nn.Dense(outputs, kernel_init=init, bias_init=init, dtype=jnp.float32)


class ClassHead(PooledHead):
    """A head that knows one of `classes` of an utterance, int32 [B], -1 for none, and how frequent they have been.

    A batch holds few labels of many, so its own most frequent one would be a flattering chance level.  Here chance is
    what the labels of all batches before are worth as a guess: their counts are the collection "prior".
    """

    classes: int

    def setup(self):
        super().setup()
        self.seen = self.variable("prior", "counts", lambda: jnp.zeros(self.classes, jnp.int32))

    def sizes(self) -> dict[str, tuple[str, int]]:
        return {self.label: ("config.task.classes", self.classes)}

    def known(self, encoded: Encoded, batch: dict[str, jax.Array]) -> jax.Array:
        """The class of each row, -1 also for rows without a frame."""
        return jnp.where(encoded.lengths > 0, self.target(batch, "class"), -1)

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """The labels of this batch are known from now on."""
        return count_labels(extra, sums)


# ---- what classes are worth


def log_prior(seen: jax.Array) -> jax.Array:
    """How likely the next label is each class, after `seen` int32 [V] of them: log of add-one shares, float32 [V]."""
    return jnp.log1p(seen.astype(jnp.float32)) - jnp.log(jnp.sum(seen).astype(jnp.float32) + len(seen))


def at_label(x: jax.Array, label: jax.Array) -> jax.Array:
    """[B, V] at classes int32 [B] -> [B]; where there is none, at class 0."""
    return jnp.take_along_axis(x, jnp.maximum(label, 0)[:, None], axis=1)[:, 0]


def over_labelled(label: jax.Array, x: jax.Array) -> jax.Array:
    """Sum of x [B] over rows with a class."""
    return jnp.sum(jnp.where(label >= 0, x.astype(jnp.float32), 0))


def class_metrics(
    module: nn.Module, scores: jax.Array, label: jax.Array, lengths: jax.Array, seen: jax.Array
) -> Sums:  # fmt: skip
    """Metrics of any classification [B, V] of rows with a class `label` >= 0; sows how often each class occurs."""
    classes = scores.shape[1]
    n = over_labelled(label, jnp.ones_like(label))
    some = (n > 0).astype(jnp.float32)
    guess = jnp.argmax(scores, axis=1).astype(jnp.int32)
    tally = lambda x: jnp.sum(jax.nn.one_hot(jnp.where(label >= 0, x, -1), classes), axis=0)  # noqa: E731
    frequency = tally(label)
    use = lambda x: (perplexity(x / jnp.maximum(n, 1)) * some, some)  # noqa: E731
    sow_sum(module, "labels", frequency)
    return {
        "accuracy": (over_labelled(label, guess == label), n),
        "chance_accuracy": (over_labelled(label, label == jnp.argmax(seen)), n),
        "target_perplexity": use(frequency),
        "prediction_perplexity": use(tally(guess)),
        "labelled_share": (n, jnp.sum(lengths > 0).astype(jnp.float32)),
    }


def count_labels(extra: Any, sums: Any) -> Any:
    """`extra` once the labels that `class_metrics` has sown are known."""
    counts = extra["prior"]["counts"] + jnp.rint(sums["labels"]).astype(jnp.int32)
    return {**extra, "prior": {**extra["prior"], "counts": counts}}


def spread(x: jax.Array, lengths: jax.Array, frames: int) -> jax.Array:
    """What holds for a row at each of its frames, for pictures: [B] -> int32 [B, T], -1 in the padding."""
    return jnp.where(frame_mask(lengths, frames), x.astype(jnp.int32)[:, None], -1)


def unlabelled_alarm(metrics: Mapping[str, float]) -> dict[str, str]:
    """The alarm for labels that most rows do not have."""
    if not metrics["labelled_share"] < 0.25:
        return {}
    return dict(
        unlabelled=f"only {metrics['labelled_share']:.0%} of the rows have a label, the others teach nothing: does "
        "config.data.label fit this source?"
    )


def stuck_alarm(metrics: Mapping[str, float], loss: str) -> dict[str, str]:
    """The alarm for a loss that is that of a constant guess; to be asked from some hundred updates on."""
    if not metrics[loss] > 0.98 * metrics[f"chance_{loss}"]:
        return {}
    return dict(
        stuck_at_chance=f"loss {metrics[loss]:.3f} is no better than a constant guess, "
        f"{metrics[f'chance_{loss}']:.3f}: can the label be heard? Then check the learning rate"
    )


def class_alarms(metrics: Mapping[str, float], step: int, loss: str) -> dict[str, str]:
    """Known ways a classification fails, {alarm: message}, from one log window's metrics."""
    alarms = unlabelled_alarm(metrics)
    true, guessed = metrics["target_perplexity"], metrics["prediction_perplexity"]
    if true < 1.2:
        alarms["one_class"] = (
            f"nearly all labels of a batch are the same (perplexity {true:.2f}): there is nothing to learn; use "
            "another config.data.label, or even out the source"
        )
    elif step >= 1000:
        if guessed < 1 + 0.1 * (true - 1):
            alarms["constant_prediction"] = (
                f"all utterances of a batch get the same class (perplexity {guessed:.2f} of {true:.2f}): pooling "
                "or encoder have collapsed; lower optim.learning_rate or lengthen optim.warmup"
            )
        alarms |= stuck_alarm(metrics, loss)
    return alarms

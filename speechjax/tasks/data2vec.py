"""data2vec (Baevski et al. 2022, arXiv 2202.03555): regression on what a moving average sees in the whole utterance.

Shapes: B batch, T frames, C feature channels, D width.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.ema import (
    ema,
    ema_rate,
    instance_norm,
    mean_deviation,
    new_teacher,
    teacher_layers,
    time_variation,
    tracked,
)
from speechjax.models.layers import fan_in_uniform, frame_mask
from speechjax.models.masking import span_mask
from speechjax.tasks._base import Sums, Task


class Data2Vec(Task):
    """Batch of `SpeechEncoder`, packed or not -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    The target of a masked frame is the mean of the teacher's last `target_layers` feed-forward outputs, each before
    its residual sum and normalised over the utterance's frames (section 3.3).  The loss of a frame is the squared
    distance divided by sqrt(D), as published.

    The teacher is the student's transformer, averaged over updates in float32; the front end, the projection and the
    convolutions that encode positions are the student's own (section 3.2).  It lives in the collection "teacher",
    starts as a copy of the student and follows after every update with a decay that rises from `ema_start` to
    `ema_end` over `ema_steps` updates.
    """

    mask_prob: float
    mask_span: int
    target_layers: int
    ema_start: float
    ema_end: float
    ema_steps: int

    own_positions = False  # whether the teacher averages these too

    def setup(self):
        self.check_layers()
        init = fan_in_uniform(self.encoder.width)
        self.head = nn.Dense(self.encoder.width, kernel_init=init, bias_init=init, dtype=jnp.float32)

    def check_layers(self) -> None:
        """Raises UserError where the encoder has fewer layers than targets are made of."""
        if not 0 < self.target_layers <= self.encoder.layers:
            raise UserError(
                f"config.task.target_layers={self.target_layers}: config.model.layers={self.encoder.layers} has "
                "1 to that many"
            )

    def teacher_rate(self, step: jax.Array) -> jax.Array:
        """1 - decay of the teacher in the update after `step` others."""
        return ema_rate(step + 1, schedule="linear", start=self.ema_start, end=self.ema_end, steps=self.ema_steps)

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        out = self._regress(batch, train)
        output, target = out["output"], out["target"]
        weight = out["mask"].astype(jnp.float32)
        n = jnp.sum(weight)
        # The mean target of the batch is the best answer of who has seen nothing.
        mean = jnp.einsum("btd,bt->d", target, weight) / jnp.maximum(n, 1)
        one = jnp.ones(())
        losses = {"regression": (self._distance(output - target, weight), n)}
        metrics = {
            "chance_regression": (self._distance(target - mean[None, None], weight), n),
            "target_variance": (mean_deviation(target, weight), one),
            "prediction_variance": (mean_deviation(jax.lax.stop_gradient(output), weight), one),
            "feature_variation": out["variation"],
            "teacher_rate": (self.teacher_rate(step), one),
            "masked_share": (n, out["frames"]),
        }
        return losses, metrics

    def _distance(self, difference, weight):
        """Sum over frames of weight 1 of the loss of each: [B, T, D], [B, T] -> []."""
        return jnp.sum(jnp.sum(jnp.square(difference), axis=2) * weight) / math.sqrt(difference.shape[2])

    def _regress(self, batch, train) -> dict[str, Any]:
        """Outputs and targets of all frames, float32 [B, T, D], and what else metrics and pictures are made of."""
        features, lengths = self.encoder.extract(batch)
        T, segments = features.shape[1], segments_of(batch)
        features = self.encoder.feature_norm(features)
        variation = time_variation(self.encoder.projection(features), lengths, segments)
        mask = span_mask(self.make_rng("mask"), lengths, T, prob=self.mask_prob, span=self.mask_span)
        frames = self.encoder.contextualize(features, lengths, mask=mask, train=train).frames
        return dict(
            mask=mask, lengths=lengths, variation=variation,
            frames=jnp.sum(frame_mask(lengths, T)).astype(jnp.float32),
            output=self.head(frames.astype(jnp.float32)),
            target=self._targets(features, lengths, segments),
        )  # fmt: skip

    @nn.compact  # the teacher is a copy of what the student has drawn before
    def _targets(self, features, lengths, segments):
        """The teacher's answer for every frame: [B, T, C] -> float32 [B, T, D].  After the student has been called."""
        student = self.encoder.variables["params"]["transformer"]
        teacher = self.variable("teacher", "transformer", lambda: tracked(student, positions=self.own_positions))
        layers = teacher_layers(self.encoder, teacher.value, features, lengths)[-self.target_layers :]
        return sum(instance_norm(x, lengths, segments) for x in layers) / len(layers)

    def start(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """The teacher is a copy of the student that the run begins with, be it another run's."""
        teacher = new_teacher(params["encoder"]["transformer"], positions=self.own_positions)
        return params, {**extra, "teacher": {"transformer": teacher}}

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """The teacher follows the updated student."""
        student = tracked(params["encoder"]["transformer"], positions=self.own_positions)
        teacher = ema(extra["teacher"]["transformer"], student, self.teacher_rate(step))
        return {**extra, "teacher": {"transformer": teacher}}

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: targets and outputs [B, T, D]."""
        out = self._regress(batch, train=False)
        return {name: out[name] for name in ("lengths", "mask", "target", "output")}

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        alarms = {}
        if metrics["target_variance"] < 0.1:
            alarms["target_collapse"] = (
                f"targets vary by {metrics['target_variance']:.3f} (published limit 0.1): the teacher says the same of "
                "every frame; lower optim.learning_rate or raise task.ema_start"
            )
        if step >= 1000 and metrics["prediction_variance"] < 0.01:
            alarms["prediction_collapse"] = (
                f"predictions vary by {metrics['prediction_variance']:.4f} (published limit 0.01): the student says "
                "the same of every frame; lower optim.learning_rate or lengthen optim.warmup"
            )
        alarms |= front_end_alarm(metrics)
        if step >= 1000 and metrics["regression"] > 0.98 * metrics["chance_regression"]:
            alarms["stuck_at_chance"] = (
                f"loss {metrics['regression']:.3f} is that of the mean target, {metrics['chance_regression']:.3f}: "
                "nothing learnt yet; check the audio, then optim.learning_rate"
            )
        return alarms


def segments_of(batch: dict[str, jax.Array]) -> int:
    """How many utterances a row of the batch may hold."""
    return batch["starts"].shape[1] if "starts" in batch else 1


def front_end_alarm(metrics: Mapping[str, float]) -> dict[str, str]:
    """The collapse that targets normalised over time hide, for they blow up what is left (fairseq issue 5239)."""
    if not metrics["feature_variation"] < 0.01:
        return {}
    return dict(
        front_end_collapse=f"only {metrics['feature_variation']:.2%} of what teacher and student see varies within "
        "an utterance: front end or projection have become constant, while the targets are normalised and look fine; "
        "lower optim.learning_rate, lengthen optim.warmup or freeze them (optim.freeze), and begin again"
    )

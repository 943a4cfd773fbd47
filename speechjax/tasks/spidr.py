"""SpidR (arXiv 2512.20308) and DinoSR (Liu et al. 2023, arXiv 2305.10005): labels are codes of a teacher's layers.

Shapes: B batch, T frames, C feature channels, D width, K codebooks, V codes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.ema import ema, ema_rate, instance_norm, new_teacher, teacher_layers, time_variation, tracked
from speechjax.models.layers import fan_in_uniform, frame_mask
from speechjax.models.masking import span_mask
from speechjax.models.online_codebook import assigned_sums, follow, nearest, new_codebook
from speechjax.models.quantizer import perplexity
from speechjax.tasks._base import Sums, Task, sow_sum
from speechjax.tasks.data2vec import front_end_alarm, segments_of


class SpidR(Task):
    """Batch of `SpeechEncoder`, packed or not -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    Each of the teacher's last `codebooks` layers has an online codebook of `codes` vectors.  The label of a masked
    frame is the code next to that layer's feed-forward output (before its residual sum, normalised over the utterance's
    frames), and a linear head per codebook predicts it.  With `same_layer` (SpidR) the head reads the student's
    feed-forward output of the layer that the codebook belongs to, without (DinoSR) the student's last frame.  The
    loss of a frame is the mean cross-entropy over the codebooks.

    After every update the codebooks move by `code_decay` towards what they were given, over the whole global batch,
    and the teacher, whose parts are those of `Data2Vec`, towards the student (`ema_rate` with `ema_schedule`,
    `ema_start`, `ema_end`, `ema_steps`); from update `teacher_until` on (-1: never) it stands still.
    """

    mask_prob: float
    mask_span: int
    codebooks: int
    codes: int
    code_decay: float
    same_layer: bool
    ema_schedule: str
    ema_start: float
    ema_end: float
    ema_steps: int
    teacher_until: int

    def setup(self):
        if not 0 < self.codebooks <= self.encoder.layers:
            raise UserError(
                f"config.task.codebooks={self.codebooks}: config.model.layers={self.encoder.layers} has 1 to that many"
            )
        if not 0 < self.code_decay < 1:
            raise UserError(f"config.task.code_decay={self.code_decay}: must be between 0 and 1")
        K, V, D = self.codebooks, self.codes, self.encoder.width
        init = fan_in_uniform(D)
        self.head_kernel = self.param("head_kernel", init, (K, D, V))
        self.head_bias = self.param("head_bias", init, (K, V))

    def teacher_rate(self, step: jax.Array) -> jax.Array:
        """1 - decay of the teacher in the update after `step` others."""
        rate = ema_rate(
            step + 1, schedule=self.ema_schedule, start=self.ema_start, end=self.ema_end, steps=self.ema_steps
        )
        return rate if self.teacher_until < 0 else jnp.where(step < self.teacher_until, rate, 0.0)

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        features, lengths, segments = self._features(batch)
        features = self.encoder.feature_norm(features)
        variation = time_variation(self.encoder.projection(features), lengths, segments)
        mask = self._mask(features, lengths)
        weight = mask.astype(jnp.float32)
        n, K = jnp.sum(weight), self.codebooks

        totals: dict[str, Any] = dict.fromkeys(
            ("loss", "correct", "best_guess", "target_entropy", "target_perplexity", "prediction_perplexity", "unused"),
            jnp.zeros(()),
        )
        given = []
        logits = self._logits(features, lengths, mask=mask, train=train)
        for targets, codes, logits_BxTxV in zip(*self._codes(features, lengths, segments), logits, strict=True):
            chosen_BxTxV = jax.nn.one_hot(codes, self.codes) * weight[..., None]
            given.append(assigned_sums(targets, chosen_BxTxV))
            for name, value in self._judge(chosen_BxTxV, logits_BxTxV, weight).items():
                totals[name] = totals[name] + value / K
        for name in ("sums", "counts"):
            sow_sum(self, f"code_{name}", jnp.stack([book[name] for book in given]))

        one = jnp.ones(())
        losses = {"prediction": (totals["loss"], n)}
        metrics = {
            "chance_prediction": (totals["target_entropy"] * n, n),
            "accuracy": (totals["correct"], n),
            "chance_accuracy": (totals["best_guess"], n),
            "target_perplexity": (totals["target_perplexity"], one),
            "prediction_perplexity": (totals["prediction_perplexity"], one),
            "unused_codes": (totals["unused"], one),
            "feature_variation": variation,
            "teacher_rate": (self.teacher_rate(step), one),
            "masked_share": (n, jnp.sum(frame_mask(lengths, mask.shape[1])).astype(jnp.float32)),
        }
        return losses, metrics

    def _judge(self, chosen_BxTxV, logits_BxTxV, weight) -> dict[str, jax.Array]:
        """Loss and monitors of one codebook: one-hot labels (0 where not masked), logits, mask as a float."""
        share = lambda count: count / jnp.maximum(jnp.sum(count), 1)  # noqa: E731
        counts = jnp.sum(chosen_BxTxV, axis=(0, 1))
        answer = jax.nn.one_hot(jnp.argmax(logits_BxTxV, axis=-1), self.codes) * weight[..., None]
        target_perplexity = perplexity(share(counts))
        return dict(
            loss=-jnp.sum(chosen_BxTxV * jax.nn.log_softmax(logits_BxTxV)),
            correct=jnp.sum(chosen_BxTxV * answer),
            best_guess=jnp.max(counts),
            # The loss of who knows how frequent the codes are, but nothing of the frame.
            target_entropy=jnp.log(target_perplexity),
            target_perplexity=target_perplexity,
            prediction_perplexity=perplexity(share(jnp.sum(answer, axis=(0, 1)))),
            unused=jnp.mean((counts == 0).astype(jnp.float32)),
        )

    def _features(self, batch):
        features, lengths = self.encoder.extract(batch)
        return features, lengths, segments_of(batch)

    def _mask(self, features, lengths):
        return span_mask(
            self.make_rng("mask"), lengths, features.shape[1], prob=self.mask_prob, span=self.mask_span
        )  # fmt: skip

    def _logits(self, features, lengths, *, mask, train) -> list[jax.Array]:
        """The student's answer for every codebook: [B, T, C] -> K times float32 [B, T, V]."""
        student = self.encoder.contextualize(features, lengths, mask=mask, train=train, hidden="mlp")
        layers = student.hidden[-self.codebooks :] if self.same_layer else [student.frames] * self.codebooks
        return [
            jnp.einsum("btd,dv->btv", x.astype(jnp.float32), self.head_kernel[k]) + self.head_bias[k][None, None]
            for k, x in enumerate(layers)
        ]

    @nn.compact  # the teacher is a copy of what the student has drawn before
    def _codes(self, features, lengths, segments) -> tuple[list[jax.Array], list[jax.Array]]:
        """The teacher's layers [B, T, D] and their codes int32 [B, T], K each.  After the student has been called."""
        student = self.encoder.variables["params"]["transformer"]
        teacher = self.variable("teacher", "transformer", lambda: tracked(student, positions=False))
        shape = (self.codebooks, self.codes, self.encoder.width)
        books = self.variable("codebook", "books", lambda: new_codebook(self.make_rng("params"), *shape)).value
        layers = teacher_layers(self.encoder, teacher.value, features, lengths)[-self.codebooks :]
        layers = [instance_norm(x, lengths, segments) for x in layers]
        return layers, [nearest(books, k, x) for k, x in enumerate(layers)]

    def start(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """The teacher is a copy of the student that the run begins with, be it another run's."""
        teacher = new_teacher(params["encoder"]["transformer"], positions=False)
        return params, {**extra, "teacher": {"transformer": teacher}}

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """The codebooks follow the batch, the teacher the updated student."""
        student = tracked(params["encoder"]["transformer"], positions=False)
        teacher = ema(extra["teacher"]["transformer"], student, self.teacher_rate(step))
        given = dict(sums=sums["code_sums"], counts=sums["code_counts"])
        books = follow(extra["codebook"]["books"], given, self.code_decay)
        return {**extra, "teacher": {"transformer": teacher}, "codebook": {"books": books}}

    def units(self, batch: dict[str, jax.Array], *, codebook: int = -1) -> jax.Array:
        """The student's discrete units of unmasked speech, int32 [B, T], -1 outside utterances.

        `codebook` counts among the K, from the first of the layers that have one.
        """
        features, lengths, _ = self._features(batch)
        features = self.encoder.feature_norm(features)
        codes = jnp.argmax(self._logits(features, lengths, mask=None, train=False)[codebook], axis=-1)
        return jnp.where(frame_mask(lengths, codes.shape[1]), codes.astype(jnp.int32), -1)

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: true and predicted codes of the last codebook, int32 [B, T], -1 where not masked."""
        features, lengths, segments = self._features(batch)
        features = self.encoder.feature_norm(features)
        mask = self._mask(features, lengths)
        logits = self._logits(features, lengths, mask=mask, train=False)[-1]
        _, codes = self._codes(features, lengths, segments)
        masked = lambda c: jnp.where(mask, c.astype(jnp.int32), -1)  # noqa: E731
        return dict(lengths=lengths, mask=mask, true=masked(codes[-1]), predicted=masked(jnp.argmax(logits, axis=-1)))

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        alarms = {}
        if metrics["target_perplexity"] < max(2.0, 0.02 * self.codes):
            alarms["codebook_collapse"] = (
                f"target perplexity {metrics['target_perplexity']:.1f} of {self.codes} codes: nearly all frames have "
                "the same code, so the task has become trivial; lower optim.learning_rate or raise task.ema_start"
            )
        elif step >= 1000 and metrics["prediction_perplexity"] < 2.0:
            alarms["prediction_collapse"] = (
                f"the student answers {metrics['prediction_perplexity']:.1f} codes where the targets have "
                f"{metrics['target_perplexity']:.1f}: it is constant; lower optim.learning_rate or lengthen "
                "optim.warmup"
            )
        alarms |= front_end_alarm(metrics)
        if step >= 1000 and metrics["prediction"] > 0.98 * metrics["chance_prediction"]:
            alarms["stuck_at_chance"] = (
                f"loss {metrics['prediction']:.3f} is the entropy of the codes, {metrics['chance_prediction']:.3f}: "
                "nothing learnt yet; check the audio, then optim.learning_rate"
            )
        return alarms

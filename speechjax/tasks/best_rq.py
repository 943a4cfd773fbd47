"""BEST-RQ (Chiu et al. 2022, arXiv 2202.01855): masked prediction of codes that a frozen random projection gives.

Shapes: B batch, S samples, N frames of 10 ms, F features, k frames stacked, T = N // k, G codebooks, V codes, D width.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.audio.augment_mixing import colored_noise, mix_utterances
from speechjax.errors import UserError
from speechjax.models.layers import fan_in_uniform, frame_mask
from speechjax.models.quantizer import perplexity
from speechjax.models.random_quantizer import RandomQuantizer, code_counts
from speechjax.models.spectral import stack_frames
from speechjax.tasks._base import Sums, Task


class BestRQ(Task):
    """Batch of a `SpeechEncoder` with a spectral front end -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    Every frame of 10 ms begins a span of `mask_span` with probability `mask_prob`; masked frames become noise of
    standard deviation `noise_std` before the encoder subsamples them (section 3.1).  The targets of a stacked frame,
    `subsampling()` frames of the clean input side by side, are its codes in `codebooks` frozen random quantizers (one
    as published; USM, arXiv 2303.01037, has 16); the loss is the mean of their cross-entropies.  It is taken where at
    least the share `masked_share_needed` of the frames stacked is masked, and divided by the global number of those.
    Front ends want subsample="conv", as published: the layer norm after "stack" makes the noise as loud as speech.

    NEST (arXiv 2408.13106) mixes into a row, with probability `mixing`, part of another one, or with probability
    `mixing_noise` of generated pink noise (its own are recordings); the targets stay those of the clean row.  Only
    in training.  Randomness: streams `mask`, `mixing`, `dropout`, `layerdrop`.

    Raises UserError for packed rows, for front ends without frames to mask, and for values out of range.
    """

    mask_prob: float
    mask_span: int
    masked_share_needed: float
    noise_std: float
    codebooks: int
    codes: int
    code_dim: int
    mixing: float
    mixing_noise: float

    rngs = ("dropout", "layerdrop", "mask", "mixing")

    def setup(self):
        self.quantizer = RandomQuantizer(self.codebooks, self.codes, self.code_dim)
        self.heads = Heads(self.codebooks, self.codes)

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        out = self._predict(batch, train)
        masked, valid, targets = out["masked"], out["valid"], out["targets"]
        G, V = self.codebooks, self.codes
        n = jnp.sum(masked).astype(jnp.float32)
        correct = jnp.where(masked[..., None], out["guesses"] == targets, False)
        mean = lambda counts: counts / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1)  # noqa: E731
        wanted_GxV = mean(code_counts(targets, masked, V))
        one = jnp.ones(())
        metrics = {
            "accuracy": (jnp.sum(correct).astype(jnp.float32), n * G),
            # Of the best constant answers: one code, and one distribution over codes.
            "chance_accuracy": (jnp.mean(jnp.max(wanted_GxV, axis=1)) * n, n),
            "chance_prediction": (jnp.mean(jnp.log(perplexity(wanted_GxV))) * n, n),
            "target_perplexity": (jnp.mean(perplexity(mean(code_counts(targets, valid, V)))), one),
            "prediction_perplexity": (jnp.mean(perplexity(mean(code_counts(out["guesses"], masked, V)))), one),
            "masked_share": (n, jnp.sum(valid).astype(jnp.float32)),
        }
        return {"prediction": (jnp.sum(jnp.where(masked, out["loss"], 0)), n)}, metrics

    def _predict(self, batch, train) -> dict[str, jax.Array]:
        """Loss [B, T], targets and guesses [B, T, G], and which frames are `valid` and `masked` [B, T]."""
        self._check()
        k = self.encoder.subsampling()
        clean, lengths = self.encoder.inputs(batch)
        mask_key, noise_key = jax.random.split(self.make_rng("mask"))
        hidden = bernoulli_spans(mask_key, lengths, clean.shape[1], prob=self.mask_prob, span=self.mask_span)

        stacked, frames = stack_frames(clean, lengths, k)
        targets = self.quantizer(stacked)
        masked = stacked_mask(hidden, frames, k, self.masked_share_needed)

        x = self.encoder.inputs(self._mix(batch))[0] if train and self.mixing else clean
        noise = self.noise_std * jax.random.normal(noise_key, x.shape)
        features, lengths = self.encoder.embed(jnp.where(hidden[..., None], noise, x), lengths)
        context = self.encoder.contextualize(self.encoder.feature_norm(features), lengths, train=train)
        loss, guesses = self.heads(context.frames.astype(jnp.float32), targets)
        valid = frame_mask(lengths, stacked.shape[1])
        return dict(loss=loss, guesses=guesses, targets=targets, masked=masked, valid=valid, lengths=lengths)

    def _mix(self, batch):
        """The batch with parts of other rows, or noise, on parts of some of its rows."""
        audio, lengths = batch["audio"], batch["lengths"]
        key = self.make_rng("mixing")
        rows = jnp.arange(len(audio), dtype=jnp.int32)
        mix_keys, noise_keys = (
            jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, i), rows) for i in range(2)
        )
        noise = None
        if self.mixing_noise:
            samples = audio.shape[1]
            noise = colored_noise(noise_keys, samples, 1.0), jnp.full_like(lengths, samples)
        mixed, _ = mix_utterances(audio, lengths, mix_keys, prob=self.mixing, noise=noise, noise_prob=self.mixing_noise)
        return batch | {"audio": mixed}

    def _check(self):
        shares = dict(mask_prob=self.mask_prob, mixing=self.mixing, mixing_noise=self.mixing_noise)
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise UserError(f"config.task.{name}={value}: must be a probability from 0 to 1")
        if not 0 < self.masked_share_needed <= 1 or self.mask_span < 1:
            raise UserError(
                f"config.task: masked_share_needed={self.masked_share_needed} must be above 0 and at most 1, "
                f"mask_span={self.mask_span} at least 1"
            )

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows, by frame [B, T], of the first codebook: all targets, and guesses where masked."""
        out = self._predict(batch, train=False)
        return dict(
            mask=out["masked"],
            lengths=out["lengths"],
            true=jnp.where(out["valid"], out["targets"][..., 0], -1),
            predicted=jnp.where(out["masked"], out["guesses"][..., 0], -1),
        )

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        alarms = {}
        # Of speech, normalised, 64 codes have a perplexity of 20 and 8192 one of 100 to 500; not normalised, 1 to 4.
        if metrics["target_perplexity"] < min(6.0, self.codes / 4):
            alarms["codebook_collapse"] = (
                f"target perplexity {metrics['target_perplexity']:.1f} of {self.codes}: nearly all frames have the "
                "same code, as they do where the input is not normalised; set model.frontend.normalize=utterance, "
                "and check that the audio is not silent"
            )
        if alarms or step < 1000 or not metrics["masked_share"]:
            return alarms
        if metrics["prediction_perplexity"] < max(1.5, 0.1 * metrics["target_perplexity"]) and (
            metrics["prediction"] > 0.95 * metrics["chance_prediction"]
        ):
            alarms["constant_prediction"] = (
                f"predictions have a perplexity of {metrics['prediction_perplexity']:.1f}, targets of "
                f"{metrics['target_perplexity']:.1f}, and the loss {metrics['prediction']:.3f} is that of one answer "
                "for all frames: the encoder has collapsed; lower optim.learning_rate or lengthen optim.warmup"
            )
        elif metrics["prediction"] > 0.98 * metrics["chance_prediction"] and (
            metrics["accuracy"] < 1.1 * metrics["chance_accuracy"]
        ):
            alarms["stuck_at_chance"] = (
                f"loss {metrics['prediction']:.3f} is at its chance level {metrics['chance_prediction']:.3f}: nothing "
                "learnt yet; raise optim.learning_rate, and lower task.mask_prob if little is left to predict from"
            )
        return alarms


class Heads(nn.Module):
    """A softmax over V codes for each of G codebooks: [B, T, D], targets [B, T, G] -> loss [B, T], guesses [B, T, G].

    The loss is the mean of the codebooks' cross-entropies.  On all frames, not masked slots: a row may be masked
    nearly whole, so slots that never overflow are all frames, and the heads are 1.5 % of a published encoder's work.
    Their logits would be large, though: those of one codebook exist at a time, and again in the backward pass.
    """

    codebooks: int
    codes: int

    @nn.compact
    def __call__(self, x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        G, V, D = self.codebooks, self.codes, x.shape[-1]
        kernel_GxDxV = self.param("kernel", fan_in_uniform(D), (G, D, V))
        bias_GxV = self.param("bias", nn.initializers.zeros, (G, V))

        @jax.checkpoint
        def one(head):
            kernel, bias, target_BxT = head
            logits_BxTxV = x @ kernel + bias[None, None]
            picked = jnp.take_along_axis(logits_BxTxV, target_BxT[..., None], axis=2)[..., 0]
            guess = jnp.argmax(logits_BxTxV, axis=2).astype(jnp.int32)
            return jax.nn.logsumexp(logits_BxTxV, axis=2) - picked, guess

        losses, guesses = lax.map(one, (kernel_GxDxV, bias_GxV, jnp.moveaxis(targets, -1, 0)))
        return jnp.mean(losses, axis=0), jnp.moveaxis(guesses, 0, -1)


def bernoulli_spans(key: jax.Array, lengths: jax.Array, frames: int, *, prob: float, span: int) -> jax.Array:
    """Spans of `span` frames, each frame of an utterance a start with probability `prob`: int32 [B] -> bool [B, N].

    Section 4 of the paper: unlike wav2vec 2.0's spans they are independent, so their number varies, none is possible,
    and the last one ends with its utterance.  Every utterance draws its own, over its own length.  One that would be
    masked whole is not masked at all: nothing would be left to predict from.
    """
    valid = frame_mask(lengths, frames)
    start = jax.random.bernoulli(key, prob, valid.shape) & valid
    begun = jnp.cumsum(start.astype(jnp.int32), axis=1)
    ended = jnp.pad(begun, ((0, 0), (span, 0)))[:, :frames]
    mask = (begun > ended) & valid
    return mask & jnp.any(valid & ~mask, axis=1, keepdims=True)


def stacked_mask(mask: jax.Array, lengths: jax.Array, factor: int, share: float) -> jax.Array:
    """Which stacked frames count as masked: bool [B, N], int32 [B] of stacked frames -> bool [B, N // factor].

    Those of whose `factor` frames at least `share` are masked: NeMo asks for 0.8, WeNet for all.
    """
    B, N = mask.shape
    T = N // factor
    count = jnp.sum(mask[:, : T * factor].reshape(B, T, factor), axis=2)
    least = math.ceil(share * factor - 1e-6)  # 0.8 * 5 is 4, whatever float says
    return (count >= least) & frame_mask(lengths, T)

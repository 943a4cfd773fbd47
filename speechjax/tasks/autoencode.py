"""Autoencoders of the waveform or of spectral frames, with a narrow or a discrete middle (VQ-VAE, arXiv 1711.00937).

Shapes: B batch, S samples, N frames of 10 ms, F features of one, k frames stacked, T encoder frames, C width of the
middle, V codes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.audio.spectrum import hann, stft
from speechjax.audio.waveform import valid_samples
from speechjax.errors import UserError
from speechjax.models.deconv import FrameDecoder, WaveformDecoder
from speechjax.models.ema import mean_deviation
from speechjax.models.encoder import Encoded
from speechjax.models.layers import fan_in_uniform, frame_mask
from speechjax.models.vector_quantizer import VectorQuantizer, follow, revive
from speechjax.tasks._base import Sums, sow_sum
from speechjax.tasks._contrastive import codebook_perplexity
from speechjax.tasks._frames import FrameTask, batch_mean, constant_output_alarm

RESOLUTIONS = (256, 512, 1024)  # samples in a window of a spectrum, four windows over each sample
FLOOR = 1e-5  # of a spectrum's power, white noise of the waveform's root mean square having 1


class Autoencode(FrameTask):
    """Batch of `SpeechEncoder` -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    Frames of the encoder (of its front end alone where `model.layers=0`) become `bottleneck` numbers by a linear map.
    With `codes` (0: none) these are replaced by the nearest of that many codewords: their gradient passes straight
    through, the loss has `commitment` times the mean square between the two, the codebook follows with `code_decay`,
    and codes with less than `revive_below` of an even share of the frames are put elsewhere (`revive`; 0: never).

    A waveform front end is mirrored by transposed convolutions.  The loss is the mean absolute difference of log
    magnitude spectra at three resolutions, where phases do not count, plus `waveform_weight` times that of the
    samples.  Each row has unit root mean square first: no front end with a norm over time could know its loudness.
    A spectral front end is answered by its own frames, before subsampling; the loss is their mean squared error.

    Chance is the mean spectrum, or frame, of the batch, and silence.  Raises UserError for packed rows, for front
    ends of patches, and for a `waveform_weight` where there is no waveform.
    """

    bottleneck: int
    codes: int
    commitment: float
    code_decay: float
    revive_below: float
    waveform_weight: float

    rngs = ("dropout", "layerdrop")

    @property
    def of_waveform(self) -> bool:
        return self.encoder.frontend["name"] == "waveform"

    def setup(self):
        encoder, dtype = self.encoder, jnp.dtype(self.encoder.dtype)
        name = encoder.frontend["name"]
        if name == "patch":
            raise UserError("config.model.frontend.name='patch' has no frames to give back: choose waveform, mel, mfcc")
        if self.waveform_weight and not self.of_waveform:
            raise UserError(
                f"config.task.waveform_weight={self.waveform_weight}: config.model.frontend.name={name!r} is answered "
                "by frames, not by a waveform; set it to 0"
            )
        front = encoder.front
        features = encoder.width if encoder.layers else front.channels[-1]
        init = fan_in_uniform(features)
        self.narrow = nn.Dense(self.bottleneck, kernel_init=init, bias_init=init, dtype=jnp.float32)
        if self.codes:
            self.quantizer = VectorQuantizer(self.codes)
        if self.of_waveform:
            self.decoder = WaveformDecoder(front.channels, front.kernels, front.strides, dtype)
        else:
            self.decoder = FrameDecoder(encoder.subsampling(), encoder.width, front.n_features, dtype)

    def features(self, batch: dict[str, jax.Array]) -> Encoded:
        """Features of every layer, for probes; the last is what passes the middle, float32 [B, T, C]."""
        encoded = self._encode(batch, train=False, hidden=True)
        middle, _ = self._squeeze(encoded)
        return Encoded(middle, encoded.lengths, [*encoded.hidden, middle])

    def _encode(self, batch, train, hidden=False) -> Encoded:
        if "starts" in batch:
            raise UserError("config.task.name=autoencode cannot restore packed rows: set data.fill=False")
        features, lengths = self.encoder.extract(batch)
        if not self.encoder.layers:
            return Encoded(features, lengths, [features] if hidden else [])
        return self.encoder.contextualize(features, lengths, train=train, hidden=hidden)

    def _squeeze(self, encoded):
        """What passes the middle, float32 [B, T, C], and how it was quantized."""
        z = self.narrow(encoded.frames.astype(jnp.float32))
        if not self.codes:
            return z, None
        assigned = self.quantizer(z, frame_mask(encoded.lengths, z.shape[1]))
        return assigned.vectors, assigned

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        encoded = self._encode(batch, train)
        middle, assigned = self._squeeze(encoded)
        judge = self._judge_waveform if self.of_waveform else self._judge_frames
        losses, metrics = judge(batch, middle, encoded.lengths)
        if assigned is not None:
            one = jnp.ones(())
            valid = frame_mask(encoded.lengths, middle.shape[1])
            n = jnp.sum(valid).astype(jnp.float32)
            losses["commitment"] = (self.commitment * jnp.sum(jnp.where(valid, assigned.distance, 0)), n)
            for name, value in assigned.given.items():
                sow_sum(self, name, value)
            chosen = jax.nn.one_hot(assigned.codes, self.codes)[:, :, None]
            unused = jnp.mean((assigned.given["counts"] == 0).astype(jnp.float32))
            metrics["code_perplexity"] = (codebook_perplexity(chosen, valid), one)
            metrics["unused_codes"] = (unused, one)
        return losses, metrics

    def _judge_frames(self, batch, middle, lengths) -> tuple[Sums, Sums]:
        target, output, counts = self._frames(batch, middle, lengths)
        weight = frame_mask(counts, target.shape[1]).astype(jnp.float32)
        n = jnp.sum(weight) * target.shape[2]
        error = lambda guess: jnp.sum(jnp.square(guess - target) * weight[..., None])  # noqa: E731
        metrics = {"chance_reconstruction": (error(batch_mean(target, weight)), n)}
        return {"reconstruction": (error(output), n)}, metrics | _deviations(output, target, weight)

    def _frames(self, batch, middle, lengths) -> tuple[Any, ...]:
        """Target and output [B, k T, F], and how many frames of them are valid [B]."""
        k = self.encoder.subsampling()
        x, _ = self.encoder.inputs(batch)
        return x[:, : k * middle.shape[1]], self.decoder(middle, lengths), k * lengths

    def _judge_waveform(self, batch, middle, lengths) -> tuple[Sums, Sums]:
        target, output, samples = self._waveforms(batch, middle, lengths)
        n = jnp.sum(samples).astype(jnp.float32)
        spectrum, chance = jnp.zeros(()), jnp.zeros(())
        found: Sums = {}
        for size in RESOLUTIONS:
            wanted, frames = log_magnitude(target, samples, size)
            got, _ = log_magnitude(output, samples, size)
            weight = frame_mask(frames, wanted.shape[1]).astype(jnp.float32)
            # A frame counts as much as the samples it stands for, so that all resolutions have one weight.
            share_BxN = weight * (size // 4) / wanted.shape[2] / len(RESOLUTIONS)
            spectrum = spectrum + _distance(got, wanted, share_BxN)
            chance = chance + _distance(batch_mean(wanted, weight), wanted, share_BxN)
            found = _deviations(got, wanted, weight)
        losses: Sums = {
            "spectrum": (spectrum, n),
            "waveform": (self.waveform_weight * jnp.sum(jnp.abs(output - target)), n),
        }
        metrics: Sums = {
            "chance_spectrum": (chance, n),
            "chance_waveform": (self.waveform_weight * jnp.sum(jnp.abs(target)), n),
        }
        return losses, metrics | found

    def _waveforms(self, batch, middle, lengths) -> tuple[Any, ...]:
        """Target and output [B, S] of unit root mean square, zero beyond their samples [B]."""
        output, samples = self.decoder(middle, lengths)
        target = valid_samples(batch["audio"][:, : output.shape[1]], samples)
        power = jnp.sum(jnp.square(target), axis=1) / jnp.maximum(samples, 1).astype(jnp.float32)
        return target * lax.rsqrt(power + 1e-8)[:, None], output, samples  # at most a gain of 10,000, for silence

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """The codebook follows what the batch assigned to it."""
        if not self.codes:
            return extra
        book = follow(extra["codebook"]["quantizer"], sums, self.code_decay)
        if self.revive_below:
            book = revive(book, jax.random.fold_in(jax.random.key(0), step), self.revive_below)
        return {**extra, "codebook": {"quantizer": book}}

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: frames, or log spectra every 8 ms, of input and output."""
        encoded = self._encode(batch, train=False)
        middle, _ = self._squeeze(encoded)
        if not self.of_waveform:
            target, output, counts = self._frames(batch, middle, encoded.lengths)
            return dict(lengths=counts, target=target, output=output)
        target, output, samples = self._waveforms(batch, middle, encoded.lengths)
        wanted, frames = log_magnitude(target, samples, 512)
        return dict(lengths=frames, target=wanted, output=log_magnitude(output, samples, 512)[0])

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        alarms = {}
        # The first frames are so alike that all have one code, until others are put beside it.
        if self.codes and step >= 100 and metrics["code_perplexity"] < max(1.5, 0.02 * self.codes):
            alarms["codebook_collapse"] = (
                f"code perplexity {metrics['code_perplexity']:.1f} of {self.codes}: nearly all frames share a code; "
                "set task.revive_below=0.03, lower task.code_decay or optim.learning_rate"
            )
        if step < 1000:
            return alarms
        alarms |= constant_output_alarm(metrics["output_deviation"], metrics["target_deviation"])
        loss = "spectrum" if self.of_waveform else "reconstruction"
        if "output_collapse" not in alarms and metrics[loss] > 0.98 * metrics[f"chance_{loss}"]:
            alarms["stuck_at_chance"] = (
                f"{loss} loss {metrics[loss]:.3f} is that of the mean, {metrics[f'chance_{loss}']:.3f}: nothing "
                "learnt; raise optim.learning_rate or task.bottleneck"
            )
        return alarms


def _distance(guess, wanted, weight):
    return jnp.sum(jnp.sum(jnp.abs(guess - wanted), axis=2) * weight)


def _deviations(output, target, weight) -> Sums:
    one = jnp.ones(())
    return {
        "output_deviation": (mean_deviation(lax.stop_gradient(output), weight), one),
        "target_deviation": (mean_deviation(target, weight), one),
    }


def log_magnitude(audio: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Logarithm of the magnitude spectrum, windows of `size` samples a quarter of that apart: [B, S], [B] ->
    float32 [B, frames, size // 2 + 1], [B].

    White noise of unit variance has magnitudes around 1.  Not the logarithm of |X|, whose gradient is infinite at 0.
    """
    spectrum, frames = stft(audio, lengths, n_fft=size, hop=size // 4)
    energy = float((hann(size) ** 2).sum())
    power = (jnp.square(spectrum.real) + jnp.square(spectrum.imag)) / energy
    return 0.5 * jnp.log(power + FLOOR), frames

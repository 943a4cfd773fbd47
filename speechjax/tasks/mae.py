"""Masked autoencoders of spectra: Mockingjay (arXiv 1910.12638), TERA (2007.06028), Audio-MAE (2207.06405).

Shapes: B batch, N frames of 10 ms, F features of one, k frames stacked, T patches, P numbers in a patch, K visible
patches, D width.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.errors import UserError
from speechjax.models.ema import mean_deviation
from speechjax.models.layers import LayerNorm, fan_in_uniform, frame_mask, gelu, zero_padding
from speechjax.models.masking import masked_slots
from speechjax.models.spectral import sinusoids_2d
from speechjax.models.transformer import Transformer
from speechjax.tasks._alterations import Patches, make_alteration
from speechjax.tasks._base import Sums
from speechjax.tasks._frames import (
    FrameTask,
    constant_output_alarm,
    interpolate,
    unstack_frames,
    utterance_mean,
)


class MAE(FrameTask):
    """Batch of a `SpeechEncoder` with a spectral front end -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `alteration` names what is done to the input, and has its options:

    mockingjay, tera  frames are altered before the encoder subsamples them (_alterations.py).  Two linear layers with
                      GELU and layer norm between restore the clean frames; the loss is the mean absolute error over
                      what the alteration judges: the runs, in all features, and TERA's block, in all frames.  That is
                      the published code's choice; TERA's paper writes the sum over all frames.
    patches           of the patches of a "patch" front end the share `share` is hidden.  The encoder sees the others
                      alone; a decoder, a transformer of `layers`, `width`, `heads` and `mlp`, gets them back in their
                      places, a learnt token in those of the others, and 2-D positions (Audio-MAE, section 3, where
                      its attention is local).  The loss is the mean squared error over the hidden patches, each
                      normalised to mean 0 and variance 1.

    Controls of the same batch: chance is the utterance's mean; straight lines between the nearest frames (or patches
    of the same bands) that were not chosen are `interpolation_error`, to be compared with `frame_error`, over what
    was chosen in time.

    Raises UserError for other names and options, for packed rows, for front ends without frames, and with patches for
    encoders that order their frames.
    """

    alteration: Mapping[str, Any]

    rngs = ("dropout", "layerdrop", "mask")

    def setup(self):
        self.how = make_alteration(self.alteration)
        self.patches = isinstance(self.how, Patches)
        front = self.encoder.frontend["name"]
        if self.patches != (front == "patch"):
            raise UserError(
                f"config.task.alteration.name={self.alteration['name']!r} does not fit config.model.frontend.name="
                f"{front!r}: patches need the front end 'patch', and it needs them"
            )
        if self.patches:
            check_unordered(self.encoder)
            self.decoder = PatchDecoder(self.how, jnp.dtype(self.encoder.dtype))
        else:
            self.head = FrameHead()

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        out = self._restore(batch, train)
        target, judged, chosen = out["target"], out["judged"], out["chosen"]
        weight = chosen.astype(jnp.float32)

        def error(guess, where):
            difference = jnp.where(where, guess - target, 0)
            total = jnp.sum(jnp.square(difference) if self.patches else jnp.abs(difference))
            return total, jnp.sum(where).astype(jnp.float32)

        in_time = jnp.broadcast_to(chosen[..., None], judged.shape)
        one = jnp.ones(())
        metrics = {
            "chance_reconstruction": error(out["mean"], judged),
            "frame_error": error(lax.stop_gradient(out["output"]), in_time),
            "interpolation_error": error(out["lines"], in_time),
            "output_deviation": (mean_deviation(lax.stop_gradient(out["output"]), weight), one),
            "target_deviation": (mean_deviation(target, weight), one),
            "masked_share": (jnp.sum(weight), jnp.sum(out["valid"]).astype(jnp.float32)),
        }
        return {"reconstruction": error(out["output"], judged)}, metrics

    def _restore(self, batch, train) -> dict[str, jax.Array]:
        x, lengths = self.encoder.inputs(batch)
        return self._restore_patches(x, lengths, train) if self.patches else self._restore_frames(x, lengths, train)

    def _restore_frames(self, x, lengths, train) -> dict[str, jax.Array]:
        """Targets, outputs and controls [B, N, F], and which are `valid`, `chosen` [B, N] and `judged` [B, N, F]."""
        N, k = x.shape[1], self.encoder.subsampling()
        altered = self.how(self.make_rng("mask"), x, lengths)
        frames = self.encode(altered.frames, lengths, train=train).frames
        output = self.head(frames.astype(jnp.float32), k * x.shape[2])
        restored = frame_mask(lengths // k * k, N)  # those left over by the subsampling are not
        valid = frame_mask(lengths, N)
        return dict(
            target=x, output=unstack_frames(output, N, k), lengths=lengths, valid=valid,
            mean=jnp.broadcast_to(utterance_mean(x, lengths), x.shape),
            lines=interpolate(x, valid & ~altered.chosen),
            chosen=altered.chosen & restored, judged=altered.judged & restored[..., None],
        )  # fmt: skip

    def _restore_patches(self, x, lengths, train) -> dict[str, jax.Array]:
        """As `_restore_frames`, of patches [B, T, P]."""
        B, T, P = x.shape
        rows = self.encoder.front.grid()
        hidden = self.how(self.make_rng("mask"), lengths, T)
        valid = frame_mask(lengths, T)
        visible = valid & ~hidden
        kept, there = masked_slots(visible, T - int(self.how.hidden_counts(T)[T]))
        counts = jnp.sum(there, axis=1)
        features, _ = self.encoder.embed(x, lengths)
        seen = zero_padding(jnp.take_along_axis(features, kept[..., None], axis=1), counts)
        frames = self.encoder.contextualize(seen, counts, train=train).frames
        target, _ = standardize(x)
        by_band = lambda x: jnp.moveaxis(x.reshape(B, T // rows, rows, -1), 2, 1)  # noqa: E731
        lines = interpolate(
            by_band(target).reshape(B * rows, T // rows, P), by_band(visible).reshape(B * rows, T // rows)
        )  # fmt: skip
        return dict(
            target=target, output=self.decoder(frames, visible, lengths, rows, P), lengths=lengths, valid=valid,
            mean=jnp.broadcast_to(utterance_mean(target, lengths), target.shape),
            lines=jnp.moveaxis(lines.reshape(B, rows, T // rows, P), 1, 2).reshape(B, T, P),
            chosen=hidden, judged=jnp.broadcast_to(hidden[..., None], x.shape), patches=x,
        )  # fmt: skip

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: the clean spectrogram, what was made of it, [B, N, F], and which frames were altered.

        Of patches, the spectrogram with the hidden ones restored; no mask, for it has no whole frames.
        """
        out = self._restore(batch, False)
        if not self.patches:
            return dict(lengths=out["lengths"], mask=out["chosen"], target=out["target"], output=out["output"])
        _, (mean, deviation) = standardize(out["patches"])
        restored = jnp.where(out["chosen"][..., None], out["output"] * deviation + mean, out["patches"])
        front = self.encoder.front
        picture = lambda x: unpatch(x, front.grid(), front.patch)  # noqa: E731
        return dict(
            lengths=out["lengths"] // front.grid() * front.patch[0], target=picture(out["patches"]),
            output=picture(restored),
        )  # fmt: skip

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        if step < 1000:
            return {}
        alarms = constant_output_alarm(metrics["output_deviation"], metrics["target_deviation"])
        if not alarms and metrics["reconstruction"] > 0.98 * metrics["chance_reconstruction"]:
            alarms["stuck_at_chance"] = (
                f"error {metrics['reconstruction']:.3f} is that of the utterance's mean, "
                f"{metrics['chance_reconstruction']:.3f}, where straight lines across the gaps have "
                f"{metrics['interpolation_error']:.3f}: nothing learnt; raise optim.learning_rate"
            )
        return alarms


class FrameHead(nn.Module):
    """Linear, GELU, layer norm, linear, as published: float32 [B, T, D] -> [B, T, C]."""

    @nn.compact
    def __call__(self, x: jax.Array, out: int) -> jax.Array:
        init = fan_in_uniform(x.shape[-1])
        x = gelu(nn.Dense(x.shape[-1], kernel_init=init, bias_init=init, name="hidden")(x))
        return nn.Dense(out, kernel_init=init, bias_init=init, name="out")(LayerNorm(name="norm")(x))


class PatchDecoder(nn.Module):
    """Visible patches in their places, a learnt token elsewhere, 2-D positions, a transformer, a linear map.

    float [B, K, D], visible bool [B, T], patches [B], of which `rows` make a column -> float32 [B, T, P].
    """

    how: Patches
    dtype: Any

    @nn.compact
    def __call__(self, frames: jax.Array, visible: jax.Array, lengths: jax.Array, rows: int, out: int) -> jax.Array:
        how, T = self.how, visible.shape[1]
        init = fan_in_uniform(frames.shape[-1])
        x = nn.Dense(how.width, dtype=self.dtype, kernel_init=init, bias_init=init, name="project")(frames)
        token = self.param("token", nn.initializers.normal(0.02), (how.width,)).astype(self.dtype)
        back = jnp.maximum(jnp.cumsum(visible.astype(jnp.int32), axis=1) - 1, 0)
        x = jnp.where(visible[..., None], jnp.take_along_axis(x, back[..., None], axis=1), token[None, None])
        x = x + jnp.asarray(sinusoids_2d(T // rows, rows, how.width), self.dtype)[None]
        x, _ = Transformer(
            layers=how.layers, heads=how.heads, mlp=how.mlp, norm="pre", positions=dict(name="none"), dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, scan=False, remat=False, dtype=self.dtype,
            name="transformer",
        )(x, lengths, train=False)  # fmt: skip
        init = fan_in_uniform(how.width)
        return nn.Dense(out, kernel_init=init, bias_init=init, name="out")(x.astype(jnp.float32))


def check_unordered(encoder: Any) -> None:
    """UserError unless the encoder takes frames as a set, which the visible patches are."""
    attention = encoder.attention
    if (
        encoder.block["name"] != "transformer"
        or encoder.positions.get("name", "conv") != "none"
        or attention.get("positions", "none") != "none"
        or attention.get("chunk", 0)
    ):
        raise UserError(
            "config.model orders frames by their number, which visible patches lack: set block.name=transformer, "
            "positions.name=none, attention.positions=none and attention.chunk=0 (patches carry positions of their own)"
        )


def standardize(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Every patch with mean 0 and variance 1: [B, T, P] -> the same, and mean and deviation [B, T, 1]."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + 1e-6)
    return (x - mean) / deviation, (mean, deviation)


def unpatch(x: jax.Array, rows: int, patch: tuple[int, int]) -> jax.Array:
    """Patches to the spectrogram they are of: [B, T, frames * bands] -> [B, T // rows * frames, rows * bands]."""
    B, T, _ = x.shape
    frames, bands = patch
    x = x.reshape(B, T // rows, rows, frames, bands).transpose(0, 1, 3, 2, 4)
    return x.reshape(B, T // rows * frames, rows * bands)

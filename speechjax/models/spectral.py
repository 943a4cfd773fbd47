"""Spectral front ends: waveform to log-mel, MFCC or patches of a spectrogram, computed on the device.

Shapes: B batch, S samples, N frames (or patches) before subsampling, F features of one, T = N // factor, C channels.

They are called like `WaveformExtractor`.  Tasks that mask or quantize the spectrogram itself use the halves:
`inputs` (audio to normalised float32 [B, N, F], no parameters) and `embed` ([B, N, F] to [B, T, C]).

The recording's mean and standard deviation, given to every front end, are not used: cepstral normalisation of each
row's valid frames (`normalize="utterance"`) makes them immaterial.  Whatever the compute dtype, spectra and their
logarithms are float32: in bfloat16 the quiet bands of a frame drown.  Of the normalisations
only "online" and "none" see no later frame, so that `MelFrontend` can be streamed (see streaming.py).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speechjax.audio.features import CONVENTIONS, cmvn, deltas, log_mel, mfcc
from speechjax.errors import UserError
from speechjax.models.layers import fan_in_uniform, zero_padding
from speechjax.models.recall import kept, recall

HOP, WINDOW = 160, 400  # samples: 25 ms every 10 ms
ONLINE_FRAMES = 600  # of `OnlineNorm`: 6 s, the sliding window of Kaldi's online cepstral normalisation


def stack_frames(x: jax.Array, lengths: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """`factor` neighbouring frames become one, what remains at the end is dropped: [B, N, F] -> [B, T, factor F]."""
    B, N, F = x.shape
    T = N // factor
    lengths = lengths // factor
    return zero_padding(x[:, : T * factor].reshape(B, T, factor * F), lengths), lengths


class ConvSubsampling(nn.Module):
    """Strided 2-D convolutions, ReLU, a linear map: [B, N, F], [B] -> [B, N // factor, out], [B].

    3 x 3 kernels at stride 2 over time and frequency, one for each halving of the frame rate (Gulati et al. 2020,
    section 2).  Time is padded by one frame on the left only: output t then sees inputs up to 2 t + 1, the last of
    its own pair.  So N // 2 frames come out whatever N is, padding at the end of a row reaches none of them, and the
    stack is causal.
    """

    factor: int
    channels: int
    out: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x.astype(self.dtype)[..., None]
        for i in range(self.factor.bit_length() - 1):
            fan_in = 9 * y.shape[-1]
            init = fan_in_uniform(fan_in)
            kernel = self.param(f"conv{i}_kernel", init, (3, 3, y.shape[-1], self.channels))
            bias = self.param(f"conv{i}_bias", init, (self.channels,))
            y, past = recall(self, f"past{i}", y, 1)
            pad = ((1 - past, 0), (1, 1))
            y = lax.conv_general_dilated(
                y, kernel.astype(self.dtype), (2, 2), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = nn.relu(y + bias.astype(self.dtype)[None, None, None])
        lengths = lengths // self.factor
        y = y.reshape(*y.shape[:2], y.shape[2] * y.shape[3])  # -1 fails where there are no frames
        init = fan_in_uniform(y.shape[-1])
        y = nn.Dense(self.out, dtype=self.dtype, kernel_init=init, bias_init=init, name="linear")(y)
        return zero_padding(y, lengths), lengths


class OnlineNorm(nn.Module):
    """Every feature less its mean, over its deviation, of the frames up to this one: float32 [B, N, F] -> [B, N, F].

    Frame n, from 1, enters mean and variance with weight 1 / min(n, ONLINE_FRAMES): all frames count alike at first,
    and are forgotten exponentially from then on (updates of Welford 1962 and West 1979), so a stream may go on
    forever.  The price is the beginning: the first frame is 0 whatever it is, and those after it are measured by the
    few there were, where Kaldi lends statistics of other recordings.  A feature that has not varied by more than its
    rounding error is 0.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, N, F = x.shape
        none = lambda: (jnp.zeros(B, jnp.int32), *jnp.zeros((3, B, F)))  # noqa: E731
        memory = kept(self, "statistics", none)
        seen, first, mean, variance = none() if memory is None else memory.value
        # Statistics of the difference to the first frame (zero of no frames): logarithms of 20 vary by a tenth.
        first = jnp.where(seen[:, None] == 0, x[:, :1].sum(axis=1), first)
        size, x = jnp.abs(x), x - first[:, None]
        count = jnp.minimum(seen[:, None] + jnp.arange(1, N + 1, dtype=jnp.int32)[None], ONLINE_FRAMES)
        rate = 1 / count.astype(jnp.float32)[..., None]
        means = _leaky_sum(1 - rate, rate * x, mean)
        shift = x - jnp.concatenate([mean[:, None], means], axis=1)[:, :N]
        variances = _leaky_sum(1 - rate, (1 - rate) * rate * jnp.square(shift), variance)
        if memory is not None:
            memory.value = count[:, -1], first, means[:, -1], variances[:, -1]
        varies = variances > jnp.square(16 * float(jnp.finfo(jnp.float32).eps) * size)
        return jnp.where(varies, (x - means) * lax.rsqrt(jnp.where(varies, variances, 1)), 0)


def _leaky_sum(keep: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
    """y[n] = keep[n] y[n - 1] + x[n], y[-1] = start: [B, N, 1], [B, N, F], [B, F] -> [B, N, F]."""
    if not isinstance(x.shape[1], int):  # symbolic (jax.export): how deep the tree is would not be known
        return _leaky_sum_in_turn(keep, x, start)
    kept_since, y = lax.associative_scan(lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (keep, x), axis=1)
    return y + kept_since * start[:, None]


def _leaky_sum_in_turn(keep: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
    """`_leaky_sum`, a frame at a time."""

    def step(y, now):
        y = now[0] * y + now[1]
        return y, y

    return lax.scan(step, start, (keep.transpose(1, 0, 2), x.transpose(1, 0, 2)))[1].transpose(1, 0, 2)


def sinusoids_2d(columns: Any, rows: int, channels: int) -> Any:
    """Fixed positions of a grid of patches, float32 [columns * rows, channels], the rows of a column side by side.

    Half of the channels encode the column (time), half the row (frequency), each as sines, then cosines, of
    wavelengths from 2 pi to 20000 pi (Vaswani et al. 2017, section 3.5).  `channels` is a multiple of 4.  Computed on
    the host, unless `columns` is symbolic (jax.export).
    """
    xp: Any = np if isinstance(columns, int) else jnp
    rates = xp.asarray(10000.0 ** (-np.arange(channels // 4) / (channels // 4)))

    def encode(places):
        angles = places[:, None].astype(rates.dtype) * rates[None]
        return xp.concatenate([xp.sin(angles), xp.cos(angles)], axis=1)

    column, row = xp.divmod(xp.arange(columns * rows), rows)
    return xp.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


class SpectralFrontend(nn.Module):
    """What the spectral front ends share.

    `normalize="utterance"` gives every feature mean 0 and variance 1 over the valid frames of a row (constant
    features become 0), "sample" the same with the unbiased variance (w2v-BERT 2.0), "online" about that over the
    frames so far (`OnlineNorm`); "none" leaves the logarithms as they are.

    Raises UserError for unknown values, and for packed rows, which `packs()` says are not supported.
    """

    normalize: str = "utterance"
    dtype: Any = jnp.float32

    def setup(self):
        if self.normalize == "online":
            self.online_norm = OnlineNorm()

    def packs(self) -> bool:
        """Whether rows may hold several utterances: not yet."""
        return False

    def tokens(self) -> int:
        """Tokens at one time."""
        return 1

    def inputs(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What `embed` takes, normalised, zero in the padding: [B, S], [B] -> float32 [B, N, F], [B]."""
        raise NotImplementedError

    def embed(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`inputs`, perhaps masked, to features: float32 [B, N, F], [B] -> [B, T, C], [B]."""
        raise NotImplementedError

    def __call__(
        self,
        audio: jax.Array,
        lengths: jax.Array,
        statistics: tuple[jax.Array, jax.Array] | None = None,
        starts: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        if starts is not None:
            raise UserError(
                f"config.model.frontend: {type(self).__name__} cannot tell the utterances of a packed row apart: "
                "set config.data.fill=False"
            )
        return self.embed(*self.inputs(audio, lengths))

    def normalized(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Frames as `normalize` says, zero in the padding: [B, N, F], [B] -> float32 [B, N, F], [B]."""
        if self.normalize not in ("online", "utterance", "sample", "none"):
            raise UserError(
                f"config.model.frontend.normalize={self.normalize!r}: expected 'online', 'utterance', 'sample' or "
                "'none'"
            )
        x = zero_padding(x.astype(jnp.float32), lengths)
        if self.normalize == "online":
            return zero_padding(self.online_norm(x), lengths), lengths
        return (x, lengths) if self.normalize == "none" else cmvn(x, lengths, sample=self.normalize == "sample")


class BandFrontend(SpectralFrontend):
    """What those on mel bands share.

    `convention` is that of audio/features.py.  "kaldi" takes whole windows only, so the frames of a row are those
    that fit into it.  The others centre a window on each multiple of the hop; of these, S // 160 are kept.
    Raises UserError for unknown values.
    """

    n_mels: int = 80
    convention: str = "kaldi"

    def spectrum(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Unnormalised frames at 100 Hz: int16 or float [B, S], [B] -> float32 [B, N, F], [B]."""
        return log_mel(audio, lengths, convention=self.convention, n_mels=self.n_mels)

    def _edge(self) -> int:
        """Samples the first frame at 100 Hz takes beyond the hop."""
        return WINDOW - HOP if CONVENTIONS[self.convention].framing == "whole" else 0

    def _frames(self, samples: Any) -> Any:
        """Frames at 100 Hz of `samples`, an int or an array of them."""
        frames = (samples - self._edge()) // HOP
        return jnp.maximum(frames, 0) if isinstance(samples, jax.Array | np.ndarray) else max(frames, 0)

    def _bands(self, audio, lengths):
        if self.convention not in CONVENTIONS:
            raise UserError(
                f"config.model.frontend.convention={self.convention!r}: expected one of {', '.join(CONVENTIONS)}"
            )
        try:
            x, _ = self.spectrum(audio, lengths)
        except ValueError as error:
            raise UserError(f"config.model.frontend.n_mels={self.n_mels}: {error}") from error
        # The centred conventions have one frame more, centred on the very end.
        return self.normalized(x[:, : self._frames(audio.shape[1])], self._frames(lengths))


class MelFrontend(BandFrontend):
    """Log-mel frames at 100 Hz, then `factor` times fewer: [B, S], [B] -> [B, T, C], [B].

    `subsample="stack"` puts `factor` frames side by side, C = factor F; "conv" is `ConvSubsampling` with
    `conv_channels`, C = `embedding`.  Either way output t is made of input frames up to (t + 1) factor - 1.
    """

    factor: int = 4
    subsample: str = "stack"
    conv_channels: int = 256
    embedding: int = 512

    @property
    def n_features(self) -> int:
        """F, of one frame at 100 Hz."""
        return self.n_mels

    @property
    def channels(self) -> Sequence[int]:
        """Its last item is C."""
        return (self.n_features * self.factor,) if self.subsample == "stack" else (self.embedding,)

    @property
    def subsampling(self) -> int:
        """Input frames to one output frame."""
        return self.factor

    def out_len(self, samples: Any) -> Any:
        """Frames made of `samples`, an int or an int32 array of them."""
        return self._frames(samples) // self.factor

    def frame_len(self) -> tuple[int, int]:
        """(hop, window - hop) in samples: (640, 240) at factor 4.  `hop n + extra` samples make n frames."""
        return HOP * self.factor, self._edge()

    def setup(self):
        super().setup()
        if self.factor not in (1, 2, 4, 8):
            raise UserError(f"config.model.frontend.factor={self.factor}: expected 1, 2, 4 or 8")
        if self.subsample not in ("stack", "conv"):
            raise UserError(f"config.model.frontend.subsample={self.subsample!r}: expected 'stack' or 'conv'")
        if self.subsample == "conv":
            self.convolutions = ConvSubsampling(self.factor, self.conv_channels, self.embedding, self.dtype)

    def inputs(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._bands(audio, lengths)

    def embed(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.subsample == "conv":
            return self.convolutions(x, lengths)
        x, lengths = stack_frames(x, lengths, self.factor)
        return x.astype(self.dtype), lengths


class MfccFrontend(MelFrontend):
    """`MelFrontend` on 39 features: 13 MFCC of 23 bands, their deltas and the deltas of those, at 100 Hz.

    With `normalize="none"` the features HuBERT's first iteration clusters (Hsu et al. 2021, section 4.2): deltas are
    slopes over 5 frames.  Its frames within two (four for the second order) of an end repeat the last frame; here
    they take the slope of the first or last whole window.
    """

    n_mels: int = 23
    n_mfcc: int = 13
    factor: int = 2

    @property
    def n_features(self) -> int:
        return 3 * self.n_mfcc

    def spectrum(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, lengths = mfcc(audio, lengths, convention=self.convention, n_mels=self.n_mels, n_mfcc=self.n_mfcc)
        slope, _ = deltas(x, lengths, width=5)
        curvature, _ = deltas(slope, lengths, width=5)
        return jnp.concatenate([x, slope, curvature], axis=-1), lengths


class PatchFrontend(BandFrontend):
    """Patches of a log-mel spectrogram as tokens (AST, Gong et al. 2021; Audio-MAE, Huang et al. 2022, section 3).

    [B, S], [B] -> [B, T, C = embedding], [B].  A patch is `patch` = (frames, mel bands).  Tokens run through the
    `grid()` patches of one column (same time, low frequencies first), then the next column: token t is patch t %
    grid() of column t // grid(), and lengths count tokens.  `inputs` are the patches flattened, frame by frame,
    [B, T, frames * bands]; `embed` projects them and adds fixed 2-D sinusoids, so models need no other positions.

    Frames that do not fill a column are dropped: 10.24 s make 64 columns of 8 tokens, as published.  Both papers have
    128 of Kaldi's bands; at 25 ms the lowest of those contain no FFT bin, which `log_mel` refuses, so here they are
    librosa's.
    Raises UserError if the bands of a patch do not divide `n_mels`.
    """

    n_mels: int = 128
    convention: str = "librosa"
    patch: tuple[int, int] = (16, 16)
    embedding: int = 768

    @property
    def channels(self) -> Sequence[int]:
        """Its last item is C."""
        return (self.embedding,)

    @property
    def subsampling(self) -> int:
        """Inputs (patches) to one output frame."""
        return 1

    def grid(self) -> int:
        """Patches in a column."""
        bands = self.patch[1]
        if self.n_mels % bands:
            raise UserError(f"config.model.frontend.n_mels={self.n_mels}: not a multiple of patches {bands} bands high")
        return self.n_mels // bands

    def out_len(self, samples: Any) -> Any:
        """Tokens made of `samples`, an int or an int32 array of them: a multiple of `grid()`."""
        return self._frames(samples) // self.patch[0] * self.grid()

    def tokens(self) -> int:
        """Tokens at one time: a column."""
        return self.grid()

    def frame_len(self) -> tuple[int, int]:
        """(hop, extra) in samples of a column, not a token: `hop n + extra` samples make n `grid()` tokens."""
        return HOP * self.patch[0], self._edge()

    def setup(self):
        super().setup()
        if self.embedding % 4:
            raise UserError(f"config.model.frontend.embedding={self.embedding}: 2-D positions need a multiple of 4")
        self.projection = nn.Dense(self.embedding, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())

    def inputs(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, lengths = self._bands(audio, lengths)
        (frames, bands), rows = self.patch, self.grid()
        B, N, _ = x.shape
        columns = N // frames
        x = x[:, : columns * frames].reshape(B, columns, frames, rows, bands).transpose(0, 1, 3, 2, 4)
        lengths = lengths // frames * rows
        return zero_padding(x.reshape(B, columns * rows, frames * bands), lengths), lengths

    def embed(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = sinusoids_2d(x.shape[1] // self.grid(), self.grid(), self.embedding)
        y = self.projection(x) + jnp.asarray(positions, self.dtype)[None]
        return zero_padding(y, lengths), lengths

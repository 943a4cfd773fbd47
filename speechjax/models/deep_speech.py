"""Deep Speech 2 (Amodei et al. 2016, arXiv 1512.02595): spectrogram, 2-D convolutions, recurrent layers, batch norm.

Shapes: B batch, S samples, N frames of 10 ms, T = N // 2 frames, F frequencies, C channels, D width, d directions.
`lengths` is int32 [B], or [B, T] for packed rows: see layers.py.

Section numbers are those of the paper.  Its model is front end, layers, top and a linear softmax, the CTC task's head.
In this encoder a layer norm and a linear map from C to D stand between the front end and the first layer.  SortaGrad
(section 3.3), shorter utterances first in the first epoch, is a matter of the data plan and not here.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speechjax.audio.spectrum import framed, hann
from speechjax.audio.waveform import valid_samples
from speechjax.errors import UserError
from speechjax.models.batch_norm import BatchNorm
from speechjax.models.block import Block
from speechjax.models.conformer import depthwise_conv
from speechjax.models.layers import fan_in_uniform, frame_mask, shard_batch, zero_padding
from speechjax.models.recurrent import both_ways, gru
from speechjax.models.relative import AttentionOptions
from speechjax.models.spectral import HOP, SpectralFrontend

WINDOW = 320  # samples: 20 ms every 10 ms
BINS = WINDOW // 2 + 1
FLOOR = 1e-10  # of the power: below is digital silence only
# Table 4: (frequencies, frames) a kernel and (frequency, time) stride of the convolutions.
KERNELS = ((41, 11), (21, 11), (21, 11))
STRIDES = ((2, 2), (2, 1), (2, 1))
CELLS = ("rnn", "gru")


def clipped_relu(x: jax.Array) -> jax.Array:
    """min(max(x, 0), 20) (section 3.1)."""
    return jnp.clip(x, 0, 20)


def log_spectrogram(audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log power spectrum of clips of power 1, whole windows of 20 ms: [B, S], [B] -> float32 [B, N, F = 161], [B].

    Section 3.1, which names no window: this is Hann's.
    """
    x = valid_samples(audio, lengths)
    power = jnp.sum(jnp.square(x), axis=1, keepdims=True) / jnp.maximum(lengths, 1).astype(jnp.float32)[:, None]
    x = x * lax.rsqrt(power + 1e-8)  # at most a gain of 10,000, for silence
    frames, counts = framed(x, lengths, size=WINDOW, hop=HOP, framing="whole")
    spectrum = jnp.fft.rfft(frames * jnp.asarray(hann(WINDOW), frames.dtype)[None, None])
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return zero_padding(jnp.log(jnp.maximum(power, FLOOR)), counts), counts


class DeepSpeechFrontend(SpectralFrontend):
    """Log spectrogram, then 2-D convolutions, batch norm and clipped ReLU: [B, S], [B] -> [B, T, C], [B].

    `filters` are those of one to three convolutions (section 3.5, table 4: three of 32, 32 and 96 or two of 32).  The
    first halves the frame rate, each halves the frequencies; `same` padding, so output t is centred on the middle of
    input frame 2 t, and sees 50 ms more of either side, and 50 ms for every further convolution.  Of an odd number of
    input frames the last has no output of its own.  C is filters[-1] times the frequencies left, 96 x 21.

    In a pass that collects "sums" for `Task.after_step`, which is a training step, batch norm takes the statistics of
    the batch; front ends are not told `train`.
    Raises UserError for packed rows and other numbers of filters.
    """

    filters: Sequence[int] = (32, 32, 96)

    @property
    def n_features(self) -> int:
        """F, of one frame at 100 Hz."""
        return BINS

    @property
    def channels(self) -> Sequence[int]:
        """Its last item is C."""
        bins = BINS
        for _ in self.filters:
            bins = -(-bins // 2)
        return (self.filters[-1] * bins,)

    @property
    def subsampling(self) -> int:
        """Input frames to one output frame."""
        return 2

    def out_len(self, samples: Any) -> Any:
        """Frames made of `samples`, an int or an int32 array of them."""
        frames = (samples - (WINDOW - HOP)) // (2 * HOP)
        return max(frames, 0) if isinstance(samples, int) else jnp.maximum(frames, 0)

    def frame_len(self) -> tuple[int, int]:
        """(hop, extra) in samples: (320, 160).  `hop n + extra` samples make n frames."""
        return 2 * HOP, WINDOW - HOP

    def inputs(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.normalized(*log_spectrogram(audio, lengths))

    @nn.compact
    def embed(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not 1 <= len(self.filters) <= len(KERNELS):
            raise UserError(f"config.model.frontend.filters={tuple(self.filters)}: there are 1 to 3 convolutions")
        train = self.is_mutable_collection("sums") and not self.is_initializing()
        B, N, _ = x.shape
        T, lengths = N // 2, lengths // 2
        valid = frame_mask(lengths, T)
        y = x.astype(self.dtype)[..., None]
        for i, (filters, (high, wide), (down, along)) in enumerate(zip(self.filters, KERNELS, STRIDES, strict=False)):
            shape = (wide, high, y.shape[-1], filters)
            kernel = self.param(f"conv{i}_kernel", fan_in_uniform(int(np.prod(shape[:3]))), shape)
            same = ((wide // 2, wide // 2), (high // 2, high // 2))
            y = lax.conv_general_dilated(
                y, kernel.astype(self.dtype), (along, down), same, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )[:, :T]
            y = clipped_relu(BatchNorm(self.dtype, name=f"norm{i}")(y, valid, train))
            # Padding that batch norm has moved off zero would enter through the next kernel.
            y = jnp.where(valid[..., None, None], y, jnp.zeros((), y.dtype))
        return y.reshape(B, T, y.shape[2] * y.shape[3]), lengths


class DeepSpeechBlock(Block):
    """The options of layers and top; those of every block that are not named here are not used.

    cell              "rnn": h = f(input + U h); "gru" (section 3.4): with f for tanh, and the reset gate after U h
    bidirectional     both directions, summed; their projection of the input is the same one (section 3.1)
    lookahead         of unidirectional layers: how many later frames the row convolution sees (section 3.7), 0: none
    fully_connected   how many such layers stand above

    f is the clipped ReLU.  Raises UserError for unknown cells, and for a `lookahead` of layers that see the future
    anyway or beyond the chunks of `attention`.
    """

    cell: str = "rnn"
    bidirectional: bool = True
    lookahead: int = 0
    fully_connected: int = 1

    def chunk(self) -> int:
        """Frames of a chunk, 0: none; checks the options."""
        chunk = AttentionOptions(**self.attention).chunk
        if self.cell not in CELLS:
            raise UserError(f"config.model.block.cell={self.cell!r}: there are {', '.join(CELLS)}")
        if self.lookahead and (self.bidirectional or chunk):
            raise UserError(
                f"config.model.block.lookahead={self.lookahead} is for bidirectional=False without attention.chunk: "
                "set it to 0"
            )
        return chunk


class DeepSpeechLayer(DeepSpeechBlock):
    """A recurrent layer, its projected input batch-normalised: [B, T, D], [B] or [B, T] -> two [B, T, D].

    Equations 3 and 4 with the normalisation of equation 9: h = f(B(W x) + U h), without bias or residual connection.
    Where `attention` has chunks the backward direction stays inside them (`both_ways`).  The second output is the
    first before dropout, of which the paper has none.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, lengths: jax.Array, train: bool, bias: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        chunk, (T, D), d = self.chunk(), x.shape[1:], 1 + self.bidirectional
        parts, recur = (3, clipped_gru) if self.cell == "gru" else (1, clipped_rnn)
        init = fan_in_uniform(D)
        x = shard_batch(x)
        y = nn.Dense(parts * D, use_bias=False, dtype=self.dtype, kernel_init=init, name="input")(x)
        y = BatchNorm(self.dtype, name="norm")(y, frame_mask(lengths, T), train)
        kernel = self.param("kernel", init, (d, D, parts * D)).astype(self.dtype)
        states = jnp.sum(both_ways(recur, jnp.stack([y] * d), kernel, lengths, chunk), axis=0)
        states = zero_padding(states.astype(self.dtype), lengths)
        return self.unless_dropped(nn.Dropout(self.dropout, deterministic=not train)(states), x, train), states


class DeepSpeechTop(DeepSpeechBlock):
    """Row convolution, where there is one, and fully connected layers: [B, T, D], [B] or [B, T] -> [B, T, D].

    r_t = sum_j W_j h_(t + j), j from 0 to `lookahead`, for each channel by itself (equation 11), without activation;
    then h = f(B(W h)) (equations 5 and 8).
    """

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, train: bool) -> jax.Array:
        D = x.shape[-1]
        x = zero_padding(x, lengths)
        if self.lookahead:
            taps = self.lookahead + 1
            kernel = self.param("lookahead", fan_in_uniform(taps), (taps, D)).astype(self.dtype)
            x = depthwise_conv(x, kernel, 0, lengths if lengths.ndim == 2 else None)
        for i in range(self.fully_connected):
            dense = nn.Dense(D, use_bias=False, dtype=self.dtype, kernel_init=fan_in_uniform(D), name=f"linear{i}")
            norm = BatchNorm(self.dtype, name=f"norm{i}")
            x = clipped_relu(norm(dense(x), frame_mask(lengths, x.shape[1]), train))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return zero_padding(x, lengths)


def clipped_rnn(inputs: jax.Array, kernel: jax.Array, first: jax.Array) -> jax.Array:
    """h = f(inputs + h kernel), zero before frames that are `first`: [B, T, D], [D, D] -> float32 [B, T, D]."""

    def step(h, now):
        x, is_first = now
        h = jnp.where(is_first[:, None], 0.0, h).astype(kernel.dtype)
        h = clipped_relu(x.astype(jnp.float32) + (h @ kernel).astype(jnp.float32))
        return h, h

    start = jnp.zeros((inputs.shape[0], len(kernel)), jnp.float32)
    _, states = lax.scan(step, start, (inputs.transpose(1, 0, 2), first.T))
    return states.transpose(1, 0, 2)


def clipped_gru(inputs: jax.Array, kernel: jax.Array, first: jax.Array) -> jax.Array:
    """`gru` with the clipped ReLU for tanh, and no bias of its own: [B, T, 3 D], [D, 3 D] -> float32 [B, T, D]."""
    return gru(inputs, kernel, jnp.zeros(len(kernel)), first, clipped_relu)

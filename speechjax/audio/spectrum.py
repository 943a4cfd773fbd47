"""Short-time Fourier transform of a batch of waveforms, and back.

Shape alphabet: B batch, S samples, T frames, F frequency bins.

Whatever lies beyond a row's length never reaches the output, and the output's own padding is zero. A row of length 0
has 0 frames.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.audio.waveform import frame_mask, valid_samples, zero_padding

Framing = Literal["centred", "reflected", "whole"]


def out_len(samples: int, hop: int = 160, *, n_fft: int = 400, framing: Framing = "centred") -> int:
    """Number of frames of `samples` samples (a static count).

    "centred": one at each multiple of the hop, ends included. "reflected": the same without the last (Whisper's
    count). "whole": as many as fit into the signal without reaching over its ends (Kaldi's snip_edges).
    """
    return _n_frames(samples, hop, n_fft, framing)


def framed(
    signal: jax.Array, lengths: jax.Array, *, size: int, hop: int, framing: Framing = "centred"
) -> tuple[jax.Array, jax.Array]:
    """Overlapping pieces of the signal.

    signal: [B, S] float, zero beyond the lengths. lengths: [B] int32, samples.
    Returns [B, T, size] with T = `out_len(S, hop, n_fft=size, framing=framing)`, and [B] int32 frames. Frames beyond
    a row's count still reach into its end: mask what is computed from them. Outside the signal there are zeros, with
    "reflected" the signal's mirror image about its own first and last valid sample.
    """
    n_frames = out_len(signal.shape[1], hop, n_fft=size, framing=framing)
    before = 0 if framing == "whole" else size // 2
    if framing == "reflected":
        signal = _reflected(signal, lengths, before)
    else:
        signal = jnp.pad(signal, ((0, 0), (before, size - before)))
    return _pieces(signal, n_frames, size, hop), _n_frames(lengths, hop, size, framing)


def stft(audio: jax.Array, lengths: jax.Array, *, n_fft: int = 400, hop: int = 160) -> tuple[jax.Array, jax.Array]:
    """Short-time Fourier transform of the valid samples: periodic Hann window, centred frames, zeros outside.

    audio: [B, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples.
    Returns complex [B, T, n_fft // 2 + 1] with T = `out_len(S, hop)`, and [B] int32 frames.
    """
    frames, n_frames = framed(valid_samples(audio, lengths), lengths, size=n_fft, hop=hop)
    spectrum = jnp.fft.rfft(frames * jnp.asarray(hann(n_fft), frames.dtype)[None, None])
    return zero_padding(spectrum, n_frames), n_frames


def istft(
    spectrum: jax.Array, lengths: jax.Array, *, samples: int, n_fft: int = 400, hop: int = 160
) -> tuple[jax.Array, jax.Array]:
    """The waveform whose `stft` this is; of a spectrum that is none's, the least-squares fit (Griffin and Lim, 1984).

    spectrum: complex [B, T, n_fft // 2 + 1]. lengths: [B] int32, *samples* wanted (those given to `stft`; frames
    alone would leave the last `hop - 1` open). samples: S, the static width of the result.
    Returns float [B, S] and the lengths. A row's frames beyond its `lengths // hop + 1` are not looked at.
    Precision: the last samples of a row lie under the flank of one window only, and rounding errors grow there by
    1 / window, for n_fft 400 and hop 160 up to 10, for a hop of half an FFT up to 1.6e4.
    Raises ValueError if some samples lie under no window: hop above n_fft // 2, or T below `out_len(S, hop)`.
    """
    if hop > n_fft // 2 or spectrum.shape[1] < out_len(samples, hop):
        raise ValueError(
            f"{spectrum.shape[1]} frames of {n_fft} samples every {hop} leave some of {samples} samples without "
            "a window: lower the hop to half the FFT, or `samples` to what the spectrum was made of"
        )
    mask = frame_mask(spectrum.shape[1], _n_frames(lengths, hop, n_fft, "centred"))
    window = jnp.asarray(hann(n_fft), spectrum.real.dtype)[None, None]
    frames = jnp.fft.irfft(jnp.where(mask, spectrum, jnp.zeros((), spectrum.dtype)), n=n_fft)
    start = slice(n_fft // 2, n_fft // 2 + samples)
    numerator = _overlap_add(frames * window, hop)[:, start]
    weight = _overlap_add(jnp.where(mask, jnp.square(window), 0.0), hop)[:, start]
    # Padding lies under no window or under the vanishing rim of the last.
    weight = jnp.where(valid_samples(jnp.ones_like(weight), lengths) > 0, weight, 1.0)
    return valid_samples(numerator / weight, lengths), lengths


def hann(size: int) -> np.ndarray:
    """Periodic Hann window, float64 [size]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)


def _n_frames(samples: Any, hop: int, size: int, framing: Framing) -> Any:
    """Of an int, a symbolic dimension, or a traced array of ints."""
    at_least, at_most = (jnp.maximum, jnp.minimum) if isinstance(samples, jax.Array | np.ndarray) else (max, min)
    if framing == "whole":
        return at_least((samples - size) // hop + 1, 0)
    if framing == "reflected":
        return samples // hop
    return samples // hop + at_most(samples, 1)


def _pieces(signal: jax.Array, count: int, size: int, hop: int) -> jax.Array:
    """`count` pieces of `size` samples that begin `hop` apart, [B, S] -> [B, count, size].

    Shifted views of blocks of a hop, side by side: no gather, and `count` may be symbolic (jax.export).
    """
    rows, samples = signal.shape
    views = -(-size // hop)
    needed = (count - 1 + views) * hop
    signal = jnp.pad(signal, ((0, 0), (0, max(needed - samples, 0))))[:, :needed]
    blocks = signal.reshape(rows, count - 1 + views, hop)
    return jnp.concatenate([blocks[:, i : i + count] for i in range(views)], axis=-1)[..., :size]


def _reflected(signal: jax.Array, lengths: jax.Array, edge: int) -> jax.Array:
    """The signal with `edge` mirrored samples before it and after each row's last valid one, [B, S + 2 edge]."""
    position = jnp.abs(jnp.arange(signal.shape[1] + 2 * edge, dtype=lengths.dtype) - edge)[None]
    last = jnp.maximum(lengths - 1, 0)[:, None]
    # A row shorter than the edge is mirrored to and fro.
    position = position % jnp.maximum(2 * last, 1)
    position = jnp.clip(jnp.minimum(position, 2 * last - position), 0)
    return jnp.take_along_axis(signal, position, axis=1)


def _overlap_add(frames: jax.Array, hop: int) -> jax.Array:
    """Sum of frames [B, T, size] that start `hop` apart, [B, at least T * hop]."""
    rows, n_frames, size = frames.shape
    blocks = -(-size // hop)
    pieces = jnp.pad(frames, ((0, 0), (0, 0), (0, blocks * hop - size))).reshape(rows, n_frames, blocks, hop)
    total = jnp.zeros((rows, n_frames + blocks - 1, hop), frames.dtype)
    for block in range(blocks):
        total = total.at[:, block : block + n_frames].add(pieces[:, :, block])
    return total.reshape(rows, -1)

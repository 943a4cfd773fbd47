"""Samples before any transform: what is valid, in which unit, and pre-emphasis.

Shape alphabet: B batch, S samples, T frames, F features.
"""

import jax
import jax.numpy as jnp

# Accelerators multiply float32 matrices in bfloat16 unless told otherwise: 0.4 % of a power is 0.02 dB.
EXACT = jax.lax.Precision.HIGHEST


def valid_samples(audio: jax.Array, lengths: jax.Array) -> jax.Array:
    """The waveform in floating point, with zeros from each row's length on, whatever (NaN included) lay there.

    audio: [B, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples. Returns [B, S] in [-1, 1].
    """
    if audio.dtype == jnp.int16:
        audio = audio.astype(jnp.float32) / 32768.0
    return jnp.where(jnp.arange(audio.shape[1], dtype=lengths.dtype)[None] < lengths[:, None], audio, 0.0)


def frame_mask(n_frames: int, lengths: jax.Array) -> jax.Array:
    """True on valid frames, bool [B, T, 1]."""
    return (jnp.arange(n_frames, dtype=lengths.dtype)[None] < lengths[:, None])[:, :, None]


def zero_padding(frames: jax.Array, lengths: jax.Array) -> jax.Array:
    """`frames` [B, T, F], real or complex, with zeros from each row's length (in frames) on."""
    return jnp.where(frame_mask(frames.shape[1], lengths), frames, jnp.zeros((), frames.dtype))


def pre_emphasis(audio: jax.Array, lengths: jax.Array, *, coefficient: float = 0.97) -> tuple[jax.Array, jax.Array]:
    """High-pass y[t] = x[t] - coefficient x[t - 1], with silence before the first sample.

    audio: [B, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples. Returns [B, S] and the lengths.
    This is `librosa.effects.preemphasis(zi=[0])`; librosa's default extrapolates backwards and so more than doubles
    the first sample. Kaldi's is part of the "kaldi" features: it works frame by frame.
    """
    signal = valid_samples(audio, lengths)
    before = jnp.pad(signal, ((0, 0), (1, 0)))[:, : signal.shape[1]]
    return valid_samples(signal - coefficient * before, lengths), lengths

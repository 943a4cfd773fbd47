"""Augmentation by other sounds: noise at a given level, parts of other utterances.

Shape alphabet: B batch, S samples, N noise clips. The contract is that of `augment`: (audio [B, S], lengths [B]) in
and out, per-row parameters and keys, padding neither read nor left.
"""

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.audio.augment import (
    Rows,
    amplitude,
    fit,
    level_ratio,
    mean_power,
    per_row,
    split_keys,
)
from speechjax.audio.augment_filters import fft_convolve
from speechjax.audio.waveform import valid_samples

# Length of the filter that colours noise: below sample_rate / _COLOR_TAPS (8 Hz at 16 kHz) the spectrum is flat.
_COLOR_TAPS = 2048


def colored_noise(keys: jax.Array, samples: int, exponent: float | jax.Array = 0.0) -> jax.Array:
    """Gaussian noise of mean power 1 and a spectrum of power 1 / f ** exponent: float32 [B, samples].

    exponent: 0 is white, 1 pink, 2 brown, -1 blue. White noise through the impulse response of
    (1 - 1/z) ** (-exponent / 2) (Kasdin 1995), faded out by half a cosine; stationary from its first
    sample, and of a row's key alone: more samples leave the first ones as they are.
    """
    place = np.arange(1, _COLOR_TAPS, dtype=np.float32)[None]
    slope = per_row(exponent, len(keys))[:, None] / 2.0
    taps = jnp.cumprod(jnp.pad((place - 1.0 + slope) / place, ((0, 0), (1, 0)), constant_values=1.0), axis=1)
    taps = taps * jnp.asarray(np.cos(np.pi / 2 * np.arange(_COLOR_TAPS) / _COLOR_TAPS), jnp.float32)[None]
    taps = taps / jnp.sqrt(jnp.sum(jnp.square(taps), axis=1, keepdims=True))
    before = _COLOR_TAPS - 1
    white = jax.vmap(lambda key: jax.random.normal(key, (before + samples,)))(keys)
    return fft_convolve(white, taps)[:, before : before + samples]


def loop(clips: jax.Array, clip_lengths: jax.Array, starts: jax.Array, samples: int) -> jax.Array:
    """Clips repeated end to end from sample `starts` [B] of each: [B, S] -> float [B, samples]; empty ones: silence."""
    clips = valid_samples(clips, clip_lengths)
    place = starts[:, None] + jnp.arange(samples, dtype=starts.dtype)[None]
    return jnp.take_along_axis(clips, place % jnp.maximum(clip_lengths, 1)[:, None], axis=1)


def add_noise(audio: jax.Array, lengths: jax.Array, noise: jax.Array, snr_db: float | jax.Array) -> Rows:
    """The audio with noise `snr_db` decibels below it, by mean power over the row's length; the audio's level stays.

    noise: [B, S], float or int16, of any level. Where the audio or the noise is silent, nothing is added: no level of
    noise has that ratio. Raises ValueError if the shapes differ (`loop` makes them equal).
    """
    if noise.shape != audio.shape:
        raise ValueError(f"noise of shape {noise.shape} for audio of shape {audio.shape}")
    signal = valid_samples(audio, lengths)
    added = valid_samples(noise, lengths).astype(signal.dtype)
    scale = level_ratio(mean_power(signal, lengths), mean_power(added, lengths))
    scale = scale * amplitude(-per_row(snr_db, len(signal), signal.dtype))
    return signal + scale[:, None] * added, lengths


def mix_utterances(
    audio: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    prob: float = 0.2,
    ratio_db: tuple[float, float] = (-5.0, 5.0),
    noise: Rows | None = None,
    noise_prob: float = 0.1,
    noise_ratio_db: tuple[float, float] = (-5.0, 20.0),
) -> Rows:
    """Part of another utterance of the batch, or of a noise clip, on part of each: Chen et al. (2022), algorithm 1.

    With probability `prob` a row of n samples receives 1 to n / 2 samples from anywhere in its partner at a random
    place. The energy ratio of the row to its partner, each over its whole length, is uniform in `ratio_db`. The
    lengths, and what the row's labels say, stay.
    noise: (clips [N, samples], lengths [N]); with probability `noise_prob` the partner is one of them, at a ratio
    within `noise_ratio_db`. The partner is never the row itself (the paper allows it) unless the batch has no other.
    All but the choice of a partner depends on the row's key alone; fetching it moves rows between devices.
    """
    signal = valid_samples(audio, lengths)
    rows = jnp.arange(len(signal), dtype=jnp.int32)
    mix_keys, partner_keys, ratio_keys, place_keys, kind_keys, clip_keys = split_keys(keys, 6)
    partner = (rows + 1 + _below(partner_keys, jnp.full_like(rows, max(len(signal) - 1, 1)))) % len(signal)
    other, other_lengths = signal[partner], jnp.take(lengths, partner)
    unit = jax.vmap(jax.random.uniform)(ratio_keys)
    ratio = ratio_db[0] + (ratio_db[1] - ratio_db[0]) * unit
    if noise is not None:
        clips = valid_samples(*noise).astype(signal.dtype)
        clip = _below(clip_keys, jnp.full_like(rows, len(clips)))
        noisy = jax.vmap(jax.random.uniform)(kind_keys) < noise_prob
        width = max(clips.shape[1], signal.shape[1])
        other = jnp.where(noisy[:, None], fit(clips, width)[clip], fit(other, width))
        other_lengths = jnp.where(noisy, jnp.take(noise[1], clip), other_lengths)
        ratio = jnp.where(noisy, noise_ratio_db[0] + (noise_ratio_db[1] - noise_ratio_db[0]) * unit, ratio)
    part = _random_part(place_keys, other, other_lengths, lengths, signal.shape[1])
    scale = level_ratio(mean_power(signal, lengths), mean_power(other, other_lengths))
    scale = scale * amplitude(-ratio).astype(signal.dtype)
    mixed = jax.vmap(jax.random.uniform)(mix_keys) < prob
    return signal + jnp.where(mixed, scale, 0.0)[:, None] * part, lengths


def _random_part(
    keys: jax.Array, other: jax.Array, other_lengths: jax.Array, lengths: jax.Array, samples: int
) -> jax.Array:
    """At most half a row's length from anywhere in `other`, at a random place of a row that is zero elsewhere."""
    length_keys, from_keys, to_keys = split_keys(keys, 3)
    most = lengths // 2
    size = jnp.minimum(1 + _below(length_keys, jnp.maximum(most, 1)), jnp.minimum(most, other_lengths))
    taken_from = _below(from_keys, other_lengths - size + 1)[:, None]
    put_at = _below(to_keys, lengths - size + 1)[:, None]
    place = jnp.arange(samples, dtype=lengths.dtype)[None]
    source = jnp.clip(place - put_at + taken_from, 0, other.shape[1] - 1)
    inside = (place >= put_at) & (place < put_at + size[:, None])
    return jnp.where(inside, jnp.take_along_axis(other, source, axis=1), jnp.zeros((), other.dtype))


def _below(keys: jax.Array, bounds: jax.Array) -> jax.Array:
    """A whole number per row, uniform in 0 ... bound - 1; bounds: [B] integers from 1."""
    return jax.vmap(lambda key, bound: jax.random.randint(key, (), 0, bound, bound.dtype))(keys, bounds)

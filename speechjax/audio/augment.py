"""Augmentation of waveforms and features on the device: random draws, sample-by-sample distortions, SpecAugment.

Filters, speed and rooms are in `augment_filters`, noise and utterance mixing in `augment_mixing`.

Shape alphabet: B batch, S samples, T frames, F features.

Every function takes (audio [B, S], lengths [B]) and returns (audio, lengths): audio is float in [-1, 1] or int16 PCM
and becomes float; samples beyond a row's length never reach the output and are zero in it; nothing limits the
result to [-1, 1]. A parameter is one number or one per row ([B]).

Randomness is per row. `row_keys` makes one key from the global number of a row, so that its augmentation is the same
whatever its neighbours, the batch size or the number of devices. Most distortions are not random: draw their
parameters, apply them to all rows and keep some of the results:

    keys = split_keys(row_keys(seed, step, rows), 3)
    noise = augment_mixing.colored_noise(keys[0], audio.shape[1])
    noisy = augment_mixing.add_noise(audio, lengths, noise, uniform(keys[1], 0.0, 20.0))
    audio, lengths = sometimes(keys[2], 0.5, noisy, (audio, lengths))
"""

from typing import Any

import jax
import jax.numpy as jnp

from speechjax.audio.waveform import frame_mask, valid_samples, zero_padding

Rows = tuple[jax.Array, jax.Array]

# Park et al. (2019), table 1, as arguments of `spec_augment`; LB and LD are LibriSpeech, SM and SS Switchboard.
_LIBRISPEECH = {"freq_width": 27, "time_width": 100, "time_ratio": 1.0}
_SWITCHBOARD = {"time_width": 70, "time_ratio": 0.2, "freq_masks": 2, "time_masks": 2}
POLICY_LB: dict[str, Any] = {**_LIBRISPEECH, "freq_masks": 1, "time_masks": 1}
POLICY_LD: dict[str, Any] = {**_LIBRISPEECH, "freq_masks": 2, "time_masks": 2}
POLICY_SM: dict[str, Any] = {**_SWITCHBOARD, "freq_width": 15}
POLICY_SS: dict[str, Any] = {**_SWITCHBOARD, "freq_width": 27}
# Gulati et al. (2020), section 3.2: only the length of the utterance bounds a time mask.
POLICY_CONFORMER: dict[str, Any] = {
    "freq_width": 27,
    "freq_masks": 2,
    "time_width": None,
    "time_masks": 10,
    "time_ratio": 0.05,
}

# Mean power (full scale 1.0) at which a row counts as silent: -300 dB, where a ratio of powers still fits float32.
_SILENCE = 1e-30


# ---- draws


def row_keys(seed: int, step: int | jax.Array, rows: jax.Array) -> jax.Array:
    """One random key per row, [B]. rows: [B] integers, the rows' numbers in the global batch of this step."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(seed), step), rows)


def split_keys(keys: jax.Array, count: int) -> jax.Array:
    """Independent keys for each of `count` uses: [B] -> [count, B]; a larger count leaves the first as they are."""
    fold_rows = jax.vmap(jax.random.fold_in, (0, None))
    return jax.vmap(fold_rows, (None, 0))(keys, jnp.arange(count))


def uniform(keys: jax.Array, low: float, high: float) -> jax.Array:
    """One number per row, uniform in [low, high): float32 [B]."""
    return jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))(keys)


def choose(keys: jax.Array, count: int) -> jax.Array:
    """One of 0 ... count - 1 per row, all equally likely: int32 [B]."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys)


def sometimes(keys: jax.Array, prob: float | jax.Array, changed: Rows, unchanged: Rows) -> Rows:
    """Each row from `changed` with probability `prob`, otherwise from `unchanged`: both (audio, lengths).

    Returns as many samples as the wider of the two.
    """
    pick = jax.vmap(jax.random.uniform)(keys) < per_row(prob, len(keys))
    width = max(changed[0].shape[1], unchanged[0].shape[1])
    new, old = (fit(valid_samples(*rows), width) for rows in (changed, unchanged))
    return jnp.where(pick[:, None], new, old.astype(new.dtype)), jnp.where(pick, changed[1], unchanged[1])


# ---- distortions of single samples


def gain(audio: jax.Array, lengths: jax.Array, gain_db: float | jax.Array) -> Rows:
    """The audio `gain_db` decibels louder."""
    signal = valid_samples(audio, lengths)
    return signal * amplitude(per_row(gain_db, len(signal), signal.dtype))[:, None], lengths


def clip(audio: jax.Array, lengths: jax.Array, ratio: float | jax.Array) -> Rows:
    """Hard clipping at `ratio` (0 to 1) of each row's peak, as of a microphone driven too hard."""
    signal = valid_samples(audio, lengths)
    limit = jnp.max(jnp.abs(signal), axis=1, initial=0.0) * per_row(ratio, len(signal), signal.dtype)
    return jnp.clip(signal, -limit[:, None], limit[:, None]), lengths


def quantize(audio: jax.Array, lengths: jax.Array, bits: int | jax.Array) -> Rows:
    """Linear PCM of so many bits: rounded to multiples of 2 ** (1 - bits), at most one step below full scale."""
    signal = valid_samples(audio, lengths)
    step = jnp.ldexp(jnp.ones((), signal.dtype), 1 - per_row(bits, len(signal), jnp.int32))[:, None]
    return jnp.clip(jnp.round(signal / step) * step, -1.0, 1.0 - step), lengths


def mu_law(audio: jax.Array, lengths: jax.Array) -> Rows:
    """What a telephone line returns: 8-bit mu-law, encoded and decoded (ITU-T G.711, table 2).

    Exact integer arithmetic on 14-bit samples: 8 segments on either side of zero, 16 steps in each, every segment's
    steps twice as wide as the last one's, the decoded value in the middle of its step (zero itself stays zero).
    No gradient passes through it.
    """
    signal = valid_samples(audio, lengths)
    pcm = jnp.clip(jnp.round(signal * 32768.0), -32768, 32767).astype(jnp.int32) >> 2
    # The bias makes segment s begin at 32 * 2 ** s: its number is the place of the highest bit.
    biased = jnp.minimum(jnp.abs(pcm), 8158) + 33
    shift = 27 - jax.lax.clz(biased)
    # Twice the value, because the middle of a step of 2 is an odd number above an even one.
    doubled = ((2 * (biased >> shift) + 1) << shift) - 66
    decoded = doubled.astype(signal.dtype) / 16384.0
    return jnp.where(pcm < 0, -decoded, decoded), lengths


def drop_packets(
    audio: jax.Array, lengths: jax.Array, keys: jax.Array, loss: float | jax.Array, *, packet: int = 320
) -> Rows:
    """Silence for a share `loss` (0 to 1) of the packets of `packet` samples, each lost independently of the others."""
    signal = valid_samples(audio, lengths)
    packets = -(-signal.shape[1] // packet)
    lost = jax.vmap(lambda key: jax.random.uniform(key, (packets,)))(keys) < per_row(loss, len(signal))[:, None]
    lost = jnp.repeat(lost, packet, axis=1)[:, : signal.shape[1]]
    return jnp.where(lost, jnp.zeros((), signal.dtype), signal), lengths


# ---- features


def spec_augment(
    features: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    freq_masks: int = 2,
    freq_width: int = 27,
    time_masks: int = 2,
    time_width: int | None = 100,
    time_ratio: float = 1.0,
    fill: float | None = None,
) -> Rows:
    """Bands of features and spans of frames hidden (Park et al. 2019, section 2, without its time warping).

    features: [B, T, F] float. lengths: [B] int32, frames. The defaults are the policy LD; `**POLICY_...` are others.
    Each of `freq_masks` bands is uniformly 0 to `freq_width` features wide (the paper's F and m_F), each of
    `time_masks` spans 0 to `time_width` frames (T, m_T) but at most `time_ratio` (p) of the utterance; None leaves
    only that bound. A mask may lie anywhere, up to and including the last feature or frame (the paper's half-open
    interval never reaches that one); masks may overlap.
    fill: what hidden places hold; None for the mean over the utterance, the paper's zero on normalised features.
    """
    B, T, F = features.shape
    freq_keys, time_keys = split_keys(keys, 2)
    widest = jnp.floor(min(time_ratio, 1.0) * lengths.astype(jnp.float32)).astype(lengths.dtype)
    if time_width is not None:
        widest = jnp.minimum(widest, time_width)
    bands = jnp.full((B,), F, lengths.dtype)
    hidden_BxTx1 = _spans(time_keys, lengths, widest, time_masks, T)[:, :, None]
    hidden_Bx1xF = _spans(freq_keys, bands, jnp.minimum(bands, freq_width), freq_masks, F)[:, None, :]
    features = zero_padding(features, lengths)
    if fill is None:
        count = (jnp.maximum(lengths, 1) * F).astype(features.dtype)[:, None, None]
        value = jnp.sum(features, axis=(1, 2), keepdims=True) / count
    else:
        value = jnp.full((B, 1, 1), fill, features.dtype)
    return jnp.where(frame_mask(T, lengths) & (hidden_BxTx1 | hidden_Bx1xF), value, features), lengths


def _spans(keys: jax.Array, extents: jax.Array, widest: jax.Array, count: int, size: int) -> jax.Array:
    """Union of `count` random spans within the first `extents` [B] of `size` places: bool [B, size]."""
    width_keys, start_keys = split_keys(keys, 2)
    several = jax.vmap(lambda key, bound: jax.random.randint(key, (count,), 0, bound + 1, bound.dtype))
    width = several(width_keys, widest)
    start = several(start_keys, extents[:, None] - width)
    place = jnp.arange(size, dtype=extents.dtype)[None, None]
    return jnp.any((place >= start[:, :, None]) & (place < (start + width)[:, :, None]), axis=1)


# ---- what every augmentation is made of


def fit(signal: jax.Array, samples: int) -> jax.Array:
    """The signal [B, S] cut or padded with zeros to [B, samples]."""
    signal = signal[:, :samples]
    return jnp.pad(signal, ((0, 0), (0, samples - signal.shape[1])))


def mean_power(signal: jax.Array, lengths: jax.Array) -> jax.Array:
    """Mean square over each row's length, of a signal that is zero beyond it: [B]; 0 where the length is."""
    return jnp.sum(jnp.square(signal), axis=1) / jnp.maximum(lengths, 1).astype(signal.dtype)


def level_ratio(wanted: jax.Array, power: jax.Array) -> jax.Array:
    """The factor on the amplitude that turns one mean power into another; 0, without gradient, if either is silent."""
    audible = (wanted > _SILENCE) & (power > _SILENCE)
    # Both branches of a `where` are differentiated: the square root must not see a zero even where it is not taken.
    ratio = jnp.where(audible, wanted, 1.0) / jnp.where(audible, power, 1.0)
    return jnp.where(audible, jnp.sqrt(ratio), 0.0)


def amplitude(decibel: jax.Array) -> jax.Array:
    """Decibels as a factor on the amplitude."""
    return 10.0 ** (decibel / 20.0)


def per_row(value: float | jax.Array, rows: int, dtype: Any = jnp.float32) -> jax.Array:
    """One value per row, [B], of a number or of an array that is [B] already."""
    return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))

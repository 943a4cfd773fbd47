"""Augmentation by filters: speed, band limits, the responses of rooms.

Shape alphabet: B batch, S samples, R samples of a room response. The contract is that of `augment`: (audio [B, S],
lengths [B]) in and out, per-row parameters, padding neither read nor left.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.audio.augment import Rows, fit, level_ratio, mean_power, per_row
from speechjax.audio.resample import resample
from speechjax.audio.waveform import valid_samples

SPEED_OF_SOUND = 343.0

# Finer ratios would need a filter of hundreds of phases.
_MAX_DENOMINATOR = 100
# Half the support of a delayed impulse in `shoebox_response`, samples.
_DELAY_REACH = 40


def fft_convolve(signal: jax.Array, taps: jax.Array) -> jax.Array:
    """Full linear convolution of each row, [B, S] with [B, R] -> [B, S + R - 1]."""
    samples = signal.shape[1] + taps.shape[1] - 1
    # The smallest of the lengths for which an FFT is quick: a power of two, or 3, 5, 9, 15 times one.
    size = min(odd << max(0, math.ceil(math.log2(samples / odd))) for odd in (1, 3, 5, 9, 15))
    return jnp.fft.irfft(jnp.fft.rfft(signal, size) * jnp.fft.rfft(taps, size), size)[:, :samples]


# ---- speed


def speed_len(samples: int, factors: tuple[float, ...] = (0.9, 1.0, 1.1)) -> int:
    """The samples that `speed` returns for `samples` samples (static counts): ceil(samples / slowest factor)."""
    return max(math.ceil(samples / _ratio(factor)) for factor in factors)


def speed(
    audio: jax.Array, lengths: jax.Array, which: jax.Array, *, factors: tuple[float, ...] = (0.9, 1.0, 1.1)
) -> Rows:
    """Speed, and with it pitch, times one of `factors` (Ko et al. 2015, section 2): which, [B] int32, says which.

    Returns [B, speed_len(S, factors)], a row of n samples now ceil(n / factor) long. Every row is resampled to every
    factor, a strided convolution each: several times the arithmetic of one, but none of the gathers that a factor
    traced per row would need. What passes and what does not is the filter of `resample`.
    Raises ValueError for factors that are not fractions of whole numbers up to 100.
    """
    signal = valid_samples(audio, lengths)
    width = speed_len(signal.shape[1], factors)
    changed, new_lengths = jnp.zeros((len(signal), width), signal.dtype), jnp.zeros_like(lengths)
    for number, factor in enumerate(factors):
        ratio = _ratio(factor)
        chosen = which == number
        resampled, durations = resample(signal, lengths, from_hz=ratio.numerator, to_hz=ratio.denominator)
        changed = jnp.where(chosen[:, None], fit(resampled, width), changed)
        new_lengths = jnp.where(chosen, durations, new_lengths)
    return changed, new_lengths


def _ratio(factor: float) -> Fraction:
    ratio = Fraction(factor).limit_denominator(_MAX_DENOMINATOR)
    if ratio <= 0 or ratio.numerator > _MAX_DENOMINATOR or abs(float(ratio) - factor) > 1e-9 * factor:
        raise ValueError(f"speed factor {factor} is not a fraction of whole numbers up to {_MAX_DENOMINATOR}: round it")
    return ratio


# ---- band limits


def band_limit(
    audio: jax.Array,
    lengths: jax.Array,
    low_hz: float | jax.Array,
    high_hz: float | jax.Array,
    *,
    sample_rate: int = 16000,
    taps: int = 511,
) -> Rows:
    """Only the frequencies between two; 300 and 3400 Hz are a telephone's, a `low_hz` of 0 makes a low-pass filter.

    A linear-phase filter without delay: an ideal one under a Hamming window, scaled to 1 in the middle of its band
    (at 0 Hz or at half the sample rate where the band reaches it), as `scipy.signal.firwin` makes it. The
    transition is about 3.3 * sample_rate / taps wide and has the amplitude 1/2 at the given frequency.
    Raises ValueError for an even number of taps.
    """
    if taps % 2 == 0:
        raise ValueError(f"band_limit needs an odd number of taps, not {taps}: an even filter delays by half a sample")
    signal = valid_samples(audio, lengths)
    # In units of half the sample rate.
    low, high = (
        jnp.clip(per_row(hz, len(signal), signal.dtype) / (sample_rate / 2), 0.0, 1.0)[:, None]
        for hz in (low_hz, high_hz)
    )
    half = taps // 2
    place = jnp.arange(-half, half + 1, dtype=signal.dtype)[None]
    window = jnp.asarray(np.hamming(taps), signal.dtype)[None]
    kernel = (high * jnp.sinc(high * place) - low * jnp.sinc(low * place)) * window
    middle = jnp.where(low == 0.0, 0.0, jnp.where(high == 1.0, 1.0, (low + high) / 2))
    kernel = kernel / jnp.sum(kernel * jnp.cos(jnp.pi * middle * place), axis=1, keepdims=True)
    filtered = fft_convolve(signal, kernel)[:, half : half + signal.shape[1]]
    return valid_samples(filtered, lengths), lengths


# ---- rooms


def convolve_response(audio: jax.Array, lengths: jax.Array, responses: jax.Array) -> Rows:
    """The audio as heard in a room. responses: [B, R], float or int16, padded with zeros; each row its own.

    Aligned to the direct sound, the response's largest sample in magnitude, so that frames and labels stay where they
    were; at the level it had, by mean power over the row's length. What rings on beyond that length is cut off.
    A row whose response is silent becomes silent.
    """
    signal = valid_samples(audio, lengths)
    taps = valid_samples(responses, jnp.full((len(signal),), responses.shape[1], jnp.int32)).astype(signal.dtype)
    # One more zero than the response is long: a slice never runs past the end.
    heard = jnp.pad(fft_convolve(signal, taps), ((0, 0), (0, 1)))
    direct = jnp.argmax(jnp.abs(taps), axis=1)
    cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice(row, (start,), (signal.shape[1],)))(heard, direct)
    cut = valid_samples(cut, lengths)
    scale = level_ratio(mean_power(signal, lengths), mean_power(cut, lengths))
    return cut * scale[:, None], lengths


def decaying_response(
    keys: jax.Array,
    samples: int,
    rt60: float | jax.Array,
    direct_db: float | jax.Array,
    *,
    sample_rate: int = 16000,
) -> jax.Array:
    """Statistical room response (Polack's model): an impulse, then Gaussian noise that decays by 60 dB in `rt60` s.

    direct_db: energy of the impulse (sample 0, of height 1) over that of all the rest. Returns float32 [B, samples].
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, (samples,)))(keys)
    seconds = jnp.arange(samples, dtype=jnp.float32)[None] / sample_rate
    tail = noise * 10.0 ** (-3.0 * seconds / per_row(rt60, len(noise))[:, None])
    tail = jnp.where(seconds > 0.0, tail, 0.0)
    wanted = 10.0 ** (-per_row(direct_db, len(noise)) / 10.0)
    energy = jnp.sum(jnp.square(tail), axis=1)
    return jnp.where(seconds > 0.0, tail * level_ratio(wanted, energy)[:, None], 1.0)


def shoebox_response(
    rooms: jax.Array,
    sources: jax.Array,
    microphones: jax.Array,
    reflection: float | jax.Array,
    *,
    samples: int,
    max_order: int = 10,
    sample_rate: int = 16000,
) -> jax.Array:
    """Response of a rectangular room by mirror images of the source (Allen and Berkley 1979): float32 [B, samples].

    rooms, sources, microphones: [B, 3], metres from one corner. reflection: the walls' factor on the pressure, 0 to 1;
    `reflection_of` gives it for a reverberation time. An image at distance d (m) is an impulse of height 1 / (4 pi d)
    after d / 343 s, delayed by fractions of a sample with a Hann-windowed sinc (Peterson 1986); the paper's high-pass
    filter at 100 Hz is left out.
    Of each axis the images of up to `max_order` reflections count, (2 * max_order + 1) ** 3 in all: a row takes
    megabytes and milliseconds, so make a bank of rooms once and draw from that.
    """
    orders = np.arange(-max_order, max_order + 1)
    reflections = np.abs(orders)[:, None, None] + np.abs(orders)[None, :, None] + np.abs(orders)[None, None, :]
    steps = jnp.arange(-_DELAY_REACH, _DELAY_REACH + 1)

    def one_row(row: tuple[jax.Array, ...]) -> jax.Array:
        room, source, microphone, factor = row
        mirrored = jnp.where((orders % 2 == 0)[:, None], source[None], room[None] - source[None])
        away = orders[:, None].astype(np.float32) * room[None] + mirrored - microphone[None]
        x, y, z = jnp.square(away).T
        distance = jnp.sqrt(x[:, None, None] + y[None, :, None] + z[None, None, :]).ravel()
        height = (factor ** jnp.asarray(reflections, jnp.float32)).ravel() / (4.0 * math.pi * distance)
        delay = distance * (sample_rate / SPEED_OF_SOUND)
        first = jnp.floor(delay)
        offset = steps[None].astype(jnp.float32) - (delay - first)[:, None]
        window = 0.5 + 0.5 * jnp.cos(jnp.pi * offset / (_DELAY_REACH + 1))
        place = first.astype(jnp.int32)[:, None] + steps[None]
        # Negative places would count from the end: the row starts early by the reach of a delayed impulse.
        row_sum = jnp.zeros(samples + _DELAY_REACH, jnp.float32)
        row_sum = row_sum.at[place + _DELAY_REACH].add(height[:, None] * jnp.sinc(offset) * window, mode="drop")
        return row_sum[_DELAY_REACH:]

    return jax.lax.map(one_row, (rooms, sources, microphones, per_row(reflection, len(rooms))))


def reflection_of(rooms: jax.Array, rt60: float | jax.Array) -> jax.Array:
    """The walls' reflection factor, [B], that gives rooms ([B, 3], m) a reverberation of `rt60` s (Eyring 1930)."""
    x, y, z = rooms.T
    mean_free_path = 4.0 * x * y * z / (2.0 * (x * y + y * z + z * x))
    # 60 dB of energy lost in rt60 * c / path reflections, each of which multiplies the pressure by this factor.
    return 10.0 ** (-3.0 * mean_free_path / (SPEED_OF_SOUND * per_row(rt60, len(rooms))))

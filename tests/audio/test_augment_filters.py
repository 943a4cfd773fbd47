"""Resampling on sines, filters in closed form, room responses against brute force and their reverberation time."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.audio import augment, augment_filters

FACTORS = (0.9, 1.0, 1.1)
KEYS = augment.row_keys(0, 0, np.arange(64))


def speed(x: np.ndarray, which: int, lengths: np.ndarray | None = None, factors=FACTORS):
    lengths = np.full(len(x), x.shape[1], np.int32) if lengths is None else lengths
    chosen = jnp.full((len(x),), which)
    return jax.jit(lambda x, n: augment_filters.speed(x, n, chosen, factors=factors))(x, lengths)


# ---- speed


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("band", [0.05, 0.5, 0.9])
def test_a_sine_becomes_a_sine_of_another_pitch(which, band):
    factor = FACTORS[which]
    radians = np.pi * band * min(1.0, 1 / factor)
    ours, lengths = speed(np.sin(radians * np.arange(3001))[None].astype(np.float32), which)
    assert lengths[0] == math.ceil(3001 / factor)
    middle = np.arange(200, 2500)
    # The pass band's documented ripple.
    np.testing.assert_allclose(ours[0, middle], np.sin(radians * factor * middle), rtol=0, atol=3e-5)


def test_what_would_alias_is_suppressed():
    for band in (1.0, 1.09):
        x = np.sin(np.pi / 1.1 * band * np.arange(3001) + 0.3)[None].astype(np.float32)
        assert np.abs(speed(x, 2)[0][0, 200:2500]).max() < 10 ** (-95 / 20)
    # The filter does not cut deep into the band: at 0.95 the amplitude is halved.
    edge = np.sin(np.pi / 1.1 * 0.95 * np.arange(3001) + 0.3)[None].astype(np.float32)
    assert np.abs(speed(edge, 2)[0][0, 200:2500]).max() == pytest.approx(0.5, abs=1e-3)


def test_lengths_are_rounded_up_per_row():
    lengths = np.arange(0, 64, dtype=np.int32)
    for which, factor in enumerate(("9/10", "1", "11/10")):
        top, bottom = (int(part) for part in (*factor.split("/"), "1")[:2])
        _, ours = speed(np.zeros((64, 64), np.float32), which, lengths)
        np.testing.assert_array_equal(ours, [-(-n * bottom // top) for n in range(64)])
    assert augment_filters.speed_len(64) == 72


def test_an_hour_does_not_overflow():
    lengths = jax.eval_shape(lambda: jnp.zeros(1, jnp.int32))
    hour = np.array([16000 * 3600], np.int32)
    # Only the lengths: the audio is as short as it can be.
    _, ours = augment_filters.speed(jnp.zeros((1, 1)), jnp.asarray(hour), jnp.zeros(1, jnp.int32), factors=(97 / 99,))
    assert ours[0] == -(-16000 * 3600 * 99 // 97)
    assert ours.dtype == lengths.dtype


@pytest.mark.parametrize("factor", [math.pi, 0.0, -1.0, 101 / 100, 1 / 101])
def test_a_factor_too_fine_is_refused(factor):
    with pytest.raises(ValueError, match="round it"):
        augment_filters.speed_len(100, (factor,))


# ---- band limits


def test_bands_are_per_row():
    t = np.arange(4000) / 16000
    x = np.tile((np.sin(2 * np.pi * 500 * t) + np.sin(2 * np.pi * 3000 * t))[None].astype(np.float32), (3, 1))
    low, high = jnp.array([0.0, 1500.0, 0.0]), jnp.array([1500.0, 8000.0, 8000.0])
    ours, _ = augment_filters.band_limit(jnp.asarray(x), jnp.full(3, 4000), low, high)
    middle = slice(300, 3700)
    expected = np.stack([np.sin(2 * np.pi * 500 * t), np.sin(2 * np.pi * 3000 * t), x[2]])
    # A Hamming window's ripple is 2e-3.
    np.testing.assert_allclose(ours[:, middle], expected[:, middle], rtol=0, atol=4e-3)
    np.testing.assert_allclose(ours[2], x[2], rtol=0, atol=1e-5)  # all-pass: an impulse, but for FFT rounding


def test_an_even_filter_is_refused():
    with pytest.raises(ValueError, match="odd"):
        augment_filters.band_limit(jnp.zeros((1, 9)), jnp.array([9]), 0, 100, taps=10)


@pytest.mark.parametrize(("samples", "taps"), [(1, 1), (7, 3), (100, 101), (1023, 2)])
def test_convolution_is_numpys(samples, taps):
    rng = np.random.default_rng(0)
    x, h = rng.normal(size=(2, samples)).astype(np.float32), rng.normal(size=(2, taps)).astype(np.float32)
    expected = [np.convolve(a.astype(float), b.astype(float)) for a, b in zip(x, h, strict=True)]
    # 11 float32 stages of values up to 30.
    np.testing.assert_allclose(augment_filters.fft_convolve(x, h), expected, rtol=0, atol=3e-5)


# ---- rooms


def test_an_impulse_anywhere_changes_nothing():
    x = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    responses = np.zeros((3, 50), np.float32)
    responses[[0, 1, 2], [0, 49, 17]] = 3.0, 0.1, 1e-3
    lengths = np.array([200, 133, 10], np.int32)
    ours, _ = jax.jit(augment_filters.convolve_response)(x, lengths, responses)
    expected = np.where(np.arange(200)[None] < lengths[:, None], x, 0.0)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    # Negative: the second-largest sample is an echo, and stays audible.
    responses[2, 20] = 9e-4
    echo, _ = jax.jit(augment_filters.convolve_response)(x, lengths, responses)
    assert np.abs(echo[2] - expected[2]).max() > 0.1


def test_reverberation_keeps_the_level():
    x = np.random.default_rng(0).normal(size=(64, 500)).astype(np.float32)
    lengths = np.arange(64, dtype=np.int32) * 7
    ours = jax.jit(
        lambda k: augment_filters.convolve_response(x, lengths, augment_filters.decaying_response(k, 400, 0.02, 0.0))
    )(KEYS)[0]
    ours = np.asarray(ours, np.float64)
    for row, length in enumerate(lengths[1:], 1):
        ratio = np.mean(np.square(ours[row, :length])) / np.mean(np.square(x[row, :length]))
        assert abs(ratio - 1) < 1e-5  # two float32 sums


def test_a_silent_response_gives_silence():
    ours, _ = jax.jit(augment_filters.convolve_response)(jnp.ones((1, 9)), jnp.array([9]), jnp.zeros((1, 4)))
    np.testing.assert_array_equal(ours, np.zeros((1, 9)))


def decay_seconds(energy: np.ndarray, first_db: float, last_db: float, rate: int = 16000) -> float:
    """Time for 60 dB by the slope of Schroeder's backward integral between two levels."""
    left = np.cumsum(energy[::-1])[::-1]
    decibel = 10 * np.log10(left / left[0])
    part = (decibel < first_db) & (decibel > last_db)
    return -60 / np.polyfit(np.flatnonzero(part) / rate, decibel[part], 1)[0]


@pytest.mark.parametrize(("rt60", "direct_db"), [(0.1, 0.0), (0.25, 10.0), (0.25, -6.0)])
def test_the_tail_decays_as_asked(rt60, direct_db):
    ours = np.asarray(augment_filters.decaying_response(KEYS, 6001, rt60, direct_db), np.float64)
    np.testing.assert_array_equal(ours[:, 0], 1.0)
    direct = -10 * np.log10(np.sum(ours[:, 1:] ** 2, axis=1))
    np.testing.assert_allclose(direct, direct_db, atol=1e-4)  # a float32 sum
    # 64 rows of some 1000 independent samples: 1 / sqrt(64,000) = 0.4 % of the energy, less of the slope's 40 dB.
    assert decay_seconds(np.mean(ours[:, 1:] ** 2, axis=0), -1, -41) == pytest.approx(rt60, rel=0.01)


def images(room, source, microphone, reflection, samples, max_order) -> np.ndarray:
    """Allen and Berkley's sums over p (mirrored or not) and n (rooms away), one image at a time, in float64."""
    row = np.zeros(samples)
    t = np.arange(samples)
    reach = range(-max_order, max_order + 1)
    axes = []
    for length, s, m in zip(room, source, microphone, strict=True):
        found = [((1 - 2 * p) * s + 2 * n * length - m, abs(n - p) + abs(n)) for p in (0, 1) for n in reach]
        axes.append([(x, order) for x, order in found if order <= max_order])
    for (x, i), (y, j), (z, k) in itertools.product(*axes):
        distance = np.sqrt(x * x + y * y + z * z)
        offset = t - distance / 343 * 16000
        window = np.where(np.abs(offset) < 41, 0.5 + 0.5 * np.cos(np.pi * offset / 41), 0)
        row += reflection ** (i + j + k) / (4 * np.pi * distance) * np.sinc(offset) * window
    return row


def test_images_agree_with_brute_force():
    rooms = np.array([[3.0, 4.0, 2.5], [6.1, 2.9, 3.3]], np.float32)
    sources = np.array([[1.0, 3.1, 1.2], [5.0, 0.4, 1.7]], np.float32)
    microphones = np.array([[2.2, 0.7, 1.1], [0.3, 2.5, 1.0]], np.float32)
    factors = jnp.array([0.9, 0.5])
    ours = jax.jit(augment_filters.shoebox_response, static_argnames=("samples", "max_order"))(
        rooms, sources, microphones, factors, samples=700, max_order=2
    )
    for row in range(2):
        places = (x[row].astype(np.float64) for x in (rooms, sources, microphones))
        expected = images(*places, float(factors[row]), 700, 2)
        # A delay of 1000 samples has 24 bits: 6e-5 of a sample, and a sinc's slope is up to 1.4 a sample.
        np.testing.assert_allclose(ours[row], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_walls_that_swallow_everything_leave_the_direct_sound():
    # 343 m/s at 16 kHz: 100 samples are 2.14375 m.
    far = jnp.array([[1.0 + 2.14375, 2.0, 1.5]])
    ours = augment_filters.shoebox_response(
        jnp.array([[5.0, 4.0, 3.0]]), jnp.array([[1.0, 2.0, 1.5]]), far, 0.0, samples=300, max_order=1
    )
    expected = np.zeros(300)
    expected[100] = 1 / (4 * np.pi * 2.14375)
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=1e-5)


def test_a_room_reverberates_about_as_long_as_eyring_says():
    rooms = jnp.array([[3.0, 4.0, 2.5]])
    factor = augment_filters.reflection_of(rooms, 0.1)
    ours = augment_filters.shoebox_response(
        rooms, jnp.array([[1.0, 3.1, 1.2]]), jnp.array([[2.2, 0.7, 1.1]]), factor, samples=1600, max_order=13
    )
    # Eyring's field is diffuse; between equal parallel walls sound lives some tens of percent longer.
    assert decay_seconds(np.asarray(ours[0], np.float64) ** 2, -5, -35) == pytest.approx(0.12, rel=0.25)


def test_eyrings_formula():
    volume, surface = 3.0 * 4.0 * 2.5, 2 * (12.0 + 10.0 + 7.5)
    factor = float(augment_filters.reflection_of(jnp.array([[3.0, 4.0, 2.5]]), 0.3)[0])
    rt60 = 24 * np.log(10) / 343 * volume / (-surface * np.log(factor**2))
    assert rt60 == pytest.approx(0.3, rel=1e-5)  # one float32 power

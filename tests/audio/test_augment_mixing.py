"""Noise spectra in closed form, signal-to-noise ratios, and utterance mixing taken apart again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from speechjax.audio import augment, augment_mixing

KEYS = augment.row_keys(0, 0, np.arange(256))
colored_noise = jax.jit(augment_mixing.colored_noise, static_argnums=1)


# ---- noise


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, -1.0])
def test_the_spectrum_falls_as_asked(exponent):
    noise = np.asarray(colored_noise(KEYS[:64], 8192, exponent), np.float64)
    frequency, power = scipy.signal.welch(noise, nperseg=4096, axis=1)
    power = power.mean(axis=0)
    # Closed form of |1 - 1/z| ** -exponent; by octaves, from 5 times the filter's lowest frequency.
    expected = (2 * np.sin(np.pi * frequency[1:])) ** -exponent
    ratio = []
    for octave in range(7):
        band = (frequency[1:] > 0.5 / 2 ** (octave + 1)) & (frequency[1:] <= 0.5 / 2**octave)
        ratio.append(10 * np.log10(np.mean((power[1:] / expected)[band])))
    # The narrowest band averages 16 bins of 64 rows, some 1000 values: 0.15 dB. Another exponent by 0.2: 3 dB.
    assert max(ratio) - min(ratio) < 0.8


def test_noise_has_power_one_from_its_first_sample_and_keeps_it():
    for exponent in (0.0, 1.0, -2.0):
        noise = np.asarray(colored_noise(KEYS, 512, exponent), np.float64)
        for part in (noise[:, :64], noise[:, -64:]):
            # Pink noise is correlated: 256 rows count as 256 values of variance 2 at worst, 9 % each.
            assert np.mean(part**2) == pytest.approx(1.0, abs=0.35)


def test_colours_are_per_row_and_rows_independent():
    mixed = colored_noise(KEYS[:3], 300, jnp.array([0.0, 1.0, 2.0]))
    pink = colored_noise(KEYS[1:2], 700, 1.0)
    # FFTs of another length round otherwise.
    np.testing.assert_allclose(mixed[1], pink[0, :300], rtol=0, atol=1e-5)
    white = np.asarray(colored_noise(KEYS, 512))
    correlation = np.corrcoef(white) - np.eye(256)
    assert np.abs(correlation).max() < 6 / np.sqrt(512)


def test_white_noise_is_the_keys_own():
    expected = jax.vmap(lambda key: jax.random.normal(key, (2047 + 50,)))(KEYS[:2])[:, 2047:]
    np.testing.assert_allclose(colored_noise(KEYS[:2], 50, 0.0), expected, rtol=0, atol=1e-5)  # FFT rounding


def test_loops_start_where_asked():
    clips = jnp.array([[1.0, 2.0, 3.0, 9.0], [4.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    ours = augment_mixing.loop(clips, jnp.array([3, 1, 0]), jnp.array([2, 0, 5]), 5)
    np.testing.assert_array_equal(ours, np.array([[3, 1, 2, 3, 1], [4] * 5, [0] * 5], np.float32))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_the_ratio_is_what_was_asked_of_each_row(scale):
    rng = np.random.default_rng(0)
    audio = rng.normal(0, 0.1, (4, 900)).astype(np.float32)
    noise = (scale * rng.normal(size=(4, 900))).astype(np.float32)
    lengths = np.array([900, 451, 100, 3], np.int32)
    wanted = jnp.array([20.0, 0.0, -10.0, 7.3])
    ours, _ = jax.jit(augment_mixing.add_noise)(audio, lengths, noise, wanted)
    for row, length in enumerate(lengths):
        clean = audio[row, :length].astype(np.float64)
        added = np.asarray(ours[row, :length], np.float64) - clean
        # At 20 dB the difference of two float32 numbers keeps 20 bits.
        assert 10 * np.log10(np.sum(clean**2) / np.sum(added**2)) == pytest.approx(float(wanted[row]), abs=1e-3)


def test_silence_stays_silence():
    x = jnp.zeros((2, 8)).at[1].set(0.5)
    noise = jnp.zeros((2, 8)).at[0].set(0.5)
    ours, _ = augment_mixing.add_noise(x, jnp.array([8, 8]), noise, -40.0)
    np.testing.assert_array_equal(ours, x)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        augment_mixing.add_noise(jnp.zeros((2, 8)), jnp.array([8, 8]), jnp.zeros((1, 8)), 0.0)


# ---- utterance mixing

LENGTHS = np.random.default_rng(2).integers(20, 65, 256).astype(np.int32)
AUDIO = np.random.default_rng(0).normal(0, 0.3, (256, 64)).astype(np.float32)
CLIPS = (np.random.default_rng(1).normal(0, 5.0, (3, 90)).astype(np.float32), np.array([90, 40, 7], np.int32))


def mixed_parts(others: list[np.ndarray], **options) -> list[tuple[int, int, int, int, int, float]]:
    """(row, start, size, partner, start in it, energy ratio in dB) of each mixed row, by looking for the part."""
    ours, lengths = jax.jit(lambda x, n, k: augment_mixing.mix_utterances(x, n, k, **options))(AUDIO, LENGTHS, KEYS)
    np.testing.assert_array_equal(lengths, LENGTHS)
    ours = np.asarray(ours)
    everything, begins = np.concatenate(others), np.cumsum([0] + [len(other) for other in others[:-1]])
    found = []
    for row, length in enumerate(LENGTHS):
        added = np.asarray(ours[row], np.float64) - AUDIO[row]
        assert not np.any(ours[row, length:])
        place = np.flatnonzero(added[:length])
        if not len(place):
            np.testing.assert_array_equal(ours[row, :length], AUDIO[row, :length])
            continue
        part = added[place[0] : place[-1] + 1]
        norm = np.sqrt(np.convolve(np.square(everything), np.ones(len(part)), "valid"))
        likeness = np.correlate(everything, part, "valid") / norm / np.linalg.norm(part)
        best = int(np.argmax(likeness))
        assert likeness[best] > 1 - 1e-6  # float32 sums
        partner = int(np.searchsorted(begins, best, side="right")) - 1
        start = best - begins[partner]
        piece = everything[best : best + len(part)]
        scale = np.linalg.norm(part) / np.linalg.norm(piece)
        own, other = AUDIO[row, :length].astype(np.float64), others[partner]
        ratio = 10 * np.log10(np.mean(own**2) / np.mean(other**2) / scale**2)
        found.append((row, int(place[0]), len(part), partner, start, ratio))
    return found


def test_mixing_is_the_published_algorithm():
    others = [row[:length].astype(np.float64) for row, length in zip(AUDIO, LENGTHS, strict=True)]
    found = mixed_parts(others, prob=0.6)
    rows = np.array([row for row, *_ in found])
    assert abs(len(found) / 256 - 0.6) < 5 * np.sqrt(0.6 * 0.4 / 256)
    size = np.array([size for _, _, size, *_ in found])
    assert (size <= LENGTHS[rows] // 2).all()
    # Uniform on 1 ... n / 2: half of them below the middle. 5 sigma of 150 draws, as everywhere below.
    slack = 5 * 0.5 / np.sqrt(len(found))
    assert abs(np.mean(size <= LENGTHS[rows] / 4) - 0.5) < slack
    start = np.array([start for _, start, *_ in found])
    assert abs(np.mean(start < (LENGTHS[rows] - size) / 2) - 0.5) < slack
    # Pieces of one or two samples look alike anywhere: no partner can be told from them.
    found = [part for part in found if part[2] > 4]
    partner = np.array([partner for *_, partner, _, _ in found])
    rows = np.array([row for row, *_ in found])
    assert not np.any(partner == rows)
    assert abs(np.mean(partner < 128) - 0.5) < slack
    assert len(np.unique((partner - rows) % 256)) > len(found) * 0.6
    ratio = np.array([ratio for *_, ratio in found])
    assert np.abs(ratio).max() < 5.001
    assert abs(np.mean(ratio < 0) - 0.5) < slack
    source = np.array([start for *_, start, _ in found]) / (LENGTHS[partner] - [p[2] for p in found] + 1)
    assert abs(np.mean(source < 0.5) - 0.5) < slack


def test_noise_clips_have_their_own_ratio():
    others = [clip[:length].astype(np.float64) for clip, length in zip(*CLIPS, strict=True)]
    found = [part for part in mixed_parts(others, prob=1.0, noise=CLIPS, noise_prob=1.0) if part[2] > 4]
    shares = np.bincount([partner for *_, partner, _, _ in found], minlength=3)
    assert (shares > 0).all()
    ratio = np.array([ratio for *_, ratio in found])
    assert ratio.min() > -5.001
    assert ratio.max() < 20.001
    assert abs(np.mean(ratio < 7.5) - 0.5) < 5 * 0.5 / np.sqrt(len(found))


def test_noise_is_as_frequent_as_asked():
    loud = (np.full((1, 64), 1.0, np.float32), np.array([64], np.int32))
    positive = np.abs(AUDIO) + 0.1
    mix = jax.jit(lambda x, k: augment_mixing.mix_utterances(x, LENGTHS, k, prob=1.0, noise=loud, noise_prob=0.3))
    added = np.asarray(mix(positive, KEYS)[0]) - np.where(np.arange(64)[None] < LENGTHS[:, None], positive, 0)
    # A constant clip adds a constant.
    parts = [row[row > 0] for row in added]
    constant = [np.ptp(part) < 1e-5 for part in parts if len(part) > 2]
    assert abs(np.mean(constant) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(constant))


def test_the_partner_is_another_row():
    keys = jnp.reshape(KEYS[:32], (16, 2))
    x = jnp.stack([jnp.ones(40), -jnp.ones(40)])
    mixed = jax.jit(jax.vmap(lambda k: augment_mixing.mix_utterances(x, jnp.array([40, 40]), k, prob=1.0)[0]))(keys)
    # Either row can only lose by the other, of the opposite sign.
    assert np.all((mixed - x[None]) * x[None] <= 0)
    assert np.all(np.any(mixed != x[None], axis=2))


def test_never_means_never_and_one_row_mixes_with_itself():
    mix = jax.jit(augment_mixing.mix_utterances, static_argnames="prob")
    ours, _ = mix(AUDIO, LENGTHS, KEYS, prob=0.0)
    np.testing.assert_array_equal(ours, np.where(np.arange(64)[None] < LENGTHS[:, None], AUDIO, 0))
    alone, _ = mix(jnp.ones((1, 9)), jnp.array([9]), KEYS[:1], prob=1.0)
    assert np.sum(np.asarray(alone) > 1) in range(1, 5)

"""What every augmentation promises: padding neither read nor left, rows independent, finite at length 0, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from speechjax.audio import augment, augment_filters, augment_mixing

LENGTHS = np.array([801, 1, 500, 0, 2, 777, 640, 33], np.int32)
SAMPLES = 820
# FFTs and sums of other lengths round otherwise: 10 stages of 6e-8, of values up to ~5.
ATOL = 3e-6


def audio(fill: float = 0.0, samples: int = SAMPLES) -> np.ndarray:
    rng = np.random.default_rng(0)
    batch = np.full((len(LENGTHS), samples), fill, np.float32)
    for row, length in zip(batch, LENGTHS, strict=True):
        row[:length] = rng.normal(0, 0.2, length)
    return batch


def keys(rows: np.ndarray | None = None) -> jax.Array:
    return augment.row_keys(3, 5, np.arange(len(LENGTHS)) if rows is None else rows)


def noisy(x, n, k):
    noise_keys, snr_keys = augment.split_keys(k, 2)
    noise = augment_mixing.colored_noise(noise_keys, x.shape[1], 1.0)
    return augment_mixing.add_noise(x, n, noise, augment.uniform(snr_keys, 0, 20))


def chain(x, n, k):
    use = augment.split_keys(k, 4)
    x, n = augment.sometimes(use[0], 0.5, noisy(x, n, use[1]), (x, n))
    return augment_filters.speed(x, n, augment.choose(use[2], 3))


def reverberant(x, n, k):
    return augment_filters.convolve_response(x, n, augment_filters.decaying_response(k, 300, 0.01, 3.0))


# name: (augmentation of audio, lengths and keys, whether rows need their keys)
CASES = {
    "gain": lambda x, n, k: augment.gain(x, n, augment.uniform(k, -6, 6)),
    "clip": lambda x, n, k: augment.clip(x, n, augment.uniform(k, 0.1, 0.9)),
    "quantize": lambda x, n, k: augment.quantize(x, n, 4 + augment.choose(k, 8)),
    "mu_law": lambda x, n, k: augment.mu_law(x, n),
    "drop_packets": lambda x, n, k: augment.drop_packets(x, n, k, 0.3, packet=20),
    "add_noise": noisy,
    "speed": lambda x, n, k: augment_filters.speed(x, n, augment.choose(k, 3)),
    "band_limit": lambda x, n, k: augment_filters.band_limit(x, n, 300, augment.uniform(k, 2000, 8000), taps=101),
    "reverberant": reverberant,
    "chain": chain,
    "mix_utterances": functools.partial(augment_mixing.mix_utterances, prob=0.9),
}
RANDOM = sorted(set(CASES) - {"mu_law"})
# Another utterance is needed to mix in: a batch of one has none.
ALONE = sorted(set(CASES) - {"mix_utterances"})


def run(name: str, x: np.ndarray, n: np.ndarray = LENGTHS, k: jax.Array | None = None):
    changed, lengths = jax.jit(CASES[name])(x, n, keys() if k is None else k)
    return np.asarray(changed), np.asarray(lengths)


@pytest.mark.parametrize("name", CASES)
def test_padding_is_neither_read_nor_left(name):
    silent, lengths = run(name, audio())
    loud, loud_lengths = run(name, audio(fill=0.9))
    np.testing.assert_array_equal(silent, loud)
    np.testing.assert_array_equal(lengths, loud_lengths)
    assert silent.dtype == np.float32
    assert np.isfinite(silent).all()
    assert silent.any()
    for row, length in zip(silent, lengths, strict=True):
        assert not row[length:].any()
    if name not in ("speed", "chain"):
        np.testing.assert_array_equal(lengths, LENGTHS)


@pytest.mark.parametrize("name", CASES)
def test_the_padding_test_notices_padding(name):
    everything = np.full_like(LENGTHS, SAMPLES)
    silent, _ = run(name, audio(), everything)
    loud, _ = run(name, audio(fill=0.9), everything)
    assert not np.allclose(silent[:, :30], loud[:, :30], atol=0.1)


@pytest.mark.parametrize("name", ALONE)
def test_a_row_knows_neither_neighbours_nor_the_width_of_its_batch(name):
    together, lengths = run(name, audio())
    rows = np.array([2, 6])
    alone, alone_lengths = run(name, audio(samples=SAMPLES + 333)[rows], LENGTHS[rows], keys(rows))
    np.testing.assert_array_equal(alone_lengths, lengths[rows])
    for few, many, length in zip(alone, together[rows], alone_lengths, strict=True):
        np.testing.assert_allclose(few[:length], many[:length], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", RANDOM)
def test_other_row_numbers_draw_otherwise(name):
    together, _ = run(name, audio())
    other, _ = run(name, audio(), k=keys(np.arange(len(LENGTHS)) + 8))
    assert np.abs(together - other).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_int16_is_scaled_audio(name):
    pcm = np.round(audio() * 32768).clip(-32768, 32767).astype(np.int16)
    changed, _ = run(name, pcm)
    expected, _ = run(name, pcm.astype(np.float32) / 32768)
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"mu_law", "quantize"}))
def test_gradients_are_finite_and_end_at_the_row(name):
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(CASES[name](x, LENGTHS, keys())[0]))))(audio(fill=0.9))
    assert np.isfinite(gradient).all()
    assert np.any(gradient)
    for row, length in zip(np.asarray(gradient), LENGTHS, strict=True):
        assert not row[length:].any()


@pytest.mark.parametrize("name", ["chain", "mix_utterances"])
def test_devices_change_nothing(name):
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    assert len(sharding.device_set) == 4
    arguments = [jax.device_put(value, sharding) for value in (audio(), LENGTHS, keys())]
    changed, lengths = jax.jit(CASES[name])(*arguments)
    expected, expected_lengths = run(name, audio())
    np.testing.assert_array_equal(lengths, expected_lengths)
    np.testing.assert_allclose(changed, expected, rtol=0, atol=ATOL)

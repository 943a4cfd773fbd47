"""Draws per row, mu-law, clipping and packets in closed form; SpecAugment's masks and their statistics."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.audio import augment

ROWS = 4000
KEYS = augment.row_keys(0, 0, np.arange(ROWS))


def five_sigma(prob: float) -> float:
    """How far a share of ROWS draws may be from its probability: one correct seed in two million fails."""
    return 5 * np.sqrt(prob * (1 - prob) / ROWS)


# ---- draws


def test_a_rows_key_is_its_number_alone():
    few = jax.random.key_data(augment.row_keys(1, 2, np.array([7, 30])))
    many = jax.random.key_data(augment.row_keys(1, 2, np.arange(64)))
    np.testing.assert_array_equal(few, many[np.array([7, 30])])


def test_seed_step_row_and_use_all_change_the_key():
    data = [
        jax.random.key_data(k)
        for seed in (0, 1)
        for step in (0, 1)
        for k in augment.split_keys(augment.row_keys(seed, step, np.arange(16)), 3)
    ]
    assert len(np.unique(np.concatenate(data), axis=0)) == 2 * 2 * 3 * 16


def test_more_uses_leave_the_first_alone():
    two, five = (jax.random.key_data(augment.split_keys(KEYS[:4], count)) for count in (2, 5))
    np.testing.assert_array_equal(two, five[:2])


def test_draws_are_uniform():
    drawn = np.asarray(augment.uniform(KEYS, -5.0, 5.0))
    assert drawn.min() >= -5
    assert drawn.max() < 5
    for quantile in (0.1, 0.5, 0.9):
        assert abs(np.mean(drawn < -5 + 10 * quantile) - quantile) < five_sigma(quantile)
    shares = np.bincount(np.asarray(augment.choose(KEYS, 3)), minlength=3) / ROWS
    assert np.abs(shares - 1 / 3).max() < five_sigma(1 / 3)


def test_sometimes_takes_whole_rows_of_either():
    ones, twos = jnp.ones((ROWS, 3)), jnp.full((ROWS, 5), 2.0)
    lengths = jnp.full(ROWS, 3, jnp.int32)
    mixed, new_lengths = augment.sometimes(KEYS, 0.3, (twos, lengths + 2), (ones, lengths))
    changed = np.asarray(new_lengths) == 5
    assert abs(changed.mean() - 0.3) < five_sigma(0.3)
    np.testing.assert_array_equal(mixed, np.where(changed[:, None], [[2.0] * 5], [[1.0, 1.0, 1.0, 0.0, 0.0]]))
    per_row, _ = augment.sometimes(KEYS, jnp.arange(ROWS) % 2, (ones * 2, lengths), (ones, lengths))
    np.testing.assert_array_equal(per_row[:, 0], 1 + np.arange(ROWS) % 2)


# ---- samples


def g711(x: int) -> int:
    """Closed form of the decoder after the encoder on a 16-bit sample: steps of 2 ** (segment + 1), in 14-bit units."""
    value = x >> 2
    biased = min(abs(value), 8158) + 33
    step = 2 ** (int(np.floor(np.log2(biased))) - 4)
    decoded = 4 * ((biased // step + 0.5) * step - 33)
    return int(np.copysign(decoded, value)) if value else 0


def test_mu_law_is_g711_on_every_16_bit_sample():
    pcm = np.arange(-32768, 32768).astype(np.int16)
    ours, _ = jax.jit(augment.mu_law)(pcm[None], np.array([len(pcm)], np.int32))
    decoded = np.asarray(ours[0]) * 32768
    np.testing.assert_array_equal(decoded, [g711(int(x)) for x in pcm])
    # -0 and 0 are two codes of one value.
    assert len(np.unique(decoded)) == 255


def test_mu_law_is_pythons_codec():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        audioop = pytest.importorskip("audioop", reason="Python 3.13 has none")
    pcm = np.arange(-32768, 32768).astype(np.int16)
    theirs = np.frombuffer(audioop.ulaw2lin(audioop.lin2ulaw(pcm.tobytes(), 2), 2), np.int16)
    ours, _ = augment.mu_law(jnp.asarray(pcm)[None], jnp.array([len(pcm)]))
    np.testing.assert_array_equal(np.asarray(ours[0]) * 32768, theirs)


def test_mu_law_of_loud_floats_saturates():
    ours, _ = augment.mu_law(jnp.array([[9.0, -9.0, 0.0]]), jnp.array([3]))
    np.testing.assert_array_equal(ours[0] * 32768, [32124, -32124, 0])


def test_clipping_is_per_row():
    x = jnp.array([[1.0, -0.5, 0.2, 0.0], [-2.0, 1.0, 0.1, 9.0]])
    ours, _ = augment.clip(x, jnp.array([4, 3]), jnp.array([0.5, 0.25]))
    np.testing.assert_array_equal(ours, np.array([[0.5, -0.5, 0.2, 0.0], [-0.5, 0.5, 0.1, 0.0]], np.float32))


def test_bits_are_per_row():
    x = jnp.array([[0.3, -1.0, 1.0], [0.3, -1.0, 1.0]])
    ours, _ = augment.quantize(x, jnp.array([3, 3]), jnp.array([2, 16]))
    np.testing.assert_array_equal(ours, np.array([[0.5, -1, 0.5], [9830 / 32768, -1, 32767 / 32768]], np.float32))


def test_packets_are_lost_whole_and_as_often_as_asked():
    ours, _ = augment.drop_packets(jnp.ones((ROWS, 7)), jnp.full(ROWS, 7), KEYS, 0.2, packet=3)
    ours = np.asarray(ours)
    for packet in (ours[:, :3], ours[:, 3:6], ours[:, 6:]):
        assert (packet == packet[:, :1]).all()
        assert abs(np.mean(packet[:, 0] == 0) - 0.2) < five_sigma(0.2)
    # Independent: both of the first two in 0.2 * 0.2 of the rows.
    assert abs(np.mean((ours[:, 0] == 0) & (ours[:, 3] == 0)) - 0.04) < five_sigma(0.04)


# ---- SpecAugment


def runs(hidden: np.ndarray) -> list[tuple[int, int]]:
    """(start, width) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden.astype(int), [0]])))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


def hidden_by(lengths: np.ndarray, F: int, T: int, **policy) -> np.ndarray:
    keys = augment.row_keys(0, 1, np.arange(len(lengths)))
    ours, same = jax.jit(lambda n, k: augment.spec_augment(jnp.ones((len(n), T, F)), n, k, fill=5.0, **policy))(
        lengths, keys
    )
    np.testing.assert_array_equal(same, lengths)
    return np.asarray(ours) == 5.0


@pytest.mark.parametrize(
    "policy",
    [augment.POLICY_LB, augment.POLICY_LD, augment.POLICY_SM, augment.POLICY_SS, augment.POLICY_CONFORMER],
    ids=["LB", "LD", "SM", "SS", "conformer"],
)
def test_masks_keep_to_their_policy(policy):
    lengths = np.array([400, 399, 150, 37, 1, 0] * 10, np.int32)
    F, T = 80, 410
    most = 0
    for hidden, length in zip(hidden_by(lengths, F, T, **policy), lengths, strict=True):
        assert not hidden[length:].any()
        inside = hidden[:length]
        times = inside.all(axis=1)
        bands = inside[~times].all(axis=0) if (~times).any() else np.zeros(F, bool)
        # Nothing but whole bands and whole frames.
        np.testing.assert_array_equal(inside, times[:, None] | bands[None])
        widest = min(policy["time_width"] or length, int(np.floor(policy["time_ratio"] * length)))
        assert times.sum() <= policy["time_masks"] * widest
        assert len(runs(times)) <= policy["time_masks"]
        assert bands.sum() <= policy["freq_masks"] * policy["freq_width"]
        assert len(runs(bands)) <= policy["freq_masks"]
        most = max(most, len(runs(bands)) + len(runs(times)))
    assert most > (policy["time_masks"] + policy["freq_masks"]) // 2


def test_widths_and_places_are_uniform():
    # One band of width 0 ... 3 on 6 features: every (width, start) has the probability 1/4 * 1/(7 - width).
    hidden = hidden_by(np.full(ROWS, 2, np.int32), 6, 2, freq_masks=1, freq_width=3, time_masks=0)
    bands = [tuple(runs(row[0])) for row in hidden]
    assert np.isclose(bands.count(()) / ROWS, 1 / 4, atol=five_sigma(1 / 4))
    for width in (1, 2, 3):
        for start in range(7 - width):
            prob = 1 / 4 / (7 - width)
            assert abs(bands.count(((start, width),)) / ROWS - prob) < five_sigma(prob)


def test_time_and_frequency_are_drawn_apart():
    hidden = hidden_by(np.full(ROWS, 4, np.int32), 4, 4, freq_masks=1, freq_width=1, time_masks=1, time_width=1)
    bands, times = hidden.any(axis=1) & ~hidden.all(axis=2).any(axis=1)[:, None], hidden.all(axis=2)
    # Widths 0 and 1 equally often in both: a quarter has neither.
    assert abs(np.mean(~hidden.any(axis=(1, 2))) - 0.25) < five_sigma(0.25)
    assert bands.any()
    assert times.any()


def test_hidden_places_hold_the_utterances_mean():
    x = np.random.default_rng(0).normal(-30, 10, (3, 50, 12)).astype(np.float32)
    lengths = np.array([50, 31, 0], np.int32)
    keys = augment.row_keys(0, 0, np.arange(3))
    policy = {"freq_masks": 2, "freq_width": 5, "time_masks": 2, "time_width": 9}
    ours, _ = jax.jit(lambda x: augment.spec_augment(x, lengths, keys, **policy))(x)
    zeroed, _ = jax.jit(lambda x: augment.spec_augment(x, lengths, keys, fill=0.0, **policy))(x)
    for row, length in enumerate(lengths[:2]):
        hidden = np.asarray(zeroed[row, :length]) == 0
        assert hidden.any()
        expected = np.where(hidden, x[row, :length].mean(dtype=np.float64), x[row, :length])
        np.testing.assert_allclose(ours[row, :length], expected, rtol=1e-5)  # one float32 sum of 600 values
    assert not np.any(ours[2])


def test_padding_and_neighbours_do_not_matter():
    x = np.random.default_rng(0).normal(0, 1, (4, 40, 8)).astype(np.float32)
    lengths = np.array([40, 21, 33, 5], np.int32)
    keys = augment.row_keys(0, 0, np.arange(4))
    ours, _ = jax.jit(augment.spec_augment)(x, lengths, keys)
    dirty = np.where((np.arange(40)[None] < lengths[:, None])[:, :, None], x, 99.0)
    np.testing.assert_array_equal(jax.jit(augment.spec_augment)(dirty, lengths, keys)[0], ours)
    alone, _ = jax.jit(augment.spec_augment)(dirty[1:2, :30], lengths[1:2], keys[1:2])
    np.testing.assert_allclose(alone[0, :21], ours[1, :21], rtol=1e-5)  # the mean's sum may run in another order
    other, _ = jax.jit(augment.spec_augment)(x, lengths, keys[::-1])
    assert not np.allclose(other, ours)

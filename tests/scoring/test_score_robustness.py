"""Conditions measured on what they return: levels, decay, and that they belong to recordings, not to batches."""

import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.scoring import robustness

S = 6000
LENGTHS = np.array([6000, 4001, 1234, 0], np.int32)


def batch_of(rows, lengths=LENGTHS, samples=S, fill=0) -> dict[str, np.ndarray]:
    """int16 rows in a batch, its padding full of noise of size `fill`."""
    audio = np.random.default_rng(9).integers(-fill, fill + 1, (len(rows), samples)).astype(np.int16)
    for own, row, n in zip(audio, rows, lengths, strict=True):
        own[:n] = row[:n]
    statistics = np.full((2, len(rows)), 0.5, np.float32)
    return dict(audio=audio, lengths=np.asarray(lengths), mean=statistics[0], std=statistics[1], unread=np.arange(4))


@pytest.fixture(scope="module")
def recordings() -> np.ndarray:
    loudness = np.array([[0.02], [0.1], [0.05], [0.1]])
    return np.round(32768 * loudness * np.random.default_rng(0).normal(size=(4, S))).astype(np.int16)


@pytest.fixture(scope="module")
def voices() -> dict[str, np.ndarray]:
    audio = np.round(3000 * np.random.default_rng(1).normal(size=(5, 2500))).astype(np.int16)
    return dict(audio=audio, lengths=np.array([2500, 2500, 900, 1700, 2500], np.int32))


def find(made, name):
    return next(condition for condition in made if condition.name == name)


def snr(clean: np.ndarray, heard: np.ndarray) -> float:
    """In dB, whatever the gain of the sum."""
    clean, heard = clean.astype(np.float64), heard.astype(np.float64)
    gain = (heard @ clean) / (clean @ clean)  # the noise is nearly orthogonal
    return 10 * np.log10(np.mean(clean**2) / np.mean((heard / gain - clean) ** 2))


def test_the_list_is_what_was_asked_for(voices):
    made = robustness.conditions(white=(20, 5.5), babble=(0,), reverberation=(0.3,), voices=voices, talkers=2)
    assert [c.name for c in made] == ["clean", "white 20 dB", "white 5.5 dB", "babble 0 dB", "T60 0.3 s"]
    assert [c.kind for c in made] == ["clean", "white", "white", "babble", "reverberation"]
    assert [c.level for c in made[1:]] == [20, 5.5, 0, 0.3]


def test_clean_is_untouched(recordings):
    (clean,) = robustness.conditions()
    batch = batch_of(recordings, fill=100)
    heard = clean.apply(batch)
    assert all(heard[name] is batch[name] for name in batch)


@pytest.mark.parametrize("kind", ["white", "babble"])
def test_the_ratio_is_what_was_asked(recordings, voices, kind):
    made = robustness.conditions(**{kind: (20, 0, -5)}, voices=voices, talkers=3)
    batch = batch_of(recordings)
    for condition in made[1:]:
        heard = condition.apply(batch)
        assert heard["audio"].dtype == np.int16
        for row, n in enumerate(LENGTHS[:3]):
            # Chance correlation of noise and signal, 1 / sqrt(1234), moves the gain and so the estimate: 0.3 dB.
            assert snr(batch["audio"][row, :n], heard["audio"][row, :n]) == pytest.approx(condition.level, abs=0.7)
            assert not heard["audio"][row, n:].any()
        assert heard["unread"] is batch["unread"]
        assert heard["lengths"] is batch["lengths"]


@pytest.mark.parametrize("name", ["white 10 dB", "babble 10 dB", "T60 0.2 s"])
def test_a_recording_sounds_alike_in_every_batch(recordings, voices, name):
    """Other rows, another place, other padding and more of it."""

    def make(seed):
        return find(
            robustness.conditions(
                white=(10,), babble=(10,), reverberation=(0.2,), voices=voices, talkers=2, seed=seed
            ), name,
        )  # fmt: skip

    one = make(0).apply(batch_of(recordings))
    other = make(0).apply(batch_of(recordings[::-1], LENGTHS[::-1], samples=S + 700, fill=900))
    for row, n in enumerate(LENGTHS):
        # FFTs of another length round otherwise: a sample may fall on the other side of a half.
        difference = one["audio"][row, :n].astype(int) - other["audio"][3 - row, :n]
        assert np.abs(difference).max(initial=0) <= 1
    np.testing.assert_allclose(one["std"], other["std"][::-1], rtol=1e-3)
    again, reseeded = make(0).apply(batch_of(recordings)), make(1).apply(batch_of(recordings))
    np.testing.assert_array_equal(again["audio"], one["audio"])
    assert np.abs(reseeded["audio"].astype(int) - one["audio"]).max() > 100, "negative control: the seed counts"


def test_the_noise_is_the_same_at_every_level(recordings):
    made = robustness.conditions(white=(10, 0))
    batch = batch_of(recordings)
    clean = batch["audio"][1, :4001].astype(np.float64)
    quiet, loud = (find(made, name).apply(batch)["audio"][1, :4001] - clean for name in ("white 10 dB", "white 0 dB"))
    np.testing.assert_allclose(loud, quiet * 10**0.5, atol=3)  # rounding: half a step, times 3.2


def test_recordings_have_noise_of_their_own(recordings):
    batch = batch_of(recordings)
    added = find(robustness.conditions(white=(0,)), "white 0 dB").apply(batch)["audio"].astype(float) - batch["audio"]
    assert abs(np.corrcoef(added[0, :4001], added[1, :4001])[0, 1]) < 0.1  # 6 standard deviations


def test_babble_is_of_others_all_equally_loud():
    """Voices are tones of different loudness; each bin of the noise's spectrum says who speaks."""
    time = np.arange(S)
    bins = np.array([300, 700, 1100, 1500, 1900])
    loudness = np.array([300, 1000, 3000, 8000, 500])[:, None]
    tones = np.round(loudness * np.sin(2 * np.pi * bins[:, None] * time / S)).astype(np.int16)
    lengths = np.full(5, S, np.int32)
    babble = find(robustness.conditions(babble=(0,), voices=batch_of(tones, lengths), talkers=4), "babble 0 dB")
    batch = batch_of(tones, lengths)
    heard = babble.apply(batch)["audio"]
    for row in range(5):
        power = np.abs(np.fft.rfft(heard[row].astype(np.float64)))[bins] ** 2
        share = power / power.sum()
        expected = np.where(np.arange(5) == row, 0.5, 0.125)  # 0 dB: as much of it as of the four others
        np.testing.assert_allclose(share, expected, atol=0.005)  # int16 rounding of the quiet ones
    stranger = np.round(2000 * np.sin(2 * np.pi * 2500 * time / S)).astype(np.int16)[None]
    power = np.abs(np.fft.rfft(babble.apply(batch_of(stranger, [S]))["audio"][0].astype(np.float64)))[bins] ** 2
    np.testing.assert_allclose(np.sort(power / power.max()), [0, 1, 1, 1, 1], atol=0.03)  # four of the five


def test_what_would_clip_becomes_quieter_and_keeps_its_ratio():
    rng = np.random.default_rng(0)
    loud = np.clip(np.round(12000 * rng.normal(size=(1, S))), -32768, 32767).astype(np.int16)
    heard = find(robustness.conditions(white=(0,)), "white 0 dB").apply(batch_of(loud, [S]))["audio"][0]
    assert np.abs(heard.astype(int)).max() == 32767
    assert (np.abs(heard.astype(int)) == 32767).sum() == 1, "scaled, not clipped"
    assert snr(loud[0], heard) == pytest.approx(0.0, abs=0.3)


def test_statistics_are_those_of_what_is_heard(recordings):
    batch = batch_of(recordings)
    heard = find(robustness.conditions(white=(-5,)), "white -5 dB").apply(batch)
    for row, n in enumerate(LENGTHS[:3]):
        samples = heard["audio"][row, :n] / 32768
        assert heard["mean"][row] == pytest.approx(samples.mean(), abs=1e-7)
        assert heard["std"][row] == pytest.approx(samples.std(), rel=1e-6)
        assert heard["std"][row] > 1.5 * (batch["audio"][row, :n] / 32768).std()
    assert (heard["mean"][3], heard["std"][3]) == (0.5, 0.5), "an empty row keeps its own"
    assert (batch["std"] == 0.5).all(), "the batch given is left alone"
    bare = find(robustness.conditions(white=(0,)), "white 0 dB").apply({k: batch[k] for k in ("audio", "lengths")})
    assert bare.keys() == {"audio", "lengths"}


@pytest.mark.parametrize("t60", [0.15, 0.3])
def test_the_energy_decays_by_sixty_decibels_in_that_time(t60):
    """A click in a room, Schroeder's backward integral between -5 and -35 dB below where the tail begins."""
    click = np.zeros((1, 9000), np.int16)
    click[0, 1000] = 32000
    room = find(robustness.conditions(reverberation=(t60,)), f"T60 {t60} s")
    heard = room.apply(batch_of(click, [9000], 9000))["audio"][0].astype(np.float64)
    assert np.abs(heard).argmax() == 1000, "the direct sound stays where it was"
    assert not heard[:1000].any()
    assert 10 * np.log10(heard[1000] ** 2 / np.sum(heard[1001:] ** 2)) == pytest.approx(0.0, abs=0.1)
    tail = heard[1001 : 1001 + int(t60 * 16000)]
    left = 10 * np.log10(np.cumsum(tail[::-1] ** 2)[::-1] / np.sum(tail**2) + 1e-9)
    first, last = np.argmax(left < -5), np.argmax(left < -35)
    slope = np.polyfit(np.arange(first, last) / 16000, left[first:last], 1)[0]
    assert -60 / slope == pytest.approx(t60, rel=0.12)  # of one draw of noise


def test_silence_stays_silence(voices):
    made = robustness.conditions(white=(0,), babble=(0,), reverberation=(0.2,), voices=voices, talkers=2)
    for condition in made[1:]:
        heard = condition.apply(batch_of(np.zeros((2, S), np.int16), [S, 0]))
        assert not heard["audio"].any()


def test_refusals(recordings, voices):
    with pytest.raises(UserError, match="give `voices`"):
        robustness.conditions(babble=(0,))
    with pytest.raises(UserError, match="6 talkers needs 7 different recordings that are not silent, `voices` holds 5"):
        robustness.conditions(babble=(0,), voices=voices)
    copies = dict(audio=np.repeat(voices["audio"][:1], 9, axis=0), lengths=np.full(9, 2500, np.int32))
    with pytest.raises(UserError, match="`voices` holds 1"):
        robustness.conditions(babble=(0,), voices=copies, talkers=1)
    with pytest.raises(UserError, match="reverberation time of 0 s"):
        robustness.conditions(reverberation=(0,))
    noisy = find(robustness.conditions(white=(0,)), "white 0 dB")
    with pytest.raises(ValueError, match="one recording a row"):
        noisy.apply({**batch_of(recordings), "starts": np.zeros((4, 1))})
    with pytest.raises(ValueError, match="int16"):
        noisy.apply(dict(audio=np.zeros((1, 8), np.float32), lengths=np.array([8])))

"""Statistics: each number in closed form, and the same in any order and grouping."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.data import statistics, statistics_measure
from speechjax.data.decode import decode
from speechjax.data.statistics import Statistics, largest, length_quantile, numbers
from speechjax.data.statistics_measure import FRAME, length_bin, length_width, level_bins, measure

RATE = 16_000
FULL = 32_768.0


def counted(*recordings: np.ndarray, **known) -> Statistics:
    made = Statistics.new()
    for audio in recordings:
        made.add(audio, **known)
    return made


def constant(value: int, samples: int = RATE) -> np.ndarray:
    return np.full(samples, value, np.int16)


def sine(hertz: float, amplitude: float = 16_384, samples: int = RATE) -> np.ndarray:
    return np.round(amplitude * np.sin(2 * np.pi * hertz / RATE * np.arange(samples))).astype(np.int16)


def noise(samples: int = RATE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8_000, 8_000, samples).astype(np.int16)


def pattern(frames: str) -> np.ndarray:
    """Frames of ±33, just above the threshold of silence (32.77), for "x" and of ±32 for "."."""
    signs = np.resize([1, -1], FRAME)
    return np.concatenate([signs * (33 if frame == "x" else 32) for frame in frames]).astype(np.int16)


# ---- levels


def test_a_sine_has_half_the_power_of_its_peak():
    found = counted(sine(1_000))  # sixteen samples a period: its peak is a sample
    assert found.peaks == {-7: 1}  # 20 log10(1 / 2) = -6.02
    assert found.levels == {-10: 1}  # 3.01 dB lower
    assert found.frames == {-10: 50}
    assert found.offsets == {-120: 1}


@pytest.mark.parametrize(
    ("value", "bin"), [(-32_768, 0), (32_767, -1), (-32_767, -1), (328, -40), (327, -41), (0, -120)]
)
def test_a_constant_has_its_own_level(value, bin):
    """The absolute value of -32768 and the square of anything above 181 are no int16."""
    found = counted(constant(value))
    assert found.levels == found.peaks == found.offsets == {bin: 1}
    assert found.frames == {bin: 50}
    assert found.clipped_samples == (RATE if abs(value) >= 32_767 else 0)
    assert numbers(found)["offset_recordings"] == (abs(value) >= 328)  # 1 % of full scale is 327.68
    assert numbers(found)["median_level_dbfs"] <= 0


def test_bins_of_levels_are_named_by_their_lower_edge():
    power = 10 ** (np.array([-130, -119.01, -118.99, -60.01, -59.99, -0.01, 0.0, 1.0]) / 10)
    assert level_bins(power).tolist() == [-120, -120, -119, -61, -60, -1, 0, 0]
    assert level_bins(np.zeros(1)).tolist() == [-120]


def test_one_sample_is_no_digital_silence():
    audio = constant(0)
    audio[-1] = 1
    found = counted(audio)
    assert found.frames == {-120: 49, -116: 1}  # 10 log10(1 / 320 / 2^30) = -115.4
    assert numbers(found)["digital_silence_share"] == 0.98


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9 * FRAME), st.integers(0, 99), st.sampled_from([1, 40, 3_000, 32_768]))
def test_pieces_change_nothing(samples, seed, amplitude):
    audio = np.random.default_rng(seed).integers(-amplitude, amplitude, samples).astype(np.int16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics_measure, "_CHUNK", 2 * FRAME)
        found = measure(audio)
    exact = audio.astype(np.float64) / FULL
    assert found.clipped == np.count_nonzero(np.abs(exact) >= 32_767 / FULL)
    assert found.peak == np.max(np.abs(exact)) ** 2
    powers = [np.mean(exact[k : k + FRAME] ** 2) for k in range(0, samples, FRAME)]
    # float32 sums of 320 squares: 1e-6 is 0.000004 dB
    np.testing.assert_allclose(found.frames, powers, rtol=1e-6)
    np.testing.assert_allclose(found.level, np.mean(exact**2), rtol=1e-6)
    np.testing.assert_allclose(found.offset, np.mean(exact) ** 2, rtol=1e-12, atol=1e-30)  # sums of integers


# ---- clipping, silence


def test_clipped_is_more_than_a_thousandth_at_full_scale():
    def clipped(count: int, value: int) -> tuple[int, int]:
        audio = constant(100, 10_000)
        audio[:count] = value
        found = counted(audio)
        return found.clipped_samples, found.clipped_recordings

    assert clipped(10, 32_767) == (10, 0)
    assert clipped(11, 32_767) == (11, 1)
    assert clipped(11, -32_767) == clipped(11, -32_768) == (11, 1)
    assert clipped(11, 32_766) == clipped(11, -32_766) == (0, 0)


@pytest.mark.parametrize(
    ("frames", "share", "longest", "mostly"),
    [("xxxx", 0, 0, 0), ("..xx", 0.5, 2, 0), (".x..x...", 0.75, 3, 1), ("x.x.x.", 0.5, 1, 0), ("....", 1, 4, 1)],
)
def test_silence(frames, share, longest, mostly):
    found = counted(pattern(frames))
    shown = numbers(found)
    assert (shown["silent_share"], shown["silent_recordings"]) == (share, mostly)
    assert shown["longest_silence_seconds"] == pytest.approx(0.02 * longest)  # in floats


def test_silence_does_not_run_on_into_the_next_recording():
    assert counted(pattern("x.."), pattern("..x")).longest_silence == 2


def test_the_last_frame_counts_by_its_own_length():
    found = counted(constant(16_384, FRAME + 1))
    assert found.frames == {-7: 2}


# ---- lengths


@pytest.mark.parametrize(
    ("seconds", "start", "width"),
    [(0, 0, 1), (0.05, 0, 1), (39.95, 399, 1), (40, 400, 10), (119.9, 1_190, 10), (120, 1_200, 100),
     (3_599, 35_900, 100), (3_600, 36_000, 6_000), (86_399, 858_000, 6_000), (86_400, 864_000, 6_000),
     (10**6, 864_000, 6_000)],
)  # fmt: skip
def test_bins_of_lengths(seconds, start, width):
    assert length_bin(int(seconds * RATE)) == start
    assert length_width(start) == width


def test_quantiles_are_within_a_bin():
    seconds = np.random.default_rng(0).gamma(3, 4, 500)
    found = Statistics.new()
    for each in seconds:
        found.recordings += 1
        found.lengths[length_bin(int(each * RATE))] += 1
        found.longest = max(found.longest, int(each * RATE))
    for share in (0.05, 0.5, 0.95):
        lower, upper = np.quantile(seconds, [share - 0.002, share + 0.002])  # a neighbour up or down
        assert lower - 0.1 <= length_quantile(found, share) <= upper + 0.1
    assert length_quantile(counted(constant(1, 100)), 0.95) == 100 / RATE  # not the bin's end


def test_sums():
    shown = numbers(counted(constant(1, 2 * RATE), constant(1, 4 * RATE)))
    assert (shown["recordings"], shown["mean_seconds"], shown["longest_seconds"]) == (2, 3, 4)
    assert shown["hours"] == 6 / 3600


# ---- bandwidth


def test_treble_tells_upsampled_audio():
    wide = noise(RATE)
    spectrum = np.fft.rfft(wide)
    spectrum[4_000:] = 0  # what resampling from 8 kHz leaves
    narrow = np.round(np.fft.irfft(spectrum)).astype(np.int16)
    assert counted(wide).upsampled_recordings == 0
    assert list(counted(wide).trebles) == [-4]  # (8 - 4.25) / 8 of the power: -3.3 dB
    assert list(counted(sine(6_000)).trebles) in ([-1], [0])
    assert counted(narrow).upsampled_recordings == counted(narrow, rate=16_000).upsampled_recordings == 1
    assert counted(narrow, rate=8_000).upsampled_recordings == 0  # nobody claimed otherwise
    assert [counted(constant(k)).upsampled_recordings for k in (0, 1, 500, 32_767)] == [0] * 4  # no sound at all


def test_treble_of_real_speech(real_speech):
    telephone = [decode(path) for path in sorted((real_speech / "fsdd").glob("*.wav"))[::40]]
    wide = [decode(path) for path in sorted((real_speech / "kerstin").rglob("*.o*"))[:20]]
    assert telephone
    assert wide
    found = counted(*telephone)
    assert found.upsampled_recordings > 0.9 * found.recordings
    assert counted(*wide).upsampled_recordings == 0


# ---- names


def test_where_recordings_come_from():
    found = counted(constant(1), constant(2), rate=8_000, channels=2, kind="WAV PCM_16")
    found.add(constant(3))
    shown = numbers(found)
    assert shown["rates"] == {"8000": 2, "unknown": 1}
    assert shown["channels"] == {"2": 2, "unknown": 1}
    assert shown["formats"] == {"WAV PCM_16": 2, "unknown": 1}


def test_meta():
    found = Statistics.new()
    found.add(constant(1), meta={"speaker": "a", "lang": "de", "text": "zwölf"})
    found.add(constant(1, 3 * RATE), meta={"speaker": 7, "lang": "en", "text": " "})
    found.add(constant(1), meta={"speaker": "a", "lang": None, "text": 3, "more": object()})
    found.add(constant(1), meta={"speaker": "", "lang": ""})
    shown = numbers(found)
    assert (shown["speakers"], shown["with_speaker_share"]) == (2, 0.75)
    assert (shown["characters"], shown["with_text_share"]) == (5, 0.25)
    assert shown["languages"] == 2
    assert shown["language_hours"] == {"en": 3 / 3600, "unknown": 2 / 3600, "de": 1 / 3600}


def test_a_name_that_says_unknown_takes_nothing_away():
    assert largest(statistics.Tally({"": 2, "unknown": 3, "de": 4}), 9) == {"unknown": 5, "de": 4}
    assert largest(statistics.Tally({"others": 2, "de": 4}), 9) == {"de": 4, "others": 5}


def test_many_speakers_are_estimated():
    found = Statistics.new()
    audio = constant(1, 1)
    for number in range(1_024):
        found.add(audio, meta={"speaker": number})
    assert numbers(found)["speakers"] == 1_024  # exact as long as all are kept
    for number in range(5_000):
        found.add(audio, meta={"speaker": number})
    assert len(found.speakers) == 1_024
    assert numbers(found)["speakers"] == pytest.approx(5_000, rel=0.1)  # three standard deviations of 1 / sqrt(1024)


def test_rejections_keep_the_smallest_ids():
    found = Statistics.new()
    for number in (5, 3, 9, 1, 7, 8, 2):
        found.reject(f"id{number}", "broken")
    found.reject("x", "empty")
    assert found.rejected == 8
    assert numbers(found)["rejected_reasons"] == {"broken": 7, "empty": 1}
    assert found.examples == {"broken": ["id1", "id2", "id3", "id5", "id7"], "empty": ["x"]}


# ---- merging

NAMES = st.sampled_from(["", "a", "b", "c", "d", "e", "unknown", "😀\udcff", "z" * 300])
EVENTS = st.lists(
    st.tuples(st.integers(0, 3 * FRAME), st.integers(0, 9), NAMES, st.sampled_from([0, 8_000, 44_100]), st.booleans()),
    max_size=12,
)


def feed(into: Statistics, events) -> Statistics:
    for samples, seed, name, rate, usable in events:
        if usable:
            meta = {"speaker": name, "lang": name, "text": name}
            audio = noise(samples, seed) // (1 + 999 * (seed % 3))
            into.add(audio.astype(np.int16), rate=rate, channels=seed, kind=name, meta=meta)
        else:
            into.reject(f"{name}{seed}", name)
    return into


def written(found: Statistics) -> str:
    return json.dumps(found.to_json())


@settings(max_examples=25, deadline=None)
@given(EVENTS, st.data())
def test_merging_is_adding_all(events, data):
    """However they are cut and in whatever order, with tables so small that names are dropped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_KEPT", 3)
        patch.setattr(statistics, "_EXAMPLES", 2)
        whole = feed(Statistics.new(), events)
        parts = [Statistics.new() for _ in range(4)]
        for event in data.draw(st.permutations(events)):
            feed(parts[data.draw(st.integers(0, 3))], [event])
        a, b, c, d = data.draw(st.permutations(parts))
        a.merge(b)
        c.merge(Statistics.from_json(json.loads(written(d))))
        a.merge(c)
        assert written(a) == written(whole)
        assert numbers(a) == numbers(whole)
        if events:
            assert written(feed(Statistics.new(), events[1:])) != written(whole)


@settings(max_examples=25, deadline=None)
@given(EVENTS)
def test_json_round_trip(events):
    made = feed(Statistics.new(), events)
    again = Statistics.from_json(json.loads(written(made)))
    assert again == made
    assert written(again) == written(made)
    again.add(noise())
    assert again != made


def test_incomplete_json_is_refused():
    stored = Statistics.new().to_json()
    del stored["levels"]
    with pytest.raises(KeyError):
        Statistics.from_json(stored)


def test_merging_leaves_the_other_alone():
    total, part = Statistics.new(), feed(Statistics.new(), [(500, 1, "a", 0, True), (0, 0, "b", 0, False)])
    before = written(part)
    total.merge(part)
    feed(total, [(700, 2, "a", 0, True), (0, 1, "b", 0, False)])
    assert written(part) == before


# ---- extremes


@pytest.mark.parametrize("samples", [0, 1, FRAME - 1, FRAME, FRAME + 1, 511, 512, 513])
def test_tiny_recordings(samples):
    found = counted(constant(0, samples))
    shown = numbers(found)
    assert (found.recordings, found.samples) == (1, samples)
    assert sum(found.frames.values()) == -(-samples // FRAME)
    assert shown["longest_silence_seconds"] == samples / RATE
    assert shown["silent_share"] == (1 if samples else None)
    assert found.silent_recordings == (samples > 0)


def test_two_hours_of_zeros_and_a_click():
    samples = 2 * 3600 * RATE
    audio = np.zeros(samples, np.int16)
    audio[samples // 4] = -32_768
    tracemalloc.start()
    found = counted(audio)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < audio.nbytes / 8  # a float copy would be twice as large as the audio, a mask half
    assert found.peaks == {0: 1}
    assert found.clipped_samples == 1
    assert found.lengths == {72_000: 1}
    assert found.frames == {-120: 359_999, -26: 1}  # 10 log10(1 / 320) = -25.05
    assert numbers(found)["longest_silence_seconds"] == pytest.approx(5_400 - 0.02)


@pytest.mark.parametrize("audio", [np.zeros(9), np.zeros(9, np.int32), np.zeros((9, 1), np.int16), np.zeros(9, ">i2")])
def test_other_audio_is_refused(audio):
    with pytest.raises(ValueError, match="int16"):
        counted(audio)


def test_views_and_read_only_audio():
    audio = noise(4_000)
    audio.flags.writeable = False
    assert counted(audio[::2]) == counted(audio[::2].copy())
    assert counted(audio[::-1]) == counted(audio[::-1].copy())


def test_nothing_has_no_numbers():
    shown = numbers(Statistics.new())
    assert (shown["recordings"], shown["hours"], shown["speakers"]) == (0, 0, 0)
    names = (
        "mean_seconds",
        "median_seconds",
        "longest_seconds",
        "median_level_dbfs",
        "silent_share",
        "full_scale_share",
    )
    assert [shown[name] for name in names] == [None] * len(names)

"""What survives from a source to random access: samples, names and reasons."""

import itertools
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import RATE, entries, noise, write

from speechjax.data.shards import UnreadableError
from speechjax.errors import UserError

# ---- contents


def test_recordings_and_rejections(folder, opened, caplog):
    with caplog.at_level(logging.INFO, "speechjax"):
        records = opened(folder)
    assert records.ids == [*(f"good{k}.wav" for k in range(5)), "long.flac"]
    assert len(records) == 6
    for k in range(5):
        np.testing.assert_array_equal(records.read(k), noise(0.5 + k / 10, seed=k))
    assert {entry["id"]: entry["reason"] for entry in records.rejected} == {
        "bad_cut.wav": "truncated",
        "bad_nan.wav": "NaN or infinite samples",
        "bad_text.wav": "not audio",
        "short.wav": "shorter than 0.1 s",
    }
    assert records.hours == pytest.approx((5 * 0.5 + 1.0 + 10) / 3600)
    assert caplog.messages[-1] == (
        f"folder:{folder}: 6 recordings, 0.00 h, 4 rejected (1 truncated, 1 NaN or infinite samples, "
        "1 not audio, 1 shorter than 0.1 s), 1 other files ignored"
    )


def test_read_is_confined_to_the_example(folder, opened):
    records = opened(folder)
    whole = records.read(1)
    np.testing.assert_array_equal(records.read(1, 100, 50), whole[100:150])
    np.testing.assert_array_equal(records.read(np.int64(1), np.int32(100)), whole[100:])
    assert records.read(1, len(whole), 0).size == 0
    for start, count in ((0, len(whole) + 1), (len(whole) - 1, 2), (-1, 1), (5, -1)):
        with pytest.raises(IndexError, match=r"good1\.wav"):
            records.read(1, start, count)


def test_long_recordings_are_cut_without_copying(folder, opened, decodes):
    whole, cut = opened(folder), opened(folder, segment_seconds=3.0)
    assert decodes.count("long.flac") == 1
    assert cut.ids[-4:] == [f"long.flac#{k:04d}" for k in range(4)]
    np.testing.assert_array_equal(cut.lengths[-4:], 2.5 * RATE)
    np.testing.assert_array_equal(np.concatenate([cut.read(k) for k in range(5, 9)]), whole.read(5))
    assert cut.hours == whole.hours
    assert "6 recordings in 9 segments" in cut.summary
    # Statistics are the whole recording's: a segment must look as it does among its neighbours.
    samples = whole.read(5) / 32_768
    np.testing.assert_allclose(cut.mean[-4:], samples.mean(), rtol=1e-5)  # float32
    np.testing.assert_allclose(cut.std[-4:], samples.std(), rtol=1e-5)
    assert abs(cut.read(5).mean() / 32_768 - samples.mean()) > 1e-5 * samples.mean()


def test_segments_of_awkward_lengths_cover_everything(tmp_path, opened):
    (tmp_path / "speech").mkdir()
    write(tmp_path / "speech" / "a.wav", noise(1.00006))
    records = opened(tmp_path / "speech", segment_seconds=0.3, min_seconds=0.15)
    assert len(records) == 4
    assert records.lengths.max() - records.lengths.min() <= 1
    np.testing.assert_array_equal(records.begin[1:], records.begin[:-1] + records.lengths[:-1])
    assert records.lengths.sum() == len(noise(1.00006))


def test_meta_follows_its_recording(tmp_path, opened):
    lines = []
    for k, seconds in enumerate((0.5, 2.0)):
        write(tmp_path / f"{k}.wav", noise(seconds))
        lines.append({"audio_filepath": f"{k}.wav", "text": f"ß{k}", "phones": ["a"], "speaker": k, "lang": "de"})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = opened(f"manifest:{tmp_path / 'm.jsonl'}", segment_seconds=1.0)
    assert records.ids == ["0.wav", "1.wav#0000", "1.wav#0001"]
    assert records.meta(0) == {"text": "ß0", "phones": ["a"], "speaker": 0, "lang": "de"}
    assert records.meta(1) == records.meta(2) == {"speaker": 1, "lang": "de"}


def test_mean_and_std_of_a_long_recording(tmp_path, opened):
    """Sums run over blocks of a million samples."""
    audio = noise(80.0, level=300) + np.int16(12_000)
    (tmp_path / "speech").mkdir()
    write(tmp_path / "speech" / "a.wav", audio)
    records = opened(tmp_path / "speech", segment_seconds=100)
    np.testing.assert_allclose(records.mean, (audio / 32_768).mean(), rtol=1e-6)
    np.testing.assert_allclose(records.std, (audio / 32_768).std(), rtol=1e-5)  # a difference of large squares


# ---- choosing


def test_include_and_exclude_decode_nothing_again(folder, opened, decodes):
    opened(folder)
    before = len(decodes)
    assert opened(folder, include=r"good[0-2]").ids == ["good0.wav", "good1.wav", "good2.wav"]
    assert opened(folder, include=r"good", exclude=r"[01]").ids == ["good2.wav", "good3.wav", "good4.wav"]
    assert not opened(folder, exclude="^bad|short", max_bad_share=0.0).rejected
    assert len(opened(folder, min_seconds=0.75, max_bad_share=0.7)) == 3
    assert len(decodes) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "["}, "config.data.include='\\[' is not a regular expression"),
        ({"exclude": "(?P<"}, "config.data.exclude="),
        ({"include": "nothing_like_it"}, "no id passes config.data.include='nothing_like_it'"),
        ({"exclude": "."}, "no id passes"),
        ({"min_seconds": 20.0}, "config.data.min_seconds=20: from 0 to half of the 30 s"),
        ({"min_seconds": -1.0}, "config.data.min_seconds=-1: from 0"),
    ],
)
def test_mistakes_in_options(folder, opened, options, message):
    with pytest.raises(UserError, match=message):
        opened(folder, **options)


def test_share_of_bad_recordings(folder, opened):
    opened(folder, max_bad_share=0.4)
    with pytest.raises(UserError, match=r"40 % of 10 recordings are unusable: 1 truncated.*max_bad_share") as caught:
        opened(folder, max_bad_share=0.39)
    assert "\n" not in str(caught.value)
    assert "'bad_cut.wav' (truncated)" in str(caught.value)
    opened(folder, max_bad_share=0.34, exclude="bad_text")  # 3 of 9
    with pytest.raises(UserError, match=r"nothing to train on; 100 % of 1 recordings .* 1 not audio"):
        opened(folder, max_bad_share=1.0, include="bad_text")


def test_everything_bad(tmp_path, opened, decodes):
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "a.wav").write_text("x" * 999)
    for _ in range(2):
        with pytest.raises(UserError, match="nothing to train on"):
            opened(tmp_path / "speech", max_bad_share=1.0)
    assert decodes == ["a.wav"]


# ---- mixtures


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two folders, both with a recording a.wav."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for k, folder in enumerate(folders):
        folder.mkdir()
        for name in ("a", "b", "c"):
            write(folder / f"{name}.wav", noise(0.5 + k, seed=len(name) + k))
    return folders


def test_a_mixture_keeps_its_parts_apart(two, opened):
    records = opened(f"folder:{two[0]}?weight=3 + folder:{two[1]}")
    assert records.ids == ["0:a.wav", "0:b.wav", "0:c.wav", "1:a.wav", "1:b.wav", "1:c.wav"]
    assert records.part.tolist() == [0, 0, 0, 1, 1, 1]
    assert [opened.part.weight for opened in records.parts] == [3.0, 1.0]
    np.testing.assert_array_equal(records.read(3), noise(1.5, seed=2))
    assert records.keys[0] == records.keys[3]  # by the source's own id, whatever it is mixed with


def test_a_cap_takes_a_growing_subset(folder, opened):
    whole = opened(folder)
    hours = whole.hours
    sets = [set(opened(f"folder:{folder}?hours={share * hours}").ids) for share in (1e-6, 0.05, 0.5, 1.1)]
    assert all(small <= large for small, large in itertools.pairwise(sets))
    assert len(sets[0]) == 1
    assert sets[-1] == set(whole.ids)
    assert 1 < len(sets[2]) < 6
    assert opened(f"folder:{folder}?hours={hours / 2}").hours <= max(hours / 2, 10.5 / 3600)


def test_read_in_place_gives_the_same_and_stores_no_samples(folder, opened, tmp_path):
    write(folder / "stereo.wav", np.stack([noise(0.6, 5), noise(0.6, 6)], axis=1))
    write(folder / "slow.flac", noise(0.6, 7), rate=8_000)
    write(folder / "float.wav", noise(0.6, 8) / 40_000, subtype="FLOAT")
    write(folder / "opus.ogg", noise(0.6, 9), format="OGG", subtype="OPUS")
    copied, placed = opened(folder), opened(f"folder:{folder}?copy=no")
    assert placed.ids == copied.ids
    for name in ("lengths", "keys", "mean", "std", "piece"):
        np.testing.assert_array_equal(getattr(placed, name), getattr(copied, name))
    for i in range(len(copied)):
        np.testing.assert_array_equal(placed.read(i), copied.read(i))
        third = int(copied.lengths[i]) // 3
        np.testing.assert_array_equal(placed.read(i, third, third), copied.read(i, third, third))
    assert len(list((tmp_path / "cache").rglob("*.pcm"))) == 1
    assert len(entries(tmp_path)) == 2


def test_in_place_a_file_that_is_gone_is_unreadable_and_the_others_are_not(folder, opened):
    records = opened(f"folder:{folder}?copy=no", segment_seconds=3.0)
    (folder / "good1.wav").unlink()
    cut = (folder / "long.flac").read_bytes()
    (folder / "long.flac").write_bytes(cut[: len(cut) // 2])
    np.testing.assert_array_equal(records.read(0), noise(0.5))
    for i in (1, len(records) - 1):
        with pytest.raises(UnreadableError):
            records.read(i)


def test_rejections_of_a_mixture_say_where_they_are_from(two, opened):
    (two[1] / "bad.wav").write_text("no audio " * 9)
    records = opened(f"folder:{two[0]} + folder:{two[1]}")
    assert records.rejected == [{"id": "bad.wav", "reason": "not audio", "source": f"folder:{two[1]}"}]


def test_however_the_folder_is_spelt_it_is_the_same_set(folder, opened, decodes, tmp_path):
    opened(folder)
    (entry,) = entries(tmp_path)
    os.truncate(entry / "shard-00000.pcm", 10)
    assert len(opened(f"folder:{folder}/../{folder.name}/")) == 6
    assert entries(tmp_path) == [entry]


# ---- real speech


def test_real_folder(real_speech, opened):
    records = opened(real_speech / "fsdd", min_seconds=0.0, max_bad_share=0.0)
    assert len(records) == 3_000
    assert records.hours == pytest.approx(0.3645, abs=1e-3)
    assert records.std.min() > 0
    file, rate = soundfile.read(real_speech / "fsdd" / records.ids[17])
    assert rate == 8_000
    assert records.lengths[17] == 2 * len(file)
    np.testing.assert_allclose(records.std[17], file.std(), rtol=0.02)  # resampling rings at the ends


def test_real_manifest(real_speech, opened, tmp_path):
    lines = (real_speech / "kerstin" / "manifest.jsonl").read_text().splitlines()[:20]
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry["audio_filepath"] = str(real_speech / "kerstin" / entry["audio_filepath"])
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    records = opened(f"manifest:{tmp_path / 'm.jsonl'}", max_bad_share=0.0)
    assert [records.meta(i)["text"] for i in range(len(records))] == [entry["text"] for entry in entries]
    np.testing.assert_allclose(records.lengths / RATE, [entry["duration"] for entry in entries], atol=1e-3)

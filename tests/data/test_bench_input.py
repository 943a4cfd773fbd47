"""What the input benchmark says of a small corpus; how fast anything is, no test knows."""

import importlib.util
import json
import logging
import time

import numpy as np
import pytest
import soundfile

from speechjax import bench
from speechjax.data import bench_input, bench_readers
from speechjax.data.bench_readers import Read
from speechjax.errors import UserError

RATE = 16_000
OURS = {
    "speechjax (shards)",
    "speechjax, filled rows (shards)",
    "speechjax, in place (wav)",
    "speechjax, in place (flac)",
}
PASSES = 4


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Twelve recordings, 3 to 8.5 s, and a file that is none."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for k in range(12):
        audio = rng.integers(-3_000, 3_000, round((3 + k / 2) * RATE)).astype(np.int16)
        soundfile.write(folder / f"{k:02d}.wav", audio, RATE)
    (folder / "none.wav").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def measured(recordings, tmp_path_factory):
    """(the JSON of a small run, what it printed), with no peer installed."""
    folder = tmp_path_factory.mktemp("bench")
    level = logging.getLogger("speechjax").level
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        hidden = lambda name, *rest: None if name in ("torch", "lhotse") else find(name, *rest)  # noqa: E731
        patch.setattr(importlib.util, "find_spec", hidden)
        printed = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        code = bench.run(
            ["--what=input", f"--source=folder:{recordings}", "--hours=1", "--batch-seconds=40", "--repeats=2",
             f"--passes={PASSES}", f"--keep={folder / 'keep'}", f"--json={folder / 'input.json'}"]
        )  # fmt: skip
    logging.getLogger("speechjax").setLevel(level)
    assert code == 0
    return json.loads((folder / "input.json").read_text()), "\n".join(printed), folder / "keep"


def seconds(recordings):
    return sum(soundfile.info(path).frames for path in recordings.glob("[0-9]*.wav")) / RATE


def test_bare_readers_read_everything_every_pass(measured, recordings):
    result = measured[0]
    bare = {row["kind"]: row for row in result["readers"] if row["name"].startswith("bare")}
    for kind, passes in (("shards", PASSES), ("wav", PASSES), ("flac", PASSES // 2)):
        # A sum of floats that are not exact in binary.
        assert bare[kind]["audio_hours"] * 3600 == pytest.approx(passes * seconds(recordings), rel=1e-12)
        assert bare[kind]["ratio"] == bare[kind]["useful_frames"] == 1.0


def test_numbers_of_a_row_belong_together(measured):
    for row in measured[0]["readers"]:
        assert len(row["cpu_seconds"]) == len(row["wall_seconds"]) == 2
        rates = [60 * row["audio_hours"] / cpu for cpu in row["cpu_seconds"]]
        shown = row["hours_a_core_minute"]
        # The same numbers in another order of operations.
        assert [shown["least"], shown["most"]] == pytest.approx([min(rates), max(rates)], rel=1e-9)
        assert shown["median"] == pytest.approx(sum(rates) / 2, rel=1e-9)
        assert 0 < row["useful_frames"] <= 1


def test_ratio_is_to_the_bare_reader_of_the_same_kind(measured):
    rows = measured[0]["readers"]
    median = {row["kind"]: row["hours_a_core_minute"]["median"] for row in rows if row["name"].startswith("bare")}
    compared = [row for row in rows if row["kind"] != "prepare"]
    assert {row["kind"] for row in compared} == {"shards", "wav", "flac"}
    for row in compared:
        assert row["ratio"] == pytest.approx(row["hours_a_core_minute"]["median"] / median[row["kind"]], rel=1e-9)


def test_ours_have_shapes_and_useful_frames(measured):
    result = measured[0]
    for key in ("ratio", "useful_frames", "shapes"):
        assert set(result[key]) == OURS
    for name, shapes in result["shapes"].items():
        for rows, samples in shapes:
            assert 20 * RATE <= rows * samples <= 60 * RATE, name  # 40 s, to half a row
    assert result["useful_frames"]["speechjax, filled rows (shards)"] > result["useful_frames"]["speechjax (shards)"]
    assert result["shapes"]["speechjax, in place (wav)"] == result["shapes"]["speechjax (shards)"]


def test_preparing_covers_every_source_and_reads_all_of_it(measured, recordings):
    rows = [row for row in measured[0]["readers"] if row["kind"] == "prepare"]
    assert [row["name"] for row in rows] == [
        f"preparing {what}" for what in ("WAV files", "FLAC files", "TFDS ArrayRecord")
    ]
    for row in rows:
        assert row["audio_hours"] * 3600 == pytest.approx(seconds(recordings), rel=1e-12)  # one pass


def test_it_says_where_and_with_what_it_was_measured_and_what_is_missing(measured):
    result, printed, _ = measured
    assert result["machine"]["threads"] >= 1
    assert len(result["machine"]["load_before"]) == 3
    assert {"numpy", "soundfile"} <= set(result["versions"])
    assert f"{result['machine']['threads']} threads, load" in printed
    assert result["skipped"] == [
        "torch: torch is not installed (pip install torch lhotse)",
        "lhotse: lhotse and torch are not installed (pip install torch lhotse)",
    ]
    assert "skipped torch: torch is not installed" in printed


def test_kept_files_serve_again_but_no_other_corpus(measured, recordings):
    keep = measured[2]
    before = (keep / "wav" / "000003.wav").stat().st_mtime_ns
    bench_readers.make_corpus(f"folder:{recordings}", 1.0, keep)
    assert (keep / "wav" / "000003.wav").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another corpus"):
        bench_readers.make_corpus(f"folder:{recordings}", 2.0, keep)
    with pytest.raises(UserError, match="something else"):
        bench_readers.make_corpus(f"folder:{recordings}", 2.0, recordings)


def test_timing_counts_work_and_not_sleep():
    def busy() -> Read:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return Read(1, 1)

    def asleep() -> Read:
        time.sleep(0.3)
        return Read(1, 1)

    # Clocks of processes may tick at 10 ms; other threads of the test process may add work.
    assert bench_input._timed(busy)[1] >= 0.19
    _, cpu, wall = bench_input._timed(asleep)
    assert wall >= 0.3 > 2 * cpu


@pytest.mark.parametrize("module", ["torch", "lhotse"])
def test_peers_read_everything_where_they_are_installed(module, measured, recordings):
    pytest.importorskip("torch")
    pytest.importorskip(module)
    corpus = bench_readers.Corpus(measured[2], batch_seconds=40.0, passes=PASSES)
    readers, skipped = bench_readers.other_readers(corpus)
    peers = [reader for reader in readers if module in reader.name.lower().replace("pytorch", "torch")]
    assert not any(module in reason for reason in skipped)
    for reader in peers:
        read = reader.read()
        assert read.samples == round(corpus.passes_of(reader.kind) * seconds(recordings) * RATE)
        assert read.room >= read.samples
    assert {reader.kind for reader in peers} == {"wav", "flac"}

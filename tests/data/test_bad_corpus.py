"""A corpus with broken files of every kind among good ones: exactly those are lost, each with its reason."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_decode import BAD, FORMATS, bad_flac_frame, cut, noise, streamed, write

from speechjax import prepare
from speechjax.data import pipeline
from speechjax.data.records import open_records

REPO = Path(__file__).resolve().parents[2]
RATE = 16_000
TOTAL = 1_300
DATA = dict(
    seed=0, row_divisor=1, frame_len=(320, 80), segment_align=0, workdir=None, temperature=1.0, crop_seconds=0.5,
    batch_seconds=4.0, shapes=2, fill=False, row_multiple=8, min_seconds=0.1, valid_seconds=10.0, include="",
    exclude="", text="", text_steps="", max_bad_share=0.05,
)  # fmt: skip


def sizes_unknown(size: int):
    def writer(path: Path, audio: np.ndarray) -> None:
        data = bytearray(write(path, audio).read_bytes())
        data[4:8] = data[40:44] = struct.pack("<I", size)
        path.write_bytes(data)

    return writer


def streamed_flac(path: Path, audio: np.ndarray) -> None:
    path.write_bytes(streamed(write(path, audio).read_bytes()))


def stored_as(**options):
    return lambda path, audio: write(path, audio / 32_768, **options)


# Legal, and mishandled by some reader or other: how it is written, and how far from the original it may come back.
ODD = {
    "float.wav": (stored_as(subtype="FLOAT"), 0),  # read as int16, as others do, it is all zeros
    "double.wav": (stored_as(subtype="DOUBLE"), 0),
    "wide.wav": (stored_as(subtype="PCM_24"), 0),
    "wavex.wav": (stored_as(format="WAVEX"), 0),
    "bytes.wav": (stored_as(subtype="PCM_U8"), 256),  # one step of 8 bits
    "ulaw.wav": (stored_as(subtype="ULAW"), 512),  # half a step of the segment that 9,000 is in
    "stereo.wav": (lambda path, audio: write(path, np.stack([audio, audio], axis=1)), 0),
    "wrong_extension.mp3": (stored_as(format="WAV"), 0),
    "unfinished_ffmpeg.wav": (sizes_unknown(0xFFFFFFFF), 0),
    "unfinished_sox.wav": (sizes_unknown(0x7FFFF000), 0),
    "streamed.flac": (streamed_flac, 0),
    "upper.WAV": (lambda path, audio: write(path, audio), 0),
}


def write_bad(folder: Path) -> dict[str, str]:
    """One file or more of every kind that cannot be used, and the reason of each."""
    folder.mkdir()
    expected = {}
    for name in FORMATS:
        cut(write(folder / f"cut_{name}", noise(RATE) / 32_768, **FORMATS[name]), keep=0.5)
        expected[f"bad/cut_{name}"] = "truncated"
    for name, (writer, reason) in BAD.items():
        writer(folder / name)
        if name not in ("folder.wav", "pipe.wav", "absent.wav"):  # no recording of that name is there
            expected[f"bad/{name}"] = "samples far beyond full scale" if "beyond" in reason else reason
    write(folder / "short.wav", noise(800))
    expected["bad/short.wav"] = "shorter than 0.1 s"
    if os.geteuid():
        write(folder / "secret.wav", noise(RATE)).chmod(0)
        expected["bad/secret.wav"] = "no permission to read"
    (folder / "._resource.wav").write_bytes(b"\0\5\26\7" * 99)  # hidden: what a Mac leaves beside a.wav
    return expected


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> tuple[Path, Path, dict[str, str], dict[str, np.ndarray]]:
    """(with bad files, the good ones alone, {bad: reason}, {good: samples})."""
    mixed, clean = tmp_path_factory.mktemp("mixed"), tmp_path_factory.mktemp("clean")
    bad = write_bad(mixed / "bad")
    good = {}
    for k in range(TOTAL - len(bad)):
        odd = list(ODD)[k // 20] if k % 20 == 0 and k // 20 < len(ODD) else None
        name = f"{k % 7}/{k:04d}_{odd or 'a.wav'}"
        good[name] = noise(3_200 + 7 * (k % 500), seed=k)
        for folder in (mixed, clean):
            (folder / name).parent.mkdir(exist_ok=True)
            (ODD[odd][0] if odd else write)(folder / name, good[name])
    return mixed, clean, bad, good


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def test_the_corpus_is_as_said(corpora):
    _, _, bad, good = corpora
    assert 0.015 < len(bad) / TOTAL < 0.025
    assert {name.partition("_")[2] for name in good} >= set(ODD)


def test_exactly_the_bad_are_lost_and_every_sample_of_the_others_is_there(corpora, cache):
    mixed, _, bad, good = corpora
    records = open_records(f"folder:{mixed}", cache_dir=cache, min_seconds=0.1, max_bad_share=0.05)
    assert {entry["id"]: entry["reason"] for entry in records.rejected} == bad
    assert len(records.rejected) == len(bad)
    assert records.ids == sorted(good)
    for i, name in enumerate(records.ids):
        odd = name.partition("_")[2]
        np.testing.assert_allclose(records.read(i), good[name], rtol=0, atol=ODD[odd][1] if odd in ODD else 0)


def test_bad_files_change_no_batch_and_no_share(corpora, cache):
    """So they cannot cost throughput: a training process reads the same bytes in the same order."""
    mixed, clean, _, _ = corpora
    both = [pipeline.open_data(source=f"folder:{folder}", cache_dir=cache, **DATA) for folder in (mixed, clean)]
    other = pipeline.open_data(source=f"folder:{clean}", cache_dir=cache, **{**DATA, "seed": 1})
    assert both[0].batches_per_epoch == both[1].batches_per_epoch
    differs = False
    for x, y, z in zip(*(data.train_batches(0, 6) for data in (*both, other)), strict=True):
        assert all(np.array_equal(x[name], y[name]) for name in x)
        differs |= x["audio"].shape != z["audio"].shape or not np.array_equal(x["audio"], z["audio"])
    assert differs, "another seed must show, or the comparison proves nothing"
    for x, y in zip(*(data.valid_batches() for data in both), strict=True):
        assert all(np.array_equal(x[name], y[name]) for name in x)


def test_the_verb_rejects_the_same(corpora, tmp_path, capfd):
    mixed, _, bad, good = corpora
    assert prepare.run([f"--source=folder:{mixed}", f"--out={tmp_path / 'set'}", "--workers=1"]) == 0
    rejected = [json.loads(line) for line in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    # How short is too short is the training's business, not the preparation's.
    expected = {name: reason for name, reason in bad.items() if not reason.startswith("shorter")}
    assert {entry["id"]: entry["reason"] for entry in rejected} == expected
    records = open_records(f"shards:{tmp_path / 'set'}", min_seconds=0.1, max_bad_share=0.05)
    assert {entry["id"]: entry["reason"] for entry in records.rejected} == bad
    assert records.ids == sorted(good)


def test_a_file_lost_while_training_is_an_empty_row_and_never_a_skip(corpora, cache, tmp_path):
    """The shard is cut in the middle while it is open; mapped memory would end the process here."""
    _, clean, _, _ = corpora
    data = pipeline.open_data(source=f"folder:{clean}", cache_dir=str(tmp_path), **{**DATA, "max_bad_share": 1.0})
    before = list(data.train_batches(0, 8))
    shard = max(tmp_path.rglob("shard-*.pcm"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    after = list(data.train_batches(0, 8))
    assert len(after) == len(before)
    lost = 0
    for x, y in zip(before, after, strict=True):
        gone = (y["lengths"] == 0) & (x["lengths"] > 0)
        lost += int(gone.sum())
        assert not y["audio"][gone].any()
        np.testing.assert_array_equal(y["audio"][~gone], x["audio"][~gone])
        np.testing.assert_array_equal(y["lengths"][~gone], x["lengths"][~gone])
    assert 0 < lost < sum(int((x["lengths"] > 0).sum()) for x in before)
    assert sum(int(y["unread"].sum()) for y in after) == lost


@pytest.mark.slow
def test_two_steps_of_training_on_it(corpora, cache, tmp_path):
    mixed, _, bad, _ = corpora
    command = [
        sys.executable, "-m", "speechjax.main", "--config=configs/pretrain/wav2vec2.py:size=tiny,smoke",
        f"--workdir={tmp_path / 'run'}", f"--config.data.source=folder:{mixed}", "--config.data.min_seconds=0.1",
    ]  # fmt: skip
    environment = {**os.environ, "SPEECHJAX_CACHE": cache, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert {entry["id"]: entry["reason"] for entry in rejected} == bad
    assert f"{len(bad)} rejected" in done.stderr


def test_corrupt_flac_still_states_its_whole_length(tmp_path):
    """The trap of trusting headers: only decoding tells."""
    bad_flac_frame(tmp_path / "a.flac")
    assert soundfile.info(tmp_path / "a.flac").frames == len(noise())


@pytest.mark.slow
def test_two_hours_become_equal_segments_in_bounded_memory(tmp_path):
    (tmp_path / "speech").mkdir()
    minute = (noise(8_000 * 60) // 64).astype(np.int16)
    with soundfile.SoundFile(tmp_path / "speech" / "lecture.flac", "w", 8_000, 1, "PCM_16") as file:
        for _ in range(120):
            file.write(minute)
        file.write(minute[:8_000])
    program = (
        "import resource, sys; import numpy as np\n"
        "from speechjax.data.records import open_records\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "r = open_records(sys.argv[1], cache_dir=sys.argv[2], min_seconds=1.0, max_bad_share=0.0)\n"
        "samples = [len(r.read(i)) for i in range(len(r))]\n"
        "print(len(r), min(samples), max(samples), sum(samples), peak() - before)"
    )
    command = [sys.executable, "-c", program, f"folder:{tmp_path / 'speech'}", str(tmp_path / "cache")]
    output = subprocess.run(command, check=True, capture_output=True, cwd=REPO).stdout
    segments, shortest, longest, total, grown = map(int, output.split())
    assert total == 7_201 * RATE
    assert segments == 241
    assert longest <= 30 * RATE
    assert longest - shortest <= 1
    # The recording once, as int16; beside it blocks, tables and libraries.
    assert grown < 2 * total + 80e6
    shutil.rmtree(tmp_path / "cache")

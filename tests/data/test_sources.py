"""What a source string names: which recordings, under which ids, with which text; and what a mistake is answered."""

import multiprocessing
import os
import sys
import tracemalloc
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax.data import sources
from speechjax.data.sources import Item, open_source
from speechjax.errors import UserError


def tone(rate: int = 16_000, seconds: float = 1.5, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def noise(samples: int = 48_000, seed: int = 0) -> np.ndarray:
    """int16, exact in 16 bit files."""
    return np.random.default_rng(seed).integers(-9_000, 9_000, samples).astype(np.int16)


def write(path: Path, audio: np.ndarray, rate: int = 16_000, **options) -> Path:
    soundfile.write(path, audio, rate, **options)
    return path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "embedded.*folder:DIR.*manifest:FILE.*tfds:NAME.*shards:DIR"),
        ("s3://bucket", "unknown kind 's3'"),
        ("/tmp", "did you mean folder:/tmp"),
        ("folder:", "which folder"),
        ("folder:/no/such/place", "no such folder: /no/such/place"),
        ("manifest:", "which file"),
        ("manifest:/no/such.jsonl", "cannot read /no/such.jsonl"),
        ("manifest:/", "cannot read /: Is a directory"),
        ("embedded:lots", "positive number"),
        ("embedded:-1", "positive number"),
        ("embedded:nan", "positive number"),
        ("tfds:spoken_digit", "NAME\\[/CONFIG\\]:SPLIT"),
        ("tfds:x:train@fast", "NAME\\[/CONFIG\\]:SPLIT"),
    ],
)
def test_source_mistakes(source, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


def test_folder_lists_audio_and_only_audio(tmp_path):
    (tmp_path / "b" / "dir.wav").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    readable = ["a.wav", "b/UPPER.FLAC", "b/dir.wav/x.ogg", "new\nline.wav"]
    for name in [*readable, "._a.wav", ".git/b.wav"]:
        write(tmp_path / name, tone())
    (tmp_path / "notes.txt").touch()
    (tmp_path / "b" / "song.m4a").touch()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "dangling.wav").symlink_to("nowhere")
    (tmp_path / "circle.wav").symlink_to("circle.wav")
    (tmp_path / "b" / "up").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    source = open_source(f"folder:{tmp_path}")
    wanted = sorted([*readable, "dangling.wav", "circle.wav"])
    assert [item.id for item in source.items()] == wanted
    assert source.total == len(wanted)
    assert source.ignored == 4  # notes.txt, song.m4a, pipe.wav, self
    assert all(len(item.read()) == len(tone()) for item in source.items() if item.id in readable)


def test_folder_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    try:
        os.rename(write(tmp_path / "a.wav", tone()), tmp_path / name)
    except OSError:
        pytest.skip("the file system insists on UTF-8")
    (item,) = open_source(f"folder:{tmp_path}").items()
    assert item.id == name
    assert len(item.read()) == len(tone())


def test_folder_without_audio(tmp_path):
    with pytest.raises(UserError, match=r"no audio files in .* \(found nothing"):
        open_source(f"folder:{tmp_path}")
    for k in range(3):
        (tmp_path / f"{k}.m4a").touch()
    with pytest.raises(UserError, match=r"found 3 \.m4a; readable are .*\.flac"):
        open_source(f"folder:{tmp_path}")


def test_fingerprint_follows_the_files(tmp_path):
    path = write(tmp_path / "a.wav", tone())
    os.utime(path, ns=(0, 10**18))
    prints = [open_source(f"folder:{tmp_path}").fingerprint]
    assert open_source(f"folder:{tmp_path}").fingerprint == prints[0]
    os.utime(path, ns=(0, 10**18 + 1))
    prints.append(open_source(f"folder:{tmp_path}").fingerprint)
    write(path, tone(seconds=2.0))
    os.utime(path, ns=(0, 10**18 + 1))
    prints.append(open_source(f"folder:{tmp_path}").fingerprint)
    (tmp_path / "b.wav").symlink_to("gone.wav")
    prints.append(open_source(f"folder:{tmp_path}").fingerprint)
    write(tmp_path / "gone.wav", tone())
    prints.append(open_source(f"folder:{tmp_path}").fingerprint)
    assert len(set(prints)) == 5


def test_items_carry_what_shards_and_workers_need(tmp_path):
    """The size of the file, where it lies, and a `read` that another process can run."""
    paths = [write(tmp_path / name, noise(samples)) for name, samples in (("a.wav", 8_000), ("b.flac", 16_000))]
    items = list(open_source(f"folder:{tmp_path}").items())
    assert [item.size for item in items] == [path.stat().st_size for path in paths]
    assert [item.file for item in items] == [(str(path), 0.0, None) for path in paths]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = list(pool.map(read_in_worker, items))
    for item, read in zip(items, there, strict=True):
        np.testing.assert_array_equal(item.read(), read)


def read_in_worker(item: Item) -> np.ndarray:
    return item.read()


def test_folder_keeps_to_audio_where_metadata_lie_beside_it(tmp_path):
    write(tmp_path / "a.wav", tone())
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,hello\n")
    (item,) = open_source(f"folder:{tmp_path}").items()
    assert item.meta == {}
    (item,) = open_source(f"manifest:{tmp_path}/metadata.csv").items()
    assert item.meta == {"text": "hello"}


def test_folder_statistics_are_lean(tmp_path):
    """A name, a number and no object a file: below 150 bytes each, where a Path or an Item takes 400 and more."""
    first = write(tmp_path / "0.wav", tone(seconds=0.1))
    for k in range(1, 4_000):
        os.link(first, tmp_path / f"{k}.wav")
    tracemalloc.start()
    source = open_source(f"folder:{tmp_path}")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.total == 4_000
    assert held < 150 * 4_000
    assert sum(item.size for item in source.items()) == 4_000 * first.stat().st_size


def test_files_that_cannot_be_read_change_the_fingerprint(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", tone())
    os.chmod(path, 0o600)
    before = open_source(f"folder:{tmp_path}").fingerprint
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may read everything
    assert open_source(f"folder:{tmp_path}").fingerprint != before


@pytest.mark.parametrize(
    ("fields", "meta"),
    [
        ({"text": "a", "speaker_id": 7}, {"text": "a", "speaker": 7}),
        ({"sentence": "a", "client_id": "x", "locale": "de"}, {"text": "a", "speaker": "x", "lang": "de"}),
        # As it is spoken wins over as it is written, which is kept.
        ({"text": "Dr. X", "normalized_text": "doctor x"}, {"raw_text": "Dr. X", "text": "doctor x"}),
        ({"text": "a", "normalized_text": ""}, {"text": "a", "normalized_text": ""}),
        ({"text": "", "normalized_text": None}, {"raw_text": "", "text": None}),
        ({"transcript": ""}, {"text": ""}),
        ({"other": 1}, {"other": 1}),
    ],
)
def test_standard_names(fields, meta):
    given = dict(fields)
    assert sources.with_standard_names(fields) == meta
    assert fields == given


def test_shards_open_by_their_own_module(monkeypatch):
    """A stand-in for the module of prepared sets: it alone knows what the folder holds."""
    module = types.ModuleType("speechjax.data.shards")
    module.as_source = lambda source, rest: (source, rest)
    monkeypatch.setitem(sys.modules, "speechjax.data.shards", module)
    assert open_source("shards:/prepared/a") == ("shards:/prepared/a", "/prepared/a")


def test_embedded():
    from speechjax.data import embedded

    source = open_source("embedded:0.005")
    items, expected = list(source.items()), list(embedded.utterances(0.005, seed=0))
    assert [item.id for item in items] == [utterance["id"] for utterance in expected]
    assert items
    for item, utterance in zip(items, expected, strict=True):
        np.testing.assert_array_equal(item.read(), utterance["audio"])
        assert item.meta["text"] == utterance["text"]
        assert set(item.meta) == {"text", "speaker", "lang", "phones"}
    assert open_source("embedded:0.005").fingerprint == source.fingerprint
    assert open_source("embedded:0.01").fingerprint != source.fingerprint


def test_opening_reads_no_audio(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", tone())
    monkeypatch.setattr(sources, "decode", lambda *_: pytest.fail("decoded"))
    (item,) = open_source(f"folder:{tmp_path}").items()
    with pytest.raises(pytest.fail.Exception):
        item.read()

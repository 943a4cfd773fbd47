"""A prepared set as TFDS data set: other programs read the same samples, and so do we."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax.data import array_record
from speechjax.data.array_record import write_tfds
from speechjax.data.prepare import prepare
from speechjax.data.shards import Shards
from speechjax.data.sources import open_source
from speechjax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

pytestmark = pytest.mark.filterwarnings("ignore")  # TensorFlow's own
RATE = 16_000


@pytest.fixture
def prepared(tmp_path) -> Path:
    """Recordings with everything that a name and a transcript may hold, one of them unusable."""
    rng = np.random.default_rng(0)
    lines = []
    for k, text in enumerate(("plain", "ß 語 😀", 'zwei\nZeilen "q"', "", "x" * 5_000)):
        soundfile.write(tmp_path / f"{k}.wav", rng.integers(-32_768, 32_767, 9_000 + k).astype(np.int16), RATE)
        lines.append({"audio_filepath": f"{k}.wav", "id": f"nr {k} ß", "text": text, "speaker": k, "tags": ["a", k]})
    lines.append({"audio_filepath": "gone.wav", "text": "gone"})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare(open_source(f"manifest:{tmp_path / 'm.jsonl'}"), tmp_path / "set", progress=False)
    return tmp_path / "set"


def samples(folder: Path) -> list[np.ndarray]:
    shards = Shards(folder)
    found = [np.empty(n, np.int16) for n in shards.index["length"].tolist()]
    for row, audio in enumerate(found):
        shards.read_into(row, 0, audio)
    return found


def test_tfds_reads_what_was_prepared(prepared, tmp_path, capfd):
    place = write_tfds(prepared, tmp_path / "tfds", "mine")
    assert place == tmp_path / "tfds" / "mine" / "1.0.0"
    assert not capfd.readouterr().out
    builder = tfds.builder_from_directory(str(place))
    assert builder.info.metadata["sample_rate"] == RATE
    data = builder.as_data_source("train")
    entries = list(Shards(prepared).entries())
    assert len(data) == len(entries) == 5
    for example, entry, audio in zip((data[k] for k in range(5)), entries, samples(prepared), strict=True):
        assert example["audio"].dtype == np.int16
        np.testing.assert_array_equal(example["audio"], audio)
        assert example["id"].decode() == entry["id"]
        assert example["text"].decode() == entry["meta"]["text"]
        assert json.loads(example["meta"]) == entry["meta"]


def test_we_read_it_back(prepared, tmp_path, monkeypatch):
    write_tfds(prepared, tmp_path / "tfds", "mine")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    items = list(open_source("tfds:mine:train").items())
    entries = list(Shards(prepared).entries())
    assert [item.meta["id"] for item in items] == [entry["id"] for entry in entries]
    assert [json.loads(item.meta["meta"]) for item in items] == [entry["meta"] for entry in entries]
    assert [item.meta["text"] for item in items] == [entry["meta"]["text"] for entry in entries]
    for item, audio in zip(items, samples(prepared), strict=True):
        np.testing.assert_array_equal(item.read(), audio)


def test_it_takes_hardly_more_than_the_samples(tmp_path):
    """TFDS's own Audio feature takes 2.8 times as much; ArrayRecord adds some 80 kB a file."""
    (tmp_path / "speech").mkdir()
    rng = np.random.default_rng(0)
    for k in range(100):
        soundfile.write(tmp_path / "speech" / f"{k}.wav", rng.integers(-9_000, 9_000, RATE).astype(np.int16), RATE)
    prepare(open_source(f"folder:{tmp_path / 'speech'}"), tmp_path / "set", progress=False)
    place = write_tfds(tmp_path / "set", tmp_path / "tfds", "mine")
    stored = sum(path.stat().st_size for path in place.iterdir())
    assert 0.9 < stored / (100 * 2 * RATE) < 1.1


def test_interrupted_it_leaves_nothing_that_looks_whole(prepared, tmp_path, monkeypatch):
    first = write_tfds(prepared, tmp_path / "tfds", "mine")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    real = array_record._blocks

    def interrupted(shards):
        yield next(real(shards))[:2]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(array_record, "_blocks", interrupted)
        for name in ("mine", "other"):
            with pytest.raises(KeyboardInterrupt):
                write_tfds(prepared, tmp_path / "tfds", name)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert not (tmp_path / "tfds" / "other" / "1.0.0").exists()
    second = write_tfds(prepared, tmp_path / "tfds", "other")
    assert len(tfds.builder_from_directory(str(second)).as_data_source("train")) == 5
    assert [path.name for path in (tmp_path / "tfds" / "other").iterdir()] == ["1.0.0"]


def test_blocks_end_at_a_size_and_nothing_is_lost_between_them(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(array_record, "_BLOCK_BYTES", 2 * 18_000)
    assert [len(block) for block in array_record._blocks(Shards(prepared))] == [2, 2, 1]
    place = write_tfds(prepared, tmp_path / "tfds", "mine")
    data = tfds.builder_from_directory(str(place)).as_data_source("train")
    assert [len(data[k]["audio"]) for k in range(len(data))] == Shards(prepared).index["length"].tolist()


def test_samples_that_went_away_do_not_become_zeros(prepared, tmp_path, monkeypatch):
    shards = Shards(prepared)
    os.truncate(prepared / "shard-00000.pcm", 40_000)
    monkeypatch.setattr(array_record, "Shards", lambda folder: shards)
    with pytest.raises(UserError, match=r"cannot read 'nr 2 .*ends before.*repair it with --verify"):
        write_tfds(prepared, tmp_path / "tfds", "mine")
    assert not (tmp_path / "tfds" / "mine" / "1.0.0").exists()


def test_a_name_that_is_not_utf8(tmp_path):
    """TFDS stores text as UTF-8 bytes; the original bytes are the only faithful ones."""
    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "x.wav", np.arange(900) / 1_000, RATE)
    os.rename(tmp_path / "x.wav", os.fsencode(tmp_path) + b"/speech/caf\xe9.wav")
    prepare(open_source(f"folder:{tmp_path / 'speech'}"), tmp_path / "set", progress=False)
    data = tfds.builder_from_directory(str(write_tfds(tmp_path / "set", tmp_path / "tfds", "mine"))).as_data_source()
    assert data["train"][0]["id"] == b"caf\xe9.wav"
    assert data["train"][0]["text"] == b""

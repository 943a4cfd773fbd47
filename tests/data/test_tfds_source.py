"""Data sets written by TFDS and read back as recordings, in both of its file formats."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax.data.decode import decode
from speechjax.data.records import Records, open_records
from speechjax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # TensorFlow's own
RATE = 16_000


def audio_of(k: int) -> np.ndarray:
    """int16 [RATE]; number 3 is silent."""
    return np.random.default_rng(k).integers(-9_000, 9_000, RATE).astype(np.int16) * np.int16(k != 3)


@pytest.fixture
def opened(tmp_path) -> Callable[..., Records]:
    return functools.partial(open_records, cache_dir=str(tmp_path / "cache"), min_seconds=0.1, max_bad_share=0.5)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> Path:
    """Two small prepared data sets, as `tfds build` leaves them."""
    import tensorflow_datasets as tfds

    texts = {"text": tfds.features.Text(), "phones": tfds.features.Sequence(np.int32)}
    toy = {
        "speech": tfds.features.Audio(sample_rate=8_000),  # stored as int64
        "label": tfds.features.ClassLabel(names=["yes", "no"]),
        "speaker_id": np.int64,
        "transcript": tfds.features.Text(),
    }
    compact = {"wave": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"), **texts}

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        FEATURES, NAME = toy, "toy"

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for k in range(count):
                audio = audio_of(k)
                yield k, {
                    "speech": audio.astype(np.int64), "label": k % 2, "speaker_id": k, "transcript": f"größe {k}"
                }  # fmt: skip

    class ToyCompact(Toy):
        FEATURES = compact

        def _generate_examples(self, count):
            for k in range(count):
                yield k, {"wave": audio_of(k), "text": str(k), "phones": [k, k]}

    folder = tmp_path_factory.mktemp("tfds")
    Toy(data_dir=folder).download_and_prepare()
    ToyCompact(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfrecord(tfds_dir, opened, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    records = opened("tfds:toy:train")
    assert len(records) == 5
    assert [entry["reason"] for entry in records.rejected] == ["silent"]
    assert all(name.startswith("train/00000") for name in records.ids)
    assert set(records.lengths) == {2 * RATE}  # 8 kHz by the feature
    for k, meta in enumerate(records.meta):
        speaker = meta["speaker"]  # TFDS shuffles when it prepares
        assert meta == {"label": ["yes", "no"][speaker % 2], "speaker": speaker, "text": f"größe {speaker}"}
        soundfile.write(tmp_path / "same.wav", audio_of(speaker), 8_000)
        np.testing.assert_array_equal(records.read(k), decode(tmp_path / "same.wav"))
    assert [opened("tfds:toy:train").meta for _ in range(2)] == [records.meta] * 2
    assert len(opened("tfds:toy:train[:50%]", max_bad_share=0.9)) in (2, 3)
    assert len(opened("tfds:toy:test")) == 2


def test_array_record(tfds_dir, opened, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    with pytest.raises(UserError, match="does not state its sample rate; append it: tfds:toy_compact:train@16000"):
        opened("tfds:toy_compact:train")
    records = opened("tfds:toy_compact:train@16000")
    for k, meta in enumerate(records.meta):
        np.testing.assert_array_equal(records.read(k), audio_of(int(meta["text"])))
        assert meta["phones"] == [int(meta["text"])] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy:dev", "toy has no split 'dev'; it has .*train"),
        ("spoken_digit:train", "'spoken_digit' is not prepared in .*run `tfds build spoken_digit`"),
        ("spoken_digits:train", "TFDS knows none of that name; similar: spoken_digit"),
        ("toy/large:train", "'toy/large' is not prepared"),
        ("Not A Name!:train", "Not A Name"),
    ],
)
def test_mistakes(tfds_dir, opened, monkeypatch, name, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    with pytest.raises(UserError, match=message) as caught:
        opened(f"tfds:{name}")
    assert "\n" not in str(caught.value)

"""Data sets written by TFDS and read back as recordings, in both of its file formats, and its own builders mocked."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax.data.decode import BadAudio, decode
from speechjax.data.sources import Item, open_source
from speechjax.data.tfds_source import _array_to_pcm16, _find_wave, _full_scale, _probe, _Wave
from speechjax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # TensorFlow's own
RATE = 16_000


def audio_of(k: int) -> np.ndarray:
    """int16 [RATE]; number 3 is silent."""
    return np.random.default_rng(k).integers(-9_000, 9_000, RATE).astype(np.int16) * np.int16(k != 3)


def forms_of(audio: np.ndarray, folder: Path) -> dict:
    """The same recording in every form in which TFDS can hold it."""
    for name in ("clip.flac", "clip.wav"):
        soundfile.write(folder / name, audio, RATE)
    return {
        "audio": audio.astype(np.int64),
        "bits24": audio.astype(np.int32) << 8,
        "bits32": audio.astype(np.int64) << 16,
        "float": (audio / 32_768).astype(np.float32),
        "unscaled": audio.astype(np.float64),  # what TFDS makes of a file where the feature has a float dtype
        "stereo": np.stack([audio, audio], axis=1),
        "bytes": audio,
        "zlib": audio,
        "tensor": audio,
        "fixed": audio,
        "listed": audio.astype(np.int32),
        "nested": {"audio": audio},
        "flac": (folder / "clip.flac").open("rb"),
        "wav": (folder / "clip.wav").open("rb"),
    }


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> Path:
    """Small prepared data sets, as `tfds build` leaves them."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    audio, tensor = tfds.features.Audio, tfds.features.Tensor
    toy = {
        "speech": audio(sample_rate=8_000),  # stored as int64
        "label": tfds.features.ClassLabel(names=["yes", "no"]),
        "words": tfds.features.Sequence(tfds.features.ClassLabel(names=["a", "b"])),
        "nameless": tfds.features.ClassLabel(num_classes=9),
        "speaker_id": np.int64,
        "transcript": tfds.features.Text(),
    }
    compact = {
        "wave": tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
        "text": tfds.features.Text(),
        "phones": tfds.features.Sequence(np.int32),
    }
    pair = {"near": audio(sample_rate=RATE), "far": audio(sample_rate=RATE), "x": np.float32}
    forms = {
        "audio": audio(sample_rate=RATE),
        "bits24": audio(dtype=np.int32, sample_rate=RATE),
        "bits32": audio(sample_rate=RATE),
        "float": audio(dtype=np.float32, sample_rate=RATE),
        "unscaled": audio(dtype=np.float64, sample_rate=RATE),
        "stereo": audio(shape=(None, 2), dtype=np.int16, sample_rate=RATE),
        "bytes": audio(dtype=np.int16, encoding="bytes", sample_rate=RATE),
        "zlib": audio(dtype=np.int16, encoding="zlib", sample_rate=RATE),
        "tensor": tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
        "fixed": tensor(shape=(RATE,), dtype=np.int16),
        "listed": tfds.features.Sequence(np.int32),
        "nested": {"audio": audio(dtype=np.int16, sample_rate=RATE)},
        "flac": audio(file_format="flac", dtype=np.int16, lazy_decode=True),
        "wav": audio(file_format="wav", lazy_decode=True),
    }

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        FEATURES, NAME, METADATA = toy, "toy", None

        def _info(self):
            metadata = self.METADATA and tfds.core.MetadataDict(**self.METADATA)
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES),
                                         metadata=metadata)  # fmt: skip

        def _split_generators(self, dl_manager):
            return {name: ((k, self.example(k)) for k in range(n)) for name, n in {"train": 6, "test": 2}.items()}

        def _generate_examples(self):
            raise NotImplementedError

        def example(self, k):
            return {
                "speech": audio_of(k).astype(np.int64), "label": k % 2, "words": [0, k % 2], "nameless": k,
                "speaker_id": k, "transcript": f"größe {k}",
            }  # fmt: skip

    class ToyCompact(Toy):
        FEATURES, NAME = compact, "toy_compact"

        def example(self, k):
            return {"wave": audio_of(k), "text": str(k), "phones": [k, k]}

    class ToyStated(ToyCompact):
        METADATA, NAME = {"sample_rate": 8_000}, "toy_stated"

    class Pair(Toy):
        FEATURES, NAME = pair, "pair"

        def example(self, k):
            return {"near": audio_of(k).astype(np.int64), "far": audio_of(k).astype(np.int64), "x": 1.0}

    class Forms(Toy):
        FEATURES, NAME = forms, "forms"

        def example(self, k):
            return forms_of(audio_of(0), folder)

    class FormsArray(Forms):
        NAME = "forms_array"

    with pytest.MonkeyPatch.context() as patch:
        # TFDS writes into an Audio feature with an encoding only what it decoded itself, from a file.
        real = audio.encode_example
        by_type = {np.ndarray: tensor.encode_example}
        patch.setattr(audio, "encode_example", lambda self, value: by_type.get(type(value), real)(self, value))
        for builder in (Toy, ToyStated, Pair, Forms):
            builder(data_dir=folder).download_and_prepare()
        for builder in (ToyCompact, FormsArray):
            builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(autouse=True)
def data_dir(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))


def items_of(source: str) -> list[Item]:
    return list(open_source(source).items())


def test_tfrecord(tmp_path):
    source = open_source("tfds:toy:train")
    items = list(source.items())
    assert [item.id for item in items] == [f"train/{k:06d}" for k in range(6)]
    assert source.total == 6
    for item in items:
        k = item.meta["speaker"]  # TFDS shuffles when it prepares
        assert item.meta == {
            "label": ["yes", "no"][k % 2], "words": ["a", "ab"[k % 2]], "nameless": str(k), "speaker": k,
            "text": f"größe {k}",
        }  # fmt: skip
        assert item.size == 2 * 2 * RATE  # 8 kHz by the feature
        assert item.file is None
        json.dumps(item.meta)
        soundfile.write(tmp_path / "same.wav", audio_of(k), 8_000)
        read = pickle.loads(pickle.dumps(item.read))
        if k == 3:
            with pytest.raises(BadAudio, match="silent"):
                read()
        else:
            np.testing.assert_array_equal(read(), decode(tmp_path / "same.wav"))
    assert [item.meta for item in source.items()] == [item.meta for item in items]
    assert len(items_of("tfds:toy:train[:50%]")) == 3
    assert len(items_of("tfds:toy:test")) == 2
    assert len(items_of("tfds:toy:train+test")) == 8
    prints = {open_source(f"tfds:toy:{rest}").fingerprint for rest in ("train", "test", "train@16000", "train[:50%]")}
    assert len(prints) == 4
    assert open_source("tfds:toy:train").fingerprint == source.fingerprint


def test_array_record_and_a_rate_that_must_be_told():
    with pytest.raises(UserError, match="does not state its sample rate; append it: tfds:toy_compact:train@16000"):
        open_source("tfds:toy_compact:train")
    for item in items_of("tfds:toy_compact:train@16000"):
        k = int(item.meta["text"])
        assert item.meta["phones"] == [k, k]
        if k != 3:
            np.testing.assert_array_equal(item.read(), audio_of(k))


def test_rate_of_the_data_set():
    """At 8 kHz, as its metadata say, 1 s becomes 2; said in the source, the rate is another."""
    assert len(items_of("tfds:toy_stated:test")[0].read()) == 2 * RATE
    assert len(items_of("tfds:toy_stated:test@16000")[0].read()) == RATE


@pytest.mark.parametrize("name", ["forms", "forms_array"])
@pytest.mark.parametrize(
    "feature",
    ["audio", "bits24", "bits32", "float", "unscaled", "stereo", "bytes", "zlib", "tensor@16000", "fixed@16000",
     "listed@16000", "nested/audio", "flac", "wav"],
)  # fmt: skip
def test_every_form_of_a_waveform_gives_the_same_samples(name, feature):
    for item in items_of(f"tfds:{name}:test#{feature}"):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(item.read))(), audio_of(0))
        # Waveforms are no meta data; a list of numbers and a tensor that are not chosen might be.
        chosen = feature.partition("@")[0]
        assert set(item.meta) == {"tensor", "fixed", "listed"} - {chosen}


def test_several_waveforms():
    with pytest.raises(UserError, match=r"which feature is the audio\? found far, near; write tfds:NAME"):
        open_source("tfds:pair:test")
    (item, _) = items_of("tfds:pair:test#far")
    assert item.meta == {"x": 1.0}
    for wrong in ("x", "middle"):
        with pytest.raises(UserError, match=f"'{wrong}' is not a waveform; try far, near"):
            open_source(f"tfds:pair:test#{wrong}")
    with pytest.raises(UserError, match=r"which feature is the audio\? found audio, bits24, .*, nested/audio, "):
        open_source("tfds:forms:test")  # two bear a usual name


@pytest.mark.parametrize(
    ("peak", "dtype", "scale"),
    [
        (100, np.int64, 1 << 15),
        (-32_768, np.int64, 1 << 15),
        (32_769, np.int32, 1 << 23),
        (-(1 << 23), np.int32, 1 << 23),
        ((1 << 23) + 1, np.int64, 1 << 31),
        (1 << 40, np.int64, 1 << 31),
        (0.01, np.float32, 1),
        (1.7, np.float64, 1),
        (20_000.0, np.float32, 1 << 15),
        (np.nan, np.float32, 1),
    ],
)
def test_full_scale_is_that_of_the_loudest(peak, dtype, scale):
    waves = [np.zeros(0, dtype), np.array([0, 3 if scale > 1 else 0.001], dtype), np.array([[0], [peak]], dtype)]
    assert _full_scale(waves) == scale


def test_probing_takes_no_more_than_it_needs():
    wave = _Wave(("a",), None, lazy=False)
    for dtype, samples, taken in ((np.int16, 9, 1), (np.int64, 9, 32), (np.int64, 1 << 21, 5)):
        stream = iter([{"a": np.ones(samples, dtype)}] * 40)
        head, scale = _probe(stream, wave)
        assert (len(head), len(list(stream)), scale) == (taken, 40 - taken, 1 << 15)


def test_samples_beyond_the_scale_of_the_split_are_bad():
    quiet, loud = np.array([1, -5]), np.array([1, 40_000])
    assert _array_to_pcm16(quiet, RATE, 1 << 15).tolist() == [1, -5]
    with pytest.raises(BadAudio, match="integers beyond 16 bit"):
        _array_to_pcm16(loud, RATE, 1 << 15)
    with pytest.raises(BadAudio, match="no samples"):
        _array_to_pcm16(quiet[:0], RATE, 1 << 15)


def test_damaged_shards(tfds_dir, tmp_path, monkeypatch):
    shutil.copytree(tfds_dir, tmp_path / "copy")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "copy"))
    for name in ("toy", "toy_compact"):
        (shard,) = (tmp_path / "copy" / name / "1.0.0").glob("*-train.*record-*")
        data = bytearray(shard.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        shard.write_bytes(data)
        with pytest.raises(UserError, match=f"'tfds:{name}:train@8000' cannot be read, prepare it again: ") as caught:
            items_of(f"tfds:{name}:train@8000")
        assert "\n" not in str(caught.value)
        shard.unlink()
        with pytest.raises(UserError, match=r"cannot read .*record-00000-of-00001: No such file"):
            open_source(f"tfds:{name}:train@8000")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy:dev", "toy has no split 'dev'; it has .*train"),
        ("spoken_digit:train", "'spoken_digit' is not prepared in .*run `tfds build spoken_digit`"),
        ("spoken_digits:train", "TFDS knows none of that name; similar: spoken_digit"),
        ("toy/large:train", "'toy/large' is not prepared"),
        ("Not A Name!:train", "Not A Name"),
        ("toy:train#", "write tfds:NAME"),
    ],
)
def test_mistakes(name, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"tfds:{name}")
    assert "\n" not in str(caught.value)


# ---- the builders that TFDS comes with, their data made up by its own mocking

BUILDERS = {  # name: (Hz, what the meta data hold under the standard names)
    "librispeech": (16_000, {"text", "speaker"}),
    "ljspeech": (22_050, {"text", "raw_text"}),
    "vctk": (48_000, {"text", "speaker"}),
    "libritts": (24_000, {"text", "speaker"}),
    "voxceleb": (16_000, {"label"}),
    "crema_d": (16_000, {"label", "speaker"}),
    "speech_commands": (16_000, {"label"}),
    "spoken_digit": (8_000, {"label"}),
    "xtreme_s/fleurs.en_us": (16_000, {"text", "lang"}),
    "common_voice": (None, {"text", "speaker"}),
    "tedlium": (16_000, {"text", "speaker"}),
    "savee": (44_100, {"label", "speaker"}),
    "accentdb": (44_100, {"label", "speaker"}),
    "voxforge": (16_000, {"label", "speaker"}),
    "yes_no": (8_000, {"label"}),
    "gtzan": (22_050, {"label"}),
    "fuss": (16_000, set()),
}


def write_metadata(name: str, folder: Path, **options) -> None:
    """What preparing the data set would write, less the examples."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=folder, **options)
    template = builder._get_filename_template("train")
    split = tfds.core.SplitInfo(name="train", shard_lengths=[3], num_bytes=0, filename_template=template)
    builder.info.set_splits(tfds.core.SplitDict([split]))
    builder.data_path.mkdir(parents=True)
    builder.info.write_to_directory(builder.data_path)
    for path in builder.info.splits["train"].filepaths:
        path.touch()


@pytest.mark.parametrize(
    ("name", "file_format"),
    [*((name, "tfrecord") for name in BUILDERS), ("librispeech", "array_record"), ("spoken_digit", "array_record")],
)
def test_builders_of_tfds(name, file_format, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    rate, expected = BUILDERS[name]
    write_metadata(name, tmp_path, file_format=file_format)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = f"tfds:{name}:train"
    if rate is None:
        with pytest.raises(UserError, match=f"{name} does not state its sample rate"):
            open_source(source)
        rate, source = 48_000, f"{source}@48000"
    policy = tfds.testing.MockPolicy.USE_FILES
    with tfds.testing.mock_data(num_examples=3, policy=policy, data_dir=str(tmp_path)):
        items = items_of(source)
    assert len(items) == 3
    for item in items:
        json.dumps(item.meta)
        assert set(item.meta) & {"text", "raw_text", "speaker", "lang", "label"} == expected
        # The mock draws from 0 to 255: exact where nothing is resampled, and the length tells the rate.
        ours = item.read()
        assert 2 * len(ours) == pytest.approx(item.size, abs=2)
        audio, *rest = item.read.args
        assert rest == [rate, 1 << 15]
        if rate == RATE:
            np.testing.assert_array_equal(ours, audio)


def test_librispeech_stored_as_flac():
    import tensorflow_datasets as tfds

    features = tfds.builder("librispeech/lazy_decode").info.features
    wave = _find_wave(features, "tfds:librispeech/lazy_decode:train", None)
    assert (wave.path, wave.lazy) == (("speech",), True)

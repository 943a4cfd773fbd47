"""TensorFlow Datasets as a source: any prepared split with a waveform in it, read once, in order, never downloaded.

TensorFlow loads when the functions run, so that the other sources do without.
"""

import difflib
import functools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from speechjax.data.decode import BadAudio, to_pcm16
from speechjax.data.sources import Item, Source, digest, with_standard_names
from speechjax.errors import UserError

_AUDIO_NAMES = ("audio", "speech", "voice", "waveform", "wav")
_SPEC = re.compile(r"(.+):((?:[^][:@]|\[[^]]*\])+)(?:@(\d+))?")  # the split may be a slice: train[:10%]


def open_split(source: str, rest: str) -> Source:
    """The split that `rest`, NAME[/CONFIG]:SPLIT[@HZ], names.

    Raises `UserError` where it is not prepared on this machine, or has no audio that can be told.
    """
    match = _SPEC.fullmatch(rest)
    if match is None:
        raise UserError(f"data source {source!r}: write tfds:NAME[/CONFIG]:SPLIT[@HZ], e.g. tfds:spoken_digit:train")
    name, split, stated_rate = match.groups()
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # else TensorFlow claims the memory that JAX needs
    builder = _prepared_builder(name)
    try:
        part = builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}") from error
    features = builder.info.features
    key = _audio_key(features, name)
    rate = int(stated_rate or getattr(features[key], "sample_rate", 0) or 0)
    if not rate:
        raise UserError(f"{name} does not state its sample rate; append it: {source}@16000")

    def examples() -> Iterable[dict[str, Any]]:
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            return builder.as_data_source(split)
        order = tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1)
        return tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False, read_config=order))

    def items() -> Iterator[Item]:
        for index, example in enumerate(examples()):
            read = functools.partial(_array_to_pcm16, example[key], rate)
            yield Item(f"{split}/{index:06d}", read, _tfds_meta(example, features, key))

    files = [(str(path), path.stat()) for path in map(tfds.core.Path, part.filepaths)]
    identities = [f"{path} {status.length} {status.mtime}" for path, status in files]
    return Source(source, digest(["tfds", split, key, str(rate), *identities]), items, part.num_examples)


def _prepared_builder(name: str) -> Any:
    """The builder of a data set that lies on this machine; never looks for one elsewhere."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    folder = os.environ.get("TFDS_DATA_DIR")
    try:
        return builder_from_files(name, data_dir=folder)
    except ValueError as error:
        if not isinstance(error, tfds.core.DatasetNotFoundError):
            raise UserError(f"data set {name!r}: {' '.join(str(error).split())}") from error
        base = name.split("/")[0].split(":")[0]
        known = tfds.list_builders(with_community_datasets=False)
        where = folder or "~/tensorflow_datasets"
        if base not in known:
            close = difflib.get_close_matches(base, known)
            hint = f"; similar: {', '.join(close)}" if close else ""
            raise UserError(f"no data set {name!r} in {where}, and TFDS knows none of that name{hint}") from error
        raise UserError(
            f"data set {name!r} is not prepared in {where}: run `tfds build {name}`, "
            "or set TFDS_DATA_DIR to where it is"
        ) from error


def _audio_key(features: Any, name: str) -> str:
    """The feature that holds the waveform: an Audio feature, else a one-dimensional tensor of numbers."""
    import tensorflow_datasets as tfds

    audio = [key for key, feature in features.items() if isinstance(feature, tfds.features.Audio)]
    numbers = (np.int16, np.int32, np.int64, np.float32)
    waves = audio or [
        key
        for key, feature in features.items()
        if type(feature) is tfds.features.Tensor and feature.shape == (None,) and feature.np_dtype in numbers
    ]
    chosen = next((key for key in _AUDIO_NAMES if key in waves), waves[0] if len(waves) == 1 else None)
    if chosen is None:
        raise UserError(f"{name}: which feature is the audio? Found {waves or 'none'} among {', '.join(features)}")
    if audio and features[chosen].to_json_content().lazy_decode:
        raise UserError(f"{name}: {chosen!r} is stored undecoded (lazy_decode); build a config that is not lazy")
    return chosen


def _array_to_pcm16(audio: Any, rate: int) -> np.ndarray:
    """Integers are 16 bit samples whatever their dtype (TFDS stores int64); floats have full scale ±1."""
    samples = np.asarray(audio)
    samples = samples[:, None] if samples.ndim == 1 else samples
    if np.issubdtype(samples.dtype, np.integer):
        if samples.size and not -32_768 <= samples.min() <= samples.max() <= 32_767:
            raise BadAudio("integers beyond 16 bit")
        samples = samples / np.float32(32_768)
    blocks = np.array_split(samples.astype(np.float32, copy=False), len(samples) // 1_000_000 + 1)
    return to_pcm16((block for block in blocks if len(block)), rate)


def _tfds_meta(example: dict[str, Any], features: Any, audio: str) -> dict[str, Any]:
    """Scalars and flat lists of an example, with class indices as names; JSON types only."""
    import tensorflow_datasets as tfds

    fields = {}
    for key, value in example.items():
        feature = features[key]
        if isinstance(feature, tfds.features.ClassLabel):
            if value >= 0:  # -1 means that nobody knows
                fields[key] = feature.int2str(int(value))
        elif key != audio and isinstance(feature.shape, tuple) and len(feature.shape) <= 1:
            fields[key] = _plain(value)
    return with_standard_names(fields)


def _plain(value: Any) -> Any:
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

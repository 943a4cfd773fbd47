"""TensorFlow Datasets as a source: any prepared split with a waveform in it, read once, in order, never downloaded.

The waveform, its sample rate and its scale are found by themselves: a feature of type Audio, the rate that it or the
data set states, integers of 16, 24 or 32 bits or floats. `#FEATURE` and `@HZ` say it where that is not enough.
TensorFlow loads when the functions run, so that the other sources do without.
"""

import difflib
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from speechjax.data.decode import SAMPLE_RATE, BadAudio, decode, to_pcm16
from speechjax.data.sources import Item, Source, digest, with_standard_names
from speechjax.errors import UserError

_AUDIO_NAMES = ("audio", "speech", "voice", "waveform", "wav")
_SYNTAX = "tfds:NAME[/CONFIG]:SPLIT[#FEATURE][@HZ]"
# The split may be a slice: train[:10%].
_SPEC = re.compile(r"(?P<name>.+):(?P<split>(?:[^][:@#]|\[[^]]*\])+)(?:#(?P<feature>[^@#]+))?(?:@(?P<rate>\d+))?")
_MOST_CHANNELS = 8
_PROBED, _PROBED_BYTES = 32, 1 << 26  # examples whose loudest sample tells the scale of the split
_FULL_SCALES = (1 << 15, 1 << 23, 1 << 31)
_LOUDEST_FLOAT = 16.0  # as to_pcm16 allows for full scale ±1


class _Wave(NamedTuple):
    """The feature that is the waveform: where it is in an example, and whether it is stored as an encoded file."""

    path: tuple[str, ...]
    feature: Any
    lazy: bool

    def of(self, example: Any) -> Any:
        """[samples] or [samples, channels], or the bytes of a file."""
        for key in self.path:
            example = example[key]
        return example if self.lazy else np.asarray(example)


def open_split(source: str, rest: str) -> Source:
    """The split that `rest`, NAME[/CONFIG]:SPLIT[#FEATURE][@HZ], names.

    Raises `UserError` where it is not prepared on this machine, or has no audio that can be told.
    """
    match = _SPEC.fullmatch(rest)
    if match is None:
        raise UserError(f"data source {source!r}: write {_SYNTAX}, e.g. tfds:spoken_digit:train")
    name, split = match["name"], match["split"]
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # else TensorFlow claims the memory that JAX needs
    builder = _prepared_builder(name)
    try:
        part = builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}") from error
    features = builder.info.features
    wave = _find_wave(features, source, match["feature"])
    rate = 0 if wave.lazy else _find_rate(wave, builder.info.metadata, match["rate"], source)

    def items() -> Iterator[Item]:
        stream = iter(_examples(builder, split, source))
        head, scale = ([], 0) if wave.lazy else _probe(stream, wave)
        for index, example in enumerate(itertools.chain(head, stream)):
            audio = wave.of(example)
            meta = _meta(example, features, wave)
            if wave.lazy:
                read, size = functools.partial(_bytes_to_pcm16, audio), len(audio)
            else:
                read = functools.partial(_array_to_pcm16, audio, rate, scale)
                size = 2 * round(len(audio) * SAMPLE_RATE / rate)
            yield Item(f"{split}/{index:06d}", read, meta, size)

    return Source(source, digest(_identities(part, split, wave, rate, source)), items, part.num_examples)


def _identities(part: Any, split: str, wave: _Wave, rate: int, source: str) -> Iterator[str]:
    import tensorflow_datasets as tfds

    yield from ("tfds", split, "/".join(wave.path), str(rate))
    for path in map(tfds.core.Path, part.filepaths):
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"data source {source!r}: cannot read {path}: {error.strerror}") from error
        yield f"{path} {status.length} {status.mtime}"


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


def _examples(builder: Any, split: str, source: str) -> Iterator[dict[str, Any]]:
    """The examples in the order in which they are stored, audio that was stored as a file as its bytes."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    # TFDS itself would need pydub, ffmpeg or tensorflow_io for these.
    decoders: dict[str, Any] = {}
    for path, feature in _leaves(builder.info.features):
        if _is_lazy(feature):
            inner = functools.reduce(lambda found, key: found.setdefault(key, {}), path[:-1], decoders)
            inner[path[-1]] = tfds.decode.SkipDecoding()
    examples: Iterable[Any]
    try:
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            data = builder.as_data_source(split, decoders=decoders or None)
            examples = (data[k] for k in range(len(data)))
        else:
            order = tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1)
            data = builder.as_dataset(split=split, shuffle_files=False, read_config=order, decoders=decoders or None)
            examples = tfds.as_numpy(data)
        yield from examples
    except (tf.errors.OpError, RuntimeError) as error:  # of TFRecord and of ArrayRecord
        reason = re.sub(r"\{\{.*?\}\} *|\s*\[.*", "", str(error).split("\n")[0])
        raise UserError(f"data source {source!r} cannot be read, prepare it again: {reason}") from error


# ---- finding the waveform, its rate and its scale


def _find_wave(features: Any, source: str, wanted: str | None) -> _Wave:
    """The wanted feature, else the only one of type Audio, else the only tensor of numbers that could be one.

    Of several the one with a usual name is taken, if that is one.
    """
    import tensorflow_datasets as tfds

    found = {"/".join(path): (path, feature) for path, feature in sorted(_leaves(features), key=lambda leaf: leaf[0])}
    audio = [name for name, (_, feature) in found.items() if isinstance(feature, tfds.features.Audio)]
    tensors = [name for name, (_, feature) in found.items() if type(feature) is tfds.features.Tensor]
    waves = audio or [name for name in tensors if _may_be_audio(found[name][1], growing=True)]
    usual = [name for name in waves if found[name][0][-1] in _AUDIO_NAMES]
    if wanted is not None:
        if wanted not in found or not (wanted in audio or _may_be_audio(found[wanted][1], growing=False)):
            raise UserError(f"data source {source!r}: {wanted!r} is not a waveform; try {', '.join(waves) or 'none'}")
        chosen = wanted
    elif len(usual or waves) == 1:
        chosen = (usual or waves)[0]
    else:
        what = f"found {', '.join(waves)}" if waves else f"none of {', '.join(found)} looks like it"
        raise UserError(f"data source {source!r}: which feature is the audio? {what}; write {_SYNTAX}")
    path, feature = found[chosen]
    return _Wave(path, feature, _is_lazy(feature))


def _is_lazy(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Audio) and bool(feature.to_json_content().lazy_decode)


def _leaves(features: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    import tensorflow_datasets as tfds

    for key, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _leaves(feature, (*above, key))
        else:
            yield (*above, key), feature


def _may_be_audio(feature: Any, growing: bool) -> bool:
    """Whether a tensor is [samples] or [samples, channels] of numbers; `growing`: of any number of samples."""
    shape, numbers = feature.shape, (np.int16, np.int32, np.int64, np.float32, np.float64)
    if not isinstance(shape, tuple) or len(shape) not in (1, 2) or feature.np_dtype not in numbers:
        return False
    few = len(shape) == 1 or (shape[1] is not None and shape[1] <= _MOST_CHANNELS)
    return few and (shape[0] is None or not growing)


def _find_rate(wave: _Wave, metadata: Any, stated: str | None, source: str) -> int:
    """Hz; said in the source, by the feature or by the data set, in this order."""
    known = dict(metadata or {})
    rate = int(stated or getattr(wave.feature, "sample_rate", 0) or known.get("sample_rate") or 0)
    if not rate:
        name = source.split(":")[1]
        raise UserError(f"{name} does not state its sample rate; append it: {source}@16000")
    return rate


def _probe(stream: Iterator[dict[str, Any]], wave: _Wave) -> tuple[list[dict[str, Any]], int]:
    """The first examples, which it takes from the stream, and what stands for 1.0 in all."""
    head, waves, size = [], [], 0
    for example in itertools.islice(stream, _PROBED):
        head.append(example)
        waves.append(wave.of(example))
        size += waves[-1].nbytes
        if size > _PROBED_BYTES or waves[-1].dtype == np.int16:  # recordings may be long; 16 bits leave no doubt
            break
    return head, _full_scale(waves)


def _full_scale(waves: list[np.ndarray]) -> int:
    """What stands for 1.0: TFDS stores integers of any depth as int64, or as floats, and does not say which.

    The loudest of a few recordings tells: 24 bits are 48 dB above 16.
    """
    peaks = [_peak(wave) for wave in waves if len(wave)]
    loudest = max((peak for peak in peaks if np.isfinite(peak)), default=0.0)
    if all(np.issubdtype(wave.dtype, np.floating) for wave in waves) and loudest <= _LOUDEST_FLOAT:
        return 1
    return next((scale for scale in _FULL_SCALES if loudest <= scale), _FULL_SCALES[-1])


def _peak(wave: np.ndarray) -> float:
    return max(float(wave.max()), -float(wave.min()))


# ---- examples


def _array_to_pcm16(audio: np.ndarray, rate: int, scale: int) -> np.ndarray:
    """int16 [samples] mono at 16 kHz of a waveform [samples] or [samples, channels] with full scale ±`scale`."""
    samples = audio[:, None] if audio.ndim == 1 else audio
    if np.issubdtype(samples.dtype, np.integer) and samples.size and _peak(samples) > scale:
        raise BadAudio(f"integers beyond {scale.bit_length()} bit")
    blocks = np.array_split(samples, len(samples) // 1_000_000 + 1)
    factor = np.float32(1 / scale)  # a power of two: exact
    return to_pcm16((block.astype(np.float32) * factor for block in blocks if len(block)), rate)


def _bytes_to_pcm16(data: bytes) -> np.ndarray:
    """int16 [samples] mono at 16 kHz of an audio file in memory."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return decode(file.name)


def _meta(example: dict[str, Any], features: Any, wave: _Wave) -> dict[str, Any]:
    """Scalars and flat lists of an example, with class indices as names; JSON types only, and no waveform."""
    import tensorflow_datasets as tfds

    fields = {}
    for key, value in example.items():
        feature = features[key]
        inner = getattr(feature, "feature", None)
        if isinstance(feature, tfds.features.ClassLabel):
            if value >= 0:  # -1 means that nobody knows
                fields[key] = _class_name(feature, value)
        elif isinstance(inner, tfds.features.ClassLabel):
            fields[key] = [_class_name(inner, element) for element in value]
        elif isinstance(feature, tfds.features.Audio) or wave.path == (key,):
            continue
        elif isinstance(feature.shape, tuple) and len(feature.shape) <= 1:
            fields[key] = _plain(value)
    return with_standard_names(fields)


def _class_name(feature: Any, value: Any) -> Any:
    return feature.int2str(int(value)) if feature.num_classes else int(value)


def _plain(value: Any) -> Any:
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

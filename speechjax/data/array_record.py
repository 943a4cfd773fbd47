"""A prepared set as a TensorFlow data set: ArrayRecord files of int16 PCM, for programs that read TFDS.

The audio feature is a `Tensor((None,), int16, encoding="bytes")`: TFDS's own Audio feature stores every sample as a
64 bit integer, nearly three times the size, and cannot take arrays in any other encoding.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.shards import Shards, UnreadableError
from speechjax.errors import UserError

_VERSION = "1.0.0"
_BLOCK_BYTES = 1 << 26


def write_tfds(folder: Path, data_dir: Path, name: str) -> Path:
    """Writes the prepared set in `folder` as TFDS data set `name`, split "train"; returns its folder.

    Features: audio int16 [samples], id, text (the transcript, empty where there is none), and meta: all that is known,
    as JSON.  The sample rate is in the data set's metadata.  Appears whole or not at all; one that is there already is
    replaced.  Raises `UserError` for samples that cannot be read any more.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    place = data_dir / name / _VERSION
    scratch = place.with_name(f"{_VERSION}.incomplete")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shards = Shards(folder)
    identity = DatasetIdentity(
        name=name, version=tfds.core.Version(_VERSION), data_dir=str(scratch), module_name="speechjax.data.array_record"
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=f"{shards.info['source']}, {SAMPLE_RATE} Hz mono",
        features=tfds.features.FeaturesDict(
            {
                "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
                "id": tfds.features.Text(),
                "text": tfds.features.Text(),
                "meta": tfds.features.Text(),
            }
        ),
        metadata=tfds.core.MetadataDict(sample_rate=SAMPLE_RATE),
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=4_096, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # a progress bar that cannot be switched off
        writer.initialize_splits(["train"])
        for examples in _blocks(shards):  # each call writes the whole metadata again
            writer.add_examples({"train": examples})
        writer.close_all()
    shutil.rmtree(place, ignore_errors=True)
    scratch.rename(place)
    return place


def _blocks(shards: Shards) -> Iterator[list[dict[str, Any]]]:
    """The recordings, some 64 MB of samples or a thousand at a time."""
    block: list[dict[str, Any]] = []
    size = 0
    for row, entry in enumerate(shards.entries()):
        audio = np.empty(int(shards.index["length"][row]), np.int16)
        try:
            shards.read_into(row, 0, audio)
        except UnreadableError as error:
            raise UserError(f"cannot read {entry['id']!a}: {error}; repair it with --verify") from error
        name = entry["id"].encode("utf-8", "surrogateescape")  # file names need not be UTF-8
        text = str(entry["meta"].get("text") or "")
        block.append({"audio": audio, "id": name, "text": text, "meta": json.dumps(entry["meta"])})
        size += audio.nbytes
        if size >= _BLOCK_BYTES or len(block) == 1_000:
            yield block
            block, size = [], 0
    if block:
        yield block

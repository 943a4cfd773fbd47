"""From records to batches: tf.data carries batch numbers, one numpy call a host batch reads the audio.

Shapes: R rows of this host, S samples.
"""

import collections
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from speechjax.data.plan import Plan, Rows, Shape, plan_shapes, useful_share
from speechjax.data.records import Records, open_records
from speechjax.errors import UserError

SAMPLE_RATE = 16000
log = logging.getLogger("speechjax")


class Data:
    """The training and held-out batches of one source.

    A batch is {"audio": int16 [R, S], "lengths": int32 [R], "mean", "std": float32 [R]} (of the whole recording,
    full scale 1.0); rows of length 0 are empty.  This host gets its contiguous part of the global rows.
    """

    def __init__(self, records: Records, train: np.ndarray, valid: np.ndarray, shapes: list[Shape], seed: int):
        self.records, self.shapes = records, shapes
        self.sample_rate = SAMPLE_RATE
        self._parts = {"train": train, "valid": valid}
        self._plans = {name: Plan(records.lengths[part], shapes, seed) for name, part in self._parts.items()}

    @property
    def batches_per_epoch(self) -> int:
        return self._plans["train"].batches_per_epoch

    def train_batches(self, start: int, stop: int, host: int = 0, hosts: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """Batches `start` to `stop`; opening at any number costs the same."""
        return _prefetched(lambda k: self._read("train", self._plans["train"].batch(k), host, hosts), start, stop)

    def valid_batches(self, host: int = 0, hosts: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """Every held-out example once."""
        for rows in self._plans["valid"].sweep():
            yield self._read("valid", rows, host, hosts)

    def _read(self, split: str, rows: Rows, host: int, hosts: int) -> dict[str, np.ndarray]:
        return read_rows(self.records, self._parts[split], rows, host, hosts)


def read_rows(records: Records, part: np.ndarray, rows: Rows, host: int = 0, hosts: int = 1) -> dict[str, np.ndarray]:
    """This host's slice of one planned batch; `part` maps the plan's examples to records."""
    share = rows.shape.rows // hosts
    mine = slice(host * share, (host + 1) * share)
    example, start, count = rows.example[mine], rows.start[mine], rows.count[mine]
    audio = np.zeros((share, rows.shape.samples), np.int16)
    for r in np.flatnonzero(example >= 0):
        audio[r, : count[r]] = records.read(int(part[example[r]]), int(start[r]), int(count[r]))
    at = part[np.maximum(example, 0)]
    return dict(audio=audio, lengths=count.astype(np.int32), mean=records.mean[at], std=records.std[at])


def _prefetched(read: Callable[[int], dict[str, np.ndarray]], start: int, stop: int) -> Iterator[dict[str, Any]]:
    # Before the import: TensorFlow prints start-up notices that mean nothing to a user of tf.data.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    names = ("audio", "lengths", "mean", "std")
    types = (tf.int16, tf.int32, tf.float32, tf.float32)

    def fetch(k):
        batch = read(int(k))
        return tuple(batch[name] for name in names)

    numbers = tf.data.Dataset.range(start, stop)
    # One Python call a batch: a call a row would cost four times the CPU.
    batches = numbers.map(
        lambda k: tf.numpy_function(fetch, [k], types, stateful=False), num_parallel_calls=2, deterministic=True
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    options.autotune.enabled = False
    for arrays in batches.prefetch(2).with_options(options).as_numpy_iterator():
        yield dict(zip(names, arrays, strict=True))


def open_data(
    *,
    source: str,
    seed: int,
    row_divisor: int,
    frame_len: tuple[int, int],
    crop_seconds: float,
    batch_seconds: float,
    shapes: int,
    row_multiple: int,
    min_seconds: float,
    valid_seconds: float,
    include: str,
    exclude: str,
    max_bad_share: float,
    cache_dir: str,
) -> Data:
    """Opens `source` (decoding it at first use), holds some out, and plans static batch shapes.

    `batch_seconds` of audio a batch over all hosts, crops of at most `crop_seconds`, `shapes` batch shapes.
    `include` and `exclude` are regexes on recording ids.  `valid_seconds` of audio, at most a tenth, are held
    out, chosen by a hash of the id, so that adding files moves few.  `frame_len` is (samples a frame, samples the
    first frame takes more).  Raises UserError for anything wrong with the source, and where rows do not divide
    over `row_divisor` devices.
    """
    if row_multiple % row_divisor:
        raise UserError(f"config.data.row_multiple={row_multiple} must be a multiple of the {row_divisor} devices")
    records = open_records(
        source, cache_dir=cache_dir or None, min_seconds=min_seconds, max_bad_share=max_bad_share,
        include=include, exclude=exclude,
    )  # fmt: skip
    valid = _held_out(records, valid_seconds)
    train = np.setdiff1d(np.arange(len(records.ids)), valid)
    quantum, offset = frame_len
    planned = plan_shapes(
        records.lengths[train], crop=int(crop_seconds * SAMPLE_RATE), shapes=shapes, quantum=quantum, offset=offset,
        batch_samples=int(batch_seconds * SAMPLE_RATE), row_multiple=row_multiple,
    )  # fmt: skip
    data = Data(records, train, valid, planned, seed)
    useful, kept = useful_share(records.lengths[train], planned)
    log.info(
        "batches: %s; %.1f %% of a batch is audio, %.1f %% of the audio survives cropping; %d batches an epoch, "
        "%d recordings (%.0f s) held out",
        ", ".join(f"{s.rows} x {s.samples / SAMPLE_RATE:.2f} s" for s in planned), 100 * useful, 100 * kept,
        data.batches_per_epoch, len(valid), records.lengths[valid].sum() / SAMPLE_RATE,
    )  # fmt: skip
    return data


def _held_out(records: Records, seconds: float) -> np.ndarray:
    """Indices of the held-out examples: whole recordings in the order of a hash, as many as fit, at least one."""
    segments: dict[str, list[int]] = collections.defaultdict(list)
    for i, name in enumerate(records.ids):
        segments[re.sub(r"#\d{4,}$", "", name)].append(i)
    if len(segments) < 2:
        raise UserError("only one usable recording; at least two are needed, one of them to hold out")
    size = {name: int(records.lengths[own].sum()) for name, own in segments.items()}
    room = min(seconds * SAMPLE_RATE, sum(size.values()) / 10)
    chosen: list[int] = []
    for name in sorted(segments, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if size[name] <= room:
            chosen += segments[name]
            room -= size[name]
    return np.sort(np.array(chosen or segments[min(size, key=lambda name: (size[name], name))]))

"""From records to batches: tf.data carries batch numbers, one numpy call a host batch reads the audio.

Shapes: R rows of this host, S samples, G segments of a row, U tokens.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.data.buffers import Buffers
from speechjax.data.decode import SAMPLE_RATE
from speechjax.data.fill import FillPlan
from speechjax.data.labels import Labels, UnitLabels, read_labels, read_units
from speechjax.data.mixture import rates
from speechjax.data.plan import Batch, Plan, Rows, Shape, Spec, plan_shapes
from speechjax.data.records import Records, open_records
from speechjax.data.shards import DamagedError, UnreadableError
from speechjax.data.sources import digest
from speechjax.data.split import held_out, some
from speechjax.data.transcripts import Transcripts, read_transcripts
from speechjax.errors import UserError

log = logging.getLogger("speechjax")

_PATIENCE = 100  # unreadable examples before their share is judged
_MEMORY = 4096  # examples over which it is judged


class Data:
    """The training and held-out batches of a source.

    A batch is {"audio": int16 [R, S], "lengths": int32 [R], "mean", "std": float32 [R]} (of the whole recording,
    full scale 1.0); rows of length 0 are empty.  In filled rows the last three are [R, G], one a segment, and
    "starts" int32 [R, G] says at which sample each begins.  "unread" int32 [R] counts the examples of a row that could
    not be read; they are empty.  With a tokenizer there are also "tokens" int32 [R, U] and "token_lengths" int32 [R], 0
    where there is no transcript; with `units` "units" int32 [R, N], one a `unit_hop` samples of the row from its first
    on, -1 where there is none; with `labels` "label" or "label_NAME", a class int32 [R], -1 for none, tags float32
    [R, V], -1 for unknown, or a number float32 [R], NaN for none.  This host gets its contiguous part of the global
    rows.
    """

    def __init__(
        self, records: Records, train: np.ndarray, valid: np.ndarray, train_plan: Plan | FillPlan, valid_plan: Plan,
        transcripts: Transcripts | None = None, max_bad_share: float = 0.0,
        units: UnitLabels | None = None, labels: Labels | None = None,
    ):  # fmt: skip
        self.records, self.transcripts = records, transcripts
        self.units, self.labels = units, labels
        self.unit_hop, self.unit_codes = (units.hop, units.codes) if units else (0, 0)
        self.label_names = labels.names.get("label", []) if labels else []
        self.sample_rate = SAMPLE_RATE
        self.max_bad_share = max_bad_share
        self._warned = 0
        self._recent = np.zeros(2)  # examples read and not read of late
        self._counting = threading.Lock()
        self._buffers = Buffers()
        self._parts = {"train": train, "valid": valid}
        self._plans: dict[str, Any] = {"train": train_plan, "valid": valid_plan}

    @property
    def specs(self) -> list[Spec]:
        """{name: (shape, dtype)} of the global training batches, one a static shape."""
        return [self.spec(shape) for shape in self._plans["train"].shapes]

    def spec(self, shape: Shape) -> Spec:
        """{name: (shape, dtype)} of a global batch of one plan shape."""
        more = [part.spec(shape) for part in (self.transcripts, self.units, self.labels) if part]
        return batch_spec(shape) | {name: spec for part in more for name, spec in part.items()}

    @property
    def batches_per_epoch(self) -> int:
        return self._plans["train"].batches_per_epoch

    def train_batches(self, start: int, stop: int, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        """Batches `start` to `stop`; opening at any number costs the same.

        Raises UserError once more than `max_bad_share` of the examples could not be read.
        """
        if self._parts["train"] is self._parts["valid"]:
            raise UserError("nothing is left to train on: config.data.valid holds everything out")
        plan = self._plans["train"]
        read = lambda k: self._read("train", plan.batch(k), host, hosts)  # noqa: E731
        return _prefetched(read, self.specs[0], start, stop)

    def valid_batches(self, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        """Every held-out example once."""
        for rows in self._plans["valid"].sweep():
            yield self._read("valid", rows, host, hosts)

    def valid_examples(self) -> Iterator[np.ndarray]:
        """Which example of the records is in every global row of `valid_batches`: int [rows], -1 for an empty one."""
        for rows in self._plans["valid"].sweep():
            example = rows.example[:, 0]
            yield np.where(example >= 0, self._parts["valid"][np.maximum(example, 0)], -1)

    @property
    def digest(self) -> str:
        """Equal where the same examples, with the same units and labels, come in the same order."""
        labels = [part.digest for part in (self.units, self.labels) if part]
        return digest([self.records.digest, *labels]) if labels else self.records.digest

    def save(self, workdir: Path) -> None:
        """What numbers in the batches mean: the vocabularies of transcripts, phones and classes, into `workdir`."""
        for part in (self.transcripts and self.transcripts.tokenizer, self.units, self.labels):
            if part:
                part.save(workdir)

    def _read(self, split: str, rows: Rows, host: int, hosts: int) -> Batch:
        part = self._parts[split]
        batch = read_rows(self.records, part, rows, host, hosts, self._lost, self._buffers)
        with self._counting:
            self._recent[0] += np.count_nonzero(batch["lengths"])
            if self._recent.sum() > _MEMORY:  # else a disk that fails after years would not count against them
                self._recent /= 2
        mine = host_share(rows, host, hosts)
        lengths = batch["lengths"].reshape(mine.count.shape)  # 0 where it could not be read
        if self.transcripts:
            batch |= self.transcripts.batch(self.records, part, mine)
        if self.units:
            batch |= self.units.batch(self.records, part, mine, lengths)
        if self.labels:
            batch |= self.labels.batch(part, mine, lengths)
        return batch

    def _lost(self, i: int, error: Exception) -> None:
        with self._counting:
            self._warned += 1
            self._recent[1] += 1
            unread, total = self._recent[1], self._recent.sum()
        many = unread > _PATIENCE and unread > self.max_bad_share * total
        if not many and self._warned > 3:
            return
        try:
            name = self.records.id(i)
        except (OSError, DamagedError):  # it lies on the same disk
            name = f"example {i}"
        if many:
            raise UserError(
                f"{100 * unread / total:.3g} % of the last {total:,.0f} examples could not be read, the last one "
                f"{name!r} ({error}); is the disk of the data all right? Given again, the command resumes"
            )
        log.warning("cannot read %s (%s): an empty row takes its place", name, error)


def batch_spec(shape: Shape) -> Spec:
    """{name: (shape, dtype)} of what every batch has."""
    rows = (shape.rows,) if shape.segments == 1 else (shape.rows, shape.segments)
    spec: Spec = {"audio": ((shape.rows, shape.samples), np.int16), "lengths": (rows, np.int32)}
    spec |= {"mean": (rows, np.float32), "std": (rows, np.float32), "unread": ((shape.rows,), np.int32)}
    return spec if shape.segments == 1 else spec | {"starts": (rows, np.int32)}


def host_share(rows: Rows, host: int, hosts: int) -> Rows:
    """This host's rows of a batch."""
    share = rows.shape.rows // hosts
    mine = slice(host * share, (host + 1) * share)
    return Rows(rows.shape, *(x[mine] for x in rows[1:]))


def read_rows(
    records: Records, part: np.ndarray, rows: Rows, host: int = 0, hosts: int = 1,
    lost: Callable[[int, Exception], None] | None = None, buffers: Buffers | None = None,
) -> Batch:  # fmt: skip
    """This host's slice of one planned batch; `part` maps the plan's examples to records.

    An example that cannot be read becomes an empty segment and is reported to `lost`, or raises without one.  The
    audio lies in memory of `buffers`, if given.
    """
    shape, example, start, count, at = host_share(rows, host, hosts)
    audio = (buffers or Buffers()).empty((len(example), shape.samples), np.int16)
    lengths = count.astype(np.int32)
    unread = np.zeros(len(example), np.int32)
    for r, segments in enumerate(np.stack([example, start, count, at], axis=-1).tolist()):
        end = 0
        for g, (k, begin, size, first) in enumerate(segments):
            if k < 0:
                break
            audio[r, end:first] = 0
            end = first + size
            i, out = int(part[k]), audio[r, first:end]
            try:
                records.read_into(i, begin, out)
            except UnreadableError as error:
                if lost is None:
                    raise
                lost(i, error)
                out[:] = 0
                lengths[r, g] = 0
                unread[r] += 1
        audio[r, end:] = 0
    which = part[np.maximum(example, 0)]
    batch = dict(audio=audio, lengths=lengths, mean=records.mean[which], std=records.std[which])
    if shape.segments > 1:
        return batch | {"starts": at.astype(np.int32), "unread": unread}
    flat = {name: array if name == "audio" else array[:, 0] for name, array in batch.items()}
    return flat | {"unread": unread}


def _prefetched(read: Callable[[int], Batch], spec: Spec, start: int, stop: int) -> Iterator[Batch]:
    # Before the import: TensorFlow prints start-up notices that mean nothing to a user of tf.data.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    names, types = list(spec), tuple(tf.as_dtype(np.dtype(dtype)) for _, dtype in spec.values())
    failure: list[UserError] = []

    def fetch(k):
        try:
            batch = read(int(k))
        except UserError as error:  # TensorFlow would make a paragraph of it
            failure.append(error)
            raise
        return tuple(batch[name] for name in names)

    numbers = tf.data.Dataset.range(start, stop)
    # One Python call a batch: a call a row would cost four times the CPU.
    batches = numbers.map(
        lambda k: tf.numpy_function(fetch, [k], types, stateful=False), num_parallel_calls=2, deterministic=True
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    options.autotune.enabled = False
    return _delivered(batches.prefetch(2).with_options(options), names, failure)


def _delivered(batches: Any, names: list[str], failure: list[UserError]) -> Iterator[Batch]:
    try:
        for arrays in batches.as_numpy_iterator():
            yield dict(zip(names, arrays, strict=True))
    except Exception:
        if failure:
            raise failure[0] from None
        raise


def open_data(
    *,
    source: str,
    seed: int,
    row_divisor: int,
    frame_len: tuple[int, int],
    segment_align: int,
    workdir: Path | None,
    temperature: float,
    crop_seconds: float,
    batch_seconds: float,
    shapes: int,
    fill: bool,
    row_multiple: int,
    min_seconds: float,
    valid_seconds: float,
    include: str,
    exclude: str,
    text: str,
    text_steps: str,
    max_bad_share: float,
    cache_dir: str,
    units: str = "",
    label: str = "",
    valid: str = "",
    train_seconds: float = 0.0,
    text_field: str = "text",
) -> Data:
    """Opens `source` (preparing it at first use), holds some out, and plans static batch shapes.

    `source` may be a mixture (speechjax.data.mixture), whose parts `temperature` evens out.  `batch_seconds` of audio a
    batch over all hosts, in rows of at most `crop_seconds`.  Either every example has a row, cut to that length, in one
    of `shapes` batch shapes, or, with `fill`, rows are filled with segments of several examples, at least 2 s each,
    in one shape; `segment_align` is what the model asks of their starts, 0 if it cannot tell segments apart.
    `include` and `exclude` are regexes on recording ids.  `valid_seconds` of audio, at most a tenth, are held out,
    chosen by a hash of the id, so that adding files moves few; or `valid` is a regex on the ids of what is held out
    (".": everything, to evaluate only) or @FILE with an id a line.  `train_seconds` of the rest are trained on, 0 for
    all.  `text` names a tokenizer (speechjax.data.text; empty: no transcripts), `text_steps` its normalisation, and
    `text_field` where in the metadata texts are.  `units` and `label` add targets (speechjax.data.labels): "phones",
    "labels:DIR", "speech" or "turns:SPEAKERS" for every frame, "meta:FIELD", "id:REGEX", "tags:FIELD", "number:FIELD",
    perhaps several, for an utterance.  Vocabularies in `workdir` are used as they are.  `frame_len` is (samples a
    frame, samples the first frame takes more).  Raises UserError for anything wrong with the source, and where rows do
    not divide over `row_divisor` devices.
    """
    if row_multiple < 1 or row_multiple % row_divisor:
        raise UserError(f"config.data.row_multiple={row_multiple} must be a multiple of the {row_divisor} devices")
    for name, value in dict(crop_seconds=crop_seconds, batch_seconds=batch_seconds, shapes=shapes).items():
        if not value > 0:
            raise UserError(f"config.data.{name}={value}: must be above 0")
    for name, value in dict(valid_seconds=valid_seconds, max_bad_share=max_bad_share).items():
        if not value >= 0:
            raise UserError(f"config.data.{name}={value}: must not be below 0")
    records = open_records(
        source, cache_dir=cache_dir or None, min_seconds=min_seconds, max_bad_share=max_bad_share,
        include=include, exclude=exclude, segment_seconds=max(30.0, crop_seconds),
    )  # fmt: skip
    kept = held_out(records, valid_seconds, valid)
    train = some(records, np.delete(np.arange(len(records)), kept), train_seconds)
    train = train if len(train) else kept  # the shapes of batches are made for something; see `train_batches`
    lengths, part = records.lengths[train], records.part[train]
    heard = _rates(records, lengths, part, temperature)
    hop, extra = frame_len
    crop, batch = int(crop_seconds * SAMPLE_RATE), int(batch_seconds * SAMPLE_RATE)
    planned = plan_shapes(
        lengths, crop=crop, shapes=shapes, quantum=hop, offset=extra, batch_samples=batch, row_multiple=row_multiple,
        weights=heard[part],
    )  # fmt: skip
    if fill and not segment_align:
        log.info("config.data.fill: the front end's norm runs over time and would mix segments; rows are crops instead")
    train_plan: Plan | FillPlan
    if fill and segment_align:
        if text or label:
            needed = "text needs whole utterances" if text else "label needs rows of one utterance"
            raise UserError(f"config.data.{needed}: set config.data.fill=False")
        rows = max(1, round(batch / crop / row_multiple)) * row_multiple
        train_plan = FillPlan(
            lengths, seed, rows=rows, samples=crop, align=segment_align, hop=hop, extra=extra,
            min_segment=2 * SAMPLE_RATE, source=part, rates=heard.tolist(),
        )  # fmt: skip
    else:
        train_plan = Plan(lengths, planned, seed, part, heard.tolist())
    judged = planned
    if text and len(kept) and min(crop, records.lengths[kept].max()) > planned[-1].samples:
        # A longer utterance than all of training is still heard whole: otherwise its last words count as not said.
        longest = plan_shapes(
            records.lengths[kept], crop=crop, shapes=1, quantum=hop, offset=extra, batch_samples=batch,
            row_multiple=row_multiple,
        )  # fmt: skip
        judged = [*planned, *longest]
    transcripts = read_transcripts(records, judged, text, text_steps, workdir, text_field) if text else None
    data = Data(
        records, train, kept, train_plan, Plan(records.lengths[kept], judged, seed), transcripts, max_bad_share,
        read_units(records, units, workdir) if units else None,
        read_labels(records, label, workdir) if label else None,
    )  # fmt: skip
    useful, survives = train_plan.useful_share()
    log.info(
        "batches: %s; %.1f %% of a batch is audio, %.1f %% of the audio survives cropping; %d batches an epoch, "
        "%d recordings (%.0f s) held out",
        ", ".join(_named(shape) for shape in train_plan.shapes), 100 * useful, 100 * survives,
        data.batches_per_epoch, len(kept), records.lengths[kept].sum() / SAMPLE_RATE,
    )  # fmt: skip
    return data


def _named(shape: Shape) -> str:
    segments = f" of up to {shape.segments} segments" if shape.segments > 1 else ""
    return f"{shape.rows} x {shape.samples / SAMPLE_RATE:.2f} s{segments}"


def _rates(records: Records, lengths: np.ndarray, part: np.ndarray, temperature: float) -> np.ndarray:
    """How often in an epoch each example of a part is heard, [parts]; says so where there are several."""
    weights = [opened.part.weight for opened in records.parts]
    hours = np.bincount(part, lengths, minlength=len(weights)) / SAMPLE_RATE / 3600
    there = np.flatnonzero(hours)  # everything of a small part may be held out
    heard = np.ones(len(weights))
    heard[there] = rates(hours[there].tolist(), [weights[s] for s in there], temperature)
    if len(weights) > 1:
        share = heard * hours / (heard * hours).sum()
        for s, opened in enumerate(records.parts):
            log.info(
                "mixture: %4.1f %% %s (%.2f h, each %.3g times an epoch)", 100 * share[s], opened.part.source, hours[s],
                heard[s],
            )  # fmt: skip
    return heard

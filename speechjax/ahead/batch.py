"""The batches of a config without its data: their shapes and types, as the pipeline will make them.

Shapes: R rows over all hosts, S samples, G segments of a row, U tokens, N units, V classes.
"""

from typing import Any

import numpy as np

from speechjax.data.label_spec import NUMBER, TAGS, parse_labels
from speechjax.data.pipeline import batch_spec
from speechjax.data.plan import Shape, Spec
from speechjax.errors import UserError
from speechjax.step import SAMPLE_RATE

TOKENS_PER_SECOND = 20  # about the fastest reading, in characters
LEAST_SEGMENT = 2.0  # seconds that remain of an example that `fill` cuts


def longest_shape(config: Any, task: Any) -> Shape:
    """The shape of the longest batches that the data block asks for, whatever the recordings are.

    Where they are shorter than `crop_seconds`, so will batches be.  The others of `shapes` hold about as many samples
    in shorter rows.  Of filled rows the pipeline counts how many segments they have; here it is how many there can be.
    """
    data = config.data
    crop, batch = int(data.crop_seconds * SAMPLE_RATE), int(data.batch_seconds * SAMPLE_RATE)
    for name in ("crop_seconds", "batch_seconds"):
        if not data[name] > 0:
            raise UserError(f"config.data.{name}={data[name]}: must be above 0")
    hop, extra = task.encoder.frame_len()
    samples, segments = max(1, -(-(crop - extra) // hop)) * hop + extra, 1
    if data.fill and task.encoder.packs():
        samples, segments = crop, int(data.crop_seconds / min(LEAST_SEGMENT, max(data.min_seconds, 0.1))) + 1
    multiple = data.row_multiple
    return Shape(max(1, round(batch / samples / multiple)) * multiple, samples, segments)


def task_spec(config: Any, task: Any, shape: Shape) -> Spec:
    """{name: (shape, dtype)} of a batch of this shape with all that the task learns from.

    Raises UserError where only the data could say how many classes there are, or what kind of label one is.
    """
    spec = batch_spec(shape)
    sizes = task.sizes()
    for name, classes in sizes.values():
        if not classes:
            raise UserError(f"{name}=0 leaves the number of classes to the data, which is not opened: set --{name}=N")
    for key in task.needs:
        if key == "units":
            spec[key] = ((shape.rows, shape.samples // task.unit_hop), np.int32)
        elif key == "tokens":
            most = max(8, -(-shape.samples * TOKENS_PER_SECOND // SAMPLE_RATE // 8) * 8)
            spec |= {"tokens": ((shape.rows, most), np.int32), "token_lengths": ((shape.rows,), np.int32)}
        else:
            spec[key] = _label_spec(config, key, shape.rows, sizes)
    return spec


def _label_spec(config: Any, key: str, rows: int, sizes: Any) -> tuple[tuple[int, ...], type]:
    kinds = {label.key: label.kind for label in parse_labels(config.data.label)} if config.data.label else {}
    if key not in kinds:
        name = key.removeprefix("label").removeprefix("_")
        raise UserError(
            f"this task learns from {key!r}: set --config.data.label={name}{'=' * bool(name)}meta:FIELD, id:REGEX, "
            "tags:FIELD or number:FIELD"
        )
    if kinds[key] == TAGS:
        return (rows, sizes[key][1]), np.float32
    return (rows,), np.float32 if kinds[key] == NUMBER else np.int32

"""What a task answers to every held-out example.  Shapes: R global rows."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from speechjax import sharding
from speechjax.train import Job


def answers(job: Job, compute: Callable[[Any, Any], Any]) -> Iterator[tuple[np.ndarray, Any]]:
    """(numbers of examples in the records int [n], what `compute(batch)` has for them) of every held-out batch.

    `compute` takes a global batch to arrays [R, ...], replicated; those of empty rows are left out.
    """
    batches = job.data.valid_batches(jax.process_index(), jax.process_count())
    for example, batch in zip(job.data.valid_examples(), batches, strict=True):
        found = jax.device_get(compute(sharding.global_batch(job.mesh, batch)))
        there = np.flatnonzero(example >= 0)
        yield example[there], jax.tree.map(lambda x, there=there: np.asarray(x)[there], found)

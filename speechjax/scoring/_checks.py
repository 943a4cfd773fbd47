"""What every metric asks of its input: columns of one length, of finite numbers, and not empty."""

from typing import Any

import numpy as np

from speechjax.errors import UserError


def columns(**named: Any) -> tuple[np.ndarray, ...]:
    """The arguments as arrays with one row an example.

    Raises ValueError where their lengths differ, UserError without rows and for NaN or infinity, with their names.
    """
    arrays = {name: np.asarray(value) for name, value in named.items()}
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError(f"lengths differ: {', '.join(f'{name} {len(array)}' for name, array in arrays.items())}")
    for name, array in arrays.items():
        if not len(array):
            raise UserError(f"nothing to score: no {name}; is the test set empty?")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
            raise UserError(f"{name} contain NaN or infinity (first in row {bad}): has the model diverged?")
    return tuple(arrays.values())

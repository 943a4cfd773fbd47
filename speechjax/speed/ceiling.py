"""What a device can multiply: measured, and as its vendor says."""

import math
import time
from typing import Any

import jax

# Dense bfloat16 operations a second of one device, by parts of its name, the first that fits; vendors' data sheets.
PUBLISHED = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("TPU v6 lite", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)
LARGE, LARGE_ON_CPUS = 8192, 1024  # rows and columns
_LINKS = 4  # pairs of products a call: enough work to hide what a call costs


def published(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device of this kind, None where it is not in the table."""
    return next((peak for name, peak in PUBLISHED if name.casefold() in kind.casefold()), None)


def measured(frames: int, width: int, mlp: int, dtype: str, repeats: int = 5) -> dict[str, Any]:
    """FLOP/s of one device in matrix products of the model's size and in large square ones, best of `repeats` calls.

    The model's are [frames, width] x [width, mlp] and back again, as its feed-forward layers do; "flops_per_second" is
    the larger number.  Random data, because processors clock higher on zeros.
    """
    large = LARGE if jax.default_backend() != "cpu" else LARGE_ON_CPUS
    found = {
        "model": _products(frames, width, mlp, dtype, repeats),
        "large": _products(large, large, large, dtype, repeats),
    }
    shapes = {"model": [frames, width, mlp], "large": [large] * 3}
    return found | {"flops_per_second": max(found.values()), "shapes": shapes, "dtype": dtype}


def _products(rows: int, inner: int, outer: int, dtype: str, repeats: int) -> float:
    """FLOP/s of [rows, inner] x [inner, outer] x [outer, inner], several times over."""

    def draw(key, *shape):
        return (jax.random.normal(key, shape) / math.sqrt(shape[0])).astype(dtype)

    @jax.jit
    def chain(x, up, down):
        for _ in range(_LINKS):
            x = (x @ up) @ down
        return x

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, inner)).astype(dtype)
    up, down = draw(keys[1], inner, outer), draw(keys[2], outer, inner)
    jax.block_until_ready(chain(x, up, down))
    work = _LINKS * 4 * rows * inner * outer
    # Accelerators are done with one before the host has asked for the next.
    calls = 1 if jax.default_backend() == "cpu" else max(1, int(5e13 / work))
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            out = chain(x, up, down)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - began) / calls)
    return work / best

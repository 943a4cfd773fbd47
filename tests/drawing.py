"""Parameters for tests, without compiling an initialisation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def draw_params(shapes: Any) -> Any:
    """Arrays for a tree of shapes: around zero, scales and gains around one."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        centre = 1.0 if path[-1].key in ("scale", "gain") else 0.0
        width = 1 / np.sqrt(np.prod(shape.shape[:-1]) + 1)
        return jnp.asarray(centre + width * rng.normal(size=shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)

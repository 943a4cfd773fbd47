"""A tiny speech encoder at 20 samples a frame, and parameters for anything without compiling its `init`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.models.encoder import SpeechEncoder


@pytest.fixture(scope="session")
def tiny_encoder() -> Callable[..., SpeechEncoder]:
    """Encoder of two layers; keyword arguments replace settings, `frontend` only those it names."""

    def make(frontend: dict[str, Any] | None = None, **settings: Any) -> SpeechEncoder:
        front: dict[str, Any] = dict(
            name="waveform", channels=(32, 32, 32), kernels=(10, 3, 2), strides=(5, 2, 2), norm="group"
        )
        tiny: dict[str, Any] = dict(
            width=64, layers=2, heads=4, mlp=96, norm="post", positions=dict(kernel=6, groups=4), dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, scan=False,
            remat=False, dtype="float32",
        )  # fmt: skip
        return SpeechEncoder(frontend=front | (frontend or {}), **(tiny | settings))

    return make


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """Parameters of `module` for these inputs, drawn around zero, scales around one."""

    def draw(module: Any, *args: Any, **kwargs: Any) -> Any:
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
        rng = np.random.default_rng(0)

        def leaf(path, shape):
            centre = 1.0 if path[-1].key in ("scale", "gain") else 0.0
            width = 1 / np.sqrt(np.prod(shape.shape[:-1]) + 1)
            return jnp.asarray(centre + width * rng.normal(size=shape.shape), shape.dtype)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw

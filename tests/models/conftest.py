"""A tiny speech encoder at 20 samples a frame, and parameters for anything without compiling its `init`."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from speechjax.models.encoder import SpeechEncoder
from tests.drawing import draw_params


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
        return draw_params(shapes)

    return draw

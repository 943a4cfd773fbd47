"""A tiny speech encoder: 20 samples a frame, so a second of it would be 16 of a real one."""

from collections.abc import Callable
from typing import Any

import pytest

from speechjax.models.encoder import SpeechEncoder

Factory = Callable[..., SpeechEncoder]


@pytest.fixture(scope="session")
def tiny_encoder() -> Factory:
    """Encoder of two layers; keyword arguments replace settings, `frontend` only those it names."""

    def make(frontend: dict[str, Any] | None = None, **settings: Any) -> SpeechEncoder:
        front = dict(name="waveform", channels=(32, 32, 32), kernels=(10, 3, 2), strides=(5, 2, 2), norm="group")
        tiny = dict(
            width=64, layers=2, heads=4, mlp=96, norm="post", positions=dict(kernel=6, groups=4), dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, scan=False,
            remat=False, dtype="float32",
        )  # fmt: skip
        return SpeechEncoder(frontend=front | (frontend or {}), **(tiny | settings))

    return make

"""A tiny wav2vec 2.0 at 20 samples a frame."""

from collections.abc import Callable
from typing import Any

import pytest

from speechjax.models.encoder import SpeechEncoder
from speechjax.tasks.wav2vec2 import Wav2Vec2

BASE: dict[str, Any] = dict(
    frontend=dict(name="waveform", channels=(32, 32, 32), kernels=(10, 3, 2), strides=(5, 2, 2), norm="group"),
    width=64, layers=1, heads=4, mlp=96, norm="post", positions=dict(kernel=6, groups=4), dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, scan=False, remat=False,
    dtype="float32",
)  # fmt: skip
LARGE: dict[str, Any] = dict(
    frontend=BASE["frontend"] | dict(norm="layer", bias=True, normalize=True), norm="pre", layers=2, scan=True,
    remat=True,
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_wav2vec2() -> Callable[..., Wav2Vec2]:
    """Task over the "base" or "large" kind of encoder; `encoder` and the keyword arguments replace settings."""

    def make(kind: str = "base", encoder: dict[str, Any] | None = None, **settings: Any) -> Wav2Vec2:
        tiny: dict[str, Any] = dict(
            mask_prob=0.65, mask_span=4, negatives=6, logit_temperature=0.1, codebooks=2, codes=5, code_dim=16,
            projection=12, gumbel_start=2.0, gumbel_floor=0.5, gumbel_decay=0.999995, diversity=0.1,
            feature_penalty=10.0, feature_grad_scale=1.0, feature_dropout=0.0,
        )  # fmt: skip
        options = BASE | (LARGE if kind == "large" else {}) | (encoder or {})
        return Wav2Vec2(encoder=SpeechEncoder(**options), **(tiny | settings))

    return make

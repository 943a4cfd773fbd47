"""Recordings in which every character has a loudness, a task that hears it, and tiny runs of a real one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile

from speechjax import config as configs
from speechjax import sharding
from speechjax.checkpoint import Checkpoints
from speechjax.data.pipeline import batch_spec
from speechjax.data.plan import Shape
from speechjax.data.text import make_tokenizer
from speechjax.recognition import Decoding
from speechjax.step import batch_shapes, init_state
from speechjax.transcription import Transcriber

REPO = Path(__file__).resolve().parent.parent
HOP, EXTRA, RATE = 160, 80, 16_000
LETTERS = "abcdefgh"
TOKENIZER = make_tokenizer("characters", ["ab cdefgh"])
SPACE = TOKENIZER.encode("a a")[1]
LOUDNESS = np.float32([0, -9, -9, -9, *range(1, TOKENIZER.size - 3)])  # of every token, in thousands


class CTC:
    """A task whose encoder hears the loudness of the `reach` frames around each: loudness 1000 n says token n + 3."""

    def __init__(self, reach: int):
        self.reach = reach
        self.encoder: Any = SimpleNamespace(tokens=lambda: 1, frame_len=lambda: (HOP, EXTRA), attention={})

    def apply(self, variables, batch, method):
        assert method == "answer"
        audio, lengths = batch["audio"].astype(jnp.float32), jnp.maximum((batch["lengths"] - EXTRA) // HOP, 0)
        T = (audio.shape[1] - EXTRA) // HOP
        level = audio[:, : T * HOP].reshape(len(audio), T, HOP).mean(axis=2)
        level = jnp.where(jnp.arange(T)[None] < lengths[:, None], level, 0) / 1000
        span = 2 * self.reach + 1
        level = (
            sum(jnp.roll(jnp.pad(level, ((0, 0), (span, span))), k - self.reach, axis=1) for k in range(span)) / span
        )
        says = jnp.asarray([0.0, -9.0, -9.0, -9.0, *range(1, TOKENIZER.size - 3)])
        return {
            "logits": -8 * (level[:, span:-span, None] - says[None, None]) ** 2 * variables["sure"],
            "lengths": lengths,
        }


def make_model(reach: int = 0, decoding: Decoding | None = None, **options: Any) -> Transcriber:
    given: dict[str, Any] = dict(seconds=2.0, overlap=0.4, rows=4) | options
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    return Transcriber(CTC(reach), {"sure": jnp.ones(())}, TOKENIZER, decoding or Decoding(), mesh, **given)


def sound(text: str, frames: int = 4, gap: int = 2) -> np.ndarray:
    """int16: every character `frames` frames of its loudness, and as much as `gap` of silence."""
    said = [np.repeat([i - 3, 0], [frames, gap]) for i in TOKENIZER.encode(text)]
    return np.repeat(np.concatenate([*said, [0]]) * 1000, HOP).astype(np.int16)


def write(path: Path, audio: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, audio, rate, subtype="PCM_16")
    return path


def text_of(words: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return " ".join("".join(rng.choice(list(LETTERS), rng.integers(1, 7))) for _ in range(words))


def transcripts(model: Transcriber, *paths: Path) -> list[Any]:
    return [result for _, result in model(paths, lambda _: None)]


def tiny_config(**model: Any) -> Any:
    config = configs.load(str(REPO / "configs/finetune/ctc.py:size=tiny,smoke"))
    with config.unlocked():
        config.task.classes = TOKENIZER.size
        config.model.update(model)
    return config


def make_state(config: Any, seed: int = 0) -> Any:
    task, mesh = configs.make_task(config), sharding.make_mesh(data=-1, fsdp=1)
    spec = batch_spec(Shape(4, 16_000)) | {"tokens": ((4, 5), np.int32), "token_lengths": ((4,), np.int32)}
    return jax.jit(lambda: init_state(task, optax.identity(), seed, batch_shapes(spec, mesh)))()


def write_run(folder: Path, config: Any, state: Any) -> Path:
    configs.claim_workdir(folder, config)
    TOKENIZER.save(folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, every=1)
    checkpoints.save(3, state, {"model": configs.to_json(config)["model"]}, force=True)
    checkpoints.close()
    return folder

"""What is measured: a config as it suits this machine, and a batch of noise with all that its task learns from.

Shapes: B batch, S samples, N units, U tokens, V classes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from speechjax import config as configs
from speechjax import flops
from speechjax.errors import UserError
from speechjax.step import SAMPLE_RATE

Batch = dict[str, np.ndarray]

# What objectives here have beside those of transformers: without it both stacks compute one function.
ONLY_OURS = {
    "model.layerdrop": 0.0,
    "task.feature_penalty": 0.0,
    "task.feature_grad_scale": 1.0,
    "task.mix_prob": 0.0,
    "task.noise_prob": 0.0,
}


def open_config(spec: str, overrides: Sequence[str], dtype: str, *, comparable: bool) -> tuple[Any, list[str]]:
    """(config, what is not as its file says: "key=value") of `FILE.py[:arg,...]` or config.json.

    `dtype` "" is float32 on CPUs, which are slow at all others, and elsewhere what the file says; on CPUs layers are
    not scanned and nothing is computed twice.  `comparable` takes away what `ONLY_OURS` lists.  Overrides come last.
    Raises UserError as `config.load` does.

    Not `config.load`: it checks the data and logs blocks too, and so imports libraries that read audio and write logs,
    which a machine that only computes may lack.
    """
    config: Any
    if spec.endswith(".json"):
        config = configs.load(spec)
    else:
        config = configs.open_module(spec).get_config(spec.partition(":")[2])
    for text in overrides:
        if text.startswith("init_from="):  # says what the model is
            configs.override(config, text)
    if "preset" in config.model:
        configs.complete_model(config)
    config.lock()
    on_cpu = jax.default_backend() == "cpu"
    changes: dict[str, Any] = {}
    if dtype or on_cpu:
        changes["model.dtype"] = dtype or "float32"
    if on_cpu:
        changes |= {"model.scan": False, "model.remat": False}
    if comparable:
        changes |= {key: value for key, value in ONLY_OURS.items() if key.split(".")[1] in config[key.split(".")[0]]}
    texts = [
        f"{key}={value}" for key, value in changes.items() if config[key.split(".")[0]][key.split(".")[1]] != value
    ]
    texts += [text for text in overrides if not text.startswith("init_from=")]
    for text in texts:
        configs.override(config, text)
    for name, classes in configs.make_task(config).sizes().values():
        if not classes:  # left to the data
            configs.override(config, f"{name.removeprefix('config.')}=32")
    return config, texts


def shape_of(task: Any, batch_seconds: float, crop_seconds: float, parts: int) -> tuple[int, int]:
    """(rows, samples a row) of a batch: crops are a whole number of frames, rows a multiple of `parts`.

    Raises UserError where a crop has no frame.
    """
    hop, extra = task.encoder.frame_len()
    frames = (int(crop_seconds * SAMPLE_RATE) - extra) // hop
    if frames < 1:
        raise UserError(f"--crop-seconds={crop_seconds}: shorter than one frame of this model")
    rows = max(1, round(batch_seconds / crop_seconds / parts)) * parts
    return rows, frames * hop + extra


def make_batch(task: Any, rows: int, samples: int, shortest: float = 1.0, seed: int = 0) -> Batch:
    """A batch as the pipeline makes it; the last row has `shortest` of the samples, those between in even steps.

    The audio is noise with a falling spectrum that swells and ebbs four times a second, at the level of speech.
    """
    rng = np.random.default_rng(seed)
    lengths = np.linspace(samples, shortest * samples, rows).astype(np.int32)
    time = np.arange(samples) / SAMPLE_RATE
    falling = np.fft.rfft(rng.normal(size=(rows, samples)))
    falling /= np.sqrt(1 + (np.fft.rfftfreq(samples, 1 / SAMPLE_RATE) / 500) ** 2)
    swell = 0.1 + np.sin(np.pi * (4 * time + rng.uniform(size=(rows, 1)))) ** 2
    audio = np.fft.irfft(falling, samples) * swell
    inside = np.arange(samples)[None] < lengths[:, None]
    audio = np.where(inside, 0.05 * audio / audio.std(), 0)
    pcm = np.round(32768 * audio).clip(-32768, 32767).astype(np.int16)
    heard = pcm / 32768
    mean = heard.sum(axis=1) / lengths
    std = np.sqrt(np.where(inside, (heard - mean[:, None]) ** 2, 0).sum(axis=1) / lengths)
    batch = dict(
        audio=pcm, lengths=lengths, mean=mean.astype(np.float32), std=std.astype(np.float32),
        unread=np.zeros(rows, np.int32),
    )  # fmt: skip
    return batch | _targets(task, rng, rows, samples)


def _targets(task: Any, rng: np.random.Generator, rows: int, samples: int) -> Batch:
    """Random ones for all that the task needs: units [B, N], tokens [B, U] and their number, labels [B] or [B, V]."""
    sizes = {key: size for key, (_, size) in task.sizes().items()}
    found: Batch = {}
    for key in task.needs:
        if key == "units":
            found[key] = rng.integers(0, sizes[key], (rows, samples // task.unit_hop)).astype(np.int32)
        elif key == "tokens":
            count = max(1, 10 * samples // SAMPLE_RATE)  # characters of slow speech
            found[key] = rng.integers(1, sizes[key], (rows, count)).astype(np.int32)
            found["token_lengths"] = np.full(rows, count, np.int32)
        elif key not in sizes:  # a number
            found[key] = rng.normal(size=rows).astype(np.float32)
        elif getattr(task, "loss", "") == "sigmoid":
            found[key] = rng.integers(0, 2, (rows, sizes[key])).astype(np.float32)
        else:
            found[key] = rng.integers(0, sizes[key], rows).astype(np.int32)
    return found


def spec_of(batch: Any) -> dict[str, tuple]:
    """{name: (shape, dtype)}."""
    return {name: (array.shape, array.dtype) for name, array in batch.items()}


def train_flops(config: Any, batch: Batch) -> float:
    """Of one training step (see flops.py)."""
    return sum(flops.batch_flops(config, spec_of(batch)).values())


def encoder_flops(config: Any, batch: Batch) -> float:
    """Of the encoder's forward pass over the audio without its padding."""
    still = config.copy_and_resolve_references()
    still.optim.freeze = ((".*", 0, -1),)  # so no gradient flows
    task, total = configs.make_task(still), 0.0
    for length, rows in zip(*np.unique(batch["lengths"], return_counts=True), strict=True):
        parts = flops.batch_flops(still, spec_of(make_batch(task, 1, int(length))))
        total += rows * sum(count for part, count in parts.items() if part != "head")
    return float(total)


def audio_seconds(batch: Batch) -> float:
    """Of a batch, without padding."""
    return int(batch["lengths"].sum()) / SAMPLE_RATE

"""Every experiment in its miniature, and batches that suit it; a new config is there by being there."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from speechjax import config as configs

REPO = Path(__file__).resolve().parent.parent.parent
# Every pretraining config in its miniature, and variants of one that take another way through the code.
EXPERIMENTS = {path.stem: f"{path}:size=tiny,smoke" for path in sorted((REPO / "configs/pretrain").glob("*.py"))}
EXPERIMENTS |= {
    f"{name}-{variant}": f"{REPO}/configs/pretrain/{name}.py:{arg},smoke"
    for name, variant, arg in (
        ("apc", "linear", "size=linear"),
        ("autoencode", "waveform", "size=waveform"),
        ("best_rq", "streaming", "size=tiny,streaming"),
        ("data2vec", "2", "size=tiny2"),
        ("mae", "patches", "size=audio_mae"),
        ("phones", "ctc", "size=tiny,mode=ctc"),
        ("spidr", "waveform", "size=base"),
    )
}
# Fine-tuning, and how many classes data would have said there are.
HEADS: dict[str, tuple[str, list[str]]] = {
    name: (f"{REPO}/configs/finetune/{name.partition('-')[0]}.py:{arg}", overrides)
    for name, arg, overrides in (
        ("classify", "size=tiny,smoke", []),
        ("classify-tags", "tags,size=tiny,smoke", []),
        ("ctc", "size=tiny,smoke", ["task.classes=9"]),
        ("ctc-lora", "size=tiny,trains=lora,smoke", ["task.classes=9"]),
        ("frames-turns", "units=turns,size=tiny,smoke", []),
        ("regress", "size=tiny,smoke", []),
        ("seq2seq", "size=tiny,smoke", []),
        ("several", "size=tiny,smoke", []),
        ("speaker", "size=tiny,smoke", []),
        ("transducer", "size=tiny,smoke", ["task.classes=9"]),
    )
}


@functools.cache
def experiment(name: str) -> tuple[Any, Any]:
    spec, overrides = HEADS[name] if name in HEADS else (EXPERIMENTS[name], [])
    config = configs.load(spec, overrides)
    return config, configs.make_task(config)


def make_batch(
    task: Any, rows: int = 4, seconds: float = 1.3, seed: int = 0, padding: int = 0
) -> dict[str, np.ndarray]:
    """int16 noise that swells and ebbs, with all that any task asks for; `padding` is a seed of what lies beyond."""
    rng = np.random.default_rng(seed)
    hop, extra = task.encoder.frame_len()
    samples = int(seconds * 16000) // hop * hop + extra
    lengths = np.linspace(samples, 0.4 * samples, rows).astype(np.int32)
    loudness = 300 + 6000 * np.abs(np.sin(np.arange(samples) / 1500 + rng.uniform(0, 6, (rows, 1))))
    audio = (rng.normal(size=(rows, samples)) * loudness).clip(-32000, 32000).astype(np.int16)
    inside = np.arange(samples)[None] < lengths[:, None]
    other = np.random.default_rng(1000 + padding).integers(-9000, 9000, audio.shape).astype(np.int16)
    audio = np.where(inside, audio, other if padding else 0).astype(np.int16)
    sizes = {key: size for key, (_, size) in task.sizes().items()}
    batch: dict[str, Any] = dict(audio=audio, lengths=lengths, unread=np.zeros(rows, np.int32))
    batch |= dict(mean=np.zeros(rows, np.float32), std=np.full(rows, 0.1, np.float32))
    if "units" in task.needs:
        unit_hop = task.unit_hop
        units = rng.integers(0, sizes["units"], (rows, samples // unit_hop)).astype(np.int32)
        units = np.repeat(units[:, ::8], 8, axis=1)[:, : samples // unit_hop]
        at = np.arange(samples // unit_hop)[None] * unit_hop
        batch["units"] = np.where(at < lengths[:, None], units, -1).astype(np.int32)
    for key in (key for key in task.needs if key.startswith("label")):
        if key not in sizes:
            batch[key] = rng.normal(size=rows).astype(np.float32)
        elif getattr(task, "loss", "") == "sigmoid":
            batch[key] = rng.integers(0, 2, (rows, sizes[key])).astype(np.float32)
        else:
            batch[key] = rng.integers(0, sizes[key], rows).astype(np.int32)
    if "tokens" in task.needs:
        batch["tokens"] = rng.integers(1, sizes["tokens"], (rows, 5)).astype(np.int32)
        batch["token_lengths"] = np.array([5, 3, 4, 1][:rows], np.int32)
    return batch

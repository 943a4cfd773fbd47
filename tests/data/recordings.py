"""Recordings of noise in files, and the entries of the cache made of them."""

from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000


def noise(seconds: float, seed: int = 0, level: int = 9_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(-level, level, round(seconds * RATE)).astype(np.int16)


def write(path: Path, audio: np.ndarray, rate: int = RATE, **options) -> Path:
    soundfile.write(path, audio, rate, **options)
    return path


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "records").iterdir())

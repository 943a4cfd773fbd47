"""Sounds and batches shared by the audio tests."""

from pathlib import Path

import numpy as np
import soundfile


def speech(folder: Path, *, seconds: float = 4.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Spoken digits at 8 kHz and sentences at 16 kHz from the `real_speech` folder, float32, all of odd length."""
    digits = [_read(folder / "fsdd" / f"{d}_theo_{d}.wav", seconds, 8000) for d in range(3)]
    sentences = [_read(path, seconds, 16000) for path in sorted((folder / "kerstin").rglob("*.ogg"))[:3]]
    assert sentences
    return digits, sentences


def _read(path: Path, seconds: float, sample_rate: int) -> np.ndarray:
    sound, found = soundfile.read(path, dtype="float32")
    assert found == sample_rate
    sound = sound[: int(seconds * sample_rate)]
    return sound[: len(sound) - 1 + len(sound) % 2]


def noise_and_tone(samples: int = 9001) -> list[np.ndarray]:
    """Noise, a rising tone, something quiet after something loud, and less than a window; float32."""
    rng = np.random.default_rng(0)
    time = np.arange(samples) / samples
    loud_and_quiet = np.where(time < 0.4, 0.3, 1e-3) * rng.standard_normal(samples)
    tone = 0.5 * np.sin(2 * np.pi * 0.2 * samples * time**2)
    noise = 0.1 * rng.standard_normal(samples)
    return [x.astype(np.float32) for x in (noise, tone[:-124], loud_and_quiet[:-1], noise[:333])]


def padded(signals: list[np.ndarray], fill: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Batch [B, S] float32 with noise as padding, and lengths [B] int32."""
    lengths = np.array([len(x) for x in signals], np.int32)
    batch = np.random.default_rng(1).normal(0, fill, (len(signals), lengths.max() + 123)).astype(np.float32)
    for row, signal in zip(batch, signals, strict=True):
        row[: len(signal)] = signal
    return batch, lengths


def reverberant(sound: np.ndarray, microphones: int, *, sample_rate: int, seconds: float = 0.3) -> np.ndarray:
    """`sound` in a synthetic room, [D, S] float64: a direct path and noise that decays by 60 dB in `seconds`."""
    rng = np.random.default_rng(5)
    decay = 10.0 ** (-3 * np.arange(int(seconds * sample_rate)) / (seconds * sample_rate))
    response = 0.1 * rng.standard_normal((microphones, len(decay))) * decay
    response[:, 0] = 1.0
    return np.stack([np.convolve(sound, r)[: len(sound)] for r in response])

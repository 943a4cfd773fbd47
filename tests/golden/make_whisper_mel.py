"""Writes whisper_mel.npz: what `transformers.WhisperFeatureExtractor` computes for a synthetic sound.

Needs transformers, without torch: `pip install transformers==5.23.0`, then `python tests/golden/make_whisper_mel.py`.
Audio is stored in int16, features in float32, [F, T] as the extractor returns them.
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def make_audio() -> np.ndarray:
    """0.4 s and one sample: a rising tone, noise, and a stretch of silence, int16."""
    time = np.arange(6001) / 16000
    tone = 0.3 * np.sin(2 * np.pi * (200 + 8000 * time) * time)
    sound = tone + 0.01 * np.random.default_rng(7).standard_normal(len(time))
    sound[2500:3300] = 0.0
    return np.rint(32767 * sound).astype(np.int16)


def main() -> None:
    from transformers import WhisperFeatureExtractor  # pyright: ignore[reportMissingImports]

    audio = make_audio()
    sound = audio.astype(np.float32) / 32768

    def features(samples: int, n_mels: int, padding: str) -> np.ndarray:
        extractor = WhisperFeatureExtractor(feature_size=n_mels)
        result = extractor(sound[:samples], sampling_rate=16000, padding=padding, return_tensors="np")
        return result["input_features"][0].astype(np.float32)

    whole_30_s = features(6001, 80, "max_length")
    # 60 of its 3000 frames: the sound's 37 and some of the silence, which all look alike.
    assert np.all(whole_30_s[:, 60:] == whole_30_s[:, 60:61])
    np.savez_compressed(
        FOLDER / "whisper_mel.npz",
        audio=audio,
        mel_80=features(6001, 80, "do_not_pad"),
        mel_128=features(6001, 128, "do_not_pad"),
        # Shorter than half a window: its mirror image is mirrored again.
        mel_80_of_170=features(170, 80, "do_not_pad"),
        mel_80_of_30_s=whole_30_s[:, :60],
    )


if __name__ == "__main__":
    main()

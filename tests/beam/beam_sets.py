"""Sources of a few shards, and the sets that the engines make of them."""

from pathlib import Path

import numpy as np
import soundfile

from speechjax.data import beam
from speechjax.data.sources import Source

RATE = 16_000


def make_speech(folder: Path, count: int = 140) -> Path:
    """140 recordings make three shards; three of them are unusable, and one has another rate and two channels."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for k in range(count - 4):
        soundfile.write(folder / f"{k:03d}.wav", rng.integers(-9_000, 9_000, 900 + k).astype(np.int16), RATE)
    (folder / "sub").mkdir()
    soundfile.write(folder / "sub" / "stereo.flac", rng.uniform(-0.5, 0.5, (4_000, 2)), 44_100)
    (folder / "010_text.wav").write_text("no audio " * 99)
    (folder / "070_cut.wav").write_bytes((folder / "070.wav").read_bytes()[:500])
    (folder / "071_gone.wav").symlink_to(folder / "nowhere.wav")
    (folder / "readme.txt").touch()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared set; the lock is no part of it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def on_beam(source: Source, folder: str | Path, *options: str, runner: str = "FnApiRunner", copy: bool = True) -> None:
    beam.prepare_on_beam(source, folder, runner=runner, options=options, copy=copy)


def leave_lists(source: Source, folder: Path) -> list[int]:
    """What the launcher does before the pipeline runs."""
    folder.mkdir()
    shards, missing = beam._hand_out(source, folder, str(folder), True)
    assert missing == list(range(shards))
    return missing

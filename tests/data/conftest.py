"""Fixtures of the data tests."""

import os
from pathlib import Path

import numpy as np
import pytest
from memory import OPTIONS
from recordings import RATE, noise, write

from speechjax.data import pipeline, sources
from speechjax.data.records import Records, open_records


@pytest.fixture
def open_memory(monkeypatch):
    """`open_data` over records made by hand."""

    def opened(records, **changes):
        monkeypatch.setattr(pipeline, "open_records", lambda source, **filters: records)
        return pipeline.open_data(**{**OPTIONS, **changes})

    return opened


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six usable recordings, four bad ones and a text."""
    folder = tmp_path / "speech"
    folder.mkdir()
    for k in range(5):
        write(folder / f"good{k}.wav", noise(0.5 + k / 10, seed=k))
    write(folder / "long.flac", noise(10.0, seed=9, level=2_000) + np.int16(500))
    (folder / "bad_text.wav").write_text("no audio " * 99)
    write(folder / "bad_nan.wav", np.full(RATE, np.nan), subtype="FLOAT")
    cut = write(folder / "bad_cut.wav", noise(1.0))
    cut.write_bytes(cut.read_bytes()[:9_000])
    write(folder / "short.wav", noise(0.05))
    (folder / "readme.txt").touch()
    return folder


@pytest.fixture
def opened(tmp_path):
    """open_records with a cache of its own and tolerant limits."""

    def opener(source: str | Path, **options) -> Records:
        name = f"folder:{source}" if isinstance(source, Path) else source
        return open_records(
            name, **{"cache_dir": str(tmp_path / "cache"), "min_seconds": 0.1, "max_bad_share": 0.5} | options
        )

    return opener


@pytest.fixture
def decodes(monkeypatch) -> list[str]:
    """Names of the files decoded so far."""
    names: list[str] = []
    real = sources.decode

    def counted(path, *part):
        names.append(os.path.basename(path))
        return real(path, *part)

    monkeypatch.setattr(sources, "decode", counted)
    return names

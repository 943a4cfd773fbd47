"""Fixtures of the tests of preparation on Beam."""

from pathlib import Path

import pytest
from beam_sets import make_speech

from speechjax.data.prepare import prepare
from speechjax.data.sources import open_source


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Path:
    return make_speech(tmp_path_factory.mktemp("source") / "speech")


@pytest.fixture(scope="session")
def local(speech, tmp_path_factory) -> Path:
    """What the local engine makes of it."""
    folder = tmp_path_factory.mktemp("local")
    prepare(open_source(f"folder:{speech}"), folder, progress=False)
    return folder


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Path:
    """The folder behind fake://."""
    import fake_storage  # wants Beam, without which the tests skip

    monkeypatch.setenv(fake_storage.ROOT, str(tmp_path / "storage"))
    monkeypatch.setattr(fake_storage.FakeStorage, "created", [])
    monkeypatch.setattr(fake_storage.FakeStorage, "broken", set())
    return tmp_path / "storage"

"""What a source string names: which recordings, under which ids, with which text; and what a mistake is answered."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax.data import sources
from speechjax.data.decode import BadAudio
from speechjax.data.sources import open_source
from speechjax.errors import UserError


def tone(rate: int = 16_000, seconds: float = 1.5, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def noise(samples: int = 48_000, seed: int = 0) -> np.ndarray:
    """int16, exact in 16 bit files."""
    return np.random.default_rng(seed).integers(-9_000, 9_000, samples).astype(np.int16)


def write(path: Path, audio: np.ndarray, rate: int = 16_000, **options) -> Path:
    soundfile.write(path, audio, rate, **options)
    return path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "embedded.*folder:DIR.*manifest:FILE.jsonl.*tfds:NAME"),
        ("s3://bucket", "unknown kind 's3'"),
        ("/tmp", "did you mean folder:/tmp"),
        ("folder:", "which folder"),
        ("folder:/no/such/place", "no such folder: /no/such/place"),
        ("manifest:/no/such.jsonl", "cannot read /no/such.jsonl"),
        ("embedded:lots", "positive number"),
        ("embedded:-1", "positive number"),
        ("embedded:nan", "positive number"),
        ("tfds:spoken_digit", "NAME\\[/CONFIG\\]:SPLIT"),
        ("tfds:x:train@fast", "NAME\\[/CONFIG\\]:SPLIT"),
    ],
)
def test_source_mistakes(source, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


def test_folder_lists_audio_and_only_audio(tmp_path):
    (tmp_path / "b" / "dir.wav").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    readable = ["a.wav", "b/UPPER.FLAC", "b/dir.wav/x.ogg", "new\nline.wav"]
    for name in [*readable, "._a.wav", ".git/b.wav"]:
        write(tmp_path / name, tone())
    (tmp_path / "notes.txt").touch()
    (tmp_path / "b" / "song.m4a").touch()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "dangling.wav").symlink_to("nowhere")
    (tmp_path / "circle.wav").symlink_to("circle.wav")
    (tmp_path / "b" / "up").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    source = open_source(f"folder:{tmp_path}")
    wanted = sorted([*readable, "dangling.wav", "circle.wav"])
    assert [item.id for item in source.items()] == wanted
    assert source.total == len(wanted)
    assert source.ignored == 4  # notes.txt, song.m4a, pipe.wav, self
    assert all(len(item.read()) == len(tone()) for item in source.items() if item.id in readable)


def test_folder_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    try:
        os.rename(write(tmp_path / "a.wav", tone()), tmp_path / name)
    except OSError:
        pytest.skip("the file system insists on UTF-8")
    (item,) = open_source(f"folder:{tmp_path}").items()
    assert item.id == name
    assert len(item.read()) == len(tone())


def test_folder_without_audio(tmp_path):
    with pytest.raises(UserError, match=r"no audio files in .* \(found nothing"):
        open_source(f"folder:{tmp_path}")
    for k in range(3):
        (tmp_path / f"{k}.m4a").touch()
    with pytest.raises(UserError, match=r"found 3 \.m4a; readable are .*\.flac"):
        open_source(f"folder:{tmp_path}")


def test_fingerprint_follows_the_files(tmp_path):
    path = write(tmp_path / "a.wav", tone())
    os.utime(path, ns=(0, 10**18))
    prints = [open_source(f"folder:{tmp_path}").fingerprint]
    assert open_source(f"folder:{tmp_path}").fingerprint == prints[0]
    os.utime(path, ns=(0, 10**18 + 1))
    prints.append(open_source(f"folder:{tmp_path}").fingerprint)
    write(path, tone(seconds=2.0))
    os.utime(path, ns=(0, 10**18 + 1))
    prints.append(open_source(f"folder:{tmp_path}").fingerprint)
    (tmp_path / "b.wav").symlink_to("gone.wav")
    prints.append(open_source(f"folder:{tmp_path}").fingerprint)
    write(tmp_path / "gone.wav", tone())
    prints.append(open_source(f"folder:{tmp_path}").fingerprint)
    assert len(set(prints)) == 5


def manifest(folder: Path, *lines: str | dict) -> str:
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "m.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return f"manifest:{folder / 'm.jsonl'}"


def verdicts(source: str) -> dict[str, str | int]:
    found = {}
    for item in open_source(source).items():
        try:
            found[item.id] = len(item.read())
        except BadAudio as verdict:
            found[item.id] = str(verdict)
    return found


def test_manifest(tmp_path):
    (tmp_path / "clips").mkdir()
    write(tmp_path / "clips" / "a.wav", noise())
    outside = write(tmp_path / "outside.wav", noise(seed=3))
    name = manifest(
        tmp_path,
        {"audio_filepath": "clips/a.wav", "duration": 3.0, "text": "grüß dich", "speaker_id": 7, "lang": "de"},
        "",
        {"audio_filepath": "clips/a.wav", "offset": 1.0, "duration": 0.5, "transcript": "middle"},
        {"path": str(outside), "id": 12, "label": "x", "phones": ["a"]},
    )
    items = {item.id: item for item in open_source(name).items()}
    assert list(items) == ["12", "clips/a.wav", "clips/a.wav@1.0"]
    assert items["clips/a.wav"].meta == {"text": "grüß dich", "speaker": 7, "lang": "de"}
    assert items["12"].meta == {"label": "x", "phones": ["a"]}
    assert items["clips/a.wav@1.0"].meta == {"text": "middle"}
    np.testing.assert_array_equal(items["12"].read(), noise(seed=3))
    np.testing.assert_array_equal(items["clips/a.wav"].read(), noise())
    np.testing.assert_array_equal(items["clips/a.wav@1.0"].read(), noise()[16_000:24_000])


def test_manifest_faults_are_items_with_line_numbers(tmp_path):
    write(tmp_path / "a.wav", tone())
    name = manifest(
        tmp_path,
        {"audio_filepath": "a.wav"},
        '{"audio_filepath": "a.wav", "text": ',
        {"text": "no audio"},
        {"audio_filepath": "missing.wav"},
        {"audio_filepath": "a.wav", "offset": -1},
        {"audio_filepath": "a.wav", "id": "late", "offset": 9},
        '["a.wav"]',
        '{"audio_filepath": "a.wav", "duration": Infinity}',
    )
    assert verdicts(name) == {
        "a.wav": len(tone()),
        "m.jsonl:2": "bad JSON",
        "m.jsonl:3": "no audio path",
        "missing.wav": "no such file",
        "m.jsonl:5": "bad offset or duration",
        "late": "offset beyond the end",
        "m.jsonl:7": "not a JSON object",
        "m.jsonl:8": "bad offset or duration",
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the manifest is empty"),
        (['[{"audio_filepath": "a.wav"},', '{"audio_filepath": "b.wav"}]'], "line 1: bad JSON; a line looks like"),
        (
            [{"audio_filepath": "x.wav"}, {"audio_filepath": "y.wav"}],
            "line 1: no such file: .*/x.wav .relative paths",
        ),
        ([{"audio_filepath": "x.wav"}, {}, {"audio_filepath": "x.wav"}], "lines 1 and 3 have the same id 'x.wav'"),
    ],
)
def test_manifest_refused(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        open_source(manifest(tmp_path, *lines))


def test_manifest_fingerprint_sees_text_and_missing_files(tmp_path):
    write(tmp_path / "a.wav", tone())
    lines = [{"audio_filepath": "a.wav"}, {"audio_filepath": "b.wav", "text": "one"}]
    prints = [open_source(manifest(tmp_path, *lines)).fingerprint for _ in range(2)]
    assert prints[0] == prints[1]
    lines[1]["text"] = "two"
    prints.append(open_source(manifest(tmp_path, *lines)).fingerprint)
    write(tmp_path / "b.wav", tone())
    prints.append(open_source(manifest(tmp_path, *lines)).fingerprint)
    assert len(set(prints)) == 3


def test_embedded():
    from speechjax.data import embedded

    source = open_source("embedded:0.005")
    items, expected = list(source.items()), list(embedded.utterances(0.005, seed=0))
    assert [item.id for item in items] == [utterance["id"] for utterance in expected]
    assert items
    for item, utterance in zip(items, expected, strict=True):
        np.testing.assert_array_equal(item.read(), utterance["audio"])
        assert item.meta["text"] == utterance["text"]
        assert set(item.meta) == {"text", "speaker", "lang", "phones"}
    assert open_source("embedded:0.005").fingerprint == source.fingerprint
    assert open_source("embedded:0.01").fingerprint != source.fingerprint


def test_opening_reads_no_audio(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", tone())
    monkeypatch.setattr(sources, "decode", lambda *_: pytest.fail("decoded"))
    (item,) = open_source(f"folder:{tmp_path}").items()
    with pytest.raises(pytest.fail.Exception):
        item.read()

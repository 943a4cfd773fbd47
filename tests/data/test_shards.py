"""Prepared sets: what was written is what is read, byte by byte, and no damage goes unnoticed."""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax import prepare as verb
from speechjax.data.decode import BadAudio
from speechjax.data.prepare import prepare
from speechjax.data.records import open_records
from speechjax.data.shard_writer import finish, shard_info, write_json, write_shard
from speechjax.data.shards import INDEX, DamagedError, Shards, UnreadableError, damaged, id_key, open_shards
from speechjax.data.sources import Item, Source, open_source
from speechjax.errors import UserError

RATE = 16_000
# Letters of every plane, what quoting and lines trip over, and the bytes of a name that is no UTF-8.
NAMES = st.text(st.sampled_from("aß語😀\n\r\"'\\\t\u2028 \0\udcff"), max_size=12)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32_768, 32_768, samples).astype(np.int16)


def array_item(name: str, audio: np.ndarray | None, meta: dict | None = None) -> Item:
    """A recording in memory; None: one that cannot be used."""

    def read() -> np.ndarray:
        if audio is None:
            raise BadAudio("broken")
        return audio

    return Item(name, read, meta or {})


def make_set(folder: Path, *shards: list[Item], copy: bool = True) -> Shards:
    for number, items in enumerate(shards):
        write_shard(folder, number, items, copy)
    finish(folder, Source("memory", "0", lambda: iter(()), None, ignored=3), len(shards), copy)
    return Shards(folder)


def read(shards: Shards, row: int) -> np.ndarray:
    out = np.empty(int(shards.index["length"][row]), np.int16)
    shards.read_into(row, 0, out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# ---- round trip


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.tuples(NAMES, st.integers(0, 400)), max_size=4), min_size=1, max_size=3), st.data())
def test_everything_comes_back(drawn, data):
    """Length 0 stands for a recording that cannot be used."""
    expected, rejected, shards = [], [], []
    for number, entries in enumerate(drawn):
        shards.append([])
        for k, (name, samples) in enumerate(entries):
            name = f"{number}/{k}/{name}"
            audio = noise(samples, seed=k + 10 * number) if samples else None
            meta = {"text": name[::-1], "n": k}
            shards[-1].append(array_item(name, audio, meta))
            if audio is None:
                rejected.append({"id": name, "reason": "broken"})
            else:
                expected.append((name, audio, meta, number))
    with tempfile.TemporaryDirectory() as folder:
        made = make_set(Path(folder), *shards)
        assert len(made) == len(expected)
        assert made.rejected == rejected
        assert not damaged(Path(folder))
        assert [entry["id"] for entry in made.entries()] == [name for name, *_ in expected]
        for row, (name, audio, meta, number) in enumerate(expected):
            assert made.entry(row) == {"id": name, "meta": meta}
            np.testing.assert_array_equal(read(made, row), audio)
            begin = data.draw(st.integers(0, len(audio)))
            part = np.empty(data.draw(st.integers(0, len(audio) - begin)), np.int16)
            made.read_into(row, begin, part)
            np.testing.assert_array_equal(part, audio[begin : begin + len(part)])
            record = made.index[row]
            assert (record["length"], record["shard"], record["key"]) == (len(audio), number, id_key(name))
            np.testing.assert_allclose(record["mean"], (audio / 32_768).mean(), rtol=1e-6, atol=1e-9)  # float32
            np.testing.assert_allclose(record["std"], (audio / 32_768).std(), rtol=1e-6, atol=1e-9)


def test_dataset_json_tells_the_whole_story(tmp_path):
    made = make_set(tmp_path, [array_item("a", noise(100)), array_item("b", None)], [array_item("c", noise(50))])
    info = json.loads((tmp_path / "dataset.json").read_text())
    assert made.index.dtype == INDEX
    assert (info["recordings"], info["samples"], info["rejected"], info["ignored"]) == (2, 150, 1, 3)
    assert (info["shards"], info["sample_rate"], info["copy"]) == (2, RATE, True)
    recorded = info["files"] | info["joined"]
    assert set(recorded) == {path.name for path in tmp_path.iterdir()} - {
        "dataset.json", "shard-00000.json", "shard-00001.json",
    }  # fmt: skip
    for name, file in recorded.items():
        data = (tmp_path / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, name
    np.testing.assert_array_equal(np.load(tmp_path / "index.npy"), made.index)


def test_the_hash_of_a_set_is_of_its_contents_alone(tmp_path):
    def made(name, *items):
        (tmp_path / name).mkdir()
        return make_set(tmp_path / name, list(items)).info["sha256"]

    one, two = array_item("a", noise(100)), array_item("b", noise(100))
    assert made("1", one, two) == made("2", one, two)
    others = [made("3", two, one), made("4", one), made("5", one, array_item("b", noise(99)))]
    assert len({made("6", one, two), *others}) == 4


def test_key_is_the_first_half_of_the_hash_whatever_the_name():
    assert id_key("abc") == 0xBA7816BF8F01CFEA  # SHA-256 of FIPS 180-4's example begins ba7816bf 8f01cfea
    name = os.fsdecode(b"caf\xe9.wav")
    assert id_key(name) == int(hashlib.sha256(b"caf\xe9.wav").hexdigest()[:16], 16)


@pytest.mark.parametrize("length", [0, 470, 480, 490, 511, 512, 513, 1_023, 1_024, 5_000, 200_000])
def test_lines_of_any_length(tmp_path, length):
    """They are read in pieces, of which the first has 512 bytes."""
    metas = [{"text": "x" * length, "k": k} for k in range(3)]
    made = make_set(tmp_path, [array_item(f"{k}", noise(10), meta) for k, meta in enumerate(metas)])
    assert [made.entry(k)["meta"] for k in (2, 0, 1)] == [metas[2], metas[0], metas[1]]


def test_an_empty_set(tmp_path):
    made = make_set(tmp_path, [array_item("a", None)], [array_item("b", None)])
    assert len(made) == 0
    assert [entry["id"] for entry in made.rejected] == ["a", "b"]
    assert list(made.entries()) == []


def test_files_appear_whole_and_the_record_of_them_last(tmp_path):
    def failing():
        yield array_item("a", noise(100))
        assert {path.suffix for path in tmp_path.iterdir()} == {".tmp"}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path, 0, failing(), True)
    assert not list(tmp_path.iterdir())
    assert shard_info(tmp_path, 0) is None
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"not": {"JSON"}})
    assert not list(tmp_path.iterdir())


# ---- in place


def test_in_place_nothing_is_stored_and_files_of_odd_names_are_found(tmp_path):
    speech, folder = tmp_path / "speech", tmp_path / "set"
    speech.mkdir()
    folder.mkdir()
    names = [b"caf\xe9.wav", b'zwei\nZeilen "q".wav', "ß語.flac".encode(), b"rest.wav"]
    for k, name in enumerate(names):
        soundfile.write(tmp_path / "x.wav", noise(900, k), RATE, format="FLAC" if name.endswith(b"flac") else "WAV")
        os.rename(tmp_path / "x.wav", os.fsencode(speech) + b"/" + name)
    source = open_source(f"folder:{speech}")
    made = make_set(folder, list(source.items()), copy=False)
    assert not list(folder.glob("*.pcm"))
    found = {os.fsencode(entry["id"]): row for row, entry in enumerate(made.entries())}
    assert set(found) == set(names)
    for k, name in enumerate(names):
        row = found[name]
        np.testing.assert_array_equal(read(made, row), noise(900, k))
        assert made.index["key"][row] == int(hashlib.sha256(name).hexdigest()[:16], 16)
        assert (made.index["offset"][row] >= 0) == name.endswith(b"wav")  # raw samples are read without a decoder


# ---- damage


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Path:
    """Enough files for three shards."""
    folder = tmp_path_factory.mktemp("speech")
    for k in range(150):
        soundfile.write(folder / f"{k:03d}.wav", noise(320 + k, k), RATE)
    (folder / "text.wav").write_text("no audio " * 9)
    return folder


@pytest.fixture(scope="session")
def original(speech, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    repair(speech, folder)
    return folder


@pytest.fixture
def prepared(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "set")


def repair(speech: Path, folder: Path, verify: bool = False) -> None:
    if verify:  # which is the verb's
        assert verb.run([f"--source=folder:{speech}", f"--out={folder}", "--workers=1", "--verify"]) == 0
        for name in ("index.html", "statistics.json", "statistics.png"):
            (folder / name).unlink()
    else:
        prepare(open_source(f"folder:{speech}"), folder, progress=False)


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def longer(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


FILES = ["shard-00001.pcm", "shard-00001.jsonl", "shard-00001.npy", "index.npy", "rejected.jsonl"]


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_found_and_only_its_shard_made_again(prepared, speech, name):
    whole = contents(prepared)
    for damage in (shorter, longer, Path.unlink, flipped):
        damage(prepared / name)
        assert set(damaged(prepared)) == {name}
        if damage is not flipped:  # which sizes cannot tell
            with pytest.raises(DamagedError, match=name):
                Shards(prepared)
            with pytest.raises(UserError, match=f"{name}.*give its prepare command again to repair it"):
                open_shards("shards:x", str(prepared))
        times = {path.name: path.stat().st_mtime_ns for path in prepared.glob("shard-*.json")}
        repair(speech, prepared, verify=damage is flipped)
        assert contents(prepared) == whole
        again = {path.name for path in prepared.glob("shard-*.json") if path.stat().st_mtime_ns != times[path.name]}
        assert again == ({"shard-00001.json"} if name.startswith("shard") else set())


def test_verify_repairs_several_damages_at_once(prepared, speech, caplog):
    """The sizes give one away, which must not hide the other."""
    whole = contents(prepared)
    shorter(prepared / "shard-00000.pcm")
    flipped(prepared / "shard-00002.pcm")
    (prepared / "shard-00001.json").write_text("{")
    assert set(damaged(prepared)) == {"shard-00000.pcm", "shard-00001.json", "shard-00002.pcm"}
    repair(speech, prepared, verify=True)
    assert contents(prepared) == whole
    assert sum("will be made again" in message for message in caplog.messages) == 3
    caplog.clear()
    repair(speech, prepared, verify=True)
    assert "made again" not in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "cannot be read"), ("[]", "cannot be read"), ("{}", "cannot be read"), ('{"format": 1}', "has format 1")],
)
def test_dataset_json_of_nonsense(prepared, content, message):
    (prepared / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_shards("shards:x", str(prepared))


def test_what_is_no_set_says_what_it_is(prepared, speech, tmp_path):
    opener = functools.partial(open_shards, "shards:x")
    with pytest.raises(UserError, match="no such folder"):
        opener(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such folder"):
        opener("")
    with pytest.raises(UserError, match="no prepared set"):
        opener(str(speech))
    (prepared / "dataset.json").unlink()
    with pytest.raises(UserError, match="not finished: give its prepare command again"):
        opener(str(prepared))


@pytest.mark.parametrize("name", ["shard-00000.pcm", "shard-00001.jsonl"])
def test_a_file_cut_while_the_set_is_open(prepared, name):
    """Mapped memory would end the process with SIGBUS."""
    records = open_records(f"shards:{prepared}", min_seconds=0.0, max_bad_share=0.05)
    first = records.read(0)
    os.truncate(prepared / name, 700)  # the first recording's 640 bytes of samples, or some twenty lines
    np.testing.assert_array_equal(records.read(0), first)
    if name.endswith("pcm"):
        with pytest.raises(UnreadableError, match="ends before"):
            records.read(40)
    else:
        assert len(records.read(149)) == 320 + 149
        with pytest.raises(DamagedError, match="ends within a line"):
            records.id(149 - 30)


def test_lines_that_became_something_else(prepared):
    made = Shards(prepared)
    with open(prepared / "shard-00000.jsonl", "r+b") as file:
        file.write(b"\xff")
    with pytest.raises(DamagedError, match="not JSON"):
        made.entry(0)

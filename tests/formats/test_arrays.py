"""Files of arrays: what comes back, and that whatever is wrong with one ends in one line."""

import json
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.formats.arrays import Kind, digest, read_arrays, write_arrays

safetensors_numpy: Any = pytest.importorskip("safetensors.numpy")

KIND = Kind("a model", "test_model", 2, (1, 2))
HEADER = {"about": {"step": 3}, "names": ["ä", "b"]}
DTYPES = (jnp.bfloat16, np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64, bool)


def arrays() -> dict[str, np.ndarray]:
    grid = np.arange(6).reshape(2, 3) - 2
    return {f"a/{np.dtype(t).name}": grid.astype(t) for t in DTYPES} | {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.asarray(2.5, np.float32),
        "b/view": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b/strided": np.arange(10, dtype=np.int8)[::3],
    }


@pytest.fixture
def file(tmp_path) -> Path:
    write_arrays(tmp_path / "x.safetensors", KIND, arrays(), HEADER)
    return tmp_path / "x.safetensors"


def refused(path: Path, kind: Kind = KIND) -> str:
    with pytest.raises(UserError) as caught:
        read_arrays(path, kind)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(safetensors' own header, data) of a file."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def whole(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_what_was_written_comes_back(file):
    found, header = read_arrays(file, KIND)
    assert header == {"format": 2, **HEADER}
    assert list(found) == sorted(arrays())
    for name, array in arrays().items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array)


def test_the_same_content_makes_the_same_bytes(file, tmp_path):
    shuffled = dict(reversed(arrays().items()))
    write_arrays(tmp_path / "y.safetensors", KIND, shuffled, HEADER)
    assert (tmp_path / "y.safetensors").read_bytes() == file.read_bytes()
    assert sorted(tmp_path.iterdir()) == [file, tmp_path / "y.safetensors"]


def test_older_formats_are_read_and_newer_ones_refused(file):
    content = file.read_bytes()
    header, data = parts(content)
    text = json.loads(header["__metadata__"][KIND.key])
    for version, message in ((1, "damaged: its digest"), (3, "has format 3, this version reads 1 and 2"), ("2", "2")):
        other = {"__metadata__": {KIND.key: json.dumps(text | {"format": version})}}
        file.write_bytes(whole(header | other, data))
        assert message in refused(file)
    old = {"format": 1, **HEADER}
    old["content"] = digest(arrays(), old)
    file.write_bytes(whole(header | {"__metadata__": {KIND.key: json.dumps(old)}}, data))
    assert read_arrays(file, KIND)[1]["format"] == 1


def test_what_is_no_such_file_is_named(file, tmp_path):
    assert "no such file" in refused(tmp_path / "missing")
    assert "no such file" in refused(tmp_path)
    assert refused(file, Kind("an adapter", "other", 2, (2,))) == f"{file} is not an adapter of speechjax"
    safetensors_numpy.save_file({"x": np.ones(3, np.float32)}, tmp_path / "foreign")
    assert "is not a model of speechjax" in refused(tmp_path / "foreign")
    for name, content in (
        ("empty", b""),
        ("text", b"hello" * 99),
        ("pickle", pickle.dumps({"a": 1})),
        ("huge", struct.pack("<Q", 2**62)),
    ):
        (tmp_path / name).write_bytes(content)
        assert "is damaged or no safetensors file" in refused(tmp_path / name)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"format"', '{"format": null}', "{", "[" * 100_000, "{}"])
def test_a_strange_json_text_is_refused(file, text):
    header, data = parts(file.read_bytes())
    file.write_bytes(whole(header | {"__metadata__": {KIND.key: text}}, data))
    refused(file)


def test_every_flipped_bit_and_every_missing_end_is_noticed(tmp_path):
    path = tmp_path / "small"
    write_arrays(path, KIND, {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.int8)}, {"about": "x"})
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        refused(path)
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        refused(path)
    path.write_bytes(content)
    read_arrays(path, KIND)  # negative control


def test_arrays_under_another_name_type_or_shape_are_noticed(file):
    header, data = parts(file.read_bytes())
    whole_again = file.read_bytes()
    changes = [
        {"a/float32": header["a/float32"] | {"dtype": "I32"}},
        {"a/float32": header["a/float32"] | {"shape": [3, 2]}},
        {"a/float32": header["a/int32"], "a/int32": header["a/float32"]},
    ]
    for change in changes:
        file.write_bytes(whole(header | change, data))
        assert "damaged" in refused(file)
    renamed = {("a/other" if name == "a/float32" else name): entry for name, entry in header.items()}
    file.write_bytes(whole(renamed, data))
    assert "its digest does not match" in refused(file)
    file.write_bytes(whole_again)
    read_arrays(file, KIND)  # negative control


def test_a_failed_write_leaves_what_was_there(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_arrays(file, KIND, {"x": np.ones(3, np.float32)}, {})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_mistakes_of_writing_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        write_arrays(tmp_path / "no" / "x", KIND, arrays(), HEADER)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install 'speechjax\[export\]'"):
        write_arrays(tmp_path / "x", KIND, arrays(), HEADER)

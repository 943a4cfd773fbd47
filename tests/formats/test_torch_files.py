"""PyTorch checkpoints without PyTorch: what is read is right, what is not ends in one line, and nothing ever runs."""

import contextlib
import encodings.raw_unicode_escape  # noqa: F401  # else imported when it is first needed, which is heard below
import io
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_writer
from torch_writer import Tensor, dump, members, modules, patched, streamed, write, zipped

from speechjax.errors import UserError
from speechjax.formats.inert_pickle import Machine, Stub
from speechjax.formats.torch_files import read_torch

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = ("zip", "stream")
X = np.arange(24, dtype=np.float32)


def read_bytes(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    return read_torch(path)


def refused(tmp_path: Path, content: bytes, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        read_bytes(tmp_path, content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


# ---- what is read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_torch_wrote_is_read(layout):
    found = read_torch(GOLDEN / f"torch_{layout}.pt")
    x = X.reshape(4, 6)
    expected = {
        "x": x, "row": x[1], "transposed": x.T, "every_second": x[::2, 1::3], "scalar": x[2, 3],
        "none": np.zeros((0, 3), np.float32), "float16": np.array([1.0, -2.5], np.float16),
        "bfloat16": np.array([1.0, -2.5, 3e38], torch_writer.BFLOAT16), "float64": np.array([1e300]),
        "int64": np.array([1 << 40, -1]), "int32": np.array([-7], np.int32), "int16": np.array([-7], np.int16),
        "int8": np.array([-7], np.int8), "uint8": np.array([200], np.uint8), "bool": np.array([True, False]),
        "parameter": np.array([0.5, -0.5], np.float32),
    }  # fmt: skip
    for name, array in expected.items():
        assert type(found[name]) is np.ndarray, name
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].flags.c_contiguous, name
    assert found["args"] == dict(layers=2, inner=dict(rates=[0.5, 1.0]), name=None)
    assert (found["names"], found["ordered"]) == (["weight", "bias"], dict(b=1, a=(2, "two")))
    np.testing.assert_array_equal(found["state"]["weight"], np.ones((2, 3), np.float32))
    assert np.shares_memory(found["x"], found["row"])
    assert not np.shares_memory(found["x"], found["parameter"])
    assert isinstance(found["device"], Stub)
    assert (found["device"].name, found["device"].args) == ("torch.device", ("cpu",))


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_tests_write_is_read(tmp_path, stream):
    value = {"a": X.reshape(2, 12), "b": [X.astype(np.int64), np.float16([3])], "c": Tensor(X, 4, (2, 3), (1, 6))}
    found = read_torch(write(tmp_path / "x.pt", value, stream=stream))
    np.testing.assert_array_equal(found["a"], value["a"])
    np.testing.assert_array_equal(found["b"][0], value["b"][0])
    np.testing.assert_array_equal(found["c"], X[4:].reshape(-1)[: 3 * 6].reshape(3, 6)[:, :2].T)


def test_an_array_costs_no_memory_until_it_is_changed(tmp_path):
    found = read_torch(write(tmp_path / "x.pt", {"x": X}))["x"]
    assert not found.flags.owndata
    assert not found.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_tensors_that_numpy_lacks_are_stubs(tmp_path):
    content, storages = _two()
    found = read_bytes(tmp_path, zipped(members(content.replace(b"FloatStorage", b"QInt8Storage"), storages)))
    assert repr(found) == "{'x': Stub('torch.QInt8Storage')}"
    assert isinstance(read_bytes(tmp_path, zipped(members(content, storages)))["x"], np.ndarray), "negative control"


def test_settings_of_omegaconf_are_plain(tmp_path):
    """With the attributes that versions 2.0 to 2.3 pickle; nodes name their parents, so the whole is a circle."""
    names = ("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
             "omegaconf.nodes.EnumNode", "omegaconf.base.Metadata", "fairseq.Mode")  # fmt: skip
    with modules(*names):
        kinds = {name: getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in names}

        def node(kind: str, **attributes: Any) -> Any:
            found = kinds[kind]()
            found.__dict__.update(attributes, _metadata=kinds["omegaconf.base.Metadata"]())
            return found

        mode = kinds["fairseq.Mode"]
        mode.__reduce__ = lambda self: (mode, ("layer_norm",))
        inner = node("omegaconf.dictconfig.DictConfig", _content={}, _parent=None)
        inner._content["rate"] = node("omegaconf.nodes.AnyNode", _val=0.5, _parent=inner)
        inner._content["mode"] = node("omegaconf.nodes.EnumNode", _val=mode(), _parent=inner)
        several = node("omegaconf.listconfig.ListConfig", _parent=inner, _content=[])
        several._content += [node("omegaconf.nodes.AnyNode", _val=i, _parent=several) for i in range(3)]
        inner._content["several"] = several
        outer = node("omegaconf.dictconfig.DictConfig", _content={"model": inner, "missing": None}, _parent=None)
        inner._parent = outer
        content, storages = dump({"cfg": outer})
    found = read_bytes(tmp_path, zipped(members(content, storages)))
    assert found["cfg"] == dict(model=dict(rate=0.5, mode="layer_norm", several=[0, 1, 2]), missing=None)


# ---- nothing runs


class Evil:
    """Makes the folder `path` when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def _programs(target: Path) -> dict[str, bytes]:
    path = str(target).encode()
    quoted = b"X" + struct.pack("<I", len(path)) + path
    return {
        "REDUCE": pickle.dumps(Evil(target), 2),
        "STACK_GLOBAL": pickle.dumps(Evil(target), 4),
        "protocol 0": pickle.dumps(Evil(target), 0),
        "INST": b"(" + quoted + b"iposix\nmkdir\n.",
        "OBJ": b"(cposix\nmkdir\n" + quoted + b"o.",
        "NEWOBJ": b"\x80\x02cposix\nmkdir\n" + quoted + b"\x85\x81.",
        "eval": b"c__builtin__\neval\nX\x11\x00\x00\x00__import__('os').\x85R.",
        "import": b"cthis_module_is_not_there\nx\n.",
        "BUILD": b"cspeechjax.errors\nUserError\n)\x81}X\x08\x00\x00\x00__init__cposix\nmkdir\nsb.",
        "getattr": b"c__builtin__\ngetattr\ncposix\nX\x05\x00\x00\x00mkdir\x86R" + quoted + b"\x85R.",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_programs_in_a_pickle_do_not_run(tmp_path, stream):
    target = tmp_path / "made"
    for name, program in _programs(target).items():
        path = tmp_path / "file.pt"
        path.write_bytes(streamed(program, []) if stream else zipped(members(program, [])))
        with quiet():
            try:
                found = read_torch(path)
            except UserError:  # not every one of these is well formed
                found = None
        assert isinstance(found, Stub | None), name
        assert not target.exists(), name
    pickle.loads(_programs(target)["REDUCE"])
    assert target.exists(), "negative control: Python's own reader runs it"


_EVENTS: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if _EVENTS is None:
        return
    if event == "open" and (arguments[1] in ("r", "rb", None) and not arguments[2] & 3):
        return
    if event.split(".")[0] in ("open", "import", "exec", "compile", "os", "subprocess", "socket", "shutil", "ctypes"):
        _EVENTS.append(f"{event} {arguments[:1]}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def quiet():
    """Within it nothing may be imported, compiled, started, or written."""
    global _EVENTS
    _EVENTS = []
    try:
        yield
        assert not _EVENTS, _EVENTS
    finally:
        _EVENTS = None


def test_the_audit_sees_what_it_should(tmp_path):
    for act in (lambda: (tmp_path / "x").mkdir(), lambda: eval("1"), lambda: (tmp_path / "y").write_text("")):
        with pytest.raises(AssertionError), quiet():
            act()


# ---- damage


def _good(value: Any = None) -> dict[str, bytes]:
    with modules():
        return members(*dump({"x": X, "y": X[:3]} if value is None else value))


def _tensor(**wrong: Any) -> bytes:
    with modules():
        content, storages = dump({"x": Tensor(X, **wrong)})
    return zipped(members(content, storages))


def _lie(dtype: str, count: int) -> bytes:
    """A storage that says it has another type and length than it has."""
    with modules():
        content, storages = dump({"x": Tensor(np.zeros(count, dtype), 0, (2,))})
    return zipped(members(content, [storages[0][:1]]))


DAMAGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "text": (lambda: b"<!DOCTYPE html><html>", "neither a zip nor the older layout"),
    "safetensors": (lambda: b"\x40\0\0\0\0\0\0\0" + b'{"x":{}}', "neither a zip nor"),
    "plain pickle": (lambda: pickle.dumps({"a": 1}), "neither a zip nor the older layout of torch.save"),
    "cut zip": (lambda: zipped(_good())[:-30], "a zip that is cut off"),
    "other zip": (lambda: zipped({"a.txt": b"x"}), "a zip without data.pkl"),
    "program": (lambda: zipped(_good() | {"archive/constants.pkl": b"."}), "is a TorchScript program; save"),
    "compressed": (lambda: zipped(_good(), zipfile.ZIP_DEFLATED), "was packed anew, with compression"),
    "big-endian": (lambda: zipped(_good() | {"archive/byteorder": b"big"}), "big-endian"),
    "flipped": (lambda: zipped(_good()).replace(X[5:7].tobytes(), X[6:8].tobytes()), "the checksum of 'archive/data/0"),
    "no storage": (lambda: zipped({k: v for k, v in _good().items() if k != "archive/data/1"}), "'1' is missing"),
    "short storage": (lambda: zipped(_good() | {"archive/data/1": b"abc"}), "storage '1' is cut off"),
    "lying storage": (lambda: _lie("float64", 1 << 20), "storage '0' is cut off"),
    "too large": (lambda: _tensor(size=(5, 5)), r"a tensor of shape \(5, 5\) does not fit its storage of 24"),
    "behind the end": (lambda: _tensor(offset=21, size=(4,)), "does not fit its storage"),
    "far strides": (lambda: _tensor(size=(2, 2), stride=(23, 1)), "does not fit its storage"),
    "repeated": (lambda: _tensor(size=(1 << 40,), stride=(0,)), "does not fit its storage"),
    "before the start": (lambda: _tensor(offset=-1), "out of bounds"),
    "negative stride": (lambda: _tensor(size=(2,), stride=(-1,)), "out of bounds"),
    "huge": (lambda: _tensor(size=(1 << 62, 1 << 62)), "out of bounds"),
    "fractions": (lambda: _tensor(size=(2.0,), stride=(1,)), "not made of counts"),
    "true": (lambda: _tensor(size=(True,), stride=(1,)), "not made of counts"),
    "ranks": (lambda: _tensor(size=(2, 2), stride=(1,)), "its pickle is broken"),
    "many dimensions": (lambda: _tensor(size=(1,) * 33, stride=(1,) * 33), "not made of counts"),
    "other identity": (lambda: zipped(members(b"(X\4\0\0\0fileK\1K\1K\1K\1tQ.", [])), "nor a storage"),
    "no end": (lambda: zipped(members(b"\x80\x02}", [])), "its pickle is broken"),
    "underflow": (lambda: zipped(members(b"\x80\x02R.", [])), "its pickle is broken"),
    "no memo": (lambda: zipped(members(b"h\x07.", [])), "its pickle is broken"),
    "extension": (lambda: zipped(members(b"\x82\x07.", [])), "the instruction EXT1"),
    "text identity": (lambda: zipped(members(b"Pmodule\n.", [])), "the instruction PERSID"),
    "buffer": (lambda: zipped(members(b"\x80\x05\x97.", [])), "the instruction NEXT_BUFFER"),
    "key": (lambda: zipped(members(b"}]Ns.", [])), "a key of type list"),
    "appends to a number": (lambda: zipped(members(b"K\x01K\x01a.", [])), "appends to int"),
    "byte array": (lambda: zipped(members(b"\x80\x05\x96" + b"\xff" * 7 + b"\x0fx.", [])), "its pickle is broken"),
    "long text": (lambda: zipped(members(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0fx.", [])), "its pickle is broken"),
    "stream version": (lambda: streamed(*_two()).replace(b"M\xe9\x03", b"M\xea\x03"), "unknown version"),
    "cut stream": (lambda: streamed(*_two())[:-3], "cut off in storage '0'"),
    "stream big-endian": (
        lambda: re.sub(rb"(little_endian..)\x88", rb"\1" + b"\x89", streamed(*_two())), "big-endian",
    ),
}  # fmt: skip


def _two() -> tuple[bytes, list[np.ndarray]]:
    with modules():
        return dump({"x": X})


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(tmp_path, name):
    make, message = DAMAGE[name]
    refused(tmp_path, make(), message)


def test_the_damage_is_what_is_refused(tmp_path):
    """Negative controls: the same files, undamaged, are read."""
    for content in (zipped(_good()), streamed(*_two()), _tensor(size=(2, 12)), _tensor(offset=20, size=(4,))):
        assert "x" in read_bytes(tmp_path, content)
    with pytest.raises(UserError, match=r"no\.pt: no such file"):
        read_torch(tmp_path / "no.pt")
    with pytest.raises(UserError, match="no such file"):
        read_torch(tmp_path)


def test_bombs_are_small(tmp_path):
    """Each asks for far more than a computer has, or for a depth that ends a process."""
    deep = b"]" + b"]" * 60_000 + b"a" * 60_000 + b"."
    found = read_bytes(tmp_path, zipped(members(deep, [])))
    depth = 0
    while found:
        (found,), depth = found, depth + 1
    assert depth == 60_000
    nested = b"}" + b")" + b"\x85" * 60_000 + b"Ns."  # hashing it would overflow the stack of C
    refused(tmp_path, zipped(members(nested, [])), "a key of type tuple")
    far = b"]r\xff\xff\xff\xff."  # a memo as long as its largest index would have 32 GiB
    assert read_bytes(tmp_path, zipped(members(far, []))) == []
    long = b"]q\0(" + b"K\1K\1\x86" * 3000 + b"e0" + b"ccollections\nOrderedDict\nq\x010"
    refused(tmp_path, zipped(members(long + b"h\1h\0\x85R0" * 3000 + b"N.", [])), "far more than it holds")
    big = np.zeros(100_000, np.float32)
    with modules():
        many = members(*dump([Tensor(big, 0, (100_000 - i,)) for i in range(20)]))
    refused(tmp_path, zipped(many), "together are far larger than the file")


# ---- fuzz


def _mutations(content: bytes, count: int, seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at, kind = int(rng.integers(len(data))), rng.integers(5)
            if kind == 0:
                data[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                data[at] = int(rng.integers(256))
            elif kind == 2:
                del data[at : at + int(rng.integers(1, 9))]
            elif kind == 3:
                data[at:at] = bytes(rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8))
            else:
                other = int(rng.integers(len(data)))
                data[at : at + 6] = data[other : other + 6]
        yield bytes(data)


def test_mutations_of_real_files_are_values_or_one_line(tmp_path):
    """Whole files, and pickles inside files whose checksums are right, so that mutations reach the machine."""
    real = {layout: (GOLDEN / f"torch_{layout}.pt").read_bytes() for layout in LAYOUTS}
    with zipfile.ZipFile(io.BytesIO(real["zip"])) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    inner = next(name for name in inside if name.endswith("data.pkl"))
    files = [*_mutations(real["zip"], 300, 1), *_mutations(real["stream"], 500, 2)]
    files += [zipped(inside | {inner: data}) for data in _mutations(inside[inner], 700, 3)]
    values = 0
    for content in files:
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        with quiet():
            try:
                read_torch(path)
                said = ""
            except UserError as error:
                said = str(error)
        values += not said
        assert "\n" not in said
    assert 50 < values < len(files) - 300  # else the mutations say nothing


def test_any_pickle_of_plain_values_is_what_python_reads(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    keys = st.integers() | st.text() | st.tuples(st.integers(), st.text())
    nested = st.recursive(
        plain, lambda x: st.lists(x) | st.tuples(x, x) | st.dictionaries(keys, x) | st.frozensets(keys), max_leaves=20
    )

    @hypothesis.settings(max_examples=100, deadline=None, database=None)
    @hypothesis.given(nested, st.integers(0, 5))
    def check(value, protocol):
        def refuse(*arguments):
            raise AssertionError(arguments)

        encode = {"_codecs.encode": lambda text, how: text.encode(how)}  # how old protocols write bytes
        encode |= {name: lambda *x: x[0] if x else b"" for name in ("__builtin__.bytes", "builtins.bytes")}
        encode |= {name: lambda x: frozenset(x) for name in ("__builtin__.frozenset", "builtins.frozenset")}
        found = Machine(encode, refuse).run(io.BytesIO(pickle.dumps(value, protocol)))
        assert found == value
        assert type(found) is type(value)

    check()


def test_a_flip_is_seen(tmp_path):
    """A change that keeps a zip whole, but not its checksum; with the checksum renewed it is another value."""
    content = zipped(_good())
    new = (X + 1).tobytes()
    assert read_bytes(tmp_path, patched(content, "archive/data/0", new))["x"][0] == 1
    refused(tmp_path, content.replace(X.tobytes(), new), "checksum")

"""Checkpoints as `torch.save` writes them, without torch: in both layouts, well-formed or not."""

import io
import pickle
import sys
import types
import zipfile
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
NAMES = {
    "float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long",
    "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool",
}  # fmt: skip


class Tensor:
    """A view of a flat array; offset, size and stride in elements, and as wrong as a test wants them."""

    def __init__(self, flat: np.ndarray, offset: Any = 0, size: Any = None, stride: Any = None):
        self.flat = flat
        self.size = (flat.size,) if size is None else size
        stride = tuple(int(np.prod(self.size[i + 1 :])) for i in range(len(self.size))) if stride is None else stride
        self.arguments = (Storage(flat), offset, self.size, stride, False, {})

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class Storage:
    def __init__(self, flat: np.ndarray):
        self.flat = flat


def modules(*more: str) -> Any:
    """A patch under which `torch`, and the classes named by `more`, can be pickled."""

    def module(name: str) -> types.ModuleType:
        return found.setdefault(name, types.ModuleType(name))

    def define(where: types.ModuleType, name: str, kind: Any) -> None:
        kind.__module__, kind.__qualname__ = where.__name__, name
        setattr(where, name, kind)

    found: dict[str, types.ModuleType] = {}
    for name in NAMES.values():
        define(module("torch"), f"{name}Storage", type(f"{name}Storage", (), {}))
    define(module("torch._utils"), "_rebuild_tensor_v2", lambda *arguments: None)
    for path in more:
        parent, _, name = path.rpartition(".")
        for i in range(parent.count(".") + 1):
            module(".".join(parent.split(".")[: i + 1]))
        define(module(parent), name, type(name, (), {}))
    return mock.patch.dict(sys.modules, found)


def dump(value: Any, protocol: int = 2) -> tuple[bytes, list[np.ndarray]]:
    """(the pickle of `value`, where arrays become tensors; the flat arrays of their storages)."""
    storages: list[np.ndarray] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, Storage):
                return None
            known = [i for i, flat in enumerate(storages) if flat is obj.flat]
            if not known:
                storages.append(obj.flat)
            kind = getattr(sys.modules["torch"], f"{NAMES[str(obj.flat.dtype)]}Storage")
            return "storage", kind, str(known[0] if known else len(storages) - 1), "cpu", obj.flat.size

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, np.ndarray):
                return Tensor(np.ascontiguousarray(obj).reshape(-1), size=obj.shape).__reduce__()
            return NotImplemented

    stream = io.BytesIO()
    Pickler(stream, protocol).dump(value)
    return stream.getvalue(), storages


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return stream.getvalue()


def members(content: bytes, storages: list[np.ndarray], root: str = "archive") -> dict[str, bytes]:
    """What is in the zip layout."""
    found = {f"{root}/data.pkl": content, f"{root}/byteorder": b"little", f"{root}/version": b"3\n"}
    return found | {f"{root}/data/{i}": flat.tobytes() for i, flat in enumerate(storages)}


def streamed(content: bytes, storages: list[np.ndarray]) -> bytes:
    """The layout before torch 1.6."""
    system = dict(protocol_version=PROTOCOL, little_endian=True, type_sizes=dict(short=2, int=4, long=4))
    parts = [pickle.dumps(head, 2) for head in (MAGIC, PROTOCOL, system)]
    parts += [content, pickle.dumps([str(i) for i in range(len(storages))], 2)]
    return b"".join([*parts, *(len(flat).to_bytes(8, "little") + flat.tobytes() for flat in storages)])


def write(path: Path, value: Any, *, stream: bool = False, classes: tuple[str, ...] = ()) -> Path:
    """`torch.save(value, path)`; instances of `classes` must have been made under `modules` of them."""
    with modules(*classes):
        content, storages = dump(value)
    path.write_bytes(streamed(content, storages) if stream else zipped(members(content, storages)))
    return path


def patched(content: bytes, name: str, new: bytes) -> bytes:
    """A zip with the bytes of one member replaced by as many others, its checksum included."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        old, crc = archive.read(name), archive.getinfo(name).CRC
    assert len(old) == len(new)
    changed = content.replace(old, new, 1)
    return changed.replace(crc.to_bytes(4, "little"), zlib.crc32(new).to_bytes(4, "little"))


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

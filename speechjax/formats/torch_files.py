"""PyTorch checkpoints read without PyTorch, and without running anything in them.

A checkpoint is a pickle beside raw arrays.  `inert_pickle` reads the one; here are the arrays, and where things are in
the two layouts of `torch.save`: the zip of torch 1.6 and later, and the stream of pickles before it.  Arrays are
read-only views of the file where they can be, so that an optimizer's state that nobody asks for costs no memory.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from speechjax.errors import UserError
from speechjax.formats.inert_pickle import BROKEN, LIMIT, DamagedError, Machine, Stub, one_line, text

_STORAGES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_MAGIC = 0x1950A86A20F9469CFC6C  # what the older layout begins with
_PROTOCOL = 1001  # of the older layout, the only one there was
_TENSORS = 8  # times the file's size: what all tensors together may have, as if each had an array of its own

Storage = Callable[[str, np.dtype, int], np.ndarray | None]  # flat array of (key, type, count), if it is known yet


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote to `path`: nested dicts, lists and tuples with NumPy arrays and `Stub`s in them.

    Arrays have the types and shapes of their tensors; bfloat16 is that of ml_dtypes.  Those that share a storage share
    memory, and may be read-only.  Tensors of types that NumPy lacks are stubs.  Raises UserError for a file that is
    missing, damaged, of another kind, or that asks for more memory than it can need.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if not path.stat().st_size:
            raise DamagedError("it is empty")
        data = np.memmap(path, np.uint8, mode="r")
        return _read_zip(path, data) if data[:2].tobytes() == b"PK" else _read_stream(data)
    except DamagedError as error:
        raise UserError(f"{path} is damaged or no PyTorch checkpoint ({error}); get it anew") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _read_zip(path: Path, data: np.ndarray) -> Any:
    """The layout since torch 1.6: `NAME/data.pkl` and a member `NAME/data/KEY` for every storage, uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except (*BROKEN, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DamagedError(f"a zip that is cut off or broken: {one_line(error)}") from None
    roots = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise DamagedError("a zip without data.pkl")
    root = roots[0]
    if f"{root}constants.pkl" in members:
        raise UserError(f"{path} is a TorchScript program; save the state_dict() of what it was made from")
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members.values()):
        raise UserError(f"{path} was packed anew, with compression, which torch.save never does; pack it with `zip -0`")
    if sum(member.file_size for member in members.values()) > data.size:
        raise DamagedError("its members are larger than the file")
    if (order := members.get(f"{root}byteorder")) and _member(data, order).tobytes() != b"little":
        raise DamagedError("its numbers are big-endian")
    pickle = _member(data, members[f"{root}data.pkl"])
    if pickle.size > LIMIT:
        raise DamagedError(f"a pickle of {pickle.size} bytes")
    found: dict[str, np.ndarray] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if key not in found:
            if f"{root}data/{key}" not in members:
                raise DamagedError(f"storage {key[:20]!r} is missing")
            found[key] = _member(data, members[f"{root}data/{key}"])
        if count * dtype.itemsize > found[key].size:
            raise DamagedError(f"storage {key[:20]!r} is cut off")
        return found[key][: count * dtype.itemsize].view(dtype)

    return _Tensors(storage, data.size).read(io.BytesIO(pickle.tobytes()))


def _member(data: np.ndarray, member: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of a zip's member, a view; their checksum in the zip is verified."""
    name = repr(member.filename[-40:])
    header = data[member.header_offset : member.header_offset + 30].tobytes()  # the fixed part of a local header
    if len(header) != 30 or header[:4] != b"PK\3\4":
        raise DamagedError(f"{name} is not where the zip says")
    start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    content = np.asarray(data[start : start + member.file_size])
    if content.size != member.file_size or zlib.crc32(content.data) != member.CRC:
        raise DamagedError(f"the checksum of {name} does not match")
    return content


def _read_stream(data: np.ndarray) -> Any:
    """The layout before torch 1.6: five pickles, and then every storage as its length and its bytes.

    The value comes before the storages that its tensors are in, so it is read twice: for what storages there are, and
    once it is known where.
    """
    position = 0
    wanted: dict[str, np.dtype] = {}
    places: dict[str, np.ndarray] = {}

    def note(key: str, dtype: np.dtype, count: int) -> None:
        if wanted.setdefault(key, dtype) != dtype:
            raise DamagedError(f"storage {key[:20]!r} has two types")

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if key not in places or count > places[key].size:
            raise DamagedError(f"storage {key[:20]!r} is missing or cut off")
        return places[key][:count]

    def pickle(storage: Storage) -> Any:
        nonlocal position
        stream = io.BytesIO(data[position : position + LIMIT].tobytes())
        value = _Tensors(storage, data.size).read(stream)
        position += stream.tell()
        return value

    try:
        first = pickle(note)
    except DamagedError:
        first = None
    if type(first) is not int or first != _MAGIC:
        raise DamagedError("neither a zip nor the older layout of torch.save")
    version, system = pickle(note), pickle(note)
    if type(version) is not int or version != _PROTOCOL:
        raise DamagedError("of an unknown version")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise DamagedError("its numbers are big-endian")
    start = position
    pickle(note)
    keys = pickle(note)
    if not isinstance(keys, list) or any(type(key) is not str or key not in wanted for key in keys):
        raise DamagedError("its list of storages is broken")
    for key in keys:
        size = int.from_bytes(data[position : position + 8].tobytes(), "little") * wanted[key].itemsize
        content = np.asarray(data[position + 8 : position + 8 + size])
        if content.size != size:
            raise DamagedError(f"it is cut off in storage {key[:20]!r}")
        places[key] = content.view(wanted[key])
        position += 8 + size
    position = start
    return pickle(storage)


class _Tensors:
    """Reads pickles with tensors, which lie in what `storage` gives; `size` is that of the file in bytes."""

    def __init__(self, storage: Storage, size: int):
        self._storage, self._left = storage, _TENSORS * size

    def read(self, stream: io.BytesIO) -> Any:
        """The value of the pickle that `stream` is at; raises DamagedError."""
        calls: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
            "torch._tensor._rebuild_from_type_v2": self._of_type,
        }
        return Machine(calls, self._typed).run(stream)

    def _typed(self, identity: Any) -> tuple[np.ndarray | Stub | None]:
        """The storage of an identity ("storage", its type, key, device, count, ...), in a tuple: it is no tensor."""
        kind, kept_as, key, _, count, *view = identity
        if kind != "storage" or not isinstance(kept_as, Stub):
            raise DamagedError("its pickle has what is neither inside it nor a storage")
        if kept_as.name not in _STORAGES:  # complex, quantized or of 8 bits
            return (kept_as,)
        if view and view[0] is not None:
            raise DamagedError("it has views of storages, as before torch 0.4; save it again with a later one")
        return (self._storage(text(key), _STORAGES[kept_as.name], *_counts([count])),)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray | Stub:
        """The tensor at `offset` of a storage, which must hold all of it; offset and strides in elements.

        Of a type that NumPy lacks, a stub.
        """
        (flat,) = storage
        if isinstance(flat, Stub):
            return flat
        (offset,), size, stride = _counts([offset]), _counts(size), _counts(stride)
        if flat is None:
            return np.zeros(0)
        total = prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if total and (last >= flat.size or total > flat.size):
            raise DamagedError(f"a tensor of shape {size} does not fit its storage of {flat.size}")
        self._left -= total * flat.itemsize
        if self._left < 0:
            raise DamagedError("its tensors together are far larger than the file")
        if not total:
            return np.zeros(size, flat.dtype)
        steps = [step * flat.itemsize for step in stride]
        array = np.lib.stride_tricks.as_strided(flat[offset:], size, steps, writeable=False)
        # Copies only what was transposed or repeated: safetensors writes such views wrongly, without a word.
        return np.asarray(array, order="C")

    def _of_type(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor with attributes of its own: without them."""
        if not isinstance(function, Stub) or not function.name.startswith("torch._utils._rebuild_tensor"):
            raise DamagedError(f"it has tensors of the kind {getattr(kind, 'name', '?')[:60]!r}")
        return self._tensor(*arguments)


def _counts(values: Any) -> tuple[int, ...]:
    """`values`, if they are a few counts; raises DamagedError."""
    if isinstance(values, Stub) and values.name == "torch.Size" and values.args:
        values = values.args[0]
    if not isinstance(values, (list, tuple)) or len(values) > 32 or any(type(v) is not int for v in values):
        raise DamagedError("the size of a tensor is not made of counts")
    if any(not 0 <= v < 1 << 48 for v in values):
        raise DamagedError("the size of a tensor is out of bounds")
    return tuple(values)

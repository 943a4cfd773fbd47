"""Arrays in a safetensors file, with a JSON text that says what they are and a digest of both.

One way to write and to read for every file of this project that holds arrays: whatever is wrong with a file ends in one
clear line.  Nothing in it is executed.  The library is the extra `speechjax[export]`, imported when first needed.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.errors import UserError

_FORMAT, _CONTENT = "format", "content"  # what this module adds to the JSON text


@dataclass(frozen=True)
class Kind:
    """A kind of file: what a person calls it ("an adapter"), where its JSON text is among the metadata, its formats.

    `format` is what is written, and counts up when older code would misread it; `reads` are those still understood.
    """

    noun: str
    key: str
    format: int
    reads: tuple[int, ...]


def digest(arrays: Mapping[str, Any], header: Any = None) -> str:
    """SHA-256 of arrays, their names, shapes and types, and of a JSON value."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        sha.update(json.dumps([name, array.shape, str(array.dtype)]).encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def write_arrays(path: Path, kind: Kind, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Writes arrays {name: array} and a JSON `header`; readers see the old file or the new one, never a part."""
    library = safetensors()
    # safetensors writes the memory of an array that is a view, whatever its strides.  Not ascontiguousarray, which
    # makes vectors of scalars.
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    text = {_FORMAT: kind.format, **header}
    text[_CONTENT] = digest(whole, text)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # One key: the order of several is another one in every process.
        library.numpy.save_file(whole, partial, metadata={kind.key: json.dumps(text)})
        partial.replace(path)
    except library.SafetensorError as error:
        raise UserError(f"cannot write {path}: {_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_arrays(path: Path, kind: Kind) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_arrays` wrote, names sorted: ({name: array}, header), the header with its "format".

    Raises UserError where the file is missing, damaged, of another kind or of a format that is not read.
    """
    library = safetensors()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with library.safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[kind.key])
            version = header[_FORMAT]
            known = version in kind.reads
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())} if known else {}
    except (KeyError, TypeError):
        raise UserError(f"{path} is not {kind.noun} of speechjax") from None
    except (library.SafetensorError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({_line(error)}); get it anew") from error
    if not known:
        formats = " and ".join(map(str, kind.reads))
        raise UserError(f"{path} has format {version}, this version reads {formats}; use the one that wrote it")
    if header.pop(_CONTENT, None) != digest(arrays, header):
        raise UserError(f"{path} is damaged: its digest does not match its contents; get it anew")
    return arrays, header


def safetensors() -> Any:
    """The library; UserError where it is not installed."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UserError("safetensors is not installed: run `pip install 'speechjax[export]'`") from None
    return safetensors


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

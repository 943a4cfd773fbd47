"""Adapters in files of their own: one safetensors file that holds what learnt and says what it learnt on.

Its arrays are named by their paths in a task, `encoder/...` and, of a head, what else there is.  One JSON text beside
them holds the blocks of `config.model.adapters`, the digest of the encoder they were trained on (all that did not
learn), and `about`: anything for people and programs to know.  Nothing in it is executed.  The library is the extra
`speechjax[export]`, imported when first needed.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from speechjax.errors import UserError
from speechjax.models.adapters import ADAPTER_LEAF, blocks_of, parse, trainable_pattern

FORMAT = 1  # count up when older code would misread it
_KEY = "speechjax_adapter"  # of the JSON text among a file's metadata
_SAID = ("adapters", "base", "head", "about")  # in it, beside format and digest


class AdapterFile(NamedTuple):
    """`adapters` are blocks with all their options, `leaves` {path: array}; `base` is the digest of the base.

    `head` says what `leaves` holds beside the encoder's: "none", "part" of a head or a "whole" one.
    """

    path: Path
    adapters: list[dict[str, Any]]
    leaves: dict[str, np.ndarray]
    base: str
    head: str
    about: dict[str, Any]


def base_digest(params: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the encoder in a task's `params`: of all that does not learn with `adapters`."""
    learns = re.compile(trainable_pattern(adapters))
    flat = flatten_dict(dict(params), sep="/")
    return _sha({
        name: leaf for name, leaf in flat.items()
        if name.startswith("encoder/") and not learns.search(name) and not re.search(ADAPTER_LEAF, name)
    })  # fmt: skip


def save_adapter(
    path: Path,
    params: Mapping[str, Any],
    adapters: Sequence[Mapping[str, Any]],
    *,
    include: str = "",
    about: Mapping[str, Any],
) -> AdapterFile:
    """Writes what learnt with `adapters` of a task's `params`, and the head's leaves whose paths fit regex `include`.

    `about` must be JSON.  Raises UserError where an adapter or the head is not among the parameters.
    """
    library, found = _library(), parse(adapters)
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(dict(params), sep="/").items()}
    encoder = {name for name in flat if name.startswith("encoder/")}
    if absent := [a for a in found if a.sites() and not any(re.search(a.own, name) for name in encoder)]:
        raise UserError(f"{absent[0]} is not among the parameters")
    learnt = {name for name in encoder if re.search(trainable_pattern(adapters), name)}
    head = flat.keys() - encoder
    kept = {name for name in head if include and re.search(include, name)}
    if include and not kept:
        raise UserError(f"--include={include} fits nothing of the head; there are {', '.join(sorted(head)) or 'none'}")
    leaves = {name: flat[name] for name in sorted(learnt | kept)}
    which = "none" if not kept else "whole" if kept == head else "part"
    file = AdapterFile(path, blocks_of(found), leaves, base_digest(params, adapters), which, dict(about))
    header: dict[str, Any] = {"format": FORMAT} | {key: getattr(file, key) for key in _SAID}
    header["content"] = _sha(leaves, header)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(library.numpy.save(leaves, metadata={_KEY: json.dumps(header)}))
    partial.replace(path)
    return file


def load_adapter(path: Path) -> AdapterFile:
    """What `save_adapter` wrote; UserError where the file is missing, damaged, of another kind or another format."""
    library = _library()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with library.safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            leaves = {name: file.get_tensor(name) for name in sorted(file.keys())}
        version = header["format"]
    except (KeyError, TypeError):
        raise UserError(f"{path} is not an adapter of speechjax") from None
    except (library.SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({_line(error)}); get it anew") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}; use the one that wrote it")
    if header.pop("content", None) != _sha(leaves, header):
        raise UserError(f"{path} is damaged: its digest does not match its contents; get it anew")
    return AdapterFile(path, leaves=leaves, **{key: header[key] for key in _SAID})


def attach(params: Mapping[str, Any], files: Sequence[AdapterFile]) -> dict[str, Any]:
    """A task's `params` with what the files hold, in their order; those of the base, or with fresh adapters in place.

    A whole head takes the place of the head of `params`; parts of one must be there.  Raises UserError for an adapter
    of another base, for shapes that do not fit, and for two files of whole heads or adapters of one name.
    """
    parse([block for file in files for block in file.adapters])
    whole = [file for file in files if file.head == "whole"]
    if len(whole) > 1:
        raise UserError(f"{whole[0].path} and {whole[1].path} both bring a head; save one of them without --include")
    flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
    if whole:
        flat = {name: leaf for name, leaf in flat.items() if name.startswith("encoder/")}
    for file in files:
        ours = base_digest(params, file.adapters)
        if ours != file.base:
            raise UserError(
                f"{file.path} was trained on another encoder: on {file.base[:16]}, and this one is {ours[:16]}"
            )
        for name, leaf in file.leaves.items():
            _check(file, flat, name, leaf)
            flat[name] = leaf
    return unflatten_dict(flat, sep="/")


def _check(file: AdapterFile, flat: Mapping[str, Any], name: str, leaf: np.ndarray) -> None:
    """UserError unless `leaf` takes the place of one of its shape, or is new in a module that is there."""
    if name in flat:
        if flat[name].shape != leaf.shape:
            raise UserError(f"{file.path} has {name} of shape {leaf.shape}, this model of {flat[name].shape}")
        return
    module = name.rpartition("/")[0] + "/"
    is_new = any(other.startswith(module) for other in flat) if name.startswith("encoder/") else file.head == "whole"
    if not is_new:
        raise UserError(f"{file.path} has {name}, for which this model has no place")


def _sha(leaves: Mapping[str, Any], header: Any = None) -> str:
    """SHA-256 of arrays, their names, shapes and types, and of a JSON value."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(leaves):
        leaf = np.asarray(leaves[name])
        sha.update(json.dumps([name, leaf.shape, str(leaf.dtype)]).encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _library() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UserError("safetensors is not installed: run `pip install 'speechjax[export]'`") from None
    return safetensors

"""A trained model in a folder of plain files: one safetensors file, the config of its run, its vocabularies.

`model.safetensors` holds parameters and state by their paths, `params/encoder/projection/kernel`, as float32, bfloat16,
float16 or int8 (see quantize.py); its JSON text has the SHA-256 of the files beside it.  `speechjax.json` says what was
trained and how.  Reading executes nothing and needs neither TensorFlow nor the machine that trained the model.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from speechjax import config as configs
from speechjax import runs
from speechjax.adapter_files import VOCABULARIES, read_vocabulary, write_vocabulary
from speechjax.errors import UserError
from speechjax.formats.arrays import Kind, read_arrays, write_arrays
from speechjax.formats.quantize import dequantize, quantize
from speechjax.logs import replace_file

MODEL, ABOUT = "model.safetensors", "speechjax.json"
DTYPES = ("float32", "bfloat16", "float16", "int8")
_KIND = Kind("a model", "speechjax_model", 1, (1,))
_WEIGHTS = ("params/", "teacher/")  # what `dtype` is about; other state counts, sums or normalises in float32


@dataclass(frozen=True, eq=False)
class Flat:
    """A model as its run had it: config, parameters and state on the host, float32, whatever they were stored as.

    `vocabulary`: {name of a file: its bytes}, see adapter_files.py.  `about` is {"step", "digest" (of the checkpoint),
    "dtype" (of the file)}.
    """

    folder: Path
    config: ConfigDict
    task: Any
    params: dict[str, Any]
    extra: dict[str, Any]
    vocabulary: dict[str, bytes]
    about: dict[str, Any]


def write(run: runs.Run, folder: Path, *, dtype: str) -> Path:
    """Writes all of a trained model into `folder`, weights as `dtype`; the path of its safetensors file.

    float32 comes back bit for bit.  Raises UserError for other types than `DTYPES`, and for weights beyond float16.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: choose {', '.join(DTYPES)}")
    about = dict(step=run.step, digest=run.digest, dtype=dtype)
    variables: dict[str, Any] = flatten_dict(jax.tree.map(np.asarray, dict(run.variables)), sep="/")
    arrays = _stored(variables, dtype)
    content = {"format": _KIND.format, "about": about, "config": configs.to_json(run.config)}
    files = {ABOUT: json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"}
    vocabulary = read_vocabulary(run.workdir)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in (files | vocabulary).items()}
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / ABOUT, files[ABOUT])
    write_vocabulary(folder, vocabulary)
    # Last: until it is there, or where it is another's, the folder is refused.
    write_arrays(folder / MODEL, _KIND, arrays, {"about": about, "files": hashes})
    return folder / MODEL


def read(folder: Path) -> Flat:
    """What `write` wrote.

    Raises UserError where a file is missing, damaged, of another kind or format, or belongs to another model, and where
    the weights are not those of the config.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that `python -m speechjax.export` wrote")
    arrays, header = read_arrays(folder / MODEL, _KIND)
    files = _beside(folder, header)
    try:
        content = json.loads(files.pop(ABOUT))
        config = runs.config_of(content["config"], str(folder / ABOUT))
        configs.check(config)
        task = configs.make_task(config)
        about = {key: header["about"][key] for key in ("step", "digest", "dtype")}
        variables = dequantize({name: _float32(array) for name, array in arrays.items()})
        params = variables.pop("params")
    except (KeyError, TypeError, ValueError, IndexError, RecursionError, AttributeError) as error:
        raise UserError(f"{folder} is not what speechjax wrote ({error}); export the run anew") from error
    if difference := unlike(task, params, variables):
        raise UserError(f"{folder / MODEL} is not the model of {ABOUT}: {difference}; export the run anew")
    return Flat(folder, config, task, params, variables, files, about)


def _stored(variables: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Arrays as they are in the file, {path: array}."""
    weights = {name: leaf for name, leaf in variables.items() if name.startswith(_WEIGHTS)}
    if dtype == "int8":
        return {**variables, **quantize(unflatten_dict(weights, sep="/"))}
    if dtype == "float32":
        return dict(variables)
    kind, found = jnp.dtype(dtype), dict(variables)
    for name, leaf in weights.items():
        if leaf.dtype == np.float32:
            if dtype == "float16" and np.abs(leaf).max(initial=0) > np.finfo(np.float16).max:
                raise UserError(f"{name} has values beyond 65504, which float16 cannot hold: use bfloat16")
            found[name] = leaf.astype(kind)
    return found


def _float32(array: np.ndarray) -> np.ndarray:
    is_short = array.dtype in (jnp.dtype("bfloat16"), np.dtype("float16"))
    return array.astype(np.float32) if is_short else array


def _beside(folder: Path, header: Mapping[str, Any]) -> dict[str, bytes]:
    """{name: bytes} of the files that belong to the model; UserError where one is missing or another."""
    hashes = header.get("files")
    if not isinstance(hashes, dict) or ABOUT not in hashes or (hashes.keys() - {ABOUT, *VOCABULARIES}):
        raise UserError(f"{folder / MODEL} does not say what belongs to it; export the run anew")
    found = {}
    for name, sha in hashes.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: copy the whole folder")
        found[name] = (folder / name).read_bytes()
        if hashlib.sha256(found[name]).hexdigest() != sha:
            raise UserError(f"{folder / name} is damaged, or of another model than {MODEL}: copy the whole folder anew")
    return found


def unlike(task: Any, params: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """Which array is not what `task` needs to answer, in words; "" where all are, and the encoder has no others."""
    if "encoder" not in params:
        return "" if "token_decoder" in params else "there is no encoder"  # a language model does not listen
    hop, more = task.encoder.frame_len()
    batch = dict(audio=jnp.zeros((1, 64 * hop + more)), lengths=jnp.full(1, 64 * hop + more, jnp.int32))
    method = "answer" if hasattr(task, "answer") else "features"
    rngs = dict.fromkeys(("params", *task.rngs), jax.random.key(0))
    shapes: Any = jax.eval_shape(lambda: task.init(rngs, batch, method=method))
    flat: dict[str, Any] = flatten_dict(shapes, sep="/")
    wanted = {name: leaf for name, leaf in flat.items() if not name.startswith("sums/")}
    there: dict[str, Any] = flatten_dict({"params": params, **extra}, sep="/")
    if missing := sorted(wanted.keys() - there.keys()):
        return f"there is no {missing[0]}, which the config asks for"
    if strange := sorted(name for name in there if name.startswith("params/encoder/") and name not in wanted):
        return f"there is {strange[0]}, for which the config has no place"
    for name, like in wanted.items():
        array = there[name]
        if (array.shape, array.dtype) != (like.shape, like.dtype):
            return f"{name} is {array.dtype} {array.shape}, and the config asks for {like.dtype} {like.shape}"
    return ""

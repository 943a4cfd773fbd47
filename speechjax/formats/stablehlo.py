"""StableHLO: a program for CPUs, GPUs and TPUs that runs without the code that made it.

Shapes: B batch, S samples.

A folder has the program with B and S still open, `model.stablehlo`, its weights in `weights.safetensors`, and
`serving.json`.  The program is what `jax.export` serialises, readable by later versions of JAX for at least half a
year, and by what else reads StableHLO.  Its arguments are the weights by name, audio and lengths.
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from speechjax.errors import UserError
from speechjax.formats.arrays import Kind, read_arrays, write_arrays
from speechjax.formats.serving import Loaded, checked, open_served, read_about, shapes_of, symbols, write_about

KIND = "stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAM, _WEIGHTS = "model.stablehlo", "weights.safetensors"
_ARRAYS = Kind("weights of a served model", "speechjax_served", 1, (1,))


def write(run: Any, folder: Path, *, dtype: str = "float32") -> Path:
    """Writes what `run` answers into `folder`, which is made; the path of the program.

    `dtype`: see `open_served`.  Attention is XLA's, which all platforms have.  Raises UserError as that does, and
    where a library is missing.
    """
    _check_flatbuffers()
    served = open_served(run, dtype=dtype)
    program = export.export(jax.jit(served.answer), platforms=PLATFORMS)(shapes_of(served.weights), *symbols())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _PROGRAM).write_bytes(program.serialize())
    write_arrays(folder / _WEIGHTS, _ARRAYS, served.weights, {})
    write_about(folder, KIND, served, platforms=PLATFORMS)
    return folder / _PROGRAM


def load(folder: Path) -> Loaded:
    """The function that `write` left in `folder`, on JAX's first device; UserError where it cannot be read."""
    _check_flatbuffers()
    read_about(folder, KIND)
    weights, _ = read_arrays(folder / _WEIGHTS, _ARRAYS)
    try:
        program = export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
        wanted = jax.tree.unflatten(program.in_tree, program.in_avals)[0][0]
    except Exception as error:  # whatever a reader of foreign bytes raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{folder / _PROGRAM} cannot be read ({reason}); export the run anew") from error
    if {n: (x.shape, x.dtype) for n, x in wanted.items()} != {n: (x.shape, x.dtype) for n, x in weights.items()}:
        raise UserError(f"{folder}: {_WEIGHTS} are not those of {_PROGRAM}; export the run anew")
    weights, answer = jax.device_put(weights), jax.jit(program.call)

    def call(audio: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(x) for name, x in answer(weights, *checked(audio, lengths)).items()}

    return call


def _check_flatbuffers() -> None:
    """UserError where it is not installed: jax.export serialises with it, but does not depend on it."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("flatbuffers is not installed: run `pip install 'speechjax[export]'`")

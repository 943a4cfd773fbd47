"""What a trained run answers to raw audio, as one pure function, and what folders that hold it say about it.

Shapes: B batch, S samples, T frames, V classes.

All formats hold the same function: `answer(weights, audio, lengths)` of float32 [B, S] in [-1, 1] at 16 kHz and int32
[B], the valid samples of each row.  Tasks with a head answer what they answer anywhere (logits, scores, embeddings,
...), others the last frames of their encoder.  Seq2seq and transducer runs give the frames that their searches begin
with, and logits of CTC where they have learnt it: finding a text token by token is not one function.  The front end is
inside, and any B and S will do.

A folder of any format has a `serving.json` that says all this to people and programs, with the SHA-256 of every other
file.  Reading it executes nothing.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import core, export

from speechjax.adapter_files import read_vocabulary, write_vocabulary
from speechjax.errors import UserError
from speechjax.formats.quantize import dequantize, quantize
from speechjax.models.positions import FRAMES_PER_ROW
from speechjax.paths import unstacked

SAMPLE_RATE = 16000
FORMAT = 1  # of serving.json: count up when older code would misread it
ABOUT = "serving.json"
DTYPES = ("float32", "bfloat16", "int8")
_LONGEST_ABOUT = 1 << 24  # bytes

# What users call: float32 [B, S], int32 [B] -> arrays by name.
Loaded = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Served:
    """`answer(weights, audio, lengths)` -> arrays by name; `weights` are flat, "a/b/c": only those that it uses.

    `about` is JSON: where it comes from, what goes in and what comes out.  `vocabulary`: see adapter_files.py.
    """

    answer: Callable[[Mapping[str, Any], jax.Array, jax.Array], dict[str, jax.Array]]
    weights: dict[str, np.ndarray]
    about: dict[str, Any]
    vocabulary: dict[str, bytes]


def serve(task: Any) -> Callable[[Any, jax.Array, jax.Array], dict[str, jax.Array]]:
    """What `task` answers: (variables, float32 [B, S], int32 [B]) -> {name: [B, ...]}, with any B and S.

    Audio is padded to whole rows of the positions' convolution, which `lengths` hide; answers have the frames of S
    samples again.  Their `lengths`, where there are frames, are int32 [B].  What lets rows depend on each other
    (`leaky`) is left out: a row is answered as if it were alone.
    """
    encoder = task.encoder
    alone = {
        part: {key: value for key, value in dict(getattr(encoder, part)).items() if key != "leaky"}
        for part in ("frontend", "positions")
    }
    task = task.clone(encoder=encoder.clone(remat=False, **alone))
    method = "answer" if hasattr(task, "answer") else "features"
    hop, extra = encoder.frame_len()
    grain, tokens = hop * FRAMES_PER_ROW, encoder.tokens()

    def answer(variables: Any, audio: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
        S = audio.shape[1]
        # All shapes inside are then multiples of one symbolic number, and nothing about them is left to prove.
        whole = (S + grain - 1) // grain * grain
        batch = {
            "audio": jnp.pad(audio, ((0, 0), (0, whole + extra - S))),
            "lengths": jnp.clip(lengths, 0, jnp.asarray(S, jnp.int32)),
        }
        found = task.apply(variables, batch, method=method)
        if method == "features":
            found = {"frames": found.frames, "lengths": found.lengths}
        frames = core.max_dim(S - extra, 0) // hop * tokens
        has_frames = lambda x: x.ndim > 2 and x.shape[1] == whole // hop * tokens  # noqa: E731
        return {name: x[:, :frames] if has_frames(x) else x for name, x in found.items()}

    return answer


def open_served(run: Any, *, dtype: str = "float32", unroll: bool = False) -> Served:
    """What `run` (see runs.py) answers, its weights stored as `dtype`; answers are float32 whatever it is.

    "bfloat16" computes in bfloat16 too, as training in it does; "int8", with a scale for every output channel,
    computes in float32.  `unroll`: layers that are stacked become single ones.  Raises UserError for other types and
    for a run that does not listen.
    """
    if run.config.task.name == "language_model":
        raise UserError(f"{run.workdir} is a language model, which does not listen: there is nothing to serve")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
    variables: dict[str, Any] = flatten_dict(jax.tree.map(np.asarray, dict(run.variables)), sep="/")
    encoder = run.task.encoder.clone(dtype="bfloat16" if dtype == "bfloat16" else "float32")
    if unroll and encoder.scan:
        encoder = encoder.clone(scan=False)
        variables = unstacked(variables)
    whole = serve(run.task.clone(encoder=encoder))
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in variables.items()}

    def answer(given: Mapping[str, Any], audio: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
        # Modules look for all of their parameters, also for those without effect.
        others = {name: jnp.zeros(*shapes[name]) for name in shapes.keys() - given.keys()}
        wide = {name: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for name, x in given.items()}
        found = whole(dequantize(others | wide), audio, lengths)
        return {k: v.astype(jnp.float32) if jnp.issubdtype(v.dtype, jnp.floating) else v for k, v in found.items()}

    used = _used(answer, variables)
    weights = _packed({name: leaf for name, leaf in variables.items() if name in used}, dtype)
    vocabulary = read_vocabulary(run.workdir)
    hop, extra = run.task.encoder.frame_len()
    about = dict(
        task=run.config.task.name, step=run.step, digest=run.digest, dtype=dtype, sample_rate=SAMPLE_RATE, hop=hop,
        extra=extra, inputs={"audio": ["float32", ["B", "S"]], "lengths": ["int32", ["B"]]},
        outputs=_outputs(answer, weights), tokens=_tokens(vocabulary),
    )  # fmt: skip
    return Served(answer, weights, about, vocabulary)


def symbols() -> tuple[Any, Any]:
    """(audio, lengths) of any number of rows and samples, at least one, to trace an answer with."""
    B, S = export.symbolic_shape("B, S", constraints=("B >= 1", "S >= 1"))
    return jax.ShapeDtypeStruct((B, S), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """What arrays are traced by."""
    return {name: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for name, leaf in arrays.items()}


def write_about(folder: Path, kind: str, served: Served, **more: Any) -> None:
    """Finishes a folder: vocabularies, and `serving.json` over all files that are there, with what else is to say."""
    write_vocabulary(folder, served.vocabulary)
    files = {name: _sha(folder / name) for name in _files(folder)}
    about = {"format": FORMAT, "kind": kind, **served.about, **more, "files": files}
    (folder / ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_about(folder: Path, kind: str) -> dict[str, Any]:
    """What `write_about` wrote; UserError where it is missing, of another kind or format, or a file is not the same."""
    file = folder / ABOUT
    try:
        if file.stat().st_size > _LONGEST_ABOUT:
            raise ValueError
        about = json.loads(file.read_text(encoding="utf-8"))
        found, version, files = about["kind"], about["format"], dict(about["files"])
        if not all(isinstance(x, str) for x in (found, *files, *files.values())):
            raise TypeError
    except OSError as error:
        raise UserError(f"{folder}: not a model to serve ({ABOUT}: {error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file} is damaged, or not of speechjax; export the run anew") from None
    if version != FORMAT:
        raise UserError(f"{file} has format {version}, this version reads {FORMAT}; export the run anew")
    if found != kind:
        raise UserError(f"{folder} holds {found}, not {kind}")
    there = set(_files(folder))
    for name, sha in files.items():
        if name not in there:
            raise UserError(f"{folder}: {name} is missing; copy or export it anew")
        if _sha(folder / name) != sha:
            raise UserError(f"{folder / name} is damaged: it is not what {ABOUT} says; copy or export it anew")
    return about


def checked(audio: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
    """float32 [B, S] and int32 [B] of what a user gave; UserError for other shapes, types and lengths beyond S."""
    audio, lengths = np.asarray(audio), np.asarray(lengths)
    if audio.ndim != 2 or 0 in audio.shape or not np.issubdtype(audio.dtype, np.floating):
        raise UserError(f"audio must be float [B, S] in [-1, 1], not {audio.dtype} {list(audio.shape)}")
    if lengths.shape != audio.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise UserError(f"lengths must be int [B={len(audio)}], not {lengths.dtype} {list(lengths.shape)}")
    if lengths.min() < 0 or lengths.max() > audio.shape[1]:
        raise UserError(f"lengths must lie between 0 and S={audio.shape[1]}, not {lengths.min()} and {lengths.max()}")
    return audio.astype(np.float32), lengths.astype(np.int32)


def _packed(weights: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Weights as they are stored.  What is small stays as it is: biases, norms, gains."""
    if dtype == "int8":
        return quantize(unflatten_dict(dict(weights), sep="/"))
    small = lambda leaf: leaf.ndim < 2 or leaf.dtype != np.float32 or dtype == "float32"  # noqa: E731
    return {name: leaf if small(leaf) else leaf.astype(jnp.bfloat16) for name, leaf in weights.items()}


def _used(answer: Any, weights: Mapping[str, np.ndarray]) -> set[str]:
    """Names of the weights that the answer depends on: not masks, decoders, or what only a loss knows."""
    audio, lengths = jax.ShapeDtypeStruct((1, SAMPLE_RATE), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    exported = export.export(jax.jit(answer))(shapes_of(weights), audio, lengths)
    names = sorted(weights)  # as arguments are flattened
    return {names[i] for i in exported.module_kept_var_idx if i < len(names)}


def _outputs(answer: Any, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{name: [dtype, shape]}, where "B" is the rows and "T" the frames."""
    audio, lengths = symbols()
    found = jax.eval_shape(answer, shapes_of(weights), audio, lengths)
    named = lambda i, dim: "B" if i == 0 else dim if isinstance(dim, int) else "T"  # noqa: E731
    return {name: [str(x.dtype), [named(i, dim) for i, dim in enumerate(x.shape)]] for name, x in found.items()}


def _tokens(vocabulary: Mapping[str, bytes]) -> list[str]:
    """What the classes of `logits` are; CTC's blank is the first."""
    return json.loads(vocabulary["vocab.json"])["tokens"] if "vocab.json" in vocabulary else []


def _files(folder: Path) -> list[str]:
    """Names of the files in `folder`, however deep, but for `serving.json`."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != ABOUT)


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Folders of `transformers`: written so that `from_pretrained` loads them with no code but its own, and read.

A folder has config.json, model.safetensors, what processors and tokenizers need, and README.md, its model card.  What
their classes have no place for, heads of objectives and the config of the run, is in speechjax.json and
speechjax.safetensors beside: with these the way back loses nothing.  Reading executes nothing.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from speechjax import config as configs
from speechjax import runs
from speechjax.adapter_files import read_vocabulary
from speechjax.errors import UserError
from speechjax.formats.card import card
from speechjax.formats.families import FAMILIES, Family, complete, family_of
from speechjax.formats.heads import Head, head_named, head_of
from speechjax.formats.hf_words import write_labels, write_words
from speechjax.formats.names import Arrays, Row, modern, to_theirs
from speechjax.logs import replace_file
from speechjax.paths import unstacked

log = logging.getLogger("speechjax")

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS, REST = "model.safetensors", "speechjax.safetensors"
OURS = "speechjax.json"  # beside speechjax.safetensors
FORMAT = 1  # of these two: count up when older code would misread them
_ABOUT_CTC = ("vocab.json", "tokenizer_config.json", "added_tokens.json")


@dataclass(frozen=True, eq=False)
class Folder:
    """A folder as it was read: `hf` is the completed configuration, `state` names to arrays without their prefix.

    `head` is None for an encoder alone.  `files` are those of the vocabulary; `ours` is what speechjax.json says and
    `rest` the arrays beside it, where a run of ours was written here.
    """

    family: Family
    head: Head | None
    hf: dict[str, Any]
    state: Arrays
    files: dict[str, bytes]
    ours: dict[str, Any]
    rest: Arrays


def rows(family: Family, head: Head | None, model: Mapping[str, Any], task: Mapping[str, Any]) -> Iterator[Row]:
    """All rows of a model: the encoder's without a prefix, then the head's."""
    yield from family.encoder(model, "")
    if head:
        yield from head.rows(task, model["width"])


def prefixed(family: Family, head: Head | None, name: str, encoder: set[str]) -> str:
    """Where `name` of `rows` is in a model: encoders within models with heads have their family's prefix."""
    return family.prefix + name if head and name in encoder else name


# ---------------------------------------------------------------------------------------------- writing


def write(run: Any, folder: Path, *, dtype: str = "float32", family: str = "", encoder_only: bool = False) -> Path:
    """Writes `run` (see runs.py) into `folder`; the path of its weights.

    `dtype` is that of floating-point weights; `family` one of `families.FAMILIES`, where more than one will do.
    With `encoder_only` it is their Model, without a head.  Raises UserError for an encoder that no class of theirs has.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: --format=hf writes {', '.join(DTYPES)}")
    model, task = run.config.model.to_dict(), run.config.task.to_dict()
    pretraining, family = origin(run, family)
    kind = family_of(model, pretraining, family)
    head, why = (None, "--encoder-only") if encoder_only else head_of(kind, task, model["width"])
    if not head and not encoder_only and task["name"] != kind.pretraining:
        log.warning("without its head, which lies in %s: %s", REST, why)
    leaves = unstacked(flatten_dict(jax_free(run.variables), sep="/"))
    arrays, rest = to_theirs(rows(kind, head, model, task), leaves)
    encoder = {row.theirs for row in kind.encoder(model, "")}
    state = {prefixed(kind, head, name, encoder): array for name, array in arrays.items()}
    vocabulary = read_vocabulary(run.workdir)
    hf = _configuration(kind, head, model, task, vocabulary, dtype)
    front = _preprocessor(model)
    weights = {name: as_dtype(array, dtype) for name, array in state.items()}

    library = safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config.json": _json(hf), "preprocessor_config.json": _json(front)}
    if head and head.task == "ctc":
        files |= write_words(vocabulary, front["feature_extractor_type"])
    files["README.md"] = card(run, hf, kind, head, why, pretraining).encode()
    # One key of metadata: with more, the same arrays would not always make the same bytes.
    arrays_of = {WEIGHTS: library.numpy.save(weights, metadata={"format": "pt"}), REST: library.numpy.save(rest)}
    ours = dict(
        format=FORMAT, config=configs.to_json(run.config), step=run.step, digest=run.digest, unlike=why,
        vocabulary={name: content.hex() for name, content in vocabulary.items()},
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in arrays_of.items()},
    )  # fmt: skip
    for name, content in {**arrays_of, **files, OURS: _json(ours)}.items():
        replace_file(folder / name, content)
    return folder / WEIGHTS


def jax_free(tree: Any) -> Any:
    """The collections of a model with parameters on top, NumPy throughout."""
    found = {name: dict(part) for name, part in tree.items() if name != "params"}
    return {**_numpy(dict(tree["params"])), **_numpy(found)}


def _numpy(tree: Any) -> Any:
    return {k: _numpy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree)


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floating-point arrays as `dtype`, contiguous: views that are not are written wrongly, without an error.

    Raises UserError for numbers beyond those of `dtype`.
    """
    import ml_dtypes

    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16):
        return np.asarray(array, order="C")
    with np.errstate(over="ignore"):
        narrow = np.asarray(array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)), order="C")
    if dtype == "float16" and np.isinf(narrow).sum() > np.isinf(array).sum():
        raise UserError(f"--dtype=float16 ends at 65504, and a weight is {np.abs(array).max():.3g}: use bfloat16")
    return narrow


def origin(run: Any, wanted: str) -> tuple[str, str]:
    """(task that the encoder was last pretrained with, family wanted): of the run, or of what it began with.

    A converted run says its family in source.json; other chains of `init_from` end in a task.
    """
    config, workdir, seen = run.config, run.workdir, set()
    while True:
        source = workdir / runs.SOURCE
        if not wanted and source.is_file() and (family := read_json(source).get("family")):
            return config.task.name, str(family)
        if config.task.name in {family.pretraining for family in FAMILIES.values()}:
            return config.task.name, wanted
        before: Any = config.get("init_from")
        if not before or before in seen:
            return config.task.name, wanted
        seen.add(before)
        try:
            workdir = runs.find_checkpoint(before).parent.parent
            config = runs.read_config(workdir)
        except UserError:  # gone, or moved
            return config.task.name, wanted


def _configuration(
    family: Family, head: Head | None, model: Mapping[str, Any], task: Mapping[str, Any],
    vocabulary: Mapping[str, bytes], dtype: str,
) -> dict[str, Any]:  # fmt: skip
    found = dict(
        architectures=[family.stem + (head.suffix if head else "Model")], model_type=family.model_type, dtype=dtype,
        transformers_version="5.23.0", mask_time_prob=0.05, **family.write(model),
    )  # fmt: skip
    if head:
        found |= head.write(task, model["width"])
    if head and head.task in ("classify", "frames", "speaker"):
        found |= write_labels(vocabulary, task)
    if head and head.task == "ctc":
        found |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return found


def _preprocessor(model: Mapping[str, Any]) -> dict[str, Any]:
    front = model["frontend"]
    shared = dict(sampling_rate=16000, padding_side="right", padding_value=0.0, return_attention_mask=True)
    if front["name"] == "mel":
        bands = front.get("n_mels", 80)
        return shared | dict(
            feature_extractor_type="SeamlessM4TFeatureExtractor", feature_size=bands, num_mel_bins=bands,
            stride=front.get("factor", 4), processor_class="Wav2Vec2BertProcessor",
        )  # fmt: skip
    return shared | dict(
        feature_extractor_type="Wav2Vec2FeatureExtractor", feature_size=1, do_normalize=front["normalize"],
        processor_class="Wav2Vec2Processor",
    )  # fmt: skip


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


# ---------------------------------------------------------------------------------------------- reading


def read(folder: Path) -> Folder:
    """A folder that `write` or `save_pretrained` wrote; UserError where it is damaged, or of no family."""
    hf = complete(read_json(folder / "config.json"), _optional(folder / "preprocessor_config.json"))
    state = modern(_weights(folder))
    ours, rest = _ours(folder)
    files = {name: (folder / name).read_bytes() for name in _ABOUT_CTC if (folder / name).is_file()}
    return opened(hf, state, files, ours, rest)


def opened(
    hf: dict[str, Any], state: Arrays, files: dict[str, bytes], ours: dict[str, Any], rest: Arrays
) -> Folder:  # fmt: skip
    """What `read` returns, of its parts; names may have their family's prefix, or not."""
    family = FAMILIES[hf["model_type"]]
    names = hf.get("architectures") or [f"{family.stem}Model"]
    if not (isinstance(names, list) and isinstance(names[0], str)):
        raise UserError(f"config.json: architectures={names!r} is no list of names")
    head = head_named(family, names[0])
    state = {name.removeprefix(family.prefix): array for name, array in state.items()}
    return Folder(family, head, hf, state, files, ours, rest)


def _weights(folder: Path) -> Arrays:
    """All arrays, of one file or of the parts that an index names; safetensors rather than PyTorch's."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read_arrays(folder / name)
        if index.is_file():
            parts = read_json(index).get("weight_map")
            if not isinstance(parts, dict) or not all(_is_part(part) for part in parts.values()):
                raise UserError(f"{index} is damaged: its weight_map names no files beside it")
            return {k: v for part in sorted(set(parts.values())) for k, v in read_arrays(folder / part).items()}
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin: no weights to read")


def _is_part(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name))


def read_arrays(path: Path) -> Arrays:
    """Arrays by name of a safetensors file or of a PyTorch state dict, floating-point ones as float32."""
    if path.suffix == ".bin":
        from speechjax.formats.torch_files import read_torch

        found = read_torch(path)
        if not isinstance(found, Mapping):
            raise UserError(f"{path} holds no state dict")
        arrays = {str(k): v for k, v in found.items() if isinstance(v, np.ndarray)}
    else:
        library = safetensors()
        try:
            arrays = library.numpy.load_file(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or 'no such file'}") from None
        except Exception as error:  # the library raises many kinds, KeyError for a type that it does not know
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"{path} is damaged or no safetensors file ({reason}); get it anew") from None
    return {name: as_float32(array) for name, array in arrays.items()}


def as_float32(array: np.ndarray) -> np.ndarray:
    """Floating-point numbers of any width as float32, others as they are."""
    with np.errstate(over="ignore"):  # of float64: beyond all numbers is infinite
        return array if array.dtype.kind in "iubc" else array.astype(np.float32)


def _ours(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """What `write` put beside, nothing where there is none."""
    if not (folder / OURS).is_file():
        return {}, {}
    ours = read_json(folder / OURS)
    if ours.get("format") != FORMAT:
        raise UserError(
            f"{folder / OURS} has format {ours.get('format')!r}, this version reads {FORMAT}; use the one that wrote "
            "it, or delete it to read the rest of the folder"
        )
    if not (isinstance(ours.get("config"), dict) and isinstance(ours.get("vocabulary"), dict)):
        raise UserError(f"{folder / OURS} is damaged; delete it to read the rest of the folder")
    for name in (WEIGHTS, REST):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; get it anew, or delete {OURS} to read the rest of the folder")
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not isinstance(ours.get("sha256"), dict) or found != ours["sha256"].get(name):
            raise UserError(
                f"{folder / name} is damaged, or not the one that was exported; get it anew, or delete {OURS} to read "
                "the folder as any other"
            )
    return ours, read_arrays(folder / REST)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError where there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a folder that transformers' save_pretrained wrote") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged, it is no JSON object; get it anew")
    return found


def _optional(path: Path) -> dict[str, Any]:
    """Since version 5 processors are saved in one file, with the feature extractor inside."""
    whole = path.with_name("processor_config.json")
    if not path.is_file() and whole.is_file():
        found = read_json(whole).get("feature_extractor", {})
        return found if isinstance(found, dict) else {}
    return read_json(path) if path.is_file() else {}


def safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError("safetensors is not installed: run `pip install 'speechjax[export]'`") from None
    return safetensors

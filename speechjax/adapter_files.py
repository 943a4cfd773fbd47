"""Adapters in files of their own: one safetensors file that holds what learnt and says what it learnt on.

Its arrays are named by their paths in a task, `encoder/...` and, of a head, what else there is.  With a head come its
collections beside the parameters, `state/...`, and the bytes of its run's vocabularies, `vocabulary/vocab.json` and so
on, without which nobody knows what its classes are.  One JSON text beside them holds the blocks of
`config.model.adapters`, the digest of the encoder they were trained on (all that did not learn), and `about`: anything
for people and programs to know.  Nothing in it is executed.  The library is the extra `speechjax[export]`, imported
when first needed.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from speechjax import experiment
from speechjax.errors import UserError
from speechjax.formats.arrays import Kind, read_arrays, write_arrays
from speechjax.formats.arrays import digest as _sha
from speechjax.logs import replace_file
from speechjax.models.adapters import ADAPTER_LEAF, blocks_of, parse, trainable_pattern

KIND = Kind("an adapter", "speechjax_adapter", 2, (1, 2))  # 1 had neither state nor vocabularies
_STATE, _WORDS = "state/", "vocabulary/"  # what arrays are named that are no parameters
VOCABULARIES = ("sentencepiece.model", *experiment.VOCABULARIES)  # as they are written: vocab.json needs the first
_SAID = ("adapters", "base", "head", "about")  # in a file's JSON text


class AdapterFile(NamedTuple):
    """`adapters` are blocks with all their options, `leaves` {path: array}; `base` is the digest of the base.

    `head` says what `leaves` holds beside the encoder's: "none", "part" of a head or a "whole" one.  With it come
    `state` {collection/path: array} and `vocabulary` {name of a file: its bytes}.
    """

    path: Path
    adapters: list[dict[str, Any]]
    leaves: dict[str, np.ndarray]
    base: str
    head: str
    about: dict[str, Any]
    state: dict[str, np.ndarray]
    vocabulary: dict[str, bytes]


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
    extra: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, bytes] | None = None,
) -> AdapterFile:
    """Writes what learnt with `adapters` of a task's `params`, and the head's leaves whose paths fit regex `include`.

    With leaves of a head come its state, of the collections `extra`, and the `vocabulary` of its run.  `about` must be
    JSON.  Raises UserError where an adapter or the head is not among the parameters, and for a part of what has state.
    """
    found = parse(adapters)
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(dict(params), sep="/").items()}
    encoder = {name for name in flat if name.startswith("encoder/")}
    if absent := [a for a in found if a.sites() and not any(re.search(a.own, name) for name in encoder)]:
        raise UserError(f"{absent[0]} is not among the parameters")
    learnt = {name for name in encoder if re.search(trainable_pattern(adapters), name)}
    head = flat.keys() - encoder
    kept = {name for name in head if include and re.search(include, name)}
    if include and not kept:
        raise UserError(f"--include={include} fits nothing of the head; there are {', '.join(sorted(head)) or 'none'}")
    if bad := [name for name in kept if name.startswith((_STATE, _WORDS))]:
        raise UserError(f"{bad[0]}: a head of the name {bad[0].partition('/')[0]!r} cannot be saved; name it otherwise")
    leaves = {name: flat[name] for name in sorted(learnt | kept)}
    which = "none" if not kept else "whole" if kept == head else "part"
    state = _state_of(flatten_dict(dict(extra or {}), sep="/"), head, kept, include)
    words = dict(vocabulary or {}) if kept else {}
    file = AdapterFile(
        path, blocks_of(found), leaves, base_digest(params, adapters), which, dict(about), state, words
    )  # fmt: skip
    arrays = leaves | {_STATE + name: leaf for name, leaf in state.items()}
    arrays |= {_WORDS + name: np.frombuffer(content, np.uint8) for name, content in words.items()}
    write_arrays(path, KIND, arrays, {key: getattr(file, key) for key in _SAID})
    return file


def _state_of(state: Mapping[str, Any], head: set[str], kept: set[str], include: str) -> dict[str, np.ndarray]:
    """Of a head's state what lies in modules that are `kept`; UserError where one is kept in part.

    A bias without the scale that its outputs are in would be no head, and the scale without the bias none either.
    """
    found = {}
    for name, leaf in sorted(state.items()):
        module = "".join(f"{part}/" for part in name.split("/")[1:-1])  # what follows the collection
        inside = {other for other in head if other.startswith(module)}
        if kept and (kept == head or (inside and inside <= kept)):
            found[name] = np.asarray(leaf)
        elif inside & kept:
            raise UserError(
                f"--include={include} fits only a part of what has state beside parameters ({name}): include all of "
                "it, or nothing"
            )
    return found


def rename(
    params: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(params, adapters) with adapters renamed, {old: new}; UserError for names that none has or that are no names."""
    found = parse(adapters)
    if unknown := sorted(names.keys() - {a.name for a in found}):
        raise UserError(f"there is no adapter {unknown[0]!r}; there are {', '.join(map(str, found)) or 'none'}")
    blocks = blocks_of([dataclasses.replace(a, name=names.get(a.name, a.name)) for a in found])
    parse(blocks)  # two of one name are refused

    def new(name: str) -> str:
        for a in found:
            if a.name in names and (match := re.search(a.own, name)):
                return f"{match['site']}/{a.kind}_{names[a.name]}_{match['part']}"
        return name

    return unflatten_dict(
        {new(name): leaf for name, leaf in flatten_dict(dict(params), sep="/").items()}, sep="/"
    ), blocks


def load_adapter(path: Path) -> AdapterFile:
    """What `save_adapter` wrote; UserError where the file is missing, damaged, of another kind or another format."""
    arrays, header = read_arrays(path, KIND)
    version = header["format"]
    state, words = ({n: a for n, a in arrays.items() if version > 1 and n.startswith(p)} for p in (_STATE, _WORDS))
    vocabulary = {name.removeprefix(_WORDS): content.tobytes() for name, content in words.items()}
    if strange := sorted(vocabulary.keys() - set(VOCABULARIES)):  # these become names of files
        raise UserError(f"{path} is damaged: {strange[0]!r} is no vocabulary; get it anew")
    return AdapterFile(
        path, leaves={name: leaf for name, leaf in arrays.items() if name not in state.keys() | words.keys()},
        state={name.removeprefix(_STATE): leaf for name, leaf in state.items()}, vocabulary=vocabulary,
        **{key: header[key] for key in _SAID},
    )  # fmt: skip


def attach(
    params: Mapping[str, Any], files: Sequence[AdapterFile], own: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """A task's `params` with what the files hold, in their order; those of the base, or with fresh adapters in place.

    A whole head takes the place of the head of `params`; parts of one must be there.  `own` are blocks of adapters that
    `params` has and keeps.  Raises UserError for an adapter of another base, for shapes that do not fit, for two files
    of whole heads, and for adapters of one name or that replace the same parameters.
    """
    blocks = [*own, *(block for file in files for block in file.adapters)]
    names = [block["name"] for block in blocks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two are named {twice[0]!r}: save one of them anew with --name=NEW (speechjax.adapter save)")
    parse(blocks)
    whole = [file for file in files if file.head == "whole"]
    if len(whole) > 1:
        raise UserError(f"{whole[0].path} and {whole[1].path} both bring a head; save one of them without --include")
    flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
    if whole:
        flat = {name: leaf for name, leaf in flat.items() if name.startswith("encoder/")}
    also = [a for a in parse(own) if a.trains_also]
    encoder = [name for name in flat if name.startswith("encoder/")]
    replaced = {name: str(a) for a in also for name in encoder if re.search(a.trains_also, name)}
    for file in files:
        ours = base_digest(params, file.adapters)
        if ours != file.base:
            raise UserError(
                f"{file.path} was trained on another encoder: on {file.base[:16]}, and this one is {ours[:16]}; an "
                "encoder that adapters were merged into is another, so give all at once, --adapter=ONE --adapter=TWO, "
                "to the run that they were trained on"
            )
        for name, leaf in file.leaves.items():
            _check(file, flat, name, leaf)
            if name in replaced:
                raise UserError(f"{file.path} and {replaced[name]} both replace {name}: use one of them")
            if name.startswith("encoder/") and not re.search(ADAPTER_LEAF, name):
                replaced[name] = str(file.path)
            flat[name] = leaf
    return unflatten_dict(flat, sep="/")


def attach_state(extra: Mapping[str, Any], files: Sequence[AdapterFile]) -> dict[str, Any]:
    """The collections beside the parameters that `attach` gives: a head's are those of the file that brings it.

    Raises UserError for state of a part of a head where `extra` has none of its shape.
    """
    flat: dict[str, Any] = flatten_dict(dict(extra), sep="/")
    if any(file.head == "whole" for file in files):
        flat = {name: leaf for name, leaf in flat.items() if name.split("/")[1] == "encoder"}
    for file in files:
        for name, leaf in file.state.items():
            if file.head != "whole" and (name not in flat or flat[name].shape != leaf.shape):
                raise UserError(
                    f"{file.path} has state {name} of shape {leaf.shape}, for which this model has no place"
                )
            flat[name] = leaf
    return unflatten_dict(flat, sep="/")


def attach_vocabulary(workdir: Path, files: Sequence[AdapterFile], given: Path | None = None) -> dict[str, bytes]:
    """The vocabularies of the head that `attach` gives, {name of a file: its bytes}.

    They are those of the file that brings a whole head, else of the run in `workdir`; what there is not comes from the
    folder `given`.  Raises UserError where that has another, and for parts of a head that belong to another.
    """
    whole = [file for file in files if file.head == "whole"]
    found = whole[0].vocabulary if whole else read_vocabulary(workdir)
    more = read_vocabulary(given) if given else {}
    both = {name: more[name] for name in more.keys() & found.keys()}
    for source, words in [*((str(file.path), file.vocabulary) for file in files), (f"--vocabulary={given}", both)]:
        if unlike := [name for name, content in words.items() if found.get(name) != content]:
            head = f"that of the head of {whole[0].path if whole else workdir}"
            raise UserError(f"{source} has another {unlike[0]} than {head}: its classes would mean something else")
    return more | found


def read_vocabulary(folder: Path) -> dict[str, bytes]:
    """What the classes of a run mean, {name of a file: its bytes}: those of `VOCABULARIES` that are there."""
    return {name: (folder / name).read_bytes() for name in VOCABULARIES if (folder / name).is_file()}


def write_vocabulary(folder: Path, vocabulary: Mapping[str, bytes]) -> None:
    """What `read_vocabulary` reads."""
    for name in VOCABULARIES:
        if name in vocabulary:
            replace_file(folder / name, vocabulary[name])


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

"""Adapters in the folders of the library `peft`: LoRA and IA3 of a run, for models of `transformers`, and back.

A folder has adapter_config.json and adapter_model.safetensors, which `PeftModel.from_pretrained` loads onto the class
that README.md names, and speechjax.safetensors: what peft has no place for, the adapter's name here, the digest of its
base, state and vocabulary of the head.  Kernels are theirs as in names.py; layers are one by one.

Shapes: D width of an input, E of an output, R rank.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.adapter_files import VOCABULARIES, AdapterFile, base_digest, read_vocabulary, save_adapter
from speechjax.errors import UserError
from speechjax.formats import arrays as files
from speechjax.formats import peft_config
from speechjax.formats.families import FAMILIES, Family, family_of
from speechjax.formats.heads import HEADS, Head, head_of
from speechjax.formats.hf import jax_free, origin, read_arrays, read_json, safetensors
from speechjax.formats.names import FLIP, POINTWISE, Arrays, Turn, to_ours, to_theirs
from speechjax.formats.peft_config import Site
from speechjax.logs import replace_file
from speechjax.models.adapters import IA3, Adapter, Lora, parse
from speechjax.paths import restacked, unstacked

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "speechjax.safetensors"
_KIND = files.Kind("what lies beside an adapter of peft", "speechjax_peft", 1, (1,))
_TOP = "base_model.model."  # of all names in a file of peft
_SAID = ("adapters", "base", "head", "about")  # as in adapter_files.py
_STATE, _WORDS = "state/", "vocabulary/"
_HERE = ("text", "text_steps", "units", "label")  # of config.data: what the classes of a head are


def write(source: Any, folder: Path, *, family: str = "") -> Path:
    """Writes the adapter of a run (see runs.py), or an `AdapterFile`, into `folder`; the path of its weights.

    `family` is one of `families.FAMILIES`, where more than one will do.  A whole head comes along where its class keeps
    it in modules that peft can replace.  Raises UserError for several adapters, and kinds that peft has not.
    """
    model, task, which = _blocks(source, family)
    adapter = _one(source.adapters if isinstance(source, AdapterFile) else source.config.model.get("adapters", ()))
    kind = family_of(model, *which)
    file = source if isinstance(source, AdapterFile) else _of_run(source)
    head, why = _head(kind, task, model["width"], file.head)
    prefix, table = kind.prefix if head else "", _table(kind, model)
    learnt = unstacked({name: leaf for name, leaf in file.leaves.items() if name.startswith("encoder/")})
    rest = {name: leaf for name, leaf in file.leaves.items() if not name.startswith("encoder/")}
    brought: Arrays = {}
    if head:
        brought, rest = to_theirs(head.rows(task, model["width"]), rest)
    state = _to_theirs(adapter, table, learnt, prefix) | brought
    modules = {site: prefix + table[site].theirs for site in (_site(adapter, name) for name in learnt)}
    said = peft_config.write(adapter, modules, {name.partition(".")[0] for name in brought}, model["layers"])

    library = safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    whole = {_TOP + name: np.asarray(array, order="C") for name, array in state.items()}
    replace_file(folder / WEIGHTS, library.numpy.save(whole, metadata={"format": "pt"}))
    replace_file(folder / CONFIG, (json.dumps(said, indent=2) + "\n").encode())
    replace_file(folder / "README.md", peft_config.readme(kind, head, why, task, model["width"]).encode())
    header = {key: getattr(file, key) for key in _SAID} | dict(family=kind.model_type, leaves=sorted(file.leaves))
    header["suffix"] = head.suffix if head else "Model"
    beside = rest | {_STATE + name: leaf for name, leaf in file.state.items()}
    beside |= {_WORDS + name: np.frombuffer(content, np.uint8) for name, content in file.vocabulary.items()}
    files.write_arrays(folder / OURS, _KIND, beside, header)
    return folder / WEIGHTS


def _blocks(source: Any, family: str) -> tuple[dict[str, Any], dict[str, Any], tuple[str, str]]:
    """(model without adapters, task, what `family_of` asks for) of a run or a file."""
    if isinstance(source, AdapterFile):
        model, task = dict(source.about["model"]), dict(source.about["task"])
        return model, task, (task["name"], family)
    model = {key: value for key, value in source.config.model.to_dict().items() if key != "adapters"}
    return model, source.config.task.to_dict(), origin(source, family)


def _one(blocks: Iterable[Mapping[str, Any]]) -> Adapter:
    found = parse(list(blocks))
    if not found:
        raise UserError("this run has no adapters (config.model.adapters): there is nothing that peft could hold")
    if len(found) > 1:
        shown = ", ".join(map(str, found))
        raise UserError(f"a folder of peft holds one adapter, this run has {shown}: merge them, and use --format=hf")
    if not isinstance(found[0], Lora | IA3):
        raise UserError(
            f"{found[0]}: peft has no adapter of this kind for encoders; it has lora and ia3.  Keep it in a file of "
            "its own (python -m speechjax.adapter save)"
        )
    return found[0]


def _of_run(run: Any) -> AdapterFile:
    """What `speechjax.adapter save --include=.` would write."""
    config = run.config.to_dict()
    params, extra = run.variables["params"], {k: v for k, v in run.variables.items() if k != "params"}
    if inside := [name for name, part in extra.items() if "encoder" in part]:
        raise UserError(
            f"the encoder has state beside its parameters ({inside[0]}), and of it an adapter has only these: merge, "
            "and use --format=hf"
        )
    about = dict(
        task=config["task"], model={k: v for k, v in config["model"].items() if k != "adapters"},
        data={k: v for k, v in config["data"].items() if k in _HERE}, step=run.step,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:  # which leaves it has, and all checks, are those of that file
        return save_adapter(
            Path(scratch) / "adapter.safetensors", params, config["model"]["adapters"],
            include="." if params.keys() - {"encoder"} else "", about=about, extra=extra,
            vocabulary=read_vocabulary(run.workdir),
        )  # fmt: skip


def _head(family: Family, task: Mapping[str, Any], width: int, there: str) -> tuple[Head | None, str]:
    """(the head that comes along or None, why it does not)."""
    if there != "whole":
        return None, "the file has no head, or a part of one"
    head, why = head_of(family, task, width)
    if head and head.task == "speaker":
        return None, "peft cannot tell ForXVector's module feature_extractor from that of the encoder"
    if head and task.get("layers") == "weighted":
        return None, "peft replaces modules, and layer_weights is none"
    return head, why


def _table(family: Family, model: Mapping[str, Any]) -> dict[str, Site]:
    """{our dense layer: theirs}, encoders' names without a prefix."""
    kernels = (row for row in family.encoder(model, "") if row.ours.endswith("/kernel"))
    return {row.ours.removesuffix("/kernel"): Site(row.theirs.removesuffix(".weight"), row.turn) for row in kernels}


def _site(adapter: Adapter, name: str) -> str:
    found = re.search(adapter.own, name)
    assert found is not None
    return found["site"]


def _outputs(turn: Turn) -> Turn:
    """Of a LoRA's second factor: only inputs of a layer are turned in their own way."""
    return POINTWISE if turn is POINTWISE else FLIP


def _to_theirs(adapter: Adapter, table: Mapping[str, Site], leaves: Arrays, prefix: str) -> Arrays:
    found = {}
    for name, leaf in leaves.items():
        site = _site(adapter, name)
        if site not in table:
            raise UserError(f"{adapter} changes {site}, which is no layer of its own in transformers")
        module, turn = prefix + table[site].theirs, table[site].turn
        if name.endswith("_a"):
            found[f"{module}.lora_A.weight"] = turn.to(leaf)
        elif name.endswith("_b"):
            found[f"{module}.lora_B.weight"] = _outputs(turn).to(leaf)
        else:
            found[f"{module}.ia3_l"] = leaf[None] if peft_config.is_outer(site) else leaf[:, None]
    return found


# ---------------------------------------------------------------------------------------------- reading


def read(folder: Path, base: Any = None, *, name: str = "task") -> AdapterFile:
    """What `load_adapter` returns, of a folder that `write` or `save_pretrained` of peft wrote.

    Of the latter `base` is the run of its model, which speechjax.convert makes, and `name` what the adapter is called
    here; a head there is left out, because which of its classes is which of the run's only its own model knows.  Raises
    UserError where a file is damaged, or not of this model, and for what LoRA and IA3 here cannot do.
    """
    said = read_json(folder / CONFIG)
    state = {key.removeprefix(_TOP): array for key, array in read_arrays(_weights(folder)).items()}
    try:
        if (folder / OURS).is_file():
            return _own(folder, said, state)
        if base is None:
            raise UserError(f"{folder} was not written by speechjax: name the run of the model that it belongs to")
        return _theirs(folder, said, state, base, name)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error}); get it anew") from error


def _weights(folder: Path) -> Path:
    old = folder / "adapter_model.bin"
    return old if old.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def _own(folder: Path, said: Mapping[str, Any], state: Arrays) -> AdapterFile:
    beside, header = files.read_arrays(folder / OURS, _KIND)
    if header["family"] not in FAMILIES:
        raise UserError(f"{folder / OURS} is damaged: {header['family']!r} is no family")
    family, model, task = FAMILIES[header["family"]], header["about"]["model"], header["about"]["task"]
    block = peft_config.read(said, header["adapters"][0]["name"])
    adapter = parse([header["adapters"][0] | block])[0]
    leaves = {}
    for head in (head for head in HEADS if head.suffix == header["suffix"]):
        rows = list(head.rows(task, model["width"]))
        leaves, missing, _ = to_ours(rows, state)
        if missing:
            raise UserError(f"{folder / WEIGHTS} lacks {missing[0]} of the head")
        state = {key: array for key, array in state.items() if key not in {row.theirs for row in rows}}
    leaves |= _to_ours(adapter, _table(family, model), state)
    leaves |= {key: array for key, array in beside.items() if not key.startswith((_STATE, _WORDS))}
    leaves = restacked(leaves, dict.fromkeys(header["leaves"]))
    if unlike := sorted(leaves.keys() ^ set(header["leaves"])):
        raise UserError(f"{folder} is damaged: {unlike[0]} is in one of its files and not in the other")
    vocabulary = {key.removeprefix(_WORDS): x.tobytes() for key, x in beside.items() if key.startswith(_WORDS)}
    if strange := sorted(vocabulary.keys() - set(VOCABULARIES)):  # these become names of files
        raise UserError(f"{folder / OURS} is damaged: {strange[0]!r} is no vocabulary; get it anew")
    return AdapterFile(
        folder, [header["adapters"][0] | block], leaves, header["base"], header["head"], header["about"],
        {key.removeprefix(_STATE): array for key, array in beside.items() if key.startswith(_STATE)}, vocabulary,
    )  # fmt: skip


def _theirs(folder: Path, said: Mapping[str, Any], state: Arrays, base: Any, name: str) -> AdapterFile:
    config = base.config.to_dict()
    model = {key: value for key, value in config["model"].items() if key != "adapters"}
    kind = family_of(model, *origin(base, ""))
    block, table = peft_config.read(said, name), _table(kind, model)
    inside = {key: array for key, array in state.items() if re.search(r"\.(lora_[AB]\.weight|ia3_l)$", key)}
    peft_config.warn_of_rest(folder, sorted(state.keys() - inside.keys()))
    if not inside:
        raise UserError(f"{folder / WEIGHTS} holds no adapter")
    adapter = parse([block])[0]
    leaves = _to_ours(adapter, table, inside)
    params: dict[str, Any] = jax_free({"params": base.variables["params"]})
    flat = unstacked(_flat(params))
    if isinstance(adapter, IA3):  # ours is on all of its places: a scale of one changes nothing
        leaves = _ones(adapter, table, flat) | leaves
    else:
        sites = [_site(adapter, leaf) for leaf in leaves]
        block["targets"] = peft_config.targets(sites, model["layers"], model["scan"])
    adapter = parse([block])[0]
    _check(folder, adapter, leaves, flat)
    leaves = restacked(leaves, _flat(params))
    about = dict(task=config["task"], model=model, step=base.step)
    about["data"] = {key: value for key, value in config["data"].items() if key in _HERE}
    return AdapterFile(folder, [block], leaves, base_digest(params, [block]), "none", about, {}, {})


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    from flax.traverse_util import flatten_dict

    found: Any = flatten_dict(dict(params), sep="/")
    return found


def _to_ours(adapter: Adapter, table: Mapping[str, Site], state: Arrays) -> Arrays:
    """Leaves of names that may have a prefix; UserError for a module that is no dense layer here."""
    sites = {site.theirs: (ours, site.turn) for ours, site in table.items()}
    found = {}
    for key, array in state.items():
        module, _, part = re.sub(r"\.weight$", "", key).rpartition(".")
        near = next((module.removeprefix(f.prefix) for f in FAMILIES.values() if module.startswith(f.prefix)), module)
        if near not in sites or part not in ("lora_A", "lora_B", "ia3_l"):
            raise UserError(f"{key} has no place here: adapters are on dense layers of the encoder")
        site, turn = sites[near]
        leaf = f"{site}/{adapter.kind}_{adapter.name}_"
        if part == "ia3_l":
            if peft_config.is_outer(site) != (array.shape[0] == 1):
                raise UserError(
                    f"{key} has the shape {array.shape}: IA3 here scales keys, values, and what mlp_down gets"
                )
            found[leaf + "scale"] = array.ravel()
        else:
            back = turn.back if part == "lora_A" else _outputs(turn).back
            found[leaf + part[-1].lower()] = np.asarray(back(array), order="C")
    return found


def _ones(adapter: Adapter, table: Mapping[str, Site], flat: Mapping[str, Any]) -> Arrays:
    found = {}
    for site in table:
        if peft_config.is_scaled(site):
            size = flat[f"{site}/kernel"].shape[0 if peft_config.is_outer(site) else 1]
            found[f"{site}/{adapter.kind}_{adapter.name}_scale"] = np.ones(size, np.float32)
    return found


def _check(folder: Path, adapter: Adapter, leaves: Arrays, flat: Mapping[str, Any]) -> None:
    """UserError unless every leaf fits the kernel that it changes."""
    for site in {_site(adapter, name) for name in leaves}:
        parts = {part: leaves.get(f"{site}/{adapter.kind}_{adapter.name}_{part}") for part in ("a", "b", "scale")}
        shapes = {part: array.shape for part, array in parts.items() if array is not None}
        D, E = flat[f"{site}/kernel"].shape
        wanted: dict[str, tuple[int, ...]] = {"scale": (D if peft_config.is_outer(site) else E,)}
        if isinstance(adapter, Lora):
            wanted = dict(a=(D, adapter.rank), b=(adapter.rank, E))
        if shapes != wanted:
            raise UserError(f"{folder}: {site} would need arrays of the shapes {wanted}, there are {shapes}")

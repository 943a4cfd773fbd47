"""Models of other stacks as runs: a config, parameters, and a folder that `init_from` and all verbs take.

What a class of theirs has no head for becomes the pretraining task of its family, its head drawn at random.  Recipes,
rates and masks are those of the project's configs; sizes are the model's.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from speechjax import config as configs
from speechjax import runs
from speechjax.adapter_files import VOCABULARIES
from speechjax.errors import UserError
from speechjax.formats.hf import Folder, rows
from speechjax.formats.hf_words import read_labels, read_words, reorder
from speechjax.formats.names import Arrays, to_ours
from speechjax.paths import restacked

log = logging.getLogger("speechjax")

RECIPES = {
    "wav2vec2": "pretrain/wav2vec2.py", "hubert": "pretrain/hubert.py", "wavlm": "pretrain/wavlm.py",
    "data2vec": "pretrain/data2vec.py", "w2v_bert": "pretrain/w2v_bert.py", "ctc": "finetune/ctc.py",
    "classify": "finetune/classify.py", "frames": "finetune/frames.py", "speaker": "finetune/speaker.py",
}  # fmt: skip
_MISSING = 1000  # names beyond those of the file, of a config that promises a million layers
_LONGEST = 2**24  # samples to learn shapes from
_CONFIGS = Path(__file__).parents[2] / "configs"


def as_run(folder: Folder) -> tuple[ConfigDict, Arrays, dict[str, bytes]]:
    """(config, our leaves by path, files of the vocabulary) of a folder; leaves of state begin with its collection.

    Raises UserError where weights are missing, or are not those that the configuration promises.
    """
    with _described_by("speechjax.json" if folder.ours else "config.json"):
        return _own(folder) if folder.ours else _theirs(folder)


def _theirs(folder: Folder) -> tuple[ConfigDict, Arrays, dict[str, bytes]]:
    model = folder.family.read(folder.hf)
    task = folder.head.read(folder.hf) if folder.head else {}
    name = folder.head.task if folder.head else folder.family.pretraining
    leaves = _leaves(folder, model, task)
    files: dict[str, bytes] = {}
    data: dict[str, Any] = {}
    if name == "ctc":
        blank = folder.hf["pad_token_id"]
        there = [leaves[f"head/{part}"].shape[-1:] for part in ("kernel", "bias")]
        if there != [(task["classes"],)] * 2 or blank >= task["classes"]:
            raise UserError(
                f"config.json: vocab_size={task['classes']} and pad_token_id={blank}, which is the blank; lm_head has "
                f"{there[0]} and {there[1]} classes"
            )
        files, order = read_words(folder.files, task["classes"], blank)
        leaves |= reorder(leaves, order)
        task["classes"] = len(order)
        data = dict(text="characters", text_steps="single_spaces")
    if name in ("classify", "speaker", "frames"):
        several = task.get("loss") == "sigmoid"
        data = {} if name == "frames" else dict(label="tags:label" if several else "meta:label")
        files = read_labels(folder.hf, data.get("label", ""))
    return experiment(name, model, task, data), leaves, files


def experiment(name: str, model: Mapping[str, Any], task: Mapping[str, Any], data: Mapping[str, Any]) -> ConfigDict:
    """The recipe of a task with this encoder; what `task` and `data` say comes before it."""
    path = _CONFIGS / RECIPES[name]
    if not path.is_file():
        raise UserError(f"{path} is not there: recipes are in the project's folder configs/; install it with pip -e")
    large = name in ("wav2vec2", "hubert", "wavlm") and model["norm"] == "pre"
    config: Any = configs.open_module(str(path)).get_config("size=large" if large else "")
    configs.complete_model(config)
    shared = {key: value for key, value in config.model.items() if key in ("adapters",)}
    config.model = ConfigDict(shared | dict(model))
    config.task.update(dict(task))
    config.data.update(dict(data))
    if name == "w2v_bert":
        config.task.contrastive_layers = max(model["layers"] // 2, 1)
    if name == "data2vec":
        config.task.target_layers = min(config.task.target_layers, model["layers"])
    if config.task.get("loss") == "sigmoid":  # as the recipe of tags has it
        config.train.update(dict(best_metric="valid/loss", best_mode="min"))
    configs.check(config)
    return config


def _own(folder: Folder) -> tuple[ConfigDict, Arrays, dict[str, bytes]]:
    """A run that was written from here: as it was."""
    config: Any = runs.config_of(folder.ours["config"], "speechjax.json")
    configs.check(config)
    model, task = config.model.to_dict(), config.task.to_dict()
    if unlike := _unlike(folder, model, task):
        raise UserError(
            f"speechjax.json is of another model than config.json ({unlike}); delete it to read the rest of the folder"
        )
    leaves = _leaves(folder, model, task) | folder.rest
    try:
        files = {name: bytes.fromhex(content) for name, content in folder.ours["vocabulary"].items()}
    except (ValueError, TypeError):
        raise UserError("speechjax.json is damaged: its vocabulary is no hexadecimal text") from None
    if strange := sorted(files.keys() - set(VOCABULARIES)):  # these become names of files
        raise UserError(f"speechjax.json is damaged: {strange[0]!r} is no vocabulary")
    return config, leaves, files


def _unlike(folder: Folder, model: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """Why a model and a task block are not what config.json says; rates of dropout may differ."""
    if folder.head and folder.head.task != task["name"]:
        return f"{folder.family.stem}{folder.head.suffix} is no task {task['name']!r}"
    if why := folder.family.unlike(model):
        return why
    for key, value in folder.family.write(model).items():
        if not isinstance(value, float) and folder.hf.get(key) != value:
            return f"{key}={value!r} and {folder.hf.get(key)!r}"
    return ""


def _leaves(folder: Folder, model: Mapping[str, Any], task: Mapping[str, Any]) -> Arrays:
    # Before anything is made of the sizes that a damaged config names.
    projection = "feature_projection.projection.weight"
    width = folder.state[projection].shape[:1] if projection in folder.state else ()
    if width != (model["width"],):
        raise UserError(f"the weights have no {projection} of width {model['width']}: not the model of config.json")
    table = list(islice(rows(folder.family, folder.head, model, task), len(folder.state) + _MISSING))
    try:
        leaves, missing, strange = to_ours(table, folder.state)
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"the weights have other shapes than config.json says ({error})") from None
    optional = {row.theirs for row in table if row.ours in ("encoder/mask_embedding", "prototypes")}
    if missing := [name for name in missing if name not in optional]:
        raise UserError(
            f"the weights lack {missing[0]} ({len(missing)} of {len(table)} names in all): not the model that "
            "config.json describes"
        )
    if strange:
        shown = ", ".join(strange[:4]) + (", ..." if len(strange) > 4 else "")
        log.warning("%d arrays have no place here and are left out: %s", len(strange), shown)
    return leaves


@contextmanager
def _described_by(source: str) -> Iterator[None]:
    """What building a model raises because a config from elsewhere makes no sense becomes one line."""
    try:
        yield
    except UserError as error:  # with a block for a value some say it in several lines
        raise UserError(" ".join(str(error).split())) from error
    except Exception as error:  # of NumPy, Flax and this project, all kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} describes no model ({type(error).__name__}: {reason}); get it anew") from error


# ---------------------------------------------------------------------------------------------- as a run


def variables(config: Any, leaves: Arrays, seed: int = 0) -> tuple[Any, Any, list[str]]:
    """(params, extra, paths drawn at random) of a config's task: `leaves` where they are, the rest as a run begins.

    Raises UserError for a leaf of another shape or kind than the config says, and for one it has no place for.
    """
    with _described_by("the config"):
        task = configs.make_task(config)
        batch = make_batch(task)
        rngs = {name: jax.random.key(seed + k) for k, name in enumerate(("params", *task.rngs))}

        def init():
            found = task.init(rngs, batch, step=jnp.int32(0), train=False)
            return {name: part for name, part in found.items() if name != "sums"}

        shapes = jax.eval_shape(init)
        abstract: Any = flatten_dict(_together(shapes), sep="/")
        given = restacked(dict(leaves), abstract)
    for name, leaf in given.items():
        if name not in abstract:
            raise UserError(f"{name} has no place in the model that the config describes")
        like = abstract[name]
        if leaf.shape != like.shape:
            raise UserError(f"{name} has the shape {leaf.shape}, the config says {like.shape}")
        if (leaf.dtype.kind == "f") != jnp.issubdtype(like.dtype, jnp.floating):
            raise UserError(f"{name} is of type {leaf.dtype}, where the model has {like.dtype}")
    fresh = sorted(abstract.keys() - given.keys())
    # Only what is missing is computed: large models need not be drawn twice.
    drawn = jax.jit(lambda: _only(flatten_dict(_together(init()), sep="/"), fresh))()
    whole = {
        name: given[name].astype(like.dtype) if name in given else np.asarray(drawn[name])
        for name, like in abstract.items()
    }
    tree: Any = unflatten_dict(whole, sep="/")
    collections = [name for name in shapes if name != "params"]
    extra = {name: tree.pop(name) for name in collections}
    params, extra = task.start(tree, extra)
    return params, extra, fresh


def _together(variables: Any) -> dict[str, Any]:
    """Parameters on top, collections of state beside them."""
    return {**variables["params"], **{name: part for name, part in variables.items() if name != "params"}}


def _only(leaves: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: leaves[name] for name in names}


def make_batch(task: Any) -> dict[str, jax.Array]:
    """A batch of one short silent row with all that `task` needs: to learn the shapes of its parameters."""
    hop, extra = task.encoder.frame_len()
    samples = 32 * hop + extra
    if samples > _LONGEST:
        raise UserError(f"a frame of this encoder comes every {hop} samples, from {hop + extra}: that makes no sense")
    batch = {"audio": jnp.zeros((1, samples), jnp.float32), "lengths": jnp.array([samples], jnp.int32)}
    for key in task.needs:
        if key == "tokens":
            batch |= dict(tokens=jnp.zeros((1, 4), jnp.int32), token_lengths=jnp.array([4], jnp.int32))
        elif key == "units":
            batch[key] = jnp.zeros((1, samples // task.unit_hop), jnp.int32)
        else:
            several = getattr(task, "loss", "") == "sigmoid"
            batch[key] = jnp.zeros((1, task.classes)) if several else jnp.zeros(1, jnp.int32)
    return batch

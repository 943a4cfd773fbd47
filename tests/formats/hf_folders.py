"""Folders of `transformers` on disk, in every way they come, made without it; and runs of ours from what was read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy  # pyright: ignore[reportMissingImports]
from flax.traverse_util import flatten_dict, unflatten_dict
from hf_golden import PREPROCESSOR, VOCABULARY, weights
from hf_models import VARIANTS
from torch_writer import write as write_torch

from speechjax import config as configs
from speechjax.adapter_files import write_vocabulary
from speechjax.formats import hf, imports
from speechjax.formats.families import FAMILIES
from speechjax.formats.names import Arrays
from speechjax.runs import SOURCE, Run


def state_of(name: str, suffix: str) -> Arrays:
    """The weights of a golden miniature under the names of its class: with a head, the encoder's have a prefix."""
    family = FAMILIES[VARIANTS[name]["model_type"]]
    alone = set(weights(name, "Model"))
    prefix = "" if suffix == "Model" else family.prefix
    return {prefix * (key in alone) + key: value for key, value in weights(name, suffix).items()}


def write_texts(folder: Path, name: str, suffix: str, **more: Any) -> None:
    """All files but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = VARIANTS[name]
    stem = FAMILIES[config["model_type"]].stem
    content = config | dict(architectures=[stem + suffix], transformers_version="5.23.0") | more
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_bytes(PREPROCESSOR)
    (folder / "vocab.json").write_bytes(VOCABULARY)


def write_folder(folder: Path, name: str, suffix: str = "Model", state: Arrays | None = None, **more: Any) -> Path:
    """A folder like one of `save_pretrained`; `more` goes into config.json."""
    write_texts(folder, name, suffix, **more)
    save(folder / "model.safetensors", state_of(name, suffix) if state is None else state)
    return folder


def save(file: Path, state: Arrays) -> None:
    """Arrays as they are, in safetensors or, for ".bin", as torch does."""
    whole = {key: np.asarray(value, order="C") for key, value in state.items()}
    if file.suffix == ".bin":
        write_torch(file, whole)
    else:
        safetensors.numpy.save_file(whole, file, metadata={"format": "pt"})


def as_run(folder: Path, workdir: Path) -> Run:
    """What a folder holds as a run of ours, not written but for what belongs to its vocabulary."""
    read = hf.read(folder)
    config, leaves, files = imports.as_run(read)
    params, extra, _ = imports.variables(config, leaves)
    workdir.mkdir(parents=True, exist_ok=True)
    write_vocabulary(workdir, files)
    (workdir / SOURCE).write_text(json.dumps(dict(format="hf", source=str(folder), family=read.family.model_type)))
    variables = {"params": params, **extra}
    return Run(workdir, workdir / "best/0", 0, config, configs.make_task(config), variables, "0" * 64)


def adapted(base: Run, *blocks: dict[str, Any]) -> Run:
    """`base` with adapters that change much, three updates on."""
    config = base.config.copy_and_resolve_references()
    config.model = dict(config.model.to_dict(), adapters=blocks)
    params, extra, fresh = imports.variables(config, flatten_dict(hf.jax_free(base.variables), sep="/"))
    rng, leaves = np.random.default_rng(0), flatten_dict(params, sep="/")
    drawn = {
        key: leaves[key] + rng.normal(0, 0.2, leaves[key].shape).astype(np.float32) for key in fresh if key in leaves
    }
    variables = {"params": unflatten_dict(leaves | drawn, sep="/"), **extra}
    return Run(base.workdir, base.directory, 3, config, configs.make_task(config), variables, "1" * 64)

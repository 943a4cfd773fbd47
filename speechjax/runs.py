"""What other commands read of a run: its config and its weights, without touching a folder that may be in use.

And runs that nothing trained, with weights from elsewhere, which all commands take for runs.
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
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from speechjax import checkpoint
from speechjax import config as configs
from speechjax.errors import UserError
from speechjax.logs import replace_file
from speechjax.step import State

SOURCE = "source.json"  # of a run that nothing trained: where its weights come from


@dataclass(frozen=True, eq=False)
class Run:
    """The task of a run, its `variables` at `step`, and a digest of these."""

    workdir: Path
    directory: Path
    step: int
    config: ConfigDict
    task: Any
    variables: dict[str, Any]
    digest: str


def open_run(which: str, place: jax.sharding.Sharding) -> Run:
    """WORKDIR, WORKDIR@best, WORKDIR@newest or WORKDIR@STEP; parameters and other state of the model go to `place`.

    Without @ it is the best checkpoint, or the newest where none was judged yet.  Raises UserError where the run, its
    config or the checkpoint cannot be read.
    """
    directory = find_checkpoint(which)
    workdir = directory.parent.parent
    config = read_config(workdir)
    params, extra, sha = read_weights(directory, place)
    variables = {"params": params, **extra}
    return Run(workdir, directory, int(directory.name), config, configs.make_task(config), variables, sha)


def find_checkpoint(which: str) -> Path:
    """The folder of the checkpoint that `which` names, see `open_run`; UserError where there is none."""
    folder, at, name = which.rpartition("@")
    named = bool(at) and (name.isdecimal() or name in ("best", "newest"))
    workdir, name = Path(folder if named else which).expanduser().absolute(), name if named else ""
    if not workdir.is_dir():
        raise UserError(f"{which}: no such folder; name the --workdir of a run, perhaps with @STEP, @best or @newest")
    found = {room: _steps(workdir / room) for room in ("best", "checkpoints")}
    for room, steps in found.items():
        wanted = steps if name in ("", "best" if room == "best" else "newest") else [s for s in steps if str(s) == name]
        if wanted:
            return workdir / room / str(wanted[-1])
    there = sorted({*found["best"], *found["checkpoints"]})
    known = f"there are {', '.join(map(str, there))}" if there else "there is none yet"
    raise UserError(f"{which}: no such checkpoint in {workdir}; {known}")


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run; UserError where there is none."""
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(f"{workdir}: not the workdir of a run, there is no config.json")
    try:
        return config_of(json.loads(file.read_text(encoding="utf-8")), str(file))
    except ValueError as error:
        raise UserError(f"{file} is not the config of a run: {error}") from error


def config_of(content: Any, source: str) -> ConfigDict:
    """The config that JSON from `source` says; UserError where it is none."""
    try:
        return ConfigDict(_tuples(content))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is not the config of a run: {error}") from error


def _tuples(tree: Any) -> Any:
    """JSON has only lists; a config has tuples."""
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def _steps(folder: Path) -> list[int]:
    """Steps of finished checkpoints; what is being written, or was set aside, has other names."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def read_weights(directory: Path, place: jax.sharding.Sharding | None = None) -> tuple[Any, Any, str]:
    """(params, extra, digest of both) of a checkpoint, checked, at `place` or on the host; no optimizer state is read.

    Not by `Checkpoints`, which tidies the folder of a run that may still be going on.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(directory / "meta")
        if meta["format"] != checkpoint.FORMAT:
            raise UserError(
                f"{directory} has format {meta['format']}, this version reads {checkpoint.FORMAT}; use the version "
                "that wrote it"
            )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.metadata(directory / "state").item_metadata.tree
            wanted = {name: saved[name] for name in ("params", "extra")}
            like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place), wanted)
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            if place:
                how = ocp.checkpoint_utils.construct_restore_args(like)
            args = ocp.args.PyTreeRestore(item=like, restore_args=how, partial_restore=True)
            state = reader.restore(directory / "state", args=args)
        sizes = {name: len(jax.tree.leaves(saved[name])) for name in ("step", "params", "opt_state")}
        digests = {name: checkpoint.digest(state[name]) for name in ("params", "extra")}
        after = sum(sizes.values())  # a digest lists the leaves of step, params, opt_state, extra, ... in this order
        first = meta["digest"]
        if (
            first[sizes["step"] : sizes["step"] + sizes["params"]] != digests["params"]
            or first[after : after + len(digests["extra"])] != digests["extra"]
        ):
            raise ValueError("its digest does not match its contents")
    except UserError:
        raise
    except Exception as error:  # orbax raises many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"checkpoint {directory} cannot be read ({reason}); name another, e.g. RUNDIR@STEP") from error
    sha = hashlib.sha256(json.dumps(digests, sort_keys=True).encode())
    return state["params"], state["extra"], sha.hexdigest()


def write_run(
    workdir: Path, config: Any, params: Any, extra: Any, *, source: Any, step: int = 0,
    vocabulary: Mapping[str, bytes] | None = None,
) -> None:  # fmt: skip
    """A folder with a config, vocabularies and one checkpoint without an optimizer, which others can begin with.

    It is kept where the best checkpoint of a run is, because no training goes on from it.  `source` is JSON that says
    where the weights come from.  Raises UserError where something is in `workdir` already.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"{workdir} is there already, and not empty: name a new folder")
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in (vocabulary or {}).items():
        replace_file(workdir / name, content)
    zero = jnp.int32(0)
    state = State(
        step=jnp.int32(step), params=params, opt_state={}, extra=extra, meters={}, skipped=zero, skipped_in_row=zero,
    )  # fmt: skip
    checkpoints = checkpoint.Checkpoints(workdir / "best", keep=1, every=1)
    checkpoints.save(step, jax.tree.map(jnp.asarray, state), dict(source=source), force=True)
    checkpoints.close()
    replace_file(workdir / SOURCE, (json.dumps(source, indent=2) + "\n").encode())
    text = json.dumps(configs.to_json(config), indent=2) + "\n"
    replace_file(workdir / "config.json", text.encode())  # last: with it the folder is whole

"""Parameters of another run to begin with: continued pretraining, and models that contain another's encoder."""

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from speechjax.checkpoint import FORMAT, digest
from speechjax.errors import UserError
from speechjax.step import State

log = logging.getLogger("speechjax")


def find_checkpoint(source: str) -> Path:
    """The folder of a checkpoint, named `WORKDIR` (the newest), `WORKDIR@STEP` or `WORKDIR@best`.

    Raises UserError where there is none.
    """
    text, at, which = source.rpartition("@")
    workdir, which = (Path(text), which) if at and not Path(source).is_dir() else (Path(source), "")
    workdir = workdir.expanduser().absolute()
    if not workdir.is_dir():
        raise UserError(f"no run in {str(workdir)!r}: name the --workdir of one, perhaps with @STEP or @best")
    room = workdir / ("best" if which == "best" else "checkpoints")
    steps = sorted(int(p.name) for p in room.iterdir() if p.name.isdigit()) if room.is_dir() else []
    if not steps:
        raise UserError(f"no checkpoint in {room}; has the run saved one?")
    if which in ("", "best"):
        return room / str(steps[-1])
    if which not in map(str, steps):
        raise UserError(f"{workdir} has no checkpoint {which!r}; there are: {', '.join(map(str, steps))}, best")
    return room / which


def read_collection(checkpoint: Path, collection: str = "params") -> Any:
    """One part of a checkpoint's state, e.g. "params" or "extra", as arrays on the host; nothing else is read.

    Raises UserError where it is damaged (its digest does not match) or of another format.
    """
    try:
        with ocp.CheckpointManager(checkpoint.parent, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
            meta = manager.restore(int(checkpoint.name), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            there = reader.metadata(checkpoint / "state").item_metadata.tree
            wanted = {k: v for k, v in there.items() if k == collection}
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
            found = reader.restore(
                checkpoint / "state", ocp.args.PyTreeRestore(item=like, restore_args=plain, partial_restore=True)
            )[collection]
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read the checkpoint {checkpoint} ({reason})") from error
    if meta["format"] != FORMAT:
        raise UserError(f"{checkpoint} has format {meta['format']}, this version reads {FORMAT}")
    # Digests stand in the order of the state's fields, of which the checkpoint only knows the names.
    before = itertools.takewhile(lambda name: name != collection, (f.name for f in dataclasses.fields(State)))
    first = sum(len(jax.tree.leaves(there[name])) for name in before)
    own = digest(found)
    if meta["digest"][first : first + len(own)] != own:
        raise UserError(f"the checkpoint {checkpoint} is damaged: its digest does not match; try an earlier @STEP")
    return found


def fresh_state(task: Any, init: Any, place: Any, start_from: str) -> State:
    """State of step 0: drawn by `init`, then `start_from`'s parameters if it names a run, then what the task does."""
    state = jax.jit(init, out_shardings=place)()
    params = warm_start(state.params, start_from) if start_from else state.params
    params, extra = task.start(params, state.extra)
    return jax.device_put(state.replace(params=params, extra=extra), place)


def warm_start(params: Any, source: str) -> Any:
    """`params` with everything that the checkpoint `source` has under the same path and in the same shape.

    Heads may differ: they begin anew.  Raises UserError where the encoders differ in shape, or share nothing.
    """
    checkpoint = find_checkpoint(source)
    theirs: dict[str, Any] = flatten_dict(read_collection(checkpoint), sep="/")
    ours: dict[str, Any] = flatten_dict(params, sep="/")
    shared = [k for k in ours if k in theirs]
    other = [k for k in shared if ours[k].shape != theirs[k].shape]
    if unlike := [k for k in other if k.startswith("encoder/")]:
        shown = "; ".join(f"{k}: {theirs[k].shape} there, {ours[k].shape} here" for k in unlike[:2])
        raise UserError(f"config.train.start_from={source!r} has another encoder ({shown}); use its model block")
    taken = {k: theirs[k].astype(ours[k].dtype) for k in shared if k not in other}
    if not any(k.startswith("encoder/") for k in taken):
        raise UserError(f"config.train.start_from={source!r} shares no parameter of the encoder with this model")
    new = [k for k in ours if k not in taken]
    log.info(
        "%d of %d parameter arrays come from %s; new: %s",
        len(taken), len(ours), checkpoint, ", ".join(new[:6]) + (", ..." if len(new) > 6 else "") or "none",
    )  # fmt: skip
    return unflatten_dict(ours | taken, sep="/")

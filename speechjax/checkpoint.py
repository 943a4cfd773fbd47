"""Checkpoints: orbax behind one door, with a digest, because a flipped byte restores without complaint."""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from speechjax.distributed import all_well
from speechjax.errors import UserError

FORMAT = 2
log = logging.getLogger("speechjax")


@jax.jit
def _digests(tree: Any) -> list[jax.Array]:
    """One uint32 a leaf: a hash of every word and its place, summed modulo 2**32.

    Integer sums, so any sharding gives the same number.  The hash is one-to-one at every place, so no single
    changed word can hide; and it mixes the bits (half of MurmurHash3's finalizer), for in a plain weighted sum two
    flipped signs, or two powers of two that changed places, do.
    """

    def digest(x):
        words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        place = jnp.zeros(x.shape, jnp.uint32)  # no reshape, which would gather what is split
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = words.astype(jnp.uint32) + place * jnp.uint32(0x9E3779B9)
        mixed = (mixed ^ (mixed >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
        mixed = mixed ^ (mixed >> jnp.uint32(13))
        # In two sums, which XLA would make one: on CPUs a sum over all axes takes more than twice the time.
        columns = jnp.sum(mixed, axis=0, dtype=jnp.uint32) if x.ndim > 1 else mixed
        return jnp.sum(jax.lax.optimization_barrier(columns), dtype=jnp.uint32)

    return [digest(x) for x in jax.tree.leaves(tree)]


def digest(tree: Any) -> list[int]:
    """Digests of all leaves of a tree of arrays, in tree order."""
    return [int(d) for d in jax.device_get(_digests(tree))]


class Checkpoints:
    """`<directory>/<step>/`: state and a JSON `meta`, written in the background, the newest `keep` kept."""

    def __init__(self, directory: Path, *, keep: int, every: int):
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True,
            should_save_fn=lambda step, _: step % every == 0,  # its own intervals add the very first step
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def due(self, step: int) -> bool:
        """Whether `step` is one to save, or the job is being pre-empted: orbax decides, so that all processes agree.

        Asked at every step.
        """
        return self._manager.should_save(step)

    def save(self, step: int, state: Any, meta: dict[str, Any], *, force: bool = False) -> bool:
        """Starts saving if `step` is due, or by `force`; True if it did, False also where it is there already."""
        if step in self._manager.all_steps() or not (force or self.due(step)):
            return False
        full = {**meta, "step": step, "format": FORMAT, "digest": digest(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(full))
        return self._manager.save(step, args=items, force=True)

    def preempted(self, step: int) -> bool:
        """True at the step that all processes agreed to stop at after a SIGTERM to any."""
        return jax.distributed.is_initialized() and self._manager.reached_preemption(step)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Newest intact (state, meta) with the shapes, types and shardings of `like`; None where there is none.

        A step that cannot be read, or whose digest does not match, is set aside as `<step>.broken` and the one
        before is tried.  Raises UserError when steps exist and none is intact, or the newest is of another format.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            found, reason = None, "another process could not read it"
            try:
                found = self._read(step, like)
            except UserError:  # of another version: whole, but not for us
                raise
            except Exception as error:
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            whole = all_well(found is not None)
            if whole and found is not None:
                if found[1]["digest"] == digest(found[0]):
                    return found
                reason = "its digest does not match its contents"
            log.warning("checkpoint %d in %s is broken (%s); set aside", step, self.directory, reason)
            self._set_aside(step)
        if steps:
            raise UserError(
                f"no intact checkpoint in {self.directory} (tried {', '.join(map(str, steps))}, kept as *.broken); "
                "start anew with another --workdir"
            )
        return None

    def _read(self, step, like):
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["format"] != FORMAT:
            raise UserError(
                f"{self.directory / str(step)} has format {meta['format']}, this version reads {FORMAT}; "
                "use the version that wrote it or another --workdir"
            )
        if "digest" not in meta:
            raise ValueError("its meta has no digest")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=items)["state"], meta

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0 and (self.directory / str(step)).exists():
            aside = self.directory / f"{step}.broken"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)
        all_well(True)  # nobody goes on before that
        self._manager.reload()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when everything started is on disk; raises what the background writer raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

"""What saving and starting cost: the share of a save that training does not wait for, and the time to the first step.

    python tests/real/costs.py save --config=configs/pretrain/wav2vec2.py:size=base --repeats=5
    python tests/real/costs.py start --config=configs/pretrain/wav2vec2.py:size=tiny --source=folder:/data/speech

save: a fresh state of the config is saved as training saves it, waiting for each save.  start: the command is given
again and again until its first step is in metrics.jsonl; the first time is with an empty compile cache.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def save(args: argparse.Namespace) -> None:
    import jax

    from speechjax import config as configs
    from speechjax import sharding
    from speechjax.checkpoint import Checkpoints
    from speechjax.optim import make_optimizer
    from speechjax.step import init_state
    from speechjax.verb import keep_memory

    keep_memory()  # as the main job does
    config = configs.load(args.config, [])
    task = configs.make_task(config)
    tx, _ = make_optimizer(steps=config.train.steps, **config.optim)
    mesh = sharding.make_mesh(**config.mesh)
    batch = dict(
        audio=jax.ShapeDtypeStruct((mesh.size, 16000), "int16"), lengths=jax.ShapeDtypeStruct((mesh.size,), "int32")
    )
    batch |= {name: jax.ShapeDtypeStruct((mesh.size,), "float32") for name in ("mean", "std", "unread")}
    with jax.set_mesh(mesh):
        init = functools.partial(init_state, task, tx, 0, batch)
        abstract = sharding.placed(mesh, jax.eval_shape(init))
        state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        rows = []
        with tempfile.TemporaryDirectory(dir=args.workdir) as folder:
            checkpoints = Checkpoints(Path(folder), keep=1, every=1)
            for step in range(1, args.repeats + 2):
                began = time.monotonic()
                checkpoints.save(step, state, {"best": {}, "model": {}, "data": ""}, force=True)
                returned = time.monotonic()
                checkpoints.wait()
                rows.append((returned - began, time.monotonic() - began))
            checkpoints.close()
    rows = rows[1:]  # the first one compiles the digests
    hidden = [1 - waited / total for waited, total in rows]
    print(json.dumps(dict(
        gigabytes=size / 1e9, waited=median(w for w, _ in rows), total=median(t for _, t in rows),
        hidden=median(hidden), hidden_range=(min(hidden), max(hidden)),
    ), indent=1))  # fmt: skip


def start(args: argparse.Namespace) -> None:
    cache = tempfile.mkdtemp(dir=args.workdir)
    seconds = []
    for _ in range(args.repeats + 1):
        workdir = Path(tempfile.mkdtemp(dir=args.workdir))
        command = [
            sys.executable, "-m", "speechjax.main", f"--config={args.config}", f"--workdir={workdir / 'run'}",
            "--config.train.log_every=1", *([f"--config.data.source={args.source}"] if args.source else []),
        ]  # fmt: skip
        began = time.monotonic()
        worker = subprocess.Popen(
            command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}, start_new_session=True
        )
        metrics = workdir / "run/metrics.jsonl"
        while not (metrics.exists() and '"step": 1,' in metrics.read_text()):
            assert worker.poll() is None, "the run ended before its first step"
            time.sleep(0.02)
        seconds.append(time.monotonic() - began)
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
        shutil.rmtree(workdir)
    shutil.rmtree(cache)
    print(json.dumps(dict(cold=seconds[0], warm=median(seconds[1:]), warm_range=(min(seconds[1:]), max(seconds[1:])))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("save", "start"))
    parser.add_argument("--config", required=True)
    parser.add_argument("--source", default="")
    parser.add_argument("--workdir", default=None, help="folder for scratch files")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    {"save": save, "start": start}[arguments.what](arguments)

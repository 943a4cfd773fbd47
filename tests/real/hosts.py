"""A real run: four processes on this machine, killed three times, against one process that nothing happens to.

    python tests/real/hosts.py --source=folder:/data/speech --out=DIR --steps=300

Both train `configs/pretrain/wav2vec2.py:size=tiny`.  The four are started by `speechjax.launch local`, which starts
them again after each kill; the one has four devices.  Writes DIR/hosts.json and DIR/hosts.png, both curves of the loss.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from speechjax.logs import read_metrics

CONFIG = "configs/pretrain/wav2vec2.py:size=tiny"


def command(verb: list[str], workdir: Path, args: argparse.Namespace) -> list[str]:
    settings = [
        f"data.source={args.source}", "data.shapes=1", f"train.steps={args.steps}", "train.log_every=5",
        "train.checkpoint_every=20", f"train.eval_every={args.steps}",
    ]  # fmt: skip
    return [
        sys.executable, "-m", *verb, f"--config={CONFIG}", f"--workdir={workdir}",
        *(f"--config.{text}" for text in settings),
    ]  # fmt: skip


def workers(workdir: Path) -> list[int]:
    """Processes of the job in `workdir`, in their order."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"speechjax.main" in line and f"--workdir={workdir}".encode() in line:
            number = [e for e in environment if e.startswith(b"SPEECHJAX_PROCESS=")]
            found += [(int(number[0].split(b"=")[1]), int(entry.name))] if number else []
    return [pid for _, pid in sorted(found)]


def step_of(workdir: Path) -> int:
    return max((row["step"] for row in read_metrics(workdir) if row["split"] == "train"), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    one = args.out / "one"
    subprocess.run(command(["speechjax.main"], one, args), env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"}, check=True)

    four = args.out / "four"
    launcher = subprocess.Popen(
        command(["speechjax.launch", "local", "--processes=4", "--devices=1", "--peer-seconds=20"], four, args)
    )
    draw, kills = random.Random(0), []
    for share in (0.2, 0.45, 0.7):
        wanted = int((share + 0.1 * draw.random()) * args.steps)
        while step_of(four) < wanted:
            assert launcher.poll() is None, "the job ended before it was killed"
            time.sleep(0.1)
        victim = draw.randrange(4)
        pids = workers(four)
        kills.append(dict(step=step_of(four), process=victim))
        os.kill(pids[victim], signal.SIGKILL)
        while set(pids) & set(workers(four)):
            time.sleep(0.1)
    code = launcher.wait()
    summary(args, one, four, kills, code)


def summary(args: argparse.Namespace, one: Path, four: Path, kills: list, code: int) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    curves = {}
    for name, workdir in (("one process, four devices", one), ("four processes, killed three times", four)):
        rows = [row for row in read_metrics(workdir) if row["split"] == "train"]
        curves[name] = [row["step"] for row in rows], np.asarray([row["loss"] for row in rows])
    (steps, straight), (again, killed) = curves.values()
    assert steps == again, "a step is missing, or there twice"
    apart = np.abs(killed - straight) / straight
    found = dict(code=code, kills=kills, steps=len(steps), largest=float(apart.max()), median=float(np.median(apart)),
                 first=float(straight[0]), last=float(straight[-1]))  # fmt: skip
    (args.out / "hosts.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for (name, (x, y)), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(x, y, style, label=name)
    for kill in kills:
        axes.axvline(kill["step"], color="gray", linewidth=0.6)
    axes.set(xlabel="update", ylabel="loss")
    axes.legend()
    figure.savefig(args.out / "hosts.png", dpi=120)


if __name__ == "__main__":
    main()

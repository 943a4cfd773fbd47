"""A real run: the largest models through every export, each in a process of its own; one table.

    python tests/real/large.py DIR [--config=configs/pretrain/hubert.py:size=xlarge] [--formats=hf,onnx,...]

Their weights are drawn at random: what is tried is sizes, which some formats limit to 2 GB, memory and time.  Every
export loads what it wrote and compares the answers, as `speechjax.export` does.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FORMATS = ("safetensors", "hf", "stablehlo", "onnx", "saved_model", "litert")


def make(config: str, workdir: Path) -> None:
    """The folder of a run that nobody has trained."""
    import jax

    from speechjax import config as configs
    from speechjax.runs import write_run
    from tests.formats.served_runs import drawn

    config = configs.load(config)
    extra = drawn(configs.make_task(config))
    params = extra.pop("params")
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    write_run(workdir, config, params, extra, source=dict(made="at random"))


def tried(kind: str, dtype: str, workdir: Path, out: Path) -> dict:
    """One export: bytes of its folder and of memory at most, seconds, and what it said last."""
    command = [sys.executable, "-m", "speechjax.export", f"--workdir={workdir}", f"--format={kind}",
               f"--dtype={dtype}", f"--out={out}"]  # fmt: skip
    began = time.monotonic()
    with open(f"{out}.log", "w+") as log:
        process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        log.seek(0)
        said = log.read()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
    return dict(
        format=kind, dtype=dtype, code=os.waitstatus_to_exitcode(status), size=size, memory=used.ru_maxrss * 1024,
        seconds=time.monotonic() - began, differences=re.findall(r"\d\.\d+e[-+]\d+", said),
        said=said.strip().splitlines()[-1:],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default=f"{REPO}/configs/pretrain/hubert.py:size=xlarge")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    workdir = args.folder / "run"
    if not workdir.exists():
        make(args.config, workdir)
    for kind in args.formats.split(","):
        found = tried(kind, args.dtype, workdir, args.folder / f"{kind}-{args.dtype}")
        with open(args.folder / "results.jsonl", "a") as file:
            file.write(json.dumps(found) + "\n")
        print(
            f"{kind:12} {args.dtype:9} code {found['code']}, {found['size'] / 1e9:.2f} GB, {found['seconds']:.0f} s, "
            f"{found['memory'] / 2**30:.1f} GiB; {' '.join(found['differences'])} {' '.join(found['said'])[:150]}",
            flush=True,
        )


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    main()

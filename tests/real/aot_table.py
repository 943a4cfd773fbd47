"""A real run: what the published models need on hardware that is not here, as a table.

    python tests/real/aot_table.py --out=DIR
    python tests/real/aot_table.py --out=DIR --largest --models='best_rq 600M' --topologies=v5e:4x4,h100:8

A batch that nearly fills the memory is compiled; --largest looks for the largest one, as happens anyway where that
batch does not fit.  One compiler at a time, some minutes for each batch tried.  What is in DIR is not compiled
again, so the command can be given again after an interruption.  The state is split over all devices (--mesh.fsdp).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs" / "pretrain"
MODELS = {  # and the seconds of a row, and the rows to try for each 16 GiB
    "wav2vec2 base": ("wav2vec2.py:size=base", 15.625, 36),
    "wav2vec2 large": ("wav2vec2.py:size=large", 20.0, 18),
    "hubert xlarge": ("hubert.py:size=xlarge", 15.625, 6),
    "best_rq 600M": ("best_rq.py:size=paper", 16.0, 74),
}
TOPOLOGIES = {"v5e:4x4": (16, 16), "v5p:2x2x4": (16, 96), "v6e:4x4": (16, 32), "h100:8": (8, 64), "a100:8": (8, 64)}


def measure(model: str, topology: str, out: Path, largest: bool) -> dict[str, Any]:
    """What the verb writes; {} where it fails, with its log beside."""
    file = out / f"{model}-{topology}.json".replace(" ", "_").replace(":", "_")
    if not file.exists():
        (config, seconds, held), (devices, gib) = MODELS[model], TOPOLOGIES[topology]
        command = [
            sys.executable, "-m", "speechjax.aot", f"--config={CONFIGS / config}", f"--topology={topology}",
            f"--mesh.fsdp={devices}", f"--config.data.row_multiple={devices}",
            f"--config.data.batch_seconds={held * gib // 16 * devices * seconds}", f"--json={file}",
            *(["--largest"] if largest else []),
        ]  # fmt: skip
        with open(file.with_suffix(".log"), "w") as log:
            subprocess.run(command, stdout=log, stderr=log, check=False)
    return json.loads(file.read_text()) if file.exists() else {}


def row(model: str, topology: str, found: dict[str, Any]) -> str:
    gib = 2**30
    memory, batch = found["memory"], found["batch"]
    largest = found.get("largest") or dict(
        seconds_a_device=batch["seconds_a_device"], rows_a_device=batch["rows"] // found["devices"],
        needed=memory["needed"],
    )  # fmt: skip
    rate = batch["seconds"] / found["devices"] / found["least_step_seconds"]
    cells = [
        model, f"{found['parameters'] / 1e6:,.0f} M", topology, f"{largest['seconds_a_device']:,.0f} s",
        f"{largest['rows_a_device']} x {batch['seconds_a_row']:.1f} s",
        f"{largest['needed'] / gib:.1f} of {memory['device'] / gib:.1f} GiB",
        f"{rate:,.0f} s",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--largest", action="store_true", help="look for the largest batch")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| model | parameters | hardware | a device holds | rows | memory | audio a second, at most |")
    print("|---|---|---|---|---|---|---|")
    for model in args.models.split(","):
        for topology in args.topologies.split(","):
            if found := measure(model, topology, args.out, args.largest):
                print(row(model, topology, found), flush=True)
            else:
                print(f"| {model} | | {topology} | failed, see its log | | | |", flush=True)


if __name__ == "__main__":
    main()

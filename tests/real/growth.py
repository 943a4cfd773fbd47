"""How step time and memory grow with batch, length, depth and devices: growth.json, docs/growth.png, docs/growth.md.

    python tests/real/growth.py --out=DIR
    python tests/real/growth.py --out=DIR --quick
    python tests/real/growth.py --out=DIR --draw

Points of one process are timed in turns: batch and length in one, depth in one, every number of devices in its own.
Some eight minutes on two cores that do nothing else, most of them the compiler's.  --quick takes toy sizes, to see that
everything runs, and writes all three files into DIR.  --draw measures nothing: picture and page again, from
DIR/growth.json.
"""

import argparse
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent.parent
CONFIG = "configs/pretrain/wav2vec2.py:size=tiny"
REPEATS = 5
MIB = 2**20
KEPT, AGAIN = "layers kept", "layers computed again"
PANELS = ("batch", "length", "depth", "devices")

Curve = list[dict[str, Any]]


@dataclass(frozen=True)
class Point:
    """A step on `rows` of `seconds` in the model of `overrides`."""

    curve: str
    layers: int
    rows: int
    seconds: float
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """What is measured: `deep` and `split` are rows and seconds over depth and devices."""

    width: int
    layers: int
    rows: tuple[int, ...]
    row_seconds: float
    lengths: tuple[float, ...]
    depths: tuple[int, ...]
    deep: tuple[int, float]
    devices: tuple[int, ...]
    split: tuple[int, float]

    def model(self, layers: int) -> tuple[str, ...]:
        return (f"model.width={self.width}", f"model.layers={layers}", "model.heads=4", f"model.mlp={4 * self.width}")

    @property
    def wide(self) -> tuple[str, ...]:
        return (*self.model(self.layers), f"model.frontend.channels={(self.width,) * 7}")

    @property
    def processes(self) -> list[tuple[str, int]]:
        """(what is measured, on how many devices)."""
        return [("shape", 1), ("depth", 1), *(("devices", count) for count in self.devices)]


FULL = Sizes(
    256, 4, (1, 2, 4, 8), 5.0, (2.5, 5.0, 10.0, 20.0, 40.0), (2, 4, 8, 16), (2, 10.0), (1, 2, 4, 8), (8, 2.5)
)  # fmt: skip
QUICK = Sizes(64, 1, (1, 2), 1.0, (0.5, 1.0), (1, 2), (2, 1.0), (1, 2), (8, 0.5))


def points(what: str, sizes: Sizes, devices: int) -> list[Point]:
    """Those of one process."""
    if what == "shape":
        shapes = dict.fromkeys([(rows, sizes.row_seconds) for rows in sizes.rows] + [(1, s) for s in sizes.lengths])
        return [Point("measured", sizes.layers, *shape, sizes.wide) for shape in shapes]
    if what == "depth":  # behind the config's own convolutions, a tenth of the work: layers are most of the step
        how = {KEPT: False, AGAIN: True}
        return [
            Point(name, layers, *sizes.deep, (*sizes.model(layers), f"model.scan={again}", f"model.remat={again}"))
            for layers in sizes.depths
            for name, again in how.items()
        ]
    axes = {"mesh.data": sizes.wide, "mesh.fsdp": (*sizes.wide, f"mesh.fsdp={devices}")}
    if devices == 1:  # they are the same
        del axes["mesh.fsdp"]
    return [Point(axis, sizes.layers, *sizes.split, overrides) for axis, overrides in axes.items()]


# ---- one process


def measure(what: str, sizes: Sizes, repeats: int) -> Curve:
    import jax

    from speechjax import config as configs
    from speechjax.speed import work
    from speechjax.speed.ours import Training
    from speechjax.speed.turns import Contestant, spread, take_turns
    from speechjax.verb import keep_memory

    keep_memory()
    devices = jax.device_count()
    found, sides = [], []
    for point in points(what, sizes, devices):
        config, _ = work.open_config(str(REPO / CONFIG), point.overrides, "", comparable=False)
        task = configs.make_task(config)
        rows, samples = work.shape_of(task, point.rows * point.seconds, point.seconds, devices)
        batch = work.make_batch(task, rows, samples)
        sides.append(Training(config, batch))
        found.append(dict(
            curve=point.curve, layers=point.layers, devices=devices, rows=rows, row_seconds=point.seconds,
            audio=work.audio_seconds(batch), overrides=point.overrides, parameters=sides[-1].parameters,
            flops=work.train_flops(config, batch),
        ))  # fmt: skip
    names = [" ".join(str(one[key]) for key in ("curve", "layers", "rows", "row_seconds")) for one in found]
    timings = take_turns([Contestant(name, side.open) for name, side in zip(names, sides, strict=True)], repeats)
    for one, side, timing in zip(found, sides, timings, strict=True):
        if timing.error:
            raise SystemExit(f"{timing.name} failed: {timing.error}")
        held = side.program.memory_analysis().argument_size_in_bytes
        one |= dict(
            seconds=spread(timing.wall), times=timing.wall, memory=side.memory, held=held,
            compile_seconds=side.compile_seconds,
        )  # fmt: skip
    return found


def measure_all(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """{"shape": points, "depth": points, "devices": points, and what they were measured on}."""
    from speechjax import machine
    from speechjax.speed.measure import LIBRARIES

    found: dict[str, Any] = dict(
        quick=args.quick, load=machine.load(), threads=machine.threads(), versions=machine.versions(LIBRARIES)
    )
    for what, devices in sizes.processes:
        print(f"{what}, devices: {devices}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, f"--out={args.out}", f"--measure={what}", f"--repeats={args.repeats}"]
        done = subprocess.run(
            [*command, *["--quick"] * args.quick], stdout=subprocess.PIPE, text=True, check=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        )  # fmt: skip
        found.setdefault(what, []).extend(json.loads(done.stdout.splitlines()[-1]))
    return found


# ---- the picture


def curves(found: dict[str, Any], panel: str) -> dict[str, Curve]:
    """{name: its points, with `x`}; one device is the beginning of every way to split."""
    key = {"batch": "rows", "length": "row_seconds", "depth": "layers", "devices": "devices"}[panel]
    chosen = found["shape"] if panel in ("batch", "length") else found[panel]
    if panel == "batch":
        chosen = [one for one in chosen if one["row_seconds"] == chosen[0]["row_seconds"]]
    if panel == "length":
        chosen = [one for one in chosen if one["rows"] == 1]
    result: dict[str, Curve] = {}
    for one in sorted(chosen, key=lambda one: one[key]):
        result.setdefault(one["curve"], []).append(one | {"x": one[key]})
    if panel == "devices":
        result["mesh.fsdp"] = [result["mesh.data"][0], *result["mesh.fsdp"]]
    return result


def _named(found: dict[str, Any], panel: str) -> tuple[str, str]:
    """(title, what x is)."""
    one = next(iter(curves(found, panel).values()))[0]
    rows = f"{one['rows']} rows of {one['row_seconds']:g} s"
    return {
        "batch": (f"Batch: rows of {one['row_seconds']:g} s", "rows"),
        "length": ("Length: one row", "seconds"),
        "depth": (f"Depth: {rows}", "layers"),
        "devices": (f"Virtual devices: {rows} in all", f"devices, all of them on the same {found['threads']} cores"),
    }[panel]


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 8), layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(PANELS))
    for column, panel in enumerate(PANELS):
        (title, x), lines = _named(found, panel), curves(found, panel)
        _times(grid[0, column], lines, panel)
        _memories(grid[1, column], lines, panel)
        grid[0, column].set_title(title, fontsize=12)
        for axes in grid[:, column]:
            axes.set_xlabel(x)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            ticks = [one["x"] for one in next(iter(lines.values()))]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=9)
    grid[0, 0].set_ylabel("seconds a step")
    grid[1, 0].set_ylabel("planned memory a device, MiB")
    figure.suptitle(
        f"A training step of wav2vec 2.0 in float32 on {found['threads']} CPU cores: medians and quartiles.  "
        "Virtual devices share the cores: their time shows what splitting costs.",
        fontsize=12,
    )
    figure.savefig(path, dpi=100)


def _times(axes: Any, lines: dict[str, Curve], panel: str) -> None:
    for color, (name, line) in zip(("C0", "C1"), lines.items(), strict=False):
        middle = [one["seconds"]["median"] for one in line]
        low, high = zip(*(one["seconds"]["quartiles"] for one in line), strict=True)
        spread = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar([one["x"] for one in line], middle, yerr=spread, color=color, marker="o", capsize=4, label=name)
    line = next(iter(lines.values()))
    xs, first = [one["x"] for one in line], line[0]["seconds"]["median"]
    if panel == "devices":
        axes.axhline(first, color="0.4", linestyle="--", label="if splitting cost nothing")
        return
    if panel != "depth":
        axes.plot([0, xs[-1]], [0, first * xs[-1] / xs[0]], color="0.4", linestyle="--", label="in proportion")
    if panel != "batch":
        flops = [first * one["flops"] / line[0]["flops"] for one in line]
        axes.plot(xs, flops, color="0.4", linestyle=":", label="as FLOPs grow")


def _memories(axes: Any, lines: dict[str, Curve], panel: str) -> None:
    for color, (name, line) in zip(("C0", "C1"), lines.items(), strict=False):
        xs = [one["x"] for one in line]
        axes.plot(xs, [one["memory"] / MIB for one in line], color=color, marker="o", label=name)
        if panel == "devices":
            axes.plot(
                xs, [one["held"] / MIB for one in line], color=color, linestyle=":", label=f"{name}: state and batch"
            )
    line = next(iter(lines.values()))
    xs, first = [one["x"] for one in line], line[0]["memory"] / MIB
    if panel == "devices":
        axes.plot(xs, [first / x for x in xs], color="0.4", linestyle="--", label="an equal share")
        return
    axes.plot(xs, [one["held"] / MIB for one in line], color="0.4", linestyle=":", label="state and batch")
    if panel != "depth":
        axes.plot([0, xs[-1]], [0, first * xs[-1] / xs[0]], color="0.4", linestyle="--", label="in proportion")


# ---- the page


def numbers(found: dict[str, Any]) -> list[str]:
    """What the picture shows, in numbers."""
    batch, length = (curves(found, panel)["measured"] for panel in ("batch", "length"))
    kept, again = (curves(found, "depth")[name] for name in (KEPT, AGAIN))
    copied, split = (curves(found, "devices")[name] for name in ("mesh.data", "mesh.fsdp"))
    row = (batch[-1]["memory"] - batch[0]["memory"]) / (batch[-1]["x"] - batch[0]["x"]) / MIB
    share = 1 - again[-1]["memory"] / kept[-1]["memory"]
    return [
        f"Batch: {batch[-1]['x']} rows take {_ratio(batch[0], batch[-1])} the time of {batch[0]['x']}, which takes "
        f"{_seconds(batch[0]):.3f} s.  One row more needs {row:,.0f} MiB.",
        f"Length: {length[-1]['x']:g} s take {_ratio(length[0], length[-1])} the time of {length[0]['x']:g} s, for "
        f"{_ratio(length[0], length[-1], 'audio')} the audio and {_ratio(length[0], length[-1], 'flops')} the FLOPs.  "
        f"Memory goes from {_mib(length[0])} to {_mib(length[-1])}.",
        f"Depth: {kept[-1]['x']} layers take {_ratio(kept[0], kept[-1])} the time of {kept[0]['x']}, for "
        f"{_ratio(kept[0], kept[-1], 'flops')} the FLOPs, and {_mib(kept[-1])}.  Computed again they need "
        f"{_mib(again[-1])}, {100 * share:.0f} % less, and {_ratio(kept[-1], again[-1])} the time.",
        f"Devices: over {copied[-1]['x']} virtual devices the batch takes {_ratio(copied[0], copied[-1])} the time of "
        f"one with the state copied (`mesh.data`), {_ratio(split[0], split[-1])} with it split (`mesh.fsdp`).",
        f"Memory of one of {copied[-1]['x']} devices: {_mib(copied[-1])} with the state copied, {_mib(split[-1])} with "
        f"it split; one alone needs {_mib(copied[0])}.  State and batch are {_mib(copied[-1], 'held')}, "
        f"{_mib(split[-1], 'held')} and {_mib(copied[0], 'held')} of that.",
    ]


def _seconds(one: dict[str, Any]) -> float:
    return one["seconds"]["median"]


def _ratio(a: dict[str, Any], b: dict[str, Any], key: str = "") -> str:
    return f"{b[key] / a[key] if key else _seconds(b) / _seconds(a):.2f} times"


def _mib(one: dict[str, Any], key: str = "memory") -> str:
    return f"{one[key] / MIB:,.0f} MiB"


def page(found: dict[str, Any]) -> str:
    one, depths = found["shape"][0], [deep["layers"] for deep in found["depth"]]
    lines = "\n".join(textwrap.fill(line, 118, initial_indent="- ", subsequent_indent="  ") for line in numbers(found))
    overrides = "\n".join(f"    {override}" for override in one["overrides"])
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("jax", "jaxlib"))
    return f"""# How a step grows

![step time and memory over batch, length, depth and devices](growth.png)

`tests/real/growth.py` measures this, and writes the picture and this page:

    python tests/real/growth.py --out=DIR{" --quick" * found["quick"]}

It is the training step of `{CONFIG}`, compiled and run as training does it, on batches of
noise, in float32 on {found["threads"]} CPU cores ({versions}; load before: {found["load"][0]:.1f}).  The model has
{one["parameters"] / 1e6:.1f} M parameters; what is not as in `tiny`:

{overrides}

All points of a panel were timed in turns in one process, so that whatever else the machine did slowed them alike; only
each number of devices needs a process of its own.  Points are medians and bars quartiles of {len(one["times"])} rounds.
Memory is what the compiler plans for one device: state, batch and temporaries.

## In numbers

{lines}

## How to read it

- **Batch and length.**  The dashed line goes on from the first point in proportion.  Points below it share a cost that
  does not grow, such as the optimizer's; points above it pay for more than their audio.  The dotted line grows as the
  FLOPs do that `speechjax.flops` counts, beyond proportion with length, for attention compares all pairs of frames.
  Products are not all of a step: norms, activations and softmax are no part of that count, memory traffic neither.
  Below, dotted, what is there before a step: the state (parameters and two moments of each) and the batch.
- **Depth.**  {depths[0]} to {depths[-1]} layers behind the narrow convolutions of `tiny`, which are little of a step.
  "{KEPT}" unrolls them and keeps what the backward pass needs of each (`model.scan=False model.remat=False`).
  "{AGAIN}" (`True` both, as the published sizes have it) keeps of a layer only what went in, and
  computes it again when its gradient is due: at most 4/3 of the FLOPs, for far less memory a layer.
- **Devices.**  One batch, split over ever more virtual devices of one CPU.  They share its cores, so **no step becomes
  faster**: what lies above the dashed line is the price of splitting (collectives, smaller products), and says nothing
  of the speed of real devices.  Memory does: the rows are split in any case; with `mesh.data` the state is copied, with
  `mesh.fsdp` it is split too, and gathered where it is used.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of growth.json")
    parser.add_argument("--docs", type=Path, help="folder of growth.png and growth.md (docs; --quick: that of --out)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="rounds")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--draw", action="store_true", help="from growth.json, without measuring")
    parser.add_argument("--measure", choices=("shape", "depth", "devices"), help=argparse.SUPPRESS)  # one process
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else FULL
    if args.measure:
        print(json.dumps(measure(args.measure, sizes, args.repeats)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "growth.json"
    if not args.draw:
        file.write_text(json.dumps(measure_all(args, sizes), indent=1))
    found = json.loads(file.read_text())
    docs = args.docs or (args.out if found["quick"] else REPO / "docs")
    docs.mkdir(parents=True, exist_ok=True)
    draw(found, docs / "growth.png")
    (docs / "growth.md").write_text(page(found))


if __name__ == "__main__":
    main()

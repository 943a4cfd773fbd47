"""A measurement for people, and as JSON."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

UNLIKE = {"loss": 0.05, "grad_norm": 0.25, "difference": 0.01}  # beyond what chance does to a first step in float32


def show(result: dict[str, Any]) -> None:
    """The measurement as tables on standard output."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    console.print(_runners(result))
    if parts := {k: v for k, v in result["parts"].items() if k not in ("prefixes", "error")}:
        console.print(_parts(parts))
    for line in _lines(result):
        print(line)
    for warning in warnings(result):
        print(f"warning: {warning}")


def _runners(result: dict[str, Any]) -> Table:
    batch = result["batch"]
    what = "training step" if result["what"] == "train" else "inference"
    seconds = batch["samples"] / 16000
    table = Table(title=f"{what} of {result['config']}, {result['dtype']}, {batch['rows']} x {seconds:.1f} s of audio")
    table.add_column("", no_wrap=True)
    known = bool(result["ceiling"]["published"])
    names = ("ms", "quartiles", "audio h/s", "MFU", "of published", "ours is faster", "quartiles", "first step")
    for name in (name for name in names if known or name != "of published"):
        table.add_column(name, justify="right")
    for row in result["runners"]:
        if row["samples"]:
            low, high = row["seconds_spread"]["quartiles"]
            rate, pair = row["audio_hours_a_second"], row.get("against")
            table.add_row(
                row["name"], _ms(row["seconds"]), f"{_ms(low)}-{_ms(high)}", f"{rate:.4f}",
                f"{100 * row['mfu']:.1f} %", *([f"{100 * row['mfu_published']:.1f} %"] if known else []),
                f"{pair['speedup']:.2f} x" if pair else "",
                f"{pair['spread'][0]:.2f}-{pair['spread'][1]:.2f}" if pair else "", f"{row['first_seconds']:.1f} s",
            )  # fmt: skip
        else:
            table.add_row(row["name"], "failed")
    return table


def _parts(parts: dict[str, float]) -> Table:
    step = sum(parts.values())
    table = Table(title="parts of our step: what each adds to a program that ends before it")
    for name in parts:
        table.add_column(name, justify="right")
    table.add_row(*(f"{_ms(seconds)} ms" for seconds in parts.values()))
    table.add_row(*(f"{100 * seconds / step:.0f} %" for seconds in parts.values()))
    return table


def _lines(result: dict[str, Any]) -> list[str]:
    machine, top, memory, batch = (result[key] for key in ("machine", "ceiling", "memory", "batch"))
    flops, seconds = result["flops"], batch["audio_seconds"]
    known = f", published {_tera(top['published'])}" if top["published"] else ""
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters; {flops / 1e9:,.3g} GFLOP a step, "
        f"{flops / seconds / 1e9:.3g} a second of audio",
        f"ceiling {_tera(top['flops_per_second'])} ({_tera(top['model'])} a device in products of the model's size, "
        f"{_tera(top['large'])} in large ones){known}",
        f"compiled in {result['compile_seconds']:.1f} s; memory: {_gib(memory['device'])} of the device, "
        f"{_gib(memory['planned'])} of it the program's as planned, {_gib(memory['host'])} the host's most"
        + (f", {_gib(memory['peer'])} torch's" if memory["peer"] else ""),
        f"input wait: {_input(result['input'])}" if result["what"] == "train" else "",
        f"CPU seconds a step: {_cpu(result['runners'])}",
        _same(result["same"]),
        f"changed: {', '.join(result['changed'])}" if result["changed"] else "",
        f"parts: {result['parts']['error']}" if "error" in result["parts"] else "",
        f"{machine['processor']}, {machine['threads']} threads, {machine['devices']} x {machine['device']}, "
        f"{'tuned malloc, ' if machine['tuned_malloc'] else ''}load "
        f"{machine['load_before'][0]:.1f} before and {machine['load_after'][0]:.1f} after; medians of "
        f"{len(result['runners'][0]['samples'])}, in turns",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    return [line for line in lines if line]


def _cpu(runners: list[dict[str, Any]]) -> str:
    def of(row: dict[str, Any]) -> str:
        pair = row.get("against")
        return f"{row['name']} {row['cpu_seconds']:.3g}" + (f" ({pair['cpu_speedup']:.2f} x)" if pair else "")

    return ", ".join(of(row) for row in runners if row["samples"])


def _same(same: dict[str, Any]) -> str:
    if "loss" in same:
        pairs = (f"{name.replace('_', ' ')} {ours:.3f} and {theirs:.3f}" for name, (ours, theirs) in same.items())
        return f"the same work: first step's {', '.join(pairs)}"
    return f"the same work: frames differ by {same['difference']:.1e} deviations at most" if same else ""


def _input(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"not measured, {found['error']}"
    if not found:
        return "not measured, one batch of noise again and again (--data: recordings)"
    return (
        f"{100 * found['input_wait_share']:.1f} % of the time, {found['audio_hours_per_second']:.4f} audio h/s with it"
    )


def warnings(result: dict[str, Any]) -> list[str]:
    """What speaks against the numbers."""
    found = [f"{row['name']}: {row['error']}" for row in result["runners"] if row["error"]]
    apart: dict[str, Callable[[Any], float]] = {
        "loss": lambda pair: abs(pair[0] / pair[1] - 1), "grad_norm": lambda pair: abs(pair[0] / pair[1] - 1),
        "difference": float,
    }  # fmt: skip
    if result["flops_error"]:
        found.append(result["flops_error"])
    for name, value in result["same"].items():
        if result["dtype"] == "float32" and not apart[name](value) <= UNLIKE[name]:
            found.append(f"the two sides may not do the same work: {name.replace('_', ' ')} {value}")
    if result["machine"]["load_before"][0] > 0.5 * result["machine"]["threads"]:
        found.append(
            "other programs run on this machine: torch's threads wait for each other, so it loses more than we do; "
            "measure again when it is quiet, or compare CPU seconds with --threads=1"
        )
    return found


def write(result: dict[str, Any], file: Path) -> None:
    """The measurement as JSON; numbers that there are none of are null."""
    file.write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if abs(seconds) >= 0.1 else f"{1000 * seconds:.1f}"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:,.0f} GFLOP/s"


def _gib(bytes_: float | None) -> str:
    return "unknown" if bytes_ is None else f"{bytes_ / 2**30:.2f} GiB"

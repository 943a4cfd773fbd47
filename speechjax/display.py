"""How metrics are shown to people: words, units and formats, shared by the console and the report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Display:
    """How a metric is shown to people: `short` with the value for {}, a heading, a format, a factor."""

    short: str
    title: str
    spec: str = ".3g"
    scale: float = 1.0

    def number(self, value: float | None) -> str:
        return "not finite" if value is None or not math.isfinite(value) else format(value * self.scale, self.spec)


DISPLAY = {
    "loss": Display("loss {}", "Loss", ".4g"),
    "contrastive": Display("contrastive {}", "Contrastive loss", ".4g"),
    "accuracy": Display("acc {}", "Accuracy", ".1%"),
    "code_perplexity": Display("code ppl {}", "Code perplexity (hard choices)", ".1f"),
    "prob_perplexity": Display("prob ppl {}", "Code perplexity (soft choices)", ".1f"),
    "grad_norm": Display("grad {}", "Gradient norm"),
    "learning_rate": Display("lr {}", "Learning rate", ".2e"),
    "skipped": Display("skipped {}", "Skipped steps (not finite)"),
    "unread": Display("unread {}/step", "Examples that could not be read, a step"),
    "steps_per_second": Display("{} steps/s", "Steps per second"),
    "audio_hours_per_second": Display("{} audio-h/h", "Hours of audio per hour", ",.1f", 3600.0),
    "input_wait_share": Display("input wait {}", "Share of time waiting for input", ".0%"),
}


def display(name: str) -> Display:
    """How to show the metric `name`; names without an entry show as their own words."""
    words = name.replace("_", " ")
    return DISPLAY[name] if name in DISPLAY else Display(f"{words} {{}}", words[:1].upper() + words[1:])


def progress_line(fields: Mapping[str, float]) -> str:
    """`loss 4.31 (chance 4.62) | acc 12.0% | ...`: `chance_X` stands behind X, times and rates have units."""
    parts = []
    for name, value in fields.items():
        if name.removeprefix("chance_") in fields and name.startswith("chance_"):
            continue
        shown = display(name).number(float(value))
        if f"chance_{name}" in fields:
            shown += f" (chance {display(name).number(float(fields[f'chance_{name}']))})"
        parts.append(display(name).short.format(shown))
    return " | ".join(parts)

"""How metrics are shown to people: words, units and formats, shared by the console and the report."""

import math
import re
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
    "masked": Display("masked {}", "Loss on masked frames", ".4g"),
    "unmasked": Display("unmasked {}", "Loss on other frames", ".4g"),
    "frames": Display("frames {}", "Loss of the frames", ".4g"),
    "ctc": Display("ctc {}", "CTC loss", ".4g"),
    "prediction": Display("prediction {}", "Prediction loss", ".4g"),
    "regression": Display("regression {}", "Regression loss", ".4g"),
    "reconstruction": Display("reconstruction {}", "Reconstruction loss", ".4g"),
    "classification": Display("classification {}", "Classification loss", ".4g"),
    "cosine": Display("cosine {}", "Cosine loss", ".4g"),
    "l1": Display("l1 {}", "L1 loss", ".4g"),
    "diversity": Display("diversity {}", "Diversity loss"),
    "commitment": Display("commitment {}", "Commitment loss"),
    "feature_penalty": Display("penalty {}", "Feature penalty"),
    "accuracy": Display("acc {}", "Accuracy", ".1%"),
    "mse": Display("mse {}", "Mean squared error"),
    "rmse": Display("rmse {}", "Root mean squared error"),
    "copy_error": Display("copy {}", "Copy of the last frame"),
    "copy_rmse": Display("copy rmse {}", "Copy of the last frame"),
    "linear_error": Display("linear {}", "Linear prediction"),
    "linear_rmse": Display("linear rmse {}", "Linear prediction"),
    "interpolation_error": Display("interpolation {}", "Interpolation"),
    "code_perplexity": Display("code ppl {}", "Code perplexity (hard choices)", ".1f"),
    "prob_perplexity": Display("prob ppl {}", "Code perplexity (soft choices)", ".1f"),
    "prediction_perplexity": Display("pred ppl {}", "Perplexity of the predictions", ".1f"),
    "target_perplexity": Display("target ppl {}", "Perplexity of the targets", ".1f"),
    "unused_codes": Display("unused codes {}", "Share of unused codes", ".0%"),
    "prediction_variance": Display("pred var {}", "Variance of the predictions"),
    "target_variance": Display("target var {}", "Variance of the targets"),
    "output_deviation": Display("output dev {}", "Deviation of the output"),
    "target_deviation": Display("target dev {}", "Deviation of the target"),
    "feature_variation": Display("feature var {}", "Variation of the features"),
    "grad_norm": Display("grad {}", "Gradient norm"),
    "learning_rate": Display("lr {}", "Learning rate", ".2e"),
    "skipped": Display("skipped {}", "Skipped steps (not finite)"),
    "unread": Display("unread {}/step", "Examples that could not be read, a step"),
    "steps_per_second": Display("{} steps/s", "Steps per second"),
    "audio_hours_per_second": Display("{} audio-h/h", "Hours of audio per hour", ",.1f", 3600.0),
    "input_wait_share": Display("input wait {}", "Share of time waiting for input", ".0%"),
    "score": Display("probe {}", "Accuracy of the linear probe, %", ".1f"),
    "within": Display("abx within {}", "ABX error within speakers, %", ".1f"),
    "across": Display("abx across {}", "ABX error across speakers, %", ".1f"),
    "pnmi": Display("pnmi {}", "Phone information of units (PNMI)", ".3f"),
    "dead": Display("dead units {}", "Dead units", ".0f"),
}
# Formats of names that are not above, by how they end.
_ENDINGS = {
    "_accuracy": ".1%", "_share": ".0%", "error_rate": ".1%", "word_error": ".1%", "char_error": ".1%",
    "phone_error": ".1%", "eer": ".2%", "der": ".1%", "ece": ".1%", "ece_scaled": ".1%", "uar": ".1%", "map": ".1%",
    "macro_f1": ".1%", "f1_macro": ".1%", "f1_micro": ".1%", "speech_f1": ".1%", "detection_error": ".1%",
    "miss_rate": ".1%", "false_alarm_rate": ".1%", "false_rejects": ".1%",
    "_purity": ".1%", "perplexity": ".1f", "_shot": ".1f",
}  # fmt: skip


def display(name: str) -> Display:
    """How to show the metric `name`; names without an entry show as their own words."""
    if name in DISPLAY:
        return DISPLAY[name]
    words = name.replace("_", " ")
    whole = re.sub(r"_(low|high|worst|gap)$", "", name)  # limits, and of groups the worst and the gap
    of = re.sub(r"(false_rejects)_[\d.]+$", r"\1", whole)  # at so many false alarms an hour
    ending = next((spec for ending, spec in _ENDINGS.items() if of.endswith(ending)), ".3g")
    spec = DISPLAY[of].spec if of in DISPLAY else ending
    return Display(f"{words} {{}}", words[:1].upper() + words[1:], spec)


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

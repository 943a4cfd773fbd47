"""adapter_config.json of the library `peft`, in both directions, and README.md of a folder with an adapter.

`peft` names the layers that it changes by a regex, matched in full against the paths of modules.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speechjax.errors import UserError
from speechjax.formats.families import Family
from speechjax.formats.heads import Head
from speechjax.formats.names import Turn
from speechjax.models.adapters import IA3, Adapter, Lora

log = logging.getLogger("speechjax")

_THEIR_LAYER = re.compile(r"(.*\.layers\.)(\d+)\.(.*)")
_OUR_LAYER = re.compile(r"(.*/layer)(\d+)/(.*)")
# Options of peft that change what an adapter computes, and what they are where they change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,), "rank_pattern": ({},),
    "alpha_pattern": ({},), "layer_replication": (), "target_parameters": (), "trainable_token_indices": (),
    "alora_invocation_tokens": (), "fan_in_fan_out": (False,),
}  # fmt: skip
# Of the configuration of a head: sizes without which the class of the base has another one.
_SIZES = (
    "vocab_size", "classifier_proj_size", "num_codevector_groups", "num_codevectors_per_group", "codevector_dim",
    "proj_codevector_dim",
)  # fmt: skip


class Site(NamedTuple):
    """A dense layer: its name in `transformers`, and how its kernel is turned."""

    theirs: str
    turn: Turn


def is_outer(site: str) -> bool:
    """Whether IA3 scales the inputs of this layer of ours."""
    return any(re.search(regex, site) for _, regex in IA3("x").sites() if "down" in regex)


def is_scaled(site: str) -> bool:
    """Whether IA3 scales anything there."""
    return any(re.search(regex, site) for _, regex in IA3("x").sites())


def write(adapter: Adapter, modules: Mapping[str, str], saved: Iterable[str], layers: int) -> dict[str, Any]:
    """adapter_config.json of an adapter on `modules`, {ours: theirs}; `saved` are modules of the head."""
    pattern = _pattern(modules.values(), _THEIR_LAYER, layers, r"\d+", ".")
    found: dict[str, Any] = dict(
        task_type=None, base_model_name_or_path=None, inference_mode=True, target_modules=pattern,
        modules_to_save=sorted(saved) or None,
    )  # fmt: skip
    if isinstance(adapter, Lora):
        return found | dict(
            peft_type="LORA", r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, bias="none",
            fan_in_fan_out=False, init_lora_weights=True, use_rslora=False, use_dora=False, rank_pattern={},
            alpha_pattern={},
        )  # fmt: skip
    inner = [theirs for ours, theirs in modules.items() if is_outer(ours)]
    feedforward = _pattern(inner, _THEIR_LAYER, layers, r"\d+", ".")
    return found | dict(peft_type="IA3", feedforward_modules=feedforward, fan_in_fan_out=False, init_ia3_weights=True)


def read(said: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The block of config.model.adapters that adapter_config.json describes, but for its targets."""
    kind = said.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise UserError(f"adapter_config.json: peft_type={kind!r}; those that can be read are LORA and IA3")
    for key, plain in _PLAIN.items():
        if said.get(key) not in (None, *plain):
            raise UserError(f"adapter_config.json: {key}={said[key]!r} has no place here")
    if kind == "IA3":
        return dict(kind="ia3", name=name)
    rank, alpha, dropout = said.get("r", 8), said.get("lora_alpha", 8), said.get("lora_dropout", 0.0)
    for key, value, kinds in (
        ("r", rank, int),
        ("lora_alpha", alpha, int | float),
        ("lora_dropout", dropout, int | float),
    ):
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < 2**20:
            raise UserError(f"adapter_config.json: {key}={value!r} is no number that makes sense")
    if said.get("use_rslora"):  # alpha / sqrt(rank) instead of alpha / rank
        alpha = alpha * rank**0.5
    return dict(kind="lora", name=name, rank=rank, alpha=float(alpha), dropout=float(dropout))


def targets(sites: Iterable[str], layers: int, scan: bool) -> str:
    """Regex of our dense layers, found in their paths; UserError where a scan would have to give layers different."""
    near = sorted({site.removeprefix("encoder/") for site in sites})
    found = [match for match in map(_OUR_LAYER.fullmatch, near) if match]
    if scan and any(sum(other[3] == match[3] for other in found) < layers for match in found):
        raise UserError("this adapter is on some layers only, and this model stacks its layers: set model.scan=False")
    pattern = _pattern(near, _OUR_LAYER, layers, r"(?:s|\d+)", "/")
    return f"(^|/){pattern}$"


def _pattern(names: Iterable[str], layer: re.Pattern[str], layers: int, every: str, between: str) -> str:
    """Regex of these modules and no others, short where layers are alike; `every` stands for all numbers."""
    numbers: dict[tuple[str, str], set[int]] = {}
    parts = []
    for name in sorted(set(names)):
        if found := layer.fullmatch(name):
            numbers.setdefault((found[1], found[3]), set()).add(int(found[2]))
        else:
            parts.append(re.escape(name))
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (before, after), there in numbers.items():
        together.setdefault((before, tuple(sorted(there))), []).append(re.escape(after))
    for (before, there), ends in together.items():
        which = every if len(there) == layers else f"(?:{'|'.join(map(str, there))})"
        parts.append(f"{re.escape(before)}{which}{re.escape(between)}(?:{'|'.join(ends)})")
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def warn_of_rest(folder: Path, names: Sequence[str]) -> None:
    """Says what of a file of peft is left out."""
    if names:
        log.warning(
            "%s: %s and %d more are left out; with its head it comes here as a whole model: merge_and_unload and "
            "save_pretrained there, then speechjax.convert", folder, names[0], len(names) - 1,
        )  # fmt: skip


def readme(family: Family, head: Head | None, why: str, task: Mapping[str, Any], width: int) -> str:
    """How to load the folder."""
    options = {key: value for key, value in (head.write(task, width) if head else {}).items() if key in _SIZES}
    if head and head.task in ("classify", "frames"):
        options["num_labels"] = task["classes"]
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    name = family.stem + (head.suffix if head else "Model")
    note = "" if head or not why else f"\nThe head is in speechjax.safetensors alone: {why}.\n"
    if family.model_type == "wavlm":
        note += (
            "\nWavLM of transformers multiplies with the weights of its attention itself, past peft: adapters there "
            "have an effect only\nonce merged, `model = model.merge_and_unload()`.\n"
        )
    return (
        "---\nlibrary_name: peft\ntags:\n- speechjax\n---\n"
        f"An adapter for {name} of transformers, trained with speechjax.  BASE is the folder that `python -m "
        "speechjax.export\n--format=hf --encoder-only` writes of the run that this one began with.\n\n"
        "```python\nimport peft\nimport transformers\n\n"
        f'model = transformers.{name}.from_pretrained("BASE"{given})\n'
        'model = peft.PeftModel.from_pretrained(model, ".").eval()\n```\n' + note
    )

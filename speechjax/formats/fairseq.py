"""Checkpoints of fairseq and its kin, under the names and with the configuration that `transformers` would have.

What can be read: wav2vec 2.0, its conformer, HuBERT and data2vec-audio, pretrained or fine-tuned with CTC; WavLM as
Microsoft publishes it; and what s3prl converted of all these.  They hold one layout with small variations, told apart
by which arrays there are; `fairseq_config` finds the architecture.  Nothing in a file is executed (see `inert_pickle`).

One difference stays: in padded batches fairseq's HuBERT counts a frame as valid if any of its samples is, which at
times is one frame more than `transformers` and we count.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError
from speechjax.formats.fairseq_config import STEMS, Settings, config_of
from speechjax.formats.inert_pickle import Stub
from speechjax.formats.torch_files import read_torch

Arrays = dict[str, np.ndarray]


class Checkpoint(NamedTuple):
    """`state` and `config` as in a folder of `transformers`; `do_normalize`, of its preprocessor, is in `config` too.

    `others` are the arrays that no model of theirs has, under fairseq's names: HuBERT's `final_proj` and
    `label_embs_concat`, the teacher of data2vec (`_ema.`), decoders.

    `about` is JSON: `source`, `family`, the `dtype` that the weights had, what was `guessed` (sentences), the
    `settings` of the file, the number of `updates`.  Of a CTC model it has the `vocabulary`, letters by output, of
    which the first is the blank (None if the file does not say); of HuBERT the `codes`, a list for every dictionary:
    the symbols of its rows of `label_embs_concat`, the first four of which stand for no cluster.
    """

    state: Arrays
    config: dict[str, Any]
    others: Arrays
    about: dict[str, Any]


# Patterns of fairseq's names, and what transformers calls them: of everything but layers, and of what is in a layer.
_LEAF = r"\.(weight|bias)"
_POSITIONS = "encoder.pos_conv_embed."
_OUTSIDE = {
    "mask_emb": "masked_spec_embed",
    rf"feature_extractor\.conv_layers\.(\d+)\.0{_LEAF}": r"feature_extractor.conv_layers.\1.conv.\2",
    rf"feature_extractor\.conv_layers\.(\d+)\.2(?:\.1)?{_LEAF}": r"feature_extractor.conv_layers.\1.layer_norm.\2",
    rf"layer_norm{_LEAF}": r"feature_projection.layer_norm.\1",
    rf"post_extract_proj{_LEAF}": r"feature_projection.projection.\1",
    rf"encoder\.layer_norm{_LEAF}": r"encoder.layer_norm.\1",
    r"encoder\.pos_conv\.0\.bias": f"{_POSITIONS}conv.bias",
    r"encoder\.pos_conv\.0\.weight_g": f"{_POSITIONS}conv.parametrizations.weight.original0",
    r"encoder\.pos_conv\.0\.weight_v": f"{_POSITIONS}conv.parametrizations.weight.original1",
    r"encoder\.pos_conv\.0\.(parametrizations\.weight\.original[01])": rf"{_POSITIONS}conv.\1",
    rf"encoder\.pos_conv\.(\d+)\.0{_LEAF}": rf"{_POSITIONS}layers.\1.conv.\2",
    r"encoder\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "encoder.embed_positions.inv_freq",  # all are the same
}
_TRANSFORMER = {
    rf"self_attn\.([qkv]|out)_proj{_LEAF}": r"attention.\1_proj.\2",
    rf"self_attn_layer_norm{_LEAF}": r"layer_norm.\1",
    rf"fc1{_LEAF}": r"feed_forward.intermediate_dense.\1",
    rf"fc2{_LEAF}": r"feed_forward.output_dense.\1",
    rf"final_layer_norm{_LEAF}": r"final_layer_norm.\1",
    r"self_attn\.grep_a": "attention.gru_rel_pos_const",
    rf"self_attn\.grep_linear{_LEAF}": r"attention.gru_rel_pos_linear.\1",
    r"self_attn\.relative_attention_bias\.weight": "attention.rel_attn_embed.weight",
}
_CONFORMER = {
    rf"(ffn[12])\.layer_norm{_LEAF}": r"\1_layer_norm.\2",
    rf"(ffn[12])\.w_1{_LEAF}": r"\1.intermediate_dense.\2",
    rf"(ffn[12])\.w_2{_LEAF}": r"\1.output_dense.\2",
    rf"(self_attn\.linear_(?:[qkv]|out)){_LEAF}": r"\1.\2",
    r"(self_attn\.(?:linear_pos\.weight|pos_bias_[uv]))": r"\1",
    rf"((?:self_attn|final)_layer_norm){_LEAF}": r"\1.\2",
    rf"(conv_module\.layer_norm){_LEAF}": r"\1.\2",
    r"(conv_module\.(?:pointwise_conv[12]|depthwise_conv)\.weight)": r"\1",
    r"(conv_module\.batch_norm\.\w+)": r"\1",
}
_QUANTIZER = {
    "quantizer.vars": "quantizer.codevectors",
    "quantizer.weight_proj.weight": "quantizer.weight_proj.weight",
    "quantizer.weight_proj.bias": "quantizer.weight_proj.bias",
    "project_q.weight": "project_q.weight",
    "project_q.bias": "project_q.bias",
    "final_proj.weight": "project_hid.weight",
    "final_proj.bias": "project_hid.bias",
}
_ANCHOR = "feature_extractor.conv_layers.0.0.weight"  # all of these models have it
_OURS = ("encoder.", "feature_extractor.", "project_inp.", "input_quantizer.")  # what hidden states depend on
_KINDS = {  # of other files, by what begins a name in them or one of its parts
    "Transformer": "Mockingjay, TERA or AudioALBERT of s3prl, which hear spectrograms",
    "Distiller": "DistilHuBERT of s3prl; transformers has it as ntu-spml/distilhubert",
    "modality_encoders": "data2vec 2.0",
    "feature_aggregator": "wav2vec 1.0 or vq-wav2vec",
    "feature_projection": "a model of transformers; give its folder, --from=hf:DIR",
}


def read_fairseq(path: Path, dictionary: Path | None = None) -> Checkpoint:
    """The model in a checkpoint of fairseq, of WavLM, or converted by s3prl; its arrays are float32.

    `dictionary` is the `dict.ltr.txt` of a CTC model, which older files do not hold.  Raises UserError for a file that
    is damaged, of another kind, or of an architecture that `transformers` lacks.
    """
    path = Path(path)
    content = read_torch(path)
    weights, said, source = _parts(path, content)
    prefix = min((name.removesuffix(_ANCHOR) for name in weights if name.endswith(_ANCHOR)), key=len, default=None)
    if prefix is None:
        raise UserError(f"{path} is {_kind(weights)}")
    inner = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
    outer = {name: array for name, array in weights.items() if not name.startswith(prefix)}
    codes = _codes(content)
    family = _family(inner, said, bool(codes))
    state, others = _renamed(path, family, inner)
    about: dict[str, Any] = dict(source=source, family=family, dtype=str(weights[prefix + _ANCHOR].dtype))
    try:
        _complete(state)
        config = config_of(family, state, said)
    except (KeyError, ValueError) as error:
        why = f"it has no {error.args[0]}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no {STEMS[family]} as transformers has it: {why}") from None
    head = f"{prefix.removesuffix('w2v_model.')}proj."
    is_ctc = prefix.endswith("w2v_encoder.w2v_model.") and {f"{head}weight", f"{head}bias"} <= outer.keys()
    if is_ctc or config["architectures"][0].endswith("ForPreTraining"):  # theirs have a prefix below a head
        base, heads = family.replace("-", "_"), set(_QUANTIZER.values())
        state = {name if name in heads else f"{base}.{name}": array for name, array in state.items()}
    if is_ctc:
        state |= {f"lm_head.{leaf}": _float32(outer.pop(head + leaf)) for leaf in ("weight", "bias")}
        config |= dict(architectures=[f"{STEMS[family]}ForCTC"], vocab_size=len(state["lm_head.bias"]))
        config |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)  # the blank, which theirs take padding for
        about["vocabulary"] = _vocabulary(path, content, dictionary, config["vocab_size"])
    elif dictionary:
        raise UserError(f"{path} has no outputs for the letters of {dictionary}: it is no CTC model")
    if codes:
        about["codes"] = codes
    about |= dict(guessed=said.guessed, settings=_plain(said), updates=_updates(content))
    return Checkpoint(state, config, others | outer, about)


def read_dictionary(path: Path) -> list[str]:
    """The symbols of a dictionary of fairseq, lines "symbol count", after the four that it always begins with."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8") from None
    symbols: dict[str, None] = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>"])
    for number, line in enumerate(lines, 1):
        symbol, _, count = line.rstrip().removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not symbol or not count.isdecimal():
            raise UserError(f"{path}:{number}: {line[:40]!r} is no symbol and its count, such as 'E 1234'")
        symbols[symbol] = None
    return list(symbols)


# ---- what a file holds


def _parts(path: Path, content: Any) -> tuple[Arrays, Settings, str]:
    """(its weights, its settings, who wrote it)."""
    if not isinstance(content, dict):
        raise UserError(f"{path} is no speech encoder of fairseq: it holds one {type(content).__name__}")
    if "model_weight" in content:
        said, source = Settings(_dict(content, "model_cfg"), _dict(content, "task_cfg")), "s3prl"
        weights = _dict(content, "model_weight")
    else:
        blocks = _dict(content, "cfg") or _dict(content, "args")
        said, source = _settings(blocks), "fairseq"
        if "cfg" in content and said.model is blocks:
            source = "wavlm"
        weights = _dict(content, "model") or content
    tensors = dict(weights)
    tensors |= {f"_ema.{name}": array for name, array in _dict(weights, "_ema").items()}
    found = {name: x for name, x in tensors.items() if isinstance(name, str) and isinstance(x, np.ndarray)}
    if not found:
        raise UserError(f"{path} is {_kind(content)}")
    return found, said, source


def _settings(said: Mapping[str, Any]) -> Settings:
    """Settings of a checkpoint; of a fine-tuned model, which holds those of its pretraining, of both."""
    model, task, criterion = _blocks(said)
    if not (before := _dict(model, "w2v_args")):
        return Settings(model, task, criterion)
    first, its_task, _ = _blocks(before)
    return Settings(first, its_task or task, criterion, model)


def _blocks(said: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """Settings of model, task and criterion, which before 2021 and of WavLM are all in one."""
    model = _dict(said, "model")
    return (model, _dict(said, "task"), _dict(said, "criterion")) if model else (said, said, said)


def _dict(where: Mapping[Any, Any], key: str) -> dict[Any, Any]:
    return where[key] if isinstance(where.get(key), dict) else {}


def _kind(held: Mapping[Any, Any]) -> str:
    names = [name for name in held if isinstance(name, str)]
    parts = {part for name in names for part in name.split(".")}
    for sign, kind in _KINDS.items():
        if sign in parts:
            return kind
    shown = ", ".join(repr(name[:40]) for name in names[:4]) or "nothing that has a name"
    return f"no speech encoder of fairseq: it holds {shown}"


def _family(inner: Arrays, said: Settings, has_codes: bool) -> str:
    """A model_type of transformers."""
    if "encoder.layers.0.self_attn.grep_a" in inner:
        return "wavlm"
    if any(name.startswith("encoder.layers.0.conv_module.") for name in inner):
        return "wav2vec2-conformer"
    if "encoder.pos_conv.0.0.weight" in inner:
        return "data2vec-audio"
    given = [part.get(key) for part in (said.model, said.tuned) for key in ("_name", "arch")]
    names = [name for name in given if isinstance(name, str)]
    if "label_embs_concat" in inner or has_codes or any("hubert" in name for name in names):
        return "hubert"
    if "quantizer.vars" not in inner and not any("wav2vec2" in name for name in names):
        said.guessed.append("wav2vec2 and hubert have one architecture; the family: wav2vec2")
    return "wav2vec2"


def _renamed(path: Path, family: str, inner: Arrays) -> tuple[Arrays, Arrays]:
    """(arrays by names of transformers, those that it has no place for); UserError if one of these matters."""
    layer = _CONFORMER if family == "wav2vec2-conformer" else _TRANSFORMER
    heads = _QUANTIZER if family.startswith("wav2vec2") and inner.keys() >= _QUANTIZER.keys() else {}
    state, others = {}, {}
    for name, array in inner.items():
        theirs = heads.get(name) or _theirs(name, layer)
        if theirs:
            state[theirs] = _float32(array)
        elif name.startswith(_OURS):
            raise UserError(f"{path} has {name[:60]!r}, for which {STEMS[family]} of transformers has no place")
        else:
            others[name] = array
    return state, others


def _theirs(name: str, layer: Mapping[str, str]) -> str:
    """The name of one array outside heads; "" if there is none."""
    for old, new in _OUTSIDE.items():
        if match := re.fullmatch(old, name):
            return match.expand(new)
    if inside := re.fullmatch(r"(encoder\.layers\.\d+\.)(.+)", name):
        for old, new in layer.items():
            if match := re.fullmatch(old, inside[2]):
                return inside[1] + match.expand(new)
    return ""


def _complete(state: Arrays) -> None:
    """Adds the projection of features that fairseq leaves out where they are as wide as the encoder."""
    D, C = state["encoder.layer_norm.weight"].size, state["feature_projection.layer_norm.weight"].size
    if "feature_projection.projection.weight" not in state and D == C:
        state["feature_projection.projection.weight"] = np.eye(D, dtype=np.float32)
        state["feature_projection.projection.bias"] = np.zeros(D, np.float32)


def _float32(array: np.ndarray) -> np.ndarray:
    """Numbers as float32, counts as they are."""
    return array if array.dtype.kind in "iub" else array.astype(np.float32)


# ---- beside the model


def _codes(content: Mapping[str, Any]) -> list[list[str]]:
    """The symbols of HuBERT's dictionaries, as fairseq or as s3prl keeps them."""
    found = content.get("dictionaries_symbols") or _dict(content, "task_state").get("dictionaries")
    return [symbols for symbols in map(_symbols, found) if symbols] if isinstance(found, list) else []


def _vocabulary(path: Path, content: Mapping[str, Any], dictionary: Path | None, size: int) -> list[str] | None:
    found = read_dictionary(dictionary) if dictionary else _symbols(
        _dict(content, "task_state").get("target_dictionary")
    )  # fmt: skip
    if found and len(found) != size:
        raise UserError(f"{path} has {size} outputs, {dictionary or 'its dictionary'} {len(found)} symbols")
    return found or None


def _symbols(dictionary: Any) -> list[str]:
    found = dictionary.attributes.get("symbols") if isinstance(dictionary, Stub) else dictionary
    return found if isinstance(found, list) and all(isinstance(symbol, str) for symbol in found) else []


def _updates(content: Mapping[str, Any]) -> int | None:
    history = content.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates") if isinstance(last, dict) else None
    return updates if type(updates) is int else None


def _plain(said: Settings) -> dict[str, Any]:
    """Settings that are plain values or short lists of them, by what they are of; those in one only once."""

    def is_plain(value: Any) -> bool:
        return isinstance(value, (str, bool, float)) or (isinstance(value, int) and abs(value) < 1 << 63)

    parts = [(part, getattr(said, part)) for part in ("model", "task", "criterion", "tuned")]
    once = [(part, said) for i, (part, said) in enumerate(parts) if said and all(said is not x for _, x in parts[:i])]
    return {
        part: {
            key: value for key, value in said.items() if isinstance(key, str)
            and (is_plain(value) or (isinstance(value, list) and len(value) < 20 and all(map(is_plain, value))))
        }
        for part, said in once
    }  # fmt: skip

"""Models as fairseq keeps them, made of arrays that differ: names, shapes and settings of every family.

Shapes: C channels, D width, F width of feed-forward layers.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch_writer import write

C, D, F = 4, 6, 10
CFG = dict(
    _name="wav2vec2", encoder_attention_heads=3, conv_feature_layers="[(4, 10, 5)] + [(4, 3, 2)]",
    layer_norm_first=False, logit_temp=0.2, num_negatives=7, latent_groups=2, mask_prob=0.5, encoder_layerdrop=0.05,
)  # fmt: skip
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


class Weights(dict):
    """Arrays by fairseq's names, each with its own value."""

    def add(self, name: str, *shape: int) -> None:
        self[name] = np.full(shape, len(self) + 1, np.float16)

    def pair(self, name: str, *shape: int) -> None:
        self.add(f"{name}.weight", *shape)
        self.add(f"{name}.bias", shape[0])


def front(norm: str = "group", width: int = C, bias: bool = False) -> Weights:
    w = Weights()
    w.add("mask_emb", D)
    for i, (inputs, kernel) in enumerate([(1, 10), (width, 3)]):
        w.add(f"feature_extractor.conv_layers.{i}.0.weight", width, inputs, kernel)
        if bias:
            w.add(f"feature_extractor.conv_layers.{i}.0.bias", width)
        if norm == "layer":
            w.pair(f"feature_extractor.conv_layers.{i}.2.1", width)
        elif i == 0:
            w.pair("feature_extractor.conv_layers.0.2", width)
    w.pair("layer_norm", width)
    if width != D:
        w.pair("post_extract_proj", D, width)
    w.pair("encoder.layer_norm", D)
    return w


def transformer(w: Weights, gated: bool = False, stacked: bool = False) -> Weights:
    if stacked:
        for i in range(2):
            w.pair(f"encoder.pos_conv.{i}.0", D, D // 2, 5)
    else:
        w.add("encoder.pos_conv.0.bias", D)
        w.add("encoder.pos_conv.0.weight_g", 1, 1, 8)
        w.add("encoder.pos_conv.0.weight_v", D, D // 2, 8)
    for i in range(2):
        layer = f"encoder.layers.{i}."
        for name in ("q", "k", "v", "out"):
            w.pair(f"{layer}self_attn.{name}_proj", D, D)
        w.pair(f"{layer}self_attn_layer_norm", D)
        w.pair(f"{layer}fc1", F, D)
        w.pair(f"{layer}fc2", D, F)
        w.pair(f"{layer}final_layer_norm", D)
        if gated:
            w.add(f"{layer}self_attn.grep_a", 1, 3, 1, 1)
            w.pair(f"{layer}self_attn.grep_linear", 8, 2)
    if gated:
        w.add("encoder.layers.0.self_attn.relative_attention_bias.weight", 16, 3)
    return w


def conformer(w: Weights, rotary: bool = False) -> Weights:
    w.add("encoder.pos_conv.0.bias", D)
    w.add("encoder.pos_conv.0.weight_g", 1, 1, 8)
    w.add("encoder.pos_conv.0.weight_v", D, D // 2, 8)
    for i in range(2):
        layer = f"encoder.layers.{i}."
        for name in ("ffn1", "ffn2"):
            w.pair(f"{layer}{name}.layer_norm", D)
            w.pair(f"{layer}{name}.w_1", F, D)
            w.pair(f"{layer}{name}.w_2", D, F)
        for name in ("q", "k", "v", "out"):
            w.pair(f"{layer}self_attn.linear_{name}", D, D)
        if rotary:
            w.add(f"{layer}self_attn.rotary_emb.inv_freq", 1)
        else:
            w.add(f"{layer}self_attn.linear_pos.weight", D, D)
            w.add(f"{layer}self_attn.pos_bias_u", 3, 2)
            w.add(f"{layer}self_attn.pos_bias_v", 3, 2)
        w.pair(f"{layer}self_attn_layer_norm", D)
        w.pair(f"{layer}conv_module.layer_norm", D)
        w.add(f"{layer}conv_module.pointwise_conv1.weight", 2 * D, D, 1)
        w.add(f"{layer}conv_module.depthwise_conv.weight", D, 1, 5)
        w.add(f"{layer}conv_module.pointwise_conv2.weight", D, D, 1)
        w.pair(f"{layer}conv_module.batch_norm", D)
        w.add(f"{layer}conv_module.batch_norm.running_mean", D)
        w.add(f"{layer}conv_module.batch_norm.running_var", D)
        w[f"{layer}conv_module.batch_norm.num_batches_tracked"] = np.int64([9])[0:1].reshape(1)
        w.pair(f"{layer}final_layer_norm", D)
    return w


def quantizer(w: Weights) -> Weights:
    w.add("quantizer.vars", 1, 10, 3)
    w.pair("quantizer.weight_proj", 10, C)
    w.pair("project_q", 5, 6)
    w.pair("final_proj", 5, D)
    return w


def hubert(w: Weights) -> Weights:
    w.pair("final_proj", 5, D)
    w.add("label_embs_concat", 7, 5)
    return w


def cfg(normalize: bool = False, **changes: Any) -> dict[str, Any]:
    return dict(model=CFG | changes, task=dict(normalize=normalize), criterion=dict(loss_weights=[0.3, 10.0]))


def saved(tmp_path: Path, content: Any, **options: Any) -> Path:
    return write(tmp_path / "model.pt", content, **options)


def fairseq_dictionary(symbols: list[str]) -> Any:
    found = sys.modules["fairseq.data.dictionary"].Dictionary()
    found.__dict__.update(symbols=symbols, indices={s: i for i, s in enumerate(symbols)}, nspecial=4)
    return found

"""Names and layouts of `transformers.Wav2Vec2ForPreTraining` -> the parameters of `speechjax.tasks.wav2vec2`."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from speechjax.models.encoder import SpeechEncoder
from speechjax.tasks.wav2vec2 import Wav2Vec2

# Ours -> theirs, without the leaves.  {} is a layer's number.
DENSE = {
    "encoder/projection": "wav2vec2.feature_projection.projection",
    "quantizer/logits": "quantizer.weight_proj",
    "project_context": "project_hid",
    "project_target": "project_q",
}
NORM = {
    "encoder/feature_norm": "wav2vec2.feature_projection.layer_norm",
    "encoder/transformer/norm": "wav2vec2.encoder.layer_norm",
}
POSITIONS = "wav2vec2.encoder.pos_conv_embed.conv."
FRONT = "wav2vec2.feature_extractor.conv_layers.{}."
LAYER_DENSE = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.out_proj",
    "mlp_up": "feed_forward.intermediate_dense",
    "mlp_down": "feed_forward.output_dense",
}
LAYER_NORM = {"attention_norm": "layer_norm", "mlp_norm": "final_layer_norm"}


def dense(ours: str, theirs: str) -> Iterator[tuple[str, str, Any]]:
    yield f"{ours}/kernel", f"{theirs}.weight", np.transpose
    yield f"{ours}/bias", f"{theirs}.bias", None


def norm(ours: str, theirs: str) -> Iterator[tuple[str, str, Any]]:
    yield f"{ours}/scale", f"{theirs}.weight", None
    yield f"{ours}/bias", f"{theirs}.bias", None


def front(i: int, kind: str, bias: bool) -> Iterator[tuple[str, str, Any]]:
    """Convolution `i`: torch keeps [O, I, K], we keep [K, I, O]."""
    ours, theirs = "encoder/front/", FRONT.format(i)
    folded = kind == "group" and i == 0
    kernel = "conv0/kernel" if folded else f"conv{i}_kernel"
    yield ours + kernel, theirs + "conv.weight", np.transpose
    if bias and not folded:
        yield f"{ours}conv{i}_bias", theirs + "conv.bias", None
    if folded or kind == "layer":
        yield from norm(ours + ("conv0" if folded else f"norm{i}"), theirs + "layer_norm")


def table(convolutions: int, layers: int, kind: str, bias: bool) -> Iterator[tuple[str, str, Any]]:
    """Rows (our path, their name, what makes their array ours)."""
    for ours, theirs in DENSE.items():
        yield from dense(ours, theirs)
    for ours, theirs in NORM.items():
        yield from norm(ours, theirs)
    for i in range(convolutions):
        yield from front(i, kind, bias)
    yield "encoder/mask_embedding", "wav2vec2.masked_spec_embed", None
    positions = "encoder/transformer/positions/"
    yield positions + "direction", POSITIONS + "parametrizations.weight.original1", np.transpose
    yield positions + "gain", POSITIONS + "parametrizations.weight.original0", np.transpose
    yield positions + "bias", POSITIONS + "bias", None
    yield "quantizer/codebook", "quantizer.codevectors", "codebook"
    for i in range(layers):
        ours, theirs = f"encoder/transformer/layer{i}/", f"wav2vec2.encoder.layers.{i}."
        for mine, name in LAYER_DENSE.items():
            yield from dense(ours + mine, theirs + name)
        for mine, name in LAYER_NORM.items():
            yield from norm(ours + mine, theirs + name)


def task_for(config: Mapping[str, Any]) -> Wav2Vec2:
    """Our task with the architecture of a `Wav2Vec2Config`, given as a dict; nothing random but the masks."""
    encoder = SpeechEncoder(
        frontend=dict(
            name="waveform",
            channels=tuple(config["conv_dim"]),
            kernels=tuple(config["conv_kernel"]),
            strides=tuple(config["conv_stride"]),
            norm=config["feat_extract_norm"],
            bias=config["conv_bias"],
        ),
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        norm="pre" if config["do_stable_layer_norm"] else "post",
        positions=dict(kernel=config["num_conv_pos_embeddings"], groups=config["num_conv_pos_embedding_groups"]),
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0,
        scan=False, remat=False, dtype="float32",
    )  # fmt: skip
    return Wav2Vec2(
        encoder=encoder,
        mask_prob=0.65,
        mask_span=10,
        negatives=config["num_negatives"],
        logit_temperature=config["contrastive_logits_temperature"],
        codebooks=config["num_codevector_groups"],
        codes=config["num_codevectors_per_group"],
        code_dim=config["codevector_dim"],
        projection=config["proj_codevector_dim"],
        gumbel_start=2.0,  # the untouched temperature of their quantizer
        gumbel_floor=0.5,
        gumbel_decay=1.0,
        diversity=config["diversity_loss_weight"],
        feature_penalty=0.0,
        feature_grad_scale=1.0,
        feature_dropout=0.0,
    )


def from_hf(state: Mapping[str, np.ndarray], task: Wav2Vec2) -> dict[str, Any]:
    """Our parameter tree (layers unrolled) from their state dict, or from gradients under the same names.

    Raises KeyError where theirs lacks a name and ValueError where it has one that is not in the table.
    """
    shape = (task.codebooks, task.codes, task.code_dim // task.codebooks)
    frontend = task.encoder.frontend
    rows = list(table(len(frontend["channels"]), task.encoder.layers, frontend["norm"], frontend["bias"]))
    unknown = set(state) - {theirs for _, theirs, _ in rows}
    if unknown:
        raise ValueError(f"no place for {sorted(unknown)}")
    tree: dict[str, Any] = {}
    for ours, theirs, convert in rows:
        array = np.asarray(state[theirs], np.float32)
        array = array.reshape(shape) if convert == "codebook" else convert(array) if convert else array
        *path, leaf = ours.split("/")
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = np.ascontiguousarray(array)
    return tree

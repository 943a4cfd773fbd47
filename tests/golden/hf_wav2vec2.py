"""`transformers.Wav2Vec2ForPreTraining` as our task: its architecture and, by the tables, its weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from speechjax.formats.families import FAMILIES
from speechjax.formats.heads import HEADS
from speechjax.formats.hf import rows
from speechjax.formats.names import to_ours
from speechjax.models.encoder import SpeechEncoder
from speechjax.tasks.wav2vec2 import Wav2Vec2


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


def block_of(encoder: SpeechEncoder) -> dict[str, Any]:
    """What the tables ask of a model block."""
    names = ("frontend", "width", "layers", "positions", "attention")
    return {name: getattr(encoder, name) for name in names}


def from_hf(state: Mapping[str, np.ndarray], task: Wav2Vec2) -> dict[str, Any]:
    """Our parameter tree (layers unrolled) from their state dict, or from gradients under the same names.

    Raises KeyError where theirs lacks a name and ValueError where it has one that is not in the table.
    """
    family = FAMILIES["wav2vec2"]
    table = rows(family, HEADS[0], block_of(task.encoder), dict(codebooks=task.codebooks))
    arrays = {name.removeprefix(family.prefix): np.asarray(array, np.float32) for name, array in state.items()}
    leaves, missing, strange = to_ours(table, arrays)
    if missing:
        raise KeyError(missing[0])
    if strange:
        raise ValueError(f"no place for {strange}")
    return unflatten_dict(leaves, sep="/")

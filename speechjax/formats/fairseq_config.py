"""What a model of fairseq is, as `transformers` would say it: from the shapes of its arrays, and from its settings.

Arrays have the names of `transformers` here (`fairseq.py` gives them).  Settings are needed for what no array shows.
Where a file has none, the published models' are taken, and each such guess is noted.

Shapes: D width, C channels, K kernel, H heads, E width of a head, G codebooks, V codes.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

STEMS = {  # of the classes of transformers, by model_type
    "wav2vec2": "Wav2Vec2", "wav2vec2-conformer": "Wav2Vec2Conformer", "hubert": "Hubert", "wavlm": "WavLM",
    "data2vec-audio": "Data2VecAudio",
}  # fmt: skip
_HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}  # of published models, by width
_KERNELS, _STRIDES = [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]  # of published models
_FRONT, _LAYER, _POSITIONS = "feature_extractor.conv_layers.", "encoder.layers.0.", "encoder.pos_conv_embed."


@dataclass
class Settings:
    """What a file says of its `model`, the `task` it was trained on, its `criterion`, and how it was fine-`tuned`.

    `guessed` collects sentences about what it does not say.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    criterion: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)
    guessed: list[str] = field(default_factory=list)

    def number(self, key: str, default: Any = None, *, guess: str = "") -> Any:
        """The number `key` of the model, or `default`: a guess, if that names it.  ValueError if neither is there."""
        value = _number(self.model, key)
        if value is not None:
            return value
        if default is None:
            raise ValueError(f"its settings have no {key}")
        if guess:
            self.guessed.append(f"{guess}: {default}")
        return default

    def flag(self, said: Mapping[str, Any], key: str, default: bool, guess: str) -> bool:
        """Whether `key`, of one of these mappings, is set; `default`, which is a guess, if that is not said."""
        if isinstance(said.get(key), bool):
            return said[key]
        self.guessed.append(f"{guess}: {default}")
        return default

    def trained(self, key: str, default: float, tuned_key: str = "") -> float:
        """A number of training, which fine-tuning replaces."""
        value = _number(self.tuned, tuned_key or key)
        return self.number(key, default) if value is None else value


def _number(said: Mapping[str, Any], key: str) -> Any:
    """The number `key`, None if it is not said; ValueError for what is none."""
    value = said.get(key)
    if value is None or (isinstance(value, str) and value.startswith("${")):  # a reference to another setting
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1 << 31:
        raise ValueError(f"its setting {key} is no number that makes sense")
    return value


def config_of(family: str, state: Mapping[str, np.ndarray], said: Settings) -> dict[str, Any]:
    """The configuration of a model of `family`, a model_type, with the arrays `state`.

    `do_normalize`, in their folders a setting of the preprocessor, is in it too.  Raises KeyError for an array that is
    missing; ValueError for one of another rank, for settings that contradict it, and for what the family never has.
    """
    (D,) = _shape(state, "encoder.layer_norm.weight", 1)
    config = dict(model_type=family, architectures=[f"{STEMS[family]}Model"], hidden_size=D) | _front(state, said)
    config["num_hidden_layers"] = _count(state, "encoder.layers.")
    up = "ffn1" if family == "wav2vec2-conformer" else "feed_forward"
    config["intermediate_size"] = _shape(state, f"{_LAYER}{up}.intermediate_dense.weight", 2)[0]
    config["num_attention_heads"] = H = _heads(state, said, D)
    if type(H) is not int or H < 1 or D % H:
        raise ValueError(f"{H} heads in a width of {D}")
    is_layer = config["feat_extract_norm"] == "layer"
    if family == "data2vec-audio" and not is_layer:
        raise ValueError("a group norm in its convolutions, which Data2VecAudio of transformers never has")
    usual = {"data2vec-audio": False, "wav2vec2-conformer": True}
    likely = usual.get(family, is_layer and not said.model)  # of settings that leave it out, fairseq's default
    is_pre = said.flag(said.model, "layer_norm_first", likely, "norms come first in layers")
    if is_pre is not usual.get(family, is_pre):
        raise ValueError(f"layer_norm_first={is_pre}, which {STEMS[family]} of transformers never has")
    config["do_stable_layer_norm"] = is_pre
    config["do_normalize"] = said.flag(said.task, "normalize", is_layer, "audio has zero mean and unit variance")
    config |= _positions(family, state, said, D) | _training(said)
    if "quantizer.codevectors" in state:
        config |= _quantizer(state, said) | dict(architectures=[f"{STEMS[family]}ForPreTraining"])
    return config


def _front(state: Mapping[str, np.ndarray], said: Settings) -> dict[str, Any]:
    shapes = [_shape(state, f"{_FRONT}{i}.conv.weight", 3) for i in range(_count(state, _FRONT))]
    channels, kernels = [shape[0] for shape in shapes], [shape[2] for shape in shapes]
    normed = [f"{_FRONT}{i}.layer_norm.weight" in state for i in range(len(shapes))]
    if not normed[0] or any(normed[1:]) != all(normed):
        raise ValueError("norms in some of its convolutions only")
    given = said.model.get("conv_feature_layers")
    if given is not None:
        table = _convolutions(given)
        if [row[:2] for row in table] != [list(pair) for pair in zip(channels, kernels, strict=True)]:
            raise ValueError(f"its convolutions are {table}, but have {channels} channels and kernels {kernels}")
        strides = [stride for _, _, stride in table]
    elif kernels == _KERNELS:
        strides = _STRIDES
        said.guessed.append(f"strides of the convolutions: {strides}")
    else:
        raise ValueError(f"no settings, and convolutions of kernels {kernels} could have any strides")
    return dict(
        conv_dim=channels, conv_kernel=kernels, conv_stride=list(strides), num_feat_extract_layers=len(channels),
        conv_bias=f"{_FRONT}0.conv.bias" in state, feat_extract_norm="layer" if all(normed) else "group",
        feat_extract_activation="gelu",
    )  # fmt: skip


def _heads(state: Mapping[str, np.ndarray], said: Settings, D: int) -> Any:
    """As arrays show, as the settings say, or as published models of the width have."""
    if f"{_LAYER}attention.gru_rel_pos_const" in state:
        return state[f"{_LAYER}attention.gru_rel_pos_const"].size
    if f"{_LAYER}self_attn.pos_bias_u" in state:
        return _shape(state, f"{_LAYER}self_attn.pos_bias_u", 2)[0]
    return said.number("encoder_attention_heads", _HEADS.get(D), guess="attention heads")


def _positions(family: str, state: Mapping[str, np.ndarray], said: Settings, D: int) -> dict[str, Any]:
    """Of the convolution below the layers and of attention; with it the activation."""
    act = said.model.get("activation_fn", "gelu")
    if act != "gelu":
        raise ValueError(
            f"its activation is {repr(act[:20]) if isinstance(act, str) else type(act).__name__}, not 'gelu'"
        )
    stack = family == "data2vec-audio"
    name = f"{_POSITIONS}layers.0.conv.weight" if stack else f"{_POSITIONS}conv.parametrizations.weight.original1"
    _, inside, K = _shape(state, name, 3)
    found: dict[str, Any] = dict(hidden_act="gelu", num_conv_pos_embedding_groups=D // inside)
    if stack:
        return found | dict(num_conv_pos_embeddings=_count(state, f"{_POSITIONS}layers."), conv_pos_kernel_size=K)
    found["num_conv_pos_embeddings"] = K
    if family == "wavlm":
        found["num_buckets"] = _shape(state, f"{_LAYER}attention.rel_attn_embed.weight", 2)[0]
        found["max_bucket_distance"] = said.number("max_distance", 800, guess="distance of the last bucket")
    if family == "wav2vec2-conformer":
        rotary = "encoder.embed_positions.inv_freq" in state
        if not rotary and f"{_LAYER}self_attn.linear_pos.weight" not in state:
            raise ValueError("convolutional positions below conformers, which transformers never has")
        found |= dict(hidden_act="swish", position_embeddings_type="rotary" if rotary else "relative")
        found["rotary_embedding_base"] = 10000
        found["conv_depthwise_kernel_size"] = _shape(state, f"{_LAYER}conv_module.depthwise_conv.weight", 3)[2]
    return found


def _training(said: Settings) -> dict[str, Any]:
    """Rates of dropout and masks; what a file does not say is fairseq's default."""
    time, feature = said.trained("mask_prob", 0.65), said.trained("mask_channel_prob", 0.0)
    never = time <= 0 and feature <= 0  # transformers has a vector for masked frames, as fairseq always, if one is not
    return dict(
        hidden_dropout=said.trained("dropout", 0.1), attention_dropout=said.trained("attention_dropout", 0.1),
        activation_dropout=said.trained("activation_dropout", 0.0),
        feat_proj_dropout=said.trained("dropout_input", 0.0),
        feat_quantizer_dropout=said.trained("dropout_features", 0.0),
        final_dropout=said.trained("final_dropout", 0.0),
        layerdrop=said.trained("encoder_layerdrop", 0.0, "layerdrop"), layer_norm_eps=1e-5,
        apply_spec_augment=not never, mask_time_prob=0.05 if never else time,
        mask_time_length=said.trained("mask_length", 10), mask_feature_prob=feature,
        mask_feature_length=said.trained("mask_channel_length", 10), dtype="float32",
    )  # fmt: skip


def _quantizer(state: Mapping[str, np.ndarray], said: Settings) -> dict[str, Any]:
    _, codes, width = _shape(state, "quantizer.codevectors", 3)
    G = said.number("latent_groups", 2, guess="codebooks")
    if type(G) is not int or G < 1 or codes % G:
        raise ValueError(f"latent_groups={G} for {codes} codes")
    weights = said.criterion.get("loss_weights")
    diversity = weights[0] if isinstance(weights, list) and weights else 0.1
    return dict(
        num_codevector_groups=G, num_codevectors_per_group=codes // G, codevector_dim=G * width,
        proj_codevector_dim=_shape(state, "project_q.weight", 2)[0],
        diversity_loss_weight=diversity if isinstance(diversity, (int, float)) else 0.1,
        num_negatives=said.number("num_negatives", 100),
        contrastive_logits_temperature=said.number("logit_temp", 0.1),
    )  # fmt: skip


def _shape(state: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    shape = state[name].shape
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"{name} has shape {shape}")
    return shape


def _count(state: Mapping[str, np.ndarray], stem: str) -> int:
    """How many numbers follow `stem` in names; KeyError unless they are 0, 1, 2, ..."""
    numbers = {match[1] for name in state if (match := re.match(rf"{re.escape(stem)}(\d+)\.", name))}
    for i in range(max(len(numbers), 1)):
        if str(i) not in numbers:
            raise KeyError(f"{stem}{i}")
    return len(numbers)


def _convolutions(given: Any) -> list[list[int]]:
    """[[channels, kernel, stride], ...] of text such as "[(512, 10, 5)] + [(512, 3, 2)] * 4"; ValueError for others."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=number) if type(number) is int:
                return number
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [value(part) for part in parts]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                found, times = value(left), value(right)
                if type(times) is int and isinstance(found, list) and 0 < times * len(found) <= 64:
                    return found * times
        raise ValueError

    try:
        table = value(ast.parse(given[:500], mode="eval").body) if isinstance(given, str) else given
        rows = [[channels, kernel, stride] for channels, kernel, stride in table]
        if len(rows) > 64 or any(type(n) is not int or not 0 < n < 1 << 20 for row in rows for n in row):
            raise ValueError
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        raise ValueError("its setting conv_feature_layers is not understood") from None
    return rows

"""Model families of `transformers`: which of our encoders each one is, its configuration, and heads.

A configuration of theirs and the model and task blocks of ours say the same; each direction is one function here.
Blocks are plain dicts.  What one side cannot say is a UserError that names it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from speechjax.errors import UserError
from speechjax.formats import names
from speechjax.formats.names import Row

Block = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One `model_type`: the stem of its classes, the prefix of an encoder within a model with a head.

    `encoder` lists its rows, `unlike` says why a model block is none of the family ("" if it is), `write` and `read`
    translate the encoder's part of a configuration.  `pretraining` is our task for an encoder without a head.
    """

    model_type: str
    stem: str
    prefix: str
    pretraining: str
    tasks: tuple[str, ...]  # beside pretraining, those it has a class for
    unlike: Callable[[Mapping[str, Any]], str]
    encoder: Callable[[Mapping[str, Any], str], Iterator[Row]]
    write: Callable[[Mapping[str, Any]], Block]
    read: Callable[[Mapping[str, Any]], Block]


# ---------------------------------------------------------------------------------------------- what is what


def _expect(model: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first "key=value (needs ...)" of `wanted` that `model` does not fulfil; keys are dotted."""
    for key, allowed in wanted.items():
        block, _, name = key.rpartition(".")
        found = (model.get(block, {}) if block else model).get(name, _DEFAULTS.get(key))
        if found not in allowed:
            needs = " or ".join(map(repr, allowed))
            return f"config.model.{key}={found!r} (needs {needs})"
    return ""


_DEFAULTS: Block = {
    "block.name": "transformer", "positions.name": "conv", "positions.depth": 1, "attention.positions": "none",
    "attention.gated": False, "attention.chunk": 0, "block.conv_norm": "layer", "block.conv_bias": True,
    "block.causal_conv": False, "frontend.subsample": "stack", "frontend.convention": "kaldi",
    "frontend.normalize": "utterance", "frontend.factor": 4, "frontend.n_mels": 80, "block.kernel": 31,
    "block.activation": "swish", "attention.before": 64, "attention.after": 8,
}  # fmt: skip
_PLAIN = {"frontend.name": ("waveform",), "block.name": ("transformer",), "attention.chunk": (0,)}


def _transformer(model: Mapping[str, Any]) -> str:
    return _expect(model, _PLAIN | {"attention.positions": ("none",), "positions.name": ("conv",)}) or _depth(model, 1)


def _depth(model: Mapping[str, Any], depth: int) -> str:
    found = model["positions"].get("depth", 1)
    return "" if (found == 1) == (depth == 1) else f"config.model.positions.depth={found}"


def _wavlm(model: Mapping[str, Any]) -> str:
    wanted = {"attention.positions": ("buckets",), "attention.gated": (True,), "positions.name": ("conv",)}
    return _expect(model, _PLAIN | wanted) or _depth(model, 1)


def _data2vec(model: Mapping[str, Any]) -> str:
    wanted = {
        "attention.positions": ("none",), "positions.name": ("conv",), "frontend.norm": ("layer",), "norm": ("post",),
    }  # fmt: skip
    return _expect(model, _PLAIN | wanted) or _depth(model, 2)


def _conformer(model: Mapping[str, Any]) -> str:
    return _expect(model, {
        "frontend.name": ("waveform",), "block.name": ("conformer",), "attention.chunk": (0,), "norm": ("pre",),
        "attention.positions": ("relative", "rotary_inputs", "none"), "positions.name": ("none",),
        "block.conv_norm": ("batch",), "block.conv_bias": (False,), "block.causal_conv": (False,),
    }) or _odd(model)  # fmt: skip


def _bert(model: Mapping[str, Any]) -> str:
    # The norm of the features undoes what kinds of variance differ in.
    return _expect(model, {
        "frontend.name": ("mel",), "frontend.subsample": ("stack",), "frontend.convention": ("kaldi",),
        "frontend.normalize": ("sample", "utterance"), "block.name": ("conformer",), "attention.chunk": (0,),
        "norm": ("none",), "attention.positions": ("shaw", "relative", "rotary_inputs", "none"),
        "positions.name": ("none",), "block.conv_norm": ("layer",), "block.conv_bias": (False,),
        "block.causal_conv": (True,),
    }) or _odd(model)  # fmt: skip


def _odd(model: Mapping[str, Any]) -> str:
    kernel = model["block"].get("kernel", 31)
    return "" if kernel % 2 else f"config.model.block.kernel={kernel} (needs an odd one)"


# ---------------------------------------------------------------------------------------------- configurations


def _write_shared(model: Mapping[str, Any]) -> Block:
    """What all configurations have."""
    return dict(
        hidden_size=model["width"], num_hidden_layers=model["layers"], num_attention_heads=model["heads"],
        intermediate_size=model["mlp"], hidden_dropout=model["dropout"], attention_dropout=model["attention_dropout"],
        activation_dropout=model["activation_dropout"], feat_proj_dropout=model["input_dropout"],
        layerdrop=model["layerdrop"], layer_norm_eps=1e-5, hidden_act="gelu",
    )  # fmt: skip


def _read_shared(hf: Mapping[str, Any]) -> Block:
    """The same, as a model block; scan and remat as the presets have them."""
    act = hf.get("hidden_act", "gelu")
    if hf["model_type"] not in ("wav2vec2-conformer", "wav2vec2-bert") and act != "gelu":
        raise UserError(f"config.json: hidden_act={act!r}; here it is always 'gelu'")
    if hf.get("layer_norm_eps", 1e-5) != 1e-5:
        raise UserError(f"config.json: layer_norm_eps={hf['layer_norm_eps']}; here it is always 1e-5")
    for key in ("add_adapter", "adapter_attn_dim", "use_intermediate_ffn_before_adapter"):
        if hf.get(key):
            raise UserError(
                f"config.json: {key}={hf[key]!r}: layers of adapters on top of the encoder have no place here"
            )
    large = hf["num_hidden_layers"] >= 24
    return dict(
        width=hf["hidden_size"], layers=hf["num_hidden_layers"], heads=hf["num_attention_heads"],
        mlp=hf["intermediate_size"], dropout=float(hf["hidden_dropout"]),
        attention_dropout=float(hf["attention_dropout"]), activation_dropout=float(hf["activation_dropout"]),
        input_dropout=float(hf["feat_proj_dropout"]), layerdrop=float(hf["layerdrop"]), scan=large, remat=large,
        dtype="float32",
    )  # fmt: skip


def _write_front(model: Mapping[str, Any]) -> Block:
    front = model["frontend"]
    return dict(
        conv_dim=list(front["channels"]), conv_kernel=list(front["kernels"]), conv_stride=list(front["strides"]),
        num_feat_extract_layers=len(front["channels"]), conv_bias=front["bias"], feat_extract_norm=front["norm"],
        feat_extract_activation="gelu",
    )  # fmt: skip


def _read_front(hf: Mapping[str, Any], kind: str = "") -> Block:
    if hf.get("feat_extract_activation", "gelu") != "gelu":
        raise UserError(f"config.json: feat_extract_activation={hf['feat_extract_activation']!r}; here it is 'gelu'")
    if not hf.get("feat_proj_layer_norm", True) or hf.get("conv_pos_batch_norm", False):
        raise UserError("config.json: feat_proj_layer_norm=False and conv_pos_batch_norm=True have no place here")
    if hf["feat_extract_norm"] not in ("group", "layer"):
        raise UserError(f"config.json: feat_extract_norm={hf['feat_extract_norm']!r}; there are 'group' and 'layer'")
    return dict(
        name="waveform", channels=tuple(hf["conv_dim"]), kernels=tuple(hf["conv_kernel"]),
        strides=tuple(hf["conv_stride"]), norm=kind or hf["feat_extract_norm"], bias=hf["conv_bias"],
        normalize=hf["do_normalize"],
    )  # fmt: skip


def _write_wave(model: Mapping[str, Any]) -> Block:
    positions, attention = model["positions"], model.get("attention", {})
    found = _write_shared(model) | _write_front(model) | dict(
        do_stable_layer_norm=model["norm"] == "pre", num_conv_pos_embeddings=positions.get("kernel", 128),
        num_conv_pos_embedding_groups=positions.get("groups", 16),
    )  # fmt: skip
    if attention.get("gated"):
        found |= dict(num_buckets=attention.get("buckets", 320), max_bucket_distance=attention.get("max_distance", 800))
    return found


def _read_wave(hf: Mapping[str, Any]) -> Block:
    positions = dict(kernel=hf["num_conv_pos_embeddings"], groups=hf["num_conv_pos_embedding_groups"])
    model = _read_shared(hf) | dict(
        frontend=_read_front(hf), norm="pre" if hf["do_stable_layer_norm"] else "post", positions=positions
    )
    if hf["model_type"] == "wavlm":
        model["attention"] = dict(
            positions="buckets", gated=True, buckets=hf["num_buckets"], max_distance=hf["max_bucket_distance"]
        )
    return model


def _write_data2vec(model: Mapping[str, Any]) -> Block:
    positions, front = model["positions"], _write_front(model)
    del front["feat_extract_norm"]
    return _write_shared(model) | front | dict(
        num_conv_pos_embeddings=positions["depth"], conv_pos_kernel_size=positions.get("kernel", 128),
        num_conv_pos_embedding_groups=positions.get("groups", 16),
    )  # fmt: skip


def _read_data2vec(hf: Mapping[str, Any]) -> Block:
    depth = hf["num_conv_pos_embeddings"]
    if depth < 2:
        raise UserError(f"config.json: num_conv_pos_embeddings={depth}; a stack here has at least two layers")
    positions = dict(depth=depth, kernel=hf["conv_pos_kernel_size"], groups=hf["num_conv_pos_embedding_groups"])
    return _read_shared(hf) | dict(frontend=_read_front(hf, "layer"), norm="post", positions=positions)


# Of attention: ours and theirs.
_CONFORMER_POSITIONS = {"relative": "relative", "rotary_inputs": "rotary", "shaw": "relative_key", "none": None}


def _write_conformer(model: Mapping[str, Any]) -> Block:
    block, attention = model["block"], model["attention"]
    return _write_shared(model) | dict(
        hidden_act=block.get("activation", "swish"), conv_depthwise_kernel_size=block.get("kernel", 31),
        conformer_conv_dropout=model["dropout"], rotary_embedding_base=10000,
        position_embeddings_type=_CONFORMER_POSITIONS[attention["positions"]],
    )  # fmt: skip


def _read_conformer(hf: Mapping[str, Any], **block: Any) -> Block:
    ours = {theirs: kind for kind, theirs in _CONFORMER_POSITIONS.items()}
    act = {"swish": "swish", "silu": "swish", "gelu": "gelu"}.get(hf["hidden_act"])
    if act is None:
        raise UserError(f"config.json: hidden_act={hf['hidden_act']!r}; conformers here have 'swish' or 'gelu'")
    if hf["position_embeddings_type"] not in ours:
        there = ", ".join(map(repr, ours))
        raise UserError(f"config.json: position_embeddings_type={hf['position_embeddings_type']!r}; there are {there}")
    if hf["position_embeddings_type"] == "rotary" and hf["rotary_embedding_base"] != 10000:
        raise UserError(f"config.json: rotary_embedding_base={hf['rotary_embedding_base']}; here it is 10000")
    return _read_shared(hf) | dict(
        positions=dict(name="none"), attention=dict(positions=ours[hf["position_embeddings_type"]]),
        block=dict(
            name="conformer", kernel=hf["conv_depthwise_kernel_size"], conv_bias=False, activation=act, **block
        ),
    )  # fmt: skip


def _write_wave_conformer(model: Mapping[str, Any]) -> Block:
    unused = dict(num_conv_pos_embeddings=1, num_conv_pos_embedding_groups=model["width"])
    return _write_conformer(model) | _write_front(model) | unused


def _read_wave_conformer(hf: Mapping[str, Any]) -> Block:
    return _read_conformer(hf, conv_norm="batch", causal_conv=False) | dict(frontend=_read_front(hf), norm="pre")


def _write_bert(model: Mapping[str, Any]) -> Block:
    front, attention = model["frontend"], model["attention"]
    return _write_conformer(model) | dict(
        feature_projection_input_dim=front.get("n_mels", 80) * front.get("factor", 4),
        left_max_position_embeddings=attention.get("before", 64),
        right_max_position_embeddings=attention.get("after", 8),
    )  # fmt: skip


def _read_bert(hf: Mapping[str, Any]) -> Block:
    model = _read_conformer(hf, conv_norm="layer", causal_conv=True)
    if model["attention"]["positions"] == "shaw":
        model["attention"] |= dict(before=hf["left_max_position_embeddings"], after=hf["right_max_position_embeddings"])
    stride = hf["stride"]
    if hf["feature_projection_input_dim"] % stride or stride not in (1, 2, 4, 8):
        raise UserError(
            f"config.json: feature_projection_input_dim={hf['feature_projection_input_dim']} and stride={stride} of "
            "preprocessor_config.json fit no front end here"
        )
    bands = hf["feature_projection_input_dim"] // stride
    front = dict(name="mel", n_mels=bands, factor=stride, subsample="stack", normalize="sample")
    return model | dict(frontend=front, norm="none")


# What a configuration that leaves a key out means by that.
_THEIR_DEFAULTS: Block = dict(
    vocab_size=32, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    hidden_act="gelu", hidden_dropout=0.1, activation_dropout=0.1, attention_dropout=0.1, feat_proj_dropout=0.0,
    feat_quantizer_dropout=0.0, final_dropout=0.1, layerdrop=0.1, layer_norm_eps=1e-5, feat_extract_norm="group",
    feat_extract_activation="gelu", conv_dim=[512] * 7, conv_stride=[5, 2, 2, 2, 2, 2, 2],
    conv_kernel=[10, 3, 3, 3, 3, 2, 2], conv_bias=False, num_conv_pos_embeddings=128, num_conv_pos_embedding_groups=16,
    do_stable_layer_norm=False, apply_spec_augment=True, mask_time_prob=0.05, mask_time_length=10,
    mask_feature_prob=0.0, mask_feature_length=10, num_codevectors_per_group=320, num_codevector_groups=2,
    contrastive_logits_temperature=0.1, num_negatives=100, codevector_dim=256, proj_codevector_dim=256,
    diversity_loss_weight=0.1, use_weighted_layer_sum=False, classifier_proj_size=256,
    tdnn_dim=[512, 512, 512, 512, 1500], tdnn_kernel=[5, 3, 3, 1, 1], tdnn_dilation=[1, 2, 3, 1, 1],
    xvector_output_dim=512, num_buckets=320, max_bucket_distance=800, pad_token_id=0,
    id2label={"0": "LABEL_0", "1": "LABEL_1"}, position_embeddings_type="relative", rotary_embedding_base=10000,
    conv_depthwise_kernel_size=31, do_normalize=True, stride=2,
)  # fmt: skip
_DEFAULTS_OF: dict[str, Block] = {
    "data2vec-audio": dict(num_conv_pos_embeddings=5, conv_pos_kernel_size=19),
    "wav2vec2-bert": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, hidden_act="swish",
        hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, classifier_proj_size=768,
        position_embeddings_type="relative_key", feature_projection_input_dim=160, left_max_position_embeddings=64,
        right_max_position_embeddings=8,
    ),
}  # fmt: skip
_MAY_BE_ZERO = ("left_max_position_embeddings", "right_max_position_embeddings", "num_negatives")
_MOST = 2**20  # any number there; of what is damaged nothing larger is reserved before shapes are compared


def complete(hf: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Block:
    """A configuration with what it leaves out, and what belongs to it of preprocessor_config.json.

    Raises UserError where it names no family, or a value is of another kind than its default.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"config.json: model_type={kind!r}; those that can be read are {', '.join(FAMILIES)}")
    known = _THEIR_DEFAULTS | _DEFAULTS_OF.get(kind, {})
    front = {key: preprocessor[key] for key in ("do_normalize", "stride") if key in preprocessor}
    said = {key: value for key, value in hf.items() if value is not None or key == "position_embeddings_type"}
    found: Block = known | said | front
    for key, default in known.items():
        wanted = (int, float) if isinstance(default, float) else type(default)
        optional = key == "position_embeddings_type" and found[key] is None
        if not optional and (not isinstance(found[key], wanted) or isinstance(found[key], bool) != (wanted is bool)):
            raise UserError(f"config.json: {key}={found[key]!r} is no {type(default).__name__}")
        least = 1 if type(default) is int and default and key not in _MAY_BE_ZERO else 0
        if isinstance(found[key], int | float) and not least <= found[key] <= _MOST:
            raise UserError(f"config.json: {key}={found[key]!r} makes no sense")
    for key in ("conv_dim", "conv_stride", "conv_kernel", "tdnn_dim", "tdnn_kernel", "tdnn_dilation"):
        sizes: Any = found[key]
        if not sizes or not all(type(x) is int and 0 < x <= _MOST for x in sizes):
            raise UserError(f"config.json: {key}={sizes!r} is no list of sizes")
    if len({len(found[key]) for key in ("conv_dim", "conv_stride", "conv_kernel")}) > 1:
        raise UserError("config.json: conv_dim, conv_stride and conv_kernel are not of one length")
    return found


# ---------------------------------------------------------------------------------------------- the families


def _rows(*parts: Callable[[Mapping[str, Any], str], Iterator[Row]]):
    return lambda model, base: (row for part in parts for row in part(model, base))


_WAVE = _rows(names.waveform, names.transformer)
_ALL = ("ctc", "classify", "frames", "speaker")
FAMILIES = {
    family.model_type: family
    for family in (
        Family("wav2vec2", "Wav2Vec2", "wav2vec2.", "wav2vec2", _ALL, _transformer, _WAVE, _write_wave, _read_wave),
        Family("hubert", "Hubert", "hubert.", "hubert", ("ctc", "classify"), _transformer, _WAVE, _write_wave,
               _read_wave),
        Family("wavlm", "WavLM", "wavlm.", "wavlm", _ALL, _wavlm, _WAVE, _write_wave, _read_wave),
        Family("data2vec-audio", "Data2VecAudio", "data2vec_audio.", "data2vec", _ALL, _data2vec, _WAVE,
               _write_data2vec, _read_data2vec),
        Family("wav2vec2-conformer", "Wav2Vec2Conformer", "wav2vec2_conformer.", "wav2vec2", _ALL, _conformer,
               _rows(names.waveform, names.conformer, names.unused_positions), _write_wave_conformer,
               _read_wave_conformer),
        Family("wav2vec2-bert", "Wav2Vec2Bert", "wav2vec2_bert.", "w2v_bert", _ALL, _bert,
               _rows(lambda model, base: names.projection(base), names.conformer), _write_bert, _read_bert),
    )
}  # fmt: skip


def family_of(model: Mapping[str, Any], task: str, wanted: str = "") -> Family:
    """The family of a model block; `wanted` names one.  Wav2vec 2.0 and HuBERT are one architecture: `task` decides.

    Raises UserError where the model is of none, or not of the one that is wanted.
    """
    if wanted and wanted not in FAMILIES:
        raise UserError(f"--family={wanted}: choose from {', '.join(FAMILIES)}")
    if model.get("adapters"):
        raise UserError("this model has adapters: merge them first (python -m speechjax.adapter merge)")
    if (narrow := model.get("head_width", 0)) and narrow * model["heads"] != model["width"]:
        raise UserError(
            f"this model has {model['heads']} heads of {narrow} (pruned?), which are not its width of "
            f"{model['width']}: transformers has no such attention; --format=onnx, stablehlo or safetensors take it"
        )
    first = [name for name in FAMILIES if FAMILIES[name].pretraining == task]
    reasons = {}
    for name in [wanted] if wanted else [*first, *FAMILIES]:
        reasons[name] = FAMILIES[name].unlike(model)
        if not reasons[name]:
            return FAMILIES[name]
    shown = "; ".join(f"no {name}: {why}" for name, why in reasons.items())
    raise UserError(
        f"transformers has no class for this encoder ({shown}); --format=onnx, stablehlo or safetensors take any"
    )

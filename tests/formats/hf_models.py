"""Miniatures of every family and class of `transformers`, and what they answer: for live and for golden parity.

Weights are drawn anew around zero, so that no bias, gain or table is what a new model has.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speechjax import config as configs
from speechjax.formats import hf, imports
from speechjax.formats.families import FAMILIES, complete
from speechjax.tasks._head import Head

LENGTHS = [1000, 700]  # samples; of w2v-BERT frames
SHARED = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=11,
    tdnn_dim=[12, 12, 12, 12, 20], xvector_output_dim=14, classifier_proj_size=9, mask_time_prob=0.3,
    id2label={str(k): f"class {k}" for k in range(5)}, hidden_dropout=0.1, layerdrop=0.0,
)  # fmt: skip
CONVOLUTIONS = dict(
    conv_dim=[16, 8, 16, 16], conv_kernel=[10, 3, 3, 2], conv_stride=[5, 2, 2, 2], num_feat_extract_layers=4,
    num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
)  # fmt: skip
QUANTIZER = dict(num_codevectors_per_group=6, num_codevector_groups=2, codevector_dim=16, proj_codevector_dim=10)


def _waves(kind: str, **more: Any) -> dict[str, dict[str, Any]]:
    """Every front end with every place of the norms; biases where one of the two is as published for Large."""
    return {
        f"{kind}-{norm}-{'pre' if pre else 'post'}": dict(
            model_type=kind, feat_extract_norm=norm, conv_bias=norm == "layer", do_stable_layer_norm=pre,
            **SHARED, **CONVOLUTIONS, **more,
        )
        for norm in ("group", "layer")
        for pre in (False, True)
    }  # fmt: skip


def _conformer(**more: Any) -> dict[str, Any]:
    return dict(
        model_type="wav2vec2-conformer", hidden_act="swish", conv_depthwise_kernel_size=5, feat_extract_norm="layer",
        conv_bias=True, **SHARED, **CONVOLUTIONS, **QUANTIZER,
    ) | more  # fmt: skip


def _bert(**more: Any) -> dict[str, Any]:
    return dict(
        model_type="wav2vec2-bert", feature_projection_input_dim=20, conv_depthwise_kernel_size=5,
        left_max_position_embeddings=4, right_max_position_embeddings=2, hidden_act="swish", **SHARED,
    ) | more  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    **_waves("wav2vec2", **QUANTIZER),
    **_waves("hubert"),
    **_waves("wavlm", num_buckets=16, max_bucket_distance=20),
    "data2vec-audio": dict(
        model_type="data2vec-audio", conv_pos_kernel_size=5, conv_bias=False,
        **SHARED, **(CONVOLUTIONS | dict(num_conv_pos_embeddings=3)),
    ),
    "conformer-relative": _conformer(),
    "conformer-rotary": _conformer(position_embeddings_type="rotary", feat_extract_norm="group", conv_bias=False),
    "conformer-gelu": _conformer(position_embeddings_type=None, hidden_act="gelu"),
    "bert": _bert(),
    "bert-relative": _bert(position_embeddings_type="relative"),
}  # fmt: skip


def suffixes(kind: str) -> list[str]:
    """Classes of a `model_type`."""
    heads = ["ForCTC", "ForSequenceClassification"]
    if kind != "hubert":
        heads += ["ForAudioFrameClassification", "ForXVector"]
    return ["Model", *(["ForPreTraining"] if kind in ("wav2vec2", "wav2vec2-conformer") else []), *heads]


CASES = [(name, suffix) for name, config in VARIANTS.items() for suffix in suffixes(config["model_type"])]


def make_inputs(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Audio [B, S] or features [B, N, F] with zeros as padding, their lengths, and a mask [B, T] of frames."""
    rng = np.random.default_rng(5)
    if config["model_type"] == "wav2vec2-bert":
        lengths = np.array([18, 13], np.int32)  # stacked frames
        x = rng.normal(size=(2, 18, config["feature_projection_input_dim"])).astype(np.float32)
    else:
        lengths = np.array(LENGTHS, np.int32)
        x = (0.1 * rng.normal(size=(2, max(LENGTHS)))).astype(np.float32)
    x[1, lengths[1] :] = 0
    return dict(x=x, lengths=lengths)


def their_model(config: dict[str, Any], suffix: str, seed: int = 0) -> Any:
    """The class in evaluation mode, float32; its weights survive float16."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    made = kind(**{k: v for k, v in config.items() if k != "model_type"}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = getattr(transformers, FAMILIES[config["model_type"]].stem + suffix)(made).eval()
    rng = np.random.default_rng(seed + 1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith(("pe", "inv_freq")):
            continue
        drawn = torch.from_numpy(rng.normal(0, 0.1, tuple(tensor.shape)).astype(np.float32))
        positive = name.endswith(("running_var", "original0"))
        tensor.data = (tensor.data + (drawn.abs() if positive else drawn)).half().float()
    return model


def their_answers(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hidden states, and what the head says, of a padded batch."""
    import torch  # pyright: ignore[reportMissingImports]

    x, lengths = torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["lengths"])
    mask = (torch.arange(x.shape[1])[None] < lengths[:, None]).long()
    key = "input_features" if x.ndim == 3 else "input_values"
    with torch.no_grad():
        out = model(**{key: x}, attention_mask=mask, output_hidden_states=True)
    found = {f"hidden{i}": state for i, state in enumerate(out.hidden_states)}
    named = dict(
        last="last_hidden_state", logits="logits", embeddings="embeddings", context="projected_states",
        targets="projected_quantized_states",
    )  # fmt: skip
    found |= {ours: out[theirs] for ours, theirs in named.items() if theirs in out}
    if "embeddings" in found:
        # Of padded rows they average frames of padding too: their count of frames forgets the layers' dilation.
        found |= dict(embeddings=found["embeddings"][:1])
        found.pop("logits")  # a layer on the embeddings that only their loss needs
    return {name: value.numpy() for name, value in found.items()}


def leaking(config: Any) -> Any:
    """The config with padding let in where theirs lets it in."""
    model = config.model.to_dict()
    if model["frontend"].get("norm") == "group":
        model["frontend"]["leaky"] = True
    if model["positions"].get("depth", 1) > 1:
        model["positions"]["leaky"] = True
    if model.get("block", {}).get("conv_norm") == "batch":
        model["block"]["leaky"] = True
    config = config.copy_and_resolve_references()
    config.model = model
    return config


def as_folder(config: dict[str, Any], suffix: str, state: dict[str, np.ndarray]) -> hf.Folder:
    """What reading a saved model gives."""
    stem = FAMILIES[config["model_type"]].stem
    content = config | dict(architectures=[stem + suffix], do_normalize=False)
    return hf.opened(complete(content, dict(stride=2)), hf.modern(state), {}, {}, {})


def our_answers(folder: hf.Folder, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(the same of our model with their weights, our classes of theirs): frames [B] of each row as "frames"."""
    config, leaves, _ = imports.as_run(folder)
    params, extra, _ = imports.variables(config, leaves)
    assert config.task.name != "ctc" or config.task.classes == SHARED["vocab_size"] + 3  # specials they do not name
    return answers(leaking(config), params, extra, inputs)


def answers(config: Any, params: Any, extra: Any, inputs: dict[str, np.ndarray]) -> Any:
    """What a task of ours answers to `make_inputs`."""
    task = configs.make_task(config)
    x, lengths = jnp.asarray(inputs["x"]), jnp.asarray(inputs["lengths"])

    def run(task):
        if x.ndim == 3:
            bands = x.shape[2] // task.encoder.subsampling()
            features, frames = task.encoder.embed(x.reshape(len(x), -1, bands), lengths * task.encoder.subsampling())
        else:
            features, frames = task.encoder.extract({"audio": x, "lengths": lengths})
        normed = task.encoder.feature_norm(features)
        encoded = task.encoder.contextualize(normed, frames, train=False, hidden=True)
        found: dict[str, Any] = {f"hidden{i}": state for i, state in enumerate(encoded.hidden)}
        found |= dict(last=encoded.frames, frames=encoded.lengths)
        if isinstance(task, Head):
            said = task.respond(encoded)
            found |= {"embeddings" if k == "embedding" else "logits": v for k, v in said.items() if k != "lengths"}
        if hasattr(task, "project_context") and hasattr(task, "quantizer") and x.ndim == 2:
            quantized = task.quantizer(normed.astype(jnp.float32), jnp.float32(1), train=False)
            found |= dict(context=task.project_context(encoded.frames.astype(jnp.float32)))
            found |= dict(targets=task.project_target(quantized.vectors))
        return found

    found = jax.jit(lambda variables: task.apply(variables, method=run))({"params": params, **extra})
    return jax.tree.map(np.asarray, found)


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest absolute difference of every output on valid frames; theirs decide which outputs there are."""
    frames = ours["frames"]
    found = {}
    for name, value in theirs.items():
        mine = ours[name]
        if name == "embeddings":  # ours have length 1
            mine, value = mine[: len(value)], value / np.linalg.norm(value, axis=1, keepdims=True)
        if value.ndim == 3:
            inside = np.arange(value.shape[1]) < frames[:, None]
            assert mine.shape[:2] == value.shape[:2]
            mine, value = mine[inside], value[inside]
        found[name] = float(np.abs(mine - value).max())
    return found

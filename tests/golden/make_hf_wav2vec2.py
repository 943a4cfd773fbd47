"""Writes hf_wav2vec2_{group,layer}.npz: what `transformers.Wav2Vec2ForPreTraining` computes for tiny random weights.

Needs torch and transformers: `pip install torch transformers`, then `python tests/golden/make_hf_wav2vec2.py`.
Weights are stored in float16 and are exactly representable there, audio in int16; outputs and gradients in float32.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

FOLDER = Path(__file__).parent
SEED = 20
TINY = dict(
    conv_dim=[16] * 4, conv_kernel=[10, 3, 3, 2], conv_stride=[5, 2, 2, 2], num_feat_extract_layers=4,
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, num_codevectors_per_group=6,
    num_codevector_groups=2, codevector_dim=16, proj_codevector_dim=10, num_negatives=7,
    contrastive_logits_temperature=0.1, diversity_loss_weight=0.1, hidden_dropout=0.0, attention_dropout=0.0,
    activation_dropout=0.0, feat_proj_dropout=0.0, feat_quantizer_dropout=0.0, layerdrop=0.0,
)  # fmt: skip
KINDS = {
    # Their group norm runs over padding too, so that kind is compared without any.
    "group": dict(feat_extract_norm="group", conv_bias=False, do_stable_layer_norm=False, lengths=[1000, 1000]),
    "layer": dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True, lengths=[1000, 700]),
}


def make_inputs(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Audio [B, S] int16 with zeros as padding, a mask [B, T], and K negatives of every masked frame [B, T, K]."""
    rng = np.random.default_rng(SEED)
    lengths = np.asarray(config["lengths"], np.int32)
    frames = lengths
    for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        frames = (frames - kernel) // stride + 1
    samples, rows, T, K = lengths.max(), len(lengths), frames.max(), config["num_negatives"]
    audio = np.rint(3000 * rng.standard_normal((rows, samples))).astype(np.int16)
    audio[np.arange(samples) >= lengths[:, None]] = 0
    mask = (rng.random((rows, T)) < 0.6) & (np.arange(T) < frames[:, None])
    negatives = np.zeros((rows, T, K), np.int32)
    for row in range(rows):
        masked = np.flatnonzero(mask[row])
        for t in masked:
            negatives[row, t] = rng.choice(masked[masked != t], K)
    return dict(audio=audio, lengths=lengths, frames=frames, mask=mask, negatives=negatives)


def make_model(config: dict[str, Any]):
    """Their model, every parameter moved off its initial value; the values survive float16."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining  # pyright: ignore[reportMissingImports]

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED + 1)
    settings = {k: v for k, v in config.items() if k != "lengths"}
    model = Wav2Vec2ForPreTraining(Wav2Vec2Config(**settings, attn_implementation="eager"))
    for parameter in model.parameters():
        noise = torch.from_numpy(rng.normal(0, 0.1, parameter.shape).astype(np.float32))
        parameter.data = (parameter.data + noise).half().float()
    return model


def run(model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs and gradients: hidden states unmasked; states, losses and gradients masked, without Gumbel noise."""
    import torch  # pyright: ignore[reportMissingImports]

    def noiseless(logits, tau, hard):
        soft = torch.softmax(logits / tau, dim=-1)
        one_hot = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        # In this order the value is exactly one-hot, which their test for equal codes relies on.
        return one_hot + (soft - soft.detach())

    audio = torch.from_numpy(inputs["audio"].astype(np.float32) / 32768)
    padded = len(set(inputs["lengths"].tolist())) > 1
    attend = torch.arange(audio.shape[1])[None] < torch.from_numpy(inputs["lengths"])[:, None]
    attention_mask = attend.long() if padded else None
    with torch.no_grad():
        plain = model.eval().wav2vec2(audio, attention_mask=attention_mask, output_hidden_states=True)
    negatives = torch.from_numpy(inputs["negatives"] + inputs["mask"].shape[1] * np.arange(len(audio))[:, None, None])
    with mock.patch("torch.nn.functional.gumbel_softmax", noiseless):
        out = model.train()(
            audio, attention_mask=attention_mask, mask_time_indices=torch.from_numpy(inputs["mask"]),
            sampled_negative_indices=negatives,
        )  # fmt: skip
        out.loss.backward()
    results = {f"hidden{i}": state for i, state in enumerate(plain.hidden_states)}
    results |= dict(
        last=plain.last_hidden_state, extracted=plain.extract_features, projected_states=out.projected_states,
        projected_quantized_states=out.projected_quantized_states, contrastive=out.contrastive_loss,
        diversity=out.diversity_loss, loss=out.loss, perplexity=out.codevector_perplexity,
    )  # fmt: skip
    results |= {f"gradient/{name}": p.grad for name, p in model.named_parameters()}
    return {name: value.detach().numpy() for name, value in results.items()}


def make(kind: str) -> dict[str, Any]:
    """Everything one golden file holds."""
    config = TINY | KINDS[kind]
    inputs = make_inputs(config)
    model = make_model(config)
    weights = {f"weight/{n}": p.detach().numpy().astype(np.float16) for n, p in model.named_parameters()}
    about = dict(config=json.dumps(config), seed=np.int32(SEED))
    return about | inputs | weights | run(model, inputs)


if __name__ == "__main__":
    for kind in KINDS:
        path = FOLDER / f"hf_wav2vec2_{kind}.npz"
        np.savez_compressed(path, **make(kind))
        print(path.name, path.stat().st_size // 1024, "KiB")

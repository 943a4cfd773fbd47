"""Writes hf_wavlm_{group,layer}.npz: what `transformers.WavLMModel` computes for tiny random weights.

Needs torch and transformers: `pip install torch transformers==5.23.0`, then `python tests/golden/make_hf_wavlm.py`.
Weights are stored in float16 and are exactly representable there, audio in int16; outputs and gradients in float32.
`buckets` are those of key minus query from -`SPAN` to `SPAN`, with the published 320 and 800.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from make_hf_wav2vec2 import KINDS, SEED, TINY, make_inputs

FOLDER = Path(__file__).parent
SPAN = 1500
# Few enough buckets that 24 frames reach the exact ones, the logarithmic ones and those beyond the last.
BUCKETS = dict(num_buckets=16, max_bucket_distance=14)


def make(kind: str) -> dict[str, Any]:
    """Everything one golden file holds; gradients are those of the sum of sin(3 y) over valid frames."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import WavLMConfig, WavLMModel  # pyright: ignore[reportMissingImports]
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention  # pyright: ignore[reportMissingImports]

    config = TINY | BUCKETS | KINDS[kind]
    inputs = make_inputs(config)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED + 1)
    settings = {k: v for k, v in config.items() if k != "lengths"}
    model = WavLMModel(WavLMConfig(**settings, attn_implementation="eager")).eval()
    for name, parameter in model.named_parameters():
        # Of the size of the products they join, so that an error in bias or gate shows.
        scale = 0.5 if "rel_" in name else 0.1
        noise = torch.from_numpy(rng.normal(0, scale, parameter.shape).astype(np.float32))
        parameter.data = (parameter.data + noise).half().float()

    audio = torch.from_numpy(inputs["audio"].astype(np.float32) / 32768)
    padded = len(set(inputs["lengths"].tolist())) > 1
    attend = torch.arange(audio.shape[1])[None] < torch.from_numpy(inputs["lengths"])[:, None]
    out = model(audio, attention_mask=attend.long() if padded else None, output_hidden_states=True)
    valid = torch.arange(out.last_hidden_state.shape[1])[None] < torch.from_numpy(inputs["frames"])[:, None]
    torch.sin(3 * out.last_hidden_state)[valid].sum().backward()

    results = {f"hidden{i}": state for i, state in enumerate(out.hidden_states)} | dict(last=out.last_hidden_state)
    unused = ("masked_spec_embed",)  # nothing is masked
    weights = {n: p for n, p in model.named_parameters() if n not in unused}
    results |= {f"gradient/{n}": p.grad for n, p in weights.items()}
    golden = {name: value.detach().numpy() for name, value in results.items()}
    golden |= {f"weight/{n}": p.detach().numpy().astype(np.float16) for n, p in weights.items()}
    published = WavLMAttention(8, 2, num_buckets=320, max_distance=800)
    buckets = published._relative_positions_bucket(torch.arange(-SPAN, SPAN + 1)).numpy().astype(np.int16)
    kept = {k: inputs[k] for k in ("audio", "lengths", "frames")}
    return dict(config=json.dumps(config), buckets=buckets) | kept | golden


if __name__ == "__main__":
    for kind in KINDS:
        path = FOLDER / f"hf_wavlm_{kind}.npz"
        np.savez_compressed(path, **make(kind))
        print(path.name, path.stat().st_size // 1024, "KiB")

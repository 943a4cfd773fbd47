"""Writes fairseq_*.pt and fairseq.npz: tiny random models of fairseq, and what they compute.

Needs torch, transformers 5.23, omegaconf 2.0 as fairseq had it, and the sources of s3prl 0.4.18, which hold fairseq's
models without the rest of fairseq (`pip download s3prl==0.4.18 --no-deps --no-binary :all:`, unpacked).  Then
`python tests/golden/make_fairseq.py FOLDER_OF_S3PRL`.

Also compares every model, each of its layers, with `transformers`, given what `read_fairseq` makes of the checkpoint,
for a padded batch and a plain one.  Weights are random and exactly representable in float16.
"""

import argparse
import importlib
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))
from speechjax.formats.fairseq import read_fairseq  # noqa: E402

SEED, LENGTHS = 7, (800, 500)  # samples: 19 frames, and 12 by fairseq's HuBERT as by all others
LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "T"]
TINY = dict(
    encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=20, encoder_attention_heads=2, conv_pos=8,
    conv_pos_groups=4, conv_feature_layers="[(8, 10, 5)] + [(8, 3, 2)] * 2 + [(8,2,2)]", final_dim=6, latent_vars=5,
    latent_groups=2, quantize_targets=True, logit_temp=0.2, num_negatives=7, mask_prob=0.5,
)  # fmt: skip
PRE = dict(layer_norm_first=True, extractor_mode="layer_norm", conv_bias=True)
CONFORMER = dict(
    layer_type="conformer", attn_type="espnet", layer_norm_first=True, depthwise_conv_kernel_size=5,
    extractor_mode="layer_norm",
)  # fmt: skip
# name: (module, class, settings beside TINY, how it is saved)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "wav2vec2_group": ("wav2vec2", {}, "args"),
    "wav2vec2_layer": ("wav2vec2", PRE, "cfg"),
    "wav2vec2_same_width": ("wav2vec2", dict(conv_feature_layers="[(16, 10, 5)] + [(16, 3, 2)] * 3"), "cfg"),
    "hubert_group": ("hubert", {}, "omegaconf"),
    "hubert_layer": ("hubert", PRE, "s3prl"),
    "data2vec": ("data2vec", dict(extractor_mode="layer_norm", pos_conv_depth=3, conv_pos=15), "cfg"),
    "wavlm_group": ("wavlm", {}, "flat"),
    "wavlm_layer": ("wavlm", PRE, "flat"),
    "conformer_relative": ("wav2vec2", dict(CONFORMER, pos_enc_type="rel_pos"), "cfg"),
    "conformer_rotary": ("wav2vec2", dict(CONFORMER, pos_enc_type="rope"), "cfg"),
    "ctc": ("wav2vec2", PRE, "ctc"),
}
KEPT = ("hubert_group", "ctc")  # as golden files


class Dictionary:
    """Pickled under fairseq's name, with the attributes that fairseq's has."""

    def __init__(self, symbols: list[str]):
        self.symbols, self.indices = symbols, {symbol: i for i, symbol in enumerate(symbols)}
        self.count, self.nspecial = [1] * len(symbols), 4
        self.bos_word, self.pad_word, self.eos_word, self.unk_word = symbols[:4]


def pretend(name: str, folder: Path | None = None) -> types.ModuleType:
    """A module or package that only says where it is: theirs import too much."""
    module = sys.modules.setdefault(name, types.ModuleType(name))
    if folder:
        module.__path__ = [str(folder)]
    return module


def make(kind: str, changes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(a random model, its settings)."""
    files = {"wavlm": "WavLM", "wav2vec2": "wav2vec2_model", "hubert": "hubert_model", "data2vec": "data2vec_model"}
    theirs = importlib.import_module(f"s3prl.upstream.{kind}.{files[kind]}")
    settings = {**TINY, **changes, "dropout": 0.0, "attention_dropout": 0.0}
    if kind == "wavlm":
        settings |= dict(relative_position_embedding=True, num_buckets=16, max_distance=14, gru_rel_pos=True)
        settings = {key: value for key, value in settings.items() if hasattr(theirs.WavLMConfig(), key)}
        model = theirs.WavLM(theirs.WavLMConfig({**settings, "dropout": 0.0}))
    else:
        config = {"wav2vec2": "Wav2Vec2Config", "hubert": "HubertConfig", "data2vec": "Data2VecAudioConfig"}[kind]
        known = getattr(theirs, config).__dataclass_fields__
        settings = {key: value for key, value in settings.items() if key in known}
        if kind == "hubert":
            settings["label_rate"] = 50.0
            task = theirs.HubertPretrainingConfig()
            model = theirs.HubertModel(theirs.HubertConfig(**settings), task, [[*LETTERS, "1", "0"]])
        else:
            found = getattr(theirs, config)(**settings)
            model = {"wav2vec2": "Wav2Vec2Model", "data2vec": "Data2VecAudioModel"}[kind]
            model = getattr(theirs, model)(found)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and "inv_freq" not in name:
                noise = 0.1 * torch.randn(value.shape, generator=generator)
                value += noise.abs() if "running_var" in name else noise
                value.copy_(value.half().float())
    return model.eval(), settings


def save(path: Path, model: Any, kind: str, settings: dict[str, Any], how: str) -> None:
    """As fairseq (of several years), Microsoft and s3prl do."""
    normalize = settings.get("extractor_mode") == "layer_norm"
    blocks = dict(model=dict(settings, _name=kind), task=dict(normalize=normalize, sample_rate=16000))
    keep = lambda name, x: "inv_freq" in name or not x.is_floating_point()  # noqa: E731
    weights = {name: x if keep(name, x) else x.half() for name, x in model.state_dict().items()}
    if how == "args":
        arguments = argparse.Namespace(**settings, normalize=normalize, arch=kind, loss_weights=[0.3, 10])
        content = dict(args=arguments, model=weights, optimizer_history=[dict(num_updates=40)])
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif how == "ctc":
        before = argparse.Namespace(**settings, normalize=normalize, arch="wav2vec2")
        arguments = argparse.Namespace(w2v_args=before, normalize=normalize, arch="wav2vec_ctc", layerdrop=0.25)
        heads = ("quantizer", "project_q", "final_proj")
        weights = {f"w2v_encoder.w2v_model.{k}": x for k, x in weights.items() if not k.startswith(heads)}
        torch.manual_seed(SEED)
        weights["w2v_encoder.proj.weight"] = torch.randn(len(LETTERS), 16).half()
        weights["w2v_encoder.proj.bias"] = torch.randn(len(LETTERS)).half()
        content = dict(args=arguments, model=weights, task_state=dict(target_dictionary=Dictionary(LETTERS)))
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif how == "flat":
        torch.save(dict(cfg=dict(settings, normalize=normalize), model=weights), path)
    elif how == "s3prl":
        content = dict(task_cfg=blocks["task"], model_cfg=blocks["model"], model_weight=weights)
        torch.save(content | dict(dictionaries_symbols=[[*LETTERS, "1", "0"]]), path)
    else:
        if how == "omegaconf":
            from omegaconf import OmegaConf

            blocks = OmegaConf.create(blocks)
        teacher = {"_ema": {k: x for k, x in weights.items() if ".layers." in k}} if kind == "data2vec" else {}
        state = dict(dictionaries=[Dictionary([*LETTERS, "1", "0"])]) if kind == "hubert" else {}
        torch.save(dict(cfg=blocks, model=weights | teacher, task_state=state), path)


def run(model: Any, kind: str, audio: torch.Tensor, padding: torch.Tensor | None) -> list[np.ndarray]:
    """The outputs of all layers and of the encoder, [B, T, D] each."""
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, i, o: seen.append(o[0])) for layer in model.encoder.layers]
    with torch.no_grad():
        last = model.extract_features(audio, padding_mask=padding, mask=False)
    for hook in hooks:
        hook.remove()
    last = last["x"] if isinstance(last, dict) else last[0]
    return [x.transpose(0, 1)[:, : last.shape[1]].numpy() for x in seen] + [last.numpy()]


def compare(path: Path, outputs: list[np.ndarray], audio: torch.Tensor, mask: torch.Tensor | None, T: list[int]):
    """Largest difference on valid frames, over all layers and the encoder, from what transformers computes."""
    found = read_fairseq(path)
    theirs = getattr(transformers, found.config["architectures"][0])
    known = theirs.config_class
    model = theirs(known(**{k: v for k, v in found.config.items() if k != "do_normalize"})).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in found.state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    seen: list[torch.Tensor] = []
    base = model.base_model
    for layer in base.encoder.layers:
        layer.register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        last = base(audio, attention_mask=mask).last_hidden_state
    pairs = list(zip([*seen, last], outputs, strict=True))
    assert min(y.std() for _, y in pairs) > 0.1
    return max(float(np.abs(x.numpy()[b, :n] - y[b, :n]).max()) for x, y in pairs for b, n in enumerate(T))


def main(folder: Path) -> None:
    pretend("s3prl", folder / "s3prl")
    pretend("s3prl.upstream", folder / "s3prl" / "upstream")
    for name in ("wav2vec2", "hubert", "data2vec", "wavlm"):
        pretend(f"s3prl.upstream.{name}", folder / "s3prl" / "upstream" / name)
    pretend("fairseq"), pretend("fairseq.data")
    pretend("fairseq.data.dictionary").Dictionary = Dictionary  # type: ignore[attr-defined]
    Dictionary.__module__ = "fairseq.data.dictionary"
    rng = np.random.default_rng(SEED)
    audio = (rng.standard_normal((2, max(LENGTHS))) * 8000).round().astype(np.int16)
    audio[1, LENGTHS[1] :] = 0
    source = torch.from_numpy(audio.astype(np.float32) / 32768)
    padding = torch.arange(max(LENGTHS))[None] >= torch.tensor(LENGTHS)[:, None]
    golden: dict[str, np.ndarray] = dict(audio=audio, lengths=np.array(LENGTHS, np.int32))
    for name, (kind, changes, how) in MODELS.items():
        torch.manual_seed(SEED)
        model, settings = make(kind, changes)
        path = Path(tempfile.mkdtemp()) / f"{name}.pt"
        save(path, model, kind, settings, how)
        plain, padded = run(model, kind, source, None), run(model, kind, source, padding)
        T = [plain[0].shape[1]] * 2
        valid = [T[0], _frames(LENGTHS[1], settings["conv_feature_layers"])]
        differences = [
            compare(path, plain, source, None, T), compare(path, padded, source, (~padding).long(), valid)
        ]  # fmt: skip
        print(f"{name:22} {path.stat().st_size:7} bytes  plain {differences[0]:.1e}  padded {differences[1]:.1e}")
        if name in KEPT:
            (FOLDER / f"fairseq_{name}.pt").write_bytes(path.read_bytes())
            golden[name] = plain[-1]
    np.savez_compressed(FOLDER / "fairseq.npz", **golden)  # type: ignore[arg-type]


def _frames(samples: int, layers: str) -> int:
    for _, kernel, stride in eval(layers):  # our own text, above
        samples = (samples - kernel) // stride + 1
    return samples


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A real run: models of every family of `transformers`, drawn at random, trained on here, and loaded there again.

    python tests/real/families.py make DIR       # where torch and transformers are
    python tests/real/families.py train DIR --audio=folder:/data/audio   # where speechjax is: convert, train, export
    python tests/real/families.py load DIR       # where torch and transformers are

Small but whole: the published front end, three layers of width 128.  What `train` exports answers `load` a noise, which
is compared with what speechjax.load answered to it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

SMALL = dict(
    hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512,
    conv_dim=[32, 32, 64, 64, 128, 128, 128], num_conv_pos_embeddings=32, codevector_dim=128, proj_codevector_dim=128,
    num_codevectors_per_group=64, layerdrop=0.0,
)  # fmt: skip
FAMILIES = {
    "wav2vec2": ("Wav2Vec2ForPreTraining", SMALL),
    "hubert": ("HubertModel", SMALL),
    "wavlm": ("WavLMModel", SMALL),
    "data2vec-audio": ("Data2VecAudioModel", SMALL | dict(num_conv_pos_embeddings=5)),
    "wav2vec2-conformer": (
        "Wav2Vec2ConformerForPreTraining", SMALL | dict(feat_extract_norm="layer", conv_bias=True, hidden_act="swish"),
    ),
    "wav2vec2-bert": ("Wav2Vec2BertModel", SMALL | dict(hidden_act="swish")),
}  # fmt: skip
STEPS = 100
TRAINING = (
    "data.crop_seconds=4.0", "data.batch_seconds=16.0", "data.shapes=1", "data.row_multiple=4", "data.min_seconds=0.25",
    "data.valid_seconds=60.0", "optim.learning_rate=3e-4", "optim.warmup=20", f"train.steps={STEPS}",
    "train.log_every=10", "train.checkpoint_every=100", "train.eval_every=100", "model.dropout=0.0",
)  # fmt: skip


def make(folder: Path) -> None:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    for name, (cls, config) in FAMILIES.items():
        torch.manual_seed(0)
        model = getattr(transformers, cls)(transformers.CONFIG_MAPPING[name](**config))
        model.save_pretrained(folder / name / "theirs")
        front = dict(do_normalize=True, stride=2)
        (folder / name / "theirs" / "preprocessor_config.json").write_text(json.dumps(front))


def call(log: Path, *command: str) -> None:
    with open(log, "ab") as out:
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=out, stderr=out)


def noise() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).normal(size=24000)).astype(np.float32)


def train(folder: Path, audio: str) -> None:
    import speechjax

    units = folder / "units"
    if not units.exists():
        call(folder / "units.log", "speechjax.label", f"--source={audio}", "--features=mfcc", "--clusters=50",
             f"--out={units}")  # fmt: skip
    for name in FAMILIES:
        at, log = folder / name, folder / name / "log"
        call(log, "speechjax.convert", f"--from=hf:{at}/theirs", f"--workdir={at}/converted")
        more = [f"--config.data.units=labels:{units}", "--config.task.codes=50", "--config.task.unit_hop=160"]
        call(log, "speechjax.main", f"--config={at}/converted/config.json", f"--config.init_from={at}/converted",
             f"--workdir={at}/trained", f"--config.data.source={audio}", *(f"--config.{o}" for o in TRAINING),
             *(more if name in ("hubert", "wavlm") else []))  # fmt: skip
        call(log, "speechjax.export", f"--workdir={at}/trained@newest", "--format=hf", f"--out={at}/ours", "--no-check")
        model = speechjax.load(f"{at}/trained@newest")
        np.save(at / "ours.npy", np.stack(model.hidden_states(noise())))
        lines = [json.loads(line) for line in (at / "trained" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["split"] == "train"]
        print(f"{name:20} loss {losses[0]:.4f} -> {losses[-1]:.4f} after {STEPS} updates", flush=True)


def load(folder: Path) -> None:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    for name, (cls, _) in FAMILIES.items():
        kind = getattr(transformers, cls)
        model, info = kind.from_pretrained(folder / name / "ours", output_loading_info=True)
        before = kind.from_pretrained(folder / name / "theirs").state_dict()
        moved = max(float((v - before[k]).abs().max()) for k, v in model.state_dict().items() if v.is_floating_point())
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder / name / "ours")
        inputs = extractor(noise(), sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        with torch.no_grad():
            states = model.eval()(**inputs, output_hidden_states=True).hidden_states
        ours = np.load(folder / name / "ours.npy")
        off = max(float(np.abs(a - b[0].numpy()).max()) for a, b in zip(ours, states, strict=False))
        print(f"{name:20} loaded whole: {not any(info.values())}; {len(states)} hidden states differ by {off:.1e} "
              f"(largest value {np.abs(ours).max():.1f}); weights moved by up to {moved:.3f}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "train", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--audio", default="embedded:0.1")
    given = parser.parse_args()
    if given.what == "train":
        train(given.folder, given.audio)
    else:
        {"make": make, "load": load}[given.what](given.folder)

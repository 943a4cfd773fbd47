"""Masked autoencoders of spectra: frames or patches are spoilt, and restored.

    python -m speechjax.main --config=configs/pretrain/mae.py:size=tiny --workdir=runs/mae \
        --config.data.source=folder:/path/to/recordings

size=tera        TERA (Liu et al. 2020, https://arxiv.org/abs/2007.06028): three transformer layers, runs of seven
                 frames, a block of bins and noise; on LibriSpeech 960 h, with the code's learning rate and length.
size=mockingjay  Mockingjay (Liu et al. 2019, https://arxiv.org/abs/1910.12638): the runs alone; published
                 with 160 mels, three frames stacked.
size=audio_mae   Audio-MAE (Huang et al. 2022, https://arxiv.org/abs/2207.06405): ViT-B on patches of 16 x 16, of which
                 80 % are hidden; on AudioSet-2M then, fine-tuned, 47.3 mAP.  Its decoder has 16 layers with local
                 attention, ours eight that see all.
size=tiny        ours, for a CPU: TERA with three layers of 128.

Arguments after the colon: size, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg

# As the published code of both papers: biases and gains do not decay.
DECAY = dict(eps=1e-8, weight_decay=((r"bias|scale|mask_embedding", 0.0), (".*", 0.01)))
RUNS = dict(prob=0.15, span=7, zero=0.8, random=0.1)


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("tera", "mockingjay", "audio_mae", "tiny"), smoke=False)
    makers = dict(tera=tera, mockingjay=mockingjay, audio_mae=audio_mae, tiny=tiny)
    config = ConfigDict(makers[args["size"]]())
    if args["smoke"]:
        config.update(smoke(args["size"]))
    return config


def tera() -> dict:
    """22.0 M parameters."""
    model = presets.spectral("base", factor=1) | dict(layers=3, positions=dict(name="sinusoidal"), scan=False)
    return presets.experiment(
        task=dict(
            name="mae", alteration=dict(name="tera", **RUNS, channels=0.2, noise_prob=0.15, noise_std=0.2)
        ),
        model=model,
        data=presets.data(crop_seconds=16.0, batch_seconds=400.0),
        optim=presets.optim(2e-4, warmup=70_000, b2=0.999, clip_norm=5.0, **DECAY),
        train=presets.train(1_000_000),
    )  # fmt: skip


def mockingjay() -> dict:
    return tera() | dict(task=dict(name="mae", alteration=dict(name="mockingjay", **RUNS)))


def audio_mae() -> dict:
    """86 M parameters, and 26 M of the decoder."""
    model = presets.spectral("base", factor=1) | dict(
        frontend=dict(name="patch", n_mels=128, patch=(16, 16), embedding=768),
        norm="pre",
        positions=dict(name="none"),
    )
    model |= dict(dropout=0.0, attention_dropout=0.0, input_dropout=0.0)
    return presets.experiment(
        task=dict(
            name="mae", alteration=dict(name="patches", share=0.8, layers=8, width=512, heads=16, mlp=2048)
        ),
        model=model,
        data=presets.data(crop_seconds=10.24, batch_seconds=5243.0),
        optim=presets.optim(
            4e-4, warmup=12_000, decay="cosine", b2=0.95, eps=1e-8, weight_decay=((r"bias|scale", 0.0), (".*", 1e-4))
        ),
        train=presets.train(125_000),
    )  # fmt: skip


def tiny() -> dict:
    """Float32, at 50 Hz."""
    config = ConfigDict(tera() | dict(model=presets.spectral("tiny", factor=2)))
    config.update(presets.tiny())
    return config.to_dict()


def smoke(size: str) -> dict:
    """Two steps of a miniature with the same wiring."""
    config = ConfigDict(presets.smoke())
    if size == "audio_mae":
        patches = dict(layers=1, width=32, heads=2, mlp=64)
        front = dict(n_mels=32, embedding=32)
        config.update(dict(task=dict(alteration=patches), model=dict(frontend=front)))
    else:
        config.update(dict(model=dict(frontend=dict(n_mels=20))))
    if size == "tiny":
        config.update(dict(model=dict(positions=dict(kernel=16, groups=4))))
    return config.to_dict()

"""Autoencoders: the waveform, or its spectrum, through a narrow middle, which may be discrete.

    python -m speechjax.main --config=configs/pretrain/autoencode.py:size=tiny --workdir=runs/autoencode \
        --config.data.source=folder:/path/to/recordings

size=waveform  wav2vec 2.0's convolutions and their mirror image, 64 numbers every 20 ms between.
size=vq        the same, the 64 numbers one of 512 codewords (van den Oord et al. 2017, https://arxiv.org/abs/1711.00937:
               a codebook of 512, commitment 0.25, averages with decay 0.99; its decoder is a WaveNet, its frames 4 ms).
size=features  log-mel frames, 64 numbers every 40 ms, six transformer layers before them.
size=tiny      ours, for a CPU: log-mel frames, 256 codewords every 20 ms, two transformer layers.

None of them repeats a published experiment, so there are no published results.

Arguments after the colon: size, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("waveform", "vq", "features", "tiny"), smoke=False)
    makers = dict(waveform=waveform, vq=vq, features=features, tiny=tiny)
    config = ConfigDict(makers[args["size"]]())
    if args["smoke"]:
        config.update(smoke(args["size"]))
    return config


def task(waveform_weight: float, codes: int = 0) -> dict:
    return dict(
        name="autoencode",
        bottleneck=64,
        codes=codes,
        commitment=0.25,
        code_decay=0.99,
        revive_below=0.03,
        waveform_weight=waveform_weight,
    )


def waveform() -> dict:
    """8.0 M parameters."""
    return presets.experiment(
        task=task(waveform_weight=0.1),
        model=presets.waveform() | dict(layers=0),
        data=presets.data(crop_seconds=8.0, batch_seconds=1600.0),
        optim=presets.optim(3e-4, warmup=5000, clip_norm=5.0),
        train=presets.train(200_000),
    )


def vq() -> dict:
    return waveform() | dict(task=task(waveform_weight=0.1, codes=512))


def features() -> dict:
    """52 M parameters."""
    model = presets.spectral(factor=4) | dict(layers=6)
    return waveform() | dict(task=task(waveform_weight=0.0), model=model)


def tiny() -> dict:
    """2.2 M parameters, float32."""
    model = presets.spectral("tiny", factor=2) | dict(layers=2)
    config = ConfigDict(waveform() | dict(task=task(waveform_weight=0.0, codes=256), model=model))
    config.update(presets.tiny(5e-4))
    return config.to_dict()


def smoke(size: str) -> dict:
    """Two steps of a miniature with the same wiring."""
    of_waveform = size in ("waveform", "vq")
    config = ConfigDict(presets.smoke(layers=0 if of_waveform else 1))
    config.update(dict(task=dict(bottleneck=8, codes=16 if size in ("vq", "tiny") else 0)))
    if of_waveform:
        config.update(dict(model=dict(frontend=dict(channels=(16,) * 7))))
    else:
        config.update(dict(model=dict(frontend=dict(n_mels=20), positions=dict(kernel=16, groups=4))))
    return config.to_dict()

"""Supervised classification of utterances: speakers, languages, words, kinds of sound.  The recipe is ours.

    python -m speechjax.main --config=configs/pretrain/sounds.py:size=tiny --workdir=runs/sounds
    python -m speechjax.main --config=configs/pretrain/sounds.py:size=base --workdir=runs/digits \
        --config.data.source=folder:/path/to/fsdd '--config.data.label=id:(?P<label>[0-9])_[^/]*$'

The classes are a field of the recordings' metadata (config.data.label=meta:speaker, meta:lang) or part of their names
(id:REGEX with a group `label`).  An utterance becomes one vector by attentive statistics pooling (Okabe et al. 2018,
https://arxiv.org/abs/1803.10963), over a learned sum of the layers.

size=base    HuBERT Base's encoder and optimizer on crops of 4 s, 100 k updates of 47 min.  Nothing is published for it.
size=tiny    for a CPU: speakers of the built-in corpus.

Arguments after the colon: size, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("base", "tiny"), smoke=False)
    config = ConfigDict(base())
    if args["size"] == "tiny":
        config.update(tiny())
    if args["smoke"]:
        config.update(smoke(args["size"]))
    return config


def base() -> dict:
    """Speakers; --config.task.classes must be at least as many as there are."""
    return presets.experiment(
        task=dict(
            name="sounds",
            classes=64,  # the built-in corpus has 48 speakers
            pooling="attention",
            pooling_hidden=128,
            layer_sum=True,
            mask_prob=0.1,
            mask_span=10,
        ),
        model=presets.waveform("base"),
        data=presets.data(crop_seconds=4.0, batch_seconds=2800.0) | dict(label="meta:speaker"),
        optim=presets.optim(5e-4, warmup=8000, clip_norm=10.0),
        train=presets.train(100_000),
    )


def tiny() -> dict:
    """0.9 M parameters, float32; 2 s a row, so that a batch holds several classes."""
    config = presets.tiny()
    config["model"] = presets.waveform("tiny")
    config["data"] |= dict(crop_seconds=2.0, shapes=1)
    return config


def smoke(size: str) -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke(layers=dict(base=2, tiny=1)[size])
    config["task"] = dict(pooling_hidden=8, mask_prob=0.5, mask_span=5)
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    return config

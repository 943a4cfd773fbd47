"""Supervised phone recognition, as an upper bound for objectives that know no phones.  The recipe is ours.

    python -m speechjax.main --config=configs/pretrain/phones.py:size=tiny --workdir=runs/phones
    python -m speechjax.main --config=configs/pretrain/phones.py:size=base,mode=ctc --workdir=runs/phones_ctc \
        --config.data.source=manifest:/path/to/manifest.jsonl --config.data.text=phonemes:de

mode=frames  from phones with times, a cross-entropy for every frame.  Of the corpora here the built-in one has them;
             a manifest may.
mode=ctc     from transcripts, which eSpeak NG turns into phonemes of one language (config.data.text=phonemes:VOICE), by
             connectionist temporal classification (Graves et al. 2006, https://doi.org/10.1145/1143844.1143891).  Rows
             without a transcript teach nothing, nor do crops: config.data.crop_seconds must hold most recordings.

size=base    HuBERT Base's encoder and optimizer, 100 k updates of 47 min.  Nothing is published for it.
size=tiny    for a CPU.

Arguments after the colon: size, mode, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg

# Spans of the encoder's input are hidden, as in SpecAugment.
HEAD = dict(
    layers="last", mask_prob=0.1, mask_span=10, channel_mask_prob=0.0, channel_mask_span=1, head_dropout=0.0
)  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("base", "tiny"), mode=("frames", "ctc"), smoke=False)
    config = ConfigDict(base())
    if args["size"] == "tiny":
        config.update(presets.tiny() | dict(model=presets.waveform("tiny")))
    if args["mode"] == "ctc":
        config.update(ctc(args["size"]))
        config.task = ConfigDict(HEAD | dict(name="ctc", classes=256, recurrent_layers=0, recurrent_width=0))
    if args["smoke"]:
        config.update(smoke(args["size"], args["mode"]))
    return config


def base() -> dict:
    """Phones with times."""
    return presets.experiment(
        task=HEAD
        | dict(
            name="frames",
            loss="softmax",
            classes=256,  # the built-in corpus has about 120 phones; what does not occur is soon unlikely
            unit_hop=160,
        ),
        model=presets.waveform("base"),
        data=presets.data(batch_seconds=2800.0) | dict(units="phones"),
        optim=presets.optim(5e-4, warmup=8000, clip_norm=10.0),
        train=presets.train(100_000),
    )


def ctc(size: str) -> dict:
    """What differs with transcripts: whole utterances, as few as fit."""
    data = dict(units="", text="phonemes:en-us", crop_seconds=25.0)
    return dict(data=data | (dict(crop_seconds=15.0, row_multiple=1) if size == "tiny" else {}))


def smoke(size: str, mode: str) -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke(layers=dict(base=2, tiny=1)[size])
    config["task"] = dict(mask_prob=0.5, mask_span=5)
    if mode == "ctc":
        config["data"] |= dict(crop_seconds=15.0)
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    return config

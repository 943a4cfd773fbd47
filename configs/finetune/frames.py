"""Fine-tuning to classify frames: phones, speech and silence, or who of several speakers is on.

    python -m speechjax.main --config=configs/finetune/frames.py:units=speech --workdir=runs/vad \\
        --config.init_from=RUN --config.data.source=manifest:/path/to/manifest.jsonl
    python -m speechjax.main --config=configs/finetune/frames.py:units=turns --workdir=runs/diarize \\
        --config.init_from=RUN --config.data.source=manifest:/path/to/manifest.jsonl --config.data.units=turns:3

units=phones  from phones [[symbol, start s, end s], ...] in the recordings' metadata; the built-in corpus has them.
units=speech  voice activity: from segments [[start s, end s], ...], or from phones that are not silence.
units=turns   diarisation, end to end: from turns [[speaker, start s, end s], ...], with the permutation-free loss of
              Fujita et al. 2019 (https://arxiv.org/abs/1909.05952); here of up to 2 speakers.
size=   base (default), large or tiny: of a model from scratch; tiny is also a recipe for a CPU, of any checkpoint.
trains= all, head (as SUPERB does), top4, gradual, bitfit, lora, ... (speechjax/finetuning.py)

The head is linear; rate and length are ours.

Arguments after the colon: units, size, trains, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import finetuning, presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(
        arg, units=("phones", "speech", "turns"), size=("", "base", "large", "tiny"), trains="all", smoke=False
    )
    args["size"] = args["size"] or "tiny" * args["smoke"]
    config = ConfigDict(base(args["size"]))
    if args["size"] == "tiny":
        config.update(finetuning.tiny_clips())
    if args["units"] == "turns":
        config.update(dict(task=dict(loss="turns"), data=dict(units="turns:2")))
        config.update(dict(train=dict(best_metric="valid/loss", best_mode="min")))
    else:
        config.update(dict(data=dict(units=args["units"])))
    config.update(finetuning.trains(args["trains"], args["size"]))
    if args["smoke"]:
        config.update(smoke(args["units"]))
    return config


def base(size: str) -> dict:
    """Phones with times; the data says how many there are."""
    return presets.experiment(
        task=dict(
            name="frames",
            classes=0,
            unit_hop=160,
            loss="softmax",
            layers="last",
            **finetuning.masks(0.05, 0.05),
        ),
        model=finetuning.model(size),
        data=presets.data(crop_seconds=15.0, batch_seconds=480.0)
        | dict(row_multiple=8, min_seconds=0.5, units="phones"),
        optim=finetuning.optim(1e-4, 20_000, clip_norm=1.0),
        train=presets.train(20_000, best_metric="valid/accuracy", best_mode="max"),
        evals=finetuning.evals(
            answers=finetuning.answers("frame_labels") | dict(group="", threshold=0.5, median=1, collar=0.0)
        ),
    )


def smoke(units: str) -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["task"] = dict(
        classes=dict(phones=256, speech=2, turns=4)[units], mask_prob=0.3, mask_span=2, channel_mask_span=4
    )
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    return config

"""Fine-tuning to predict a number of an utterance: opinion scores, signal-to-noise ratios, ages.

    python -m speechjax.main --config=configs/finetune/regress.py --workdir=runs/mos --config.init_from=RUN \\
        --config.data.source=manifest:/path/to/manifest.jsonl --config.data.label=number:mos

The number is a field of the recordings' metadata; the built-in corpus has none.  The head is the mean over frames and a
linear layer, as for opinion scores in Cooper et al. 2022 (https://arxiv.org/abs/2110.02635), which also take the
absolute error.  Rate and length are ours.

size=   base (default), large or tiny: of a model from scratch; tiny is also a recipe for a CPU, of any checkpoint.
trains= all, head (as SUPERB does), top4, gradual, bitfit, lora, ... (speechjax/finetuning.py)

Arguments after the colon: size, trains, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import finetuning, presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("", "base", "large", "tiny"), trains="all", smoke=False)
    args["size"] = args["size"] or "tiny" * args["smoke"]
    config = ConfigDict(base(args["size"]))
    if args["size"] == "tiny":
        config.update(finetuning.tiny_clips())
    config.update(finetuning.trains(args["trains"], args["size"]))
    if args["smoke"]:
        config.update(smoke())
    return config


def base(size: str) -> dict:
    """Opinion scores."""
    return presets.experiment(
        task=dict(
            name="regress",
            label="label",
            loss="l1",
            projection=0,
            pooling="mean",
            pooling_hidden=128,
            layers="last",
            **finetuning.masks(),
        ),
        model=finetuning.model(size),
        data=presets.data(crop_seconds=15.0, batch_seconds=480.0)
        | dict(row_multiple=8, min_seconds=0.1, label="number:mos"),
        optim=finetuning.optim(1e-4, 20_000, clip_norm=1.0),
        train=presets.train(20_000),
        evals=finetuning.evals(answers=finetuning.answers("values") | dict(group="")),
    )


def smoke() -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["task"] = dict(mask_prob=0.3, mask_span=2)
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    return config

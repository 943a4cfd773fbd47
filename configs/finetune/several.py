"""Fine-tuning one encoder for several heads: who speaks, and what.

    python -m speechjax.main --config=configs/finetune/several.py --workdir=runs/voices --config.init_from=RUN \\
        --config.data.source=folder:/path/to/fsdd \\
        '--config.data.label=who=id:_(?P<label>[^_/]+)_[^/]*$ ; what=id:(?P<label>[0-9])_[^/]*$'

Every head is a task with a head (classify, speaker, frames, regress, ctc), named in config.task.heads with its fields
and its weight in the loss; all share the encoder, which runs once, its masks, and `layers`.  Rate and length are ours.

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
    """Speakers by embeddings, and one class more: languages in the built-in corpus."""
    classify = dict(
        loss="softmax", label_smoothing=0.0, class_weights="none", projection=256, pooling="mean", pooling_hidden=128,
    )  # fmt: skip
    who = dict(
        loss="aam", margin=0.2, scale=30.0, embedding=256, tdnn=512, tdnn_top=1500, projection=256, pooling="mean",
        pooling_hidden=128,
    )  # fmt: skip
    return presets.experiment(
        task=dict(
            name="several",
            heads=dict(
                who=dict(task="speaker", weight=0.5, label="label_who", classes=0, **who),
                what=dict(task="classify", weight=1.0, label="label_what", classes=0, **classify),
            ),
            layers="weighted",
            **finetuning.masks(0.05, 0.05),
        ),
        model=finetuning.model(size),
        data=presets.data(crop_seconds=8.0, batch_seconds=480.0)
        | dict(row_multiple=8, min_seconds=0.1, label="who=meta:speaker ; what=meta:lang"),
        optim=finetuning.optim(1e-4, 20_000, clip_norm=1.0),
        train=presets.train(20_000),
        evals=finetuning.evals(
            who=finetuning.answers("verification", head="who") | dict(speaker="", trials="", group=""),
            what=finetuning.answers("classification", head="what") | dict(group=""),
        ),
    )


def smoke() -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["task"] = dict(
        heads=dict(who=dict(classes=64, embedding=8, projection=8), what=dict(classes=8, projection=8)),
        mask_prob=0.3,
        mask_span=2,
        channel_mask_span=4,
    )
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    return config

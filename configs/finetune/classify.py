"""Fine-tuning to classify utterances: keywords, intents, emotions, languages, accents, kinds of sound.

    python -m speechjax.main --config=configs/finetune/classify.py --workdir=runs/emotion --config.init_from=RUN \\
        --config.data.source=folder:/path/to/recordings '--config.data.label=id:_(?P<label>[a-z]+)\\.wav$'
    python -m speechjax.main --config=configs/finetune/classify.py:tags --workdir=runs/events --config.init_from=RUN \\
        --config.data.source=manifest:/path/to/manifest.jsonl --config.data.label=tags:events

The head is that of SUPERB's utterance tasks (Yang et al. 2021, https://arxiv.org/abs/2105.01051, and its published
code): a learned average of all layers, a linear layer of 256 units, the mean over frames, a linear layer.  Rate and
length are ours.  Rare classes count more with config.task.class_weights=balanced.

tags    any number of classes an utterance, not one.
size=   base (default), large or tiny: of a model from scratch; tiny is also a recipe for a CPU, of any checkpoint.
trains= all, head (as SUPERB does), top4, gradual, bitfit, lora, ... (speechjax/finetuning.py)

Arguments after the colon: tags, size, trains, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import finetuning, presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, tags=False, size=("", "base", "large", "tiny"), trains="all", smoke=False)
    args["size"] = args["size"] or "tiny" * args["smoke"]
    config = ConfigDict(base(args["size"]))
    if args["size"] == "tiny":
        config.update(finetuning.tiny_clips())
    if args["tags"]:
        config.update(dict(task=dict(loss="sigmoid"), data=dict(label="tags:tags")))
        config.update(dict(train=dict(best_metric="valid/loss", best_mode="min")))  # most tags are absent anyway
    config.update(finetuning.trains(args["trains"], args["size"]))
    if args["smoke"]:
        config.update(smoke())
    return config


def base(size: str) -> dict:
    """Languages of the built-in corpus, unless told otherwise; the data says how many classes there are."""
    return presets.experiment(
        task=dict(
            name="classify",
            classes=0,
            label="label",
            loss="softmax",
            label_smoothing=0.0,
            class_weights="none",
            projection=256,
            pooling="mean",
            pooling_hidden=128,
            layers="weighted",
            **finetuning.masks(0.05, 0.05),
        ),
        model=finetuning.model(size),
        data=presets.data(crop_seconds=15.0, batch_seconds=480.0)
        | dict(row_multiple=8, min_seconds=0.1, label="meta:lang"),
        optim=finetuning.optim(1e-4, 20_000, clip_norm=1.0),
        train=presets.train(20_000, best_metric="valid/accuracy", best_mode="max"),
        evals=finetuning.evals(answers=finetuning.answers("classification") | dict(group="")),
    )


def smoke() -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["task"] = dict(classes=64, projection=16, pooling_hidden=8, mask_prob=0.3, mask_span=2, channel_mask_span=4)
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    return config

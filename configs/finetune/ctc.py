"""Fine-tuning for recognition by connectionist temporal classification (wav2vec 2.0, arXiv 2006.11477, section 4.3).

    python -m speechjax.main --config=configs/finetune/ctc.py:labels=10h --workdir=runs/asr --config.init_from=RUN \\
        --config.data.source=manifest:/path/to/train.jsonl
    python -m speechjax.main --config=configs/finetune/ctc.py:size=tiny,trains=lora --workdir=runs/asr_lora \\
        --config.init_from=RUN --config.data.source=... --config.data.text=phonemes:de
    python -m speechjax.evaluate --workdir=runs/asr --evals=recognition --config.data.valid=. \\
        --config.data.source=manifest:/path/to/test.jsonl

Without init_from the model learns from scratch.  config.data.text says what is recognised: characters,
sentencepiece:500, phonemes:VOICE, bytes.

labels=10m, 1h, 10h, 100h, 960h   updates, rates and masks published for so much of LibriSpeech: batches of 1600 s, the
        front end's convolutions never trained, the transformer fixed for the first 10,000 updates (Base: not with 100
        and 960 h).  Word error of Base on test-clean/other with a 4-gram model: 9.1/15.6 (10 min), 5.5/11.3 (1 h),
        4.3/9.5 (10 h), 3.4/8.0 (100 h), 2.6/6.1 % (960 h).
recipe= of which encoder: base or large of wav2vec 2.0 (by default as size says), or hubert: that of its Base for 10 h,
        in batches of 200 s, the only one published.
size=   base (default), large or tiny: of a model from scratch; tiny is also a recipe of ours, for a
        CPU and any checkpoint.
trains= all, head, top4, gradual, discriminative, bitfit, lora, houlsby, parallel, prefix, ia3 (speechjax/finetuning.py)

Arguments after the colon: labels, recipe, size, trains, and smoke (two steps of a miniature, for tests).
"""

from typing import Any

from ml_collections import ConfigDict

from speechjax import finetuning, presets
from speechjax.config import parse_arg
from speechjax.errors import UserError

# Updates, rate, mask probability, that of channels, layer drop, updates before the transformer trains: table 6 of the
# paper and the published code, the latter where they differ.
RECIPES = {
    "base": {
        "10m": (13_000, 5e-5, 0.65, 0.25, 0.1, 10_000),
        "1h": (13_000, 5e-5, 0.65, 0.25, 0.1, 10_000),
        "10h": (20_000, 5e-5, 0.65, 0.5, 0.05, 10_000),
        "100h": (80_000, 3e-5, 0.65, 0.5, 0.1, 0),
        "960h": (320_000, 1e-4, 0.5, 0.1, 0.1, 0),
    },
    "large": {
        "10m": (13_000, 1e-4, 0.65, 0.25, 0.1, 10_000),
        "1h": (13_000, 3e-4, 0.75, 0.25, 0.1, 10_000),
        "10h": (20_000, 1e-4, 0.75, 0.25, 0.1, 10_000),
        "100h": (80_000, 3e-5, 0.5, 0.5, 0.1, 10_000),
        "960h": (320_000, 3e-5, 0.5, 0.25, 0.1, 10_000),
    },
    "hubert": {"10h": (25_000, 2e-5, 0.75, 0.5, 0.1, 10_000)},
}


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(
        arg, labels=tuple(RECIPES["base"]), recipe=("", *RECIPES), size=("", "base", "large", "tiny"), trains="all",
        smoke=False,
    )  # fmt: skip
    args["size"] = args["size"] or "tiny" * args["smoke"]
    recipe = args["recipe"] or ("large" if args["size"] == "large" else "base")
    if args["labels"] not in RECIPES[recipe]:
        raise UserError(f"recipe={recipe}: published for labels={', '.join(RECIPES[recipe])}, not {args['labels']}")
    config: Any = ConfigDict(base(recipe, args["labels"], args["size"]))
    if args["size"] == "tiny":
        config.update(tiny())
    config.update(finetuning.trains(args["trains"], args["size"]))
    if args["trains"] == "all" and args["size"] != "tiny" and (wait := RECIPES[recipe][args["labels"]][5]):
        config.optim.freeze = (*config.optim.freeze, ("^encoder/", 0, wait))
    if args["smoke"]:
        config.update(smoke())
    return config


def base(recipe: str, labels: str, size: str) -> dict:
    """The published recipe for so much of LibriSpeech."""
    steps, rate, mask, channels, layerdrop, _ = RECIPES[recipe][labels]
    model = finetuning.model(size)
    model |= dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.1, input_dropout=0.0, layerdrop=layerdrop)
    optim, seconds = finetuning.optim(rate, steps), 1600.0
    if recipe == "large" and labels == "960h":
        seconds = 1920.0
    if recipe == "hubert":
        # Up for 8,000 updates, then down to 5 % within 72,000, of which the run has 17,000.
        optim |= dict(warmup=8000, hold=0, floor=0.05 ** (17 / 72))
        seconds = 200.0
    return presets.experiment(
        task=dict(
            name="ctc", classes=0, layers="last", recurrent_layers=0, recurrent_width=0,
            **finetuning.masks(mask, channels),
        ),
        model=model,
        data=presets.data(crop_seconds=30.0, batch_seconds=seconds)
        | dict(row_multiple=8, min_seconds=0.1, text="characters", text_steps=finetuning.SPOKEN),
        optim=optim,
        train=presets.train(steps, best_metric="valid/error_rate"),
        evals=finetuning.evals(recognition=finetuning.recognition()),
    )  # fmt: skip


def tiny() -> dict:
    """Ours: 2,000 updates of 32 s; spans of 100 ms and of 16 channels are hidden."""
    return finetuning.tiny() | dict(
        task=dict(mask_prob=0.3, mask_span=5, channel_mask_prob=0.25, channel_mask_span=16),
        model=dict(activation_dropout=0.0, dropout=0.1, layerdrop=0.0),
    )


def smoke() -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["task"] = dict(mask_prob=0.3, mask_span=2, channel_mask_prob=0.25, channel_mask_span=4)
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    config["data"] |= dict(crop_seconds=15.0)
    return config

"""A language model of transcripts, to weigh by it what a recogniser hears (shallow fusion).  The recipe is ours.

    python -m speechjax.main --config=configs/finetune/language_model.py:size=tiny --workdir=runs/lm \\
        --config.data.source=manifest:/path/to/train.jsonl --config.data.text=characters

It predicts the next token from all before it, with the Transformer of Vaswani et al. 2017.  config.data.text must make
the vocabulary of the recogniser, which needs the same texts.  The audio of the batches is read and not used, and the
encoder of config.model has no parameters; only recordings with a transcript count, so crop_seconds must hold most.
config.init_from does not apply: there is nothing to begin with.

size=base  12 layers of 512, 38 M parameters.
size=tiny  for a CPU.

Arguments after the colon: size, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import finetuning, presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("base", "tiny"), smoke=False)
    config = ConfigDict(base())
    if args["size"] == "tiny":
        config.update(tiny())
    if args["smoke"]:
        config.update(smoke())
    return config


def base() -> dict:
    """50,000 updates with the transcripts of 1600 s."""
    return presets.experiment(
        task=dict(
            name="language_model", classes=0,
            decoder=dict(
                width=512, layers=12, heads=8, mlp=2048, norm="pre", tied=True, dropout=0.1, attention_dropout=0.1
            ),
        ),
        model=presets.waveform("base"),
        data=presets.data(crop_seconds=30.0, batch_seconds=1600.0)
        | dict(row_multiple=8, min_seconds=0.1, text="characters", text_steps=finetuning.SPOKEN),
        optim=presets.optim(5e-4, warmup=4000, clip_norm=1.0),
        train=presets.train(50_000),
        evals=finetuning.evals(),
    )  # fmt: skip


def tiny() -> dict:
    """2,000 updates with the transcripts of 32 s."""
    decoder = dict(width=128, layers=2, heads=4, mlp=512, attention_dropout=0.0)
    config = finetuning.tiny() | dict(task=dict(decoder=decoder), model=presets.waveform("tiny"))
    config["optim"] = presets.optim(1e-3, warmup=200, clip_norm=1.0)
    return config


def smoke() -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["task"] = dict(classes=256, decoder=dict(width=32, layers=1, heads=2, mlp=64))
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    config["data"] |= dict(crop_seconds=15.0)
    return config

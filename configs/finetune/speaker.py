"""Fine-tuning for speaker verification: embeddings learnt by telling many speakers apart.

    python -m speechjax.main --config=configs/finetune/speaker.py --workdir=runs/asv --config.init_from=RUN \\
        --config.data.source=folder:/path/to/voxceleb1/wav '--config.data.label=id:^(?P<label>[^/]+)/'

The head is SUPERB's (Yang et al. 2021, https://arxiv.org/abs/2105.01051): an x-vector network (Snyder et al. 2018) on a
learned average of all layers, after a linear layer of 512 units.  The loss is that of ArcFace (Deng et al. 2019,
https://arxiv.org/abs/1801.07698) with the margin and scale usual for voices, 0.2 and 30; SUPERB's is
config.task.loss=am with config.task.margin=0.4.  Rate and length are ours.  In evaluation, speakers are others.

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
        config.update(tiny())
    config.update(finetuning.trains(args["trains"], args["size"]))
    if args["smoke"]:
        config.update(smoke())
    return config


def base(size: str) -> dict:
    """Crops of 4 s; the data says how many speakers there are."""
    return presets.experiment(
        task=dict(
            name="speaker",
            classes=0,
            label="label",
            loss="aam",
            margin=0.2,
            scale=30.0,
            embedding=512,
            tdnn=512,
            tdnn_top=1500,
            projection=512,
            pooling="xvector",
            pooling_hidden=128,
            layers="weighted",
            **finetuning.masks(),
        ),
        model=finetuning.model(size),
        data=presets.data(crop_seconds=4.0, batch_seconds=512.0)
        | dict(row_multiple=8, min_seconds=1.0, label="meta:speaker"),
        optim=finetuning.optim(1e-4, 20_000, clip_norm=1.0),
        train=presets.train(20_000, best_metric="valid/accuracy", best_mode="max"),
        evals=finetuning.evals(answers=finetuning.answers("verification") | dict(speaker="", trials="", group="")),
    )


def tiny() -> dict:
    """For a CPU: 2,000 updates of 32 s in rows of 2 s, a smaller network."""
    config = finetuning.tiny()
    config["task"] = dict(embedding=128, tdnn=64, tdnn_top=128, projection=64)
    config["data"] |= dict(crop_seconds=2.0, shapes=1, row_multiple=4)
    return config


def smoke() -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["task"] = dict(classes=64, embedding=8, tdnn=8, tdnn_top=8, projection=8, mask_prob=0.3, mask_span=2)
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    return config

"""SUPERB, intent classification (IC): what to do, with what, and where (Yang et al. 2021, arXiv 2105.01051).

    python -m speechjax.main --config=configs/superb/ic.py --workdir=runs/ic --config.init_from=RUN \\
        '--config.data.source=manifest:/data/fsc/train_data.csv + manifest:/data/fsc/valid_data.csv'
    python -m speechjax.sweep --config=configs/superb/ic.py --out=runs/superb/ic --config.init_from=RUN \\
        --set optim.learning_rate=1e-1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7 '--config.data.source=...'
    python -m speechjax.evaluate --workdir=runs/ic --evals=test --config.data.valid=. \\
        --config.data.source=manifest:/data/fsc/test_data.csv

The share of the test set of which all three are right (table 2), %: 92.4 of wav2vec 2.0 Base, 98.3 of HuBERT Base,
98.8 of HuBERT Large.  TensorFlow Datasets has no Fluent Speech Commands: get it, and copy the tables of its folder data
beside its folder wavs, from where their paths begin.

Unlike there: each of the three heads has a linear layer of its own before the mean.

size= base, large or tiny: of a model from scratch; tiny is also a recipe for a CPU. own: your recordings, source and
label; a part is held out by itself. Arguments after the colon: size, own, and smoke (two steps of a miniature, for
tests).
"""

from ml_collections import ConfigDict

from speechjax import superb

SWEEP = superb.SWEEP
HEADS = ("action", "object", "location")
FOLDER = "manifest:/path/to/fluent_speech_commands_dataset"


def get_config(arg: str = "") -> ConfigDict:
    heads = {
        name: dict(task="classify", weight=1.0, label=f"label_{name}", classes=0) | superb.utterances()
        for name in HEADS
    }  # fmt: skip
    miniature = {name: dict(classes=8, projection=16) for name in HEADS}
    return superb.make(
        arg,
        task=dict(name="several", heads=heads),
        data=dict(
            source=f"{FOLDER}/train_data.csv + {FOLDER}/valid_data.csv", valid="^1:",  # of the second part
            label=labels({name: name for name in HEADS}), crop_seconds=15.0, batch_seconds=75.0,
        ),
        rate=1e-4, steps=200_000, every=4000,
        judge=superb.classification(head=",".join(HEADS)), best="accuracy", mode="max",
        small=dict(data=dict(crop_seconds=4.0)),
        smoke=dict(task=dict(heads=miniature), data=dict(label=labels(dict.fromkeys(HEADS, "lang")))),
    )  # fmt: skip


def labels(fields: dict[str, str]) -> str:
    """config.data.label of {head: field of the metadata}."""
    return " ; ".join(f"{head}=meta:{field}" for head, field in fields.items())

"""SUPERB, automatic speaker verification (ASV): is it the same voice? (Yang et al. 2021, arXiv 2105.01051)

    python -m speechjax.main --config=configs/superb/asv.py --workdir=runs/asv --config.init_from=RUN \\
        --config.data.source=folder:/data/VoxCeleb1/dev/wav
    python -m speechjax.sweep --config=configs/superb/asv.py --out=runs/superb/asv --config.init_from=RUN \\
        --set optim.learning_rate=1e-1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7 --config.data.source=...
    python -m speechjax.evaluate --workdir=runs/asv --evals=test --evals.test.trials=/data/VoxCeleb1/veri_test2.txt \\
        --config.data.source=folder:/data/VoxCeleb1/test/wav --config.data.valid=. --config.data.crop_seconds=30

Equal error rate on the cleaned trials of the test set (table 2), %: 6.02 of wav2vec 2.0 Base, 5.11 of HuBERT Base, 5.98
of HuBERT Large.  Trials name files, so the data is a folder; TensorFlow Datasets' voxceleb has no names.  In training
all pairs of some recordings of the speakers trained on are tried, which is easier.

The head is an x-vector network without batch norm, after a linear layer of 512 units, and the AM softmax with a margin
of 0.4 and a scale of 30; batches of 50 crops of 8 s, utterances of 2 s at least.  Unlike there: one layer of 512 above
the statistics, not two of which the second is left out of the test, and no rectifier on it; recordings above 30 s are
tested in parts.

size= base, large or tiny: of a model from scratch; tiny is also a recipe for a CPU. own: your recordings, source and
label; a part is held out by itself. Arguments after the colon: size, own, and smoke (two steps of a miniature, for
tests).
"""

from ml_collections import ConfigDict

from speechjax import superb

SWEEP = superb.SWEEP


def get_config(arg: str = "") -> ConfigDict:
    return superb.make(
        arg,
        task=dict(
            name="speaker", classes=0, label="label", loss="am", margin=0.4, scale=30.0, embedding=512, tdnn=512,
            tdnn_top=1500, projection=512, pooling="xvector", pooling_hidden=128,
        ),
        data=dict(
            source="folder:/path/to/VoxCeleb1/dev/wav", label="id:^(?P<label>[^/]+)/", crop_seconds=8.0,
            batch_seconds=400.0, min_seconds=2.0,
        ),
        rate=1e-4, steps=200_000, every=10_000, clip=1000.0, decay=0.01,
        judge=dict(name="verification", head="", speaker="", trials="", group=""), best="eer", mode="min",
        small=dict(
            task=dict(embedding=128, tdnn=64, tdnn_top=128, projection=64),
            data=dict(crop_seconds=2.0, shapes=1, min_seconds=0.5),
        ),
        smoke=dict(
            task=dict(classes=8, embedding=8, tdnn=8, tdnn_top=8, projection=8), data=dict(label="meta:lang"),
        ),
    )  # fmt: skip

"""SUPERB, speaker identification (SID): which of the speakers of VoxCeleb1 (Yang et al. 2021, arXiv 2105.01051).

    python -m speechjax.main --config=configs/superb/sid.py --workdir=runs/sid --config.init_from=RUN
    python -m speechjax.sweep --config=configs/superb/sid.py --out=runs/superb/sid --config.init_from=RUN \\
        --set optim.learning_rate=1e-1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7
    python -m speechjax.evaluate --workdir=runs/sid --evals=test --config.data.valid=. \\
        --config.data.source=tfds:voxceleb:test --config.data.crop_seconds=30

Accuracy on the test set (table 2), %: 75.2 of wav2vec 2.0 Base, 81.4 of HuBERT Base, 90.3 of HuBERT Large.  The data is
TensorFlow Datasets' voxceleb, to be prepared before from vox_dev_wav.zip, which needs a registration, and has 1,211 of
the 1,251 speakers.  All of them: --config.data.source=folder:..., with config.data.valid a regex or a list of ids
(@FILE) and '--config.data.label=id:(?P<label>id[0-9]+)/'.

Unlike there, recordings above 30 s are tested in parts.

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
        task=dict(name="classify", classes=0, label="label") | superb.utterances(),
        data=dict(
            source="tfds:voxceleb:train + tfds:voxceleb:validation", valid="validation/", label="meta:label",
            crop_seconds=8.0, batch_seconds=256.0,
        ),
        rate=1e-4, steps=200_000, every=4000,
        judge=superb.classification(), best="accuracy", mode="max",
        small=dict(data=dict(crop_seconds=4.0)),
        smoke=dict(task=dict(classes=8, projection=16), data=dict(label="meta:lang")),
    )  # fmt: skip

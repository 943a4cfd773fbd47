"""SUPERB, keyword spotting (KS): ten words, anything else, or silence (Yang et al. 2021, arXiv 2105.01051).

    python -m speechjax.main --config=configs/superb/ks.py --workdir=runs/ks --config.init_from=RUN
    python -m speechjax.sweep --config=configs/superb/ks.py --out=runs/superb/ks --config.init_from=RUN \\
        --set optim.learning_rate=1e-1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7
    python -m speechjax.evaluate --workdir=runs/ks --evals=test --config.data.valid=. \\
        --config.data.source=tfds:speech_commands:test
    python -m speechjax.main --config=configs/superb/ks.py:own,size=tiny --workdir=runs/digits --config.init_from=RUN \\
        --config.data.source=folder:/path/to/fsdd '--config.data.label=id:^(?P<label>[0-9])_'

Accuracy on the test set (table 2), %: 96.2 of wav2vec 2.0 Base, 96.3 of HuBERT Base, 95.3 of HuBERT Large.  The data
is TensorFlow Datasets' speech_commands, to be prepared before.

Unlike there: the recordings are those of version 2 of the set, of which TFDS has the 12 classes; classes are evened out
in the loss and not by drawing, which is the same on average; each recording is as loud as it is.

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
        task=dict(name="classify", classes=0, label="label") | superb.utterances(class_weights="balanced"),
        data=dict(
            source="tfds:speech_commands:train + tfds:speech_commands:validation", valid="validation/",
            label="meta:label", crop_seconds=1.0, batch_seconds=32.0, shapes=1,
        ),
        rate=1e-4, steps=200_000, every=4000,
        judge=superb.classification(), best="accuracy", mode="max",
        small=dict(data=dict(shapes=1)),
        smoke=dict(task=dict(classes=8, projection=16), data=dict(label="meta:lang")),
    )  # fmt: skip

"""SUPERB, emotion recognition (ER): neutral, happy, sad or angry (Yang et al. 2021, arXiv 2105.01051).

    python -m speechjax.sweep --config=configs/superb/er.py --out=runs/superb/er --config.init_from=RUN \\
        --config.data.source=manifest:/data/iemocap.jsonl --folds=meta:session \\
        --set optim.learning_rate=1e-1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7

Accuracy, the mean of five folds, each a session held out (table 2), %: 63.4 of wav2vec 2.0 Base, 64.9 of HuBERT Base,
67.6 of HuBERT Large.  TensorFlow Datasets has no IEMOCAP: get it, and write a manifest with a line an utterance,
{"audio_filepath": "a.wav", "emotion": "sad", "session": 1}; excited counts as happy, other emotions are left out.

Unlike there, the best update is that of the held-out session itself; there a fifth of the other four says which it is.
The last evaluation of a run has not been chosen.

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
            source="manifest:/path/to/iemocap.jsonl", label="meta:emotion", crop_seconds=30.0, batch_seconds=144.0,
        ),
        rate=1e-4, steps=30_000, every=1000,
        judge=superb.classification(), best="accuracy", mode="max",
        small=dict(data=dict(crop_seconds=4.0)),
        smoke=dict(task=dict(classes=8, projection=16), data=dict(label="meta:lang")),
    )  # fmt: skip

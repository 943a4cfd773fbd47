"""SUPERB, speaker diarisation (SD): who of two is on (Yang et al. 2021, arXiv 2105.01051).

    python -m speechjax.main --config=configs/superb/sd.py --workdir=runs/sd --config.init_from=RUN \\
        '--config.data.source=manifest:/data/libri2mix/train.jsonl + manifest:/data/libri2mix/dev.jsonl'
    python -m speechjax.sweep --config=configs/superb/sd.py --out=runs/superb/sd --config.init_from=RUN \\
        --set optim.learning_rate=1e-1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7 '--config.data.source=...'
    python -m speechjax.evaluate --workdir=runs/sd --evals=test --evals.test.median=11 --config.data.valid=. \\
        --config.data.source=manifest:/data/libri2mix/test.jsonl

Diarisation error rate on Libri2Mix (table 2), %: 6.08 of wav2vec 2.0 Base, 5.88 of HuBERT Base, 5.75 of HuBERT Large,
the lowest of medians over 1 or 11 frames and thresholds of 0.3 to 0.7.  TensorFlow Datasets has no LibriMix: make it,
and write manifests with "turns": [["a", 0.0, 2.5], ["b", 1.2, 4.0]] a recording.

Unlike there: the head is linear, without the LSTM layer of 512 units before it.

size= base, large or tiny: of a model from scratch; tiny is also a recipe for a CPU. own: your recordings and source; a
part is held out by itself. Arguments after the colon: size, own, and smoke (two steps of a miniature, for tests; one
speaker).
"""

from ml_collections import ConfigDict

from speechjax import superb

SWEEP = superb.SWEEP
FOLDER = "manifest:/path/to/libri2mix"


def get_config(arg: str = "") -> ConfigDict:
    return superb.make(
        arg,
        task=dict(name="frames", classes=0, unit_hop=160, loss="turns"),
        data=dict(
            source=f"{FOLDER}/train.jsonl + {FOLDER}/dev.jsonl", valid="^1:", units="turns:2", crop_seconds=20.0,
            batch_seconds=440.0,
        ),
        rate=1e-4, steps=30_000, every=500,
        judge=dict(name="frame_labels", head="", group="", threshold=0.5, median=1, collar=0.0),
        best="der", mode="min",
        small=dict(data=dict(crop_seconds=8.0)),
        smoke=dict(task=dict(classes=2), data=dict(units="speech")),
    )  # fmt: skip

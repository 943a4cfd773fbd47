"""SUPERB, phoneme recognition (PR) on 100 h of LibriSpeech (Yang et al. 2021, arXiv 2105.01051).

    python -m speechjax.main --config=configs/superb/pr.py --workdir=runs/pr --config.init_from=RUN
    python -m speechjax.sweep --config=configs/superb/pr.py --out=runs/superb/pr --config.init_from=RUN \\
        --set optim.learning_rate=1e-1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7
    python -m speechjax.evaluate --workdir=runs/pr --evals=test --config.data.valid=. \\
        --config.data.source=tfds:librispeech:test_clean
    python -m speechjax.main --config=configs/superb/pr.py:own,size=tiny --workdir=runs/pr_de --config.init_from=RUN \\
        --config.data.source=manifest:/path/to/train.jsonl --config.data.text=phonemes:de

Phone error rate on test-clean (table 2), %: 5.74 of wav2vec 2.0 Base, 5.41 of HuBERT Base, 3.53 of HuBERT Large.  The
data is TensorFlow Datasets' librispeech, to be prepared before.

Unlike there: phones are those that eSpeak NG speaks, not those of a lexicon, so the numbers do not compare; the linear
layer of 256 units before the classes is left out, for two linear layers are one.

size= base, large or tiny: of a model from scratch; tiny is also a recipe for a CPU. own: your recordings, source and
text; a part is held out by itself. Arguments after the colon: size, own, and smoke (two steps of a miniature, for
tests).
"""

from ml_collections import ConfigDict

from speechjax import finetuning, superb

SWEEP = superb.SWEEP


def get_config(arg: str = "") -> ConfigDict:
    return superb.make(
        arg,
        task=dict(name="ctc", classes=0, recurrent_layers=0, recurrent_width=0),
        data=dict(
            source="tfds:librispeech:train_clean100 + tfds:librispeech:dev_clean", valid="dev_clean/",
            text="phonemes:en-us", text_steps=finetuning.SPOKEN, crop_seconds=35.0, batch_seconds=400.0,
        ),
        rate=1e-2, steps=100_000, every=1000,
        judge=finetuning.recognition(), best="phone_error", mode="min",
        small=dict(data=dict(crop_seconds=15.0)),
        smoke=dict(data=dict(crop_seconds=15.0)),
    )  # fmt: skip

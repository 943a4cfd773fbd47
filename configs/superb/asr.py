"""SUPERB, speech recognition (ASR) on 100 h of LibriSpeech (Yang et al. 2021, arXiv 2105.01051).

    python -m speechjax.main --config=configs/superb/asr.py --workdir=runs/asr --config.init_from=RUN
    python -m speechjax.sweep --config=configs/superb/asr.py --out=runs/superb/asr --config.init_from=RUN \\
        --set optim.learning_rate=1e-1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7
    python -m speechjax.evaluate --workdir=runs/asr --evals=test --config.data.valid=. \\
        --config.data.source=tfds:librispeech:test_clean

Word error rate on test-clean without a language model (table 2), %: 6.43 of wav2vec 2.0 Base, 6.42 of HuBERT Base, 3.62
of HuBERT Large; with the 4-gram of LibriSpeech 4.79, 4.79 and 2.94 (--evals.test.search=beam, --evals.test.lm,
--evals.test.lexicon).  The data is TensorFlow Datasets' librispeech, to be prepared before.

The head is two bidirectional LSTM layers of 1024 a direction.  Unlike there: they read the average of the layers
without a linear layer of 1024 units before; dropout of 0.2 is on what they read too; no spectrogram augmentation of the
average.

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
        task=dict(name="ctc", classes=0, recurrent_layers=2, recurrent_width=1024, head_dropout=0.2),
        data=dict(
            source="tfds:librispeech:train_clean100 + tfds:librispeech:dev_clean", valid="dev_clean/",
            text="characters", text_steps=finetuning.SPOKEN, crop_seconds=35.0, batch_seconds=400.0,
        ),
        rate=1e-4, steps=200_000, every=2000,
        judge=finetuning.recognition(), best="word_error", mode="min",
        small=dict(task=dict(recurrent_width=128), data=dict(crop_seconds=15.0)),
        smoke=dict(task=dict(recurrent_width=16), data=dict(crop_seconds=15.0)),
    )  # fmt: skip

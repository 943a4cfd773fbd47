"""Fine-tuning an encoder-decoder for recognition or translation: attention, jointly with CTC.

    python -m speechjax.main --config=configs/finetune/seq2seq.py --workdir=runs/asr --config.init_from=RUN \\
        --config.data.source=manifest:/path/to/train.jsonl --config.data.text=sentencepiece:5000
    python -m speechjax.main --config=configs/finetune/seq2seq.py:translation --workdir=runs/translation \\
        --config.init_from=RUN --config.data.source=manifest:/path/to/train.jsonl --config.data.text_field=translation

The decoder, its label smoothing and the weight of CTC are those of ESPnet's Transformer for LibriSpeech (Karita et al.
2019, https://arxiv.org/abs/1909.06317, and its published recipe: 6 layers of 512, 8 heads, 2048 units, dropout 0.1,
smoothing 0.1, CTC 0.3).  Its 5,000 pieces are data.text=sentencepiece:5000, for which the extra `text` must be
installed.  Over a pretrained encoder nothing is published that this repeats: rate and length are ours.

translation  of what is said: no CTC, for the order of words is another, case and punctuation kept.
             config.data.text_field names the field of the metadata with the text.
size=        base (default), large or tiny: of a model from scratch; tiny is also a recipe for a CPU, of any checkpoint.
trains=      all, head, top4, gradual, bitfit, lora, ... (speechjax/finetuning.py)

Arguments after the colon: translation, size, trains, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import finetuning, presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, translation=False, size=("", "base", "large", "tiny"), trains="all", smoke=False)
    args["size"] = args["size"] or "tiny" * args["smoke"]
    config = ConfigDict(base(args["size"]))
    if args["size"] == "tiny":
        config.update(tiny())
    if args["translation"]:
        config.update(dict(task=dict(ctc_weight=0.0), data=dict(text_steps="nfc single_spaces")))
    config.update(finetuning.trains(args["trains"]))
    if args["smoke"]:
        config.update(smoke())
    return config


def base(size: str) -> dict:
    """Characters, unless told otherwise; 50,000 updates of 1600 s."""
    return presets.experiment(
        task=dict(
            name="seq2seq", classes=0, layers="last", label_smoothing=0.1, ctc_weight=0.3,
            decoder=dict(
                width=512, layers=6, heads=8, mlp=2048, norm="pre", tied=False, dropout=0.1, attention_dropout=0.1
            ),
            **finetuning.masks(0.5, 0.1),
        ),
        model=finetuning.model(size),
        data=presets.data(crop_seconds=30.0, batch_seconds=1600.0)
        | dict(row_multiple=8, min_seconds=0.1, text="characters", text_steps=finetuning.SPOKEN),
        optim=finetuning.optim(1e-4, 50_000, clip_norm=5.0),
        train=presets.train(50_000, best_metric="valid/cross_entropy"),
        evals=finetuning.evals(recognition=finetuning.recognition()),
    )  # fmt: skip


def tiny() -> dict:
    """Ours: 2,000 updates of 32 s; spans of 100 ms and of 16 channels are hidden."""
    decoder = dict(width=128, layers=2, heads=4, mlp=512, attention_dropout=0.0)
    masks = dict(mask_prob=0.3, mask_span=5, channel_mask_prob=0.1, channel_mask_span=16)
    return finetuning.tiny() | dict(task=dict(decoder=decoder, **masks))


def smoke() -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["task"] = dict(
        classes=256, decoder=dict(width=32, layers=1, heads=2, mlp=64), mask_prob=0.3, mask_span=2,
        channel_mask_prob=0.25, channel_mask_span=4,
    )  # fmt: skip
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    config["data"] |= dict(crop_seconds=15.0)
    return config

"""Fine-tuning for recognition by a transducer: RNN-T (Graves 2012, arXiv 1211.3711) or with durations, TDT.

    python -m speechjax.main --config=configs/finetune/transducer.py --workdir=runs/rnnt --config.init_from=RUN \\
        --config.data.source=manifest:/path/to/train.jsonl
    python -m speechjax.main --config=configs/finetune/transducer.py:kind=tdt,size=tiny --workdir=runs/tdt

Without init_from the model learns from scratch.  The recipe is ours, on published parts:

kind=rnnt   a predictor that knows the last two tokens (icefall's form of Ghodsi et al. 2020, "RNN-transducer with
            stateless prediction network", ICASSP), 512 wide, as is the joiner; FastEmit is off.
kind=tdt    durations of 0 to 4 frames and logit under-normalization of 0.05 (Xu et al. 2023, arXiv 2304.06795).
            Greedy decoding only, which looks at fewer frames.

An auxiliary CTC loss (weight 0.3) helps the encoder before the transducer's alignments are any good.  Masks, schedule
and batches are those of wav2vec 2.0's fine-tuning with 100 h (arXiv 2006.11477); what is new learns ten times as fast.

predictor=  stateless, or lstm: one layer of 512.
size=       base (default), large or tiny: of a model from scratch; tiny is also a recipe for a CPU, of any checkpoint.
trains=     all, head, top4, lora, ... (speechjax/finetuning.py)

Arguments after the colon: kind, predictor, size, trains, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import finetuning, presets
from speechjax.config import parse_arg

STEPS = 80_000


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(
        arg, kind=("rnnt", "tdt"), predictor=("stateless", "lstm"), size=("", "base", "large", "tiny"), trains="all",
        smoke=False,
    )  # fmt: skip
    args["size"] = args["size"] or "tiny" * args["smoke"]
    config = ConfigDict(base(args["kind"], args["predictor"], args["size"]))
    if args["size"] == "tiny":
        config.update(tiny())
    config.update(finetuning.trains(args["trains"], args["size"]))
    if args["smoke"]:
        config.update(smoke())
    return config


def base(kind: str, predictor: str, size: str) -> dict:
    """Masks, rates and batches of wav2vec 2.0 Base with 100 h."""
    model = finetuning.model(size)
    model |= dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.1, input_dropout=0.0, layerdrop=0.1)
    return presets.experiment(
        task=dict(
            name="transducer",
            kind=kind,
            classes=0,
            durations=(0, 1, 2, 3, 4),
            predictor=predictor,
            predictor_width=512,
            predictor_depth=dict(stateless=2, lstm=1)[predictor],
            joint_width=512,
            chunk=8,  # 160 ms meet the whole text at one time
            sigma=dict(rnnt=0.0, tdt=0.05)[kind],
            fastemit=0.0,
            ctc_weight=0.3,
            layers="last",
            **finetuning.masks(0.65, 0.5),
        ),
        model=model,
        data=presets.data(crop_seconds=30.0, batch_seconds=1600.0)
        | dict(row_multiple=8, min_seconds=0.1, text="sentencepiece:500", text_steps=finetuning.SPOKEN),
        optim=finetuning.optim(3e-5, STEPS, rates=((r"^encoder/", 1.0), (".*", 10.0))),
        train=presets.train(STEPS),
        evals=finetuning.evals(recognition=finetuning.recognition()),
    )


def tiny() -> dict:
    """2,000 updates of 32 s of characters; spans of 100 ms and of 16 channels are hidden."""
    changes = finetuning.tiny()
    changes["data"] |= dict(text="characters")
    return changes | dict(
        task=dict(
            predictor_width=64, joint_width=64, mask_prob=0.3, mask_span=5, channel_mask_prob=0.25,
            channel_mask_span=16,
        ),
        model=dict(activation_dropout=0.0, dropout=0.1, layerdrop=0.0),
    )  # fmt: skip


def smoke() -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["task"] = dict(
        predictor_width=16, joint_width=16, mask_prob=0.3, mask_span=2, channel_mask_prob=0.25, channel_mask_span=4
    )
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    config["data"] |= dict(crop_seconds=15.0, text="characters")
    return config

"""HuBERT (Hsu et al. 2021, https://arxiv.org/abs/2106.07447): units first, then a model that predicts them; twice.

    python -m speechjax.label --source=folder:AUDIO --features=mfcc --clusters=100 --out=LABELS
    python -m speechjax.main --config=configs/pretrain/hubert.py:size=base,iteration=1 --workdir=RUN1 \
        --config.data.source=folder:AUDIO --config.data.units=labels:LABELS
    python -m speechjax.label --source=folder:AUDIO --features=RUN1 --layer=6 --clusters=500 --out=LABELS2
    python -m speechjax.main --config=configs/pretrain/hubert.py:size=base,iteration=2 --workdir=RUN2 \
        --config.data.source=folder:AUDIO --config.data.units=labels:LABELS2

The second model starts from scratch, not from the first.  Large and X-Large are third models: they learn 500 units of
layer 9 of the second.

size=base    on LibriSpeech 960 h: 250 k updates of 47 min of audio in the first iteration, 400 k in the second; then,
             fine-tuned on 100 h, 3.4/8.1 % word error on test-clean/other with a 4-gram model.
size=large   on Libri-Light 60 k h: 400 k updates of 2 h; 2.1/3.9 % under the same conditions, with a Transformer LM.
size=xlarge  400 k updates of 1.6 h; 1.9/3.5 %.
size=tiny    ours, for a CPU: Base's recipe at a hundredth of the work, 100 units in either iteration.

What labels can be worth: the phone-normalised mutual information of 100 MFCC units is 0.25, of 500 of layer 6 of the
first iteration 0.64 to 0.68, of 500 of layer 9 of the second 0.70.

Arguments after the colon: size, iteration (1 or 2, of base and tiny), and smoke (two steps of a miniature on the phones
of the built-in corpus, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg

FIRST = dict(codes=100, unit_hop=160)  # MFCC at 100 Hz
SECOND = dict(codes=500, unit_hop=320)  # a layer at 50 Hz


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("base", "large", "xlarge", "tiny"), iteration=("1", "2"), smoke=False)
    config = ConfigDict(base())
    if args["iteration"] == "2":
        config.update(dict(task=SECOND, optim=dict(warmup=32_000), train=dict(steps=400_000)))
    if args["size"] in ("large", "xlarge"):
        config.update(large())
    if args["size"] == "xlarge":
        config.update(xlarge())
    if args["size"] == "tiny":
        config.update(tiny())
    if args["smoke"]:
        config.update(smoke(args["size"]))
    return config


def base() -> dict:
    """LibriSpeech Base, first iteration; numbers of section IV and the published training configuration."""
    return presets.experiment(
        task=dict(
            name="hubert",
            **FIRST,
            projection=256,
            logit_temperature=0.1,
            mask_prob=0.80,
            mask_span=10,
            masked_weight=1.0,
            unmasked_weight=0.0,
            feature_penalty=10.0,
            feature_grad_scale=0.1,
        ),
        model=presets.waveform("base"),
        data=presets.data(batch_seconds=2800.0),  # 32 GPUs x 87.5 s; min_seconds is 2.0 as published
        optim=presets.optim(5e-4, warmup=20_000, clip_norm=10.0),
        train=presets.train(250_000, best_metric="valid/masked"),
    )


def large() -> dict:
    """Libri-Light Large: what differs from Base."""
    model = presets.waveform("large")
    model["frontend"]["bias"] = False  # wav2vec 2.0's Large has biases, HuBERT's has not
    return dict(
        task=SECOND | dict(projection=768, feature_grad_scale=1.0),
        model=model,
        data=dict(batch_seconds=7200.0, fill=True),  # 128 GPUs x 56.25 s
        optim=dict(learning_rate=1.5e-3, warmup=32_000, clip_norm=1.0),
        train=dict(steps=400_000),
    )


def xlarge() -> dict:
    """What differs from Large."""
    return dict(
        task=dict(projection=1024),
        model=presets.TRANSFORMERS["xlarge"],
        data=dict(batch_seconds=5760.0),  # 256 GPUs x 22.5 s
        optim=dict(learning_rate=3e-3),
    )


def tiny() -> dict:
    """0.9 M parameters, float32."""
    config = presets.tiny()
    config["task"] = presets.SHORT_MASKS | dict(codes=100, projection=128, feature_grad_scale=1.0, feature_penalty=0.0)
    config["model"] = presets.waveform("tiny")
    return config


def smoke(size: str) -> dict:
    """Two steps of a miniature with the same wiring, on phones in place of clusters."""
    config = presets.smoke(layers=dict(base=2, tiny=1).get(size, 3))
    config["task"] = dict(codes=256, unit_hop=160, projection=16)  # the built-in corpus has about 120 phones
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    config["data"]["units"] = "phones"
    return config

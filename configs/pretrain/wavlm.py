"""WavLM (Chen et al. 2021, https://arxiv.org/abs/2110.13900): HuBERT on mixed audio, with gated relative positions.

    python -m speechjax.main --config=configs/pretrain/wavlm.py:size=base --workdir=RUN \
        --config.data.source=folder:AUDIO --config.data.units=labels:LABELS

LABELS are 500 units of a trained HuBERT; how to make them is in configs/pretrain/hubert.py.  Base learns those of layer
6 of a first-iteration model, Base+ and Large those of layer 9 of a second-iteration one.

size=base       on LibriSpeech 960 h, 400 k updates.  SUPERB: 4.84 % phone error, 6.21 % word error, 84.5 % of speakers.
size=base_plus  on 94 k h (Libri-Light, GigaSpeech, VoxPopuli), 1 M updates, one mixture in ten with noise: 3.92 %,
                5.59 %, 89.4 %.
size=large      on the same, 700 k updates: 3.06 %, 3.44 %, 95.5 %.
size=tiny       ours, for a CPU: Base's recipe at a hundredth of the work, over 100 units.

What is not the paper's: noise is generated instead of recorded (base_plus, large), and batches and learning rates are
those of HuBERT's sizes, which this recipe was built on.

Arguments after the colon: size, and smoke (two steps of a miniature on the phones of the built-in corpus, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg

GATED_BUCKETS = dict(positions="buckets", gated=True, buckets=320, max_distance=800)


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("base", "base_plus", "large", "tiny"), smoke=False)
    config = ConfigDict(base())
    if args["size"] in ("base_plus", "large"):
        config.update(dict(task=dict(noise_prob=0.1), train=dict(steps=1_000_000)))
    if args["size"] == "large":
        config.update(large())
    if args["size"] == "tiny":
        config.update(tiny())
    if args["smoke"]:
        config.update(smoke(args["size"]))
    return config


def base() -> dict:
    """LibriSpeech Base: HuBERT Base's second iteration, mixing, and positions in the attention too."""
    return presets.experiment(
        task=dict(
            name="wavlm",
            codes=500,
            unit_hop=320,
            projection=256,
            logit_temperature=0.1,
            mask_prob=0.80,
            mask_span=10,
            masked_weight=1.0,
            unmasked_weight=0.0,
            feature_penalty=10.0,
            feature_grad_scale=0.1,
            mix_prob=0.2,
            noise_prob=0.0,
        ),
        model=presets.waveform("base") | dict(attention=GATED_BUCKETS),
        data=presets.data(batch_seconds=2800.0),
        optim=presets.optim(5e-4, warmup=32_000, clip_norm=10.0),
        train=presets.train(400_000, best_metric="valid/masked"),
    )


def large() -> dict:
    """What differs from Base+."""
    model = presets.waveform("large")
    model["frontend"]["bias"] = False
    return dict(
        task=dict(projection=768, feature_grad_scale=1.0),
        model=model,
        data=dict(batch_seconds=7200.0),
        optim=dict(learning_rate=1.5e-3, clip_norm=1.0),
        train=dict(steps=700_000),
    )


def tiny() -> dict:
    """HuBERT's `tiny`: 0.9 M parameters, float32."""
    config = presets.tiny()
    config["task"] = presets.SHORT_MASKS | dict(codes=100, projection=128, feature_grad_scale=1.0, feature_penalty=0.0)
    config["model"] = presets.waveform("tiny")
    return config


def smoke(size: str) -> dict:
    """Two steps of a miniature with the same wiring, on phones in place of clusters, every row mixed."""
    config = presets.smoke(layers=dict(base=2, base_plus=2, tiny=1).get(size, 3))
    config["task"] = dict(codes=256, unit_hop=160, projection=16, mix_prob=1.0)
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    config["data"]["units"] = "phones"
    return config

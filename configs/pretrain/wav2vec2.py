"""wav2vec 2.0 (Baevski et al. 2020, https://arxiv.org/abs/2006.11477).

    python -m speechjax.main --config=configs/pretrain/wav2vec2.py:size=tiny --workdir=runs/tiny \
        --config.data.source=folder:/path/to/recordings

size=base   the paper's Base on LibriSpeech: 400 k updates of 1.56 h of audio; then, fine-tuned on 100 h, 6.1/13.3 %
            word error on test-clean/other without a language model (appendix, table 9).
size=large  the paper's Large on LibriVox: 600 k updates of 2.67 h; 3.1/6.3 % under the same conditions.  No dropout, as
            the released code; the text says 0.1.
size=tiny   ours, for a CPU: Base's recipe at a hundredth of the size; what to expect is in BUILD_NOTES.md.

Arguments after the colon: size, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("base", "large", "tiny"), smoke=False)
    config = ConfigDict(base())
    if args["size"] == "large":
        config.update(large())
    if args["size"] == "tiny":
        config.update(tiny())
    if args["smoke"]:
        config.update(smoke(args["size"]))
    return config


def base() -> dict:
    """LibriSpeech Base; numbers of the paper's appendix and its published training configuration."""
    return presets.experiment(
        task=dict(
            name="wav2vec2",
            mask_prob=0.65,
            mask_span=10,
            negatives=100,
            logit_temperature=0.1,
            codebooks=2,
            codes=320,
            code_dim=256,
            projection=256,
            gumbel_start=2.0,
            gumbel_floor=0.5,
            gumbel_decay=0.999995,
            diversity=0.1,
            feature_penalty=10.0,
            feature_grad_scale=0.1,
            feature_dropout=0.1,
        ),
        model=presets.waveform("base"),
        data=presets.data(),  # 64 GPUs x 87.5 s, crops of 250,000 samples; Base's group norm rules out `fill`
        optim=presets.optim(5e-4, warmup=32_000),
        train=presets.train(400_000, best_metric="valid/contrastive"),
    )


def large() -> dict:
    """LibriVox (LV-60k) Large: what differs from Base."""
    return dict(
        task=dict(
            code_dim=768, projection=768, gumbel_floor=0.1, gumbel_decay=0.999995, feature_penalty=0.0,
            feature_grad_scale=1.0, feature_dropout=0.0,
        ),
        model=presets.waveform("large"),
        data=dict(crop_seconds=20.0, batch_seconds=9600.0, fill=True),  # 128 GPUs x 75 s
        optim=dict(learning_rate=3e-4, warmup=48_000),  # the paper's; the published yaml has 5e-3 for 1 M updates
        train=dict(steps=600_000),
    )  # fmt: skip


def tiny() -> dict:
    """0.9 M parameters, float32: some ten minutes on two CPU cores over a few hours of speech."""
    return presets.tiny() | dict(
        task=dict(
            codes=64,
            code_dim=128,
            projection=128,
            gumbel_decay=0.9993,
            feature_dropout=0.05,
            feature_grad_scale=1.0,
            feature_penalty=1.0,
        ),
        model=presets.waveform("tiny"),
    )


def smoke(size: str) -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke(layers=dict(base=2, large=3, tiny=1)[size])
    config["task"] = dict(negatives=10, codes=8, code_dim=16, projection=16)
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    return config

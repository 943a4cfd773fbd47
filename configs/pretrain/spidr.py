"""SpidR (2025, https://arxiv.org/abs/2512.20308) and its ancestor DinoSR (Liu et al. 2023, arXiv 2305.10005).

    python -m speechjax.main --config=configs/pretrain/spidr.py:size=tiny --workdir=runs/tiny \
        --config.data.source=folder:/path/to/recordings

size=base    SpidR as published, on LibriSpeech: 400 k updates of 63 min of audio, 23 h on 16 A100; then, with frozen
             features (SUPERB), 4.86 % phone and 7.47 % word error.
size=dinosr  DinoSR as published, 400 k updates of the same batches: 3.21 and 4.71 %.
size=tiny    ours, for a CPU: three layers on log-mel frames under a projection that is not trained.  In batches of 8 s
             a trained front end on waveforms becomes constant within 150 updates; alarm "front_end_collapse" says so.

What differs from the published SpidR: queries, keys and values have biases, and the student's last layer norm, which
no loss reaches, is decayed.

Arguments after the colon: size, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg

FROZEN = "^encoder/(front|feature_norm|projection)/"


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("base", "dinosr", "tiny"), smoke=False)
    config = ConfigDict(base())
    if args["size"] == "dinosr":
        config.update(dinosr())
    if args["size"] == "tiny":
        config.model = ConfigDict(tiny_encoder())
        config.update(tiny())
    if args["smoke"]:
        config.update(smoke(waveform=args["size"] != "tiny"))
    return config


def base() -> dict:
    """SpidR; numbers of its published training configuration."""
    return presets.experiment(
        task=dict(
            name="spidr", mask_prob=0.8, mask_span=10, codebooks=8, codes=256, code_decay=0.9, same_layer=True,
            ema_schedule="exponential", ema_start=0.999, ema_end=1.0, ema_steps=20_000, teacher_until=-1,
        ),
        model=encoder("base") | dict(layerdrop=0.0),
        data=presets.data(crop_seconds=20.0, batch_seconds=3800.0) | dict(min_seconds=0.125),  # 16 GPUs x 3.8 M samples
        optim=presets.optim(
            5e-4, 12_000, hold=188_000, decay="exponential", floor=0.01, b2=0.95, clip_norm=10.0,
            freeze=((FROZEN, 200_000, -1),),
        ),
        train=presets.train(400_000),
    )  # fmt: skip


def encoder(size: str) -> dict:
    """That of data2vec: layer norm in the front end, five narrow convolutions for the positions, post-LN."""
    model = presets.waveform(size)
    model["frontend"] |= dict(norm="layer", bias=False, normalize=True)
    return model | dict(norm="post", positions=dict(kernel=19, groups=16, depth=5), input_dropout=0.0)


def dinosr() -> dict:
    """What differs in DinoSR: all codes from the last layer, another average, which stops with the front end."""
    return dict(
        task=dict(
            same_layer=False, ema_schedule="linear", ema_end=0.9999, ema_steps=30_000, teacher_until=200_000,
        ),
        model=dict(layerdrop=0.05),
        data=dict(min_seconds=2.0),
        optim=dict(b2=0.98, clip_norm=0.0),
    )  # fmt: skip


def tiny() -> dict:
    """Log-mel frames, two codebooks; the average is as fast as 3,000 updates need."""
    blocks = presets.tiny(5e-4)
    blocks["optim"] |= dict(hold=1200, freeze=((FROZEN, 0, -1),))
    return blocks | dict(task=presets.SHORT_MASKS | dict(codebooks=2, codes=64, ema_start=0.99, ema_steps=500))


def tiny_encoder() -> dict:
    """Three layers in float32 on log-mel frames of 20 ms, with the positions of Base."""
    positions = dict(kernel=19, groups=16, depth=5)
    return presets.spectral("tiny") | dict(positions=positions, input_dropout=0.0, layerdrop=0.0)


def smoke(waveform: bool) -> dict:
    """Two steps of a miniature with the same wiring."""
    blocks = presets.smoke(layers=2)
    blocks["model"] |= dict(positions=dict(kernel=3, groups=4, depth=2))
    if waveform:
        blocks["model"] |= dict(frontend=dict(channels=(16,) * 7))
    return blocks | dict(task=dict(codebooks=2, codes=8))

"""data2vec (Baevski et al. 2022, https://arxiv.org/abs/2202.03555) and data2vec 2.0 (2022, arXiv 2212.07525).

    python -m speechjax.main --config=configs/pretrain/data2vec.py:size=tiny --workdir=runs/tiny \
        --config.data.source=folder:/path/to/recordings

size=base    the first paper's Base on LibriSpeech: 400 k updates of 63 min of audio; fine-tuned, 6.8 % (100 h) and
             5.5 % (960 h) word error on test-other with a 4-gram model (table 2).
size=large   24 layers on Base's recipe; a recipe of its own was not published.  The paper's has 4.6 and 3.7 %.
size=base2   data2vec 2.0's Base: 400 k updates of 8.3 min under 8 masks; wav2vec 2.0's accuracy in 1/10.6 of its time.
size=large2  data2vec 2.0's Large on LibriVox: 600 k updates of 16 min under 12 masks.
size=tiny    ours, for a CPU: three layers on log-mel frames under a projection that is not trained.  size=tiny2: the
             same of data2vec 2.0.  In batches of 8 s a trained front end on waveforms becomes constant within 150
             updates, at learning rates from 3e-4 on; the alarm "front_end_collapse" says so.

base2, large2, tiny2 are the task data2vec2, whose rows cannot be packed.  Published weights of the second paper decay
neither biases nor gains, those of the first decay everything.

Arguments after the colon: size, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg

FROZEN = "^encoder/(front|feature_norm|projection)/"


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("base", "large", "base2", "large2", "tiny", "tiny2"), smoke=False)
    size, second = args["size"].removesuffix("2"), args["size"].endswith("2")
    config = ConfigDict(base())
    if size == "large":
        config.update(large())
    if size == "tiny":
        config.model = ConfigDict(tiny_encoder())
        config.update(tiny())
    if second:
        config.update(dict(base=base2, large=large2, tiny=tiny2)[size]())
    if args["smoke"]:
        config.update(smoke(second, waveform=size != "tiny"))
    return config


def base() -> dict:
    """The first paper's Base; numbers of its published training configuration."""
    return presets.experiment(
        task=dict(
            name="data2vec", mask_prob=0.65, mask_span=10, target_layers=8, ema_start=0.999, ema_end=0.9999,
            ema_steps=30_000,
        ),
        model=encoder("base"),
        data=presets.data(crop_seconds=20.0, batch_seconds=3800.0),  # 16 GPUs x 3.8 M samples
        optim=presets.optim(5e-4, 12_000, hold=360_000, decay="exponential", floor=0.01),
        train=presets.train(400_000),
    )  # fmt: skip


def encoder(size: str) -> dict:
    """Layer norm in every convolution of the front end, five narrow convolutions for the positions, post-LN."""
    model = presets.waveform(size)
    model["frontend"] |= dict(norm="layer", bias=False, normalize=True)
    return model | dict(norm="post", positions=dict(kernel=19, groups=16, depth=5), input_dropout=0.0)


def tiny_encoder() -> dict:
    """Three layers in float32 on log-mel frames of 20 ms, with the positions of Base."""
    return presets.spectral("tiny") | dict(positions=dict(kernel=19, groups=16, depth=5), input_dropout=0.0)


def large() -> dict:
    """What differs from Base."""
    return dict(model=presets.TRANSFORMERS["large"])


def base2() -> dict:
    """What differs in data2vec 2.0."""
    return dict(
        task=dict(
            name="data2vec2", mask_prob=0.5, mask_span=5, ema_end=0.99999, ema_steps=75_000, mask_adjust=0.05, masks=8,
            mask_noise=0.01, decoder_layers=4, decoder_width=384, decoder_kernel=7, decoder_groups=16,
            decoder_dropout=0.1,
        ),
        model=dict(attention=dict(positions="alibi")),
        data=dict(batch_seconds=500.0),  # 8 GPUs x 1 M samples
        optim=dict(
            learning_rate=7.5e-4, warmup=8000, hold=0, decay="cosine", floor=0.0,
            weight_decay=((r"bias|scale|mask_embedding", 0.0), (".*", 0.01)),
        ),
    )  # fmt: skip


def large2() -> dict:
    """What differs between Base and data2vec 2.0's Large."""
    config = ConfigDict(base2())
    config.update(
        dict(
            task=dict(
                mask_prob=0.55, mask_adjust=0.1, masks=12, target_layers=16, ema_start=0.9997, ema_end=1.0,
                ema_steps=300_000, decoder_width=768,
            ),
            model=dict(layerdrop=0.0),
            data=dict(batch_seconds=960.0),  # 48 GPUs x 320 k samples
            optim=dict(learning_rate=4e-4, warmup=10_000, clip_norm=1.0),
            train=dict(steps=600_000),
        )
    )  # fmt: skip
    return config.to_dict()


def tiny() -> dict:
    """Log-mel frames (see `tiny_encoder`); the average is as fast as 3,000 updates need."""
    blocks = presets.tiny(5e-4)
    blocks["optim"] |= dict(hold=2000, freeze=((FROZEN, 0, -1),))
    return blocks | dict(
        task=presets.SHORT_MASKS | dict(target_layers=2, ema_start=0.99, ema_end=0.999, ema_steps=1000)
    )


def tiny2() -> dict:
    """What differs between tiny and its second edition: four masks of a quarter of the audio."""
    blocks = base2()
    blocks["task"] |= dict(masks=4, ema_end=0.999, ema_steps=1000, decoder_layers=2, decoder_width=128)
    return blocks | dict(
        data=dict(batch_seconds=16.0), optim=blocks["optim"] | dict(learning_rate=5e-4, warmup=200)
    )  # fmt: skip


def smoke(second: bool, waveform: bool) -> dict:
    """Two steps of a miniature with the same wiring."""
    blocks = presets.smoke(layers=2)
    blocks["model"] |= dict(positions=dict(kernel=3, groups=4, depth=2))
    if waveform:
        blocks["model"] |= dict(frontend=dict(channels=(16,) * 7))
    blocks["task"] = dict(target_layers=1)
    if second:
        blocks["task"] |= dict(masks=2, decoder_layers=2, decoder_width=16, decoder_groups=4)
    return blocks

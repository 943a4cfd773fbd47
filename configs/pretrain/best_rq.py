"""BEST-RQ (Chiu et al. 2022, https://arxiv.org/abs/2202.01855): masked prediction of a frozen random quantizer's codes.

    python -m speechjax.main --config=configs/pretrain/best_rq.py:size=tiny --workdir=runs/best_rq \
        --config.data.source=folder:/path/to/recordings

size=paper  the paper's Conformer of 0.6 B on Libri-Light: then, fine-tuned on LibriSpeech 960 h, 1.6/2.9 % word error
            on test-clean/other without a language model, 1.5/2.7 % with one (section 4).
size=base   SpeechBrain's recipe on LibriSpeech (Whetten et al. 2024, https://arxiv.org/abs/2405.04296): 300 k updates
            of 2 h; about wav2vec 2.0's quality in less than half of its training time.  Masked spans of 40 ms, which
            SpeechBrain places alike in all rows of a batch, on a grid without overlaps (60 % of all frames); here every
            row has its own, anywhere (48 %, and a quarter of the stacked frames wholly).
size=nest   NEST-L (Huang et al. 2024, https://arxiv.org/abs/2408.13106): 8-fold subsampling, other speakers and noise
            mixed into half of the rows; on about 100 k h.  Our convolutions are not depthwise, the noise is generated.
size=tiny   ours, for a CPU: a transformer at 50 Hz, four codebooks of 64 codes, spans of 100 ms.

Not published, or not known to us: how long `paper` and `nest` train, and how many seconds are in an update (2,048
utterances in `paper`); theirs are ours here.

`streaming` makes any of them see the past only, with the paper's masks and frame rate for that (section 4.2): spans of
300 ms, started with probability 0.02, two frames stacked.  So that it can be served for any time
(speechjax/models/streaming.py) the input is normalised by what was heard so far and every layer sees 64 frames back;
how far theirs sees is not known to us.  Chunks of several frames wait for their last and see it from their first:
--config.model.attention.chunk=8 --config.model.attention.left=8.

Arguments after the colon: size, streaming, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("paper", "base", "nest", "tiny"), streaming=False, smoke=False)
    sizes = dict(base=base, nest=nest)
    config = ConfigDict(tiny() if args["size"] == "tiny" else paper())
    if args["size"] in sizes:
        config.update(sizes[args["size"]]())
    if args["streaming"]:
        config.update(streaming())
    if args["smoke"]:
        config.update(smoke(args["size"]))
    return config


def paper() -> dict:
    """Libri-Light, 617 M parameters."""
    return presets.experiment(
        task=dict(
            name="best_rq",
            mask_prob=0.01,
            mask_span=40,
            masked_share_needed=1.0,
            noise_std=0.1,
            codebooks=1,
            codes=8192,
            code_dim=16,
            mixing=0.0,
            mixing_noise=0.0,
        ),
        model=conformer("xlarge", factor=4, kernel=5),
        data=presets.data(crop_seconds=16.0, batch_seconds=32_768.0),
        optim=presets.optim(4e-3, warmup=25_000, decay="inverse_sqrt"),
        train=presets.train(400_000, best_metric="valid/prediction"),
    )


def conformer(size: str, factor: int, kernel: int) -> dict:
    """On log-mel frames, subsampled by strided convolutions."""
    model = presets.spectral(size, block="conformer", factor=factor, subsample="conv")
    model["frontend"] |= dict(conv_channels=256, embedding=512)
    model["block"]["kernel"] = kernel
    return model


def base() -> dict:
    """LibriSpeech, 97 M parameters: what differs from `paper`."""
    return dict(
        task=dict(mask_prob=0.15, mask_span=4),
        model=dict(width=576, layers=12, heads=8, mlp=2048, block=dict(kernel=31)),
        data=dict(crop_seconds=32.0, batch_seconds=7200.0),
        optim=dict(learning_rate=8e-4, eps=1e-9, clip_norm=10.0),
        train=dict(steps=300_000),
    )


def nest() -> dict:
    """NEST-L, 114 M parameters: what differs from `paper`."""
    return dict(
        task=dict(masked_share_needed=0.8, mixing=0.5, mixing_noise=0.5),
        model=conformer("large", factor=8, kernel=9),
        data=dict(crop_seconds=30.0, batch_seconds=14_400.0, min_seconds=1.0),
        # Noam's factor of 5 at a width of 512 is this peak.
        optim=dict(learning_rate=1.4e-3, eps=1e-8, weight_decay=((".*", 1e-3),)),
        train=dict(steps=200_000),
    )


def tiny() -> dict:
    """0.8 M parameters, float32."""
    config = ConfigDict(paper() | dict(model=presets.spectral("tiny", factor=2, subsample="conv")))
    # Stacked frames would go straight into the encoder's layer norm, which lifts the noise of masked frames to the
    # level of speech: after 900 updates of a smaller model the loss was 3.01 so, 2.86 with convolutions (chance 3.04).
    # Of 400 ms and of 0.01, as published, most short words would have none; few codes leave the plateau sooner.
    config.update(dict(task=dict(codebooks=4, codes=64, mask_prob=0.06, mask_span=10)) | presets.tiny())
    config.update(dict(optim=dict(decay="linear")))
    return config.to_dict()


def streaming() -> dict:
    """A causal model: what differs."""
    return dict(
        task=dict(mask_prob=0.02, mask_span=30),
        model=dict(frontend=dict(factor=2, normalize="online"), attention=dict(chunk=1, left=64)),
    )


def smoke(size: str) -> dict:
    """Two steps of a miniature with the same wiring."""
    config = ConfigDict(presets.smoke())
    front = dict(n_mels=20, conv_channels=4, embedding=16)
    config.update(dict(task=dict(codes=16, code_dim=4), model=dict(frontend=front)))
    if size == "tiny":
        config.update(dict(model=dict(positions=dict(kernel=16, groups=4))))
    return config.to_dict()

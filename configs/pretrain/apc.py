"""APC (Chung et al. 2019, https://arxiv.org/abs/1904.03240): predicts a frame some way ahead from the past alone.

    python -m speechjax.main --config=configs/pretrain/apc.py:size=tiny --workdir=runs/apc \
        --config.data.source=folder:/path/to/recordings

size=paper        three residual GRU layers of 512 on 80 log-mels, five frames ahead, as s3prl trains it: 100 epochs of
                  batches of 32, here of LibriSpeech 360 h.
size=vq           VQ-APC (Chung et al. 2020, https://arxiv.org/abs/2005.08392): 512 codes behind the last layer.
size=transformer  ours: HuBERT Base's size, causal, at the paper's frame rate.
size=linear       no encoder: one linear map from a frame to that ahead.
size=tiny         ours, for a CPU: three GRU layers of 128.

Published models normalise over the utterance, which looks ahead; so do these.  To have none of it, set
model.frontend.normalize=none.  Their encoders have no projection before the first layer, and no norm after the last.

Arguments after the colon: size, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("paper", "vq", "transformer", "linear", "tiny"), smoke=False)
    config = ConfigDict(transformer() if args["size"] == "transformer" else paper())
    sizes = dict(
        vq=dict(task=dict(codes=512)),
        linear=dict(model=dict(layers=0)),
        tiny=dict(model=dict(width=128)) | presets.tiny(),
    )
    config.update(sizes.get(args["size"], {}))
    if args["smoke"]:
        config.update(smoke(args["size"]))
    return config


def paper() -> dict:
    """4.8 M parameters."""
    model = presets.spectral(factor=1) | dict(
        width=512,
        layers=3,
        norm="pre",
        positions=dict(name="none"),
        block=dict(name="gru"),
        input_dropout=0.0,
        dropout=0.1,
        scan=False,
        remat=False,
        dtype="float32",
    )
    return presets.experiment(
        task=dict(name="apc", shift=5, codes=0, code_temperature=0.5),
        model=model,
        data=presets.data(crop_seconds=16.0, batch_seconds=400.0),
        optim=presets.optim(
            1e-4, warmup=1, decay="constant", b2=0.999, eps=1e-8, weight_decay=((".*", 0.0),), clip_norm=5.0
        ),
        train=presets.train(325_000),
    )


def transformer() -> dict:
    """85 M parameters; learning rate and length are ours."""
    model = presets.spectral("base", factor=1) | dict(
        norm="pre", positions=dict(name="sinusoidal"), attention=dict(chunk=1)
    )
    config = paper() | dict(model=model, optim=presets.optim(2e-4, warmup=10_000), train=presets.train(200_000))
    return config | dict(data=presets.data(crop_seconds=16.0, batch_seconds=1600.0))


def smoke(size: str) -> dict:
    """Two steps of a miniature with the same wiring."""
    config = ConfigDict(presets.smoke(layers=0 if size == "linear" else 1))
    config.update(dict(model=dict(frontend=dict(n_mels=20))))
    if size == "vq":
        config.update(dict(task=dict(codes=16)))
    return config.to_dict()

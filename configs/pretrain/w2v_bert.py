"""w2v-BERT (Chung et al. 2021, https://arxiv.org/abs/2108.06209): wav2vec 2.0, and masked prediction of its codes.

    python -m speechjax.main --config=configs/pretrain/w2v_bert.py:size=tiny --workdir=runs/w2v_bert \
        --config.data.source=folder:/path/to/recordings

size=xl    the paper's Conformer of 0.6 B on Libri-Light, 12 contrastive blocks and 12 of masked prediction: then,
           fine-tuned on LibriSpeech 960 h, 1.5/2.9 % word error on test-clean/other without a language model, 1.5/2.8 %
           with one.
size=xxl   12 and 30 blocks, 1.07 B.
size=tiny  ours, for a CPU: 1 and 2 conformer blocks on pairs of log-mel frames.  On trained convolutions all frames get
           the same code within 100 updates, whatever the weight of diversity; alarm "codebook_collapse" says so.

Masks, codes, loss weights and blocks are the paper's; learning rate, updates and seconds in an update (of 2,048
utterances) are not checked against it.  The temperature of the codes is wav2vec 2.0 Base's.

Arguments after the colon: size, and smoke (two steps of a miniature, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("xl", "xxl", "tiny"), smoke=False)
    config = ConfigDict(tiny() if args["size"] == "tiny" else xl())
    if args["size"] == "xxl":
        config.update(dict(model=dict(layers=42)))
    if args["smoke"]:
        config.update(smoke(args["size"]))
    return config


def xl() -> dict:
    """Libri-Light, 613 M parameters."""
    model = presets.spectral("xlarge", block="conformer", factor=4, subsample="conv")
    model["frontend"] |= dict(conv_channels=256, embedding=512)
    model["block"]["kernel"] = 5
    return presets.experiment(
        task=dict(
            name="w2v_bert",
            contrastive_layers=12,
            mask_prob=0.65,  # starts with probability 0.065, in spans of ten frames of 40 ms
            mask_span=10,
            negatives=100,
            logit_temperature=0.1,
            codes=1024,
            code_dim=1024,
            projection=1024,
            gumbel_start=2.0,
            gumbel_floor=0.5,
            gumbel_decay=0.999995,
            diversity=0.1,
            contrastive_weight=1.0,
            prediction_weight=1.0,
        ),
        model=model,
        data=presets.data(crop_seconds=16.0, batch_seconds=32_768.0),
        optim=presets.optim(2e-3, warmup=25_000, decay="inverse_sqrt"),
        train=presets.train(400_000),
    )


def tiny() -> dict:
    """Three conformer layers, float32, on log-mel frames of 20 ms."""
    config = ConfigDict(xl() | dict(model=presets.spectral("tiny", block="conformer")))
    task = presets.SHORT_MASKS | dict(contrastive_layers=1, codes=256, code_dim=128, projection=128, gumbel_decay=0.999)
    config.update(dict(task=task) | presets.tiny())
    config.update(dict(optim=dict(decay="linear")))
    return config.to_dict()


def smoke(size: str) -> dict:
    """Two steps of a miniature with the same wiring."""
    config = ConfigDict(presets.smoke(layers=2))
    task = dict(contrastive_layers=1, negatives=10, codes=16, code_dim=16, projection=16)
    config.update(dict(task=task, model=dict(frontend=dict(n_mels=20))))
    config.update(dict(model=dict(frontend=dict(conv_channels=4, embedding=16))))
    return config.to_dict()

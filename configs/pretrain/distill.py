"""DistilHuBERT (Chang et al. 2021, https://arxiv.org/abs/2110.01900): two layers learn what twelve have learnt.

    python -m speechjax.main --config=configs/pretrain/hubert.py:size=tiny --workdir=runs/hubert ...
    python -m speechjax.main --config=configs/pretrain/distill.py:size=tiny --workdir=runs/distilled \
        --config.task.teacher=runs/hubert

The teacher may be any run here whose frames are the student's.  The student can begin with the first layers of one that
has its front end and width.

size=base    HuBERT Base for a teacher, of which layers 4, 8 and 12 are predicted; LibriSpeech 960 h, 200 k updates of
             24 utterances (300 s; the seconds are ours).  The published student is 75 % smaller and 73 % faster than
             its teacher and keeps most of its scores in SUPERB.  It has no layer norm before its projection; ours has
             the teacher's, so that what it takes over fits.  The paper predicts three layers; the configuration of its
             code leaves out the eighth.
size=tiny    ours, for a CPU: one layer after the three of tiny HuBERT or WavLM.

Arguments after the colon: size, and smoke (two steps of a miniature after a random teacher, for tests).
"""

from ml_collections import ConfigDict

from speechjax import presets
from speechjax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(arg, size=("base", "tiny"), smoke=False)
    config = ConfigDict(base())
    if args["size"] == "tiny":
        config.update(tiny())
    if args["smoke"]:
        config.update(smoke())
    return config


def base() -> dict:
    """Numbers of the published training configuration."""
    return presets.experiment(
        task=dict(
            name="distill",
            teacher="",
            layers=(4, 8, 12),
            cosine_weight=1.0,
            feature_grad_scale=0.1,
            init_from_teacher=True,
        ),
        model=presets.waveform("base")
        | dict(layers=2, input_dropout=0.0, activation_dropout=0.1, layerdrop=0.0, remat=False),
        data=presets.data(batch_seconds=300.0) | dict(row_multiple=8),
        optim=presets.optim(2e-4, warmup=14_000, clip_norm=5.0, weight_decay=((".*", 1e-6),)),
        train=presets.train(200_000),
    )


def tiny() -> dict:
    """One layer, for tiny HuBERT's three."""
    config = presets.tiny()
    config["task"] = dict(layers=(1, 2, 3), feature_grad_scale=1.0)
    config["model"] = presets.waveform("tiny") | dict(layers=1, input_dropout=0.0)
    return config


def smoke() -> dict:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke(layers=1)
    config["task"] = dict(teacher="random:layers=2", layers=(1, 2))
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    return config

"""Blocks that the configs of many experiments share: published encoders, and the plumbing around them.

Every function returns a new nested dict; what an experiment does differently it says itself, with `ConfigDict.update`.
"""

from typing import Any

Block = dict[str, Any]

# Sizes of Baevski et al. 2020 and Hsu et al. 2021 (HuBERT, table 1).  `wav2vec 2.0`'s text says 8 heads for Base;
# its code and weights have 12.
TRANSFORMERS = {
    "base": dict(width=768, layers=12, heads=12, mlp=3072),
    "large": dict(width=1024, layers=24, heads=16, mlp=4096),
    "xlarge": dict(width=1280, layers=48, heads=16, mlp=5120),
    "tiny": dict(width=128, layers=3, heads=4, mlp=512),
}
# Conformers of Gulati et al. 2020 (table 1: M is "base" here, L "large") and of Zhang et al. 2020 (XL, 0.6 B).
CONFORMERS = {
    "base": dict(width=256, layers=16, heads=4, mlp=1024),
    "large": dict(width=512, layers=17, heads=8, mlp=2048),
    "xlarge": dict(width=1024, layers=24, heads=8, mlp=4096),
    "tiny": dict(width=128, layers=3, heads=4, mlp=512),
}
# What tiny runs hide: half of the frames of 20 ms, in spans of 100 ms.  Published spans of 200 ms and more leave little
# to see of a word of half a second, and small models stay with one answer for all frames.
SHORT_MASKS = dict(mask_prob=0.5, mask_span=5)


def waveform(size: str = "base") -> Block:
    """Encoder on waveforms: seven convolutions, a transformer with convolutional positions (wav2vec 2.0).

    base: group norm in the first layer, post-LN, dropout.  large, xlarge: layer norm in every layer, pre-LN, no
    dropout.  tiny: base at a hundredth of its size, float32.
    """
    model: Block = dict(
        frontend=dict(
            name="waveform",
            channels=(512,) * 7,
            kernels=(10, 3, 3, 3, 3, 2, 2),
            strides=(5, 2, 2, 2, 2, 2, 2),
            norm="group",
            bias=False,
            normalize=False,
        ),
        **TRANSFORMERS[size],
        norm="post",
        positions=dict(kernel=128, groups=16),
        **_regularisation(0.1, layerdrop=0.05),
        **_execution("bfloat16"),
    )
    if size in ("large", "xlarge"):
        model["frontend"] |= dict(norm="layer", bias=True, normalize=True)
        model |= dict(norm="pre", **_regularisation(0.0))
    if size == "tiny":
        model["frontend"]["channels"] = (32, 32, 64, 64, 128, 128, 128)
        model["positions"]["kernel"] = 32
        model |= _regularisation(0.05) | dict(attention_dropout=0.0) | _execution("float32")
    return model


def spectral(size: str = "base", *, block: str = "transformer", factor: int = 2, subsample: str = "stack") -> Block:
    """Encoder on 80-band log-mel spectra, normalised per utterance: `factor` frames of 10 ms make one of the encoder's.

    `block` "transformer" has convolutional positions, post-LN; "conformer" relative positions in the attention.
    """
    sizes = CONFORMERS if block == "conformer" else TRANSFORMERS
    model: Block = dict(
        frontend=dict(name="mel", n_mels=80, factor=factor, subsample=subsample),
        **sizes[size],
        norm="pre" if block == "conformer" or size in ("large", "xlarge") else "post",
        block=dict(name=block),
        **_regularisation(0.1),
        **_execution("bfloat16"),
    )
    if block == "conformer":
        model |= dict(positions=dict(name="none"), attention=dict(positions="relative"))
    else:
        model |= dict(positions=dict(kernel=32 if size == "tiny" else 128, groups=16))
    if size == "tiny":
        model |= _regularisation(0.05) | dict(attention_dropout=0.0) | _execution("float32")
        if subsample == "conv":
            model["frontend"] |= dict(conv_channels=32, embedding=128)
    return model


def bilstm(size: str = "base") -> Block:
    """Deep bidirectional LSTM on log-mel spectra, for CTC: no residual connections, no norm between layers.

    base: five layers of 250 a direction on 40 bands at 100 frames a second, the `CTC-5l-250h` of Graves et al. 2013
    (arXiv 1303.5778, table 1), without its energy, deltas and peepholes.  tiny: ours, 50 frames a second.
    """
    tiny = size == "tiny"
    sizes = {"base": dict(width=500, layers=5), "tiny": dict(width=128, layers=2)}
    return dict(
        frontend=dict(name="mel", n_mels=40, factor=2 if tiny else 1, subsample="stack"),
        **_recurrent("blstm"),
        **sizes[size],
        **_execution("float32"),
    )


def deep_speech_2(size: str = "base") -> Block:
    """Deep Speech 2 (Amodei et al. 2016): convolutions on spectrograms, recurrent layers, batch norm throughout.

    base: three convolutions (table 4), seven bidirectional layers of 1280 (table 1: 38 M parameters) and a fully
    connected one.  tiny: ours, two narrow convolutions and two layers of 128.
    """
    tiny = size == "tiny"
    sizes = {"base": dict(width=1280, layers=7), "tiny": dict(width=128, layers=2)}
    return dict(
        frontend=dict(name="deep_speech", filters=(8, 8) if tiny else (32, 32, 96)),
        **_recurrent("deep_speech"),
        **sizes[size],
        **_execution("float32" if tiny else "bfloat16"),
    )


def _recurrent(block: str) -> Block:
    """What recurrent encoders share: order needs no positions; they have no use for `heads` and `mlp`."""
    return dict(
        block=dict(name=block), positions=dict(name="none"), norm="none", heads=1, mlp=1, **_regularisation(0.0)
    )


def _regularisation(dropout: float, *, layerdrop: float = 0.0) -> Block:
    return dict(
        dropout=dropout, attention_dropout=dropout, activation_dropout=0.0, input_dropout=dropout, layerdrop=layerdrop
    )


def _execution(dtype: str) -> Block:
    """Scan and remat over depth on accelerators; small models on a CPU are faster without."""
    return dict(scan=dtype != "float32", remat=dtype != "float32", dtype=dtype)


def data(crop_seconds: float = 15.625, batch_seconds: float = 5600.0) -> Block:
    """The data block: `batch_seconds` an update over all hosts, in crops of at most `crop_seconds`."""
    return dict(
        source="embedded",
        temperature=1.0,
        crop_seconds=crop_seconds,
        batch_seconds=batch_seconds,
        shapes=4,
        fill=False,
        row_multiple=64,
        min_seconds=2.0,
        valid_seconds=600.0,
        include="",
        exclude="",
        text="",
        text_steps="nfc single_spaces",
        units="",
        label="",
        valid="",
        train_seconds=0.0,
        text_field="text",
        max_bad_share=0.1,
        cache_dir="",
    )


def optim(learning_rate: float, warmup: int, **changes: Any) -> Block:
    """AdamW as wav2vec 2.0 and HuBERT publish it: linear warm-up and decay, everything decayed by 0.01."""
    block = dict(
        learning_rate=learning_rate,
        warmup=warmup,
        hold=0,
        decay="linear",
        floor=0.0,
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        weight_decay=((".*", 0.01),),
        clip_norm=0.0,
        freeze=(),
        rates=(),
        ewc="",
        ewc_weight=0.0,
        moment_dtype="float32",
    )
    return block | changes


def train(steps: int, best_metric: str = "valid/loss", best_mode: str = "min") -> Block:
    """The train block of a run on accelerators."""
    return dict(
        steps=steps,
        seed=0,
        log_every=100,
        checkpoint_every=1000,
        eval_every=5000,
        keep=3,
        best_metric=best_metric,
        best_mode=best_mode,
        patience=0,
        max_skipped=100,
        device_seconds=0.0,
    )


def evals() -> Block:
    """Losses on the held-out split, a picture, and a probe that runs once `source` names labelled recordings."""
    return dict(
        valid=dict(name="loss", every=1),
        picture=dict(name="picture", every=1),
        probe=dict(
            name="probe",
            every=4,
            source="",
            pattern=r"(?P<label>[^_/]+)_(?P<speaker>[^_/]+)_[^/]*$",
            held_out=(),
            seeds=1,
            shots=(1, 5, 20),
        ),
    )


def experiment(task: Block, model: Block, **blocks: Block) -> Block:
    """A whole config from `task`, `model`, `data`, `optim` and `train`; mesh and evals are alike for all."""
    return dict(init_from="", task=task, model=model, mesh=dict(data=-1, fsdp=1, tensor=1), evals=evals()) | blocks


def tiny(learning_rate: float = 1e-3) -> Block:
    """What a tiny run on a CPU changes around its model: batches of 16 s, 3,000 updates."""
    return dict(
        data=dict(
            crop_seconds=4.0, batch_seconds=16.0, shapes=3, row_multiple=4, min_seconds=0.25, valid_seconds=120.0,
        ),
        optim=dict(learning_rate=learning_rate, warmup=200, hold=0, clip_norm=5.0),
        train=dict(steps=3000, log_every=20, checkpoint_every=200, eval_every=200),
    )  # fmt: skip


def smoke(layers: int = 1) -> Block:
    """What a miniature of two steps changes, for tests: same wiring, a width of 32."""
    return dict(
        model=dict(width=32, layers=layers, heads=2, mlp=64),
        data=dict(
            source="embedded:0.02", crop_seconds=2.5, batch_seconds=10.0, shapes=1, row_multiple=4, valid_seconds=5.0,
        ),
        optim=dict(warmup=1, hold=0),
        train=dict(steps=2, log_every=1, checkpoint_every=2, eval_every=2),
    )  # fmt: skip

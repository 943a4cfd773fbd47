"""Blocks that the configs of fine-tuning share: what trains, and how.  Every function returns a new nested dict."""

import re
from typing import Any

from speechjax import presets
from speechjax.errors import UserError
from speechjax.models import adapters

Block = dict[str, Any]

SPOKEN = "nfkc lowercase no_punctuation single_spaces"  # config.data.text_steps: of a text what is heard

# One adapter of each kind, under 3 % of the parameters of Base, and changes that do the same for tiny.
ADAPTERS: dict[str, Block] = {
    "lora": dict(kind="lora", name="task", dropout=0.0, rank=8, alpha=16.0,
                 targets=r"((^|/)projection|attention/(query|key|value|out)|mlp\d*_(up|down))$"),
    "houlsby": dict(kind="houlsby", name="task", width=64, activation="gelu"),
    "parallel": dict(kind="parallel", name="task", width=64, scale=4.0),
    "prefix": dict(kind="prefix", name="task", length=16),
    "ia3": dict(kind="ia3", name="task"),
}  # fmt: skip
TINY: dict[str, Block] = {"lora": dict(rank=3, alpha=6.0), "houlsby": dict(width=12), "parallel": dict(width=24)}
TRAINS = ("all", "head", "topK", "gradual", "discriminative", "bitfit", *ADAPTERS)


def trains(what: str, size: str = "") -> Block:
    """What of a model trains, as changes of a config; adapters of tiny are smaller.

    all             everything but the convolutions of the front end (wav2vec 2.0, section 4.3)
    head            the head; the encoder is fixed, nothing of it dropped (SUPERB)
    top4            the head and the last 4 layers, and so on
    gradual         from the head downwards: the last layer after 500 updates, one more every 500, all after 2000
                    (Howard and Ruder 2018, arXiv 1801.06146, section 3.3)
    discriminative  everything, each layer at 0.9 of the rate of the one above, what is below them at 0.9^12, as
                    Base has it (the same, section 3.2)
    bitfit          the head and all biases of the transformer (Ben Zaken et al. 2022, arXiv 2106.10199)
    lora, houlsby, parallel, prefix, ia3   the head and adapters in the fixed encoder (speechjax/models/adapters.py)

    Raises UserError for anything else.
    """
    front = (r"^encoder/front/", 0, -1)
    encoder = (r"^encoder/", 0, -1)
    apart = dict(model=dict(scan=False))  # rules by layer need layers apart
    if what == "all":
        return dict(optim=dict(freeze=(front,)))
    if what == "head":
        still = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layerdrop"), 0.0)
        return dict(model=still, task=dict(mask_prob=0.0, channel_mask_prob=0.0), optim=dict(freeze=(encoder,)))
    if re.fullmatch(r"top[1-9]\d*", what):
        layers = "|".join(str(k + 1) for k in range(int(what[3:])))
        return apart | dict(optim=dict(freeze=((rf"/layer-({layers})/", 0, 0), encoder)))
    if what == "gradual":
        steps = ((rf"^encoder/transformer/layer-{k}/", 0, 500 * k) for k in (1, 2, 3))
        return apart | dict(optim=dict(freeze=(front, *steps, (r"^encoder/", 0, 2000))))
    if what == "discriminative":
        rates = (*((rf"/layer-{k + 1}/", 0.9**k) for k in range(48)), (r"^encoder/", 0.9**12), (".*", 1.0))
        return apart | dict(optim=dict(freeze=(front,), rates=rates))
    if what == "bitfit":
        return _adapted(dict(kind="bias", name="task"))
    if what in ADAPTERS:
        return _adapted(ADAPTERS[what] | (TINY.get(what, {}) if size == "tiny" else {}))
    raise UserError(f"config argument trains={what!r}: choose from {', '.join(TRAINS)}, K the number of layers")


def _adapted(adapter: Block) -> Block:
    learns = adapters.trainable_pattern([adapter])
    return dict(model=dict(adapters=(adapter,)), optim=dict(freeze=((learns, 0, 0), (r"^encoder/", 0, -1))))


def model(size: str) -> Block:
    """What fine-tuning says of a model, how it trains; what it is says the checkpoint, or from scratch `size`."""
    how = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.1, input_dropout=0.0, layerdrop=0.1)
    if size:
        how = {key: presets.waveform(size)[key] for key in how}
    return dict(preset=size or "base", adapters=(), **how)


def masks(prob: float = 0.0, channel_prob: float = 0.0) -> Block:
    """Fields of every head: spans of 200 ms in time and of 64 channels are hidden, as in wav2vec 2.0's fine-tuning."""
    return dict(
        mask_prob=prob, mask_span=10, channel_mask_prob=channel_prob, channel_mask_span=64, head_dropout=0.0,
    )  # fmt: skip


def optim(learning_rate: float, steps: int, **changes: Any) -> Block:
    """Adam and the tri-stage schedule of wav2vec 2.0's fine-tuning: up in a tenth, 40 % at the peak, down to 5 %."""
    stages: Block = dict(hold=int(0.4 * steps), decay="exponential", floor=0.05)
    return presets.optim(learning_rate, warmup=steps // 10, eps=1e-8, weight_decay=((".*", 0.0),)) | stages | changes


def tiny(steps: int = 2000, learning_rate: float = 1e-3) -> Block:
    """What a run on a CPU changes: whole utterances in batches of 32 s."""
    return dict(
        data=dict(
            crop_seconds=15.0, batch_seconds=32.0, shapes=4, row_multiple=1, min_seconds=0.25, valid_seconds=120.0
        ),
        optim=optim(learning_rate, steps, clip_norm=5.0),
        train=dict(steps=steps, log_every=20, checkpoint_every=200, eval_every=200),
    )


def tiny_clips() -> Block:
    """`tiny` for tasks that need no whole utterances: rows of at most 4 s."""
    config = tiny()
    config["data"] |= dict(crop_seconds=4.0, shapes=2, row_multiple=4)
    return config


def recognition(**changes: Any) -> Block:
    """The evaluator of tasks that transcribe: error rates of the best path."""
    options: Block = dict(
        name="recognition", every=4, group="", search="greedy", beams=16, symbols=20, best=1, lm="", lm_weight=0.5,
        token_bonus=0.0, word_bonus=0.0, lexicon="", hot_words="", hot_word_bonus=2.0,
        ctc_weight=0.3,
    )  # fmt: skip
    return options | changes


def answers(name: str, head: str = "") -> Block:
    """Another evaluator that says how good answers are: classification, verification, frame_labels, values."""
    return dict(name=name, every=4, head=head)


def evals(**more: Block) -> Block:
    """Losses and a picture of the held-out split, and what says how good the answers are."""
    every = presets.evals()
    return dict(valid=every["valid"], picture=every["picture"]) | more

"""Blocks that the configs of SUPERB share (Yang et al. 2021, arXiv 2105.01051).  Every function returns a new dict.

The encoder is fixed; a learned average of its layers goes through a linear layer into a small model, the published one
where a config says nothing else.  Batches, updates and clipping are those of the published code (s3prl), and so is the
rate of each config; the benchmark tunes it for every encoder, over `SWEEP`, and changes nothing else.  Batches are
counted in seconds here: that of 32 utterances of average length.
"""

from typing import Any

from ml_collections import ConfigDict

from speechjax import finetuning, presets
from speechjax.config import parse_arg

Block = dict[str, Any]

SWEEP = {"optim.learning_rate": ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6", "1e-7")}
OWN = "folder:/path/to/recordings"
# Of the built-in corpus eleven recordings are enough to see that everything fits; two languages are held out.
_SMOKE_DATA: Block = dict(valid="^(en-us|fr)", crop_seconds=2.5)


def make(
    arg: str, task: Block, data: Block, *, rate: float, steps: int, every: int, clip: float = 1.0, decay: float = 0.0,
    judge: Block, best: str, mode: str, small: Block, smoke: Block,
) -> ConfigDict:  # fmt: skip
    """The config of one task: `rate` and `steps` of Adam, evaluated `every` so many updates.

    `judge` is the evaluator that gives the benchmark's score, called "test", and `best` its metric, with "min" or "max"
    as `mode`.  `small` is what tiny, and `smoke` what the miniature changes.
    """
    args = parse_arg(arg, size=("", "base", "large", "tiny"), own=False, smoke=False)
    args["size"] = args["size"] or "tiny" * args["smoke"]
    config = ConfigDict(
        presets.experiment(
            task=dict(layers="weighted") | finetuning.masks() | task,
            model=finetuning.model(args["size"]),
            data=presets.data() | dict(row_multiple=8, min_seconds=0.1) | data,
            optim=presets.optim(
                rate, warmup=0, b2=0.999, eps=1e-8, weight_decay=((".*", decay),), clip_norm=clip, decay="constant"
            ),
            train=presets.train(steps, best_metric=f"test/{best}", best_mode=mode) | dict(eval_every=every),
            evals=finetuning.evals(test=judge | dict(every=1)),
        )
    )
    config.update(finetuning.trains("head"))
    if args["own"]:
        config.update(dict(data=dict(source=OWN, valid="")))
    if args["size"] == "tiny":
        config.update(dict(data=_tiny_data(data), train=finetuning.tiny()["train"]))
        config.update(small)
    if args["smoke"]:
        config.update(_smoke())
        config.update(smoke)
    return config


def _tiny_data(data: Block) -> Block:
    """Batches of 32 s for a CPU."""
    return dict(batch_seconds=min(32.0, data["batch_seconds"]), shapes=2, row_multiple=1)


def _smoke() -> Block:
    """Two steps of a miniature with the same wiring."""
    config = presets.smoke()
    config["data"] |= _SMOKE_DATA
    config["model"] |= dict(frontend=dict(channels=(16,) * 7), positions=dict(kernel=16, groups=4))
    del config["optim"]
    return config


def utterances(**fields: Any) -> Block:
    """The head of utterance tasks: a linear layer of 256 units, the mean over frames, a linear layer."""
    head = dict(
        loss="softmax", label_smoothing=0.0, class_weights="none", projection=256, pooling="mean", pooling_hidden=128,
    )  # fmt: skip
    return head | fields


def classification(**changes: Any) -> Block:
    """Accuracy."""
    return dict(name="classification", head="", group="") | changes

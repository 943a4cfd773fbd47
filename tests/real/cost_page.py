"""What pretraining on 100,000 and 1,000,000 hours costs in accelerator-hours: writes docs/cost.md.

    python tests/real/cost_page.py
    python tests/real/cost_page.py --mfu=0.5 --hours=30000,200000 --out=FILE

Nothing is measured: FLOPs are counted from the training programs of configs/pretrain, the rest is on the page.
Half a minute on one core.
"""

import argparse
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax

from speechjax import config as configs
from speechjax import flops
from speechjax.ahead.batch import task_spec
from speechjax.ahead.hardware import CHIPS
from speechjax.data.plan import Shape
from speechjax.step import SAMPLE_RATE, init_state

REPO = Path(__file__).resolve().parent.parent.parent
PAGE = REPO / "docs" / "cost.md"
HARDWARE = {"v5p": "TPU v5p", "v6e": "TPU v6e", "h100": "H100 SXM"}
MFU, USEFUL, HOURS = 0.4, 0.93, (100_000, 1_000_000)
EXAMPLE = "wav2vec2 large"  # of the cell that is derived line by line
UNITS_FROM = "hubert base, iteration 1"  # whose forward pass is priced


@dataclass(frozen=True)
class Published:
    """A size as configs/pretrain has it, the `corpus` of its paper in hours (None: not known to us) and what `differs`.

    `differs` says how the length of the config is not the paper's, "" where it is; "ours" where passes say nothing.
    """

    name: str
    spec: str
    corpus: int | None
    differs: str = ""


# Corpora: LibriSpeech 960 h; LibriVox 53,200 h after wav2vec 2.0's preprocessing (arXiv 2006.11477, section 4.1);
# Libri-Light 60,000 h; WavLM's mixture 94,000 h.
PUBLISHED = (
    Published("wav2vec2 base", "wav2vec2.py:size=base", 960),
    Published("wav2vec2 large", "wav2vec2.py:size=large", 53_200),
    Published("hubert base, iteration 1", "hubert.py:size=base,iteration=1", 960),
    Published("hubert base, iteration 2", "hubert.py:size=base,iteration=2", 960),
    Published("hubert large", "hubert.py:size=large", 60_000),
    Published("hubert xlarge", "hubert.py:size=xlarge", 60_000),
    Published("wavlm base", "wavlm.py:size=base", 960, "batch of HuBERT"),
    Published("wavlm base_plus", "wavlm.py:size=base_plus", 94_000, "batch of HuBERT"),
    Published("wavlm large", "wavlm.py:size=large", 94_000, "batch of HuBERT"),
    Published("data2vec base", "data2vec.py:size=base", 960),
    Published("data2vec large", "data2vec.py:size=large", 60_000, "ours"),
    Published("data2vec base2", "data2vec.py:size=base2", 960),
    Published("data2vec large2", "data2vec.py:size=large2", 60_000),
    Published("w2v_bert xl", "w2v_bert.py:size=xl", 60_000, "ours"),
    Published("w2v_bert xxl", "w2v_bert.py:size=xxl", 60_000, "ours"),
    Published("best_rq paper", "best_rq.py:size=paper", 60_000, "ours"),
    Published("best_rq base", "best_rq.py:size=base", None),
    Published("best_rq nest", "best_rq.py:size=nest", None, "ours"),
    Published("spidr base", "spidr.py:size=base", 960),
    Published("spidr dinosr", "spidr.py:size=dinosr", 960),
)


# What whole runs took: (size, accelerators, their kind, peak FLOP/s, hours), from SpidR's code (its README; 23 h of its
# "day" are the paper's) and wav2vec 2.0, section 4.2 (5.2 days).
TOOK = (
    ("wav2vec2 large", 128, "V100", 125e12, 5.2 * 24),
    ("spidr base", 16, "A100", CHIPS["a100"].flops, 23.0),
    ("spidr base", 16, "H100", CHIPS["h100"].flops, 15.0),
)


@dataclass(frozen=True)
class Size:
    """What a config says: `flops` a second of audio in training, in crops of `crop` seconds; `batch` seconds."""

    parameters: int
    crop: float
    flops: float
    updates: int
    batch: float

    @property
    def heard(self) -> float:
        """Hours in all updates, padding included."""
        return self.updates * self.batch / 3600


@dataclass(frozen=True)
class Assumed:
    mfu: float = MFU
    useful: float = USEFUL


@functools.cache
def size_of(spec: str) -> Size:
    config = _load(spec)
    task = configs.make_task(config)
    batch = task_spec(config, task, Shape(1, 4 * SAMPLE_RATE))
    shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in batch.items()}
    state = jax.eval_shape(lambda: init_state(task, optax.identity(), 0, shapes))
    return Size(
        sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)), config.data.crop_seconds,
        flops_a_second(spec, config.data.crop_seconds), config.train.steps, config.data.batch_seconds,
    )  # fmt: skip


@functools.cache
def flops_a_second(spec: str, crop: float) -> float:
    samples = int(crop * SAMPLE_RATE)
    return flops.train_flops(_load(spec), samples) / (samples / SAMPLE_RATE)


def _load(spec: str) -> Any:
    return configs.load(f"{REPO}/configs/pretrain/{spec}")


def accelerator_hours(flops_a_second: float, hours: float, chip: str, mfu: float, useful: float = 1.0) -> float:
    """Of one pass over `hours` of audio that are the share `useful` of what is computed on."""
    computed = hours * 3600 * flops_a_second / useful
    return computed / (CHIPS[chip].flops * mfu * 3600)


def compact(number: float) -> str:
    """Three digits at least: 3.08, 27.0, 358, 1,234."""
    return f"{number:,.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f}"


# ---- rows of tables


def size_row(published: Published, hours: float, assumed: Assumed) -> str:
    size = size_of(published.spec)
    cells = [published.name, f"{size.parameters / 1e6:,.0f} M", f"{size.crop:.1f} s", f"{size.flops / 1e9:.1f}"]
    return _line([*cells, *_costs(size.flops, hours, assumed.mfu, assumed.useful)])


def cost_row(published: Published, hours: float, assumed: Assumed) -> str:
    return _line([published.name, *_costs(size_of(published.spec).flops, hours, assumed.mfu, assumed.useful)])


def recipe_row(published: Published, assumed: Assumed) -> str:
    size, corpus = size_of(published.spec), published.corpus
    cells = [
        published.name, f"{size.updates:,}", f"{size.batch:,.0f} s", compact(size.heard),
        f"{corpus:,} h" if corpus else "",
        compact(size.heard / corpus) if corpus and published.differs != "ours" else "",
        *_costs(size.flops, size.heard, assumed.mfu), published.differs,
    ]  # fmt: skip
    return _line(cells)


def _costs(flops_a_second: float, hours: float, mfu: float, useful: float = 1.0) -> list[str]:
    return [compact(accelerator_hours(flops_a_second, hours, chip, mfu, useful)) for chip in HARDWARE]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(names: Sequence[str], text: int = 1) -> list[str]:
    """Numbers stand right, the first `text` columns left."""
    return [_line([*names, *HARDWARE.values()]), "|" + "---|" * text + "--:|" * (len(names) - text + len(HARDWARE))]


# ---- the page


def page(hours: Sequence[int], assumed: Assumed) -> str:
    first, *others = hours
    parts = [
        _opening(assumed),
        f"## {first:,} hours, one pass\n\nAccelerator-hours, on one kind of hardware each.",
        "\n".join(
            _head(["model", "parameters", "crop", "GFLOP a second"])
            + [size_row(published, first, assumed) for published in PUBLISHED]
        ),
    ]
    for more in others:
        rows = [cost_row(published, more, assumed) for published in PUBLISHED]
        parts += [f"## {more:,} hours, one pass\n\nAccelerator-hours.", "\n".join(_head(["model"]) + rows)]
    heads = _head(["model", "updates", "an update", "hours heard", "corpus", "passes, at most"])
    heads = [f"{heads[0]} not the paper's |", f"{heads[1]}---|"]
    rows = [recipe_row(published, assumed) for published in PUBLISHED]
    parts += [_RECIPES, "\n".join(heads + rows), _took(), _example(first, assumed), _READERS]
    return "\n\n".join(parts) + "\n"


def _opening(assumed: Assumed) -> str:
    peaks = ", ".join(f"{name} {CHIPS[chip].flops / 1e12:,.0f}" for chip, name in HARDWARE.items())
    longer = ", ".join(
        f"{flops_a_second(_of(EXAMPLE).spec, crop) / 1e9:.1f} at {crop:.0f} s" for crop in (10.0, 20.0, 40.0)
    )
    forward = size_of(_of(UNITS_FROM).spec).flops / 3
    units = compact(accelerator_hours(forward, 100_000, "h100", assumed.mfu, assumed.useful))
    return f"""# What a large run costs

`tests/real/cost_page.py` writes this page.  Nothing on it was measured on an accelerator: it is arithmetic on a count
of FLOPs, under the assumptions below.

    accelerator-hours = hours x 3600 x FLOPs a second of audio x passes / useful
                        --------------------------------------------------------
                                       peak FLOP/s x MFU x 3600

- **hours** of audio in the corpus.  A run hears each of them once a pass; the tables are of one pass.
- **FLOPs a second of audio**: `speechjax.flops.train_flops` of the config of that size, on a row of its own crop
  length: products of the model and its heads, forward and backward.  A teacher, which only listens, counts a third of
  what learns; data2vec 2.0 computes its encoder once for each of 8 or 12 masks.
- **useful = {_percent(assumed.useful)}**: the share of a batch that is audio; what is computed on padding is lost.
  On the lengths of LibriSpeech's utterances it was measured (BUILD_NOTES.md) as 93.2 % with `data.shapes=8`, 89.0 %
  with 5, 81.5 % with 3 (the configs have 4), and 99.7 % in filled rows (`data.fill`).
- **peak FLOP/s**: the vendors' numbers for dense products in bfloat16, in TFLOP/s of a chip:
  {peaks}.
- **MFU = {_percent(assumed.mfu)}**: the share of that peak that the products of the model reach.  It is a goal: we have
  not measured it on accelerators.  The costs are inversely proportional to it: at 25 % they are
  x {assumed.mfu / 0.25:.3g}, at 50 % x {assumed.mfu / 0.5:.3g}.

What moves the numbers:

- **Nothing is computed twice.**  Where every layer is (`model.remat`, which the configs switch on), multiply by 4/3.
  An MFU that was measured with it on needs no such factor, because it counts only the products of the model.
- **Attention grows with the crop**, so longer crops cost more a second.  Of {EXAMPLE}, in GFLOP:
  {longer}.  Rows shorter than the crop cost less; here all are as long.
- **An epoch is less than a pass** where recordings are longer than a crop: one crop of each is heard, and the rest
  waits for other epochs.  The log of a run says how much of the audio survives.

What is not in them:

- evaluation, restarts, compiling, and the time of checkpoints that training waits for;
- the units of HuBERT and WavLM.  Their features are a forward pass of the previous model over the corpus, a third of
  its training FLOPs: of 100,000 h through the first HuBERT Base {units} hours of an H100 at the same MFU, if all layers
  are computed.  k-means comes on top;
- preparation of the data, which runs on CPUs;
- elementwise work and the optimizer, as FLOPs.  As time they are part of why the MFU is not 100 %.

Wall time is accelerator-hours divided by the number of accelerators, where the MFU holds on so many."""


def _of(name: str) -> Published:
    return next(published for published in PUBLISHED if published.name == name)


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


_RECIPES = """## What the published recipes cost

Hours heard are `train.steps` x `data.batch_seconds` of the config, padding included, so that nothing is divided by the
useful share here; all at the same MFU.  Passes are those hours over the paper's corpus, "at most", because some of a
batch is padding.  Corpora: 960 h LibriSpeech, 60,000 h Libri-Light, 53,200 h what wav2vec 2.0 kept of it, 94,000 h
WavLM's mixture; blank where we cannot say it surely.  The last column says what of a recipe's length is not its
paper's: "ours" where updates or batch are not published or were not checked against the paper; then passes are blank.
HuBERT Large and X-Large learn units of the second iteration of Base, and so need the two Base runs before them."""


def _took() -> str:
    """How far from the assumed MFU published runs were."""
    lines = []
    for name, count, kind, peak, hours in TOOK:
        size = size_of(_of(name).spec)
        share = f"{100 * size.heard * size.flops / (count * hours * peak):.0f} %"
        lines.append(f"- {name}: {hours:.0f} h on {count} {kind}, {compact(count * hours)} in all: an MFU of {share}.")
    text = "\n".join(lines)
    return f"""## Beside what published runs took

The hours of three runs are published; all were made with PyTorch.  The same count of FLOPs, divided by those hours and
the peak ({TOOK[0][3] / 1e12:.0f} TFLOP/s are those of a V100's tensor cores), says what MFU they had, everything else
included:

{text}

The tables are costs at a goal, and these runs were far from it: measure before you budget."""


def _example(hours: float, assumed: Assumed) -> str:
    chip = "v5p"
    size = size_of(_of(EXAMPLE).spec)
    seconds = hours * 3600
    rate = CHIPS[chip].flops * assumed.mfu
    cost = accelerator_hours(size.flops, hours, chip, assumed.mfu, assumed.useful)
    lines = [
        ("audio", f"{hours:,} h x 3600", f"{seconds:.4g} s"),
        ("computed on", f"{seconds:.4g} s / {assumed.useful:g}", f"{seconds / assumed.useful:.4g} s"),
        ("FLOPs", f"{seconds / assumed.useful:.4g} s x {size.flops / 1e9:.1f}e9",
         f"{seconds / assumed.useful * size.flops:.4g}"),
        ("of one accelerator", f"{CHIPS[chip].flops / 1e12:,.0f}e12 x {assumed.mfu:g}", f"{rate:.4g} FLOP/s"),
        ("time", f"{seconds / assumed.useful * size.flops:.4g} / {rate:.4g}", f"{cost * 3600:.4g} s"),
        ("cost", f"{cost * 3600:.4g} s / 3600", f"{compact(cost)} h of {HARDWARE[chip]}"),
    ]  # fmt: skip
    text = "\n".join(f"    {name:<20}{sum_:<28} = {result}" for name, sum_, result in lines)
    return f"## One cell, line by line\n\n{EXAMPLE}, {hours:,} h, {HARDWARE[chip]}:\n\n{text}"


_READERS = """## Your own hours and MFU

    python tests/real/cost_page.py --mfu=0.5 --hours=30000,200000 --out=FILE

Filled rows are `--useful=0.997`.  On hardware that is there, `python -m speechjax.bench --what=train --config=...`
measures the train step; the MFU of this page is its column "of published"."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mfu", type=float, default=MFU, help="share of the peak that the model's products reach")
    parser.add_argument("--useful", type=float, default=USEFUL, help="share of a batch that is audio")
    parser.add_argument("--hours", default=",".join(map(str, HOURS)), help="corpora, in hours: a table each")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    for name in ("mfu", "useful"):
        if not 0 < getattr(args, name) <= 1:
            parser.error(f"--{name}={getattr(args, name)}: above 0, at most 1")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page([int(hours) for hours in args.hours.split(",")], Assumed(args.mfu, args.useful)))


if __name__ == "__main__":
    main()

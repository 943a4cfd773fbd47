"""The model card of a folder for `transformers`: what it is, how good, how to use it, and where it differs.

It says what the run knows and nothing else: no path of the machine it ran on, no license, no language that nobody
named.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from speechjax import runs
from speechjax.data.mixture import parse_mixture
from speechjax.display import display
from speechjax.errors import UserError
from speechjax.formats.families import Family
from speechjax.formats.heads import Head
from speechjax.logs import read_metrics

_PIPELINES = {
    "ctc": "automatic-speech-recognition", "classify": "audio-classification", "frames": "audio-classification",
    "speaker": "audio-classification",
}  # fmt: skip
_NO_HEAD = "feature-extraction"
_OBJECTIVES = {
    "wav2vec2": "wav2vec 2.0: contrastive prediction of quantized masked features",
    "hubert": "HuBERT: prediction of the discrete units of masked frames",
    "wavlm": "WavLM: prediction of the units of masked frames in mixed or noisy speech",
    "data2vec": "data2vec: regression on what a moving average of the model sees in the whole utterance",
    "w2v_bert": "w2v-BERT: contrastive learning of codes and masked prediction of these codes",
    "best_rq": "BEST-RQ: masked prediction of the codes of a frozen random projection",
    "ctc": "speech recognition, connectionist temporal classification",
    "classify": "one label a recording", "frames": "labels of frames", "speaker": "embeddings of speakers",
}  # fmt: skip
_PAPERS = {
    "wav2vec2": ("Baevski, Zhou, Mohamed, Auli", "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech "
                 "Representations", 2020, "2006.11477"),
    "hubert": ("Hsu, Bolte, Tsai, Lakhotia, Salakhutdinov, Mohamed", "HuBERT: Self-Supervised Speech Representation "
               "Learning by Masked Prediction of Hidden Units", 2021, "2106.07447"),
    "wavlm": ("Chen et al.", "WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing", 2021,
              "2110.13900"),
    "data2vec": ("Baevski, Hsu, Xu, Babu, Gu, Auli", "data2vec: A General Framework for Self-supervised Learning in "
                 "Speech, Vision and Language", 2022, "2202.03555"),
    "w2v_bert": ("Chung, Zhang, Han, Chiu, Qin, Pang, Wu", "W2v-BERT: Combining Contrastive Learning and Masked "
                 "Language Modeling for Self-Supervised Speech Pre-Training", 2021, "2108.06209"),
    "best_rq": ("Chiu, Qin, Zhang, Yu, Wu", "Self-supervised Learning with Random-projection Quantizer for Speech "
                "Recognition", 2022, "2202.01855"),
}  # fmt: skip
_SHOWN = 24  # metrics of a split
_BESIDE = ("_low", "_high")  # limits of a metric, beside it
_UNSAID = ("step", "split", "seconds")


def card(
    run: Any, hf: Mapping[str, Any], family: Family, head: Head | None, why: str, pretraining: str
) -> str:  # fmt: skip
    """README.md of what hf.py writes: `hf` is its config.json, `head` its head or None because of `why`.

    `pretraining` is the task that the encoder was pretrained with, as far as the run knows.
    """
    method = pretraining if pretraining in _PAPERS else family.pretraining
    sections = {
        "": _what(run, hf, family),
        "## Results": _results(run),
        "## Use in transformers": f"```python\n{_code(hf, head)}```\n",
        "## Use in speechjax": _ours(head),
        "## Known limits": "".join(f"- {line}\n" for line in _limits(hf, family, head, why)),
        "## Citation": _citation(method),
    }
    text = "\n".join(f"{title}\n\n{body}" if title else body for title, body in sections.items())
    return f"{_front(run, family, head, method)}\n# {_plain(run.workdir.name)}\n\n{text}"


def _front(run: Any, family: Family, head: Head | None, method: str) -> str:
    """What the hub reads."""
    found = re.fullmatch(r"phonemes:([a-z]{2,3})(-[\w-]+)?", run.config.data.get("text", ""))
    language = [f"language: {found[1]}"] if found and head and head.task == "ctc" else []
    tags = dict.fromkeys(["speechjax", "speech", "audio", family.model_type, method, run.config.task.name])
    lines = [
        "---", "library_name: transformers", f"pipeline_tag: {_PIPELINES.get(head.task if head else '', _NO_HEAD)}",
        *language, "tags:", *(f"- {tag}" for tag in tags), "# license: is yours to choose, and depends on the data",
        "---", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _what(run: Any, hf: Mapping[str, Any], family: Family) -> str:
    config = run.config
    task = config.task.name
    hop, _ = run.task.encoder.frame_len()
    count = sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"]))
    facts = {
        "class": f"`{hf['architectures'][0]}`",
        "task": _OBJECTIVES.get(task, task),
        "encoder": f"{family.model_type}, {hf['num_hidden_layers']} layers of width {hf['hidden_size']}, "
                   f"{hf['num_attention_heads']} heads",
        "input": f"mono audio at 16 kHz; a frame every {hop / 16:g} ms",
        "parameters": f"{count:,} in the run, weights stored as {hf['dtype']}",
        **_origin(run),
    }  # fmt: skip
    lines = "".join(f"| {key} | {_cell(value)} |\n" for key, value in facts.items())
    return (
        "A speech model, written for transformers by speechjax, which is JAX.\n\n| | |\n|---|---|\n" + lines
        + "\n`speechjax.json` holds the whole configuration of the run, data sources with their folders included:\n"
        "look at it before you publish this one.\n"
    )  # fmt: skip


def _origin(run: Any) -> dict[str, str]:
    """What it learnt from, or where its weights come from."""
    source = _source(run)
    if "format" in source:  # merged or pruned runs were trained here
        where = next((str(source[key]) for key in ("source", "file") if source.get(key)), "")
        return {"weights": f"converted, not trained here: {source['format']}, {_last(where)}"}
    found = {"updates": f"{run.step:,}", "data": _data(str(run.config.data.get("source", "")))}
    for key in ("text", "units", "label"):
        if value := run.config.data.get(key, ""):
            found[f"learns {key}"] = _named(str(value))
    if run.config.get("init_from"):
        found["began with"] = _last(str(run.config.init_from))
    return found


def _source(run: Any) -> dict[str, Any]:
    try:
        found = json.loads((run.workdir / runs.SOURCE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _data(source: str) -> str:
    """Kinds and last names of data sources: not the folders of this machine."""
    try:
        parts = parse_mixture(source)
    except UserError:
        return "unknown"
    return " + ".join(
        _named(part.source) + (f", {part.hours:g} h" if part.hours else "")
        + (f", weight {part.weight:g}" if part.weight != 1 else "")
        for part in parts
    )  # fmt: skip


def _named(source: str) -> str:
    """`folder:/data/speech` -> `folder:speech`; data sets of TensorFlow are known by all of their name."""
    kind, colon, rest = source.partition(":")
    return source if kind == "tfds" else f"{kind}:{_last(rest)}" if colon else _last(source)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _plain(text: str) -> str:
    """In one line, and nothing that Markdown takes for its own."""
    return re.sub(r"[\s`|<>\[\]*#]+", " ", text).strip() or "model"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


# ---------------------------------------------------------------------------------------------- results


def _results(run: Any) -> str:
    """A table a split, of what was measured at this step or last before it."""
    entries = [entry for entry in read_metrics(run.workdir) if entry["step"] <= run.step and entry["split"] != "alarm"]
    newest = {entry["split"]: entry for entry in sorted(entries, key=lambda entry: entry["step"])}
    tables = [_table(str(split), newest[split]) for split in sorted(newest, key=lambda name: (name == "train", name))]
    return "\n".join(tables) or "Nothing was measured in this run: try the model on recordings of your own.\n"


def _table(split: str, entry: Mapping[str, Any]) -> str:
    numbers = {
        key: value for key, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in _UNSAID
        and not (key.endswith(_BESIDE) and key.rpartition("_")[0] in entry)
    }  # fmt: skip
    lines = []
    for key in list(numbers)[:_SHOWN]:
        number = display(key).number
        ends = [number(entry[key + end]) for end in _BESIDE if key + end in entry]
        lines.append(f"| {_cell(key)} | {number(numbers[key])} | {' to '.join(ends)} |\n")
    head = f"{_plain(split)}, step {entry['step']:,}\n\n| metric | value | 95 % interval |\n|---|---|---|\n"
    return head + "".join(lines)


# ---------------------------------------------------------------------------------------------- use


def _code(hf: Mapping[str, Any], head: Head | None) -> str:
    """A program that runs in the folder."""
    audio = "audio = np.zeros(16000, np.float32)  # a second of mono audio at 16 kHz, from -1 to 1\n"
    if head and head.task in ("ctc", "classify"):
        said = '["text"]' if head.task == "ctc" else ""
        return (
            "import numpy as np\nimport transformers\n\n"
            f'pipe = transformers.pipeline("{_PIPELINES[head.task]}", model=".")\n{audio}answer = pipe(audio){said}\n'
        )
    name, answer = hf["architectures"][0], "last_hidden_state  # [1, T, D]"
    if head:
        answer = {
            "frames": "logits.softmax(-1)  # [1, T, classes]", "speaker": "embeddings  # [1, E]; compare by cosine",
        }.get(head.task, "projected_states  # [1, T, D]; or use model.base_model for features")  # fmt: skip
    return (
        "import numpy as np\nimport torch\nimport transformers\n\n"
        'extractor = transformers.AutoFeatureExtractor.from_pretrained(".")\n'
        f'model = transformers.{name}.from_pretrained(".").eval()\n{audio}'
        'inputs = extractor(audio, sampling_rate=16000, return_tensors="pt")\n'
        f"with torch.no_grad():\n    answer = model(**inputs).{answer}\n"
    )


def _ours(head: Head | None) -> str:
    answer = "model.transcribe(audio)" if head and head.task == "ctc" else "model.features(audio)  # [T, D]"
    return (
        f'```python\nimport speechjax\n\nmodel = speechjax.load("FOLDER")\nanswer = {answer}\n```\n\n'
        "`python -m speechjax.convert --from=hf:FOLDER --workdir=RUN` makes a run of it, to go on training or to "
        "fine-tune.\n"
    )


def _limits(hf: Mapping[str, Any], family: Family, head: Head | None, why: str) -> Iterator[str]:
    if hf.get("feat_extract_norm") == "group":
        yield (
            "The group norm of the first convolution averages over padding too in transformers: of recordings of "
            "different lengths in one batch the shorter ones change.  speechjax leaves padding out; in transformers "
            "give one recording at a time, or some of one length."
        )
    if family.model_type in ("data2vec-audio", "wav2vec2-conformer"):
        what = "positions" if family.model_type == "data2vec-audio" else "layers"
        yield f"Convolutions of the {what} hear padding in transformers: the last frames of padded rows differ."
    if family.model_type == "wav2vec2-bert":
        yield "Features are computed by another program in transformers, equal to about 0.002."
    if head and head.task == "speaker":
        yield (
            "ForXVector of transformers averages over frames of padding in padded batches, because its count of frames "
            "forgets the dilation of its layers: embed recordings one at a time."
        )
    if head and head.task == "ctc":
        yield (
            "`<s>`, `</s>` and `<unk>` are classes without a sound.  They have a little of the probability, and where "
            "one of them wins, the text of transformers shows its name."
        )
    if head is None and why:
        yield f"There is no head in this class ({_cell(why)}); it is in speechjax.safetensors, for speechjax alone."
    if hf["dtype"] != "float32":
        yield f"Weights are {hf['dtype']}, rounded from float32."
    yield "It was tested for being the same model in both libraries, not for what it is used for: that is yours to do."


def _citation(method: str) -> str:
    authors, title, year, arxiv = _PAPERS[method]
    return f"{authors}: *{title}*, {year}, [arXiv:{arxiv}](https://arxiv.org/abs/{arxiv}).\n"

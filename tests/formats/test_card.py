"""Model cards: what they say of a run, and what they do not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hf_folders import as_run, write_folder
from hf_golden import COVERED
from hf_models import VARIANTS, suffixes

from speechjax.formats import hf
from speechjax.runs import SOURCE, Run

SECTIONS = ["Results", "Use in transformers", "Use in speechjax", "Known limits", "Citation"]
PIPELINES = {
    "ForCTC": "automatic-speech-recognition", "ForSequenceClassification": "audio-classification",
    "ForAudioFrameClassification": "audio-classification", "ForXVector": "audio-classification",
}  # fmt: skip
CASES = [("hubert-layer-pre", suffix) for suffix in suffixes("hubert")]
CASES += [("wav2vec2-group-post", "ForPreTraining"), ("wav2vec2-group-post", "ForXVector"), ("bert", "Model")]


def parts(card: str) -> tuple[dict[str, Any], str]:
    """(what the hub reads, the text)."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def card_of(folder: Path, name: str, suffix: str, encoder_only: bool = False) -> str:
    run = as_run(write_folder(folder / "theirs", name, suffix), folder / "run")
    hf.write(run, folder / "out", encoder_only=encoder_only)
    return (folder / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_every_class_has_a_card(name, suffix, tmp_path):
    card = card_of(tmp_path, name, suffix, suffix == "Model")
    front, text = parts(card)
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == PIPELINES.get(suffix, "feature-extraction")
    assert {"speechjax", VARIANTS[name]["model_type"]} <= set(front["tags"])
    assert front.keys() == {"library_name", "pipeline_tag", "tags"}, "nobody said which language or license"
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert re.search(rf"\| class \| `\w+{suffix}` \|", text)
    assert "converted, not trained here: hf, theirs" in text
    assert str(tmp_path) not in card
    assert not re.search(r"(^|[\s(|`])/\w+/", card), "an absolute path"
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for program in code:
        compile(program, "card", "exec")
    assert len(code) == 2
    assert ("one recording at a time" in text) == (VARIANTS[name].get("feat_extract_norm") == "group")
    assert ("forgets the dilation" in text) == (suffix == "ForXVector")
    assert ("`<s>`, `</s>` and `<unk>` are classes" in text) == (suffix == "ForCTC")
    assert ("Features are computed by another program" in text) == (name == "bert")


def test_citations_and_limits_of_families(tmp_path):
    said = {name: card_of(tmp_path / name, name, "ForCTC", encoder_only=True) for name in COVERED}
    arxiv = {name: re.findall(r"arXiv:([\d.]+)\]", card) for name, card in said.items()}
    assert arxiv["hubert-layer-pre"] == ["2106.07447"]
    assert arxiv["wav2vec2-group-post"] == arxiv["conformer-rotary"] == ["2006.11477"]
    assert (arxiv["wavlm-group-pre"], arxiv["data2vec-audio"], arxiv["bert"]) == (
        ["2110.13900"], ["2202.03555"], ["2108.06209"],
    )  # fmt: skip
    hears = {name for name, card in said.items() if "hear padding in transformers" in card}
    assert hears == {"data2vec-audio", "conformer-relative", "conformer-rotary"}


@pytest.fixture
def trained(tmp_path) -> Run:
    """As if trained: with data, a language and measurements."""
    base = as_run(write_folder(tmp_path / "theirs", "hubert-layer-pre", "ForCTC"), tmp_path / "run")
    (tmp_path / "run" / SOURCE).unlink()
    config = base.config.copy_and_resolve_references()
    config.data.text = "phonemes:de-at"
    config.data.source = "folder:/home/me/kerstin audio?hours=10 + tfds:librispeech/clean:train + manifest:../x|y.jsonl"
    config.init_from = "/home/me/runs/hubert@best"
    entries = [
        dict(step=100, split="train", loss=0.5, seconds=3.2),
        dict(step=100, split="recognition", word_error=0.31, word_error_low=0.29, word_error_high=0.33, bad=None),
        dict(step=200, split="recognition", word_error=0.21, word_error_low=0.19, word_error_high=0.23),
        dict(step=200, split="alarm", name="loss", message="high"),
        dict(step=300, split="recognition", word_error=0.11, word_error_low=0.1, word_error_high=0.12),
    ]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"step": 301, "spl')
    return Run(**{**vars(base), "config": config, "step": 200})


def test_what_a_run_knows(trained, tmp_path):
    hf.write(trained, tmp_path / "out", family="hubert", dtype="bfloat16")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    front, text = parts(card)
    assert front["language"] == "de"
    for line in (
        r"| updates | 200 |",
        r"| data | folder:kerstin audio, 10 h + tfds:librispeech/clean:train + manifest:x\|y.jsonl |",
        "| learns text | phonemes:de-at |",
        "| began with | hubert@best |",
        "| word_error | 21.0% | 19.0% to 23.0% |",
        "| loss | 0.5 |  |",
        "Weights are bfloat16, rounded from float32.",
        "HuBERT: Self-Supervised Speech Representation Learning",
    ):
        assert line in text, line
    assert "recognition, step 200" in text
    for line in ("31.0%", "11.0%", "/home/me", "alarm", "seconds", "word_error_low", str(tmp_path)):
        assert line not in card, line


def test_damaged_metrics_are_none(trained, tmp_path):
    (trained.workdir / "metrics.jsonl").write_bytes(b"\xff\xfe\n{}\n[1]\n")
    hf.write(trained, tmp_path / "out")
    assert "Nothing was measured in this run" in (tmp_path / "out" / "README.md").read_text("utf-8")

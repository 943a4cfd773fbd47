"""Parity with the library peft itself: an adapter of ours on a model of transformers, and one of peft's here.

Needs torch, transformers and peft, which the project does not; skipped where they are missing.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hf_folders import adapted, as_run, write_folder
from hf_models import VARIANTS, answers, differences, leaking, make_inputs, their_answers

from speechjax.adapter_files import attach
from speechjax.formats import hf
from speechjax.formats import peft as ours
from speechjax.formats.families import FAMILIES
from speechjax.runs import Run

torch = pytest.importorskip("torch", reason="live parity needs torch, transformers and peft")
transformers = pytest.importorskip("transformers", reason="live parity needs torch, transformers and peft")
peft: Any = pytest.importorskip("peft", reason="live parity needs torch, transformers and peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn of each other

CLOSE = 2e-5  # float32, outputs are 1 to 4 in size
LORA = dict(kind="lora", name="low", targets="attention/(query|value)$", rank=2, alpha=6.0, dropout=0.1)
WIDE = LORA | dict(targets="attention/(query|key|value|out)$|mlp_(up|down)$|(^|/)projection$")
CONFORMER = LORA | dict(targets="attention/(query|key|value|out)$|mlp[12]_(up|down)$|conv/pointwise_(in|out)$")
IA3 = dict(kind="ia3", name="scales")
CASES = [
    ("wav2vec2-group-post", "ForCTC", LORA), ("wav2vec2-group-post", "ForPreTraining", WIDE),
    ("hubert-layer-pre", "Model", IA3), ("hubert-layer-pre", "ForSequenceClassification", WIDE),
    ("data2vec-audio", "ForAudioFrameClassification", LORA), ("wavlm-group-pre", "ForCTC", WIDE),
    ("wavlm-group-pre", "ForCTC", IA3), ("wavlm-group-pre", "ForXVector", LORA), ("bert", "ForCTC", CONFORMER),
    ("bert", "Model", IA3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def our_answers(run: Run, name: str, params: Any = None) -> dict[str, np.ndarray]:
    extra = {key: part for key, part in run.variables.items() if key != "params"}
    return answers(leaking(run.config), params or run.variables["params"], extra, make_inputs(VARIANTS[name]))


@pytest.mark.parametrize(("name", "suffix", "block"), CASES)
def test_ours_there(name, suffix, block, tmp_path, monkeypatch):
    """As README.md of the folder says it, with a head that their base has not learnt."""
    base = as_run(write_folder(tmp_path / "theirs", name, suffix), tmp_path / "run")
    run = adapted(base, block)
    hf.write(base, tmp_path / "BASE", encoder_only=True)
    ours.write(run, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    code = code.replace('"."', '"adapter"').replace('"BASE"', '"BASE", attn_implementation="eager"')
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)
    model = scope["model"]
    if "merge_and_unload" in text:
        model = model.merge_and_unload()
    state = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key or "ia3_" in key}
    assert state or "merge_and_unload" in text
    theirs = their_answers(model, make_inputs(VARIANTS[name]))
    if suffix == "ForXVector":
        assert "last" in theirs  # the head stays here
    found = differences(our_answers(run, name), theirs)
    assert max(found.values()) < CLOSE, found
    expected = {"Model": "last", "ForXVector": "last", "ForPreTraining": "targets"}.get(suffix, "logits")
    assert expected in found
    without = differences(our_answers(base, name), theirs)
    assert without["hidden1"] > 1e-2, "negative control: without the adapter"


def test_wavlm_passes_peft_by(tmp_path):
    """Why its folder says merge_and_unload: without, an adapter of its attention does nothing at all."""
    base = as_run(write_folder(tmp_path / "theirs", "wavlm-group-pre", "ForXVector"), tmp_path / "run")
    hf.write(base, tmp_path / "base", encoder_only=True)
    ours.write(adapted(base, LORA), tmp_path / "adapter")
    plain = transformers.WavLMModel.from_pretrained(tmp_path / "base").eval()
    inputs = make_inputs(VARIANTS["wavlm-group-pre"])
    before = their_answers(plain, inputs)["last"]
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    np.testing.assert_allclose(their_answers(model, inputs)["last"], before, atol=1e-5)  # float32
    merged = their_answers(model.merge_and_unload(), inputs)["last"]
    assert np.abs(merged - before).max() > 1e-2, "negative control"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("wav2vec2-group-post", dict(r=3, lora_alpha=5, target_modules=["q_proj", "out_proj", "output_dense"])),
        ("hubert-layer-pre", dict(r=2, lora_alpha=3, use_rslora=True, target_modules="all-linear")),
        ("data2vec-audio", dict(r=2, target_modules=["v_proj"], layers_to_transform=[1])),
        ("bert", dict(r=4, lora_alpha=1, target_modules=["linear_q", "pointwise_conv1", "ffn2.output_dense"])),
        ("hubert-layer-pre", None),
    ],
)
def test_theirs_here(name, config, tmp_path):
    """Made, drawn and saved by peft; IA3 where no LoRA is said, without a scale for values."""
    folder = write_folder(tmp_path / "theirs", name)
    base = as_run(folder, tmp_path / "run")
    model = getattr(transformers, FAMILIES[VARIANTS[name]["model_type"]].stem + "Model").from_pretrained(folder)
    if config is None:
        made = peft.IA3Config(target_modules=["k_proj", "output_dense"], feedforward_modules=["output_dense"])
    else:
        made = peft.LoraConfig(**config)
    model = peft.get_peft_model(model, made).eval()
    torch.manual_seed(0)
    for key, tensor in model.named_parameters():
        if "lora_" in key or "ia3_" in key:
            tensor.data += 0.2 * torch.randn(tensor.shape)
    model.save_pretrained(tmp_path / "adapter")
    theirs = their_answers(model, make_inputs(VARIANTS[name]))

    found = ours.read(Path(tmp_path / "adapter"), base)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_version"].startswith("0.")
    run = adapted(base, *found.adapters)
    params = attach(base.variables["params"], [found])
    assert max(differences(our_answers(run, name, params), theirs).values()) < CLOSE
    assert max(differences(our_answers(base, name), theirs).values()) > 1e-2, "negative control"

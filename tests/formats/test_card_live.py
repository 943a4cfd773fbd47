"""The programs on model cards run, under transformers: needs it and torch, else skipped."""

import re
from typing import Any

import numpy as np
import pytest
from hf_folders import as_run, write_folder
from hf_models import VARIANTS, suffixes

from speechjax.formats import hf

pytest.importorskip("torch", reason="cards are tried with torch and transformers")
pytest.importorskip("transformers", reason="cards are tried with torch and transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn of each other

CASES = [(name, suffix) for name in ("wav2vec2-group-post", "data2vec-audio") for suffix in
         suffixes(VARIANTS[name]["model_type"])]  # fmt: skip


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_the_program_of_a_card(name, suffix, tmp_path, monkeypatch):
    run = as_run(write_folder(tmp_path / "theirs", name, suffix), tmp_path / "run")
    hf.write(run, tmp_path / "out", encoder_only=suffix == "Model")
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    theirs, ours = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    scope: dict[str, Any] = {}
    exec(theirs, scope)
    answer = scope["answer"]
    if suffix == "ForCTC":
        assert isinstance(answer, str)
    elif suffix == "ForSequenceClassification":
        assert {entry["label"] for entry in answer} <= {f"class {k}" for k in range(5)}
    else:
        assert answer.shape[0] == 1
        assert np.isfinite(answer.numpy()).all()
    exec(ours.replace("FOLDER", "."), scope)
    assert isinstance(scope["answer"], str) if suffix == "ForCTC" else scope["answer"].ndim == 2

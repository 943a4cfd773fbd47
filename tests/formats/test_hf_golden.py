"""Parity with `transformers` without it: stored weights and answers of every family and class.

The live test, tests/formats/test_hf_live.py, has more variants.  Every case goes through the file system, both ways.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_folders import as_run, state_of, write_folder
from hf_golden import COVERED, answers
from hf_models import VARIANTS, differences, leaking, make_inputs, suffixes
from hf_models import answers as our_answers

from speechjax.errors import UserError
from speechjax.formats import hf, imports
from speechjax.formats.names import Arrays
from speechjax.paths import unstacked
from speechjax.runs import Run
from tests.choice import some

CLOSE = 2e-5  # float32, sums in another order; measured 6e-6, outputs are 1 to 4 in size
QUICK = [(name, "Model") for name in COVERED] + [
    ("wav2vec2-group-post", "ForPreTraining"),
    ("hubert-layer-pre", "ForCTC"),
]
CASES = [(name, suffix) for name in COVERED for suffix in suffixes(VARIANTS[name]["model_type"])]


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def leaves_of(run: Run) -> Arrays:
    return unstacked(flatten_dict(hf.jax_free(run.variables), sep="/"))


@pytest.mark.parametrize(("name", "suffix"), some(CASES, QUICK))
def test_answers_and_the_way_back(name, suffix, tmp_path):
    """Theirs is read and answers as there; written and read again, every bit is what it was."""
    run = as_run(write_folder(tmp_path / "theirs", name, suffix), tmp_path / "run")
    ours = our_answers(leaking(run.config), *variables_of(run), make_inputs(VARIANTS[name]))
    stored = answers(name, suffix)
    found = differences(ours, stored)
    assert max(found.values()) < CLOSE, found
    assert {"hidden0", "hidden1", "hidden2", *EXTRA[suffix]} == found.keys() - {"last"}

    hf.write(run, tmp_path / "back", encoder_only=suffix == "Model")
    first, back = hf.read(tmp_path / "theirs"), hf.read(tmp_path / "back")
    assert (back.family, back.head, back.ours["step"]) == (first.family, first.head, 0)
    for key, array in first.state.items():
        np.testing.assert_array_equal(back.state[key], array, err_msg=key)
    equal_leaves(imports.as_run(back)[1], leaves_of(run))
    # Without the file beside, as another program would have saved it.
    alone = imports.as_run(dataclasses.replace(back, ours={}, rest={}))
    equal_leaves(alone[1], imports.as_run(first)[1])
    assert alone[0].model.to_dict() == imports.as_run(first)[0].model.to_dict()
    assert imports.as_run(back)[0].to_dict() == run.config.to_dict()


EXTRA: dict[str, set[str]] = {
    "Model": set(), "ForPreTraining": {"context", "targets"}, "ForXVector": {"embeddings"},
    "ForCTC": {"logits"}, "ForSequenceClassification": {"logits"}, "ForAudioFrameClassification": {"logits"},
}  # fmt: skip


def variables_of(run: Run) -> tuple[Any, Any]:
    return run.variables["params"], {key: part for key, part in run.variables.items() if key != "params"}


def equal_leaves(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key, strict=True)


def test_parity_notices_one_wrong_weight(tmp_path):
    """Negative control: rows of one kernel in reverse."""
    name, key = "hubert-layer-pre", "hubert.encoder.layers.1.attention.out_proj.weight"
    state = state_of(name, "ForCTC")
    folder = write_folder(tmp_path / "theirs", name, "ForCTC", state | {key: state[key][::-1]})
    run = as_run(folder, tmp_path / "run")
    ours = our_answers(leaking(run.config), *variables_of(run), make_inputs(VARIANTS[name]))
    found = differences(ours, answers(name, "ForCTC"))
    assert found["hidden1"] < CLOSE < 1e-2 < min(found["hidden2"], found["logits"])


@pytest.mark.parametrize("name", ["wavlm-group-pre", "conformer-relative"])
def test_weighted_layers(name, tmp_path):
    """A softmax over the outputs of all layers, as their heads add them up, of the stored ones."""
    suffix, weights = "ForAudioFrameClassification", np.array([0.3, -0.9, 0.6], np.float32)
    state = state_of(name, suffix) | dict(layer_weights=weights)
    run = as_run(write_folder(tmp_path / "theirs", name, suffix, state, use_weighted_layer_sum=True), tmp_path / "run")
    stored = answers(name, suffix)
    mixed = sum(np.exp(w) * stored[f"hidden{i}"] for i, w in enumerate(weights)) / np.exp(weights).sum()
    expected = mixed @ state["classifier.weight"].T + state["classifier.bias"]
    ours = our_answers(leaking(run.config), *variables_of(run), make_inputs(VARIANTS[name]))
    assert differences(ours, dict(logits=expected))["logits"] < CLOSE
    assert differences(ours, dict(logits=stored["logits"]))["logits"] > 1e-2, "negative control"
    hf.write(run, tmp_path / "back")
    np.testing.assert_array_equal(hf.read(tmp_path / "back").state["layer_weights"], weights)


@pytest.mark.parametrize("dtype", hf.DTYPES)
def test_narrow_files(dtype, tmp_path):
    """What is written narrow is narrow on disk, says so, and is read as the float32 that it stands for."""
    state = {key: array + np.float32(1e-3) for key, array in state_of("hubert-layer-pre", "ForCTC").items()}
    run = as_run(write_folder(tmp_path / "theirs", "hubert-layer-pre", "ForCTC", state), tmp_path / "run")
    path = hf.write(run, tmp_path / "back", dtype=dtype)
    back = hf.read(tmp_path / "back")
    assert (back.family.model_type, back.hf["dtype"]) == ("hubert", dtype)
    assert path.stat().st_size < sum(a.size for a in state.values()) * (4 if dtype == "float32" else 2) + 20_000
    for key, array in state.items():
        stands_for = hf.as_dtype(array, dtype).astype(np.float32)
        np.testing.assert_array_equal(back.state[key.removeprefix("hubert.")], stands_for, err_msg=key, strict=True)


def test_float16_has_an_end():
    with pytest.raises(UserError, match=r"--dtype=float16 ends at 65504, and a weight is 7e\+04: use bfloat16"):
        hf.as_dtype(np.array([1, -7e4], np.float32), "float16")
    assert hf.as_dtype(np.array([1, np.inf], np.float32), "float16")[1] == np.inf  # as it was

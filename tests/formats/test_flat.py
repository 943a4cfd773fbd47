"""Whole models in folders of plain files: what comes back, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from speechjax.errors import UserError
from speechjax.formats import flat
from speechjax.formats.arrays import read_arrays, write_arrays
from speechjax.runs import Run
from tests.adapting import hashes
from tests.drawing import draw_params
from tests.tasks.experiments import REPO, experiment, make_batch

safetensors_numpy: Any = pytest.importorskip("safetensors.numpy")
WORDS = {"vocab.json": b'{"tokens": ["a"]}', "labels.json": b"[]"}


def make_run(name: str, folder: Path) -> Run:
    """A run that nobody has trained, with all its collections."""
    config, task = experiment(name)
    rngs = dict.fromkeys(("params", *task.rngs), jax.random.key(0))
    shapes: Any = dict(jax.eval_shape(lambda: task.init(rngs, make_batch(task), step=jnp.int32(0), train=False)))
    shapes.pop("sums", None)
    folder.mkdir()
    for file, content in WORDS.items():
        (folder / file).write_bytes(content)
    return Run(folder, folder / "best" / "7", 7, config, task, draw_params(shapes), "d" * 64)


@pytest.fixture(scope="module")
def ctc(tmp_path_factory) -> Run:
    return make_run("ctc", tmp_path_factory.mktemp("runs") / "ctc")


@pytest.fixture
def folder(ctc, tmp_path) -> Path:
    return flat.write(ctc, tmp_path / "flat", dtype="float32").parent


def leaves(variables: Any) -> dict[str, Any]:
    return flatten_dict(dict(variables), sep="/")


def rewrite(folder: Path, change: Any, about: Any = None) -> None:
    """Arrays changed by someone who knows how to make a digest."""
    arrays, header = read_arrays(folder / flat.MODEL, flat._KIND)
    header.pop("format")
    write_arrays(folder / flat.MODEL, flat._KIND, change(arrays), about or header)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        flat.read(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["ctc", "data2vec", "seq2seq", "wav2vec2", "apc"])
def test_a_model_comes_back_bit_for_bit(name, tmp_path):
    run = make_run(name, tmp_path / "run")
    flat.write(run, tmp_path / "flat", dtype="float32")
    found = flat.read(tmp_path / "flat")
    wanted, there = leaves(run.variables), leaves({"params": found.params, **found.extra})
    assert there.keys() == wanted.keys()
    for key, leaf in wanted.items():
        assert there[key].dtype == leaf.dtype
        np.testing.assert_array_equal(there[key], leaf)
    assert found.config.to_dict() == run.config.to_dict()
    assert type(found.task) is type(run.task)
    assert found.vocabulary == WORDS
    assert found.about == dict(step=7, digest="d" * 64, dtype="float32")
    assert sorted(p.name for p in (tmp_path / "flat").iterdir()) == sorted([flat.MODEL, flat.ABOUT, *WORDS])


def test_the_same_run_makes_the_same_files(ctc, tmp_path):
    for name in ("a", "b"):
        flat.write(ctc, tmp_path / name, dtype="int8")
    assert list(hashes(tmp_path / "a").values()) == list(hashes(tmp_path / "b").values())
    before = hashes(tmp_path / "a")
    flat.write(ctc, tmp_path / "a", dtype="float32")
    assert flat.read(tmp_path / "a").about["dtype"] == "float32"  # over what was there
    assert hashes(tmp_path / "a") != before


# Steps of the types, in relation to the weight; of int8 to the largest of its channel.
@pytest.mark.parametrize(("dtype", "share", "step"), [("bfloat16", 0.5, 2**-8), ("float16", 0.5, 2**-10)])
def test_shorter_types_round_weights_and_nothing_else(dtype, share, step, tmp_path):
    run = make_run("data2vec", tmp_path / "run")
    size = {name: flat.write(run, tmp_path / name, dtype=name).stat().st_size for name in ("float32", dtype)}
    assert size[dtype] < (share + 0.1) * size["float32"]
    found = flat.read(tmp_path / dtype)
    wanted, there = leaves(run.variables), leaves({"params": found.params, **found.extra})
    for key, leaf in wanted.items():
        assert there[key].dtype == leaf.dtype
        if key.startswith(("params/", "teacher/")):
            np.testing.assert_allclose(there[key], leaf, rtol=step, atol=1e-7)
        else:
            np.testing.assert_array_equal(there[key], leaf)
    assert any(np.any(there[key] != leaf) for key, leaf in wanted.items()), "negative control"


def test_an_int8_model_answers_nearly_the_same(ctc, tmp_path):
    flat.write(ctc, tmp_path / "flat", dtype="int8")
    arrays, _ = read_arrays(tmp_path / "flat" / flat.MODEL, flat._KIND)
    assert arrays["params/encoder/transformer/layer0/mlp_down/kernel"].dtype == np.int8
    found, batch = flat.read(tmp_path / "flat"), make_batch(ctc.task, rows=2)
    answer = jax.jit(lambda v: ctc.task.apply(v, batch, method="answer")["logits"])
    wanted, there = answer(ctc.variables), answer({"params": found.params, **found.extra})
    assert 0 < np.linalg.norm(there - wanted) < 0.05 * np.linalg.norm(wanted)


def test_float16_refuses_what_it_cannot_hold(ctc, tmp_path):
    variables = unflatten_dict(leaves(ctc.variables) | {"params/head/bias": np.full(9, 1e5, np.float32)}, sep="/")
    run = replace(ctc, variables=variables)
    with pytest.raises(UserError, match=r"params/head/bias has values beyond 65504.*use bfloat16"):
        flat.write(run, tmp_path / "a", dtype="float16")
    flat.write(run, tmp_path / "b", dtype="bfloat16")  # negative control
    with pytest.raises(UserError, match="dtype=fp16: choose float32, bfloat16"):
        flat.write(run, tmp_path / "c", dtype="fp16")


def test_damage_is_noticed_in_every_file(folder):
    for name in (flat.MODEL, flat.ABOUT, *WORDS):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert name in refused(folder)
        (folder / name).unlink()
        assert name in refused(folder)
        (folder / name).write_bytes(content)
    flat.read(folder)  # negative control
    (folder / "phones.json").write_text("another's")
    assert "phones.json" not in flat.read(folder).vocabulary
    assert "no such folder" in refused(folder / "no")


def test_files_of_two_models_do_not_mix(ctc, folder, tmp_path):
    other = replace(ctc, variables=jax.tree.map(lambda x: x * 2, ctc.variables), digest="e" * 64)
    flat.write(other, tmp_path / "other", dtype="float32")
    (folder / flat.MODEL).write_bytes((tmp_path / "other" / flat.MODEL).read_bytes())
    assert "of another model" in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"params/head/bias": a["params/head/bias"][:4]}, r"head/bias is float32 \(4,\), and the config"),
        (lambda a: a | {"params/head/bias": a["params/head/bias"].astype(np.int32)}, "head/bias is int32"),
        (lambda a: {k: v for k, v in a.items() if "layer0/mlp_up" not in k}, r"no params/encoder/.*mlp_up"),
        (lambda a: a | {"params/encoder/new": np.ones(3, np.float32)}, "encoder/new, for which the config has"),
        (lambda a: {k: v for k, v in a.items() if "encoder" not in k}, "there is no encoder"),
        (lambda a: {k: v for k, v in a.items() if "params" not in k}, "is not what speechjax wrote"),
        (lambda a: a | {"params/head/bias/more": np.ones(3, np.float32)}, "is not what speechjax wrote"),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        flat.read(folder)
    refused(folder)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"config": {"task": 3}}', '{"config": {}}'])
def test_a_strange_config_is_refused(folder, text):
    import hashlib

    arrays, header = read_arrays(folder / flat.MODEL, flat._KIND)
    header.pop("format")
    header["files"][flat.ABOUT] = hashlib.sha256(text.encode()).hexdigest()
    (folder / flat.ABOUT).write_text(text)
    write_arrays(folder / flat.MODEL, flat._KIND, arrays, header)
    with pytest.raises(UserError):
        flat.read(folder)


def test_only_known_files_are_opened(folder):
    arrays, header = read_arrays(folder / flat.MODEL, flat._KIND)
    header["files"]["../escaped"] = "0"
    rewrite(folder, lambda _: arrays, {key: header[key] for key in ("about", "files")})
    assert "does not say what belongs to it" in refused(folder)


def test_it_reads_where_tensorflow_is_missing(folder):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["tensorflow", "tensorflow_datasets", "librosa"]))
from pathlib import Path
from speechjax.formats import flat
print(len(flat.read(Path({str(folder)!r})).params["encoder"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((folder / flat.ABOUT).read_text())["config"]
    assert config["task"]["name"] == "ctc"

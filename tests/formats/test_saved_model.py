"""SavedModel: the run's answers for any batch, in a process without JAX, and files that are refused."""

import os
import subprocess
import sys

import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.formats import saved_model
from tests.choice import some
from tests.formats.served_runs import batches, difference, expected, flipped, make_run

pytest.importorskip("tensorflow", reason="needs TensorFlow")


@pytest.mark.parametrize("encoder", some(["post", "stacked", "wavlm", "conformer", "lstm"], ["post"]))
def test_encoders_answer_as_their_run(encoder, tmp_path):
    run = make_run(tmp_path / "run", "ctc", encoder)
    assert saved_model.write(run, tmp_path / "out") == tmp_path / "out/saved_model.pb"
    answer = saved_model.load(tmp_path / "out")
    for audio, lengths in batches():
        assert difference(answer(audio, lengths), expected(run, audio, lengths)) < 1e-5


@pytest.mark.parametrize("name", some(["speaker", "several", "wav2vec2"], []))
def test_other_tasks_too(name, tmp_path):
    run = make_run(tmp_path / "run", name)
    saved_model.write(run, tmp_path / "out")
    answer, (audio, lengths) = saved_model.load(tmp_path / "out"), batches()[3]
    assert difference(answer(audio, lengths), expected(run, audio, lengths)) < 1e-5


def test_another_weight_is_another_answer(tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    saved_model.write(flipped(run), tmp_path / "out")
    assert difference(saved_model.load(tmp_path / "out")(audio, lengths), expected(run, audio, lengths)) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_types(dtype, tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    saved_model.write(run, tmp_path / "out", dtype=dtype)
    wanted = expected(run, audio, lengths)
    found = saved_model.load(tmp_path / "out")(audio, lengths)
    assert 1e-5 < difference(found, wanted) < 0.1 * np.abs(wanted["logits"]).max()


@pytest.mark.slow
def test_it_runs_without_jax(tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    saved_model.write(run, tmp_path / "out")
    np.savez(tmp_path / "batch.npz", audio=audio, valid=lengths, **expected(run, audio, lengths))
    script = """
import sys
sys.modules["jax"] = sys.modules["jaxlib"] = sys.modules["speechjax"] = None
import numpy, tensorflow
model = tensorflow.saved_model.load("out")
batch = numpy.load("batch.npz")
audio, lengths = map(tensorflow.constant, (batch["audio"], batch["valid"]))
found = model.signatures["serving_default"](audio=audio, lengths=lengths)
assert abs(found["logits"].numpy() - batch["logits"]).max() < 1e-5
"""
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved_model")
    saved_model.write(make_run(folder / "run"), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", ["saved_model.pb", "variables/variables.data-00000-of-00001"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_damaged_files_end_in_one_line(written, name, how, tmp_path):
    for file in filter(lambda path: path.is_file(), written.rglob("*")):
        copy = tmp_path / file.relative_to(written)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    if how == "missing":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((written / name).read_bytes()[:100])
    with pytest.raises(UserError, match=r"damaged|missing") as caught:
        saved_model.load(tmp_path)
    assert "\n" not in str(caught.value)

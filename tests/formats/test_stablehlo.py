"""StableHLO: the run's answers for any batch, in a process without the models, and files that are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.formats import stablehlo
from speechjax.formats.serving import ABOUT, _sha
from tests.choice import some
from tests.formats.served_runs import ENCODERS, batches, difference, expected, flipped, make_run

pytest.importorskip("safetensors", reason="needs `pip install 'speechjax[export]'`")
pytest.importorskip("flatbuffers", reason="needs `pip install 'speechjax[export]'`")
# The order of sums; "online" adds up frame by frame here, in a tree there.
NEAR = dict.fromkeys(ENCODERS, 1e-5) | {"online": 1e-3}


@pytest.mark.parametrize("encoder", some(ENCODERS, ("pre", "conformer")))
def test_every_encoder_answers_as_its_run(encoder, tmp_path):
    run = make_run(tmp_path / "run", "ctc", encoder)
    assert stablehlo.write(run, tmp_path / "out") == tmp_path / "out/model.stablehlo"
    answer = stablehlo.load(tmp_path / "out")
    for audio, lengths in batches():
        assert difference(answer(audio, lengths), expected(run, audio, lengths)) < NEAR[encoder]


@pytest.mark.parametrize("name", some(["speaker", "several", "wav2vec2"], ["speaker"]))
def test_other_tasks_too(name, tmp_path):
    run = make_run(tmp_path / "run", name)
    stablehlo.write(run, tmp_path / "out")
    answer, (audio, lengths) = stablehlo.load(tmp_path / "out"), batches()[3]
    assert difference(answer(audio, lengths), expected(run, audio, lengths)) < 1e-5


def test_another_weight_is_another_answer(tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    stablehlo.write(flipped(run), tmp_path / "out")
    assert difference(stablehlo.load(tmp_path / "out")(audio, lengths), expected(run, audio, lengths)) > 1e-2


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.62), ("int8", 0.8)])
def test_smaller_types(dtype, share, tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    stablehlo.write(run, tmp_path / "whole")
    stablehlo.write(run, tmp_path / "out", dtype=dtype)
    size = lambda folder: (tmp_path / folder / "weights.safetensors").stat().st_size  # noqa: E731
    assert size("out") < share * size("whole")
    wanted = expected(run, audio, lengths)
    found = stablehlo.load(tmp_path / "out")(audio, lengths)
    assert 1e-5 < difference(found, wanted) < 0.1 * np.abs(wanted["logits"]).max()


def test_the_program_runs_without_the_models(tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    stablehlo.write(run, tmp_path / "out")
    np.savez(tmp_path / "batch.npz", audio=audio, valid=lengths, **expected(run, audio, lengths))
    script = """
import sys
for name in ("flax.linen", "speechjax.tasks", "speechjax.models.encoder", "tensorflow"):
    sys.modules[name] = None
import numpy, jax, safetensors.flax
from jax import export
program = export.deserialize(bytearray(open("out/model.stablehlo", "rb").read()))
weights = safetensors.flax.load_file("out/weights.safetensors")
batch = numpy.load("batch.npz")
found = program.call(weights, batch["audio"], batch["valid"])
assert abs(numpy.asarray(found["logits"]) - batch["logits"]).max() < 1e-5
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_all_platforms_are_in_the_program(tmp_path):
    stablehlo.write(make_run(tmp_path / "run"), tmp_path / "out")
    program = stablehlo.export.deserialize(bytearray((tmp_path / "out/model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stablehlo")
    stablehlo.write(make_run(folder / "run"), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", ["model.stablehlo", "weights.safetensors"])
@pytest.mark.parametrize(
    ("how", "digest"),
    [
        ("truncated", "old"),
        ("flipped", "old"),
        ("foreign", "old"),
        ("missing", "old"),
        ("truncated", "new"),
        ("foreign", "new"),
    ],
)
def test_damaged_files_end_in_one_line(written, name, how, digest, tmp_path):
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file, content = tmp_path / name, (written / name).read_bytes()
    if how == "missing":
        file.unlink()
    else:
        changed = {"truncated": content[: len(content) // 2], "foreign": b"\x00" * 64}
        changed["flipped"] = content[:8] + bytes([content[8] ^ 255]) + content[9:]
        file.write_bytes(changed[how])
        if digest == "new":  # as someone would who wants it read
            about = json.loads((tmp_path / ABOUT).read_text())
            about["files"][name] = _sha(file)
            (tmp_path / ABOUT).write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"damaged|missing|cannot be read") as caught:
        stablehlo.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_run_are_refused(written, tmp_path):
    stablehlo.write(make_run(tmp_path / "run", "classify"), tmp_path / "out")
    (tmp_path / "out/weights.safetensors").write_bytes((written / "weights.safetensors").read_bytes())
    about = json.loads((tmp_path / "out" / ABOUT).read_text())
    about["files"]["weights.safetensors"] = _sha(tmp_path / "out/weights.safetensors")
    (tmp_path / "out" / ABOUT).write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"weights.safetensors are not those of model.stablehlo"):
        stablehlo.load(tmp_path / "out")

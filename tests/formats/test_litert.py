"""LiteRT: the run's answers from fixed shapes, smaller types, and files that are refused."""

import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.formats import litert
from tests.choice import some
from tests.formats.served_runs import ENCODERS, batches, difference, expected, flipped, make_run

pytest.importorskip("tensorflow", reason="needs TensorFlow")
pytest.importorskip("ai_edge_litert.interpreter", reason="needs `pip install ai-edge-litert`")

SECONDS = (0.3, 0.5)  # the batches have 0.25 and 0.46


@pytest.mark.parametrize("encoder", some(ENCODERS, ("post",)))
def test_every_encoder_answers_as_its_run(encoder, tmp_path):
    run = make_run(tmp_path / "run", "ctc", encoder)
    assert litert.write(run, tmp_path / "out", seconds=SECONDS) == tmp_path / "out/model.tflite"
    answer = litert.load(tmp_path / "out")
    for audio, lengths in batches():
        assert difference(answer(audio, lengths), expected(run, audio, lengths)) < 1e-4


@pytest.mark.parametrize("name", some(["speaker", "wav2vec2"], []))
def test_other_tasks_too(name, tmp_path):
    run = make_run(tmp_path / "run", name)
    litert.write(run, tmp_path / "out", seconds=SECONDS)
    answer, (audio, lengths) = litert.load(tmp_path / "out"), batches()[3]
    assert difference(answer(audio, lengths), expected(run, audio, lengths)) < 1e-4


@pytest.mark.slow
def test_another_weight_is_another_answer(tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    litert.write(flipped(run), tmp_path / "out", seconds=SECONDS[1:])
    assert difference(litert.load(tmp_path / "out")(audio, lengths), expected(run, audio, lengths)) > 1e-2


@pytest.mark.parametrize("dtype", some(["float16", "int8"], ["int8"]))
def test_smaller_types(dtype, tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    whole = litert.write(run, tmp_path / "whole", seconds=SECONDS[1:]).stat().st_size
    small = litert.write(run, tmp_path / "out", seconds=SECONDS[1:], dtype=dtype).stat().st_size
    assert small < whole - 8000
    wanted = expected(run, audio, lengths)
    found = litert.load(tmp_path / "out")(audio, lengths)
    assert 1e-5 < difference(found, wanted) < 0.1 * np.abs(wanted["logits"]).max()


@pytest.mark.slow
def test_signatures_share_their_weights(tmp_path):
    run = make_run(tmp_path / "run")
    sizes = [litert.write(run, tmp_path / str(n), seconds=SECONDS[:n]).stat().st_size for n in (1, 2)]
    weights = sum(x.nbytes for x in litert.open_served(run).weights.values())
    assert sizes[1] < 2 * sizes[0] - 0.5 * weights


def test_what_does_not_fit_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"a frame takes 0.025 s"):
        litert.write(run, tmp_path / "out", seconds=(0.02,))
    with pytest.raises(UserError, match="choose float32, float16, int8"):
        litert.write(run, tmp_path / "out", dtype="int4")
    file = litert.write(run, tmp_path / "out", seconds=SECONDS[:1])
    with pytest.raises(UserError, match=r"audio of 0.5 s, and .* is for 0.3 s at most"):
        litert.load(tmp_path / "out")(np.zeros((1, 8000), np.float32), np.int32([8000]))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        litert.load(tmp_path / "out")


def test_weights_that_no_file_can_hold_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "_LARGEST", 1000)
    with pytest.raises(UserError, match=r"files end at 2 GB, and these weights are \d+\.\d GB of float16: export"):
        litert.write(make_run(tmp_path / "run"), tmp_path / "out", dtype="float16", seconds=(0.3,))
    assert not (tmp_path / "out").exists()

"""ONNX: the run's answers for any batch, smaller types, sherpa-onnx, and files that are refused."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.formats import onnx, quantize
from speechjax.formats.onnx_graph import Graph, proto
from speechjax.formats.serving import ABOUT, Served, _sha
from tests.choice import some
from tests.formats.served_runs import ENCODERS, TOKENS, batches, difference, expected, flipped, make_run
from tests.tasks.experiments import EXPERIMENTS, HEADS

library: Any = pytest.importorskip("onnx", reason="needs `pip install 'speechjax[onnx]'`")
onnxruntime: Any = pytest.importorskip("onnxruntime", reason="needs `pip install 'speechjax[onnx]'`")


@pytest.mark.parametrize("encoder", some(ENCODERS, ("post", "conformer")))
def test_every_encoder_answers_as_its_run(encoder, tmp_path):
    run = make_run(tmp_path / "run", "ctc", encoder)
    file = onnx.write(run, tmp_path / "out")
    library.checker.check_model(str(file), full_check=True)
    answer = onnx.load(tmp_path / "out")
    for audio, lengths in batches():
        assert difference(answer(audio, lengths), expected(run, audio, lengths)) < 1e-4


@pytest.mark.parametrize(
    "name", some([name for name in (*EXPERIMENTS, *HEADS) if name != "ctc"], ("classify", "hubert"))
)
def test_every_task_answers_as_its_run(name, tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run", name), batches()[3]
    onnx.write(run, tmp_path / "out")
    assert difference(onnx.load(tmp_path / "out")(audio, lengths), expected(run, audio, lengths)) < 1e-4


def test_another_weight_is_another_answer(tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    onnx.write(flipped(run), tmp_path / "out")
    assert difference(onnx.load(tmp_path / "out")(audio, lengths), expected(run, audio, lengths)) > 1e-2


@pytest.mark.parametrize("samples", [1, 79, 400, 1281])
def test_audio_may_be_short(samples, tmp_path):
    run, lengths = make_run(tmp_path / "run"), np.int32([samples])
    onnx.write(run, tmp_path / "out")
    audio = 0.1 * np.random.default_rng(0).normal(size=(1, samples)).astype(np.float32)
    assert difference(onnx.load(tmp_path / "out")(audio, lengths), expected(run, audio, lengths)) < 1e-5


def test_lengths_may_be_left_out(tmp_path):
    run, (audio, _) = make_run(tmp_path / "run"), batches()[3]
    file = onnx.write(run, tmp_path / "out")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options)
    names = [output.name for output in session.get_outputs()]
    assert names[0] == "logits", "sherpa-onnx takes the first"
    found = dict(zip(names, session.run(None, {"audio": audio}), strict=True))
    whole = np.full(len(audio), audio.shape[1], np.int32)
    assert difference(found, expected(run, audio, whole)) < 1e-5
    assert difference(found, expected(run, audio, whole - 2000)) > 1e-2, "negative control: lengths matter"


def test_weights_of_large_models_lie_beside_the_graph(tmp_path, monkeypatch):
    """Messages end at 2 GB; the real size is that of tests/real/large.py."""
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    whole = onnx.write(run, tmp_path / "whole")
    assert not (tmp_path / "whole/model.onnx.data").exists()
    monkeypatch.setattr(onnx, "_LARGEST", whole.stat().st_size // 2)
    file = onnx.write(run, tmp_path / "out")
    assert file.stat().st_size < whole.stat().st_size / 2
    assert difference(onnx.load(tmp_path / "out")(audio, lengths), expected(run, audio, lengths)) < 1e-5
    with open(tmp_path / "out/model.onnx.data", "r+b") as weights:
        weights.write(b"\x7f")
    with pytest.raises(UserError, match=r"model\.onnx\.data is damaged"):
        onnx.load(tmp_path / "out")


@pytest.mark.parametrize(("dtype", "share"), [("float16", 0.8), ("int8", 0.75)])
@pytest.mark.parametrize("encoder", some(["post", "stacked", "wavlm", "lstm"], ["post"]))
def test_smaller_types(encoder, dtype, share, tmp_path):
    """Of tiny models only a part is weights that are stored smaller."""
    run, (audio, lengths) = make_run(tmp_path / "run", "ctc", encoder), batches()[3]
    sizes = [onnx.write(run, tmp_path / kind, dtype=kind).stat().st_size for kind in ("float32", dtype)]
    assert sizes[1] < share * sizes[0]
    wanted = expected(run, audio, lengths)
    found = onnx.load(tmp_path / dtype)(audio, lengths)
    assert 1e-6 < difference(found, wanted) < 0.1 * np.abs(wanted["logits"]).max()


def test_products_with_weights_are_of_integers(tmp_path):
    model = library.load(onnx.write(make_run(tmp_path / "run"), tmp_path / "out", dtype="int8"))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulInteger") == 6, "the four of attention and two of the mlp; others are small"
    with pytest.raises(UserError, match="choose float32, float16, int8"):
        onnx.write(make_run(tmp_path / "run"), tmp_path / "out", dtype="bfloat16")


def test_every_row_has_a_scale_of_its_own():
    """Beside a frame a thousand times louder a quiet one would be all zeros; the same products as in JAX."""
    rng = np.random.default_rng(0)
    x, matrix = rng.normal(size=(2, 5, 96)).astype(np.float32), rng.normal(size=(96, 64)).astype(np.float32)
    x[0, 0] *= 1000
    x[1, 4] = 0
    graph, info = Graph("int8"), library.helper.make_tensor_value_info
    graph.give(graph.product("x", matrix), "y")
    parts = [info("x", 1, ["B", "T", 96])], [info("y", 1, ["B", "T", 64])]
    model = library.helper.make_model(
        proto(graph, *parts), opset_imports=[library.helper.make_opsetid("", onnx.OPSET)], ir_version=onnx.IR
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})[0]
    packed = quantize.quantize({"layer": {"kernel": matrix}})
    kernel, scale = packed["layer/kernel"], packed["layer/kernel" + quantize.SCALE]
    wanted = np.asarray(quantize.int8_product(x, kernel, scale[0]))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(x).max(axis=-1, keepdims=True).max())
    error = np.linalg.norm(found - x @ matrix, axis=-1) / np.maximum(np.linalg.norm(x @ matrix, axis=-1), 1e-9)
    assert error.max() < 0.02


def test_the_file_needs_neither_jax_nor_speechjax(tmp_path):
    run, (audio, lengths) = make_run(tmp_path / "run"), batches()[3]
    onnx.write(run, tmp_path / "out")
    arrays: Any = dict(audio=audio, valid=lengths, **expected(run, audio, lengths))
    np.savez(tmp_path / "batch.npz", **arrays)
    script = """
import sys
sys.modules["jax"] = sys.modules["speechjax"] = sys.modules["tensorflow"] = None
import numpy, onnxruntime
batch = numpy.load("batch.npz")
session = onnxruntime.InferenceSession("out/model.onnx")
logits = session.run(["logits"], {"audio": batch["audio"], "audio_lengths": batch["valid"]})[0]
assert abs(logits - batch["logits"]).max() < 1e-5
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=dict(os.environ))


def test_metadata_says_what_it_is(tmp_path):
    file = onnx.write(make_run(tmp_path / "run"), tmp_path / "out")
    said = {entry.key: entry.value for entry in library.load(file).metadata_props}
    assert (said["model_type"], said["vocab_size"], said["sample_rate"]) == ("omnilingual-asr", "9", "16000")
    assert (said["task"], said["step"], said["digest"]) == ("ctc", "3", "0" * 64)
    other = onnx.write(make_run(tmp_path / "speaker", "speaker"), tmp_path / "other")
    assert "model_type" not in {entry.key for entry in library.load(other).metadata_props}


@pytest.mark.parametrize(
    ("kind", "tokens", "wanted"),
    [
        ("characters", [*TOKENS[:4], " ", "ä"], ["<blk>", "<s>", "</s>", "<unk>", "\u2581", "ä"]),
        ("phonemes", [*TOKENS[:4], "aɪ"], ["<blk>", "<s>", "</s>", "<unk>", "\u2581aɪ"]),
        ("sentencepiece", [*TOKENS[:4], "\u2581the"], ["<blk>", "<s>", "</s>", "<unk>", "\u2581the"]),
        ("characters", [*TOKENS[:4], "\n"], []),
        ("bytes", [*TOKENS[:4], "<0x00>"], []),
    ],
)
def test_symbols_for_sherpa(kind, tokens, wanted):
    words = {"vocab.json": json.dumps(dict(kind=kind, tokens=tokens)).encode()}
    about = dict(outputs={"logits": ["float32", ["B", "T", len(tokens)]]}, tokens=tokens)
    served: Any = Served(lambda *_: {}, {}, about, words)
    assert onnx._sherpa_tokens(served) == wanted
    assert onnx._sherpa_tokens(dataclasses.replace(served, about=about | {"outputs": {}})) == []


@pytest.mark.parametrize(("encoder", "dtype"), [("post", "float32"), ("pre", "float32"), ("pre", "int8")])
def test_sherpa_transcribes(encoder, dtype, tmp_path):
    """The best path of the logits, of audio as sherpa-onnx normalises it."""
    sherpa: Any = pytest.importorskip("sherpa_onnx", reason="needs `pip install sherpa-onnx`")
    run = make_run(tmp_path / "run", "ctc", encoder)
    file = onnx.write(run, tmp_path / "out", dtype=dtype)
    recognizer = sherpa.OfflineRecognizer.from_omnilingual_asr_ctc(
        model=str(file), tokens=str(file.parent / "tokens.txt"), num_threads=1
    )
    answer, said = onnx.load(tmp_path / "out"), set()
    for seed, samples in ((1, 16000), (2, 23457), (3, 8000)):
        audio = 0.1 * np.random.default_rng(seed).normal(size=samples).astype(np.float32) * np.hanning(samples)
        audio = audio.astype(np.float32)
        stream = recognizer.create_stream()
        stream.accept_waveform(16000, audio)
        recognizer.decode_stream(stream)
        normal = ((audio - audio.mean()) / np.sqrt(audio.var() + 1e-5)).astype(np.float32)
        best = answer(normal[None], np.int32([samples]))["logits"][0].argmax(axis=-1)
        kept = [int(t) for t, before in zip(best, [0, *best[:-1]], strict=True) if t not in (0, before)]
        assert stream.result.text == "".join(TOKENS[t] for t in kept)
        said.add(stream.result.text)
    assert any(said), "something was said"


def test_what_onnx_does_not_know_is_said():
    program = jax.make_jaxpr(jax.lax.sort)(np.ones(3, np.float32))
    with pytest.raises(UserError, match="has 'sort', which the ONNX export does not know"):
        onnx.Translator(onnx.Graph()).run(program, [onnx.Wire("x", (3,), np.dtype(np.float32))])


@pytest.mark.parametrize("how", ["truncated", "foreign", "missing", "forged"])
def test_damaged_files_end_in_one_line(how, tmp_path):
    file = onnx.write(make_run(tmp_path / "run"), tmp_path / "out")
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\x00" * 64 if how == "foreign" else file.read_bytes()[:1000])
    if how == "forged":
        about = json.loads((tmp_path / "out" / ABOUT).read_text())
        about["files"][file.name] = _sha(file)
        (tmp_path / "out" / ABOUT).write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"damaged|missing|cannot be read") as caught:
        onnx.load(tmp_path / "out")
    assert "\n" not in str(caught.value)

"""`speechjax.load`: the answers of a run, from any of the folders a model may be in."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import speechjax
from speechjax import export
from speechjax.errors import UserError
from speechjax.formats.trial import answers
from speechjax.runs import open_run

REPO = Path(__file__).resolve().parents[2]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).normal(size=samples)).astype(np.float32)


@pytest.fixture(scope="module")
def model(workdirs):
    return speechjax.load(workdirs / "asr")


def test_features_and_logits_are_the_tasks(model, workdirs):
    """Of one row, of a batch and of a list: what the task answers to each alone, whatever padding was in between."""
    run = open_run(str(workdirs / "asr"), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    rows = [noise(7000), noise(4321, 1)]
    for row in rows:
        expected = answers(run)(row[None], np.array([len(row)], np.int32))["logits"][0]
        assert model.logits(row).shape == (model.frames(len(row)), 9) == expected.shape
        np.testing.assert_allclose(model.logits(row), expected, atol=2e-5)
        frames = answers(run, encoder_only=True)(row[None], np.array([len(row)], np.int32))["frames"][0]
        np.testing.assert_allclose(model.features(row), frames, atol=2e-5)
    listed = model.features(rows)
    assert [x.shape for x in listed] == [(model.frames(n), model.width) for n in (7000, 4321)]
    np.testing.assert_array_equal(listed[1], model.features(rows[1]))
    together = model.features(np.stack([rows[0], rows[0][::-1]]))
    assert together.shape == (2, model.frames(7000), model.width)
    np.testing.assert_array_equal(together[0], listed[0])
    assert np.abs(together[1] - together[0]).max() > 1e-3


def test_layers(model):
    row = noise(7000)
    states = model.hidden_states(row)
    assert len(states) == model.layers + 1
    for k, state in enumerate(states):
        np.testing.assert_allclose(model.features(row, layer=k), state, atol=1e-6)
    np.testing.assert_allclose(model.features(row, layer=-1), states[-1], atol=1e-6)
    assert np.abs(states[0] - states[-1]).max() > 1e-2
    with pytest.raises(UserError, match=r"layer=9: .*0 to"):
        model.features(row, layer=9)


def test_samples_of_any_kind(model):
    row = noise(7000)
    pcm = np.rint(row * 32768).astype(np.int16)
    np.testing.assert_allclose(model.features(pcm), model.features(pcm.astype(np.float64) / 32768), atol=1e-6)
    # A tone at half the rate is the same tone: features agree but for the filter's edges.
    time = np.arange(16000) / 16000
    tone, half = (np.sin(2 * np.pi * 440 * t).astype(np.float32) for t in (time, time[::2]))
    slow = model.features(half, sample_rate=8000)
    assert slow.shape == model.features(tone).shape
    middle = slice(5, -5)
    off = np.abs(slow - model.features(tone))[middle].mean()
    unlike = np.abs(model.features(half) - model.features(tone)[: model.frames(8000)])[middle].mean()
    assert off < 0.1 * unlike, "negative control: the same samples taken for 16 kHz"


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros((2, 2, 100)), 16000, r"float64\[2, 100\]"),
        (np.zeros(100, np.int64), 16000, "float or int16"),
        (np.array([0.0, np.nan]), 16000, "not all samples are numbers"),
        ([], 16000, "no rows"),
        (np.zeros(100, np.float32), 5, "sample_rate=5"),
    ],
)
def test_what_is_no_audio_is_refused(model, audio, rate, message):
    with pytest.raises(UserError, match=message):
        model.features(audio, sample_rate=rate)


def test_transcripts(model, workdirs, tmp_path):
    """The same as the search gives for the task's logits; long audio goes through windows."""
    from speechjax.decode import ctc

    rows = [noise(16000, seed) for seed in range(3)]
    found = model.transcribe(rows)
    for row, text in zip(rows, found, strict=True):
        logits = model.logits(row)[None]
        best = ctc.greedy(logits, np.array([logits.shape[1]], np.int32))
        assert text == model.tokenizer.decode(np.asarray(best.tokens)[0, 0, : int(best.lengths[0, 0])])
    assert any(found)
    assert model.transcribe(rows[0]) == found[0]
    assert isinstance(model.transcribe(rows[0], search="beam", beams=4), str)
    assert isinstance(model.transcribe(noise(31 * 16000)), str)
    with pytest.raises(UserError, match="steers a beam"):
        model.transcribe(rows[0], lm="some.arpa")


def test_every_folder_is_the_same_model(workdirs, model, tmp_path):
    row = noise(7000)
    for kind in ("hf", "safetensors"):
        export.run([f"--workdir={workdirs / 'asr'}", f"--format={kind}", f"--out={tmp_path / kind}", "--no-check"])
        other = speechjax.load(tmp_path / kind)
        np.testing.assert_array_equal(other.logits(row), model.logits(row))
        assert other.transcribe(row) == model.transcribe(row)
    hubert = speechjax.load(workdirs / "hubert")
    assert hubert.features(row).shape[1] == hubert.width
    with pytest.raises(UserError, match="the task hubert has no logits"):
        hubert.logits(row)
    with pytest.raises(UserError, match="has no vocabulary"):
        hubert.transcribe(row)
    assert speechjax.load(workdirs / "classify").logits(row).ndim == 1
    embedding = speechjax.load(workdirs / "speaker").logits(row)
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        speechjax.load(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError):
        speechjax.load(tmp_path)
    assert not hasattr(speechjax, "lead")


def test_neither_tensorflow_nor_librosa_is_needed(workdirs):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['tensorflow', 'tensorflow_datasets', 'librosa']))\n"
        "import numpy, speechjax\n"
        f"model = speechjax.load({str(workdirs / 'asr')!r})\n"
        "audio = numpy.zeros(8000, 'float32')\n"
        "print(model.features(audio).shape, isinstance(model.transcribe(audio), str))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.stdout.strip() == "(24, 32) True", done.stderr[-2000:]

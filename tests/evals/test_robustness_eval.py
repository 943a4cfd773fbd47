"""Another evaluator under conditions: it hears what the condition makes of the recordings, and nothing else changes."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from speechjax.errors import UserError
from speechjax.evals.classification import Classification
from speechjax.evals.robustness import Robustness
from speechjax.evaluate import choose
from tests.data.memory import memory_records

TASK = dict(name="classify", label="label", loss="softmax", classes=2)


def tones(n=16):
    """Two pitches, loud and quiet by turns."""
    records = memory_records([8000] * n, meta=[dict(word=["low", "high"][i % 2]) for i in range(n)])
    for i, audio in enumerate(records.parts[0].shards.audio):
        turns = np.arange(8000) * (300 + 1500 * (i % 2)) / 16_000
        audio[:] = 3000 * (1 + 0.1 * i) * np.sin(2 * np.pi * turns + i)
    return records


def zero_crossings(batch):
    """High where the waveform often changes its sign: so is noise."""
    audio = batch["audio"].astype(jnp.float32)
    rate = jnp.mean((audio[:, 1:] * audio[:, :-1] < 0).astype(jnp.float32), axis=1)
    return dict(scores=jnp.stack([rate, jnp.full_like(rate, 0.13)], axis=1) * 50)


@pytest.fixture
def job(make_job):
    evals = dict(words=dict(name="classification", every=3, group=""), far=dict(name="probe", every=1))
    return make_job(tones(), TASK, zero_crossings, label="meta:word", evals=evals)


def test_noise_costs_accuracy_and_more_noise_more(job, tmp_path):
    judge = Robustness(job, every=1, of="words", white=(40.0, 0.0), babble=(), reverberation=(0.2,))
    found = judge({}, {}, 9, "robust")
    clean = Classification(job, every=1)({}, {}, 9, "words")
    assert found["robust_clean"] == clean["accuracy"] == 1
    assert found["robust_white_0"] == 0.5  # everything sounds high
    assert found["robust_white_0"] < found["robust_white_40"] <= 1
    assert found["robust_white_0_low"] < 0.5 < found["robust_white_0_high"]
    assert "robust_reverberation_0.2" in found
    assert (tmp_path / "report/robust_9.png").exists()
    assert "white 0 dB" in (tmp_path / "report/robust.json").read_text()
    assert not (tmp_path / "report/robust_classes.json").exists()  # of the evaluator itself there is no report


def test_the_evaluator_of_the_run_keeps_its_options_on_the_command_line():
    words = dict(name="recognition", every=3, search="beam", beams=64)
    config = ConfigDict(dict(evals=dict(words=words)))
    assert choose(config, "robustness", ["evals.robustness.of=words"]) == ["robustness"]
    assert config.evals.words.to_dict() == words
    assert config.evals.robustness.of == "words"


def test_another_metric_and_babble(job):
    options = dict(every=1, of="classification", white=(), babble=(10.0,), reverberation=())
    plain = Robustness(job, metric="temperature", **options)({}, {}, 0, "robust")
    assert set(plain) == {"robust_clean", "robust_babble_10"}  # it has no limits
    judge = Robustness(job, metric="uar", **options)
    found = judge({}, {}, 0, "robust")
    assert {name.removesuffix("_low").removesuffix("_high") for name in found} == set(plain)
    assert found["robust_clean"] == 1
    assert judge({}, {}, 0, "robust") == found
    with pytest.raises(UserError, match=r"classification has no metric 'bleu'; it has accuracy, accuracy_low"):
        Robustness(job, every=1, of="classification", metric="bleu", babble=())({}, {}, 0, "robust")


def test_what_cannot_be_heard_is_named(job, make_job):
    with pytest.raises(UserError, match="robustness: far does not hear the held-out recordings alone"):
        Robustness(job, every=1, of="far")
    with pytest.raises(UserError, match="no evals named 'nonsense'"):
        Robustness(job, every=1, of="nonsense")
    with pytest.raises(UserError, match="no condition but clean"):
        Robustness(job, every=1, of="words", white=(), babble=(), reverberation=())
    few = make_job(tones(4), TASK, zero_crossings, label="meta:word")
    with pytest.raises(UserError, match="babble of 6 talkers needs 7 different recordings"):
        Robustness(few, every=1, of="classification")

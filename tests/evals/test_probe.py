"""The probe evaluator through the real loop: its table has all controls, and it tells signal from noise."""

import json

import numpy as np
import pytest
import soundfile

from speechjax import config as configs
from speechjax.data import pipeline
from speechjax.errors import UserError
from speechjax.logs import read_metrics
from speechjax.train import DONE, train


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """96 recordings of 4 speakers; the label is the pitch, the speaker the level."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    for i in range(96):
        label, speaker = i % 3, i // 3 % 4
        t = np.arange(int(rng.integers(5000, 9000))) / 16000
        audio = np.sin(2 * np.pi * (300 * 2.2**label) * t) * (0.1 + 0.1 * speaker) + 0.01 * rng.standard_normal(len(t))
        soundfile.write(folder / f"{label}_s{speaker}_{i}.wav", audio * 0.5, 16000)
    return folder


def probe_config(folder, **options):
    config = configs.load("configs/pretrain/wav2vec2.py:size=tiny,smoke")
    config.unlock()
    config.data.update(source=f"folder:{folder}", cache_dir=str(folder.parent / "cache"), valid_seconds=2.0)
    config.evals.probe.update(source=f"folder:{folder}", pattern=r"(?P<label>\d)_(?P<speaker>s\d)_", **options)
    del config.evals["picture"]
    return config


def run(config, workdir):
    task = configs.make_task(config)
    options = dict(row_divisor=4, frame_len=task.encoder.frame_len(), segment_align=0, workdir=None)
    data = pipeline.open_data(seed=0, **options, **config.data.to_dict())
    return train(config, data, workdir)


def test_table_has_every_control_and_the_scores_mean_something(tones, tmp_path):
    assert run(probe_config(tones, held_out=("s1", "s2"), seeds=2), tmp_path) == DONE
    [entry] = [e for e in read_metrics(tmp_path) if e["split"] == "probe"]
    assert entry["score_mfcc"] > 90  # the label is in the spectrum
    assert entry["score_log_mel"] > 90
    assert entry["score"] > 60  # chance is 33
    table = json.loads((tmp_path / "report/probe.json").read_text())
    assert [row[0] for row in table["rows"]] == [
        "this encoder", "random-initialised encoder", "log-mel statistics", "MFCC statistics",
    ]  # fmt: skip
    assert table["columns"][3:] == ["s0", "s1*", "s2*", "s3", "all"]
    held = [float(cell) for cell in table["rows"][0][4:6]]
    assert float(table["rows"][0][1]) == pytest.approx(np.mean(held), abs=0.11)  # cells are rounded
    assert "this encoder" in (tmp_path / "report/tables.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(held_out=("nobody",)), "nobody.*there are: s0, s1"),
        (dict(pattern="(?P<label>x)(?P<speaker>y)"), "fits no id"),
    ],
)
def test_mistakes_are_named(tones, tmp_path, options, message):
    config = probe_config(tones)
    config.evals.probe.update(**options)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path)

"""The probe evaluator through the real loop: its table has all controls, and it tells signal from noise."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from speechjax import config as configs
from speechjax.data import pipeline
from speechjax.errors import DONE, UserError
from speechjax.evals import _cache, _probe_tables
from speechjax.evals.probe import Probe
from speechjax.logs import read_metrics
from speechjax.train import train


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


@pytest.mark.slow
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
    assert table["columns"][3:] == ["s1", "s2"]
    held = [float(cell) for cell in table["rows"][0][3:5]]
    assert float(table["rows"][0][1]) == pytest.approx(np.mean(held), abs=0.11)  # cells are rounded
    assert "this encoder" in (tmp_path / "report/tables.txt").read_text()

    layers = json.loads((tmp_path / "report/probe_layers.json").read_text())
    assert [row[0] for row in layers["rows"]] == [0, 1]  # the encoder's input and its one layer
    assert layers["columns"] == ["hidden state", "this encoder", "random-initialised encoder"]
    assert layers["plot"]["levels"] == pytest.approx(
        {"log-mel statistics": entry["score_log_mel"], "MFCC statistics": entry["score_mfcc"]}, abs=0.01
    )  # which have one "layer", so that it is the score
    assert min(layers["plot"]["lines"]["this encoder"]) - 20 < entry["score"] < 100.01

    shots = json.loads((tmp_path / "report/probe_shots.json").read_text())
    assert [row[0] for row in shots["rows"]] == [row[0] for row in table["rows"]]
    assert shots["plot"]["x"] == [1, 5, 20]
    assert shots["plot"]["lines"]["this encoder"] == pytest.approx(
        [entry[f"score_{k}_shot"] for k in (1, 5, 20)], abs=0.01
    )
    assert shots["plot"]["lines"]["MFCC statistics"][2] > 85
    assert "over 20 draws" in shots["title"]  # of two seeds

    kept = sorted((tones.parent / "cache" / "evals").iterdir())
    assert len(kept) == 6  # three controls, two seeds
    changed = json.loads(kept[0].read_text())
    assert changed["probe"]["accuracy"].keys() == {"s1", "s2"}


def test_tables_average_what_they_say():
    def scores(accuracies, layers, draws):
        probe = dict(accuracy=accuracies, layers=layers, mean=float(np.mean(list(accuracies.values()))))
        return dict(probe=probe, shots={"1": draws})

    first = scores(
        {"a": 50.0, "b": 70.0}, [{"a": 50.0, "b": 60.0}, {"a": 40.0, "b": 70.0}], {"a": [10, 30], "b": [30, 50]}
    )
    second = scores(
        {"a": 52.0, "b": 74.0}, [{"a": 52.0, "b": 62.0}, {"a": 42.0, "b": 74.0}], {"a": [20, 20], "b": [0, 40]}
    )
    flat = scores({"a": 80.0, "b": 82.0}, [{"a": 80.0, "b": 82.0}], {"a": [50, 50], "b": [50, 50]})
    rows = {_probe_tables.THIS: [first, second], _probe_tables.MFCC: [flat, flat]}
    assert _probe_tables.speakers(rows, 7)["rows"] == [
        ["this encoder", "61.5", "1.5", "51.0", "72.0"], ["MFCC statistics", "81.0", "0.0", "80.0", "82.0"],
    ]  # fmt: skip
    layers = _probe_tables.layers(rows, 7)
    assert layers["rows"] == [[0, "56.0"], [1, "56.5"]]
    assert layers["plot"]["levels"] == {"MFCC statistics": 81.0}
    shots = _probe_tables.shots(rows, 7)
    assert shots["rows"][0] == ["this encoder", f"25.0 ± {np.std([20, 40, 10, 30]):.1f}"]
    assert shots["columns"] == ["features", "1 example a class"]
    assert "over 4 draws" in shots["title"]


def test_results_are_found_by_what_they_come_from(tmp_path):
    source = tmp_path / "code.py"
    source.write_text("x = 1")
    names = np.array(["a", "b"])

    def name(x=(1.0, 2.0), options=(0, ["s"]), labels=names):
        return _cache.digest([np.array(x, np.float32), labels], options, [str(source)])

    first = name()
    assert name() == first
    others = [name(x=(1.0, 2.5)), name(options=(1, ["s"])), name(labels=np.array(["a", "c"])), name(x=((1.0, 2.0),))]
    source.write_text("x = 2")
    assert len({first, *others, name()}) == 6
    calls = []
    find = lambda: _cache.cached(tmp_path / "evals", first, lambda: calls.append(1) or {"score": 0.1})  # noqa: E731
    assert [find(), find()] == [{"score": 0.1}] * 2
    assert len(calls) == 1
    (tmp_path / "evals" / f"{first}.json").write_text('{"score": ')  # torn
    assert find() == {"score": 0.1}
    assert len(calls) == 2
    assert _cache.cached(source / "no folder", first, lambda: 7) == 7


def test_shots_that_the_recordings_cannot_give_are_left_out(caplog):
    labelled = SimpleNamespace(labels=np.array(list("aabbaabbb")), speakers=np.array(list("xxxxyyyyy")))
    probe = SimpleNamespace(_tested=lambda _: ["x", "y"])
    with caplog.at_level("INFO", "speechjax"):
        assert Probe._available(probe, labelled, (5, 2, 1, 2)) == (1, 2)
        assert "no more than 2 recordings of the rarest label" in caplog.text
        caplog.clear()
        assert Probe._available(probe, labelled, ()) == ()
        assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(held_out=("nobody",)), "nobody.*there are: s0, s1"),
        (dict(pattern="(?P<label>x)(?P<speaker>y)"), "fits no id"),
        (dict(shots=(0, 5)), "shots"),
    ],
)
def test_mistakes_are_named(tones, tmp_path, options, message):
    config = probe_config(tones)
    config.evals.probe.update(**options)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path)

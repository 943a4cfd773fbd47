"""SUPERB's configs against the published code's numbers (s3prl/downstream/*/config.yaml), not against configs/."""

import importlib.util
import re
from pathlib import Path

import pytest

from speechjax import config as configs
from speechjax import experiment, optim, train
from speechjax.data.label_spec import parse_labels
from speechjax.logs import read_metrics

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / "configs/superb"
# Rate, updates, updates between evaluations, clipping, weight decay.
PUBLISHED = {
    "asr": (1e-4, 200_000, 2000, 1.0, 0.0),
    "asv": (1e-4, 200_000, 10_000, 1000.0, 0.01),
    "er": (1e-4, 30_000, 1000, 1.0, 0.0),
    "ic": (1e-4, 200_000, 4000, 1.0, 0.0),
    "ks": (1e-4, 200_000, 4000, 1.0, 0.0),
    "pr": (1e-2, 100_000, 1000, 1.0, 0.0),
    "sd": (1e-4, 30_000, 500, 1.0, 0.0),
    "sid": (1e-4, 200_000, 4000, 1.0, 0.0),
}
UTTERANCES = dict(projection=256, pooling="mean", loss="softmax", label_smoothing=0.0)
HEADS = {
    "asr": dict(name="ctc", recurrent_layers=2, recurrent_width=1024, head_dropout=0.2),
    "asv": dict(
        name="speaker", projection=512, embedding=512, tdnn=512, tdnn_top=1500, pooling="xvector", loss="am",
        margin=0.4, scale=30.0,
    ),
    "er": dict(name="classify", class_weights="none", **UTTERANCES),
    "ks": dict(name="classify", class_weights="balanced", **UTTERANCES),
    "pr": dict(name="ctc", recurrent_layers=0),
    "sd": dict(name="frames", loss="turns"),
    "sid": dict(name="classify", class_weights="none", **UTTERANCES),
}  # fmt: skip
# Seconds of audio an update: utterances times their mean length, 12.7 s in train-clean-100, 8 s at most in VoxCeleb.
SECONDS = {"asr": 32 * 12.7, "pr": 32 * 12.7, "ks": 32 * 1.0, "asv": 50 * 8.0, "sid": 32 * 8.0, "ic": 32 * 2.3}

every = pytest.mark.parametrize("name", sorted(PUBLISHED))


def load(name: str, arg: str = "", overrides: tuple[str, ...] = ()):
    return configs.load(f"{FOLDER / name}.py:{arg}", overrides)


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_config_is_compared():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PUBLISHED)


@every
def test_recipes_are_those_of_the_published_code(name):
    found = load(name)
    rate, steps, between, clip, decay = PUBLISHED[name]
    assert (found.optim.learning_rate, found.train.steps, found.train.eval_every) == (rate, steps, between)
    assert (found.optim.clip_norm, found.optim.weight_decay) == (clip, ((".*", decay),))
    assert (found.optim.b1, found.optim.b2, found.optim.eps) == (0.9, 0.999, 1e-8)
    assert {key: found.task[key] for key in HEADS.get(name, {})} == HEADS.get(name, {})
    if name in SECONDS:
        assert found.data.batch_seconds == pytest.approx(SECONDS[name], rel=0.05)


@every
def test_the_encoder_is_fixed_and_heard_as_in_evaluation(name):
    found = load(name)
    assert found.optim.freeze == (("^encoder/", 0, -1),)
    assert found.task.layers == "weighted"
    dropouts = [key for key in found.model if "drop" in key]
    assert len(dropouts) == 5
    assert not any(found.model[key] for key in dropouts)
    assert found.task.mask_prob == found.task.channel_mask_prob == 0


@every
def test_the_rate_is_constant_from_the_first_update_on(name):
    block = load(name).optim
    keys = ("learning_rate", "warmup", "hold", "decay", "floor")
    rate = optim.schedule(steps=1000, **{key: block[key] for key in keys})
    assert [float(rate(k)) for k in (0, 1, 500, 999)] == pytest.approx([block.learning_rate] * 4)


@every
def test_the_documented_sweep_is_the_benchmarks(name):
    found = module(name)
    [(key, values)] = found.SWEEP.items()
    assert [float(value) for value in values] == [10.0**-k for k in range(1, 8)]
    assert f"--set {key}={','.join(values)}" in found.__doc__
    assert f"--config=configs/superb/{name}.py --out=runs/superb/{name}" in found.__doc__
    for value in values:
        assert load(name, overrides=(f"{key}={value}",)).optim.learning_rate == float(value)


@every
def test_the_best_checkpoint_is_chosen_by_the_benchmarks_score(name):
    found = load(name)
    evaluator, metric = found.train.best_metric.split("/")
    assert evaluator == "test"
    assert found.evals.test.every == 1  # at every evaluation, else there is nothing to choose by
    assert found.train.best_mode == ("min" if metric.endswith(("error", "eer", "der")) else "max")


@every
def test_own_recordings_need_a_source_and_are_held_out_by_themselves(name):
    found = load(name, "own,size=tiny", ("data.source=folder:/data/mine",))
    assert (found.data.source, found.data.valid) == ("folder:/data/mine", "")
    assert found.train.steps == 2000
    assert found.data.batch_seconds <= 32
    assert load(name).data.valid == load(name, "size=tiny").data.valid


def test_the_example_with_spoken_digits_reads_them():
    label = re.search(r"'--config\.data\.label=(id:[^']+)'", module("ks").__doc__)[1]
    [spec] = parse_labels(label)
    assert spec.read(dict(id="7_jackson_12.wav", meta={})) == "7"
    assert load("ks", "own,size=tiny", (f"data.label={label}",)).data.label == label


def test_what_is_held_out_is_what_the_source_says():
    for name, ids in dict(
        ks=["1:validation/000001"], pr=["1:dev_clean/000012"], ic=["1:wavs/speakers/a/b.wav"], sd=["1:b.wav"],
        sid=["1:validation/000001"],
    ).items():  # fmt: skip
        found = load(name).data
        assert all(re.search(found.valid, one) for one in ids)
        assert not re.search(found.valid, ids[0].replace("1:", "0:").replace("validation", "train").replace("dev", "x"))


def test_intents_have_three_heads():
    found = load("ic")
    assert found.evals.test.head == "action,object,location"
    assert set(found.task.heads) == {"action", "object", "location"}
    assert {spec.key for spec in parse_labels(found.data.label)} == {head.label for head in found.task.heads.values()}
    assert all(head.projection == 256 for head in found.task.heads.values())


@pytest.mark.slow
def test_a_miniature_trains_its_head_alone_and_is_scored(tmp_path):
    config = load("ic", "size=tiny,smoke", (f"data.cache_dir={tmp_path / 'cache'}",))
    (tmp_path / "run").mkdir()
    _, data = experiment.open_experiment(config, tmp_path / "run")
    assert train.train(config, data, tmp_path / "run") == 0
    entries = read_metrics(tmp_path / "run")
    [score] = [entry for entry in entries if entry["split"] == "test"]
    assert 0 <= score["accuracy"] <= min(score[f"accuracy_{head}"] for head in config.task.heads)

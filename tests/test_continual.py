"""Continual learning: its measures by hand, its mixtures against the pipeline, its commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechjax import config as configs
from speechjax import continual, ewc
from speechjax.continual import Corpus, summarise
from speechjax.data.mixture import parse_mixture, rates
from speechjax.data.records import open_records
from speechjax.data.split import held_out
from speechjax.errors import UserError

REPO = Path(__file__).resolve().parent.parent
CONFIG = f"{REPO}/configs/finetune/ctc.py:smoke"

# ---- measures


def test_measures_of_accuracies_by_hand():
    R = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.5, 0.6, 0.7]]
    found = summarise(R, "max")
    assert found["average"] == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert found["backward_transfer"] == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.8 - 0.6)) / 2)


def test_errors_have_the_same_measures_with_the_sign_of_an_accuracy():
    R = np.array([[0.9, 0.2, 0.1], [0.95, 0.8, 0.3], [0.5, 0.6, 0.7]])
    accuracy, error = summarise(R.tolist(), "max"), summarise((1 - R).tolist(), "min")
    assert error["average"] == pytest.approx(1 - accuracy["average"])
    for name in ("backward_transfer", "forgetting"):
        assert error[name] == pytest.approx(accuracy[name])
    # Forgetting is from the best that there ever was, 0.95, and not from what was there right after the task, 0.9.
    assert accuracy["forgetting"] == pytest.approx(((0.95 - 0.5) + (0.8 - 0.6)) / 2)
    assert accuracy["forgetting"] != pytest.approx(-accuracy["backward_transfer"])


def test_measures_on_the_way_and_of_adapters():
    assert summarise([[0.4, 0.1, 0.2]], "max") == {"average": 0.4}
    adapters = [[0.4, None], [0.4, 0.6]]
    assert summarise(adapters, "max") == {"average": 0.5, "backward_transfer": 0, "forgetting": 0}


# ---- data


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """{name: source} of two manifests with texts, one of 12 recordings, one of 8 longer ones."""
    monkeypatch.setenv("SPEECHJAX_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    found = {}
    for name, count, size, text in (("one", 12, 8000, "aba"), ("two", 8, 14_000, "aca")):
        lines = []
        for i in range(count):
            soundfile.write(tmp_path / f"{name}{i}.wav", rng.standard_normal(size + 10 * i) * 0.1, 16000)
            lines.append(json.dumps({"audio_filepath": f"{name}{i}.wav", "id": str(i), "text": text}) + "\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        found[name] = f"manifest:{tmp_path}/{name}.jsonl"
    return found


def opened(source):
    return open_records(source, min_seconds=0.1, max_bad_share=0.0)


def test_what_is_held_out_of_a_task_is_held_out_of_its_mixtures(corpora, tmp_path):
    """Both corpora call their recordings 0, 1, 2, ...: the part says whose they are."""
    parts = [continual.read_corpus(opened(corpora[name]), 3.0, "") for name in ("two", "one")]
    assert all(corpus.held_out for corpus in parts)
    (tmp_path / "ids").write_text("".join(f"{name}\n" for name in continual._ids(parts)))
    records = opened(" + ".join(corpora[name] for name in ("two", "one")))
    kept = {(int(records.part[i]), records.id(i)[2:]) for i in held_out(records, 0, f"@{tmp_path}/ids")}
    assert kept == {(part, name) for part, corpus in enumerate(parts) for _, name in corpus.held_out}
    # A source that is a mixture itself has several parts, so that what follows moves on.
    both = continual.read_corpus(records, 3.0, "^[01]:1$")
    assert (both.parts, both.held_out) == (2, [(0, "1"), (1, "1")])
    assert continual._ids([parts[1], both])[-2:] == ["1:1", "2:1"]
    assert continual._ids([Corpus(1, [(0, "x")], 1.0)]) == ["x"]


def test_a_mixture_gives_earlier_tasks_their_share(corpora):
    sources = [corpora["two"], f"{corpora['one']}?weight=2&copy=no"]
    found = [continual.read_corpus(opened(source), 1.0, "") for source in sources]
    parts = parse_mixture(continual.mixture(sources, found, 0.3))
    assert [part.copy for part in parts] == [True, False]
    seconds = [found[0].seconds, found[1].seconds / 2]
    share = rates(seconds, [part.weight for part in parts], 1.0) * seconds
    assert share[1] / share.sum() == pytest.approx(0.3, abs=1e-5)  # weights have six digits
    even = rates(seconds, [1.0, 1.0], 1.0) * seconds
    assert even[1] / even.sum() != pytest.approx(0.3, abs=1e-2)


# ---- the sequence, with processes that only write what others would read


@pytest.fixture
def calls(monkeypatch):
    """What was called; an evaluation of run i on task j finds 10 i + j."""
    made = []

    def call(command, log_file):
        flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in command[1:])
        made.append((command[0].removeprefix("speechjax."), flags))
        if command[0] == "speechjax.main":
            Path(flags["workdir"]).mkdir(exist_ok=True)
        if command[0] == "speechjax.ewc":
            (Path(flags["workdir"]) / "ewc.npz").touch()
        if command[0] == "speechjax.evaluate":
            i, j = Path(flags["workdir"]).name[0], Path(flags["config.data.valid"]).name[0]
            metrics = {"error_rate": float(f"{i}{j}")}
            Path(flags["out"]).write_text(json.dumps({"evals": {"valid": {"metrics": metrics}}}))
        return 0

    monkeypatch.setattr(continual, "call", call)
    return made


def run(tmp_path, tasks, *flags: str):
    return continual.run(
        [f"--config={CONFIG}", f"--out={tmp_path}/out", "--config.data.min_seconds=0.1", *flags, "--tasks",
         *(f"{name}={source}" for name, source in tasks.items())]
    )  # fmt: skip


def trainings(calls):
    return [flags for verb, flags in calls if verb == "main"]


def test_each_task_goes_on_from_the_one_before(corpora, tmp_path, calls, capsys):
    assert run(tmp_path, corpora, "--config.train.steps=5") == 0
    first, second = trainings(calls)
    assert "config.init_from" not in first
    assert second["config.init_from"] == first["workdir"]
    assert second["config.data.source"] == corpora["two"]
    assert first["config.train.steps"] == "5"
    result = json.loads((tmp_path / "out/continual.json").read_text())
    assert result["matrix"] == [[11, 12], [21, 22]]
    assert result["backward_transfer"] == -10  # an error that rose from 11 to 21
    assert capsys.readouterr().out == (tmp_path / "out/continual.md").read_text()
    # Every run is judged on the same recordings of a task.
    judged = {(f["config.data.source"], f["config.data.valid"]) for verb, f in calls if verb == "evaluate"}
    assert len(judged) == 2
    vocabulary = json.loads((tmp_path / "out/1-one/vocab.json").read_text())
    assert vocabulary["tokens"][4:] == ["a", "b", "c"]  # c is in the second task alone
    del calls[:]
    assert run(tmp_path, corpora, "--config.train.steps=5") == 0
    assert calls == []


def test_more_tasks_go_on_and_other_ones_do_not(corpora, tmp_path, calls):
    assert run(tmp_path, corpora) == 0
    del calls[:]
    three = corpora | {"three": corpora["one"]}
    assert run(tmp_path, three) == 0
    assert [Path(f["workdir"]).name for f in trainings(calls)] == ["3-three"]
    assert sum(verb == "evaluate" for verb, _ in calls) == 5  # of the last run all, of the others the new task
    with pytest.raises(UserError, match="holds another sequence of tasks"):
        run(tmp_path, dict(reversed(corpora.items())))
    with pytest.raises(UserError, match="holds runs of another method"):
        run(tmp_path, corpora, "--method=replay:0.5")
    with pytest.raises(UserError, match="holds runs of another config"):
        run(tmp_path, corpora, "--config.train.seed=5")


def test_replay_hears_and_is_judged_by_all_so_far(corpora, tmp_path, calls):
    three = corpora | {"three": corpora["one"]}
    assert run(tmp_path, three, "--method=replay:0.25") == 0
    first, second, third = trainings(calls)
    assert first["config.data.source"] == corpora["one"]
    parts = parse_mixture(third["config.data.source"])
    assert [part.source for part in parts] == [corpora["one"], corpora["one"], corpora["two"]]
    assert parts[0].weight == 1
    assert parts[1].weight == parts[2].weight < 1
    listed = Path(third["config.data.valid"][1:]).read_text().split()
    assert {name.partition(":")[0] for name in listed} == {"0", "1", "2"}
    assert second["config.init_from"] == first["workdir"]


def test_adapters_are_apart(corpora, tmp_path, calls, monkeypatch):
    load = configs.load
    with pytest.raises(UserError, match=r"--method=adapters wants --config.init_from=RUN"):
        run(tmp_path, corpora, "--method=adapters")

    def with_base(spec, overrides):  # there is none to read
        config = load(spec, [text for text in overrides if not text.startswith("init_from=")])
        with config.unlocked():
            config.init_from = "base"
        return config

    monkeypatch.setattr(configs, "load", with_base)
    argv = [f"--config={CONFIG},trains=lora", f"--out={tmp_path}/out", "--config.data.min_seconds=0.1",
            "--method=adapters", "--config.init_from=base", "--tasks",
            *(f"{name}={source}" for name, source in corpora.items())]  # fmt: skip
    assert continual.run(argv) == 0
    assert [flags["config.init_from"] for flags in trainings(calls)] == ["base", "base"]
    result = json.loads((tmp_path / "out/continual.json").read_text())
    assert result["matrix"] == [[11, None], [11, 22]]
    assert not (tmp_path / "out/1-one/vocab.json").exists()  # each has its own head


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "a=embedded"], "at least two, of different names"),
        (["--tasks", "a=embedded", "a=embedded"], "at least two, of different names"),
        (["--tasks", "a=embedded", "b"], "--tasks b: write NAME=SOURCE"),
        (["--tasks", "a=embedded", "b/c=embedded"], "--tasks b/c=embedded: write NAME=SOURCE"),
        (["--tasks", "a=x", "b=y", "--method=replay"], "--method=replay: choose finetune, replay:SHARE"),
        (["--tasks", "a=x", "b=y", "--method=replay:1.5"], "--method=replay:1.5: choose"),
        (["--tasks", "a=x", "b=y", "--method=ewc:-1"], "--method=ewc:-1: choose"),
        (["--tasks", "a=x", "b=y", "--method=finetune:2"], "--method=finetune:2: choose"),
        (["--tasks", "a=x", "b=y", "--method=dream"], "--method=dream: choose"),
        (["--tasks", "a=x", "b=y", "--config.data.source=z"], "sources are those of --tasks"),
    ],
)
def test_mistakes_are_named(capsys, flags, message):
    with pytest.raises(SystemExit):
        continual.parse_args([f"--config={CONFIG}", "--out=x", *flags])
    assert message in capsys.readouterr().err


def _has_ewc() -> bool:
    return "ewc" in configs.load(CONFIG).optim


@pytest.mark.slow
@pytest.mark.parametrize("method", ["replay:0.3", "ewc:10"])
def test_two_real_tasks(corpora, tmp_path, monkeypatch, method):
    if method.startswith("ewc") and not _has_ewc():
        pytest.skip("config.optim has no ewc")
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    assert run(tmp_path, corpora, f"--method={method}") == 0
    result = json.loads((tmp_path / "out/continual.json").read_text())
    assert np.isfinite(result["matrix"]).all()
    assert "parameter arrays come from" in (tmp_path / "out/2-two.log").read_text()
    if method.startswith("ewc"):
        assert "are held" in (tmp_path / "out/2-two.log").read_text()
        one, both = (ewc.load(tmp_path / "out" / name) for name in ("1-one", "2-two"))
        assert sum(x.sum() for x in both.precision.values()) > sum(x.sum() for x in one.precision.values()) > 0

"""Pseudo-labels: the measures by hand, and a teacher of random weights over real files, interrupted and repeated."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from speechjax import config as configs
from speechjax import pseudo_label, recognition, runs
from speechjax.data.records import open_records
from speechjax.data.sources import open_source
from speechjax.data.text import make_tokenizer
from speechjax.errors import UserError
from speechjax.pseudo_label import confident, measures, uncertain

REPO = Path(__file__).resolve().parent.parent


def line(example: int, confidence: float, text: str = "ja", **more) -> dict:
    return dict(example=example, confidence=confidence, text=text, duration=1.5, margin=None, entropy=None, **more)


def test_measures_by_hand():
    probabilities = np.array([0.5, 0.3, 0.0])
    with np.errstate(divide="ignore"):
        found = measures(np.log(probabilities).astype(np.float32), length=4)
    assert found["confidence"] == pytest.approx(0.5 ** (1 / 4), abs=1e-6)
    p = np.array([5 / 8, 3 / 8])  # among the two that there are
    assert found["margin"] == pytest.approx(p[0] - p[1], abs=1e-6)
    assert found["entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)


def test_measures_at_the_edges():
    assert measures(np.array([-2.0]), 2) == dict(confidence=round(math.exp(-1), 6), margin=None, entropy=None)
    assert measures(np.array([-0.1]), 0)["confidence"] == 0  # says nothing
    assert measures(np.array([-np.inf]), 0)["confidence"] == 0
    assert measures(np.array([3.0]), 2)["confidence"] == 1  # a word bonus may lift a score above 0
    assert measures(np.array([-1.0, -np.inf]), 1)["margin"] == 1
    assert measures(np.array([-1.0, -1.0]), 1)["entropy"] == pytest.approx(math.log(2), abs=1e-6)


def test_what_is_kept():
    lines = [line(0, 0.2), line(1, 0.9), line(2, 0.95, " "), line(3, 0.5), line(4, 0.99, "j⁇"), line(5, 0.7)]
    assert [k["example"] for k in confident(lines)] == [0, 1, 3, 5]
    assert [k["example"] for k in confident(lines, least=0.5)] == [1, 3, 5]
    assert [k["example"] for k in confident(lines, share=0.5)] == [1, 5]  # of the four
    assert [k["example"] for k in uncertain(lines, 2, "confidence")] == [0, 3]
    for k, (margin, entropy) in enumerate([(0.5, 0.1), (0.1, 0.2), (0.3, 0.9), (1, 0), (1, 0), (1, 0)]):
        lines[k] |= dict(margin=margin, entropy=entropy)
    assert [k["example"] for k in uncertain(lines, 2, "margin")] == [1, 2]
    assert [k["example"] for k in uncertain(lines, 2, "entropy")] == [2, 1]


def test_summary_counts_tenths():
    text = pseudo_label.summary([line(0, 0.0, ""), line(1, 0.05), line(2, 1.0)], [line(2, 1.0)])
    assert "3 recordings or parts, 0.00 h; 1 without a word" in text
    rows = {row.split()[0]: int(row.split()[1]) for row in text.splitlines() if row.startswith("  ")}
    assert (rows["0.0-0.1"], rows["0.9-1.0"], sum(rows.values())) == (2, 1, 3)


# ---- a teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The workdir of a recogniser with random weights, whose rows hold a second."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    small = ["data.crop_seconds=1.0", "data.batch_seconds=4.0", "data.min_seconds=0.1"]
    config = configs.load(f"{REPO}/configs/finetune/ctc.py:smoke", small)
    tokenizer = make_tokenizer("characters", ["die katze sitzt"])
    configs.override(config, f"task.classes={tokenizer.size}")
    task = configs.make_task(config)
    batch = dict(audio=jnp.zeros((1, 4000), jnp.int16), lengths=jnp.full(1, 4000, jnp.int32), mean=jnp.zeros(1),
                 std=jnp.ones(1))  # fmt: skip
    variables = dict(jax.jit(lambda: task.init({"params": jax.random.key(3)}, batch, method="answer"))())
    head = variables["params"]["head"]
    head["kernel"] = 10 * head["kernel"]  # sure of this and that, if never of <unk>
    head["bias"] = jnp.where(jnp.arange(tokenizer.size) == 3, -1e3, 0.0)
    runs.write_run(workdir, config, variables.pop("params"), variables, step=7, source={})
    tokenizer.save(workdir)
    return workdir


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Seven files below a folder: six of 0.3 to 0.8 s, and one of 2.5 s."""
    folder = tmp_path_factory.mktemp("untranscribed")
    rng = np.random.default_rng(0)
    for k, size in enumerate((4800, 6000, 7200, 8000, 11111, 12800, 40_000)):
        name = folder / f"sub/{k} ü.wav"
        name.parent.mkdir(exist_ok=True)
        tone = np.sin(np.arange(size) * 0.05 * (k + 1)) * 0.3 * np.linspace(0, 1, size)
        soundfile.write(name, tone + 0.05 * rng.standard_normal(size), 16000)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def label(tmp_path, teacher, recordings):
    """Labels with these flags; the lines of the file."""

    def run(*flags: str, out: str = "labels.jsonl") -> list[str]:
        argv = [f"--workdir={teacher}", f"--source=folder:{recordings}", f"--out={tmp_path / out}", *flags]
        assert pseudo_label.run(argv) == 0
        return (tmp_path / out).read_text().splitlines()

    return run


def test_a_manifest_of_what_was_heard(tmp_path, label, teacher, recordings, capsys):
    """Every line's audio is what the recording has there, and its confidence that of the best path."""
    lines = [json.loads(text) for text in label()]
    assert "9 recordings or parts" in capsys.readouterr().out
    assert [entry["id"] for entry in lines] == [
        *(f"sub/{k} ü.wav" for k in range(6)), *(f"sub/6 ü.wav#000{k}" for k in range(3))
    ]  # fmt: skip
    assert len({entry["teacher"] for entry in lines}) == 1
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    run = runs.open_run(str(teacher), place)
    assert lines[0]["teacher"] == run.digest
    for item, entry in zip(open_source(f"manifest:{tmp_path}/labels.jsonl").items(), lines, strict=True):
        audio = item.read()
        assert len(audio) == pytest.approx(entry["duration"] * 16000, abs=1)
        whole, _ = soundfile.read(entry["audio_filepath"], dtype="int16")
        begin = round(entry.get("offset", 0) * 16000)
        assert np.abs(audio.astype(int) - whole[begin : begin + len(audio)]).max() <= 1  # rounding to PCM
        assert item.meta["text"] == entry["text"]
    # Alone in its row, and with no other row beside it, the first recording is heard the same.
    records = open_records(f"folder:{recordings}", segment_seconds=1.0, min_seconds=0.1, max_bad_share=0.0)
    audio = records.read(0)
    batch = dict(audio=audio[None], lengths=np.array([len(audio)], np.int32), mean=records.mean[:1],
                 std=records.std[:1])  # fmt: skip
    found = jax.jit(lambda v, b: run.task.apply(v, b, method="answer"))(run.variables, batch)
    log_probs = np.asarray(jax.nn.log_softmax(found["logits"][0, : int(found["lengths"][0])]))
    assert lines[0]["confidence"] == pytest.approx(
        math.exp(log_probs.max(axis=1).sum() / len(lines[0]["text"])), rel=1e-3
    )  # one id a character, and float32 sums in another order
    assert 0 < lines[0]["confidence"] < 1


def test_given_again_it_goes_on_and_another_threshold_hears_nothing(tmp_path, label, monkeypatch):
    heard = []
    call = recognition.Recognizer.__call__
    monkeypatch.setattr(
        recognition.Recognizer, "__call__", lambda self, v, batch: (heard.append(1), call(self, v, batch))[1]
    )
    first = label()
    batches = len(heard)
    assert batches > 1
    store = tmp_path / "labels.jsonl.hypotheses.jsonl"
    whole = store.read_bytes()
    head, *rest = whole.splitlines(keepends=True)
    store.write_bytes(head + b"".join(rest[:-3]) + rest[-3][:20])  # killed in the middle of a line
    (tmp_path / "labels.jsonl").unlink()
    assert label() == first
    assert batches < len(heard) < 2 * batches
    assert sorted(store.read_bytes().splitlines()) == sorted(whole.splitlines())
    again = len(heard)
    half = label("--share=0.5")
    assert len(heard) == again
    sure = sorted((json.loads(text)["confidence"] for text in first), reverse=True)
    assert sorted((json.loads(text)["confidence"] for text in half), reverse=True) == sure[: round(len(first) / 2)]
    with pytest.raises(UserError, match="has transcripts of another search: use another --out"):
        label("--decode.search=beam")
    with pytest.raises(UserError, match="has transcripts of another recordings"):
        label("--config.data.exclude=^sub/1")


def test_a_table_for_annotators_trains_as_a_manifest(tmp_path, label):
    flags = ("--select=4", "--by=margin", "--decode.search=beam", "--decode.best=3", "--decode.beams=4")
    header, *rows = label(*flags, out="todo.tsv")
    assert header.split("\t") == ["id", "path", "offset", "duration", "confidence", "text"]
    assert len(rows) == 4
    kept = [json.loads(text) for text in (tmp_path / "todo.tsv.hypotheses.jsonl").read_text().splitlines()[1:]]
    worst = sorted(kept, key=lambda found: found["margin"])[:4]
    assert [row.split("\t")[0] for row in rows] == [found["id"] for found in worst]
    corrected = [header, *("\t".join([*row.split("\t")[:-1], "says ja"]) for row in rows)]
    (tmp_path / "done.tsv").write_text("\n".join(corrected) + "\n")
    items = list(open_source(f"manifest:{tmp_path}/done.tsv").items())
    assert {item.meta["text"] for item in items} == {"says ja"}
    assert all(len(item.read()) for item in items)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--min-confidence=80",), "--min-confidence=80.0: above 0, at most 1"),
        (("--share=0.5", "--select=3"), "not allowed with"),
        (("--by=margin",), "says what --select=N selects"),
        (("--select=3",), "name a file that ends in .tsv"),
    ],
)
def test_flags_that_make_no_sense(label, capsys, flags, message):
    with pytest.raises(SystemExit):
        label(*flags)
    assert message in capsys.readouterr().err


def test_mistakes_are_named(tmp_path, label, teacher):
    with pytest.raises(UserError, match="has no 'beam'; allowed: beams"):
        label("--decode.beam=3")
    with pytest.raises(UserError, match=r"--by=entropy compares hypotheses: --decode.search=beam"):
        label("--select=2", "--by=entropy", out="todo.tsv")
    with pytest.raises(UserError, match="are in no files of their own"):
        label("--source=embedded:0.001")
    with pytest.raises(UserError, match="no transcript is kept: nothing is written"):
        label("--min-confidence=1.0", out="none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()

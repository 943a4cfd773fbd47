"""The labelling verb as a person runs it: real processes and interrupts, trained encoders, and mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile

from speechjax import config as configs
from speechjax import label as verb
from speechjax import metrics, sharding
from speechjax.checkpoint import Checkpoints
from speechjax.data.pipeline import batch_spec
from speechjax.data.plan import Shape
from speechjax.data.records import open_records
from speechjax.data.units import identities, open_units, unit_count
from speechjax.errors import UserError
from speechjax.labelling.codebook import load_codebook
from speechjax.labelling.features import hidden
from speechjax.runs import open_run
from speechjax.step import batch_shapes, init_state

REPO = Path(__file__).resolve().parent.parent
KEPT = ("shard-*", "codebook.*", "index.npy", "units.json", "labelling.json", "statistics.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in KEPT for path in folder.glob(pattern)}


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    """Four recordings of noise in bands, one of them long."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for k, seconds in enumerate((1.5, 2.0, 0.8, 4.0)):
        n = round(seconds * 16_000)
        tone = np.sin(np.arange(n) * np.repeat(rng.uniform(0.05, 1.5, n // 1600 + 1), 1600)[:n])
        soundfile.write(folder / f"{k}.wav", 0.2 * tone + 0.02 * rng.standard_normal(n), 16_000)
    return folder


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """A run with two checkpoints: step 3, which is the best, and step 5."""
    folder = tmp_path_factory.mktemp("run")
    config = configs.load(str(REPO / "configs/pretrain/wav2vec2.py:size=tiny,smoke"))
    configs.claim_workdir(folder, config)
    task, mesh = configs.make_task(config), sharding.make_mesh(data=-1, fsdp=1)
    shapes = batch_shapes(batch_spec(Shape(4, 8_000)), mesh)
    for seed, step, room in ((0, 3, "best"), (1, 5, "checkpoints")):
        state = jax.jit(lambda seed=seed: init_state(task, optax.identity(), seed, shapes))()
        checkpoints = Checkpoints(folder / room, keep=2, every=1)
        checkpoints.save(step, state, {"model": configs.to_json(config)["model"]}, force=True)
        checkpoints.close()
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPEECHJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def run(*arguments: str | Path) -> int:
    """In this process."""
    return verb.run([*map(str, arguments)])


# ---- interrupted, as a process


def start(out: Path) -> subprocess.Popen:
    """Labels the embedded corpus; listens to interrupts even where the tests run in the background of a script."""
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-m", "speechjax.label", "--source=embedded:0.01", "--features=mfcc", "--clusters=20",
               "--inits=2", "--patience=150", "--batch-seconds=20", f"--out={out}"]  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", listening, *command], cwd=REPO, text=True, stderr=subprocess.PIPE,
                            env=dict(os.environ), start_new_session=True)  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, printed = process.communicate(timeout=300)
    return process.returncode, printed


@pytest.mark.slow
def test_interrupted_the_same_command_makes_the_same_bytes(tmp_path):
    code, printed = finish(start(tmp_path / "whole"))
    assert code == 0, printed
    assert "PNMI" in printed
    assert "labels:" in printed  # how to train on it
    process = start(tmp_path / "part")
    deadline = time.monotonic() + 200
    while not (tmp_path / "part" / "fit" / "state.npz").exists():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    code, printed = finish(process)
    assert code == 1
    assert "the same command goes on where this one stopped" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "part" / "codebook.json").exists()  # it was fitting
    code, printed = finish(start(tmp_path / "part"))
    assert code == 0, printed
    assert "fitting goes on at batch" in printed
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 9
    _check_the_report(tmp_path / "whole")
    code, printed = finish(start(tmp_path / "whole"))  # nothing is left to do
    assert code == 0
    assert "fitt" not in printed
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def _check_the_report(out: Path) -> None:
    """Its numbers from the units and the phones, frame by frame."""
    numbers = json.loads((out / "statistics.json").read_text())
    store = open_units(out)
    records = open_records("embedded:0.01", segment_seconds=1e9, min_seconds=0, max_bad_share=1)
    pairs = []
    for i, row in enumerate(store.find(identities(records)).tolist()):
        units = store.read(row)
        for j, unit in enumerate(units.tolist()):
            centre = (160 * j + 200) / 16_000
            pairs += [(symbol, unit) for symbol, a, b in records.meta(i)["phones"] if a <= centre < b]
    assert len(pairs) == sum(numbers["counts"])  # the phones of the embedded corpus cover all of it
    symbols = sorted({symbol for symbol, _ in pairs})
    table = metrics.joint_counts(np.array([symbols.index(s) for s, _ in pairs]), np.array([u for _, u in pairs]),
                                 len(symbols), 20)  # fmt: skip
    assert numbers["pnmi"] == pytest.approx(metrics.pnmi(table))
    assert numbers["phone_purity"] == pytest.approx(metrics.phone_purity(table))
    assert numbers["pnmi"] > numbers["pnmi_shuffled"] + 0.1
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") == 2
    assert "Phone purity" in page


# ---- encoders


def test_a_run_is_read_as_it_is_and_left_as_it_is(workdir):
    before, place = tree(workdir), sharding.replicated(sharding.make_mesh(data=-1, fsdp=1))
    found = {which: open_run(f"{workdir}{which}", place) for which in ("", "@best", "@newest", "@5", "@3")}
    assert {which: run.step for which, run in found.items()} == {"": 3, "@best": 3, "@newest": 5, "@5": 5, "@3": 3}
    assert found[""].digest == found["@3"].digest != found["@5"].digest
    task = found[""].task
    shapes = batch_shapes(batch_spec(Shape(4, 8_000)), sharding.make_mesh(data=-1, fsdp=1))
    for which, seed in (("@3", 0), ("@5", 1)):
        params = jax.jit(lambda seed=seed: init_state(task, optax.identity(), seed, shapes))().params
        jax.tree.map(np.testing.assert_array_equal, found[which].variables["params"], params)
    assert tree(workdir) == before


def test_a_flipped_byte_of_a_checkpoint_is_found(workdir, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(workdir, broken)
    state = broken / "best" / "3" / "state"
    largest = max((path for path in state.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    place = sharding.replicated(sharding.make_mesh(data=-1, fsdp=1))
    with pytest.raises(UserError, match="cannot be read"):
        open_run(str(broken), place)
    assert open_run(f"{broken}@5", place).step == 5


def test_a_layer_is_the_tasks_own(workdir):
    """Output of the n-th layer, not of the n+1-th or its input."""
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    run = open_run(str(workdir), sharding.replicated(mesh))
    batch = {name: jnp.ones(shape, dtype) for name, (shape, dtype) in batch_spec(Shape(4, 8_000)).items()}
    batch |= {"audio": jax.random.randint(jax.random.key(0), (4, 8_000), -999, 999, jnp.int16)}
    batch |= {"lengths": jnp.int32([8_000, 4_000, 6_000, 8_000])}
    states = run.task.apply(run.variables, batch, method="features").hidden
    for layer in (0, 1):
        features = hidden(str(workdir), layer, mesh)
        frames, lengths = features.compute(features.variables, batch)
        np.testing.assert_allclose(frames, states[layer], atol=1e-5)
        assert lengths.tolist() == [unit_count(n, features.hop, features.extra) for n in (8_000, 4_000, 6_000, 8_000)]
    assert not np.allclose(states[0], states[1], atol=1e-2)


def test_labels_by_a_layer_and_by_the_same_codebook_elsewhere(workdir, sounds, tmp_path, monkeypatch):
    from speechjax.labelling import windows

    cut = windows.cut
    monkeypatch.setattr(windows, "cut", lambda lengths, **about: cut(lengths, seconds=3.0, **about))
    out, again = tmp_path / "labels", tmp_path / "again"
    given = (f"--features={workdir}", "--layer=1", "--clusters=4", "--passes=2", "--inits=1", "--batch-seconds=4")
    assert run(f"--source=folder:{sounds}", f"--out={out}", *given) == 0
    book, store = load_codebook(out), open_units(out)
    assert book is not None
    assert book.centroids.shape == (4, 32)
    assert (store.hop, store.extra, store.codebook) == (320, 80, book.digest)
    assert store.info["units"] == sum(unit_count(n, 320, 80) for n in (24_000, 32_000, 12_800, 64_000))
    # The same codebook without a word about features: they are its own.
    assert run(f"--source=folder:{sounds}", f"--out={again}", f"--codebook={out}", "--batch-seconds=4") == 0
    assert open_units(again).digest == store.digest
    # A codebook is of one checkpoint: that there is another one now must not go by unseen.
    with pytest.raises(UserError, match=r"other features \(checkpoint differ\)"):
        run(f"--source=folder:{sounds}", f"--out={again}", f"--codebook={out}", f"--features={workdir}@5")
    with pytest.raises(UserError, match=r"holds another codebook \(features\)"):
        run(f"--source=folder:{sounds}", f"--out={out}", f"--features={workdir}@5", *given[1:])


# ---- mistakes


def test_every_mistake_is_one_clear_line(workdir, sounds, tmp_path):
    source, out = f"--source=folder:{sounds}", f"--out={tmp_path / 'out'}"
    short = tmp_path / "short"
    short.mkdir()
    soundfile.write(short / "a.wav", np.sin(np.arange(300)), 16_000)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(workdir / "config.json", bare)
    for arguments, words in (
        ((source, out, "--features=/nowhere", "--layer=1"), "/nowhere: no such folder; name the --workdir of a run"),
        ((source, out, f"--features={workdir}"), "needs --layer=N"),
        ((source, out, f"--features={workdir}", "--layer=2"), "layers 1 to 1"),
        ((source, out, f"--features={workdir}@4", "--layer=1"), "no such checkpoint .* there are 3, 5"),
        ((source, out, f"--features={bare}", "--layer=1"), "there is none yet"),
        ((source, out, "--features=mfcc", "--layer=1"), "mfcc has none"),
        ((source, out, "--features=mfcc", "--clusters=1"), "at least 2"),
        ((source, out, "--features=mfcc", "--method=em"), "minibatch or lloyd"),
        ((source, out, "--features=mfcc", "--clusters=20000"), "different frames"),
        ((source, out, f"--codebook={tmp_path}"), "no codebook.json"),
        ((f"--source=folder:{short}", out, "--features=mfcc"), "long enough for a frame"),
        (("--source=nonsense", out, "--features=mfcc"), "nonsense"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value)
    for wrong in ((source, out), (source, out, "--features=mfcc", "--fraction=0"),
                  (source, out, "--codebook=x", "--clusters=5"),
                  (source, out, "--features=mfcc", "--batch-seconds=0")):  # fmt: skip
        with pytest.raises(SystemExit):
            run(*wrong)


def test_a_folder_of_other_labels_is_refused_and_its_own_command_is_idle(sounds, tmp_path, capfd):
    out, own = tmp_path / "out", tmp_path / "sounds"
    shutil.copytree(sounds, own)
    given = (f"--source=folder:{own}", f"--out={out}", "--features=mfcc", "--clusters=4", "--passes=2", "--inits=1")
    assert run(*given) == 0
    assert "PNMI" not in capfd.readouterr().err  # no phones, no such number
    before = contents(out)
    assert run(*given) == 0
    assert contents(out) == before
    for other, words in (("--clusters=5", "clusters: 4 -> 5"), ("--seed=1", "seed: 0 -> 1"),
                         ("--fraction=0.5", "fraction: 1.0 -> 0.5")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            run(*given, other)
    # One recording has changed since, though not in length: its labels are stale.
    soundfile.write(own / "0.wav", 0.5 * np.sin(np.arange(24_000)), 16_000)
    with pytest.raises(UserError, match=r"another codebook \(source\)"):
        run(*given)
    assert contents(out) == before


def test_a_fraction_is_of_the_audio_and_a_larger_one_only_adds():
    rng = np.random.default_rng(0)
    keys, lengths = rng.integers(2**63, size=500).astype(np.uint64), rng.integers(1_000, 9_000, 500)
    chosen = [set(verb.some(keys, lengths, fraction).tolist()) for fraction in (1e-9, 0.1, 0.3, 1)]
    assert [len(chosen[0]), len(chosen[3])] == [1, 500]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]
    assert lengths[sorted(chosen[1])].sum() == pytest.approx(0.1 * lengths.sum(), abs=9_000)
    # What is held out follows the hash itself; what is fitted must not be just that.
    first = set(np.argsort(keys)[: len(chosen[2])].tolist())
    assert len(chosen[2] & first) < 0.6 * len(first)

"""Compiling for hardware that is not here: the verb, on CPU devices, and on compilers where they are installed."""

import json
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from speechjax import aot
from speechjax import config as configs
from speechjax.ahead import program
from speechjax.ahead.batch import longest_shape
from speechjax.data.plan import Shape
from speechjax.errors import UserError
from speechjax.step import micro_batches
from tests.tasks.experiments import REPO, experiment

SMOKE = f"{REPO}/configs/pretrain/apc.py:size=tiny,smoke"  # the quickest to compile
GIB = 2**30


def run(tmp_path, *flags: str, topology: str = "cpu:2") -> dict[str, Any]:
    """What the verb writes; raises what it raises."""
    file = tmp_path / "found.json"
    file.unlink(missing_ok=True)
    try:
        aot.run([f"--config={SMOKE}", f"--topology={topology}", f"--json={file}", *flags])
    finally:
        found = json.loads(file.read_text()) if file.exists() else {}
    return found


def test_a_step_that_fits(tmp_path, capsys):
    found = run(tmp_path)
    assert found["fits"]
    assert (found["devices"], found["mesh"]) == (2, dict(data=2, fsdp=1, tensor=1))
    assert (found["batch"]["rows"], found["batch"]["micro_batches"]) == (4, 1)
    assert found["batch"]["seconds_a_device"] == pytest.approx(2 * 2.505)
    memory = found["memory"]
    assert 0 < memory["arguments"] + memory["temporaries"] <= memory["needed"] < memory["device"]
    assert found["collectives"]["all-reduce"]["bytes"] >= 4 * found["parameters"], "all gradients are averaged"
    assert found["flops"]["total"] == pytest.approx(sum(v for k, v in found["flops"].items() if k != "total"))
    said = capsys.readouterr().out
    assert "collectives a step" in said
    assert "largest batch" not in said


class FakeCompiler:
    """Of steps that need 1.5 GiB, 0.5 more in parts, and 0.25 for every row that a device holds at once."""

    def __init__(self, room: float, refuses: bool = False):
        self.room, self.row_parts, self.state_bytes, self.refuses = room * GIB, 4, 1.0 * GIB, refuses
        self.steps: list[program.Step] = []

    def __call__(self, shape: Shape, device_seconds: float) -> program.Step:
        parts = micro_batches({"audio": ((shape.rows, shape.samples), np.int16)}, self.row_parts, device_seconds)
        needed = (1.5 + 0.5 * (parts > 1) + 0.25 * (shape.rows // self.row_parts) / parts) * GIB
        needed = math.inf if self.refuses and needed > self.room else needed
        self.steps.append(program.Step(shape, parts, 0.0, needed))
        return self.steps[-1]


@pytest.mark.parametrize("refuses", [False, True])
def test_what_is_named_in_place_of_a_batch_is_what_training_makes_of_it(refuses):
    config, task = experiment("wav2vec2")
    config = config.copy_and_resolve_references()
    config.data.update(dict(crop_seconds=10.0, batch_seconds=4 * 24 * 10.0, row_multiple=8))
    compiler: Any = FakeCompiler(5.1, refuses)  # holds 14 rows, or 12 of a batch in parts
    first = compiler(longest_shape(config, task), 0.0)
    assert first.needed > compiler.room
    found = aot.find_largest(compiler, first)
    assert (found["rows_a_device"], found["compilations"]) == (14, len(compiler.steps))
    assert found["compilations"] <= 8
    for text in found["overrides"]:
        configs.override(config, text)
    assert longest_shape(config, task).rows == 4 * 14
    (name, seconds) = found["micro_batches"][0].split("=")
    step = compiler(first.shape, float(seconds))
    assert (name, step.parts, step.needed <= compiler.room) == ("train.device_seconds", 2, True)

    roomy: Any = FakeCompiler(9.0)
    found = aot.find_largest(roomy, roomy(first.shape, 0.0))
    assert (found["rows_a_device"], found["micro_batches"]) == (30, []), "it fits: nothing needs to be cut"
    full: Any = FakeCompiler(1.6)
    found = aot.find_largest(full, full(first.shape, 0.0))
    assert (found["rows_a_device"], found["overrides"], found["micro_batches"]) == (0, [], [])


@pytest.mark.slow
def test_one_that_does_not_fit_is_refused_with_one_that_does(tmp_path, capsys):
    needed = run(tmp_path)["memory"]["needed"] / GIB
    with pytest.raises(UserError, match=r"the step needs .* GiB of a device; the largest batch that fits: ") as caught:
        run(tmp_path, f"--memory={0.8 * needed}")
    flags = str(caught.value).partition("fits: ")[2].partition(" (")[0].partition(", or cut the batch: ")
    larger, cut = flags[0].split(), flags[2].split()
    assert [flag.split("=")[0] for flag in larger] == ["--config.data.batch_seconds", "--config.data.row_multiple"]
    assert cut == ["--config.train.device_seconds=2.505"]
    for fix in (larger, cut):
        found = run(tmp_path, f"--memory={0.8 * needed}", *fix)
        assert found["fits"]
    assert (found["batch"]["rows"], found["batch"]["micro_batches"]) == (4, 2)
    with pytest.raises(UserError, match=r"nor fits one row of 2\.505 s a device: split the state with --mesh\.fsdp"):
        run(tmp_path, "--memory=0.001")


def test_rows_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"row_multiple=4 must be a multiple of the 3 parts .*\.row_multiple=3$"):
        run(tmp_path, topology="cpu:3")
    with pytest.raises(UserError, match=r"mesh\.fsdp=3 .* does not divide the 2 devices"):
        run(tmp_path, "--mesh.fsdp=3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--topology"),
        (["--topology=cpu:2", "--memory=-1"], "--memory=-1.0: a positive number"),
        (["--topology=cpu:2", "--json=/no/such/folder/x.json"], "no such folder: /no/such/folder"),
        (["--topology=cpu:2", "--data.source=x"], "unknown argument"),
    ],
)
def test_flags_that_make_no_sense(flags, message, capsys):
    with pytest.raises(SystemExit):
        aot.parse_args([f"--config={SMOKE}", *flags])
    assert message in capsys.readouterr().err


def process(*flags: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    command = [sys.executable, "-m", "speechjax.aot", *flags]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=1800)


def test_a_mistake_is_one_line_of_a_process():
    done = process(f"--config={SMOKE}", "--topology=v9:4x4")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --topology=v9:4x4: write CHIP:SHAPE")
    assert done.stderr.count("\n") == 1


# ---- compilers of hardware that is not here
@pytest.fixture
def tpu():
    pytest.importorskip("libtpu", reason="pip install 'speechjax[tpu]'")


@pytest.fixture
def gpu():
    pytest.importorskip("jax_cuda12_plugin", reason="pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt")


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "compiler"), [("v5e:2x2", "tpu"), ("h100:4", "gpu")])
def test_a_step_for_an_accelerator(topology, compiler, tmp_path, request):
    """And a batch that is refused; the one that is named in its place does compile."""
    request.getfixturevalue(compiler)
    file = tmp_path / "found.json"
    flags = [f"--config={SMOKE}", f"--topology={topology}", f"--json={file}", "--mesh.fsdp=2"]
    done = process(*flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert (found["devices"], found["mesh"]["fsdp"]) == (4, 2)
    assert found["collectives"]["all-reduce"]["count"] > 0
    assert (
        found["memory"]["arguments"] < found["memory"]["peak"] <= found["memory"]["needed"] < found["memory"]["device"]
    )
    assert found["least_step_seconds"] > 0

    many = ["--config.data.batch_seconds=4e6"]
    done = process(*flags, *many)
    assert done.returncode == 1
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("error: the step needs")
    fix = [flag for flag in last.partition("fits: ")[2].partition(", or cut")[0].split() if flag.startswith("--")]
    done = process(*flags, *many, *fix)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["memory"]["needed"] > 0.8 * found["memory"]["device"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4"])
@pytest.mark.parametrize("config", ["wav2vec2.py:size=large", "best_rq.py:size=paper"])
def test_the_large_models_compile_for_a_pod(config, topology, tpu, tmp_path):
    """With few rows a device: what is asked for is that the real step of the real sizes goes through the compiler."""
    file = tmp_path / "found.json"
    done = process(
        f"--config={REPO}/configs/pretrain/{config}", f"--topology={topology}", f"--json={file}", "--mesh.fsdp=16",
        "--config.data.batch_seconds=1024",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["devices"] == 16
    assert found["parameters"] > 3e8
    travels = found["collectives"]
    assert travels["all-reduce"]["count"] > 24, "something in every layer"
    # In bfloat16, once forwards and once backwards: gathered whole, or sent on from neighbour to neighbour.
    weights = sum(travels.get(kind, {"bytes": 0})["bytes"] for kind in ("all-gather", "collective-permute"))
    assert weights > 2 * 2 * found["parameters"] * 15 / 16

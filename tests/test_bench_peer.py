"""The other side of the benchmark is the same work: same weights, same function, and it learns.  Needs torch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from speechjax import config as configs
from speechjax.errors import UserError
from speechjax.speed import ours, work

pytest.importorskip("torch", reason="the peer of the benchmark is transformers on torch")
pytest.importorskip("transformers", reason="the peer of the benchmark is transformers on torch")

from speechjax.speed import peer

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and transformers warn of each other
REPO = Path(__file__).resolve().parent.parent
PRETRAIN = f"{REPO}/configs/pretrain"
STILL = [f"model.{name}=0.0" for name in ("dropout", "attention_dropout", "activation_dropout", "input_dropout")]


def sides(spec, shortest=1.0, overrides=()):
    """(config, batch) of a miniature; four rows, for the devices that tests have."""
    config, _ = work.open_config(f"{PRETRAIN}/{spec},smoke", overrides, "", comparable=True)
    return config, work.make_batch(configs.make_task(config), 4, 24080, shortest)


@pytest.mark.parametrize(
    "spec", ["wav2vec2.py:size=tiny", "wav2vec2.py:size=large", "hubert.py:size=tiny", "wavlm.py:size=tiny"]
)
def test_both_encoders_make_the_same_frames(spec):
    config, batch = sides(spec, shortest=0.5)
    side = ours.Encoding(config, batch)
    params = side.parameters_at_first()
    side.open()(1)
    theirs = peer.TheirEncoding(config, params, batch, "eager")
    theirs.open()(1)
    assert theirs.model.config._attn_implementation == ("eager" if "wavlm" in spec else "sdpa"), "their fastest"
    frames, others = side.frames(), theirs.frames()
    assert frames.shape == others.shape
    # Of shorter rows theirs differ by design where a norm runs over time: padding is in its statistics.
    rows = slice(None) if config.model.frontend.norm == "layer" else slice(0, 1)
    lengths = (batch["lengths"] - 80) // 320
    inside = np.arange(frames.shape[1])[None] < lengths[:, None]
    apart = lambda others: np.abs(frames - others)[rows][inside[rows]].max() / frames.std()  # noqa: E731
    assert apart(others) < 1e-4
    params["encoder"]["projection"]["bias"] = params["encoder"]["projection"]["bias"] + 0.1
    changed = peer.TheirEncoding(config, params, batch, "eager")
    changed.open()
    assert apart(changed.frames()) > 1e-3, "negative control: other weights"


@pytest.mark.parametrize("spec", ["wav2vec2.py:size=base", "wav2vec2.py:size=large", "hubert.py:size=base"])
def test_both_first_steps_have_one_loss_and_one_gradient(spec):
    """As far as chance lets them: masks, negatives and Gumbel noise are drawn apart."""
    more = ["model.width=64", "data.batch_seconds=20.0", "optim.warmup=0"]
    config, _ = work.open_config(f"{PRETRAIN}/{spec},smoke", [*STILL, *more], "", comparable=True)
    batch = work.make_batch(configs.make_task(config), 16, 80080)
    side = ours.Training(config, batch)
    params = side.parameters_at_first()
    side.open()(1)
    theirs = peer.TheirTraining(config, params, batch, "eager")
    run = theirs.open()
    run(1)
    assert theirs.losses[0] == pytest.approx(side.first["loss"], rel=0.02)
    assert theirs.norms[0] == pytest.approx(side.first["grad_norm"], rel=0.15)
    before = {name: p.detach().clone() for name, p in theirs.model.named_parameters()}
    run(2)
    moved = [float((p.detach() - before[name]).abs().max()) for name, p in theirs.model.named_parameters()]
    assert np.mean(np.array(moved) > 0) > 0.95, "it learns"


def test_gradients_are_clipped_where_ours_are():
    import torch  # pyright: ignore[reportMissingImports]

    config, batch = sides("hubert.py:size=tiny", overrides=["optim.clip_norm=1e-3"])
    theirs = peer.TheirTraining(config, ours.Training(config, batch).parameters_at_first(), batch, "eager")
    run = theirs.open()
    seen = []
    step = theirs.optimizer.step
    norm = lambda: float(torch.nn.utils.get_total_norm([p.grad for p in theirs.model.parameters()]))  # noqa: E731
    theirs.optimizer.step = lambda: (seen.append(norm()), step())
    run(1)
    assert theirs.norms[0] > 0.1
    assert seen[0] == pytest.approx(1e-3, rel=1e-2)


def test_bfloat16_is_another_rounding_of_the_same():
    config, batch = sides("hubert.py:size=tiny", overrides=STILL)
    params = ours.Training(config, batch).parameters_at_first()
    losses = []
    for variant in ("eager", "bf16"):
        theirs = peer.TheirTraining(config, params, batch, variant)
        theirs.open()(1)
        losses.append(theirs.losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]


def test_masks_drawn_ahead_come_around():
    import torch  # pyright: ignore[reportMissingImports]

    numbers = iter(range(1000))
    draw = peer.drawn_ahead(lambda: (torch.tensor(next(numbers)), 7), pin=lambda x: x)
    found = [int(draw()[0]) for _ in range(peer.AHEAD + 3)]
    assert found == [*range(peer.AHEAD), 0, 1, 2]


def test_objectives_that_transformers_lacks():
    config, batch = sides("data2vec.py:size=base")
    with pytest.raises(UserError, match="transformers trains no data2vec"):
        peer.TheirTraining(config, ours.Training(config, batch).parameters_at_first(), batch, "eager").open()
    config, batch = sides("apc.py:size=tiny")
    with pytest.raises(UserError, match=r"transformers has no class for this encoder \(mel, gru\)"):
        peer.TheirEncoding(config, ours.Encoding(config, batch).parameters_at_first(), batch, "eager").open()


@pytest.mark.slow
@pytest.mark.parametrize(("what", "key"), [("train", "train_step"), ("inference", "inference")])
def test_the_command(what, key, tmp_path):
    """One variant cannot be had, where no compiler is found: its error is shown, and the others go on."""
    file = tmp_path / "a.json"
    done = subprocess.run(
        [sys.executable, "-m", "speechjax.bench", f"--what={what}", f"--config={PRETRAIN}/wav2vec2.py:size=tiny,smoke",
         "--peer=hf", "--variants=eager,compile", "--repeats=3", "--threads=1", "--batch-seconds=4",
         "--crop-seconds=2", f"--json={file}"],
        capture_output=True, text=True, timeout=600,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "CXX": "/nowhere/c++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found[key]["repeats"] == 3
    assert 0 < found[key]["speedup"] < math.inf
    assert found[key]["reference"] == "transformers eager"
    assert found["runners"][2]["error"]
    assert found["runners"][2]["error"] in done.stdout
    assert ("loss" if what == "train" else "difference") in found["same"]


@pytest.mark.slow
def test_several_devices_are_refused():
    done = subprocess.run(
        [sys.executable, "-m", "speechjax.bench", "--what=train", f"--config={PRETRAIN}/wav2vec2.py:size=tiny,smoke",
         "--peer=hf"],
        capture_output=True, text=True, timeout=600, env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "--peer=hf runs on one device, here are 2" in done.stderr


def test_jax_is_on_the_cpu():
    """What the tests above compare is only the same there."""
    assert jax.default_backend() == "cpu"
    assert peer.device() == "cpu"

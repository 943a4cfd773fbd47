"""Two bidirectional LSTM layers against PyTorch's on packed sequences: outputs and every gradient."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.models.recurrent import LSTM, BiLSTM
from tests.golden.make_torch_lstm import HIDDEN, LAYERS, make_inputs

CLOSE = 1e-5  # theirs is float64: float32 sums of some twenty terms, through fourteen steps
Results = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def golden() -> Results:
    with np.load(Path(__file__).parent / "torch_lstm.npz") as file:
        return dict(file)


def from_torch(golden: Results, kind: str, biases: float = 1.0) -> dict[str, Any]:
    """`kind` ("weight" or "gradient") of every layer as this package has it; theirs has two biases, ours their sum.

    Both of theirs have the gradient of the sum, so of gradients `biases` is a half.
    """

    def layer(i: int) -> dict[str, Any]:
        ways = [f"l{i}", f"l{i}_reverse"]
        at = lambda name: [golden[f"{kind}/{name}_{way}"] for way in ways]  # noqa: E731
        bias = [biases * (a + b) for a, b in zip(at("bias_ih"), at("bias_hh"), strict=True)]
        project = dict(kernel=np.concatenate(at("weight_ih")).T, bias=np.concatenate(bias))
        return dict(input=project, kernel=np.stack([w.T for w in at("weight_hh")]))

    return {f"layer{i}": layer(i) for i in range(LAYERS)}


def compute(golden: Results, module: Any, params: Any) -> tuple[jax.Array, Any]:
    def loss(params, x):
        y = module.apply({"params": params}, x, golden["lengths"])
        return jnp.sum(y * golden["cotangent"]), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, golden["x"])
    return y, gradients


def test_golden_inputs_are_what_the_script_makes(golden):
    for name, array in make_inputs().items():
        np.testing.assert_array_equal(array, golden[name])


def test_outputs_and_every_gradient_equal_theirs(golden):
    y, (gradients, of_x) = compute(golden, BiLSTM(LAYERS, HIDDEN), from_torch(golden, "weight"))
    np.testing.assert_allclose(y, golden["output"], atol=CLOSE)
    np.testing.assert_allclose(of_x, golden["gradient/x"], atol=CLOSE)
    theirs = from_torch(golden, "gradient", biases=0.5)
    assert jax.tree.structure(gradients) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=CLOSE), gradients, theirs)
    assert min(np.abs(g).max() for g in jax.tree.leaves(theirs)) > 0.1


def test_parity_notices_swapped_gates_and_directions(golden):
    """Negative controls."""
    params = from_torch(golden, "weight")
    swaps = dict(
        directions=lambda k: k[::-1],
        gates=lambda k: np.concatenate([k[..., HIDDEN : 2 * HIDDEN], k[..., :HIDDEN], k[..., 2 * HIDDEN :]], -1),
    )
    for swap in swaps.values():
        wrong = params | {"layer1": params["layer1"] | {"kernel": swap(params["layer1"]["kernel"])}}
        y, _ = compute(golden, BiLSTM(LAYERS, HIDDEN), wrong)
        assert np.abs(y - golden["output"]).max() > 1e-2


def test_the_backward_direction_begins_in_the_padding_if_lengths_are_ignored(golden):
    """Negative control of lengths: rows that are shorter than the batch differ, the forward direction does not."""
    params = from_torch(golden, "weight")["layer0"]
    run = jax.jit(lambda x, n: LSTM(HIDDEN).apply({"params": params}, x, n))
    whole = np.full(len(golden["lengths"]), golden["x"].shape[1], np.int32)
    difference = np.abs(run(golden["x"], whole) - run(golden["x"], golden["lengths"]))
    for row, n in zip(difference, golden["lengths"], strict=True):
        assert (row[:n, :HIDDEN] == 0).all()
        assert row[:n, HIDDEN:].max() > 1e-2

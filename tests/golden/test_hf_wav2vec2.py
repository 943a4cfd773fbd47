"""Parity with `transformers.Wav2Vec2ForPreTraining`: hidden states, targets, losses and every gradient."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_wav2vec2 import from_hf, task_for
from make_hf_wav2vec2 import KINDS, make, make_inputs

from speechjax.models.masking import masked_slots, max_masked
from speechjax.tasks import wav2vec2

# float32, sums in another order.  Measured 8e-7 for states, 4e-7 for losses, 3e-6 for gradients.
CLOSE = 1e-5

Results = dict[str, np.ndarray]


def under(golden: Results, prefix: str) -> Results:
    return {name.removeprefix(prefix): a for name, a in golden.items() if name.startswith(prefix)}


def compute(golden: Results) -> dict[str, Any]:
    """The golden file's outputs by our model, with its weights, mask and negatives and without Gumbel noise."""
    task = task_for(json.loads(str(golden["config"])))
    params = from_hf(under(golden, "weight/"), task)
    batch = dict(audio=jnp.asarray(golden["audio"]), lengths=jnp.asarray(golden["lengths"]))
    mask = golden["mask"]
    slots = max_masked(mask.shape[1], prob=task.mask_prob, span=task.mask_span)
    positions, valid = (np.asarray(a) for a in masked_slots(jnp.asarray(mask), slots))
    slot_of_frame = np.cumsum(mask, axis=1) - 1
    negatives = np.take_along_axis(golden["negatives"], positions[..., None], axis=1)
    drawn = np.stack([slot_of_frame[row][negatives[row]] for row in range(len(mask))])

    def total(params):
        (losses, metrics), seen = task.apply(
            {"params": params}, batch, step=jnp.int32(0), train=True,
            rngs={"mask": jax.random.key(0), "gumbel": jax.random.key(0)}, mutable="intermediates",
            capture_intermediates=lambda m, _: m.name in ("project_context", "project_target"),
        )  # fmt: skip
        features = task.apply({"params": params}, batch, method="features")
        extracted = task.apply({"params": params}, batch, method=_normalised)
        others = (losses, metrics, seen["intermediates"], features, extracted)
        return sum(value for value, _ in losses.values()), others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wav2vec2, "span_mask", lambda *_, **__: jnp.asarray(mask))
        patch.setattr(wav2vec2, "sample_negatives", lambda *_: jnp.asarray(drawn, dtype=jnp.int32))
        patch.setattr(jax.random, "gumbel", lambda _, shape: jnp.zeros(shape))
        (loss, others), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    losses, metrics, seen, features, extracted = others
    hidden = {f"hidden{i}": state for i, state in enumerate(features.hidden)}
    at = lambda name: np.asarray(seen[name]["__call__"][0])[valid]  # noqa: E731
    results = dict(
        frames=features.lengths, last=features.frames, extracted=extracted, **hidden,
        projected_states=at("project_context"), projected_quantized_states=at("project_target"),
        contrastive=losses["contrastive"][0], diversity=losses["diversity"][0] / task.diversity, loss=loss,
        perplexity=metrics["prob_perplexity"][0], masked=losses["contrastive"][1], gradient=gradient,
    )  # fmt: skip
    return jax.tree.map(np.asarray, results) | {"task": task}


def _normalised(task, batch):
    return task.encoder.feature_norm(task.encoder.extract(batch)[0])


def error(ours: Any, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check_outputs(ours: dict[str, Any], golden: Results):
    np.testing.assert_array_equal(ours["frames"], golden["frames"])
    inside = np.arange(golden["mask"].shape[1]) < golden["frames"][:, None]
    states = [name for name in golden if name.startswith("hidden")]
    assert len(states) == ours["task"].encoder.layers + 1
    for name in [*states, "last", "extracted"]:
        assert error(np.asarray(ours[name])[inside], golden[name][inside]) < CLOSE, name
    for name in ("projected_states", "projected_quantized_states"):
        assert error(ours[name], golden[name][golden["mask"]]) < CLOSE, name
    assert ours["masked"] == golden["mask"].sum()
    for name in ("contrastive", "diversity", "loss", "perplexity"):
        assert error(ours[name], golden[name]) < CLOSE, name


def check_gradients(ours: dict[str, Any], golden: Results):
    theirs: dict[str, Any] = flatten_dict(from_hf(under(golden, "gradient/"), ours["task"]), sep="/")
    mine: dict[str, Any] = flatten_dict(ours["gradient"], sep="/")
    assert mine.keys() == theirs.keys()
    for path, gradient in theirs.items():
        if path.endswith("key/bias"):  # softmax does not feel it: rounding on both sides
            assert np.abs(gradient).max() < 1e-6
            assert np.abs(mine[path]).max() < 1e-6
        else:
            assert error(mine[path], gradient) < 3 * CLOSE, path


@pytest.fixture(scope="module", params=KINDS)
def golden(request) -> Results:
    with np.load(Path(__file__).parent / f"hf_wav2vec2_{request.param}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def ours(golden) -> dict[str, Any]:
    return compute(golden)


def test_outputs_and_losses_equal_the_reference(ours, golden):
    check_outputs(ours, golden)


def test_every_gradient_equals_the_reference(ours, golden):
    check_gradients(ours, golden)


def test_parity_notices_one_wrong_weight(ours, golden):
    """Negative control: one kernel of the last layer left untransposed."""
    name = "weight/wav2vec2.encoder.layers.1.attention.out_proj.weight"
    wrong = compute(golden | {name: golden[name].T})
    assert error(wrong["hidden1"], np.asarray(ours["hidden1"])) == 0
    with pytest.raises(AssertionError):
        check_outputs(wrong, golden)


def test_mapping_refuses_missing_and_unknown_names(golden):
    task = task_for(json.loads(str(golden["config"])))
    weights = under(golden, "weight/")
    with pytest.raises(KeyError, match="project_hid"):
        from_hf({n: a for n, a in weights.items() if n != "project_hid.bias"}, task)
    with pytest.raises(ValueError, match="lm_head"):
        from_hf(weights | {"lm_head.weight": weights["project_hid.weight"]}, task)


def test_golden_inputs_are_what_the_script_makes(golden):
    for name, array in make_inputs(json.loads(str(golden["config"]))).items():
        np.testing.assert_array_equal(array, golden[name])


@pytest.mark.filterwarnings("ignore")  # theirs are not ours to fix
@pytest.mark.parametrize("kind", KINDS)
def test_live_model_agrees(kind):
    pytest.importorskip("torch", reason="live parity needs torch")
    pytest.importorskip("transformers", reason="live parity needs transformers")
    live = make(kind)
    ours = compute(live)
    check_outputs(ours, live)
    check_gradients(ours, live)

"""What data2vec, data2vec 2 and SpidR hide from the student is not heard, and what stands in its place is noise."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_data2vec import first, predict, second
from test_spidr import inner, spidr
from tiny_teacher import FRAMES, SAMPLES, init, keys, make_batch

from speechjax.models.visible import ConvDecoder
from speechjax.tasks import data2vec2

HOP, FIELD, T = 20, 30, 24


def samples_of(frames: np.ndarray) -> np.ndarray:
    """The samples that these frames hear: bool [B, T] -> [B, S]."""
    found = np.zeros((len(frames), SAMPLES), bool)
    for b, t in np.argwhere(frames):
        found[b, t * HOP : t * HOP + FIELD] = True
    return found


def altered(mask: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Batches with other samples where only masked frames hear them, and where visible frames do: bool [B, T] ->."""
    batch, visible = make_batch(), np.arange(T) < FRAMES[:, None]
    heard, hidden = samples_of(visible & ~mask), samples_of(visible & mask)
    assert (hidden & ~heard).sum() > 100
    assert not (mask & ~visible).any()
    loud = lambda where: batch | {"audio": np.where(where, 9000, batch["audio"]).astype(np.int16)}  # noqa: E731
    return loud(hidden & ~heard), loud(heard & (np.arange(SAMPLES) % 50 == 0))


def test_data2vecs_student_does_not_hear_masked_frames():
    task = first()
    variables = init(task)
    base = predict(task, variables, make_batch(), train=True)
    mask = base["mask"]
    other, control = (predict(task, variables, batch, train=True) for batch in altered(mask))
    np.testing.assert_array_equal(other["mask"], mask)
    np.testing.assert_array_equal(other["output"][mask], base["output"][mask])
    assert np.abs(other["target"] - base["target"])[mask].max() > 0.1, "the teacher hears them"
    assert np.abs(control["output"] - base["output"])[mask].max() > 1e-3, "negative control: samples that are heard"


def test_data2vec2s_student_does_not_hear_what_its_own_mask_hides():
    """Of the masks of one utterance each hides other frames, so rows under the other masks do hear the change."""
    task = second()
    variables = init(task)
    base = predict(task, variables, make_batch(), train=True)
    row, masks = np.arange(4 * task.masks), base["mask"]
    for m in range(task.masks):
        own = masks & (row % task.masks == m)[:, None]
        other, control = (predict(task, variables, batch, train=True) for batch in altered(masks[m :: task.masks]))
        np.testing.assert_array_equal(other["mask"], masks)
        np.testing.assert_array_equal(other["output"][own], base["output"][own])
        change = np.abs(other["output"] - base["output"])
        assert change[masks & ~own].max() > 1e-3, "negative control: another mask"
        assert np.abs(other["target"] - base["target"])[own].max() > 0.1, "the teacher hears them"
        assert np.abs(control["output"] - base["output"])[own].max() > 1e-3, "negative control: samples that are heard"


@pytest.mark.parametrize("same_layer", [True, False], ids=["spidr", "dinosr"])
def test_spidrs_student_does_not_hear_masked_frames(same_layer):
    variables = init(spidr())
    mask, logits, layers, _ = inner(variables, make_batch(), same_layer)
    other, control = (inner(variables, batch, same_layer) for batch in altered(mask))
    np.testing.assert_array_equal(other[0], mask)
    for k, own in enumerate(logits):
        np.testing.assert_array_equal(other[1][k][mask], own[mask])
        assert np.abs(other[2][k] - layers[k])[mask].max() > 0.1, "the teacher hears them"
        assert np.abs(control[1][k] - own)[mask].max() > 1e-4, "negative control: samples that are heard"


def test_data2vec2s_decoder_gets_noise_in_masked_places_only(monkeypatch):
    task = second(mask_noise=0.3)
    seen, attend = {}, data2vec2.attend_visible

    def attended(*args):
        seen["visible"] = attend(*args)
        return seen["visible"]

    def watch(call, args, kwargs, context):
        if isinstance(context.module, ConvDecoder) and context.method_name == "__call__":
            seen["decoder"] = args[0]
        return call(*args, **kwargs)

    @jax.jit
    def run(variables, rngs):
        with nn.intercept_methods(watch):
            out = task.apply(variables, make_batch(), True, rngs=rngs, method="_regress")
        return out["mask"], seen["visible"], seen["decoder"]

    variables = init(task)
    monkeypatch.setattr(data2vec2, "attend_visible", attended)
    mask, visible, given = jax.tree.map(np.asarray, run(variables, keys(task)))
    np.testing.assert_array_equal(given[~mask], visible[~mask])
    assert np.abs(visible[~mask]).max() > 0.1
    noise = given[mask].astype(np.float64)  # 78 frames of 32: their deviation is known to 1.4 %
    assert noise.std() == pytest.approx(0.3, rel=0.07)
    assert noise.mean() == pytest.approx(0, abs=0.03)
    assert (np.abs(noise) > 0.6).mean() == pytest.approx(0.0455, abs=0.015), "normal"
    assert len(np.unique(noise)) > 0.99 * noise.size, "drawn for every mask, frame and feature"
    assert not np.isin(noise, np.asarray(run(variables, keys(task, 1))[2])).any(), "and anew for every batch"

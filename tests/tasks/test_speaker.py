"""Speaker embeddings: margins against a closed form, also where the angle passes pi; x-vectors; chance and alarms."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_heads import COUNTS, POOLED, look, make_batch, make_task, make_variables, run
from tiny_hubert import means

from speechjax.errors import UserError
from speechjax.tasks.speaker import EDGE, TDNN, Speaker, XVector, margin_logits, unit
from tests.drawing import draw_params

CLASSES = 5
LABEL = np.array([2, 4, 1], np.int32)
SEEN = np.array([3, 0, 10, 1, 2], np.int32)


@functools.cache
def made(loss: str = "aam", pooling: str = "mean", **more: Any) -> Any:
    fields: dict[str, Any] = dict(margin=0.2, scale=30.0, embedding=3, tdnn=4, tdnn_top=6, classes=CLASSES)
    task = make_task(Speaker, loss=loss, **POOLED | dict(pooling=pooling) | fields | more)
    batch = make_batch(label=LABEL)
    return task, make_variables(task, batch) | {"prior": dict(counts=SEEN)}, batch


# ---- margins


def wanted(cosine: np.ndarray, label: np.ndarray, loss: str, m: float, s: float, easy: bool = False) -> np.ndarray:
    """By angles, in float64."""
    x = cosine.astype(np.float64)
    for row, k in enumerate(label):
        if k >= 0:
            angle = math.acos(x[row, k])
            if loss == "am":
                x[row, k] -= m
            elif angle + m < math.pi or easy:
                x[row, k] = math.cos(angle + m)
            else:
                x[row, k] -= m * math.sin(m)
    return s * x


@pytest.mark.parametrize("m", [0.2, 0.5])
@pytest.mark.parametrize("loss", ["am", "aam"])
def test_margins_are_those_of_the_papers(loss, m):
    cosine = np.concatenate([np.random.default_rng(0).uniform(-0.9, 0.9, (30, 4)), np.full((2, 4), [[-0.995]])])
    cosine = cosine.astype(np.float32)
    label = np.array([*range(4)] * 7 + [-1, 2, 0, 3])
    found = np.asarray(margin_logits(jnp.asarray(cosine), jnp.asarray(label, jnp.int32), loss, m, 30.0))
    np.testing.assert_allclose(found, wanted(cosine, label, loss, m, 30.0), rtol=1e-4, atol=1e-4)
    if loss == "aam":
        trapped = wanted(cosine, label, loss, m, 30.0, easy=True)
        assert np.abs(found - trapped).max() > 0.1, "negative control: no care beyond pi"


def test_a_better_angle_never_scores_worse():
    """Trap: cos(angle + margin) rises again beyond pi, so that the worst embeddings would be pushed away further."""
    cosine = jnp.linspace(-1, 1, 401)[:, None]
    label = jnp.zeros(401, jnp.int32)
    score = np.asarray(margin_logits(cosine, label, "aam", 0.5, 1.0))[:, 0]
    assert (np.diff(score) > 0).all()
    naive = wanted(np.asarray(cosine, np.float64), np.zeros(401, int), "aam", 0.5, 1.0, easy=True)[:, 0]
    assert (np.diff(naive) < 0).any(), "negative control"
    slope = jax.vmap(jax.grad(lambda c: margin_logits(c[None, None], label[:1], "aam", 0.5, 1.0)[0, 0]))(cosine[:, 0])
    assert np.isfinite(slope).all()
    assert (np.asarray(slope) > 0).all()


@pytest.mark.parametrize("loss", ["softmax", "am", "aam"])
def test_loss_and_gradient_are_those_of_a_loop(loss):
    """The gradient of one prototype by central differences of the closed form."""
    task, variables, batch = made(loss)
    losses, metrics, sums, answer, gradient = run(task, variables, batch)
    embedding = answer["embedding"].astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(embedding[:2], axis=1), 1, rtol=1e-5)
    assert metrics["labelled_share"] == (2, 2)
    assert sums["labels"].tolist() == [0, 0, 1, 0, 1]
    if loss == "softmax":
        assert losses["speaker"][1] == 2
        return

    def total(prototypes):
        cosine = embedding @ (prototypes / np.linalg.norm(prototypes, axis=0))
        logits = wanted(cosine, LABEL, loss, 0.2, 30.0)
        return sum(np.log(np.exp(logits[r]).sum()) - logits[r, LABEL[r]] for r in (0, 1)), cosine

    prototypes = np.asarray(variables["params"]["prototypes"], np.float64)
    expected, cosine = total(prototypes)
    assert losses["speaker"] == (pytest.approx(expected, rel=1e-4), 2)
    assert metrics["accuracy"] == (sum(cosine[r].argmax() == LABEL[r] for r in (0, 1)), 2)
    for d, k in ((0, 2), (2, 4), (1, 0)):
        step = np.zeros_like(prototypes)
        step[d, k] = 1e-5
        slope = (total(prototypes + step)[0] - total(prototypes - step)[0]) / 2e-5 / 2  # of the mean over two rows
        assert gradient["prototypes"][d, k] == pytest.approx(slope, rel=1e-3, abs=1e-4)  # float32 beside a scale of 30


def test_chance_is_the_prior_with_the_margin():
    share = (SEEN + 1) / (SEEN.sum() + CLASSES)
    for loss, lost in (("softmax", 0.0), ("am", 30 * 0.2), ("aam", 30 * math.sin(0.2))):
        task, variables, batch = made(loss)
        metrics = run(task, variables, batch)[1]
        cost = 0.0
        for k in LABEL[:2]:
            logits = np.log(share)
            logits[k] -= lost
            cost += np.log(np.exp(logits).sum()) - logits[k]
        assert metrics["chance_speaker"] == (pytest.approx(cost, rel=1e-5), 2)


# ---- x-vectors


def test_x_vectors_see_whole_contexts_only():
    """Against convolutions without padding, of the frames of the row alone."""
    net = XVector(4, 6)
    counts = np.array([24, 17, 9], np.int32)
    x = make_batch(counts=counts)["frames"][0]
    params = draw_params(jax.eval_shape(lambda: net.init(jax.random.key(0), x, counts))["params"])
    apply = jax.jit(lambda x: net.apply({"params": params}, x, counts))
    found = np.asarray(apply(x))
    for row, n in ((0, 24), (1, 17)):
        y = x[row, :n].astype(np.float64)
        for k, (size, dilation) in enumerate(TDNN):
            layer = jax.tree.map(np.asarray, params[f"tdnn_{k + 1}"])
            frames = range(len(y) - (size - 1) * dilation)
            y = np.array([sum(y[t + j * dilation] @ layer["kernel"][j] for j in range(size)) for t in frames])
            y = np.maximum(y + layer["bias"], 0)
        assert len(y) == n - 2 * EDGE
        deviation = np.sqrt(y.var(axis=0, ddof=1) + 1e-12)
        np.testing.assert_allclose(found[row], np.concatenate([y.mean(axis=0), deviation]), rtol=1e-4, atol=1e-5)
    noisy = np.where(np.arange(24)[None, :, None] < counts[:, None, None], x, np.nan).astype(np.float32)
    np.testing.assert_array_equal(apply(noisy), found)
    assert np.abs(np.asarray(apply(x[:, ::-1])) - found).max() > 1e-3, "negative control: order matters"
    assert np.isfinite(found).all()
    assert found[2, :6].any()


@pytest.mark.parametrize("pooling", ["mean", "xvector"])
def test_nothing_in_the_padding_is_heard_and_the_unknown_teach_nothing(pooling):
    task, variables, batch = made("aam", pooling)
    found, noisy = (run(task, variables, b) for b in (batch, make_batch(padding=np.nan, label=LABEL)))
    np.testing.assert_array_equal(noisy[3]["embedding"][:2], found[3]["embedding"][:2])
    assert noisy[0]["speaker"] == found[0]["speaker"]
    assert np.abs(run(task, variables, make_batch(1, label=LABEL))[3]["embedding"] - found[3]["embedding"]).max() > 0.01
    nobody = run(task, variables, batch | {"label": np.full(3, -1, np.int32)})
    assert nobody[0]["speaker"] == (0, 0)
    assert all(np.isfinite(g).all() and not g.any() for g in jax.tree.leaves(nobody[4]))
    assert np.isfinite(found[3]["embedding"]).all()


def test_the_zero_vector_stays_zero():
    assert not np.asarray(unit(jnp.zeros((1, 3)))).any()
    assert np.isfinite(jax.grad(lambda x: jnp.sum(unit(x)))(jnp.zeros((1, 3)))).all()


# ---- the rest


def test_pictures_and_mistakes():
    task, variables, batch = made()
    shown = look(task, variables, batch)
    for row, n in enumerate(COUNTS[:2]):
        assert shown["true"][row].tolist() == [LABEL[row]] * n + [-1] * (24 - n)
    for changes, message in (
        (dict(loss="triplet"), "loss='triplet': choose from softmax, am, aam"),
        (dict(pooling="max"), "choose from mean, attention, xvector"),
        (dict(margin=2.0), r"margin=2\.0: must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            task.clone(**changes).apply(variables, batch, step=0, train=False)
    assert task.sizes() == {"label": ("config.task.classes", CLASSES)}


def test_alarms():
    """Embeddings that are all alike score no better than chance: nearly, at right angles to what they should be."""
    task, variables, batch = made()
    batch = batch | {"counts": np.array([24, 17, 20], np.int32)}
    params = variables["params"]
    same = dict(kernel=np.zeros_like(params["embed"]["kernel"]), bias=np.array([1, 0, 0], np.float32))
    logits = np.log((SEEN + 1) / (SEEN + 1).sum())
    cosine = (logits - logits.mean()) / 30
    prototypes = np.stack([cosine, np.sqrt(1 - cosine**2), np.zeros(CLASSES)]).astype(np.float32)
    found = means(*run(task, {**variables, "params": {**params, "embed": same, "prototypes": prototypes}}, batch)[:2])
    # Cosines are within 0.05 of a right angle, where the margin costs sin(margin) up to a percent.
    assert found["speaker"] == pytest.approx(found["chance_speaker"], rel=0.03)
    assert {"constant_prediction"} <= set(task.health({**found, "speaker": found["chance_speaker"]}, 1000))
    assert "stuck_at_chance" in task.health({**found, "speaker": found["chance_speaker"]}, 1000)
    assert task.health(found, 999) == {}

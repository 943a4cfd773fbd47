"""wav2vec 2.0 on packed rows: the losses, metrics and gradients of the same utterances in rows of their own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_wav2vec2 import STREAMS, random_params

from speechjax.tasks import wav2vec2

HOP, FIELD, SAMPLES, FRAMES = 20, 30, 800, 39
STARTS = np.array([[0, 80, 560], [80, 400, 0]], np.int32)
LENGTHS = np.array([[41, 445, 240], [301, 230, 0]], np.int32)  # the first is too short to be masked
PLACES = [(r, g) for r in range(2) for g in range(3) if LENGTHS[r, g]]
COUNTS = (LENGTHS[LENGTHS > 0] - FIELD) // HOP + 1


@pytest.fixture(scope="module")
def packed() -> dict[str, np.ndarray]:
    """float32, so that audio has a gradient; noise in the gaps too."""
    rng = np.random.default_rng(0)
    audio = rng.normal(0, 0.1, (2, SAMPLES)).astype(np.float32)
    mean, std = rng.normal(0, 0.02, (2, 3)).astype(np.float32), rng.uniform(0.08, 0.12, (2, 3)).astype(np.float32)
    return dict(audio=audio, starts=STARTS, lengths=LENGTHS, mean=mean, std=std)


@pytest.fixture(scope="module")
def alone(packed) -> dict[str, np.ndarray]:
    """The same utterances, one a row, noise in the padding."""
    audio = np.random.default_rng(1).normal(0, 0.1, (len(PLACES), SAMPLES)).astype(np.float32)
    for row, (r, g) in zip(audio, PLACES, strict=True):
        row[: LENGTHS[r, g]] = packed["audio"][r, STARTS[r, g] :][: LENGTHS[r, g]]
    return dict(audio=audio, **{n: np.array([packed[n][p] for p in PLACES]) for n in ("lengths", "mean", "std")})


@pytest.fixture(scope="module")
def model(tiny_wav2vec2):
    task = tiny_wav2vec2("large")
    return task, random_params(task)


def contrast(task, params, batch, train=True) -> dict[str, Any]:
    rngs = {name: jax.random.key(i) for i, name in enumerate(STREAMS)}
    out = task.apply({"params": params}, batch, jnp.int32(0), train, rngs=rngs, method="_contrast")
    return out | out["slots"]._asdict() | out["contrast"]._asdict()


def in_rows(masks: np.ndarray) -> np.ndarray:
    """Masks of single utterances [N, T], put where the packed rows hold them."""
    rows = np.zeros((len(STARTS), masks.shape[1]), bool)
    for mask, n, (r, g) in zip(masks, COUNTS, PLACES, strict=True):
        rows[r, STARTS[r, g] // HOP :][:n] = mask[:n]
    return rows


def next_peers(_, peers, negatives):
    """In place of random negatives: the slots that follow in the utterance, around its end."""
    count, first = jnp.sum(peers, axis=2)[..., None], jnp.argmax(peers, axis=2)[..., None]
    own, k = (jnp.arange(n, dtype=jnp.int32) for n in (peers.shape[2], negatives))
    return first + (own[None, :, None] - first + 1 + k[None, None]) % jnp.maximum(count, 1)


def test_losses_metrics_and_gradients_are_those_of_separate_rows(model, packed, alone, monkeypatch):
    """With the same masks, and negatives by a rule instead of a draw."""
    task, params = model
    rng = np.random.default_rng(2)
    masks = (rng.random((len(PLACES), FRAMES)) < 0.6) & (np.arange(FRAMES) < COUNTS[:, None])

    def compute(batch, mask):
        monkeypatch.setattr(wav2vec2, "span_mask", lambda *_, **__: jnp.asarray(mask))
        monkeypatch.setattr(wav2vec2, "sample_negatives", next_peers)

        def total(params):
            rngs = {"mask": jax.random.key(0)}
            losses, metrics = task.apply({"params": params}, batch, step=jnp.int32(0), train=False, rngs=rngs)
            return sum(value for value, _ in losses.values()), {**losses, **metrics}

        (_, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return jax.tree.map(np.asarray, (sums, gradient))

    sums, gradient = compute(packed, in_rows(masks))
    expected, expected_gradient = compute(alone, masks)
    assert sums["masked_share"] == (masks.sum(), COUNTS.sum())
    assert sums["accuracy"][1] > 20
    for name, pair in expected.items():
        np.testing.assert_allclose(sums[name], pair, rtol=1e-5, err_msg=name)  # float32; cosine over 0.1 costs a digit
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_gradient))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        # As above, through the backward pass of two layers.  Measured 3e-7.
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(np.abs(theirs).max(), 1e-2 * largest))

    whole = {"audio": packed["audio"], "lengths": np.full(2, SAMPLES, np.int32)}
    mixed, _ = compute(whole | {n: packed[n][:, 0] for n in ("mean", "std")}, in_rows(masks))
    for name in ("contrastive", "chance_accuracy", "feature_penalty"):
        assert abs(mixed[name][0] / expected[name][0] - 1) > 1e-3, "negative control: rows of one utterance"


def test_an_utterance_decides_its_own_losses_alone(model, packed):
    task, params = model
    run = jax.jit(lambda audio: contrast(task, params, packed | {"audio": audio}))
    changed = packed["audio"].copy()
    changed[0, 560:] *= -0.5
    changed[0, 50:80] = 0.3  # a gap
    base, other = jax.tree.map(np.asarray, (run(packed["audio"]), run(changed)))
    np.testing.assert_array_equal(base["mask"], other["mask"])
    last = (base["positions"] >= 28) & (np.arange(2) == 0)[:, None]
    for name in ("loss", "code", "correct", "chance", "candidates"):
        np.testing.assert_array_equal(base[name][base["valid"] & ~last], other[name][base["valid"] & ~last])
    assert (base["valid"] & last).sum() > 3
    assert (base["loss"] != other["loss"])[base["valid"] & last].all(), "negative control: its own losses"


def test_gaps_get_no_gradient_and_nothing_is_infinite(model, packed):
    task, params = model

    def total(params, audio):
        out = contrast(task, params, packed | {"audio": audio})
        return jnp.sum(jnp.where(out["valid"], out["loss"], 0)) + out["energy"]

    gradient, by_audio = jax.jit(jax.grad(total, (0, 1)))(params, packed["audio"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    used = np.zeros((2, SAMPLES), bool)
    for n, (r, g) in zip(COUNTS, PLACES, strict=True):
        used[r, STARTS[r, g] :][: (n - 1) * HOP + FIELD] = True
    by_audio = np.asarray(by_audio)
    assert (by_audio[~used] == 0).all()
    assert (by_audio[used] != 0).mean() > 0.9, "negative control: samples of frames"


def test_predictions_come_from_the_same_utterance(model, packed):
    task, params = model
    rngs = {"mask": jax.random.key(4)}
    show = lambda p: task.apply({"params": p}, packed, step=jnp.int32(0), rngs=rngs, method="predict")  # noqa: E731
    shown = jax.tree.map(np.asarray, jax.jit(show)(params))
    for name in ("true", "predicted"):
        np.testing.assert_array_equal(shown[name] >= 0, shown["mask"])
    for r, g in PLACES:
        inside = (shown["lengths"][r] == g + 1) & shown["mask"][r]
        assert set(shown["predicted"][r][inside]) <= set(shown["true"][r][inside])
    assert shown["mask"].sum(axis=1).min() > 5
    assert set(shown["true"][0][:28]) != set(shown["true"][0][28:]), "codes must differ for this to be a test"


def test_a_packed_batch_of_nothing_is_finite_and_weighs_nothing(model, packed):
    task, params = model
    rngs = {name: jax.random.key(0) for name in STREAMS}
    empty = packed | {"lengths": LENGTHS * 0}
    run = lambda p: task.apply({"params": p}, empty, step=jnp.int32(0), train=True, rngs=rngs)  # noqa: E731
    losses, metrics = jax.tree.map(np.asarray, jax.jit(run)(params))
    assert all(pair == (0, 0) for pair in losses.values())
    assert all(np.isfinite(x) for x in jax.tree.leaves(metrics))


def test_the_only_masked_frame_of_an_utterance_has_no_negative(tiny_wav2vec2, packed):
    """Spans of one frame in utterances of two: one frame each is masked, and the neighbour's is no negative."""
    task = tiny_wav2vec2("large", mask_span=1, codes=50)
    pairs = packed | {"starts": np.array([[0, 80, 160]] * 2, np.int32), "lengths": np.full((2, 3), 50, np.int32)}
    rngs = {name: jax.random.key(0) for name in STREAMS}
    run = lambda p: task.apply({"params": p}, pairs, step=jnp.int32(0), train=True, rngs=rngs)  # noqa: E731
    losses, metrics = jax.tree.map(np.asarray, jax.jit(run)(random_params(task)))
    assert metrics["masked_share"] == (6, 12)
    assert losses["contrastive"] == (0, 6)
    assert metrics["accuracy"] == (0, 0)

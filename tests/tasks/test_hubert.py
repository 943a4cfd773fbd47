"""The HuBERT task: its losses against loops in float64, which unit is whose, leaks, packed rows, collapse."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_hubert import (
    BASE,
    CODES,
    FIELD,
    FRAMES,
    HOP,
    LARGE,
    LENGTHS,
    SAMPLES,
    equal,
    make_batch,
    make_run,
    make_task,
    random_params,
    streams,
)

from speechjax.errors import UserError
from speechjax.models.masking import span_mask
from speechjax.tasks import _units, hubert

COUNTS = np.array([24, 17, 0])


@pytest.fixture(scope="module")
def model():
    """(task, parameters, jitted run) with published weights; features know only their own samples."""
    task = make_task(encoder=LARGE, feature_penalty=0.0)
    return task, random_params(task), make_run(task)


@pytest.fixture(scope="module")
def penalised():
    """(task, jitted run) with the published penalty of the features; for the parameters of `model`."""
    task = make_task(encoder=LARGE)
    return task, make_run(task)


# ------------------------------------------------------------------------------------------- losses


def reference(task, params, frames, units, where) -> dict[str, float]:
    """Cross-entropy over cosines by loops: frames [B, T, D], units [B, T], bool [B, T] -> sums."""
    kernel, bias, vectors = (
        np.asarray(x, np.float64)
        for x in (params["project"]["kernel"], params["project"]["bias"], params["code_vectors"])
    )
    sums: dict[str, Any] = dict(loss=0.0, correct=0, n=0)
    true, guessed = [], []
    for b, t in np.argwhere(where & (units >= 0)):
        x = np.asarray(frames[b, t], np.float64) @ kernel + bias
        logits = [x @ v / np.linalg.norm(x) / np.linalg.norm(v) / task.logit_temperature for v in vectors]
        sums["loss"] += np.log(np.exp(logits).sum()) - logits[units[b, t]]
        sums["n"] += 1
        true.append(int(units[b, t]))
        guessed.append(int(np.argmax(logits)))
        sums["correct"] += true[-1] == guessed[-1]
    for name, codes in (("true", true), ("guessed", guessed)):
        shares = [codes.count(c) / len(codes) for c in set(codes)]
        sums[name] = -sum(p * math.log(p) for p in shares)
        sums[f"most_{name}"] = max(codes.count(c) for c in set(codes))
    return sums


@pytest.fixture(scope="module", params=[(1.0, 0.0), (0.5, 0.25), (0.0, 2.0)], ids=lambda w: f"{w[0]}-{w[1]}")
def computed(request):
    """Losses, metrics and what they are made of, with a known mask, for three pairs of weights."""
    task = make_task(masked_weight=request.param[0], unmasked_weight=request.param[1])
    params, batch = random_params(task), make_batch()
    mask = np.asarray(span_mask(jax.random.key(7), jnp.asarray(COUNTS, jnp.int32), FRAMES, prob=0.65, span=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hubert, "span_mask", lambda *_, **__: jnp.asarray(mask))

        @jax.jit
        def run():
            losses, metrics = task.apply(
                {"params": params}, batch, step=jnp.int32(0), train=True, rngs=streams(task)
            )  # fmt: skip
            encode = lambda encoder: encoder.extract(batch)  # noqa: E731
            features, lengths = task.encoder.apply({"params": params["encoder"]}, method=encode)
            context = lambda encoder: encoder.contextualize(  # noqa: E731
                encoder.feature_norm(features), lengths, mask=jnp.asarray(mask), train=False
            )
            frames = task.encoder.apply({"params": params["encoder"]}, method=context).frames
            return losses, metrics, features, frames

        losses, metrics, features, frames = jax.tree.map(np.asarray, run())
    valid = np.arange(FRAMES) < COUNTS[:, None]
    return task, params, batch, losses, metrics, features, frames, mask & valid, ~mask & valid


def test_losses_and_metrics_are_those_of_loops(computed):
    """Cosine / 0.1 over all classes, the unit at frame * ratio, -1 left out, each part over its own frames."""
    task, params, batch, losses, metrics, features, frames, masked, rest = computed
    units = batch["units"][:, ::2][:, :FRAMES]
    parts = {"masked": (masked, task.masked_weight, ""), "unmasked": (rest, task.unmasked_weight, "_unmasked")}
    weighted = {name for name, (_, weight, _) in parts.items() if weight}
    assert set(losses) == {*weighted, "feature_penalty"}
    assert ("accuracy_unmasked" in metrics) == ("unmasked" in weighted), "no work for a part without a weight"
    for name in weighted:
        where, weight, tail = parts[name]
        expected = reference(task, params, frames, units, where)
        n = expected["n"]
        assert n < where.sum(), "some frames must lack a unit for their exclusion to be tested"
        # float32 against float64; dividing by 0.1 costs a digit.
        assert losses[name] == (pytest.approx(weight * expected["loss"], rel=1e-5), n)
        entropy = pytest.approx(weight * expected["true"] * n, rel=1e-5)
        assert metrics[f"chance_{name}"] == (entropy, n)
        assert metrics[f"accuracy{tail}"] == (expected["correct"], n)
        assert metrics[f"chance_accuracy{tail}"] == (expected["most_true"], n)
        for metric, key in (("target", "true"), ("prediction", "guessed")):
            assert metrics[f"{metric}_perplexity{tail}"] == (pytest.approx(math.exp(expected[key]), rel=1e-5), 1)
        for control in (batch["units"][:, 1::2], np.roll(units, 1, axis=1)):
            other = reference(task, params, frames, control[:, :FRAMES], where)
            assert abs(other["loss"] / expected["loss"] - 1) > 1e-3, "negative control: labels off by one"
    n = losses["feature_penalty"][1]
    energy = sum(np.square(f[:t], dtype=np.float64).sum() for f, t in zip(features, COUNTS, strict=True))
    assert losses["feature_penalty"][0] / n == pytest.approx(10 * energy / (41 * 16), rel=1e-5)
    assert metrics["masked_share"] == (masked.sum(), 41)
    assert metrics["labelled_share"] == ((masked & (units >= 0)).sum(), masked.sum())


def test_one_division_by_the_global_count(model):
    """Rows are independent, so sums add over the rows; a mean of the rows' means is something else."""
    _, params, run = model
    together, _, _ = run(params, make_batch())
    (a, m), (b, n) = (run(params, make_batch(lengths=LENGTHS * row))[0]["masked"] for row in ([1, 0, 0], [0, 1, 0]))
    assert 0 < n < m
    assert together["masked"] == (pytest.approx(a + b, rel=1e-5), m + n)  # float32
    assert abs((a / m + b / n) / 2 / ((a + b) / (m + n)) - 1) > 1e-3, "negative control: mean of means"


def test_the_feature_penalty_is_a_mean_over_all_frames_and_weighs_what_the_loss_weighs(model, penalised):
    """As published: mean energy of the features times the count that the loss is divided by, a sum over rows."""
    _, params, _ = model
    _, run = penalised
    rows = [run(params, make_batch(lengths=LENGTHS * np.int32(row)))[0] for row in ([1, 1, 0], [1, 0, 0], [0, 1, 0])]
    whole, first, second = (losses["feature_penalty"] for losses in rows)
    assert [losses["feature_penalty"][1] for losses in rows] == [losses["masked"][1] for losses in rows]
    assert whole[1] == first[1] + second[1] > first[1] > second[1] > 1
    means = [value / weight for value, weight in (whole, first, second)]
    assert means[0] == pytest.approx((24 * means[1] + 17 * means[2]) / 41, rel=1e-5)  # float32
    assert abs(means[1] / means[2] - 1) > 1e-4, "rows must differ"


def test_batches_of_nothing_weigh_nothing(model):
    """No audio; audio without units; rows too short to mask (90 samples are 4 frames, the span)."""
    _, params, run = model
    batch = make_batch()
    empty = [make_batch(lengths=LENGTHS * 0), batch | {"units": np.full_like(batch["units"], -1)}]
    empty.append(make_batch(lengths=np.array([90, 31, 10], np.int32)))
    for nothing in empty:
        losses, metrics, gradient = run(params, nothing)
        assert losses["masked"] == (0, 0)
        assert metrics["accuracy"] == metrics["target_perplexity"] == metrics["prediction_perplexity"] == (0, 0)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((metrics, gradient)))
        assert not any(g.any() for g in jax.tree.leaves(gradient))


def test_a_unit_beyond_the_codes_is_not_trained_on(model):
    """NaN, at which the loop stops; the command refuses such data before it begins, from `sizes`."""
    task, params, run = model
    assert task.sizes() == {"units": ("config.task.codes", CODES)}
    batch = make_batch()
    assert np.isfinite(run(params, batch)[0]["masked"]).all()
    assert np.isnan(run(params, batch | {"units": batch["units"] + CODES})[0]["masked"][0])


# ------------------------------------------------------------------------------------------- alignment


def frame_units(task, batch, frames=FRAMES):
    lengths = jnp.full(batch["units"].shape[0], frames, jnp.int32)
    return np.asarray(_units.frame_units(task.encoder, batch, task.unit_hop, lengths, frames))


@pytest.mark.parametrize(("unit_hop", "every"), [(10, [0, 2, 4, 6, 8]), (20, [0, 1, 2, 3, 4]), (30, [0, 0, 1, 2, 2])])
def test_a_frame_takes_the_unit_that_begins_with_it(unit_hop, every):
    """Index = frame * ratio, rounded down, as published: of 100 Hz labels every second one."""
    task = make_task(unit_hop=unit_hop)
    units = np.arange(SAMPLES // unit_hop, dtype=np.int32)[None] + 100
    batch = dict(audio=np.zeros((1, SAMPLES), np.int16), lengths=np.array([SAMPLES], np.int32), units=units)
    found = frame_units(task, batch)[0]
    np.testing.assert_array_equal(found[:5] - 100, every)
    frame = np.arange(FRAMES)
    first = (found - 100) * unit_hop  # sample
    assert ((first <= frame * HOP) & (frame * HOP < first + unit_hop)).all()


def test_units_at_another_rate_are_refused():
    batch = make_batch(unit_hop=20)
    with pytest.raises(UserError, match=r"config\.task\.unit_hop=10.* every 20 samples"):
        frame_units(make_task(), batch)


def test_several_tokens_at_one_time_are_refused():
    encoder = BASE | dict(frontend=dict(name="patch", n_mels=32, patch=(2, 16)))
    batch = dict(audio=np.zeros((1, 4000), np.int16), units=np.zeros((1, 25), np.int32))
    with pytest.raises(UserError, match=r"config\.model\.frontend\.name='patch'"):
        frame_units(make_task(encoder=encoder, unit_hop=160), batch, frames=24)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 1.0)])
def test_weights_that_teach_nothing_are_refused(weights):
    task = make_task(masked_weight=weights[0], unmasked_weight=weights[1])
    with pytest.raises(UserError, match=r"masked_weight.*above 0"):
        random_params(task)


def test_spectral_front_ends_learn_units_too():
    """MFCC frames of 10 ms stacked by two, units at 100 Hz."""
    encoder = LARGE | dict(frontend=dict(name="mfcc", factor=2))
    task = make_task(encoder=encoder, unit_hop=160, feature_penalty=0.0)
    rng = np.random.default_rng(0)
    audio = rng.integers(-9000, 9000, (2, 8000)).astype(np.int16)
    units = rng.integers(0, CODES, (2, 50)).astype(np.int32)
    batch = dict(audio=audio, lengths=np.array([8000, 6000], np.int32), units=units)
    show = lambda p: task.apply({"params": p}, batch, step=jnp.int32(0), rngs=streams(task), method="predict")  # noqa: E731
    shown = jax.tree.map(np.asarray, jax.jit(show)(random_params(task, batch)))
    for row, count in enumerate((24, 18)):  # (8000 - 240) // 160 // 2
        np.testing.assert_array_equal(shown["true"][row, :count], units[row, ::2][:count])
        assert (shown["true"][row, count:] == -1).all()


# ------------------------------------------------------------------------------------------- leaks and gradients


def test_padding_changes_nothing(model):
    """Neither audio nor units in the padding reach losses, metrics or gradients."""
    _, params, run = model
    batch, other = make_batch(), make_batch(1)
    padding = np.arange(SAMPLES) >= LENGTHS[:, None]
    late = np.arange(SAMPLES // 10) >= LENGTHS[:, None] // 10
    noise = batch | {
        "audio": np.where(padding, other["audio"], batch["audio"]),
        "units": np.where(late, other["units"], batch["units"]),
    }
    base = run(params, batch)
    equal(base, run(params, noise))
    audio = batch["audio"].copy()
    audio[:, 100:300] //= 2
    assert run(params, batch | {"audio": audio})[0]["masked"][0] != base[0]["masked"][0], "negative control"


def test_masked_frames_are_not_heard(model):
    """Samples that only masked frames see do not change the loss: the answer must not leak around the mask."""
    task, params, run = model
    batch = make_batch()
    show = lambda p: task.apply({"params": p}, batch, step=jnp.int32(0), rngs=streams(task), method="predict")  # noqa: E731
    mask = np.asarray(jax.jit(show)(params)["mask"])
    heard = np.zeros((3, SAMPLES), bool)
    for b, t in np.argwhere(~mask & (np.arange(FRAMES) < COUNTS[:, None])):
        heard[b, t * HOP : t * HOP + FIELD] = True
    hidden = ~heard & (np.arange(SAMPLES) < (COUNTS[:, None] - 1) * HOP + FIELD)
    assert hidden.sum() > 100
    base = run(params, batch)[0]["masked"]
    equal(base, run(params, batch | {"audio": np.where(hidden, 3000, batch["audio"]).astype(np.int16)})[0]["masked"])
    loud = np.where(heard & (np.arange(SAMPLES) % 50 == 0), 9000, batch["audio"]).astype(np.int16)
    assert run(params, batch | {"audio": loud})[0]["masked"] != base, "negative control: samples that are heard"


def test_gradient_reaches_every_parameter_through_the_mask(model):
    """All but the keys' biases: a constant added to every key moves all scores of a query alike."""
    _, params, run = model
    size = {p: np.abs(g).max() for p, g in flatten_dict(run(params, make_batch())[2], sep="/").items()}
    assert {p for p, s in size.items() if s < 1e-5} == {p for p in size if p.endswith("key/bias")}
    assert size["encoder/mask_embedding"] > 1e-4


def test_units_of_unmasked_frames_teach_nothing(model):
    """The published weights: another unit there leaves losses and gradients as they are."""
    task, params, run = model
    batch = make_batch()
    show = lambda p: task.apply({"params": p}, batch, step=jnp.int32(0), rngs=streams(task), method="predict")  # noqa: E731
    mask = np.asarray(jax.jit(show)(params)["mask"])
    unused = np.ones_like(batch["units"], bool)
    unused[:, : 2 * FRAMES : 2] = ~mask  # odd units belong to no frame
    equal(run(params, batch), run(params, batch | {"units": np.where(unused, 3, batch["units"])}))
    changed = run(params, batch | {"units": np.where(~unused, 3, batch["units"])})
    assert changed[0]["masked"][0] != run(params, batch)[0]["masked"][0], "negative control: units of masked frames"


def test_feature_grad_scale_reaches_the_front_end_only(model):
    task, params, run = model
    full = run(params, make_batch())[2]["encoder"]
    scaled = make_run(task.clone(feature_grad_scale=0.1, parent=None))(params, make_batch())[2]["encoder"]
    for a, b in zip(jax.tree.leaves(full["front"]), jax.tree.leaves(scaled["front"]), strict=True):
        np.testing.assert_allclose(b, 0.1 * a, atol=1e-5 * np.abs(a).max())  # float32
    np.testing.assert_allclose(full["projection"]["kernel"], scaled["projection"]["kernel"], atol=1e-6)


def test_feature_grad_scale_scales_the_penaltys_gradient_too(model, penalised):
    """In the published code the penalty is of features whose gradient is scaled already."""
    _, params, run = model
    task, with_penalty = penalised
    slow = make_run(task.clone(feature_grad_scale=0.1, parent=None))
    full, scaled, without = (
        jax.tree.leaves(each(params, make_batch())[2]["encoder"]["front"]) for each in (with_penalty, slow, run)
    )
    for a, b in zip(full, scaled, strict=True):
        np.testing.assert_allclose(b, 0.1 * a, atol=1e-5 * np.abs(a).max())  # float32
    share = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(full, without, strict=True)]
    assert max(share) > 0.1, "negative control: the penalty has a gradient"


def test_randomness_follows_the_key_alone(model):
    _, params, run = model
    first, again, other = (run(params, make_batch(), seed=seed) for seed in (0, 0, 1))
    equal(first, again)
    assert first[0]["masked"][0] != other[0]["masked"][0]


# ------------------------------------------------------------------------------------------- packed rows


STARTS = np.array([[0, 80, 560], [80, 400, 0]], np.int32)
PACKED = np.array([[41, 445, 240], [301, 230, 0]], np.int32)  # the first is too short to be masked
PLACES = [(r, g) for r in range(2) for g in range(3) if PACKED[r, g]]


def test_packed_rows_have_the_losses_and_gradients_of_separate_rows(monkeypatch):
    """With the same masks, for masked and unmasked frames; noise and stray units in the gaps."""
    task = make_task(encoder=LARGE, unmasked_weight=0.5)
    params = random_params(task)
    rng = np.random.default_rng(0)
    width, counts = 800, (PACKED[PACKED > 0] - FIELD) // HOP + 1
    packed = dict(
        audio=rng.normal(0, 0.1, (2, width)).astype(np.float32), starts=STARTS, lengths=PACKED,
        units=rng.integers(-1, CODES, (2, width // 10)).astype(np.int32),
        mean=rng.normal(0, 0.02, (2, 3)).astype(np.float32), std=rng.uniform(0.08, 0.12, (2, 3)).astype(np.float32),
    )  # fmt: skip
    alone = {n: np.array([packed[n][p] for p in PLACES]) for n in ("lengths", "mean", "std")}
    alone["audio"] = rng.normal(0, 0.1, (len(PLACES), width)).astype(np.float32)
    alone["units"] = rng.integers(0, CODES, (len(PLACES), width // 10)).astype(np.int32)
    masks = (rng.random((len(PLACES), 39)) < 0.6) & (np.arange(39) < counts[:, None])
    in_rows = np.zeros((2, 39), bool)
    for i, (r, g) in enumerate(PLACES):
        start, length = STARTS[r, g], PACKED[r, g]
        alone["audio"][i, :length] = packed["audio"][r, start:][:length]
        alone["units"][i, : length // 10] = packed["units"][r, start // 10 :][: length // 10]
        in_rows[r, start // HOP :][: counts[i]] = masks[i, : counts[i]]

    def compute(mask, *batches):
        monkeypatch.setattr(hubert, "span_mask", lambda *_, **__: jnp.asarray(mask))
        run = make_run(task)
        for batch in batches:
            losses, metrics, gradient = run(params, batch)
            yield {**losses, **metrics}, gradient

    moved = packed | {"units": np.roll(packed["units"], 1, axis=1)}
    (sums, gradient), (shifted, _) = compute(in_rows, packed, moved)
    [(expected, expected_gradient)] = compute(masks, alone)
    assert sums["masked_share"] == (masks.sum(), counts.sum())
    assert min(sums["accuracy"][1], sums["accuracy_unmasked"][1]) > 10
    for name, pair in expected.items():
        np.testing.assert_allclose(sums[name], pair, rtol=1e-5, err_msg=name)  # float32; cosine over 0.1 costs a digit
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_gradient))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(np.abs(theirs).max(), 1e-2 * largest))  # as above
    assert abs(shifted["masked"][0] / expected["masked"][0] - 1) > 1e-3, "negative control: units of the row moved"

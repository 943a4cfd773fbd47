"""BEST-RQ: masks, loss and metrics against loops, frozen targets, mixing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.errors import InvalidRngError
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from tiny_best_rq import (
    BANDS,
    LENGTHS,
    MELS,
    SAMPLES,
    G,
    K,
    V,
    few,
    make_batch,
    make_run,
    make_task,
    make_variables,
    means,
)

from speechjax.step import init_state, train_step
from speechjax.tasks.best_rq import bernoulli_spans, stacked_mask


@pytest.fixture(scope="module")
def model():
    """(task, variables, run)."""
    task = make_task()
    return task, make_variables(task), make_run(task, backward=True)


# ------------------------------------------------------------------------------------------- masks

jit_spans = jax.jit(bernoulli_spans, static_argnames=("frames", "prob", "span"))


@few
@given(st.lists(st.integers(0, 60), min_size=4, max_size=4), st.integers(0, 2**31 - 1))
def test_spans_start_anywhere_and_end_with_the_utterance(lengths, seed):
    """On the same draws, row by row: no count rule, overlaps allowed, no utterance masked whole."""
    got = np.asarray(jit_spans(jax.random.key(seed), jnp.asarray(lengths, jnp.int32), 60, prob=0.06, span=8))
    starts = np.asarray(jax.random.bernoulli(jax.random.key(seed), 0.06, (4, 60)))
    for row, t, start in zip(got, lengths, starts, strict=True):
        expected = np.zeros(60, bool)
        for first in np.flatnonzero(start[:t]):
            expected[first : min(first + 8, t)] = True
        np.testing.assert_array_equal(row, expected & ~expected[:t].all())


def test_published_masks_hide_a_third():
    """1 - 0.99 ** 40 of the frames away from the start, 33.1 %; 45.5 % with the streaming model's."""
    for prob, span in ((0.01, 40), (0.02, 30)):
        mask = np.asarray(jit_spans(jax.random.key(0), jnp.full(400, 1000), 1000, prob=prob, span=span))
        # 400 rows x 24 independent spans' worth: standard error 0.5 %.
        assert mask[:, span:].mean() == pytest.approx(1 - (1 - prob) ** span, abs=0.02)
        assert mask[:, 0].mean() == pytest.approx(prob, abs=0.02), "few spans reach back to the first frame"


def test_every_utterance_has_its_own_mask():
    """Trap: one mask for the batch, drawn from its shortest utterance, leaves the rest of the others unmasked."""
    lengths = jnp.array([60, 400, 400, 60], jnp.int32)
    masks = np.asarray(jit_spans(jax.random.key(0), lengths, 400, prob=0.03, span=20))
    assert (masks[1] != masks[2]).any()
    assert (masks[0] != masks[3]).any()
    assert masks[1:3, 60:].mean(axis=1).min() > 0.3
    assert not masks[[0, 3], 60:].any()
    alone = np.asarray(jit_spans(jax.random.key(0), jnp.array([400, 400, 0, 0], jnp.int32), 400, prob=0.03, span=20))
    np.testing.assert_array_equal(masks[1], alone[1], err_msg="the others' lengths do not matter")


@few
@given(st.sampled_from([2, 4, 5, 8]), st.sampled_from([0.5, 0.8, 1.0]), st.integers(0, 1000))
def test_stacked_frames_count_as_masked_by_share(factor, share, seed):
    rng = np.random.default_rng(seed)
    mask, lengths = rng.random((3, 43)) < 0.8, rng.integers(0, 43 // factor + 1, 3)
    got = np.asarray(stacked_mask(jnp.asarray(mask), jnp.asarray(lengths, jnp.int32), factor, share))
    assert got.shape == (3, 43 // factor)
    for b, t in np.ndindex(got.shape):
        count = int(mask[b, t * factor : (t + 1) * factor].sum())
        assert got[b, t] == (t < lengths[b] and 10 * count >= round(10 * share) * factor)


def test_all_frames_or_four_of_five():
    """Trap: WeNet asks for all frames of a stack, NeMo for 80 %, so 7 of 8 are enough there but not here."""
    mask = jnp.asarray([[True] * 8 + [False] + [True] * 7 + [False] * 2 + [True] * 6])
    for share, expected in ((1.0, [True, False, False]), (0.8, [True, True, False])):
        np.testing.assert_array_equal(stacked_mask(mask, jnp.array([3], jnp.int32), 8, share), [expected])


# ------------------------------------------------------------------------------------------- loss and metrics


def reference(variables, metrics, seen) -> dict[str, float]:
    """Loss and metrics by loops in float64, from the encoder's output and the clean input."""
    clean, lengths = seen["inputs"][0]
    noisy = seen["masked_input"]
    hidden = (clean != noisy).any(axis=2)
    frozen = variables["frozen"]["quantizer"]
    head = {k: np.asarray(v, np.float64) for k, v in variables["params"]["heads"].items()}
    frames = np.asarray(seen["Heads"][0], np.float64)
    sums = dict(loss=0.0, correct=0, n=0, valid=0)
    wanted, guessed, all_codes = (np.zeros((G, V)) for _ in range(3))
    for b, length in enumerate(lengths):
        for t in range(int(length) // K):
            stack = np.asarray(clean[b, t * K : (t + 1) * K], np.float64).ravel()
            masked = hidden[b, t * K : (t + 1) * K].all()
            sums["n"] += masked
            sums["valid"] += 1
            for g in range(G):
                y = stack @ np.asarray(frozen["projection"][g], np.float64)
                book = np.asarray(frozen["codebook"][g], np.float64)
                code = (book @ y / np.linalg.norm(book, axis=1)).argmax()
                all_codes[g, code] += 1
                if masked:
                    logits = frames[b, t] @ head["kernel"][g] + head["bias"][g]
                    sums["loss"] += (np.log(np.exp(logits).sum()) - logits[code]) / G
                    sums["correct"] += logits.argmax() == code
                    wanted[g, code] += 1
                    guessed[g, logits.argmax()] += 1

    def entropies(counts):
        p = counts / counts.sum(axis=1, keepdims=True)
        return -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=1)

    n = sums["n"]
    return dict(
        prediction=sums["loss"] / n, accuracy=sums["correct"] / n / G, masked_share=n / sums["valid"],
        chance_accuracy=float((wanted.max(axis=1) / n).mean()), chance_prediction=float(entropies(wanted).mean()),
        target_perplexity=float(np.exp(entropies(all_codes)).mean()),
        prediction_perplexity=float(np.exp(entropies(guessed)).mean()),
    )  # fmt: skip


def test_loss_and_metrics_are_the_definitions(model):
    _, variables, run = model
    losses, metrics, _, seen = run(variables, make_batch())
    expected, got = reference(variables, metrics, seen), means(losses, metrics)
    assert set(expected) == set(got)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-5), name  # float32
    assert losses["prediction"][1] > 10
    assert 0 < got["masked_share"] < 0.9
    assert got["target_perplexity"] > 2
    assert abs(math.exp(got["chance_prediction"]) - got["target_perplexity"]) > 0.01, "masked, and all frames"


def test_noise_replaces_masked_frames_and_nothing_else(model):
    task, variables, run = model
    noise = []
    for seed in range(6):
        seen = run(variables, make_batch(), seed)[3]
        (clean, lengths), noisy = seen["inputs"][0], seen["masked_input"]
        changed = clean != noisy
        np.testing.assert_array_equal(changed.any(axis=2), changed.all(axis=2), err_msg="whole frames")
        noise.append(noisy[changed])
        outside = np.arange(MELS) >= lengths[:, None]
        assert (noisy[outside] == 0).all()
        np.testing.assert_array_equal(seen["RandomQuantizer"][0][0].ravel(), clean[0].ravel(), "targets are clean")
    drawn = np.concatenate(noise)
    # N(0, 0.1) as published: a standard deviation.  Thousands of draws, standard error below 1 %.
    assert len(drawn) > 2000
    assert drawn.std() == pytest.approx(task.noise_std, rel=0.05)
    assert drawn.mean() == pytest.approx(0, abs=0.01)


def test_one_division_by_the_global_count(model):
    """Rows are independent, so sums add over the rows."""
    _, variables, run = model
    # A seed that masks frames of both rows, and not equally many.
    together, first, second = (
        run(variables, make_batch(lengths=LENGTHS * np.array(rows, np.int32)), 3)[0]["prediction"]
        for rows in ([1, 1, 0], [1, 0, 0], [0, 1, 0])
    )
    assert first[1] != second[1]
    assert min(first[1], second[1]) > 0
    assert together[0] == pytest.approx(first[0] + second[0], rel=1e-5)  # float32
    assert together[1] == first[1] + second[1]


@pytest.mark.parametrize(("subsample", "factor"), [("stack", 2), ("conv", 4), ("conv", 8)])
def test_targets_and_frames_are_aligned(subsample, factor):
    """Trap: frames and targets of different number.  Lengths that divide by nothing; a stack sees its own frames."""
    front = dict(name="mel", n_mels=BANDS, factor=factor, subsample=subsample, conv_channels=4, embedding=16)
    task = make_task(dict(frontend=front), codebooks=1)
    lengths = np.array([16_239, 9_001, 15_333], np.int32)
    rngs = {name: jax.random.key(1) for name in ("params", *task.rngs)}
    batch = make_batch(lengths=lengths)

    def both(batch):
        task_of = lambda m: (m._predict(batch, False), m.encoder.extract(batch))  # noqa: E731
        return task.init_with_output(rngs, method=task_of)[0]

    out, (features, frames) = jax.tree.map(np.asarray, jax.jit(both)(batch))
    assert out["targets"].shape[:2] == out["loss"].shape == out["masked"].shape == features.shape[:2]
    np.testing.assert_array_equal(out["lengths"], frames)
    np.testing.assert_array_equal(out["lengths"], (lengths - 240) // 160 // factor)
    np.testing.assert_array_equal(out["valid"].sum(axis=1), frames)


# ------------------------------------------------------------------------------------------- what is trained


def test_gradient_reaches_the_model_and_nothing_that_is_frozen(model):
    """No gradient: keys' biases (they move all scores alike), the mask embedding (noise masks here), frozen arrays."""
    _, variables, run = model
    gradient = run(variables, make_batch())[2]
    assert all((g == 0).all() for g in jax.tree.leaves(gradient["frozen"]))
    size = {path: float(np.abs(g).max()) for path, g in flatten_dict(gradient["params"], sep="/").items()}
    deaf = {path for path, s in size.items() if s < 1e-6}
    assert deaf == {path for path in size if path.endswith("key/bias")} | {"encoder/mask_embedding"}


def test_an_update_leaves_what_is_frozen_and_keeps_it_in_the_state():
    """Trap: trained or decayed projections.  They are in the checkpointed `extra`, with no moments and no decay."""
    task = make_task()
    tx = optax.adamw(0.1, weight_decay=0.5)
    batch = make_batch() | {"unread": np.zeros(3, np.int32)}
    state = jax.jit(lambda: init_state(task, tx, 0, batch))()
    assert set(state.extra) == {"frozen"}
    assert "quantizer" not in state.params
    step = jax.jit(lambda state, batch: train_step(task, tx, 0, 1, state, batch)[0])
    after = step(state, batch)
    assert int(after.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, after.extra, state.extra)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, state.params)
    assert moved["heads"]["kernel"], "negative control"


def test_padding_changes_nothing(model):
    _, variables, run = model
    batch = make_batch()
    padding = np.arange(SAMPLES) >= LENGTHS[:, None]
    noise = batch | {"audio": np.where(padding, make_batch(1)["audio"], batch["audio"])}
    assert (noise["audio"] != batch["audio"]).any()
    base, other = (run(variables, b)[:3] for b in (batch, noise))
    jax.tree.map(np.testing.assert_array_equal, base, other)
    batch["audio"][1, 3000:3400] //= 2
    assert base[0]["prediction"][0] != run(variables, batch)[0]["prediction"][0], "negative control: valid samples"


def test_batches_of_nothing_are_finite_and_weigh_nothing(model):
    _, variables, run = model
    losses, metrics, gradient, _ = run(variables, make_batch(lengths=LENGTHS * 0))
    assert losses["prediction"] == (0, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((metrics, gradient)))


# ------------------------------------------------------------------------------------------- mixing


def test_mixing_changes_the_input_not_the_targets():
    lengths = np.array([16_240, 9_000, 16_240], np.int32)
    plain, mixed = (make_task(mixing=share) for share in (0.0, 1.0))
    variables, batch = make_variables(plain), make_batch(lengths=lengths)
    alone, together = (make_run(task)(variables, batch) for task in (plain, mixed))
    out, heard = alone[3]["out"], together[3]["out"]
    for name in ("targets", "masked", "lengths"):
        np.testing.assert_array_equal(out[name], heard[name])
    clean, noisy = alone[3]["masked_input"], together[3]["masked_input"]
    assert (clean != noisy).any(axis=(1, 2)).all(), "every row is mixed"
    assert alone[0]["prediction"][0] != together[0]["prediction"][0]
    quiet = (make_run(task, train=False)(variables, batch)[0] for task in (plain, mixed))
    np.testing.assert_array_equal(*(np.asarray(losses["prediction"]) for losses in quiet), "not in evaluation")


def test_mixing_with_noise_needs_no_other_row():
    """One row and no other: part of itself, or generated noise."""
    batch = make_batch(lengths=np.array([16_240], np.int32))
    task = make_task(mixing=1.0, mixing_noise=1.0)
    rngs = {name: jax.random.key(1) for name in ("params", *task.rngs)}
    mixed = lambda: task.init_with_output(rngs, batch, method="_mix")[0]["audio"]  # noqa: E731
    added = np.asarray(jax.jit(mixed)()) - batch["audio"] / 32768
    inside = np.abs(added[0]) > 0
    assert 0 < inside.sum() <= 8_120, "at most half of the row"
    one = np.flatnonzero(inside)
    part = added[0, one[0] : one[-1] + 1]
    assert np.isfinite(part).all()
    power = np.abs(np.fft.rfft(part)) ** 2
    tenth = len(power) // 10
    assert power[1:tenth].mean() > 3 * power[-tenth:].mean(), "pink: power falls with frequency"


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_which_streams_are_used(mixing):
    task, batch = make_task(dict(dropout=0.1, layerdrop=0.1), mixing=mixing, mixing_noise=mixing), make_batch()
    variables = make_variables(make_task())

    def works(streams, train) -> bool:
        rngs = {name: jax.random.key(0) for name in streams}
        try:
            jax.eval_shape(lambda: task.apply(variables, batch, step=jnp.int32(0), train=train, rngs=rngs))
        except InvalidRngError:
            return False
        return True

    assert works(("mask",), train=False)
    needed = ("mask", "dropout", "layerdrop", "mixing") if mixing else ("mask", "dropout", "layerdrop")
    assert set(needed) <= set(task.rngs)
    assert works(needed, train=True)
    for name in needed:
        assert not works([s for s in needed if s != name], train=True)

"""WavLM: what mixing changes, row by row, and what it must not; the gated positions at work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_hubert import BASE, CODES, LARGE, SAMPLES, equal, make_batch, make_run, make_task, random_params, streams

from speechjax.errors import UserError
from speechjax.tasks.hubert import Hubert
from speechjax.tasks.wavlm import WavLM

GATED = dict(attention=dict(positions="buckets", gated=True, buckets=8, max_distance=16))
ROWS = np.array([500, 361, 480, 500, 0, 430, 500, 500], np.int32)


def make_wavlm(encoder=BASE, **settings):
    return make_task(WavLM, encoder, **(dict(mix_prob=1.0, noise_prob=0.0) | settings))


def ear(task):
    """Jitted `hear(batch, seed, train)` -> the batch as the encoder hears it, audio in [-1, 1]."""
    params = {"code_vectors": jnp.zeros((CODES, task.projection))}

    @functools.partial(jax.jit, static_argnums=2)
    def heard(batch, seed, train):
        rngs = {"mixing": jax.random.key(seed)}
        return task.apply({"params": params}, batch, train=train, rngs=rngs, method="heard")

    def hear(batch, seed=0, train=True):
        found = jax.tree.map(np.asarray, heard(batch, jnp.int32(seed), train))
        audio = found["audio"]
        return found | {"audio": audio / np.float32(32768) if audio.dtype == np.int16 else audio}

    return hear


def additions(task, batch, seeds) -> np.ndarray:
    """What mixing adds to each row, [len(seeds), B, S]."""
    clean = np.where(np.arange(SAMPLES) < batch["lengths"][:, None], batch["audio"] / np.float32(32768), 0)
    hear = ear(task)
    return np.stack([hear(batch, seed)["audio"] - clean for seed in seeds])


# ------------------------------------------------------------------------------------------- mixing


def test_mixing_adds_part_of_another_row_and_nothing_else():
    """Algorithm 1: at most half a row, inside its length, at -5 to 5 dB; all but the audio as it was."""
    lengths = np.array([500, 361, 480, 430], np.int32)
    batch, task = make_batch(lengths=lengths), make_wavlm()
    levels = []
    for rows in additions(task, batch, range(12)):
        for row, length in zip(rows, lengths, strict=True):
            places = np.flatnonzero(np.abs(row) > 1e-6)
            assert 0 < len(places) <= length // 2
            assert places[-1] < length
            assert places[-1] - places[0] < length // 2, "one piece"
            levels.append(10 * np.log10(np.mean(row[places] ** 2)) if len(places) > 60 else None)
    heard = ear(task)(batch)
    for name in ("lengths", "units", "mean", "std"):
        np.testing.assert_array_equal(heard[name], batch[name])
    # Rows are alike in power.  A part of 60 samples of even noise has that of its row to within 1 dB.
    own = 10 * np.log10(np.mean((batch["audio"] / 32768) ** 2))
    levels = np.array([level for level in levels if level is not None]) - own
    assert len(levels) > 25
    assert -6 < levels.min() < -2
    assert 2 < levels.max() < 6


def test_one_row_in_five_is_mixed_row_by_row():
    """mix_prob is per row; the same key mixes the same, whatever the other rows say."""
    batch, task = make_batch(lengths=ROWS), make_wavlm(mix_prob=0.2)
    loud = np.abs(additions(task, batch, range(60))).max(axis=2) > 1e-6
    assert not loud[:, 4].any(), "a row of nothing"
    # 420 draws: +-0.019; a partner in seven is the row of nothing and adds nothing.
    assert loud[:, ROWS > 0].mean() == pytest.approx(0.2 * 6 / 7, abs=0.06)
    assert len({tuple(row) for row in loud.tolist()}) > 10, "rows are drawn apart"

    other = batch | {"audio": batch["audio"] // 2}
    again = np.abs(additions(task, other, range(60))).max(axis=2) > 1e-6
    np.testing.assert_array_equal(again, loud)
    hear = ear(task)
    equal(hear(batch, 3), hear(batch, 3))


def test_nothing_is_mixed_in_evaluation_or_without_a_probability():
    batch = make_batch(lengths=ROWS)
    equal(ear(make_wavlm())(batch, train=False)["audio"], batch["audio"] / np.float32(32768))
    equal(ear(make_wavlm(mix_prob=0.0))(batch)["audio"], batch["audio"] / np.float32(32768))


def test_noise_is_mixed_where_asked():
    """A row among rows of nothing hears noise alone, 5 dB above to 20 dB below its own level."""
    batch = make_batch(lengths=np.array([500, 0, 0, 0], np.int32))
    assert np.abs(additions(make_wavlm(), batch, range(3))).max() < 1e-6
    found = additions(make_wavlm(noise_prob=1.0), batch, range(12))
    assert np.abs(found[:, 1:]).max() == 0
    peaks = np.abs(found[:, 0]).max(axis=1)
    assert (peaks > 1e-4).all()
    assert peaks.max() > 4 * peaks.min(), "levels differ"


def test_packed_rows_are_refused():
    batch = make_batch() | {"starts": np.zeros((3, 1), np.int32)}
    with pytest.raises(UserError, match=r"config\.data\.fill=False"):
        ear(make_wavlm())(batch)


# ------------------------------------------------------------------------------------------- the task


@pytest.fixture(scope="module")
def model():
    """(WavLM, HuBERT of the same encoder, parameters); every row is mixed."""
    encoder = LARGE | GATED
    task = make_wavlm(encoder)
    return task, make_task(Hubert, encoder), random_params(task)


def losses(task, params, train):
    run = jax.jit(
        lambda p, b: task.apply({"params": p}, b, step=jnp.int32(0), train=train, rngs=streams(task))
    )  # fmt: skip
    return jax.tree.map(np.asarray, run(params, make_batch(lengths=ROWS)))


def test_it_is_hubert_on_other_audio(model):
    """In evaluation the very same; in training the same masks and targets, and another loss."""
    task, plain, params = model
    equal(losses(task, params, False), losses(plain, params, False))
    (mixed, found), (clean, expected) = losses(task, params, True), losses(plain, params, True)
    for name in ("chance_masked", "chance_accuracy", "target_perplexity", "masked_share", "labelled_share"):
        equal(found[name], expected[name])
    assert mixed["masked"][0] != clean["masked"][0]
    assert abs(mixed["feature_penalty"][0] / clean["feature_penalty"][0] - 1) > 1e-3  # measured 6e-3


def test_its_streams_are_those_it_draws_from(model):
    task, plain, _ = model
    assert set(task.rngs) - set(plain.rngs) == {"mixing"}
    assert task.rngs[: len(plain.rngs)] == plain.rngs, "so that masks stay those of HuBERT"


def test_gradient_reaches_the_gated_positions(model):
    task, _, params = model
    gradient = flatten_dict(make_run(task)(params, make_batch())[2], sep="/")
    assert all(np.isfinite(g).all() for g in gradient.values())
    positions = [p for p in gradient if "table" in p or "gate" in p]
    assert any("table" in p for p in positions)
    assert any("gate" in p for p in positions)
    for path in positions:
        assert np.abs(gradient[path]).max() > 1e-6, path

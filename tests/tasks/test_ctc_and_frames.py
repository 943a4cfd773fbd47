"""The tasks ctc and frames: transcripts and frames scored against loops, what is hidden and shown, and every alarm."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_hubert import BASE, FRAMES, HOP, LARGE, LENGTHS, SAMPLES, equal, means, streams

from speechjax import config as configs
from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.step import init_state, train_step
from speechjax.tasks import _ctc
from speechjax.tasks.ctc import CTC
from speechjax.tasks.frames import Frames
from tests.drawing import draw_params

COUNTS = np.array([24, 17, 0])  # frames of LENGTHS
CLASSES = 6

# ------------------------------------------------------------------------------------------- the task


def make_task(mode: str = "ctc", encoder: dict[str, Any] = LARGE, **settings: Any) -> CTC | Frames:
    head: dict[str, Any] = dict(layers="last", mask_prob=0.0, mask_span=3, channel_mask_prob=0.0, channel_mask_span=1)
    options = head | dict(classes=CLASSES, head_dropout=0.0) | settings
    if mode == "ctc":
        return CTC(encoder=SpeechEncoder(**encoder), recurrent_layers=0, recurrent_width=0, **options)
    return Frames(encoder=SpeechEncoder(**encoder), unit_hop=10, loss="softmax", **options)


def make_batch(seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """int16 noise, in the padding too; rows with a transcript, and of every ten units one is missing."""
    rng = np.random.default_rng(seed)
    rows = len(LENGTHS)
    units = rng.integers(0, CLASSES, (rows, SAMPLES // 10)).astype(np.int32)
    batch = dict(
        audio=rng.integers(-9000, 9000, (rows, SAMPLES)).astype(np.int16), lengths=LENGTHS,
        mean=np.zeros(rows, np.float32), std=np.full(rows, 0.2, np.float32),
        units=np.where(rng.random(units.shape) < 0.1, -1, units),
        tokens=np.array([[4, 5, 5, 1], [3, 4, 0, 0], [4, 4, 4, 4]], np.int32),
        token_lengths=np.array([4, 2, 4], np.int32),
    )  # fmt: skip
    return batch | changes


PROGRAMS: dict[Any, Any] = {}  # with their task, so that no other takes its id


def program(task: CTC | Frames, train: bool) -> Any:
    def total(params, batch, seed):
        rngs = streams(task, seed)
        losses, metrics = task.apply({"params": params}, batch, step=jnp.int32(0), train=train, rngs=rngs)
        return sum(value for value, _ in losses.values()), (losses, metrics)

    if (id(task), train) not in PROGRAMS:
        PROGRAMS[id(task), train] = jax.jit(jax.value_and_grad(total, has_aux=True)), task
    return PROGRAMS[id(task), train][0]


def run(task: CTC | Frames, params: Any, batch: Any, train: bool = False, seed: int = 0) -> Any:
    """(losses, metrics, gradient of the sum), as numpy."""
    (_, (losses, metrics)), gradient = program(task, train)(params, batch, jnp.int32(seed))
    return jax.tree.map(np.asarray, (losses, metrics, gradient))


@functools.cache
def heard(mode: str) -> Any:
    """(task, parameters, logits of `make_batch()`), for features that know only their own samples."""
    task = make_task(mode)
    rngs = {"params": jax.random.key(0), **streams(task)}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))["params"]
    params = draw_params(shapes)
    found = jax.jit(lambda p, b: task.apply({"params": p}, b, method="answer"))(params, make_batch())
    assert np.asarray(found["lengths"]).tolist() == COUNTS.tolist()
    return task, params, np.asarray(found["logits" if mode == "ctc" else "scores"])


def test_transcripts_are_scored_a_token_and_only_where_there_are_some():
    """Row 2 has a transcript but could not be read; a row without one, and one too long for its frames, weigh none."""
    task, params, logits = heard("ctc")
    losses, metrics, _ = run(task, params, make_batch())
    batch = make_batch()
    text = batch["tokens"][:2], batch["token_lengths"][:2]
    expected = np.asarray(_ctc.ctc_loss(logits[:2], COUNTS[:2].astype(np.int32), *text))
    assert losses["ctc"] == (pytest.approx(expected.sum(), rel=1e-5), 6)
    errors = np.asarray(_ctc.greedy_errors(logits[:2], COUNTS[:2].astype(np.int32), *text))
    assert metrics["error_rate"] == (errors.sum(), 6)
    best = [x[:n].argmax(axis=1) for x, n in zip(logits, COUNTS, strict=True)]
    assert metrics["blank_share"] == (sum((b == 0).sum() for b in best), 41)
    assert metrics["transcribed_share"] == (2, 2)
    assert metrics["too_long_share"] == (0, 2)

    silent = make_batch(token_lengths=np.array([0, 2, 0], np.int32))
    losses, metrics, gradient = run(task, params, silent)
    assert losses["ctc"] == (pytest.approx(expected[1], rel=1e-5), 2)
    assert metrics["transcribed_share"] == (1, 2)
    assert metrics["blank_share"][1] == 17
    louder = silent | {"audio": np.where(np.arange(3)[:, None] == 0, silent["audio"][::-1], silent["audio"])}
    again, _, other = run(task, params, louder)
    equal(losses, again)
    equal(gradient, other)

    long = np.tile(np.array([[4, 4]], np.int32), (3, 10))  # 20 tokens, 19 blanks
    losses, metrics, gradient = run(task, params, make_batch(tokens=long, token_lengths=np.array([20, 5, 0], np.int32)))
    assert losses["ctc"][1] == 5
    assert metrics["too_long_share"] == (1, 2)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_frames_are_scored_with_the_unit_that_begins_with_them():
    task, params, logits = heard("frames")
    batch = make_batch()
    losses, metrics, _ = run(task, params, batch)
    log = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=2, keepdims=True))
    sums = {}
    for shift in (0, 1):
        units = [(b, t, batch["units"][b, 2 * t + shift]) for b, n in enumerate(COUNTS) for t in range(n)]
        units = [(b, t, u) for b, t, u in units if u >= 0]
        sums[shift] = -sum(log[b, t, u] for b, t, u in units), len(units)
        if not shift:
            right = sum(log[b, t].argmax() == u for b, t, u in units)
            frequency = np.bincount([u for *_, u in units])
    total, n = sums[0]
    assert n < COUNTS.sum()
    assert losses["frames"] == (pytest.approx(total, rel=1e-5), n)
    assert abs(sums[1][0] / sums[1][1] - total / n) > 1e-3, "negative control: the unit half a frame later"
    assert metrics["accuracy"] == (right, n)
    assert metrics["chance_accuracy"] == (frequency.max(), n)
    entropy = -sum(k / n * math.log(k / n) for k in frequency if k)
    assert metrics["chance_frames"] == (pytest.approx(entropy * n, rel=1e-5), n)
    assert metrics["labelled_share"] == (n, 41)


def test_packed_rows_are_scored_as_if_alone_by_frame_and_refused_with_transcripts():
    task, params, _ = heard("frames")
    alone, _, _ = run(task, params, make_batch())
    batch = make_batch()
    align = task.encoder.segment_align()
    second = -(-500 // align) * align
    samples = second + 500
    packed: dict[str, Any] = dict(
        audio=np.zeros((1, samples), np.int16), units=np.full((1, samples // 10), -1, np.int32),
        starts=np.array([[0, second]], np.int32), lengths=LENGTHS[None, :2],
        mean=np.zeros((1, 2), np.float32), std=np.full((1, 2), 0.2, np.float32),
    )  # fmt: skip
    for row, start in enumerate((0, second)):
        packed["audio"][0, start : start + 500] = batch["audio"][row]
        packed["units"][0, start // 10 : start // 10 + 50] = batch["units"][row]
    together, _, _ = run(task, params, packed)
    assert together["frames"] == (pytest.approx(alone["frames"][0], rel=1e-5), alone["frames"][1])
    with pytest.raises(UserError, match=r"config\.data\.fill=False"):
        make_task("ctc").apply({"params": {}}, packed, step=jnp.int32(0), train=False)


def test_spans_are_hidden_in_training_only():
    _, params, _ = heard("frames")
    task = make_task("frames", mask_prob=0.5)
    first, second = (run(task, params, make_batch(), train=True, seed=s)[0] for s in (0, 1))
    assert first["frames"][0] != second["frames"][0]
    assert run(task, params, make_batch(), train=True)[2]["encoder"]["mask_embedding"].any()
    assert not run(heard("frames")[0], params, make_batch(), train=True)[2]["encoder"]["mask_embedding"].any()
    equal(run(task, params, make_batch(), seed=0)[0], run(heard("frames")[0], params, make_batch(), seed=1)[0])


def test_pictures_show_phones_and_no_blanks():
    for mode in ("frames", "ctc"):
        task, params, logits = heard(mode)
        look = jax.jit(functools.partial(task.apply, method="predict", step=jnp.int32(0)))
        shown = jax.tree.map(np.asarray, look({"params": params}, make_batch()))
        assert shown["lengths"].tolist() == COUNTS.tolist()
        best = logits.argmax(axis=2)
        if mode == "frames":
            np.testing.assert_array_equal(shown["predicted"], best)
            np.testing.assert_array_equal(shown["true"][0], make_batch()["units"][0, ::2][:FRAMES])
        else:
            np.testing.assert_array_equal(shown["predicted"], np.where(best == 0, -1, best))
            assert set(shown["true"][1].tolist()) <= {-1, 3, 4}
        assert (shown["true"][2] == -1).all()


def test_mistakes_are_named():
    batch = make_batch(units=np.zeros((3, SAMPLES // 20), np.int32))
    with pytest.raises(UserError, match=r"config\.task\.unit_hop=10.*a unit about every 20 samples"):
        make_task("frames").init_with_output(jax.random.key(0), batch, step=jnp.int32(0), train=False)
    with pytest.raises(UserError, match=r"config\.task\.layers='first': choose last or weighted"):
        make_task(layers="first").init_with_output(jax.random.key(0), make_batch(), step=jnp.int32(0), train=False)
    assert make_task("ctc").needs == ("tokens",)
    assert make_task("frames").sizes() == {"units": ("config.task.classes", CLASSES)}


# ------------------------------------------------------------------------------------------- alarms


def deaf(mode: str, bias: Any) -> tuple[CTC | Frames, Any]:
    """A model whose output is constant: what a collapsed encoder leaves."""
    task, params, _ = heard(mode)
    head = dict(kernel=np.zeros_like(params["head"]["kernel"]), bias=np.asarray(bias, np.float32))
    return task, {**params, "head": head}


def test_alarms_of_transcripts():
    def alarms(task, params, batch, step=1000):
        losses, metrics, _ = run(task, params, batch)
        return task.health(means(losses, metrics), step)

    task, params, _ = heard("ctc")
    share = np.array([(41 - 6) / 41, 1 / 41, 1e-30, 1 / 41, 2 / 41, 2 / 41])
    stuck = alarms(*deaf("ctc", np.log(share)), make_batch())
    assert set(stuck) == {"only_blanks", "stuck_at_chance"}
    assert "saying nothing" in stuck["only_blanks"]
    assert alarms(*deaf("ctc", np.log(share)), make_batch(), step=999) == {}, "every run begins like that"
    silent = make_batch(token_lengths=np.zeros(3, np.int32))
    assert set(alarms(task, params, silent)) == {"untranscribed"}
    long = make_batch(tokens=np.full((3, 30), 4, np.int32), token_lengths=np.array([30, 2, 0], np.int32))
    assert "too_long" in alarms(task, params, long)
    good = dict(transcribed_share=0.9, too_long_share=0.01, blank_share=0.8, ctc=1.0, chance_ctc=3.0)
    assert task.health(good, 5000) == {}


def test_alarms_of_frames():
    batch = make_batch()
    units = batch["units"][:, ::2][:2]
    valid = units[(np.arange(units.shape[1]) < COUNTS[:2, None]) & (units >= 0)]
    task, params = deaf("frames", np.log(np.bincount(valid, minlength=CLASSES) / len(valid)))
    losses, metrics, _ = run(task, params, batch)
    found = means(losses, metrics)
    assert found["frames"] == pytest.approx(found["chance_frames"], rel=1e-5)  # chance is what a constant achieves
    assert found["accuracy"] == pytest.approx(found["chance_accuracy"])
    assert set(task.health(found, 1000)) == {"constant_prediction", "stuck_at_chance"}
    assert task.health(found, 999) == {}
    losses, metrics, _ = run(task, params, make_batch(units=np.full_like(batch["units"], -1)))
    assert set(task.health(means(losses, metrics), 1000)) == {"unlabelled"}


# ------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ctc", "frames"])
def test_it_learns_which_tone_is_which(mode):
    """Three tones in any order: after 250 updates new sequences are recognised, and at the start nothing is."""
    rng = np.random.default_rng(0)

    def batch():
        tones = rng.integers(1, 4, (8, 4)).astype(np.int32)
        tones[:, 1::2] += (tones[:, 1::2] == tones[:, ::2]) * (1 - 3 * (tones[:, 1::2] == 3))
        tones[:, 2] += (tones[:, 2] == tones[:, 1]) * (1 - 3 * (tones[:, 2] == 3))
        wave = np.repeat(np.array([0, 0.15, 0.3, 0.6])[tones], 125, axis=1).cumsum(axis=1)
        audio = (9000 * np.sin(2 * np.pi * wave) + rng.normal(size=wave.shape) * 900).astype(np.int16)
        ones = np.ones(8, np.float32)
        return dict(
            audio=audio, lengths=np.full(8, SAMPLES, np.int32), mean=0 * ones, std=0.2 * ones, tokens=tones,
            token_lengths=np.full(8, 4, np.int32), unread=np.zeros(8, np.int32),
            units=np.repeat(tones, 13, axis=1)[:, :50],
        )  # fmt: skip

    task, tx = make_task(mode, encoder=BASE), optax.adam(2e-3)
    state = jax.jit(functools.partial(init_state, task, tx, 0))(batch())
    step = jax.jit(functools.partial(train_step, task, tx, 0, 10), donate_argnums=0)
    history = []
    for _ in range(250):
        state, meters = step(state, batch())
        history.append(means(jax.device_get({k: v for k, v in meters.items() if "skipped" not in k})))
    name, best = ("error_rate", 0.0) if mode == "ctc" else ("accuracy", 1.0)
    assert abs(history[0][name] - best) > 0.4
    assert abs(history[-1][name] - best) < 0.15
    assert history[-1][mode] < 0.3 * history[-1][f"chance_{mode}"]


@pytest.mark.slow
def test_two_steps_of_the_miniature_with_transcripts_through_the_loop(tmp_path):
    from speechjax.experiment import open_experiment
    from speechjax.logs import read_metrics
    from speechjax.train import train

    config = configs.load("configs/pretrain/phones.py:size=tiny,mode=ctc,smoke")
    _, data = open_experiment(config, tmp_path)
    assert train(config, data, tmp_path) == 0
    entries = {entry["split"]: entry for entry in read_metrics(tmp_path)}
    for split in ("train", "valid"):
        assert 0 < entries[split]["ctc"] < 1000
        assert entries[split]["transcribed_share"] > 0.9
    assert (tmp_path / "vocab.json").exists()


assert HOP == 20, "two units a frame"

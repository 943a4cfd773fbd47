"""The encoder-decoder: losses against plain loops, what teaches nothing, tones that are recognised by every search."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_hubert import BASE, FRAMES, SAMPLES, equal, make_run, means
from tiny_hubert import LENGTHS as SAMPLED

from speechjax.decode.autoregressive import CTCPrefixScorer, beam_search, greedy
from speechjax.decode.neural_scorer import NeuralScorer
from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.step import init_state, train_step
from speechjax.tasks import _ctc
from speechjax.tasks.seq2seq import Seq2seq
from tests.drawing import draw_params

COUNTS = np.array([24, 17, 0], np.int32)  # frames of the rows
CLASSES = 9
TOKENS = np.array([[4, 5, 4, 8], [6, 7, 99, -5], [8, 8, 8, 8]], np.int32)  # what is beyond the lengths may be anything
TOKEN_LENGTHS = np.array([4, 2, 3], np.int32)  # the third row was not read: it has a transcript and no frames
TARGETS = [(0, 0, 4), (0, 1, 5), (0, 2, 4), (0, 3, 8), (0, 4, 2), (1, 0, 6), (1, 1, 7), (1, 2, 2)]
DECODER: dict[str, Any] = dict(
    width=16, layers=1, heads=2, mlp=24, norm="pre", tied=False, dropout=0.0, attention_dropout=0.0
)


def make_task(encoder: dict[str, Any] = BASE, **settings: Any) -> Seq2seq:
    plain: dict[str, Any] = dict(
        classes=CLASSES, decoder=DECODER, label_smoothing=0.0, ctc_weight=0.3, layers="last", mask_prob=0.0,
        mask_span=2, channel_mask_prob=0.0, channel_mask_span=4, head_dropout=0.0,
    )  # fmt: skip
    return Seq2seq(encoder=SpeechEncoder(**encoder), **(plain | settings))


def make_batch(seed: int = 0, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """int16 noise, in the padding too."""
    audio = np.random.default_rng(seed).integers(-9000, 9000, (3, SAMPLES)).astype(np.int16)
    row = np.ones(3, np.float32)
    batch = dict(audio=audio, lengths=SAMPLED, mean=0.01 * row, std=0.2 * row, unread=np.zeros(3, np.int32))
    return batch | dict(tokens=TOKENS, token_lengths=TOKEN_LENGTHS) | changes


@functools.cache
def made(**settings: Any) -> tuple[Seq2seq, Any, Any]:
    """(task, parameters, `run(params, batch)` -> losses, metrics, gradient)."""
    task = make_task(**settings)
    rngs = {name: jax.random.key(0) for name in ("params", *task.rngs)}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))
    return task, draw_params(shapes["params"]), make_run(task, train=False)


@functools.cache
def heard() -> tuple[Any, Any]:
    """(answers of the joint model, logits of the decoder by token), numpy."""
    task, params, _ = made()
    inputs = np.array([[1, 4, 5, 4, 8], [1, 6, 7, 0, 0], [0] * 5], np.int32)

    @jax.jit
    def listen(params, batch):
        found: Any = task.apply({"params": params}, batch, method="answer")
        variables, decoder = {"params": params["token_decoder"]}, task.detached_decoder()
        memory = decoder.apply(variables, found["frames"], found["lengths"], method="listen")
        return found, decoder.apply(variables, inputs, memory, train=False)

    return jax.device_get(listen(params, make_batch()))


# ------------------------------------------------------------------------------------------- losses


def test_losses_are_the_weighted_sum_of_attention_and_ctc():
    _, params, run = made()
    losses, metrics, gradient = run(params, make_batch())
    found, logits = heard()
    log = np.asarray(jax.nn.log_softmax(logits), np.float64)
    surprise = -sum(log[at] for at in TARGETS)
    assert found["lengths"].tolist() == COUNTS.tolist()
    assert losses["attention"] == (pytest.approx(0.7 * surprise, rel=1e-5), 8)
    assert metrics["cross_entropy"] == (pytest.approx(surprise, rel=1e-5), 8)
    assert metrics["accuracy"] == (sum(log[b, u].argmax() == t for b, u, t in TARGETS), 8)
    assert metrics["chance_accuracy"] == (2, 8)
    entropy = -sum(k / 8 * math.log(k / 8) for k in (2, 2, 1, 1, 1, 1))
    assert metrics["chance_cross_entropy"] == (pytest.approx(8 * entropy, rel=1e-5), 8)

    known = np.where(np.arange(4) < TOKEN_LENGTHS[:, None], TOKENS, 0), np.array([4, 2, 0], np.int32)
    ctc = np.asarray(_ctc.ctc_loss(jnp.asarray(found["logits"]), COUNTS, *known)).sum()
    assert losses["ctc"] == (pytest.approx(0.3 * ctc, rel=1e-5), 6)
    chance = np.asarray(_ctc.constant_loss(CLASSES, FRAMES, COUNTS, *known)).sum()
    assert metrics["chance_ctc"] == (pytest.approx(0.3 * chance, rel=1e-5), 6)
    errors = np.asarray(_ctc.greedy_errors(jnp.asarray(found["logits"]), COUNTS, *known))
    assert metrics["error_rate"] == (errors[:2].sum(), 6)
    best = [x[:t].argmax(axis=1) for x, t in zip(found["logits"], COUNTS[:2], strict=False)]
    assert metrics["blank_share"] == (sum((b == 0).sum() for b in best), 41)
    assert metrics["transcribed_share"] == (2, 2)
    assert metrics["too_long_share"] == (0, 2)
    assert all(np.any(g) for g in jax.tree.leaves(gradient["token_decoder"]))
    assert np.any(gradient["ctc_head"]["kernel"])


def test_smoothing_is_of_the_loss_alone():
    _, params, run = made(label_smoothing=0.1)
    losses, metrics, _ = run(params, make_batch())
    plain, same, _ = made()[2](params, make_batch())
    log = np.asarray(jax.nn.log_softmax(heard()[1]), np.float64)
    even = -sum(log[b, u].mean() for b, u, _ in TARGETS)
    assert losses["attention"][0] == pytest.approx(0.9 * plain["attention"][0] + 0.1 * 0.7 * even, rel=1e-5)
    assert abs(losses["attention"][0] - plain["attention"][0]) > 0.01, "negative control"
    equal((metrics, losses["ctc"]), (same, plain["ctc"]))


def test_without_ctc_nothing_of_it_is_there():
    _, drawn, run = made(ctc_weight=0.0)
    _, params, joint = made()
    assert drawn.keys() == {"encoder", "token_decoder"}
    assert params.keys() == {"encoder", "token_decoder", "ctc_head"}
    losses, metrics, _ = run({k: v for k, v in params.items() if k != "ctc_head"}, make_batch())
    both = joint(params, make_batch())
    assert losses.keys() == {"attention"}
    assert losses["attention"][0] == pytest.approx(both[0]["attention"][0] / 0.7, rel=1e-6)
    assert metrics.keys() == both[1].keys() - {"chance_ctc", "error_rate", "blank_share", "too_long_share"}
    equal(metrics, {name: both[1][name] for name in metrics})


def test_rows_without_transcript_and_padding_teach_nothing():
    _, params, run = made()
    base = run(params, make_batch())
    outside = np.arange(SAMPLES) >= SAMPLED[:, None]
    noisy = np.where(outside, make_batch(1)["audio"], make_batch()["audio"])
    tokens = np.where(np.arange(4) < TOKEN_LENGTHS[:, None], TOKENS, 5).astype(np.int32)
    other = run(params, make_batch(audio=noisy, tokens=tokens))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other, base)
    silent = run(params, make_batch(token_lengths=np.array([0, 2, 0], np.int32)))
    louder = make_batch(token_lengths=np.array([0, 2, 0], np.int32))
    louder["audio"] = np.where(np.arange(3)[:, None] == 0, louder["audio"][::-1], louder["audio"])
    equal(silent, run(params, louder))
    assert silent[0]["attention"][1] == 3
    assert silent[1]["transcribed_share"] == (1, 2)
    heard_ = run(params, make_batch(1))
    assert abs(heard_[0]["attention"][0] - base[0]["attention"][0]) > 1e-3, "negative control: it listens"
    nothing = run(params, make_batch(token_lengths=np.zeros(3, np.int32)))
    assert nothing[0] == {"attention": (0, 0), "ctc": (0, 0)}
    assert not any(np.any(g) for g in jax.tree.leaves(nothing[2]))


def test_a_transcript_too_long_for_ctc_still_teaches_the_decoder():
    _, params, run = made()
    long = make_batch(tokens=np.full((3, 20), 4, np.int32), token_lengths=np.array([20, 5, 0], np.int32))
    losses, metrics, gradient = run(params, long)  # 20 tokens, 19 blanks between them, 24 frames
    assert losses["attention"][1] == 27
    assert losses["ctc"][1] == 5
    assert metrics["too_long_share"] == (1, 2)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


# ------------------------------------------------------------------------------------------- answers


def test_pictures_show_the_tokens_one_after_the_other():
    task, params, _ = made()
    look = jax.jit(functools.partial(task.apply, method="predict", step=jnp.int32(0)))
    shown = jax.device_get(look({"params": params}, make_batch()))
    assert shown["lengths"].tolist() == [5, 3, 0]
    assert shown["true"].tolist() == [[4, 5, 4, 8, 2], [6, 7, 2, -1, -1], [-1] * 5]
    best = heard()[1].argmax(axis=2)
    np.testing.assert_array_equal(shown["predicted"], np.where(shown["true"] < 0, -1, best))


def test_mistakes_and_alarms_are_named():
    def make(**settings):
        task = make_task(**settings)
        return jax.eval_shape(lambda: task.init(jax.random.key(0), make_batch(), step=jnp.int32(0), train=False))

    with pytest.raises(UserError, match=r"ctc_weight=1\.0: at least 0 and less than 1"):
        make(ctc_weight=1.0)
    with pytest.raises(UserError, match=r"label_smoothing=-0\.1"):
        make(label_smoothing=-0.1)
    with pytest.raises(UserError, match=r"config\.task\.decoder: .*'dropuot'"):
        make(decoder=DECODER | dict(dropuot=0.1))
    task = make_task()
    assert task.needs == ("tokens",)
    assert task.sizes() == {"tokens": ("config.task.classes", CLASSES)}
    good = dict(transcribed_share=1.0, too_long_share=0.0, blank_share=0.8, ctc=0.5, chance_ctc=1.0)
    good |= dict(cross_entropy=1.0, chance_cross_entropy=2.0)
    assert task.health(good, 5000) == {}
    assert "only knows how frequent" in task.health(good | dict(cross_entropy=2.0), 1000)["stuck_at_chance"]
    assert set(task.health(good | dict(ctc=1.0, blank_share=1.0), 1000)) == {"only_blanks", "stuck_at_chance"}
    assert (
        make_task(ctc_weight=0.0).health(dict(transcribed_share=1.0, cross_entropy=1.0, chance_cross_entropy=2.0), 1)
        == {}
    )


# ------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_it_learns_tones_and_every_search_spells_new_ones():
    """Three tones in any order, the last missing at times: 600 updates, then greedy and beams on new ones.

    The encoder has absolute positions: by what it hears alone, a decoder would not know which of two equal tones.
    """
    rng, rows = np.random.default_rng(0), 16

    def batch():
        tones = rng.integers(1, 4, (rows, 4)).astype(np.int32)
        for u in range(1, 4):
            tones[:, u] = np.where(tones[:, u] == tones[:, u - 1], tones[:, u] % 3 + 1, tones[:, u])
        wave = np.repeat(np.array([0, 0.15, 0.3, 0.6])[tones], 125, axis=1).cumsum(axis=1)
        audio = (9000 * np.sin(2 * np.pi * wave) + rng.normal(size=wave.shape) * 900).astype(np.int16)
        n = np.array([4, 3] * (rows // 2), np.int32)
        ones = np.ones(rows, np.float32)
        return dict(
            audio=audio, lengths=125 * n, mean=0 * ones, std=0.2 * ones, unread=np.zeros(rows, np.int32),
            tokens=tones + 3, token_lengths=n,
        )  # fmt: skip

    encoder = BASE | dict(positions=dict(name="sinusoidal"))
    task = make_task(encoder=encoder, decoder=DECODER | dict(width=32, tied=True), label_smoothing=0.05)
    tx = optax.adam(2e-3)
    state = jax.jit(functools.partial(init_state, task, tx, 0))(batch())
    step = jax.jit(functools.partial(train_step, task, tx, 0, 10), donate_argnums=0)
    history = []
    for _ in range(600):
        state, meters = step(state, batch())
        history.append(means(jax.device_get({k: v for k, v in meters.items() if "skipped" not in k})))
    assert history[0]["accuracy"] < 0.5
    assert history[-1]["accuracy"] > 0.9
    assert history[-1]["cross_entropy"] < 0.4 * history[-1]["chance_cross_entropy"]
    assert history[-1]["error_rate"] < 0.2

    @jax.jit
    def spell(params, batch):
        found: Any = task.apply({"params": params}, batch, method="answer")
        lengths, M = found["lengths"], 6
        decoder = NeuralScorer.listening(
            task.detached_decoder(), params["token_decoder"], M, found["frames"], lengths
        )  # fmt: skip
        ctc = CTCPrefixScorer(jax.nn.log_softmax(found["logits"]), lengths)
        return {
            "greedy": greedy([(decoder, 1.0)], lengths, max_tokens=M),
            "beam": beam_search([(decoder, 1.0)], lengths, max_tokens=M, beams=4),
            "joint": beam_search([(decoder, 0.7), (ctc, 0.3)], lengths, max_tokens=M, beams=4, best=2),
        }

    new = batch()
    truth = [t[:n].tolist() for t, n in zip(new["tokens"], new["token_lengths"], strict=True)]
    for name, found in jax.device_get(spell(state.params, new)).items():
        said = [t[:n].tolist() for t, n in zip(found.tokens[:, 0], found.lengths[:, 0], strict=True)]
        assert sum(a == b for a, b in zip(said, truth, strict=True)) >= 14, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seq2seq", "language_model"])
def test_two_steps_of_the_miniatures_through_the_loop(name, tmp_path):
    from speechjax import config as configs
    from speechjax.experiment import open_experiment
    from speechjax.logs import read_metrics
    from speechjax.train import train

    config = configs.load(f"configs/finetune/{name}.py:size=tiny,smoke", ["task.classes=0"])
    task, data = open_experiment(config, tmp_path)
    assert task.classes == data.transcripts.tokenizer.size
    assert train(config, data, tmp_path) == 0
    entries = {entry["split"]: entry for entry in read_metrics(tmp_path)}
    for split in ("train", "valid"):
        assert 0 < entries[split]["cross_entropy"] < 1.5 * math.log(task.classes)
        assert entries[split]["transcribed_share"] > 0.9

"""A decoder as a scorer: its scores add up to what training computes for the whole sequence."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.decode.neural_scorer import BOS, EOS, NeuralScorer
from speechjax.decode.types import SPECIALS
from speechjax.models.decoder import make_decoder
from tests.drawing import draw_params

V, M, T = 9, 4, 5
BLOCK: dict[str, Any] = dict(
    width=16, layers=1, heads=2, mlp=24, norm="pre", tied=True, dropout=0.0, attention_dropout=0.0
)
LENGTHS = np.array([5, 3], np.int32)
FRAMES = np.random.default_rng(0).normal(size=(2, T, 12)).astype(np.float32)
# For every row three hypotheses, of 4, 2 and no tokens.
TEXTS = [[[4, 7, 7, 5], [8, 4], []], [[6, 6, 4, 8], [5, 7], []]]


def make(listens: bool, frames: np.ndarray = FRAMES) -> NeuralScorer:
    decoder = make_decoder(BLOCK, classes=V, listens=listens, dtype="float32")

    def everything(decoder, frames, tokens):
        return decoder(tokens, decoder.listen(frames, LENGTHS) if listens else None, train=False)

    tokens = np.zeros((2, 3), np.int32)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), FRAMES, tokens, method=everything))
    params = draw_params(shapes["params"])
    params["embedding"] = params["embedding"] * 3  # decided answers
    if not listens:
        return NeuralScorer(decoder, params, M)
    return jax.jit(lambda params, x: NeuralScorer.listening(decoder, params, M, x, LENGTHS))(params, frames)


@functools.partial(jax.jit, static_argnums=0)
def _apply(decoder, variables, tokens, memory):
    return decoder.apply(variables, tokens, memory, train=False)


def whole(scorer: NeuralScorer, row: int, text: list[int]) -> float:
    """The log-probability of a text and </s>, from one pass over all of it, teacher-forced."""
    tokens = np.array([[BOS, *text]] * 2, np.int32)
    variables: Any = {"params": scorer.params}
    logits: Any = _apply(scorer.decoder, variables, tokens, scorer.memory)
    log = np.asarray(jax.nn.log_softmax(logits), np.float64)[row]
    return float(log[np.arange(len(text) + 1), [*text, EOS]].sum())


@pytest.mark.parametrize("listens", [False, True])
def test_scores_add_up_to_the_teacher_forced_log_probability(listens):
    """Through jit as an argument, hypotheses of different lengths side by side, those that are done waiting."""
    scorer = make(listens)
    advance = jax.jit(lambda scorer, state, tokens: scorer.advance(state, tokens))
    state = jax.jit(lambda scorer: scorer.start(2, 3))(scorer)
    totals = np.zeros((2, 3))
    for u in range(M):
        token = np.array([[t[u] if u < len(t) else -1 for t in row] for row in TEXTS], np.int32)
        scores = np.asarray(scorer.scores(state))
        assert not scores[..., :SPECIALS].any()
        totals += np.where(token >= 0, np.take_along_axis(scores, np.maximum(token, 0)[..., None], axis=2)[..., 0], 0)
        state = advance(scorer, state, token)
    totals += np.asarray(scorer.final(state))
    expected = np.array([[whole(scorer, b, text) for text in row] for b, row in enumerate(TEXTS)])
    np.testing.assert_allclose(totals, expected, atol=1e-5)  # float32 sums of ten numbers
    assert abs(whole(scorer, 0, TEXTS[0][0]) - whole(scorer, 0, TEXTS[0][0][::-1])) > 0.1, "negative control"
    if listens:
        assert abs(whole(scorer, 0, [4]) - whole(scorer, 1, [4])) > 0.01, "negative control: rows hear different frames"
    full = np.asarray(scorer.scores(state))
    assert np.isneginf(full[:, 0, SPECIALS:]).all(), "four tokens are all it has room for"
    assert np.isfinite(full[:, 1:]).all()


def test_every_prefix_is_a_distribution_over_tokens_specials_and_end():
    scorer = make(False)
    state = jax.jit(lambda: scorer.advance(scorer.start(1, 2), jnp.array([[4, 6]], jnp.int32)))()
    tokens = np.exp(np.asarray(scorer.scores(state))[..., SPECIALS:]).sum(axis=2) + np.exp(scorer.final(state))
    rest = np.exp(np.asarray(state.log_probs))[..., [0, BOS, 3]].sum(axis=2)  # <pad>, <s> and <unk>
    np.testing.assert_allclose(tokens + rest, 1, rtol=1e-5)
    assert (rest > 1e-6).any(), "negative control: what is left out is something"

"""N-gram automata on device: every path weighs what the model says, dense or sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scorer_paths import all_paths, path_weight

from speechjax.decode.automaton import Dense, Sparse, make_automaton
from speechjax.decode.ngram import NGram, train
from speechjax.decode.ngram_scorer import NgramScorer, ngram_arcs
from speechjax.errors import UserError

TEXTS = [list(text) for text in ("a b", "ab ab", "ba", "b", "abba b", "bab a", "aab", "c ab", "bb a", "", "aabab")]
TOKENS = ("<pad>", "<s>", "</s>", "<unk>", " ", "a", "b", "x")  # the model has no x, the vocabulary no c
SIZES = {"dense": 2**20, "sparse": 0}


def expected(model: NGram, paths: np.ndarray) -> np.ndarray:
    texts = [[TOKENS[i] if TOKENS[i] in model.symbols else None for i in path if i >= 0] for path in paths]
    return np.array([model.score([text])[0].sum() for text in texts]) * np.log(10)


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("kind", SIZES)
def test_every_path_weighs_what_the_model_says(order, kind):
    model = train(TEXTS, order)
    scorer = NgramScorer.build(model, TOKENS, SIZES[kind])
    assert isinstance(scorer.automaton, {"dense": Dense, "sparse": Sparse}[kind])
    paths = all_paths(range(4, 8), 5)
    # Sums of six float32, each of up to as many.
    np.testing.assert_allclose(path_weight(scorer, paths), expected(model, paths), atol=2e-5)
    if order > 1:
        assert np.abs(path_weight(scorer, paths) - expected(train(TEXTS, order - 1), paths)).max() > 0.1


def test_a_model_with_gaps():
    """Pruned: p(c | a b) is there, p(c | b) is not, and "a b" is a state whose end "b" has weight of its own."""
    names, (a, b, c) = ("<unk>", "<s>", "</s>", "a", "b", "c"), (3, 4, 5)
    f = lambda *x: np.array(x, np.float32)  # noqa: E731
    keys = [np.arange(6), np.array([a * 6 + b, c * 6 + b]), np.array([0 * 6 + c, 1 * 6 + a])]
    logp = [f(-1, -9, -1, -1.5, -2, -3), f(-0.5, -0.75), f(-0.25, -0.125)]
    backoff = [f(0, -0.125, 0, -0.25, -0.5, -1), f(-2, -0.375)]
    model = NGram(names, keys, logp, backoff)
    scorer = NgramScorer.build(model, (*TOKENS[:4], "a", "b", "c"), SIZES["sparse"])
    paths = all_paths(range(4, 7), 4)
    texts = [[names[i - 1] for i in path if i >= 0] for path in paths]
    by_hand = np.array([model.score([text])[0].sum() for text in texts]) * np.log(10)
    np.testing.assert_allclose(path_weight(scorer, paths), by_hand, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 4])
def test_dense_and_sparse_agree_in_every_state(order):
    model = train(TEXTS, order)
    arcs, V = ngram_arcs(model), len(model.symbols)
    states, symbols = jnp.arange(len(arcs.fail), dtype=jnp.int32), jnp.arange(V, dtype=jnp.int32)[None]
    found = []
    for size in SIZES.values():
        automaton = make_automaton(arcs, V, size)
        found.append(jax.jit(lambda a, s: (a.weights(s), *a.step(s[:, None], symbols)))(automaton, states))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), *found)
    assert len(np.unique(found[0][2])) > (0 if order == 1 else 20)


def test_small_models_are_dense_and_large_ones_sparse():
    model = train(TEXTS, 3)
    arcs, V = ngram_arcs(model), len(model.symbols)
    table = len(arcs.fail) * V * 8
    assert isinstance(make_automaton(arcs, V, table), Dense)
    assert isinstance(make_automaton(arcs, V, table - 1), Sparse)


def test_specials_weigh_nothing_and_change_nothing():
    scorer = NgramScorer.build(train(TEXTS, 3), TOKENS)
    state = scorer.advance(scorer.start(2, 3), jnp.full((2, 3), 5, jnp.int32))
    assert np.all(np.asarray(scorer.scores(state))[..., :4] == 0)
    assert scorer.scores(state).shape == (2, 3, len(TOKENS))
    for token in (-1, 0, 3):
        assert np.array_equal(scorer.advance(state, jnp.full((2, 3), token, jnp.int32)), state)
    assert not np.array_equal(scorer.advance(state, jnp.full((2, 3), 4, jnp.int32)), state)


def test_beams_are_scored_by_themselves():
    """[B, K] at once, each hypothesis with a past of its own, as one at a time."""
    scorer = NgramScorer.build(train(TEXTS, 4), TOKENS, 0)
    paths = all_paths(range(4, 7), 3)[-24:].reshape(4, 6, 3)
    advance, scores = jax.jit(NgramScorer.advance), jax.jit(NgramScorer.scores)
    state = scorer.start(4, 6)
    for u in range(3):
        state = advance(scorer, state, jnp.asarray(paths[:, :, u]))
    for b, k in ((0, 0), (1, 5), (3, 2)):
        alone = scorer.start(1, 1)
        for token in paths[b, k]:
            alone = advance(scorer, alone, jnp.full((1, 1), token, jnp.int32))
        np.testing.assert_array_equal(scores(scorer, state)[b, k], scores(scorer, alone)[0, 0])


def test_tokens_of_another_vocabulary(caplog):
    model = train(TEXTS, 2)
    caplog.clear()
    with caplog.at_level("WARNING", "speechjax"):
        NgramScorer.build(model, TOKENS)
    assert caplog.messages == ["tokens that the n-gram model does not know, <unk> to it: 'x'"]
    with pytest.raises(UserError, match="knows none of the vocabulary's tokens: it has ' ', 'a', 'b', 'c'"):
        NgramScorer.build(model, (*TOKENS[:4], "A", "B"))

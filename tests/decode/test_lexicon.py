"""The lexicon in a search: every path against words taken from the lexicon and scored by the model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scorer_paths import all_paths, path_weight

from speechjax.data.text import make_tokenizer
from speechjax.decode.lexicon import LexiconScorer, read_lexicon
from speechjax.decode.ngram import NGram, train
from speechjax.errors import UserError

TOKENS = ("<pad>", "<s>", "</s>", "<unk>", " ", "a", "b", "c")
SPACE, A, B, C = range(4, 8)
# Two words spelled alike, one the beginning of another, one with two spellings, one that the model does not know.
LEXICON = {"A": [[A]], "ah": [[A]], "ab": [[A, B]], "cab": [[C, A, B], [C, B]], "bb": [[B, B]], "new": [[C]]}
TEXTS = ["A cab", "ab ah", "cab cab ab", "ah ab", "A", "bb ah bb", "ah ah ab A", "cab A", "ab cab", "bb"]


@functools.cache
def model(order: int = 3) -> NGram:
    return train([text.split() for text in TEXTS], order)


def build(model: NGram | None, dense_bytes: int = 2**20) -> LexiconScorer:
    return LexiconScorer.build(LEXICON, model, tokens=len(TOKENS), boundary=SPACE, dense_bytes=dense_bytes)


def worth(path: np.ndarray, model: NGram | None) -> float:
    """Of a path, in nats: -inf where it is not words with one boundary between them."""
    spelled: list[list[int]] = [[]]
    for token in path[path >= 0]:
        if token == SPACE:
            spelled.append([])
        else:
            spelled[-1].append(int(token))
    if not spelled[-1]:  # nothing, or a boundary at the end
        spelled.pop()
    words: list[str] = []
    for spelling in spelled:
        alike = [word for word, spellings in LEXICON.items() if spelling in spellings]
        if not alike:
            return -np.inf
        score = lambda word: 0 if model is None else model.score([[*words, word]])[0][len(words)]  # noqa: E731
        words.append(max(alike, key=score))
    return 0.0 if model is None else float(model.score([words])[0].sum() * np.log(10))


@pytest.mark.parametrize("dense_bytes", [2**20, 0])
def test_every_path_weighs_what_its_words_do(dense_bytes):
    paths = all_paths((SPACE, A, B, C), 6)
    expected = np.array([worth(path, model()) for path in paths])
    possible = np.isfinite(expected)
    assert possible.sum() > 100
    np.testing.assert_allclose(path_weight(build(model(), dense_bytes), paths), expected, atol=2e-5)  # float32 sums
    other = np.array([worth(path, model(2)) for path in paths[possible]])
    assert np.abs(other - expected[possible]).max() > 0.1


def test_without_a_model_words_weigh_nothing():
    paths = all_paths((SPACE, A, B, C), 5)
    np.testing.assert_array_equal(path_weight(build(None), paths), [worth(path, None) for path in paths])


def test_half_a_word_is_charged_for_the_likeliest_that_it_can_become():
    lm = model()
    unigram = {word: lm.logp[0][lm.id(word)] * np.log(10) for word in LEXICON}
    scorer, weigh = build(lm), jax.jit(LexiconScorer.scores)
    start = scorer.start(1, 1)
    scores = np.asarray(weigh(scorer, start))[0, 0]
    assert scores[A] == pytest.approx(max(unigram[word] for word in ("A", "ah", "ab")), rel=1e-6)
    assert scores[C] == pytest.approx(max(unigram["cab"], unigram["new"]), rel=1e-6)
    after = jax.jit(LexiconScorer.advance)(scorer, start, jnp.full((1, 1), C, jnp.int32))
    assert np.asarray(weigh(scorer, after))[0, 0, A] == pytest.approx(unigram["cab"] - scores[C], abs=1e-6)
    assert scores[SPACE] == -np.inf
    assert np.all(scores[:4] == 0)


def test_scores_and_states_of_many_beams():
    """[B, K] hypotheses with pasts of their own, as one at a time."""
    scorer = build(model(), 0)
    advance, scores = jax.jit(LexiconScorer.advance), jax.jit(LexiconScorer.scores)
    pasts = list(itertools.islice(itertools.product((-1, A, C), (SPACE, B, 0), (A, B)), 18))
    state = scorer.start(3, 6)
    for column in np.array(pasts, np.int32).reshape(3, 6, 3).transpose(2, 0, 1):
        state = advance(scorer, state, jnp.asarray(column))
    for at in (0, 7, 11, 17):
        alone = scorer.start(1, 1)
        for token in pasts[at]:
            alone = advance(scorer, alone, jnp.full((1, 1), token, jnp.int32))
        np.testing.assert_array_equal(scores(scorer, state)[at // 6, at % 6], scores(scorer, alone)[0, 0])


def test_a_boundary_that_ends_a_spelling_is_left_out():
    marked = {word: [[*spelling, SPACE] for spelling in spellings] for word, spellings in LEXICON.items()}
    scorer = LexiconScorer.build(marked, model(), tokens=len(TOKENS), boundary=SPACE)
    jax.tree.map(np.testing.assert_array_equal, scorer, build(model()))


@pytest.mark.parametrize("spelling", [[], [SPACE], [A, SPACE, B], [3], [A, 8]])
def test_impossible_spellings(spelling):
    with pytest.raises(UserError, match=r"'cab' is spelled \["):
        LexiconScorer.build({"a": [[A]], "cab": [spelling]}, None, tokens=len(TOKENS), boundary=SPACE)


# ---- files


def test_a_lexicon_file(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("cab\tc a b\nab a b\ncab  c b\r\n\nbb\ncab\tc a b\n")
    assert read_lexicon(path, TOKENS) == {"cab": [[C, A, B], [C, B]], "ab": [[A, B]], "bb": [[B, B]]}


def test_a_mark_of_the_byte_order_and_a_vocabulary_of_bytes(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_bytes("\ufeffab\ncab\n".encode())
    assert read_lexicon(path, TOKENS) == {"ab": [[A, B]], "cab": [[C, A, B]]}
    path.write_text("ü\n")
    tokens = make_tokenizer("bytes", []).tokens
    assert read_lexicon(path, tokens) == {"ü": [[tokens.index("<0xC3>"), tokens.index("<0xBC>")]]}


def test_words_beyond_the_vocabulary_are_listed(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("ab a b\nBach\nbéa b é a\nunk <unk>\n")
    with pytest.raises(UserError, match=r"no such tokens: Bach \('B'\), béa \('é'\), unk \('<unk>'\) \(3 words"):
        read_lexicon(path, TOKENS)
    path.write_text("".join(f"x{k}\n" for k in range(12)))
    with pytest.raises(UserError, match=r"x9 \('x'\), ... \(12 words in all\)"):
        read_lexicon(path, TOKENS)


def test_no_lexicon_file(tmp_path):
    path = tmp_path / "lexicon.txt"
    with pytest.raises(UserError, match="No such file"):
        read_lexicon(path, TOKENS)
    path.write_text("\n\n")
    with pytest.raises(UserError, match="no words in it"):
        read_lexicon(path, TOKENS)
    path.write_bytes("für\tf ü r".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_lexicon(path, TOKENS)

"""Hot words: in the end every occurrence counts once and nothing else does; credit on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_paths import all_paths, path_weight

from speechjax.decode.hot_words import HotWords
from speechjax.errors import UserError

SPACE, A, B, C = range(4, 8)
TOKENS = 8
scores, advance, final = (jax.jit(f) for f in (HotWords.scores, HotWords.advance, HotWords.final))
PHRASES = [[A, B, A], [B, A, B, B], [A, B, SPACE, C], [C], [B], [A, B, A]]


def build(phrases, boundary=-1, dense_bytes=2**20, bonus=0.5) -> HotWords:
    return HotWords.build(phrases, bonus=bonus, tokens=TOKENS, boundary=boundary, dense_bytes=dense_bytes)


def worth(path: np.ndarray, phrases, boundary: int) -> float:
    """Half for every token of every occurrence, of whole words if there is a boundary."""
    edge = [] if boundary < 0 else [boundary]
    text = [*edge, *path[path >= 0].tolist(), *edge]
    distinct = {tuple(phrase) for phrase in phrases}
    padded = [[*edge, *phrase, *edge] for phrase in distinct]
    found = [(text[i : i + len(p)] == p) * (len(p) - 2 * len(edge)) for p in padded for i in range(len(text))]
    return 0.5 * sum(found)


def credits(path: list[int], scorer: HotWords) -> list[float]:
    """What the tokens of a path earn one by one, and then its end."""
    state, found = scorer.start(1, 1), []
    for token in path:
        found.append(float(scores(scorer, state)[0, 0, token]))
        state = advance(scorer, state, jnp.full((1, 1), token, jnp.int32))
    return [*found, float(final(scorer, state)[0, 0])]


@pytest.mark.parametrize("boundary", [-1, SPACE])
@pytest.mark.parametrize("dense_bytes", [2**20, 0])
def test_every_path_has_the_bonus_of_its_phrases(boundary, dense_bytes):
    paths = all_paths((SPACE, A, B, C), 6)
    expected = np.array([worth(path, PHRASES, boundary) for path in paths])
    # Halves are exact.
    np.testing.assert_array_equal(path_weight(build(PHRASES, boundary, dense_bytes), paths), expected)
    assert not np.array_equal(expected, [worth(path, PHRASES, SPACE if boundary < 0 else -1) for path in paths])


@settings(max_examples=6, deadline=None)
@given(st.lists(st.lists(st.integers(4, 5), min_size=1, max_size=5), min_size=1, max_size=4), st.booleans())
def test_any_phrases(phrases, whole):
    boundary = SPACE if whole else -1
    phrases = [phrase for phrase in phrases if not whole or SPACE not in (phrase[0], phrase[-1])]
    paths = all_paths((4, 5), 7)[-128:]
    found = path_weight(build(phrases, boundary), paths)
    np.testing.assert_array_equal(found, [worth(path, phrases, boundary) for path in paths])


def test_a_phrase_under_way_earns_and_a_failure_pays_back():
    scorer = build([[A, B, C]])
    assert credits([A, B, C], scorer) == [0.5, 0.5, 0.5, 0]
    assert credits([A, B, B], scorer) == [0.5, 0.5, -1.0, 0]
    assert credits([A, B], scorer) == [0.5, 0.5, -1.0]
    assert credits([A, A, B, C], scorer) == [0.5, 0, 0.5, 0.5, 0]  # the new beginning keeps its own
    assert credits([A, B, C, A], scorer) == [0.5, 0.5, 0.5, 0.5, -0.5]  # what is finished stays


def test_whole_words_only_with_a_boundary():
    whole, anywhere = build([[A, B]], SPACE), build([[A, B]])
    assert credits([A, B, C], whole) == [0.5, 0.5, -1.0, 0]
    assert sum(credits([C, A, B], whole)) == 0
    assert sum(credits([C, SPACE, A, B, SPACE, A, B], whole)) == 2
    assert sum(credits([C, A, B], anywhere)) == sum(credits([A, B, C], anywhere)) == 1


def test_specials_weigh_nothing_and_change_nothing():
    scorer = build(PHRASES, SPACE)
    state = advance(scorer, scorer.start(2, 3), jnp.full((2, 3), A, jnp.int32))
    assert np.all(np.asarray(scores(scorer, state))[..., :4] == 0)
    for token in (-1, 0, 3):
        assert np.array_equal(advance(scorer, state, jnp.full((2, 3), token, jnp.int32)), state)
    assert not np.array_equal(advance(scorer, state, jnp.full((2, 3), B, jnp.int32)), state)


def test_no_phrases_weigh_nothing():
    paths = all_paths((SPACE, A), 3)
    assert not path_weight(build([], SPACE), paths).any()


@pytest.mark.parametrize(
    ("phrase", "fault"), [([], "is empty"), ([A, 3], "has symbols that the vocabulary lacks"), ([8], "has symbols")]
)
def test_impossible_phrases(phrase, fault):
    with pytest.raises(UserError, match=f"hot word 2 of 2 .*{fault}"):
        build([[A], phrase])
    with pytest.raises(UserError, match=f"hot word 'Zoë' {fault}"):
        HotWords.build([[A], phrase], bonus=1.0, tokens=TOKENS, names=["a", "Zoë"])

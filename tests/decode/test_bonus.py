"""The insertion bonus by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.decode.bonus import Bonus, Known
from speechjax.decode.ctc import PrefixBeam

SPACE = 4


def total(bonus, text):
    state, gain = bonus.start(1, 1), 0.0
    for token in text:
        gain += float(bonus.scores(state)[0, 0, token])
        state = bonus.advance(state, jnp.full((1, 1), token, jnp.int32))
        stay = bonus.advance(state, jnp.full((1, 1), -1, jnp.int32))
        np.testing.assert_array_equal(stay, state)
    return gain + float(bonus.final(state)[0, 0])


@pytest.mark.parametrize(
    ("text", "tokens", "words"),
    [([], 0, 0), ([5], 1, 1), ([5, 6], 2, 1), ([5, SPACE, 6, 6], 4, 2), ([SPACE, 5], 2, 1), ([5, SPACE, SPACE], 3, 1)],
)
def test_tokens_and_words_are_counted(text, tokens, words):
    assert total(Bonus(8, token=0.25, word=0.0, boundary=SPACE), text) == 0.25 * tokens
    assert total(Bonus(8, token=0.0, word=2.0, boundary=SPACE), text) == 2.0 * words
    assert total(Bonus(8, token=0.25, word=2.0, boundary=-1), text) == 0.25 * tokens + 2.0 * bool(text)


def test_specials_earn_nothing():
    assert not Bonus(8, token=1.0, word=1.0, boundary=SPACE).scores(jnp.zeros((2, 3), bool))[..., :4].any()


def test_with_scorers_a_search_knows_no_unknown():
    """<unk> is likeliest in every frame; without the scorer it is found."""
    logits = jnp.zeros((1, 3, 6)).at[..., 3].set(5.0).at[..., 5].set(2.0)
    lengths = jnp.array([3], jnp.int32)
    search = lambda *scorers: PrefixBeam(beams=4, tokens=3, symbols=3, best=1, scorers=scorers)(logits, lengths)  # noqa: E731
    assert search().tokens[0, 0, 0] == 3
    found = search((Known(6), 1.0))
    assert found.tokens[0, 0, : int(found.lengths[0, 0])].tolist() == [5]

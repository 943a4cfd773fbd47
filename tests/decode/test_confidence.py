"""Confidence from N-best lists, by hand and against the same table walked in Python."""

import jax
import numpy as np
import pytest

from speechjax.decode.confidence import hypothesis_confidence, token_confidence
from speechjax.decode.types import Hypotheses


def listed(texts, probabilities, width=6):
    """One row of hypotheses."""
    tokens = np.zeros((1, len(texts), width), np.int32)
    for n, text in enumerate(texts):
        tokens[0, n, : len(text)] = text
    with np.errstate(divide="ignore"):
        scores = np.log(np.array([probabilities], np.float32)) - 200  # scores are no probabilities: far below 0
    return Hypotheses(tokens, np.array([[len(text) for text in texts]], np.int32), scores, np.full_like(tokens, -1))


def test_posteriors_among_the_n_best():
    found = listed([[4], [5], [6], []], [0.2, 0.1, 0.1, 0.0])
    np.testing.assert_allclose(hypothesis_confidence(found), [[0.5, 0.25, 0.25, 0]], rtol=1e-4)  # float32 at -200
    np.testing.assert_allclose(hypothesis_confidence(found, scale=2.0)[0, 0], 4 / 6, rtol=1e-4)
    assert hypothesis_confidence(listed([[], []], [0.0, 0.0])).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([[4, 5, 6], [4, 5, 6]], [1, 1, 1]),
        ([[4, 9, 6], [4, 5, 6]], [1, 0.7, 1]),  # a substitution
        ([[4, 6], [4, 5, 6]], [1, 0.7, 1]),  # a deletion: what follows it is still there
        ([[9, 4, 5, 6], [4, 5, 6, 9]], [1, 1, 1]),  # insertions
        ([[], [9, 9, 9]], [0.5, 0.5, 0.5]),
        ([[4], [5, 6]], [0.8, 0.7, 0.7]),
    ],
)
def test_a_token_is_as_sure_as_the_hypotheses_that_have_it(others, expected):
    found = listed([[4, 5, 6], *others], [0.5, 0.3, 0.2])
    confidence = jax.jit(token_confidence)(found)
    np.testing.assert_allclose(confidence, [[*expected, 0, 0, 0]], rtol=1e-4, atol=1e-7)


def test_a_repeated_token_is_confirmed_once():
    """The trap of counting the same token anywhere: one 4 of the other hypothesis vouches for one of the two."""
    confidence = np.asarray(token_confidence(listed([[4, 4], [4]], [0.6, 0.4])))[0, :2]
    np.testing.assert_allclose(sorted(confidence), [0.6, 1.0], rtol=1e-4)


def agreements(best, other):
    """How many tokens an alignment with the fewest edits can leave unchanged: the table, without directions."""
    edits = np.arange(len(other) + 1)
    for token in best:
        row = [edits[0] + 1]
        for j, own in enumerate(other):
            row.append(min(edits[j] + (own != token), edits[j + 1] + 1, row[-1] + 1))
        edits = np.array(row)
    return edits[-1]


def test_random_alignments_have_the_fewest_edits():
    """Edits = substitutions + deletions + insertions follow from the tokens left unchanged only if these are many."""
    rng = np.random.default_rng(0)
    confidence = jax.jit(token_confidence)
    for _ in range(60):
        best, other = (rng.integers(4, 7, rng.integers(0, 7)).tolist() for _ in range(2))
        kept = np.asarray(confidence(listed([best, other], [0.5, 0.5])))[0] > 0.75
        matches, edits = int(kept.sum()), agreements(best, other)
        assert not kept[len(best) :].any()
        # All else is at best a substitution, at worst a deletion beside an insertion.
        assert max(len(best), len(other)) - matches <= edits <= len(best) + len(other) - 2 * matches
        text = iter(other)
        assert all(token in text for token in np.array([*best, 0])[:-1][kept[: len(best)]]), "in the order of both"

"""Error rates against jiwer's own corpus figures, Levenshtein by hand, and what must not change them."""

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.errors import UserError
from speechjax.scoring import words

UNITS = st.lists(st.sampled_from("abcd"), max_size=6)
PAIRS = st.lists(st.tuples(UNITS, UNITS), min_size=1, max_size=6)
QUICK = settings(max_examples=40, deadline=None)


def levenshtein(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def align(pairs) -> words.Alignment:
    return words.align([r for r, _ in pairs], [h for _, h in pairs])


@QUICK
@given(PAIRS)
def test_errors_are_levenshteins_and_the_steps_give_both_texts_back(pairs):
    found = align(pairs)
    assert found.errors.tolist() == [levenshtein(r, h) for r, h in pairs]
    assert found.lengths.tolist() == [len(r) for r, _ in pairs]
    for row, (reference, hypothesis) in enumerate(pairs):
        steps = list(found.steps(row))
        assert [s.reference for s in steps if s.reference is not None] == reference
        assert [s.hypothesis for s in steps if s.hypothesis is not None] == hypothesis
        assert all((s.reference == s.hypothesis) == (s.kind == "equal") for s in steps)
    confusions = found.confusions()
    totals = [found.substitutions.sum(), found.deletions.sum(), found.insertions.sum()]
    assert [sum(part.values()) for part in confusions] == totals


@QUICK
@given(PAIRS.filter(lambda pairs: any(r for r, _ in pairs)), st.randoms(use_true_random=False))
def test_order_and_doubling_change_nothing(pairs, random):
    other = pairs * 2
    random.shuffle(other)
    assert align(other).rate == align(pairs).rate
    assert align(other).sentence_rate == align(pairs).sentence_rate


def test_the_corpus_rate_is_jiwers():
    references = ["the cat sat on the mat", "hello world", "one two three four"]
    hypotheses = ["the cat sat mat", "hello big wide world", "one too three four"]
    found = words.align_words(references, hypotheses)
    assert found.rate == pytest.approx(jiwer.wer(references, hypotheses), rel=1e-12)
    assert found.rate == pytest.approx((2 + 2 + 1) / 12, rel=1e-12)
    assert found.rate != pytest.approx(np.mean([2 / 6, 2 / 2, 1 / 4])), "negative control: not a mean of rates"
    letters = words.align_characters(references, hypotheses)
    assert letters.rate == pytest.approx(jiwer.cer(references, hypotheses), rel=1e-12)
    assert found.sentence_rate == 1.0


def test_words_for_nothing_are_insertions():
    found = words.align_words(["a b", ""], ["a b", "um er"])
    assert found.insertions.tolist() == [0, 2]
    assert found.rate == 1.0  # two insertions, two words
    assert words.align_words(["a b", ""], ["", ""]).deletions.tolist() == [2, 0]
    with pytest.raises(UserError, match="all references are empty"):
        _ = words.align_words(["", " "], ["um", ""]).rate


def test_units_may_be_longer_than_a_letter():
    found = words.align([["tʃ", "a"]], [["t", "ʃ", "a"]])
    assert found.rate == 1.0  # one substituted, one inserted, of two
    assert words.align_characters(["tʃa"], ["tʃa"]).lengths.tolist() == [3]


def test_white_space_of_any_kind_is_one_space():
    assert words.align_characters([" a \n b"], ["a b"]).errors.tolist() == [0]
    assert words.characters("a  b") == ["a", " ", "b"]


def test_the_text_shows_what_is_wrong_where():
    found = words.align_words(["the cat sat on it"], ["a cat on it now"])
    assert found.text(0) == "REF: the cat sat on it ***\nHYP: a   cat *** on it now\n     S       D         I"
    narrow = found.text(0, width=12)
    assert narrow.split("\n\n")[0] == "REF: the cat\nHYP: a   cat\n     S"
    assert max(map(len, narrow.splitlines())) <= 12


def test_the_columns_are_those_of_a_terminal():
    """A combining tilde takes no column, a Chinese character two."""
    text = words.align([["ã", "中", "x"]], [["u", "国", "y"]]).text(0)
    assert text == "REF: ã 中 x\nHYP: u 国 y\n     S S  S"


def test_refusals():
    with pytest.raises(UserError, match="is the test set empty"):
        words.align([], [])
    with pytest.raises(ValueError, match="1 references and 2"):
        words.align_words(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="not a sequence of units"):
        words.align(["abc"], [["a"]])

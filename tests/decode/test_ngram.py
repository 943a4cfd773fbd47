"""Kneser-Ney against KenLM's models and against the formulas written out; distributions; perplexity."""

import collections
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.decode.arpa import read_arpa
from speechjax.decode.ngram import BEGIN, END, NGram, train
from speechjax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ["a b a", "b a b c", "c", "a b c a b", "b b a", "a b a c a", "d a b", "c a b a", "a", "b c b a d", "e a b a"]
WORDS = [text.split() for text in TEXTS]

Gram = tuple[str, ...]


def entries(model: NGram) -> dict[Gram, tuple[float, float]]:
    """{n-gram: (log10 p, log10 back-off)}."""
    found, beginnings = {}, [()]
    for k, keys in enumerate(model.keys):
        parents, last = np.divmod(keys, len(model.symbols))
        beginnings = [(*beginnings[p], model.symbols[s]) for p, s in zip(parents, last, strict=True)]
        backoff = model.backoff[k] if k + 1 < model.order else np.zeros(len(keys))
        found |= dict(zip(beginnings, zip(model.logp[k].tolist(), backoff.tolist(), strict=True), strict=True))
    return found


def log10p(table: dict[Gram, tuple[float, float]], context: Gram, word: str) -> float:
    """By the definition of back-off, from the longest context on."""
    if (*context, word) in table:
        return table[(*context, word)][0]
    if not context:
        return table[("<unk>",)][0]
    return table.get(context, (0.0, 0.0))[1] + log10p(table, context[1:], word)


def difference(a: NGram, b: NGram) -> float:
    """The largest one in any number but that of <s>, which nothing predicts; infinite for other n-grams."""
    one, other = entries(a), entries(b)
    if one.keys() != other.keys():
        return math.inf
    return max(np.abs(np.subtract(one[gram], other[gram]))[gram == ("<s>",) :].max() for gram in one)


# ---- against KenLM


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads((GOLDEN / "kenlm.json").read_text())


def test_equals_lmplz(golden):
    theirs = read_arpa(GOLDEN / "kenlm_3.arpa.gz")
    # It computes, and writes, in float32.
    assert difference(train(golden["texts"], 3), theirs) < 1e-6
    assert difference(train(golden["texts"][:-2], 3), theirs) > 1e-4


def test_equals_lmplz_where_counts_give_no_discounts(golden, caplog):
    few = golden["texts"][: golden["few"]]
    with caplog.at_level("INFO", "speechjax"):
        assert difference(train(few, 4), read_arpa(GOLDEN / "kenlm_4.arpa.gz")) < 1e-6
    assert "taking 0.5, 1 and 1.5" in caplog.text


@pytest.mark.parametrize("order", [3, 4])
def test_scores_texts_as_kenlm_does(golden, order):
    scores, _ = read_arpa(GOLDEN / f"kenlm_{order}.arpa.gz").score(golden["queries"])
    np.testing.assert_allclose(scores, list(itertools.chain(*golden["scores"][str(order)])), atol=1e-5)  # of up to 10


# ---- against the formulas


def kneser_ney(texts: list[list[str]], order: int) -> dict[Gram, float]:
    """log10 p(last | those before) of all n-grams of the texts: Chen and Goodman with dictionaries."""
    counts = collections.Counter()
    for text in texts:
        marked = ("<s>", *text, "</s>")
        for k in range(1, order + 1):
            counts.update(marked[i : i + k] for i in range(len(marked) - k + 1))
    lefts = collections.Counter(gram[1:] for gram in counts if len(gram) > 1)
    full = lambda gram: len(gram) == order or gram[0] == "<s>"  # noqa: E731
    adjusted = {gram: counts[gram] if full(gram) else lefts[gram] for gram in counts if gram != ("<s>",)}
    words = {gram[0] for gram in adjusted if len(gram) == 1} | {"<unk>"}

    def discounts(k: int) -> list[float]:
        n = collections.Counter(a for gram, a in adjusted.items() if len(gram) == k)
        try:
            y = n[1] / (n[1] + 2 * n[2])
            found = [j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3)]
        except ZeroDivisionError:
            found = [-1.0]
        return [0, *found] if all(0 <= d <= j for j, d in enumerate(found, 1)) else [0, 0.5, 1, 1.5]

    discount = {k: discounts(k) for k in range(1, order + 1)}

    def p(gram: Gram) -> float:
        k, context = len(gram), gram[:-1]
        if not k:
            return 1 / len(words)
        following = [a for other, a in adjusted.items() if len(other) == k and other[:-1] == context]
        if not following:
            return p(gram[1:])
        a = adjusted.get(gram, 0)
        freed = sum(discount[k][min(other, 3)] for other in following)
        lower = p(gram[1:]) if k > 1 else 1 / len(words)
        return (a - discount[k][min(a, 3)] + freed * lower) / sum(following)

    return {gram: math.log10(p(gram)) for gram in adjusted} | {("<unk>",): math.log10(p(("<unk>",)))}


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_formulas(order):
    table = entries(train(WORDS, order))
    expected = kneser_ney(WORDS, order)
    assert table.keys() - {("<s>",)} == expected.keys()
    for gram, logp in expected.items():
        assert table[gram][0] == pytest.approx(logp, abs=1e-6), gram  # float32
    assert any(abs(table[gram][0] - logp) > 0.01 for gram, logp in kneser_ney(WORDS[1:], order).items())


texts_of = st.lists(st.lists(st.sampled_from("abcd"), max_size=7), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(texts_of, st.integers(1, 4), st.lists(st.sampled_from("abcde"), max_size=4))
def test_every_context_has_a_distribution(texts, order, unseen):
    model = train(texts, order)
    table = entries(model)
    contexts = {gram for gram in table if len(gram) < model.order and "</s>" not in gram}
    for context in contexts | {(), tuple(unseen[: model.order - 1])}:
        total = sum(10 ** log10p(table, context, word) for word in model.symbols if word != "<s>")
        assert total == pytest.approx(1, abs=1e-5), context  # some float32


@settings(max_examples=25, deadline=None)
@given(texts_of, st.integers(1, 4), texts_of)
def test_scores_equal_backing_off_by_hand(texts, order, others):
    model = train(texts, order)
    table = entries(model)
    scores, ids = model.score(others)
    expected = []
    for text in others:
        marked = ("<s>", *(w if (w,) in table else "<unk>" for w in text), "</s>")
        expected += [log10p(table, marked[max(0, i + 1 - model.order) : i], marked[i]) for i in range(1, len(marked))]
    np.testing.assert_allclose(scores, expected, atol=1e-5)  # sums of five float32
    assert [model.symbols[i] for i in ids if i not in (0, END)] == [w for t in others for w in t if (w,) in table]


def test_scores_of_a_model_with_gaps():
    """ARPA files that were pruned: p(c | a b) is there, and p(c | b) is not."""
    names = ("<unk>", "<s>", "</s>", "a", "b", "c")
    a, b, c = 3, 4, 5
    keys = [np.arange(6), np.array([a * 6 + b]), np.array([0 * 6 + c])]
    model = NGram(
        names,
        keys,
        [np.full(6, -1, np.float32), np.array([-0.5], np.float32), np.array([-0.25], np.float32)],
        [np.array([0, -0.125, 0, -0.25, -0.5, -1], np.float32), np.array([-2], np.float32)],
    )
    scores, _ = model.score([["a", "b", "c", "b"], ["b", "c"]])
    np.testing.assert_array_equal(scores, [-1.125, -0.5, -0.25, -2, -1.5, -1.125, -1.5, -2])


# ---- properties


def test_the_order_of_texts_does_not_matter():
    assert difference(train(WORDS, 3), train(WORDS[::-1], 3)) == 0


def test_none_is_unknown():
    model = train([["a", None, "a"], ["b", None]], 2)
    assert model.symbols == ("<unk>", "<s>", "</s>", "a", "b")
    [after, *_], _ = model.score([[None]])
    [after_known, *_], _ = model.score([["b"]])
    assert after == model.score([["never seen"]])[0][0]
    assert after != after_known


def test_a_word_may_look_like_a_mark():
    model = train([["<s>", "a", "</s>", "<unk>"]], 2)
    assert sorted(model.symbols[3:]) == ["</s>", "<s>", "<unk>", "a"]
    assert model.id("<s>") not in (BEGIN, 0)


def test_perplexity_of_a_fair_coin():
    """Of order 1 and equal counts p is equal, but for the share of <unk>."""
    model = train([["a", "b"]], 1)  # a, b and </s> once each; three times 0.5 is given up, for four symbols
    share = 0.5 / 3 + 1.5 / 3 / 4
    found = model.measure([["a", "b", "a", "b"], ["x"]])
    assert (found.symbols, found.ends, found.unknown, found.unknown_share) == (5, 2, 1, 0.2)
    assert found.perplexity_known == pytest.approx(1 / share, rel=1e-6)
    assert found.perplexity == pytest.approx((1 / share) ** (6 / 7) * 8 ** (1 / 7), rel=1e-6)


def test_short_texts_give_a_lower_order(caplog):
    with caplog.at_level("WARNING", "speechjax"):
        assert train([["a"], ["b"]], 6).order == 3  # <s> a </s>
    assert "order 3 instead of 6" in caplog.text
    assert train([[]], 3).order == 2


def test_no_texts_are_an_error():
    with pytest.raises(UserError, match="needs text"):
        train([], 3)

"""Regression against scipy and scikit-learn, concordance by hand; translation against sacrebleu itself."""

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.errors import UserError
from speechjax.scoring import bootstrap, numbers, translation

QUICK = settings(max_examples=25, deadline=None)


@QUICK
@given(st.integers(0, 10_000))
def test_scores_are_those_of_the_libraries(seed):
    rng = np.random.default_rng(seed)
    references = np.round(rng.normal(3, 2, 20), 1)  # ties
    predictions = np.round(references + rng.normal(size=20), 1)
    found = numbers.agreement(references, predictions)
    assert found.mae == pytest.approx(sklearn.metrics.mean_absolute_error(references, predictions), rel=1e-12)
    assert found.rmse == pytest.approx(sklearn.metrics.root_mean_squared_error(references, predictions), rel=1e-12)
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(references, predictions).statistic, rel=1e-9)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(references, predictions).statistic, rel=1e-9)
    # Lin 1989, eq. 5: the correlation times how far from the line of equality.
    u, w = references.mean() - predictions.mean(), predictions.std() / references.std()
    bias = 2 / (w + 1 / w + u**2 / (references.std() * predictions.std()))
    assert found.ccc == pytest.approx(found.pearson * bias, rel=1e-9)


@QUICK
@given(st.integers(0, 10_000))
def test_weights_are_repetitions(seed):
    rng = np.random.default_rng(seed)
    references = np.round(rng.normal(300, 2, 12), 0)  # ties, and far from 0
    predictions = np.round(references + rng.normal(size=12), 0)
    weights = rng.poisson(0.3, size=(12, 8)).astype(np.float64)
    weights[:, 0] = 0
    weights[:, 1] = np.eye(12)[3] * 2  # one utterance twice: no correlation
    found = numbers.agreements(references, predictions, weights)
    for r in range(8):
        rows = np.repeat(np.arange(12), weights[:, r].astype(int))
        for name, score in (("mae", numbers.mae), ("rmse", numbers.rmse), ("pearson", numbers.pearson),
                            ("spearman", numbers.spearman), ("ccc", numbers.ccc)):  # fmt: skip
            try:
                expected = score(references[rows], predictions[rows])
            except UserError:
                expected = np.nan
            # Moments of numbers around 3 of 12 utterances cancel to some 1e-14 of them.
            np.testing.assert_allclose(found[name][r], expected, rtol=1e-9, atol=1e-9, err_msg=name)
    assert np.isnan(found["mae"][0])
    assert np.isnan(found["pearson"][1])
    assert not np.isnan(found["mae"][1])


def test_constant_predictions_have_no_correlation():
    """Sums of squares of 0.1 would say, by their rounding, that they have."""
    found = numbers.agreements(np.arange(7.0), np.full(7, 0.1), np.ones((7, 1)))
    assert np.isnan([found["pearson"][0], found["spearman"][0]]).all()
    assert found["ccc"][0] == 0


@QUICK
@given(st.integers(0, 10_000))
def test_what_each_does_not_see(seed):
    rng = np.random.default_rng(seed)
    references, predictions = rng.normal(size=(2, 15))
    found = numbers.agreement(references, predictions)
    twice = rng.permutation(np.tile(np.arange(15), 2))
    np.testing.assert_allclose(numbers.agreement(references[twice], predictions[twice]), found, rtol=1e-9)
    scaled = numbers.agreement(references, 3 * predictions + 2)
    assert scaled.pearson == pytest.approx(found.pearson, rel=1e-9)
    assert numbers.ccc(references, 3 * references + 2) < 0.9, "negative control: concordance sees scale and shift"
    assert numbers.spearman(references, np.exp(predictions)) == pytest.approx(found.spearman, rel=1e-9)


def test_perfect_and_opposite():
    x = np.arange(5.0)
    assert numbers.agreement(x, x) == (0, 0, 1, 1, 1)
    assert numbers.pearson(x, -x) == numbers.ccc(x, 4 - x) == -1
    assert numbers.ccc(x, x + 1) == pytest.approx(2 * 2 / (2 + 2 + 1))
    assert numbers.ccc(x, np.full(5, 2.0)) == 0


def test_number_refusals():
    for score in (numbers.mae, numbers.ccc, numbers.pearson):
        with pytest.raises(UserError, match="is the test set empty"):
            score([], [])
    for score in (numbers.pearson, numbers.spearman):
        with pytest.raises(UserError, match="all 3 predictions are 2: a correlation needs them to differ"):
            score([1, 2, 3], [2, 2, 2])
    for score in (numbers.pearson, numbers.spearman, numbers.ccc):
        with pytest.raises(UserError, match="all 1 references are 1"):
            score([1], [2])
    with pytest.raises(UserError, match="predictions contain NaN"):
        numbers.mae([1.0], [np.nan])
    with pytest.raises(ValueError, match="one number an utterance"):
        numbers.mae([[1.0]], [[1.0]])


# ---- translation

HYPOTHESES = ["the cat sat on the mat .", "he reads a book", "it is raining cats today", "hello there"]
REFERENCES = ["the cat is on the mat .", "he is reading a book", "it is raining cats and dogs", "hello there"]


def test_translation_scores_are_sacrebleus():
    pairs = [
        (translation.bleu, {}, sacrebleu.BLEU()),
        (translation.bleu, {"tokenize": "char"}, sacrebleu.BLEU(tokenize="char")),
        (translation.chrf, {}, sacrebleu.CHRF()),
        (translation.chrf, {"word_order": 2}, sacrebleu.CHRF(word_order=2)),
    ]
    for ours, options, theirs in pairs:
        found = ours(HYPOTHESES, REFERENCES, **options)
        assert found.score() == pytest.approx(theirs.corpus_score(HYPOTHESES, [REFERENCES]).score, rel=1e-12)
        assert found.signature == str(theirs.get_signature())
        assert f"version:{sacrebleu.__version__}" in found.signature
        assert ours(REFERENCES, REFERENCES, **options).score() == pytest.approx(100)


def test_a_resample_is_scored_like_a_test_set_of_its_own():
    rows = np.array([2, 2, 0, 1])
    for ours in (translation.bleu, translation.chrf):
        whole = ours(HYPOTHESES, REFERENCES)
        alone = ours([HYPOTHESES[i] for i in rows], [REFERENCES[i] for i in rows])
        assert whole.score(rows) == pytest.approx(alone.score(), rel=1e-12)
        assert whole.score(rows[::-1]) == whole.score(rows)
        assert whole.score(np.tile(np.arange(4), 3)) == pytest.approx(whole.score(), rel=1e-12)
        interval = bootstrap.interval_of(whole.score, 4, resamples=100)
        assert interval.low < interval.value == whole.score() < interval.high


def test_several_references_are_read_utterance_by_utterance():
    several = [[REFERENCES[0], HYPOTHESES[0]], [REFERENCES[1]], [REFERENCES[2], "it rains"], [REFERENCES[3]]]
    columns = [REFERENCES, [HYPOTHESES[0], None, "it rains", None]]
    found = translation.bleu(HYPOTHESES, several)
    theirs = sacrebleu.BLEU()
    assert found.score() == pytest.approx(theirs.corpus_score(HYPOTHESES, columns).score, rel=1e-12)
    assert "nrefs:var" in found.signature
    assert found.score() > translation.bleu(HYPOTHESES, REFERENCES).score()


def test_translation_refusals():
    with pytest.raises(UserError, match="no references, or all are empty"):
        translation.bleu([], [])
    with pytest.raises(UserError, match="no references, or all are empty"):
        translation.chrf(["a"], [""])
    with pytest.raises(UserError, match="utterance 1 and 0 others have no reference"):
        translation.bleu(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="1 references and 2"):
        translation.bleu(["a", "b"], ["a"])
    with pytest.raises(UserError, match="no tokenizer 'klingon': choose one of none, zh, 13a"):
        translation.bleu(["a"], ["a"], tokenize="klingon")

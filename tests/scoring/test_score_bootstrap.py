"""Intervals that hold the truth as often as they say, and blocks without which they do not."""

import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.scoring import bootstrap, classes

TRIALS = 300


def ratio_coverage(draw, blocks, truth: float) -> float:
    """Share of `TRIALS` test sets whose 95 % interval holds `truth`."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(TRIALS):
        found = bootstrap.interval(*draw(rng), blocks=blocks, resamples=400, seed=trial)
        held += found.low <= truth <= found.high
    return held / TRIALS


def test_the_interval_holds_the_truth():
    """WER of 60 utterances of 3 to 14 words, in each of which a word is wrong with a probability of its own."""

    def draw(rng):
        lengths = rng.integers(3, 15, 60)
        return rng.binomial(lengths, rng.beta(1, 4, 60)), lengths

    # 95 % of 300: standard deviation 1.3 %; percentile intervals of 60 skewed values fall short by 1 to 2 %.
    assert 0.90 < ratio_coverage(draw, None, 0.2) < 0.985


def test_speakers_are_blocks():
    """30 speakers of 10 utterances: what is hard about a speaker is hard in all of them."""
    speakers = np.repeat(np.arange(30), 10)

    def draw(rng):
        lengths = rng.integers(3, 15, 300)
        return rng.binomial(lengths, rng.beta(2, 8, 30)[speakers]), lengths

    # 30 blocks: sqrt(29 / 30) costs 0.5 %, the skew of the speakers' rates some more.
    assert 0.87 < ratio_coverage(draw, speakers, 0.2) < 0.985
    assert ratio_coverage(draw, None, 0.2) < 0.75, "negative control: as if utterances were independent"


def test_a_mean_has_the_interval_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, 4000)
    found = bootstrap.interval(values, np.ones(4000), resamples=4000)
    half = 1.96 * values.std() / np.sqrt(4000)
    # Limits are quantiles of 4000 draws: standard deviation of each about 0.04 of half.
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    narrower = bootstrap.interval(values, np.ones(4000), resamples=4000, level=0.5)
    assert (narrower.high - narrower.low) / (found.high - found.low) == pytest.approx(0.6745 / 1.96, rel=0.1)


def test_a_ratio_and_the_same_as_a_function_agree():
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 9, 50)
    errors = rng.binomial(lengths, 0.3)
    speakers = rng.integers(0, 12, 50)
    for blocks in (None, speakers):
        ratio = bootstrap.interval(errors, lengths, blocks=blocks, resamples=300)
        same = bootstrap.interval_of(
            lambda rows: errors[rows].sum() / lengths[rows].sum(), 50, blocks=blocks, resamples=300
        )
        np.testing.assert_allclose(ratio, same, rtol=1e-12)  # the same draws: rounding only
    named = bootstrap.interval(errors, lengths, blocks=[f"speaker {s:02}" for s in speakers], resamples=300)
    assert named == ratio


def test_many_resamples_at_once_are_those_of_one_by_one(monkeypatch):
    rng = np.random.default_rng(2)
    values = rng.normal(size=(2, 30))
    speakers = rng.integers(0, 8, 30)

    def at_once(weights):
        mean = values @ weights / weights.sum(axis=0)
        return dict(first=mean[0], product=np.where(mean[0] > -0.3, mean[0] * mean[1], np.nan))

    def one(rows):
        return at_once(np.bincount(rows, minlength=30)[:, None])["product"][0]

    for blocks in (None, speakers):
        found = bootstrap.intervals_of(at_once, 30, blocks=blocks, resamples=300)
        product = bootstrap.interval_of(one, 30, blocks=blocks, resamples=300)
        first = bootstrap.interval_of(lambda rows: values[0, rows].mean(), 30, blocks=blocks, resamples=300)
        np.testing.assert_allclose(found["first"], first, rtol=1e-12)
        np.testing.assert_allclose(found["product"], product, rtol=1e-12)  # those below -0.3 are left out
        with monkeypatch.context() as patch:
            patch.setattr(bootstrap, "_AT_HAND", 100)
            few = bootstrap.intervals_of(at_once, 30, blocks=blocks, resamples=300)
        np.testing.assert_allclose(few["product"], product, rtol=1e-12)
    [alone] = bootstrap.intervals_of(lambda weights: dict(n=weights.sum(axis=0)), 5, blocks=np.zeros(5)).values()
    assert alone.value == 5
    assert np.isnan(alone.low), "one block cannot vary"


def test_the_seed_is_all_that_is_random():
    errors = np.arange(20)
    first, again, other = (bootstrap.interval(errors, np.full(20, 30), seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_paired_systems_are_compared_on_the_same_draws():
    """Each utterance one error fewer: certain, although the intervals of the two overlap widely."""
    rng = np.random.default_rng(0)
    lengths, second = np.full(40, 20), rng.integers(0, 15, 40)
    first = second + (np.arange(40) % 2)
    found = bootstrap.difference(first, second, lengths)
    assert found.interval.value == pytest.approx(-0.025, rel=1e-12)
    assert found.improvement == 1.0
    assert found.interval.high < 0
    a, b = (bootstrap.interval(x, lengths) for x in (first, second))
    assert b.high > a.low, "negative control: unpaired, nothing could be said"
    assert bootstrap.difference(second, first, lengths).improvement == 0.0
    assert bootstrap.difference(second, first, lengths, higher_is_better=True).improvement == 1.0
    assert bootstrap.difference(first, first, lengths).improvement == 0.0, "ties are no improvement"


def test_the_probability_of_improvement_is_that_of_the_normal_distribution():
    rng = np.random.default_rng(3)
    gain = rng.normal(0, 1, 400)
    gain += 0.05 - gain.mean()
    found = bootstrap.difference(np.zeros(400), gain, np.ones(400), higher_is_better=True, resamples=8000)
    # P(N(0.05, s / 20) > 0) = Phi(1 / s) = 0.84 for s = 1; 8000 draws: 0.4 %.
    from scipy.stats import norm

    assert found.improvement == pytest.approx(norm.cdf(0.05 * 20 / gain.std()), abs=0.02)
    same = bootstrap.difference_of(
        lambda rows: 0.0, lambda rows: gain[rows].mean(), 400, higher_is_better=True, resamples=500
    )
    assert same.improvement == pytest.approx(found.improvement, abs=0.08)


def test_resamples_without_a_score_are_left_out():
    labels = np.array([0] * 9 + [1])

    def uar(rows):
        return classes.unweighted_average_recall(classes.confusion_matrix(labels[rows], np.zeros(len(rows), int), 2))

    found = bootstrap.interval_of(uar, 10, resamples=200)  # 35 % of the draws lack the one of class 1
    assert found == (0.5, 0.5, 0.5)
    hopeless = bootstrap.interval_of(lambda rows: np.nan if len(set(rows)) < 10 else 1.0, 10, resamples=50)
    assert hopeless.value == 1.0
    assert np.isnan([hopeless.low, hopeless.high]).all()


def test_one_block_has_no_limits():
    for blocks in (np.zeros(5, int), ["a"] * 5):
        value, low, high = bootstrap.interval(np.arange(5), np.ones(5), blocks=blocks)
        assert value == 2.0
        assert np.isnan([low, high]).all()
    assert np.isnan(bootstrap.difference([1], [2], [3]).improvement)


def test_refusals():
    with pytest.raises(UserError, match="is the test set empty"):
        bootstrap.interval([], [])
    with pytest.raises(UserError, match="is the test set empty"):
        bootstrap.interval_of(lambda rows: 0.0, 0)
    with pytest.raises(UserError, match="is the test set empty"):
        bootstrap.intervals_of(lambda weights: {}, 0)
    with pytest.raises(UserError, match="no references to score"):
        bootstrap.interval([1, 2], [0, 0])
    with pytest.raises(UserError, match="numerators contain NaN"):
        bootstrap.interval([1.0, np.nan], [1, 1])
    with pytest.raises(ValueError, match="lengths differ"):
        bootstrap.interval([1, 2], [1])
    with pytest.raises(ValueError, match="one label each"):
        bootstrap.interval([1, 2], [1, 1], blocks=[0])

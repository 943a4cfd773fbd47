"""Verification against Gaussian closed forms, scikit-learn and sums by brute force."""

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from scipy.stats import norm

from speechjax.errors import UserError
from speechjax.scoring import verification as v

QUICK = settings(max_examples=30, deadline=None)


def drawn(seed: int, n: int = 40, digits: int = 1):
    """Scores with ties, targets a little higher."""
    rng = np.random.default_rng(seed)
    target = rng.random(n) < 0.4
    target[:2] = True, False
    return np.round(rng.normal(target * 1.0, 1.0), digits), target


def eer(scores, target) -> float:
    return v.equal_error_rate(v.error_rates(scores, target)).rate


@QUICK
@given(st.integers(0, 10_000))
def test_rates_are_counts(seed):
    scores, target = drawn(seed)
    found = v.error_rates(scores, target)
    assert found.thresholds[-1] == np.inf
    for threshold, miss, alarm in zip(*found, strict=True):
        assert miss == pytest.approx(np.mean(scores[target] < threshold), abs=1e-12)
        assert alarm == pytest.approx(np.mean(scores[~target] >= threshold), abs=1e-12)


@QUICK
@given(st.integers(0, 10_000))
def test_equal_error_rate_is_that_of_scikit_learns_curve(seed):
    scores, target = drawn(seed)
    fpr, tpr, _ = sklearn.metrics.roc_curve(target, scores, drop_intermediate=False)
    expected = brentq(lambda x: 1 - x - interp1d(fpr, tpr)(x), 0, 1)
    # Where the curve crosses on a vertical step interp1d takes either end of it: at most a step of one target away.
    assert eer(scores, target) == pytest.approx(expected, abs=1 / target.sum())
    smooth = np.random.default_rng(seed).normal(target * 1.0, 1.0, len(target))
    found = v.error_rates(smooth, target)
    crossing = np.flatnonzero(found.misses >= found.false_alarms)[0]
    assert found.misses[crossing - 1] <= eer(smooth, target) <= found.misses[crossing]


def test_equal_error_rate_by_hand():
    # Targets 1, 3, 5; others 0, 2, 4.  At 3: one of three missed, one of three accepted.
    assert eer([1, 3, 5, 0, 2, 4], [1, 1, 1, 0, 0, 0]) == pytest.approx(1 / 3, rel=1e-12)
    assert v.equal_error_rate(v.error_rates([1, 3, 5, 0, 2, 4], [1, 1, 1, 0, 0, 0])).threshold == 3
    assert eer([2, 3, 0, 1], [1, 1, 0, 0]) == 0.0
    assert eer([0, 1, 2, 3], [1, 1, 0, 0]) == 1.0
    assert eer([1, 1, 1, 1, 1], [1, 1, 0, 0, 0]) == pytest.approx(0.5, rel=1e-12), "one score for all: chance"
    # One target 2 and others 1, 3, 3: at 2 (0, 2/3), above (1, 2/3): on the step between, at two thirds.
    assert eer([2, 1, 3, 3], [1, 0, 0, 0]) == pytest.approx(2 / 3, rel=1e-12)


@QUICK
@given(st.integers(0, 10_000))
def test_order_doubling_and_monotone_transforms_change_nothing(seed):
    scores, target = drawn(seed)
    twice = np.random.default_rng(seed).permutation(np.tile(np.arange(len(scores)), 2))
    rate, cost = (f(v.error_rates(scores, target))[0] for f in (v.equal_error_rate, v.min_detection_cost))
    for other in (v.error_rates(scores[twice], target[twice]), v.error_rates(np.exp(scores) * 3 - 7, target)):
        assert v.equal_error_rate(other).rate == pytest.approx(rate, abs=1e-12)
        assert v.min_detection_cost(other).cost == pytest.approx(cost, abs=1e-12)
    mirrored = v.equal_error_rate(v.error_rates(-scores, ~target)).rate
    assert mirrored == pytest.approx(rate, abs=1e-12), "misses and false alarms change places"


def test_two_gaussians_have_the_closed_forms():
    rng = np.random.default_rng(0)
    distance, n = 2.0, 100_000
    scores = np.concatenate([rng.normal(distance, 1, n), rng.normal(0, 1, n)])
    found = v.error_rates(scores, np.arange(2 * n) < n)
    rate, threshold = v.equal_error_rate(found)
    assert rate == pytest.approx(norm.cdf(-distance / 2), abs=0.003)  # 4 standard deviations of 100,000 trials
    assert threshold == pytest.approx(distance / 2, abs=0.02)
    # The optimal threshold is where the likelihood ratio is c_fa (1 - p) / (c_miss p).
    p, c_miss, c_alarm = 0.05, 10.0, 1.0
    odds = c_alarm * (1 - p) / (c_miss * p)
    best = distance / 2 + np.log(odds) / distance
    cost = (c_miss * p * norm.cdf(best - distance) + c_alarm * (1 - p) * norm.sf(best)) / min(c_miss * p, 1 - p)
    least = v.min_detection_cost(found, p_target=p, c_miss=c_miss, c_false_alarm=c_alarm)
    assert least.cost == pytest.approx(cost, abs=0.01)
    assert least.threshold == pytest.approx(best, abs=0.15)  # flat around the minimum
    other = v.min_detection_cost(found, p_target=0.01)
    assert abs(other.cost - cost) > 0.1, "negative control: the prior matters"


def test_cost_is_at_most_that_of_a_constant_answer():
    found = v.error_rates([0, 1, 2, 3], [1, 1, 0, 0])
    for p in (0.01, 0.5, 0.9):
        assert v.min_detection_cost(found, p_target=p).cost == pytest.approx(1.0, rel=1e-12)


# ---- trials and their scores


def test_pairs_are_each_once():
    trials = v.all_pairs(["a", "b", "a", "b"])
    pairs = list(zip(trials.first.tolist(), trials.second.tolist(), trials.target.tolist(), strict=True))
    assert sorted(pairs) == [
        (0, 1, False), (0, 2, True), (0, 3, False), (1, 2, False), (1, 3, True), (2, 3, False),
    ]  # fmt: skip


def test_a_list_of_trials(tmp_path):
    path = tmp_path / "trials.txt"
    path.write_text("1 x.wav y.wav\n\n0 y.wav z.wav\n")
    trials = v.read_trials(path, ["z.wav", "y.wav", "x.wav"])
    assert [column.tolist() for column in trials] == [[2, 1], [1, 0], [True, False]]
    for text, message in (
        ("1 x.wav w.wav\n", "line 1: there is no embedding of 'w.wav'"),
        ("1 x.wav y.wav\nsame x.wav y.wav\n", "line 2: want"),
        ("1 x.wav y.wav\n", "no trials of two speakers among 1"),
        ("", "no trials; are there two recordings"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            v.read_trials(path, ["z.wav", "y.wav", "x.wav"])


def test_cosines(monkeypatch):
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    x[3] = 0
    trials = v.all_pairs([0, 0, 0, 1, 1, 1, 2, 2, 2])
    expected = sklearn.metrics.pairwise.cosine_similarity(x.astype(np.float64))[trials.first, trials.second]
    found = v.cosine_scores(x, trials)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[trials.first == 3] == 0).all()
    np.testing.assert_allclose(v.cosine_scores(8 * x, trials), found, atol=1e-12)
    monkeypatch.setattr(v, "_AT_ONCE", 20)
    np.testing.assert_array_equal(v.cosine_scores(x, trials), found)


def test_adaptive_norm_by_brute_force(monkeypatch):
    rng = np.random.default_rng(0)
    x, cohort = rng.normal(size=(6, 5)), rng.normal(size=(20, 5))
    trials = v.all_pairs([0, 0, 1, 1, 2, 2])
    scores = v.cosine_scores(x, trials)
    found = v.adaptive_s_norm(scores, trials, x, cohort, top=7)

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for row, (i, j, _) in enumerate(zip(*trials, strict=True)):
        sides = []
        for k in (i, j):
            closest = sorted((cosine(x[k], c) for c in cohort), reverse=True)[:7]
            sides.append((scores[row] - np.mean(closest)) / np.std(closest))
        assert found[row] == pytest.approx(np.mean(sides), rel=1e-9)
    everyone = v.adaptive_s_norm(scores, trials, x, cohort, top=20)
    assert np.abs(found - everyone).max() > 0.1, "negative control: who is closest matters"
    monkeypatch.setattr(v, "_AT_ONCE", 50)
    np.testing.assert_allclose(v.adaptive_s_norm(scores, trials, x, cohort, top=7), found, rtol=1e-12)


def test_adaptive_norm_makes_one_threshold_fit_two_languages():
    """Embeddings of the second language lie closer together, whoever speaks: raw scores mislead."""
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(60), 4)
    shift = np.zeros((2, 32))
    shift[1, 0] = 6.0
    x = rng.normal(size=(60, 32))[speakers] + shift[speakers % 2] + 0.8 * rng.normal(size=(240, 32))
    cohort = rng.normal(size=(400, 32)) + shift[np.arange(400) % 2]
    trials = v.all_pairs(speakers)
    scores = v.cosine_scores(x, trials)
    normed = v.adaptive_s_norm(scores, trials, x, cohort, top=100)
    assert eer(normed, trials.target) < 0.5 * eer(scores, trials.target)


def test_refusals():
    with pytest.raises(UserError, match="no trials of one speaker among 3"):
        v.all_pairs(["a", "b", "c"])
    with pytest.raises(UserError, match="no trials of two speakers among 1"):
        v.all_pairs(["a", "a"])
    for few in ([], ["a"]):
        with pytest.raises(UserError, match="no trials; are there two recordings"):
            v.all_pairs(few)
    with pytest.raises(UserError, match="is the test set empty"):
        v.error_rates([], [])
    with pytest.raises(UserError, match="no trials of two speakers"):
        v.error_rates([1.0, 2.0], [True, True])
    with pytest.raises(UserError, match="scores contain NaN"):
        v.error_rates([1.0, np.nan], [True, False])
    with pytest.raises(UserError, match="p_target=1"):
        v.min_detection_cost(v.error_rates([1, 2], [0, 1]), p_target=1)
    trials = v.all_pairs([0, 0, 1])
    with pytest.raises(UserError, match="a cohort of 2 embeddings, but top=300"):
        v.adaptive_s_norm(np.zeros(3), trials, np.eye(3), np.ones((2, 3)))
    with pytest.raises(UserError, match="made of copies"):
        v.adaptive_s_norm(np.zeros(3), trials, np.eye(3), np.ones((5, 3)), top=5)

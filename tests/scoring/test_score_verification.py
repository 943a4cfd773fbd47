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
from speechjax.scoring import bootstrap
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
    path.write_bytes("1 x.wav ü.wav\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"trials.txt: not UTF-8 at byte 8; want a text of lines") as caught:
        v.read_trials(path, ["x.wav"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="gone: No such file"):
        v.read_trials(tmp_path / "gone", ["x.wav"])


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


# ---- intervals


def corpus(rng, speakers, each, spread=1.0):
    """(scores, trials, speakers) of all pairs; who is hard to tell is so in all recordings."""
    who = np.repeat(np.arange(speakers), each)
    noise = spread * rng.gamma(2, 0.5, speakers)[who, None]
    x = rng.normal(size=(speakers, 6))[who] + noise * rng.normal(size=(len(who), 6))
    trials = v.all_pairs(who)
    return v.cosine_scores(x, trials), trials, who


def test_intervals_are_those_of_copies_of_the_speakers(monkeypatch):
    """Everybody who is drawn, and everybody as often as drawn, is a person of their own with trials to all others."""
    scores, trials, who = corpus(np.random.default_rng(0), 7, 3)
    score = {(i, j): x for i, j, x in zip(*trials[:2], scores, strict=True)}

    def again(drawn, measure):
        people = [np.flatnonzero(who == speaker) for speaker in drawn]
        rows = []
        for a, own in enumerate(people):
            rows += [(score[i, j], True) for i in own for j in own if i < j]
            rows += [
                (score[min(i, j), max(i, j)], False)
                for b in range(a) if drawn[a] != drawn[b] for i in own for j in people[b]
            ]  # fmt: skip
        return measure(v.error_rates(*zip(*rows, strict=True)))

    monkeypatch.setattr(v, "_COLUMNS", 11)
    found = v.cost_intervals(scores, trials, [f"p{k}" for k in who], p_targets=(0.05, 0.3), resamples=60)
    measures = [lambda e: v.equal_error_rate(e).rate, *(
        lambda e, p=p: v.min_detection_cost(e, p_target=p).cost for p in (0.05, 0.3)
    )]  # fmt: skip
    for own, measure in zip((found.eer, *found.min_dcf), measures, strict=True):
        expected = bootstrap.interval_of(lambda drawn: again(drawn, measure), 7, resamples=60)  # noqa: B023
        np.testing.assert_allclose(own, expected, rtol=1e-9)


def test_some_thresholds_stand_for_all(monkeypatch):
    scores, trials, who = corpus(np.random.default_rng(2), 40, 4)
    few = v.cost_intervals(scores, trials, who, resamples=50)
    monkeypatch.setattr(v, "_STEPS", 10**6)
    every = v.cost_intervals(scores, trials, who, resamples=50)
    assert len(np.unique(scores)) == 12720
    assert few.eer.value == every.eer.value
    # 200 steps of the targets: between two of them rates are on a line.
    np.testing.assert_allclose(few.eer, every.eer, atol=0.002)
    np.testing.assert_allclose(few.min_dcf, every.min_dcf, atol=0.01)
    assert every.eer.high - every.eer.low > 0.02


@pytest.mark.slow
def test_the_interval_holds_the_truth_and_one_of_trials_does_not():
    truth = 0.242  # mean of 10 corpora of 400 speakers; its standard deviation is 0.003, and that of 25 speakers 0.03
    held, naive = [], []
    for trial in range(100):
        scores, trials, who = corpus(np.random.default_rng(trial), 25, 8)
        found = v.cost_intervals(scores, trials, who, p_targets=(), resamples=200, seed=trial).eer
        held.append(found.low <= truth <= found.high)
        if trial < 20:
            found = bootstrap.interval_of(
                lambda rows: eer(scores[rows], trials.target[rows]), len(scores), resamples=25, seed=trial  # noqa: B023
            )  # fmt: skip
            naive.append(found.low <= truth <= found.high)
    # Percentiles of 25 uneven speakers hold it in 91 % (of 60 in 93 %); standard deviation of 100: 3 %.
    assert np.mean(held) > 0.83
    assert np.mean(naive) < 0.65, "negative control: as if trials were independent"


def test_one_speaker_more_or_less_does_not_matter_where_all_are_alike():
    """Everybody's trials have the same scores: no resample differs."""
    trials = v.all_pairs(np.repeat(np.arange(5), 4))
    scores = np.where(trials.target, 1.0, 0.0)
    found = v.cost_intervals(scores, trials, np.repeat(np.arange(5), 4), resamples=50)
    assert found.eer == (0, 0, 0)
    flat = v.cost_intervals(np.ones(len(scores)), trials, np.repeat(np.arange(5), 4), resamples=50)
    assert flat.eer == pytest.approx((0.5, 0.5, 0.5))
    assert flat.min_dcf[0] == pytest.approx((1, 1, 1))
    alone = v.cost_intervals(scores, trials, np.zeros(20), resamples=50)
    assert np.isnan(alone.eer.low), "one speaker cannot vary"
    with pytest.raises(UserError, match="no trials of two speakers"):
        v.cost_intervals([1.0], v.Trials(*np.array([[0], [1], [1]])), [0, 0])


def test_speakers_are_names_and_what_trials_say():
    trials = v.Trials(np.array([0, 1, 4, 5]), np.array([1, 2, 5, 6]), np.array([True, False, True, False]))
    assert v.linked(trials, [""] * 7).tolist() == [0, 0, 1, 2, 3, 3, 4]
    found = v.linked(trials, ["", "a", "b", "a", "c", "", "b"])
    assert found.tolist() == [0, 0, 1, 0, 2, 2, 1]


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

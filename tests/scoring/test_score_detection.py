"""Detections by hand, matching against scipy's maximum matching, rates of Poisson alarms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from speechjax.errors import UserError
from speechjax.scoring import bootstrap, detection

QUICK = settings(max_examples=60, deadline=None)
NONE = np.zeros((0, 2))


def test_it_fires_when_the_score_gets_there_and_then_rests():
    scores = np.array([0, 0, 0.6, 0.9, 0.9, 0.9, 0.2, 0.7, 0, 0.7])
    assert detection.detections(scores, 0.5, hop=0.1, refractory=0.3).tolist() == pytest.approx([0.2, 0.5, 0.9])
    assert detection.detections(scores, 0.5, hop=0.1, refractory=0.5).tolist() == pytest.approx([0.2, 0.7])
    assert detection.detections(scores, 0.5, hop=0.1, refractory=0.0).tolist() == pytest.approx(
        [0.2, 0.3, 0.4, 0.5, 0.7, 0.9]
    )
    assert detection.detections(scores, 0.9, hop=0.1).tolist() == pytest.approx([0.3]), "at the threshold counts"
    assert not len(detection.detections(scores, 1.0, hop=0.1))


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_detections_are_those_of_a_device_that_goes_frame_by_frame(seed, rest):
    scores = np.random.default_rng(seed).random(40)
    expected, free_at = [], 0
    for t, score in enumerate(scores):
        if score >= 0.6 and t >= free_at:
            expected.append(t)
            free_at = t + rest
    found = detection.detections(scores, 0.6, hop=0.02, refractory=0.02 * rest)
    assert found.tolist() == pytest.approx([0.02 * t for t in expected])


@QUICK
@given(st.integers(0, 10_000))
def test_as_many_as_possible_are_matched(seed):
    rng = np.random.default_rng(seed)
    times = np.round(rng.uniform(0, 5, rng.integers(0, 9)), 1)
    start = np.round(rng.uniform(0, 5, rng.integers(0, 7)), 1)
    events = np.column_stack([start, start + np.round(rng.uniform(0, 1.5, len(start)), 1)])
    hit, found = detection.match(times, events, tolerance=0.2)
    fits = (events[:, :1] - 0.2 <= times) & (times <= events[:, 1:] + 0.2)
    most = (maximum_bipartite_matching(csr_matrix(fits)) >= 0).sum() if fits.size else 0
    assert hit.sum() == found.sum() == most
    assert not hit[~fits.any(axis=0)].any()
    assert not found[~fits.any(axis=1)].any()


def test_a_detection_explains_one_event_only():
    hit, found = detection.match([1.0, 1.2], [[0.9, 1.1]])
    assert (hit.tolist(), found.tolist()) == ([True, False], [True])
    _, found = detection.match([1.0], [[0.9, 1.1], [0.8, 1.5]])
    assert found.tolist() == [True, False], "that which closes first"
    assert detection.match([1.3], [[0.9, 1.1]])[1].tolist() == [False]
    assert detection.match([1.3], [[0.9, 1.1]], tolerance=0.25)[1].tolist() == [True]


def test_counts_and_curve_by_hand():
    # 36 s at 10 Hz: 0.01 h.  Heard at 5 s (0.9), not at 15 s (0.3); a false alarm of 0.6 at 25 s.
    scores = np.zeros(360)
    scores[52], scores[150], scores[250] = 0.9, 0.3, 0.6
    stream = detection.Stream(scores, 0.1, np.array([[5.0, 5.5], [15.0, 15.5]]))
    counts = detection.tally([stream], thresholds=[0.2, 0.5, 0.8])
    assert counts.misses[:, 0].tolist() == [0, 1, 1, 2]
    assert counts.alarms[:, 0].tolist() == [1, 1, 0, 0]
    assert (counts.events.tolist(), counts.hours.tolist()) == ([2], [pytest.approx(0.01)])
    found = detection.curve(counts)
    assert found.thresholds.tolist() == [0.2, 0.5, 0.8, np.inf]
    assert found.false_rejects.tolist() == [0.0, 0.5, 0.5, 1.0]
    assert found.false_alarms.tolist() == pytest.approx([100, 100, 0, 0])
    assert detection.at_false_alarms(found, 1.0) == (0.5, 0.0, 0.8)
    assert detection.at_false_alarms(found, 100.0) == (0.0, pytest.approx(100), 0.2)
    silent = detection.Stream(np.zeros(360), 0.1, NONE)
    half = detection.curve(detection.tally([stream, silent], thresholds=[0.2]))
    assert half.false_alarms[0] == pytest.approx(50), "twice the audio"
    assert half.false_rejects[0] == 0.0


def test_the_best_point_need_not_have_the_lowest_threshold():
    found = detection.Curve(
        np.array([1, 2, 3, 4, np.inf]), np.array([0, 0.4, 0.3, 0.3, 1]), np.array([9, 1, 1, 0.5, 0])
    )
    assert detection.at_false_alarms(found, 1.0) == (0.3, 0.5, 4)


def test_the_order_of_streams_and_their_number_change_nothing():
    rng = np.random.default_rng(0)
    streams = [detection.Stream(rng.random(200), 0.05, np.array([[s, s + 0.5]])) for s in rng.uniform(0, 9, 5)]
    one, other = (detection.curve(detection.tally(own)) for own in (streams, streams[::-1]))
    np.testing.assert_array_equal(one, other)
    twice = detection.curve(detection.tally(streams * 2, thresholds=one.thresholds))
    np.testing.assert_allclose(twice, one, rtol=1e-12)


def test_alarms_of_noise_come_as_often_as_they_must():
    """Independent scores: a frame fires with probability p, then rests for r frames: p / (1 + p (r - 1)) a frame."""
    rng = np.random.default_rng(0)
    frames, hop, p, rest = 400_000, 0.02, 0.01, 50
    noise = detection.Stream(rng.random(frames), hop, np.array([[1e6, 1e6 + 1]]))
    found = detection.curve(detection.tally([noise], thresholds=[1 - p], refractory=rest * hop))
    per_hour = 3600 / hop * p / (1 + p * (rest - 1))
    assert found.false_alarms[0] == pytest.approx(per_hour, rel=0.06)  # 2700 alarms: 2 %
    assert abs(3600 / hop * p / per_hour - 1) > 0.4, "negative control: without rest there were half more"


def test_the_thresholds_are_dense_where_alarms_are_rare():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=5000)
    stream = detection.Stream(scores, 0.1, np.array([[10.0, 11.0]]))
    found = detection.curve(detection.tally([stream], refractory=0.1))
    assert found.thresholds[-2] == scores.max()
    assert found.thresholds[0] == scores.min()
    assert (found.thresholds[:-1] > np.quantile(scores, 0.99)).sum() > 30
    assert (found.false_rejects[[0, -1]] == [0, 1]).all()


# ---- intervals


def noisy(rng, seconds, events):
    """A second of higher scores, more or less, behind every event."""
    scores = rng.normal(size=round(10 * seconds))
    starts = np.sort(rng.uniform(0, seconds - 2, events))
    for start in starts:
        scores[round(10 * start) : round(10 * start) + 10] += rng.choice([1.0, 4.0])
    return detection.Stream(scores, 0.1, np.column_stack([starts, starts + 1]))


def test_intervals_are_those_of_streams_drawn_again():
    rng = np.random.default_rng(0)
    streams = [noisy(rng, 30, n % 4) for n in range(22)]
    counts = detection.tally(streams, thresholds=np.linspace(0, 5, 6))
    assert counts.misses.shape == (7, 22)

    def rejects(rate):
        def again(rows):
            drawn = detection.tally([streams[i] for i in rows], thresholds=np.linspace(0, 5, 6))
            return detection.at_false_alarms(detection.curve(drawn), rate).false_rejects

        return again

    found = detection.intervals(counts, (30.0, 200.0), resamples=40)
    for own, rate in zip(found, (30.0, 200.0), strict=True):
        np.testing.assert_allclose(own, bootstrap.interval_of(rejects(rate), 22, resamples=40), rtol=1e-12)
        assert own.low < own.value < own.high


def test_of_few_streams_minutes_are_drawn():
    rng = np.random.default_rng(1)
    stream, short = noisy(rng, 600, 30), noisy(rng, 20, 1)
    counts = detection.tally([stream, short])
    assert counts.hours == pytest.approx([1 / 60] * 10 + [20 / 3600])
    assert counts.events[:10].tolist() == np.histogram(stream.events[:, 0], np.arange(11) * 60)[0].tolist()
    # What is in the minutes together is what is in the stream.
    n = len(counts.thresholds) // 2
    fired = detection.detections(stream.scores, counts.thresholds[n], hop=0.1)
    hit, heard = detection.match(fired, stream.events, tolerance=0.5)
    assert counts.alarms[n, :10].tolist() == np.histogram(fired[~hit], np.arange(11) * 60)[0].tolist()
    assert counts.misses[n, :10].sum() == (~heard).sum()
    [found] = detection.intervals(counts, (60.0,), resamples=200)
    assert found.low < found.value < found.high
    alone = detection.tally([short], thresholds=[0.0])
    assert np.isnan(detection.intervals(alone, (60.0,))[0].low), "one minute cannot vary"


def test_the_threshold_is_drawn_too():
    """One alarm in 22 streams decides: without it nothing is missed, and a third of the resamples are without."""
    quiet = [
        detection.Stream(np.where(np.arange(300) == 100, 1.0, 0.0), 0.1, np.array([[10.0, 10.5]])) for _ in range(21)
    ]
    loud = detection.Stream(np.where(np.arange(300) == 100, 2.0, 0.0), 0.1, np.zeros((0, 2)))
    counts = detection.tally([*quiet, loud])
    [found] = detection.intervals(counts, (1.0,))
    assert found == (1.0, 0.0, 1.0)


def test_refusals():
    with pytest.raises(UserError, match="no frames in any stream"):
        detection.tally([])
    with pytest.raises(UserError, match="no events in any stream"):
        detection.tally([detection.Stream(np.ones(5), 0.1, NONE)])
    with pytest.raises(UserError, match="scores contain NaN"):
        detection.tally([detection.Stream(np.array([np.nan]), 0.1, np.ones((1, 2)))])
    found = detection.curve(detection.tally([detection.Stream(np.ones(5), 0.1, np.ones((1, 2)))]))
    with pytest.raises(UserError, match="give 0 or more"):
        detection.at_false_alarms(found, -1.0)

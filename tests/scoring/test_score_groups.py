"""Groups by hand, and what may not be compared."""

import math

import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.scoring import bootstrap, classes, groups

#                  a: 4 / 40           b: 12 / 40         c: too small  unknown
ERRORS = np.array([1, 1, 2, 0, 3, 3, 3, 3, 9, 5])
LENGTHS = np.full(10, 10)
ACCENT = ["a", "a", "a", "a", "b", "b", "b", "b", "c", None]


def test_rates_gap_and_order():
    found = groups.ratio_by_group(ERRORS, LENGTHS, ACCENT, min_size=4)
    assert {g.name: (g.n, g.score.value, g.compared) for g in found.groups} == {
        "a": (4, 0.1, True), "b": (4, 0.3, True), "c": (1, 0.9, False), "(unknown)": (1, 0.5, False),
    }  # fmt: skip
    assert [g.name for g in found.groups] == ["b", "a", "(unknown)", "c"]
    assert (found.worst.name, found.best.name) == ("b", "a")
    assert found.gap == pytest.approx(0.2, rel=1e-12)
    assert found.all.score.value == 0.30
    assert found.relative_gap == pytest.approx(2 / 3, rel=1e-12)
    other = groups.ratio_by_group(ERRORS, LENGTHS, ACCENT, min_size=4, higher_is_better=True)
    assert (other.worst.name, other.best.name, other.gap) == ("a", "b", found.gap)


def test_limits_are_those_of_the_groups_own_utterances():
    found = groups.ratio_by_group(ERRORS, LENGTHS, ACCENT, min_size=4, resamples=200)
    a = next(g for g in found.groups if g.name == "a")
    assert a.score == bootstrap.interval(ERRORS[:4], LENGTHS[:4], resamples=200)
    assert math.isnan(next(g for g in found.groups if g.name == "c").score.low), "one utterance cannot vary"
    speakers = list("uuvvwwwwxy")
    blocked = groups.ratio_by_group(ERRORS, LENGTHS, ACCENT, min_size=4, resamples=200, blocks=speakers)
    b = next(g for g in blocked.groups if g.name == "b")
    assert b.score.value == 0.3
    assert math.isnan(b.score.low), "one speaker cannot vary"
    assert not math.isnan(next(g for g in blocked.groups if g.name == "a").score.low)


def test_any_score_gets_the_rows_of_its_group():
    labels = np.array([0, 1, 0, 1, 0, 0, 0, 0])
    said = np.array([0, 1, 1, 1, 0, 0, 0, 0])

    def uar(rows):
        return classes.unweighted_average_recall(classes.confusion_matrix(labels[rows], said[rows], 2))

    found = groups.by_group(uar, [1, 1, 1, 1, 2, 2, 2, 2], min_size=2, higher_is_better=True, resamples=50)
    assert found.worst.name == "1"
    assert found.worst.score.value == 0.75
    second = found.groups[-1]
    assert (second.name, second.compared) == ("2", False), "one class only: no score, no comparison"
    assert math.isnan(second.score.value)


def test_it_is_the_ratio_by_either_way():
    ratio = groups.ratio_by_group(ERRORS, LENGTHS, ACCENT, min_size=4, resamples=100)
    same = groups.by_group(lambda rows: ERRORS[rows].sum() / LENGTHS[rows].sum(), ACCENT, min_size=4, resamples=100)
    for one, other in zip(ratio.groups, same.groups, strict=True):
        assert one.name == other.name
        np.testing.assert_allclose(one.score, other.score, rtol=1e-12)  # NaN equals NaN here


def test_refusals():
    with pytest.raises(UserError, match=r"no group of 5 utterances with a score \(the largest has 4\)"):
        groups.ratio_by_group(ERRORS, LENGTHS, ACCENT, min_size=5)
    with pytest.raises(UserError, match="is the test set empty"):
        groups.by_group(lambda rows: 0.0, [])
    with pytest.raises(ValueError, match="10 utterances, but 2 groups"):
        groups.ratio_by_group(ERRORS, LENGTHS, ["a", "b"])
    with pytest.raises(ValueError, match="blocks"):
        groups.by_group(lambda rows: 0.0, ["a", "b"], blocks=["x"])

"""Agreement of units and phones: against scikit-learn, brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from speechjax import metrics

P, K = 4, 6


def frames(seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Phones, and units that depend on them; some of either unknown."""
    rng = np.random.default_rng(seed)
    phones = rng.integers(P, size=n)
    units = np.where(rng.random(n) < 0.6, phones, rng.integers(K, size=n))
    phones[rng.random(n) < 0.1] = -1
    units[rng.random(n) < 0.1] = -1
    return phones, units


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_measures_equal_scikit_learns_and_brute_force(seed):
    phones, units = frames(seed)
    counts = metrics.joint_counts(phones, units, P, K)
    known = (phones >= 0) & (units >= 0)
    p, k = phones[known], units[known]
    for a, b in itertools.product(range(P), range(K)):
        assert counts[a, b] == np.sum((p == a) & (k == b))
    shares = np.bincount(p) / len(p)
    entropy = -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))
    assert metrics.pnmi(counts) == pytest.approx(mutual_info_score(p, k) / entropy, abs=1e-12)
    likeliest = {b: np.bincount(p[k == b]).argmax() for b in set(k.tolist())}
    assert metrics.phone_purity(counts) == pytest.approx(
        np.mean([likeliest[b] == a for a, b in zip(p, k, strict=True)])
    )
    likeliest = {a: np.bincount(k[p == a]).argmax() for a in set(p.tolist())}
    assert metrics.cluster_purity(counts) == pytest.approx(
        np.mean([likeliest[a] == b for a, b in zip(p, k, strict=True)])
    )


def test_the_ends_of_the_scale():
    perfect = np.diag([5, 3, 2])
    assert metrics.pnmi(perfect) == metrics.phone_purity(perfect) == metrics.cluster_purity(perfect) == 1
    independent = np.outer([5, 3, 2], [1, 4, 2])
    assert metrics.pnmi(independent) == pytest.approx(0, abs=1e-12)
    assert metrics.phone_purity(independent) == 0.5  # the commonest phone
    assert metrics.cluster_purity(independent) == pytest.approx(4 / 7)  # the commonest unit
    # Several units a phone cost no PNMI and no phone purity, but cluster purity.
    split = np.array([[4, 4, 0], [0, 0, 8]])
    assert metrics.pnmi(split) == pytest.approx(1, abs=1e-12)
    assert metrics.phone_purity(split) == 1
    assert metrics.cluster_purity(split) == 0.75
    # Not symmetric: units that merge phones lose PNMI.
    assert metrics.pnmi(split.T) == pytest.approx(math.log(2) / (1.5 * math.log(2)))


def test_where_there_is_nothing_to_know_it_says_so():
    assert math.isnan(metrics.pnmi(np.zeros((P, K), int)))
    assert math.isnan(metrics.pnmi(np.array([[3, 4]])))  # a single phone
    assert math.isnan(metrics.phone_purity(np.zeros((0, K), int)))
    assert math.isnan(metrics.perplexity(np.zeros(K)))


def test_perplexity_of_even_and_single_use():
    assert metrics.perplexity(np.full(7, 3)) == pytest.approx(7)
    assert metrics.perplexity(np.array([0, 9, 0])) == 1


def test_tables_of_parts_add_up_and_wrong_ones_are_refused():
    phones, units = frames(1)
    whole = metrics.joint_counts(phones, units, P, K)
    parts = sum(metrics.joint_counts(phones[i::3], units[i::3], P, K) for i in range(3))
    assert np.array_equal(whole, parts)
    with pytest.raises(ValueError, match="beyond the table"):
        metrics.joint_counts(np.array([0]), np.array([K]), P, K)  # would count as the next phone's unit 0
    with pytest.raises(ValueError, match="one shape"):
        metrics.joint_counts(np.zeros(3), np.zeros(4), P, K)

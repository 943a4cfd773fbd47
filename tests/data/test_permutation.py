"""Pointwise shuffles: bijections, without pattern, and the same on every machine."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from speechjax.data.permutation import hashed, permute, uniform

quick = settings(deadline=None, max_examples=25)  # no deadline: the machine is shared


def assert_even(counts, expected=None):
    """Chi-square below what chance exceeds once in a thousand times; keys are fixed, so it fails always or never."""
    counts = np.asarray(counts, float)
    expected = counts.mean() if expected is None else expected
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-3, counts.size - 1)


@quick
@given(st.integers(1, 3000), st.lists(st.integers(0, 2**63), min_size=1, max_size=3))
def test_every_key_is_a_bijection(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", range(1, 40))
def test_the_smallest_are_bijections_for_many_keys(n):
    keys = np.arange(200)
    images = np.stack([permute(np.full(200, i), n, (keys,)) for i in range(n)])
    assert np.array_equal(np.sort(images, axis=0), np.broadcast_to(np.arange(n)[:, None], images.shape))


@pytest.mark.parametrize("bits", [20, 40, 60])
def test_large_domains_stay_inside_and_apart(bits):
    index = np.unique(np.random.default_rng(0).integers(0, 2**bits, 50_000))
    images = permute(index, 2**bits, (1,))
    assert images.min() >= 0
    assert images.max() < 2**bits
    assert len(np.unique(images)) == len(index)
    assert_even(np.bincount(images >> (bits - 5), minlength=32))


@quick
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 9), st.integers(0, 10**6)), min_size=1, max_size=50))
def test_many_permutations_in_one_call_are_each_the_same_as_alone(asked):
    n, key, index = np.array(asked).T
    index %= n
    together = permute(index, n, (3, key))
    alone = [int(permute(np.array([i]), int(m), (3, int(k)))[0]) for m, k, i in zip(n, key, index, strict=True)]
    assert together.tolist() == alone


def test_the_first_may_land_anywhere_and_so_may_its_neighbour():
    keys = np.arange(60_000)
    for n in (2, 5, 7, 30):
        first, second = (permute(np.full(len(keys), i), n, (keys, 11)) for i in (0, 1))
        pairs = np.bincount(first * n + second, minlength=n * n).reshape(n, n)
        assert not np.diag(pairs).any()
        if n > 2:
            assert_even(pairs[~np.eye(n, dtype=bool)])
        assert_even(pairs.sum(axis=1))


@pytest.mark.parametrize("n", [5, 6])
def test_all_permutations_come_up_equally_often(n):
    keys = np.arange(40_000)
    images = np.stack([permute(np.full(len(keys), i), n, (0, keys)) for i in range(n)])
    _, counts = np.unique(images.T @ n ** np.arange(n), return_counts=True)
    assert len(counts) == math.factorial(n)
    assert_even(counts)


def test_neighbours_in_a_long_permutation_are_strangers():
    n = 100_000
    image = permute(np.arange(n), n, (5,))
    cell = image * 20 // n
    assert_even(np.bincount(cell[:-1] * 20 + cell[1:], minlength=400))
    step = np.diff(image) % n  # uniform but for 0, were the images drawn with replacement; 1/n does not show
    assert_even(np.bincount(step * 50 // n, minlength=50))


def test_keys_alike_give_permutations_unlike():
    """Fixed points of one against another are Poisson of mean 1; the correlation has deviation n^-0.5 = 0.0045."""
    n = 50_000
    images = [permute(np.arange(n), n, key) for key in [(0,), (1,), (2**32,), (0, 0), (0, 1), (1, 0)]]
    for a, b in itertools.combinations(images, 2):
        assert (a == b).sum() < 8
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert np.array_equal(images[0], permute(np.arange(n), n, (0,)))


def test_draws_are_uniform_and_broadcast():
    draws = uniform(10, (4, np.arange(50_000)))
    assert_even(np.bincount(draws, minlength=10))
    below = np.arange(1, 100)
    assert np.all(uniform(below, (1, np.arange(99))) < below)
    assert np.array_equal(uniform(below, (1, np.arange(99)))[40:], uniform(below[40:], (1, np.arange(40, 99))))
    assert uniform(2**32, (4, np.arange(1000))).max() > 2**31


def test_the_numbers_are_these_on_every_machine():
    assert hashed((1, 2, 3)).tolist() == [12799061345140080112]
    assert uniform(1000, (5, np.arange(4))).tolist() == [354, 407, 863, 733]
    assert permute(np.arange(8), 8, (1, 2)).tolist() == [2, 7, 6, 0, 4, 3, 1, 5]
    assert permute(np.array([0, 1, 2**40 - 1]), 2**40, (7,)).tolist() == [349372549865, 973411091536, 292295889854]

"""Many logistic regressions side by side: each is the one scikit-learn finds alone."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from speechjax.evals import _logistic
from speechjax.evals._logistic import Problem


@pytest.fixture(autouse=True, scope="module")
def _one_blas_thread():
    with threadpool_limits(1):
        yield


def examples(n=240, dims=12, count=3, seed=0):
    """Features of very different size and strongly correlated, classes, and four training sets."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, count, n)
    mixing = rng.normal(size=(dims, dims)) * np.logspace(0, -2, dims)[:, None]
    features = (rng.normal(size=(n, dims)) + 0.8 * np.eye(count, dims)[classes]) @ mixing
    features = features * np.logspace(-2, 2, dims) + 1000
    return features, classes, rng.random((4, n)) < 0.7


def alone(features, classes, train, strength):
    """(probabilities of all examples, coefficients) of scikit-learn, to rounding."""
    scaler = StandardScaler().fit(features[train])
    plain = LogisticRegression(C=strength, tol=1e-9, max_iter=100_000).fit(
        scaler.transform(features[train]), classes[train]
    )
    return plain.predict_proba(scaler.transform(features)), plain.coef_.T


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_each_is_what_scikit_learn_finds_alone(strength):
    features, classes, train = examples()
    problem, which = Problem(features, classes, 3, train), np.arange(4)
    fits = problem.fit(which, np.full(4, strength), np.full(4, 1e-6), None, 2000)
    assert fits.converged.all()
    found = np.exp(problem.log_probabilities(which, fits))
    for j in range(4):
        wanted, coefficients = alone(features, classes, train[j], strength)
        # A gradient of 1e-6 with a curvature of at least 1 / (C n) = 6e-5: weights to 0.02, probabilities to less.
        np.testing.assert_allclose(found[:, j], wanted, atol=3e-3)
        np.testing.assert_allclose(fits.weights[j], coefficients, atol=2e-2 * max(1, np.abs(coefficients).max()))
        elsewhere, _ = alone(features, classes, train[(j + 1) % 4], strength)
        assert np.abs(found[:, j] - elsewhere).max() > 6e-3, "all training sets are alike: nothing is shown"


def test_strengths_and_tolerances_are_each_ones_own(monkeypatch):
    features, classes, train = examples()
    problem = Problem(features, classes, 3, train)
    strengths, tolerances = np.array([1e-3, 1.0, 0.1]), np.array([1e-5, 1e-3, 1e-6])
    together = problem.fit(np.array([2, 0, 1]), strengths, tolerances, None, 1000)
    monkeypatch.setattr(_logistic, "_ELEMENTS", 1)  # one training set at a time
    in_turns = problem.fit(np.array([2, 0, 1]), strengths, tolerances, None, 1000)
    # The products are of other shapes, so sums are rounded otherwise: the fits end within their tolerances.
    np.testing.assert_allclose(together.weights[[0, 2]], in_turns.weights[[0, 2]], atol=2e-3)
    assert np.abs(together.weights[0] - together.weights[2]).max() > 0.1


def test_a_start_changes_the_way_not_the_end():
    features, classes, train = examples()
    problem, which = Problem(features, classes, 3, train), np.arange(4)
    cold = problem.fit(which, np.full(4, 0.1), np.full(4, 1e-6), None, 1000)
    near = problem.fit(which, np.full(4, 0.05), np.full(4, 1e-6), None, 1000)
    warm = problem.fit(which, np.full(4, 0.1), np.full(4, 1e-6), near, 1000)
    np.testing.assert_allclose(warm.weights, cold.weights, atol=2e-3)
    assert np.abs(near.weights - cold.weights).max() > 0.02
    again = problem.fit(which, np.full(4, 0.1), np.full(4, 2e-6), warm, 0)
    np.testing.assert_array_equal(again.weights, warm.weights)


def test_cut_short_is_not_converged():
    features, classes, train = examples()
    fits = Problem(features, classes, 3, train).fit(np.arange(4), np.full(4, 1.0), np.full(4, 1e-6), None, 3)
    assert not fits.converged.any()


def test_a_class_that_is_not_there_has_no_probability():
    features, classes, train = examples()
    train[1] &= classes != 2
    problem = Problem(features, classes, 3, train)
    fits = problem.fit(np.arange(4), np.full(4, 0.1), np.full(4, 1e-5), None, 1000)
    shares = np.exp(problem.log_probabilities(np.arange(4), fits))
    assert fits.converged.all()
    assert (shares[:, 1, 2] == 0).all()
    assert shares[:, 0, 2].mean() == pytest.approx(np.mean(classes == 2), abs=0.1)


def test_a_constant_feature_and_more_features_than_examples():
    features, classes, train = examples(n=60, dims=200)
    features[:, 7] = 5.0
    problem = Problem(features, classes, 3, train)
    fits = problem.fit(np.arange(4), np.full(4, 0.1), np.full(4, 1e-6), None, 1000)
    assert fits.converged.all()
    np.testing.assert_array_equal(fits.weights[:, 7], 0)
    wanted, _ = alone(features, classes, train[2], 0.1)
    np.testing.assert_allclose(np.exp(problem.log_probabilities(np.arange(4), fits))[:, 2], wanted, atol=3e-3)


def test_correlated_features_take_few_steps(monkeypatch):
    """The preconditioner is what makes the probe fast: without its directions the same fit takes many more steps."""
    steps = []
    loss = Problem.loss
    monkeypatch.setattr(Problem, "loss", lambda self, *args: steps.append(0) or loss(self, *args))
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 5, 400)
    few = rng.normal(size=(400, 6)) + np.eye(5, 6)[classes]
    features = few @ rng.normal(size=(6, 150)) + 0.01 * rng.normal(size=(400, 150))
    train = np.ones((2, 400), bool)
    Problem(features, classes, 5, train).fit(np.arange(2), np.full(2, 0.01), np.full(2, 1e-5), None, 1000)
    quick = len(steps)
    steps.clear()
    monkeypatch.setattr(_logistic, "_DIRECTIONS", 1)
    Problem(features, classes, 5, train).fit(np.arange(2), np.full(2, 0.01), np.full(2, 1e-5), None, 1000)
    assert 3 * quick < len(steps), (quick, len(steps))

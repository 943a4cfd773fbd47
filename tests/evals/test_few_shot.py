"""Few labels: closed cases, the same draws for all rows, nothing of the tested speaker."""

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from speechjax.evals import _few_shot

SPEAKERS, WORDS = ("anna", "ben", "carla"), ("no", "yes", "maybe")


def clusters(separation, per_cell=8, dims=20, seed=0):
    rng = np.random.default_rng(seed)
    labels, groups = (axis.ravel() for axis in np.meshgrid(np.repeat(WORDS, per_cell), SPEAKERS))
    means = rng.normal(0, separation, (3, dims))
    return means[np.searchsorted(sorted(WORDS), labels)] + rng.normal(0, 1, (len(labels), dims)), labels, groups


def test_clear_words_need_one_example_and_noise_is_chance():
    found = _few_shot.accuracies(*clusters(20.0), "ben", (1, 5), 0)
    assert found == {1: [100.0] * _few_shot.DRAWS, 5: [100.0] * _few_shot.DRAWS}
    features, labels, groups = clusters(0.0, per_cell=100)
    noise = _few_shot.accuracies(features, labels, groups, "ben", (5,), 0)
    # 300 answers each, correct with probability 1/3: standard deviation 2.7 points; draws share the answers.
    assert abs(np.mean(noise[5]) - 100 / 3) < 4 * 2.7


def test_more_examples_help():
    found = _few_shot.accuracies(*clusters(0.4, per_cell=40), "ben", (1, 5, 20), 0)
    means = [np.mean(values) for values in found.values()]
    assert means[0] + 5 < means[1] < means[2] - 3
    assert np.std(found[1]) > np.std(found[20])


def test_it_is_ridge_regression_on_the_drawn_examples():
    features, labels, groups = clusters(0.4)
    mine = groups == "ben"
    scaled = StandardScaler().fit(features[~mine]).transform(features)
    order = np.random.default_rng([3, 0]).permutation(np.flatnonzero(~mine))
    known = np.concatenate([order[labels[order] == word][:5] for word in sorted(WORDS)])
    centred = scaled[known] - scaled[known].mean(axis=0)
    penalty = _few_shot._PENALTY * np.mean(np.sum(centred**2, axis=1))

    def plain(alpha):
        return 100 * RidgeClassifier(alpha=alpha).fit(scaled[known], labels[known]).score(scaled[mine], labels[mine])

    assert _few_shot.accuracies(features, labels, groups, "ben", (5,), 3)[5][0] == pytest.approx(plain(penalty))
    assert plain(penalty) != pytest.approx(plain(1e4 * penalty))


def test_the_tested_speaker_only_asks():
    """Whatever else it says, and how often, its answers to the same questions are the same."""
    features, labels, groups = clusters(0.5)
    mine = groups == "ben"
    before = _few_shot.accuracies(features, labels, groups, "ben", (5,), 0)[5]
    # All its recordings once more, which would change a mean or deviation that counts them; and far away.
    twice = [np.concatenate([x, x[mine]]) for x in (features, labels, groups)]
    assert _few_shot.accuracies(*twice, "ben", (5,), 0)[5] == pytest.approx(before)
    far = np.concatenate([features, 1e4 * features[mine]]), np.r_[labels, ["no"] * mine.sum()], twice[2]
    half = np.array(_few_shot.accuracies(*far, "ben", (5,), 0)[5])
    right = np.array(before) * mine.sum() / 100
    assert np.all((half * 2 * mine.sum() / 100 >= right - 1e-6) & (half * 2 * mine.sum() / 100 <= right + mine.sum()))
    # The others' recordings are what it knows.
    moved = np.where(mine[:, None], features, np.random.default_rng(0).normal(size=features.shape))
    assert _few_shot.accuracies(moved, labels, groups, "ben", (5,), 0)[5] != before


def test_seeds_draw_others_and_smaller_draws_are_part_of_larger_ones():
    data = clusters(0.4)
    assert _few_shot.accuracies(*data, "ben", (1,), 0) == _few_shot.accuracies(*data, "ben", (1,), 0)
    assert _few_shot.accuracies(*data, "ben", (1,), 0) != _few_shot.accuracies(*data, "ben", (1,), 1)
    alone, beside = (_few_shot.accuracies(*data, "ben", shots, 0)[1] for shots in ((1,), (1, 5)))
    assert alone == beside


def test_what_there_is():
    _, labels, groups = clusters(1.0)
    assert _few_shot.available(labels, groups, SPEAKERS) == 16
    labels = np.where((groups == "ben") & (labels == "no"), "yes", labels)
    assert _few_shot.available(labels, groups, ["anna"]) == 8
    assert _few_shot.available(labels, groups, ["ben"]) == 16

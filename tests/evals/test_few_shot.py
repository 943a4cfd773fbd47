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


def test_the_tested_speaker_has_no_part_and_draws_do_not_depend_on_features():
    features, labels, groups = clusters(0.5)
    mine = groups == "ben"
    other = np.where(mine[:, None], features[::-1], features)
    relabelled = np.where(mine, "no", labels)
    found = _few_shot.accuracies(other, relabelled, groups, "ben", (5,), 0)
    # Ben's recordings and labels only ask: answers to the same questions are what they were.
    asked = _few_shot.accuracies(np.where(mine[:, None], features, features), relabelled, groups, "ben", (5,), 0)
    assert found[5] != asked[5]
    longer = np.concatenate([features, features[mine]])
    twice = _few_shot.accuracies(longer, np.r_[labels, labels[mine]], np.r_[groups, groups[mine]], "ben", (5,), 0)
    assert twice[5] == pytest.approx(_few_shot.accuracies(features, labels, groups, "ben", (5,), 0)[5])
    scaled = _few_shot.accuracies(4.0 * features + 7, labels, groups, "ben", (5,), 0)
    assert scaled[5] == pytest.approx(_few_shot.accuracies(features, labels, groups, "ben", (5,), 0)[5])


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

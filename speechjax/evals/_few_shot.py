"""Few labels: how well do frozen features tell classes apart when only k examples of each are known?

Shape alphabet: N examples, D features, M examples drawn, K classes.
"""

from collections.abc import Sequence

import numpy as np

DRAWS = 10
# Penalty of the ridge regression as a share of the examples' mean squared norm.  A handful of examples leaves none to
# choose it on, so it is the same for all features: on spoken digits 0.1 is better for log-mel, 1 for MFCC.
_PENALTY = 0.3


def accuracies(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, tested: str, shots: Sequence[int], seed: int
) -> dict[int, list[float]]:
    """{k: % correct of each of `DRAWS` draws} on group `tested`, of a classifier that knows k examples a class.

    features: [N, D]; labels, groups: [N] names.  The examples of a draw are examples of all other groups, those of a
    smaller k among those of a larger one.  A draw depends on `seed`, labels and groups, not on the features: rows of
    a table compare the same examples.  The classifier is ridge regression on the classes as one-hot vectors, of
    features standardised on all examples of the other groups, which takes no labels.

    Every label must have max(shots) examples outside of `tested` (see `available`).
    """
    from threadpoolctl import threadpool_limits

    inside = groups == tested
    others = np.flatnonzero(~inside)
    mean, deviation = features[others].mean(axis=0, dtype=np.float64), features[others].std(axis=0, dtype=np.float64)
    features = ((features - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    classes = np.unique(labels[others])
    found: dict[int, list[float]] = {k: [] for k in shots}
    with threadpool_limits(1):  # these matrices are small: threads would wait for each other most of the time
        for draw in range(DRAWS):
            order = np.random.default_rng([seed, draw]).permutation(others)
            of_class = [order[labels[order] == name] for name in classes]
            for k in shots:
                known = np.concatenate([members[:k] for members in of_class])
                guesses = classes[_ridge(features[known], labels[known], classes, features[inside])]
                found[k].append(float(100.0 * np.mean(guesses == labels[inside])))
    return found


def available(labels: np.ndarray, groups: np.ndarray, tested: Sequence[str]) -> int:
    """The largest k that every class has examples for, whoever of `tested` is left out."""
    return min(int(np.unique(labels[groups != group], return_counts=True)[1].min()) for group in tested)


def _ridge(known: np.ndarray, labels: np.ndarray, classes: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Class of each row of `asked`, from `known` [M, D] and their labels [M]."""
    centre = known.mean(axis=0)
    known = known - centre
    # In M dimensions instead of D: there are fewer examples than features.
    products = known @ known.T
    targets = (labels[:, None] == classes) - 1 / len(classes)
    penalty = _PENALTY * max(np.trace(products) / len(known), np.finfo(float).tiny)
    weights = np.linalg.solve(products + penalty * np.eye(len(known)), targets)
    return ((asked - centre) @ (known.T @ weights)).argmax(axis=1)

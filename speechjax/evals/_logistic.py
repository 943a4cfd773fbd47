"""Multinomial logistic regression for many training sets of the same examples at once, in NumPy.

Shape alphabet: N examples, D features, K classes, J training sets, R directions of the preconditioner, H pairs of
steps and gradient changes that L-BFGS remembers.

A probe fits the same features again and again, each time without another speaker.  Done one by one, a product with
[N, D] for K = 10 columns waits for memory; side by side, J K columns make it a matrix product at full speed.
"""

from typing import NamedTuple

import numpy as np

_MEMORY = 10  # pairs that L-BFGS remembers
_SUFFICIENT = 1e-4  # share of the promised decrease that a step must keep (Armijo)
_SHORTER = 0.4  # factor of a step that did not
_ROUNDING = 1e-6  # of the loss, in nats
# Curvature of the loss along a standardised feature: p (1 - p) at p = 0.2.  It only sets the pace.
_CURVATURE = 0.15
_DIRECTIONS, _SAMPLED = 200, 512  # of the preconditioner, and the examples that they come from
_ELEMENTS = 1 << 25  # of the largest array: above it, training sets are fitted in turns
_ABSENT = -1e9  # logit of a class without a training example: exp of it is 0


class Fits(NamedTuple):
    """Classifiers: weights [J, D, K] on standardised features, biases [J, K], and which of them converged [J]."""

    weights: np.ndarray
    bias: np.ndarray
    converged: np.ndarray

    def take(self, which: np.ndarray) -> "Fits":
        return Fits(*(field[which] for field in self))


class _Point(NamedTuple):
    """Weights and biases, or their gradient, or a step."""

    weights: np.ndarray
    bias: np.ndarray

    def dot(self, other: "_Point") -> np.ndarray:
        """Inner products, [J]."""
        return np.einsum("jdk,jdk->j", self.weights, other.weights) + np.einsum("jk,jk->j", self.bias, other.bias)

    def plus(self, factor: np.ndarray, other: "_Point") -> "_Point":
        """self + factor [J] * other."""
        return _Point(
            self.weights + factor[:, None, None] * other.weights, self.bias + factor[:, None] * other.bias
        )  # fmt: skip

    def times(self, factor: np.ndarray) -> "_Point":
        return _Point(self.weights * factor[:, None, None], self.bias * factor[:, None])

    def minus(self, other: "_Point") -> "_Point":
        return _Point(self.weights - other.weights, self.bias - other.bias)

    def where(self, choose: np.ndarray, other: "_Point") -> "_Point":
        """self where `choose` [J], else other."""
        return _Point(
            np.where(choose[:, None, None], self.weights, other.weights),
            np.where(choose[:, None], self.bias, other.bias),
        )

    def take(self, which: np.ndarray) -> "_Point":
        return _Point(self.weights[which], self.bias[which])

    def largest(self) -> np.ndarray:
        """Largest component by magnitude, [J]."""
        return np.maximum(np.abs(self.weights).max(axis=(1, 2)), np.abs(self.bias).max(axis=1))


class Problem:
    """J training sets of the same N examples: `features` [N, D], `classes` int [N] below `count`, `train` bool [J, N].

    Each training set standardises the features by its own mean and deviation (a feature constant there is only
    centred).  The loss is the mean cross entropy plus |W|^2 / (2 C n), n examples in the set and C the strength, as
    scikit-learn's LogisticRegression has it; biases are free.  A class that a set lacks gets probability 0.
    """

    def __init__(self, features: np.ndarray, classes: np.ndarray, count: int, train: np.ndarray):
        self.count, self.train = count, train.astype(np.float32)
        # float32 is as fine as the distance to zero is short: a feature far from it would lose its variation.
        centred = features - np.median(features, axis=0)
        scale = centred.std(axis=0)
        self.features = (centred / np.where(scale > 0, scale, 1)).astype(np.float32)
        self.sizes = self.train.sum(axis=1)
        self.mean = (self.train @ self.features) / self.sizes[:, None]
        squares = (self.train @ np.square(self.features)) / self.sizes[:, None]
        deviation = np.sqrt(np.maximum(squares - np.square(self.mean), 0))
        self.deviation = np.where(deviation > 1e-6, deviation, 1).astype(np.float32)
        self.answers = np.eye(count, dtype=np.float32)[classes]
        self.absent = np.where(self.train @ self.answers == 0, np.float32(_ABSENT), np.float32(0))
        self._directions, self._spectrum, self._rest = self._principal()

    def _principal(self) -> tuple[np.ndarray, np.ndarray, np.float32]:
        """(directions [D, R], variance along each [R], mean variance elsewhere) of the standardised features, roughly.

        Speech features are correlated: along some directions the loss bends ten thousand times as much as along
        others, and a method that takes all alike needs hundreds of steps.  Where they are wrong it costs steps,
        never the result; so some examples will do, and outliers are clipped.
        """
        rows = np.random.default_rng(0).permutation(len(self.features))[:_SAMPLED]
        typical = (np.median(self.mean, axis=0), np.median(self.deviation, axis=0))
        some = np.clip((self.features[rows] - typical[0]) / typical[1], -5, 5)
        variances, vectors = np.linalg.eigh(some @ some.T / len(rows))
        variances, vectors = variances[::-1][:_DIRECTIONS], vectors[:, ::-1][:, :_DIRECTIONS]
        some_variance = variances > 1e-5 * variances[0]
        variances, vectors = variances[some_variance], vectors[:, some_variance]
        directions = some.T @ vectors / np.sqrt(variances * len(rows))
        left = np.square(some).sum() / len(rows) - variances.sum()
        rest = max(float(left) / max(some.shape[1] - len(variances), 1), 1e-4)
        return np.ascontiguousarray(directions), variances, np.float32(rest)

    def fit(
        self, which: np.ndarray, strengths: np.ndarray, tolerances: np.ndarray, start: Fits | None, max_iterations: int
    ) -> Fits:
        """Classifiers of the training sets `which` [J'], at `strengths` [J'], from `start` on (None: from zero).

        A fit ends where no component of the loss's gradient exceeds its tolerance [J'].
        """
        dims = self.features.shape[1]
        if start is None:
            start = Fits(
                np.zeros((len(which), dims, self.count), np.float32), np.zeros((len(which), self.count), np.float32),
                np.zeros(len(which), bool),
            )  # fmt: skip
        at_once = max(1, _ELEMENTS // (self.count * max(len(self.features), 2 * _MEMORY * dims)))
        found = [
            _Descent(self, which[k : k + at_once], strengths[k : k + at_once], tolerances[k : k + at_once]).run(
                start.take(np.arange(k, min(k + at_once, len(which)))), max_iterations
            )
            for k in range(0, len(which), at_once)
        ]
        return Fits(*(np.concatenate(fields) for fields in zip(*found, strict=True)))

    def logits(self, which: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """[N, J', K] by the classifiers (weights [J', D, K], bias [J', K]) of the training sets `which` [J']."""
        scaled = weights / self.deviation[which][:, :, None]
        offset = bias - np.einsum("jd,jdk->jk", self.mean[which], scaled) + self.absent[which]
        columns = scaled.transpose(1, 0, 2).reshape(self.features.shape[1], -1)
        return (self.features @ columns).reshape(len(self.features), len(which), self.count) + offset

    def log_probabilities(self, which: np.ndarray, fits: Fits) -> np.ndarray:
        """[N, J', K]."""
        logits = self.logits(which, fits.weights, fits.bias)
        logits -= logits.max(axis=2, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))

    def loss(self, which: np.ndarray, at: _Point, decay: np.ndarray) -> tuple[np.ndarray, _Point]:
        """Loss [J'] and gradient, with `decay` [J'] = 1 / (C n)."""
        logits = self.logits(which, at.weights, at.bias)
        logits -= logits.max(axis=2, keepdims=True)
        shares = np.exp(logits)
        total = shares.sum(axis=2)
        weight = self.train[which].T / self.sizes[which]
        missed = np.log(total) - np.einsum("njk,nk->nj", logits, self.answers)
        # In float64: the last steps lower the loss by less than a float32 sum of thousands can show.
        value = np.sum(weight * missed, axis=0, dtype=np.float64)
        value += 0.5 * decay * np.einsum("jdk,jdk->j", at.weights, at.weights)
        shares *= (weight / total)[:, :, None]
        shares -= weight[:, :, None] * self.answers[:, None]
        bias = shares.sum(axis=0)
        back = self.features.T @ shares.reshape(len(shares), -1)
        back = (
            back.reshape(-1, len(which), self.count).transpose(1, 0, 2) - self.mean[which][:, :, None] * bias[:, None]
        )
        weights = back / self.deviation[which][:, :, None] + decay[:, None, None] * at.weights
        return value, _Point(weights, bias)

    def newton(self, gradient: _Point, decay: np.ndarray) -> _Point:
        """About the inverse of the loss's second derivative, times `gradient`."""
        rest = _CURVATURE * self._rest + decay
        bend = _CURVATURE * self._spectrum[:, None] + decay  # [R, J']
        columns = gradient.weights.transpose(1, 0, 2).reshape(self.features.shape[1], -1)
        along = (self._directions.T @ columns).reshape(-1, len(decay), self.count) * (1 / bend - 1 / rest)[:, :, None]
        moved = (self._directions @ along.reshape(len(along), -1)).reshape(-1, len(decay), self.count)
        weights = moved.transpose(1, 0, 2) + gradient.weights / rest[:, None, None]
        return _Point(weights, gradient.bias / np.float32(_CURVATURE))


class _Descent:
    """Preconditioned L-BFGS (Nocedal and Wright 2006, algorithm 7.4) of training sets side by side.

    Each has its own step length and its own end; all are evaluated together.
    """

    def __init__(self, problem: Problem, which: np.ndarray, strengths: np.ndarray, tolerances: np.ndarray):
        self.problem, self.which, self.tolerances = problem, which, tolerances
        self.decay = (1 / (strengths * problem.sizes[which])).astype(np.float32)
        self.history: list[tuple[_Point, _Point, np.ndarray]] = []  # (step, change of gradient, 1 / their product)

    def run(self, start: Fits, max_iterations: int) -> Fits:
        weights, bias = start.weights.copy(), start.bias.copy()
        running = np.arange(len(self.which))
        at = _Point(weights, bias)
        value, gradient = self.problem.loss(self.which, at, self.decay)
        length = np.ones(len(running), np.float32)
        going = gradient.largest() > self.tolerances
        step = self._direction(gradient)
        for _ in range(max_iterations):
            if not going.all():
                running, value, length = running[going], value[going], length[going]
                at, gradient, step = at.take(going), gradient.take(going), step.take(going)
                self._drop(going)
                going = going[going]
            if not len(running):
                break
            there = at.plus(length, step)
            new_value, new_gradient = self.problem.loss(self.which, there, self.decay)
            slope, new_slope = gradient.dot(step), new_gradient.dot(step)
            fell = new_value <= value + _SUFFICIENT * length * slope
            # As close to the end the fall is lost in rounding, but the slope is not (Hager and Zhang 2005, eq. 4.1).
            level = (new_value <= value + _ROUNDING) & (new_slope <= -0.8 * slope)
            taken = fell | level
            self._remember(taken, at, there, gradient, new_gradient)
            at, gradient = there.where(taken, at), new_gradient.where(taken, gradient)
            value = np.where(taken, new_value, value)
            length = np.where(taken, 1, length * _SHORTER).astype(np.float32)
            weights[running], bias[running] = at.weights, at.bias
            going = gradient.largest() > self.tolerances
            step = self._direction(gradient).where(taken, step)
        converged = np.ones(len(weights), bool)
        converged[running[going]] = False
        return Fits(weights, bias, converged)

    def _drop(self, going: np.ndarray) -> None:
        self.which, self.decay, self.tolerances = self.which[going], self.decay[going], self.tolerances[going]
        self.history = [(s.take(going), y.take(going), rho[going]) for s, y, rho in self.history]

    def _remember(self, taken: np.ndarray, at: _Point, there: _Point, before: _Point, after: _Point) -> None:
        step, change = there.minus(at), after.minus(before)
        product = step.dot(change)
        usable = taken & (product > 1e-12)
        rho = np.where(usable, 1 / np.where(usable, product, 1), 0).astype(np.float32)  # 0: as if it were not there
        self.history = [*self.history, (step, change, rho)][-_MEMORY:]

    def _pace(self) -> np.ndarray:
        """How much further the last step shows that one may go than the preconditioner says, [J]."""
        _, change, rho = self.history[-1]
        size = rho * change.dot(self.problem.newton(change, self.decay))
        return np.where(size > 0, 1 / np.where(size > 0, size, 1), 1).astype(np.float32)

    def _direction(self, gradient: _Point) -> _Point:
        shares, rest = [], gradient
        for step, change, rho in reversed(self.history):
            shares.append(rho * step.dot(rest))
            rest = rest.plus(-shares[-1], change)
        moved = self.problem.newton(rest, self.decay)
        if self.history:
            moved = moved.times(self._pace())
        for (step, change, rho), share in zip(self.history, reversed(shares), strict=True):
            moved = moved.plus(share - rho * change.dot(moved), step)
        return _Point(-moved.weights, -moved.bias)

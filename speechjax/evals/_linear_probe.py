"""Linear probe: how much of a label can a linear classifier read from frozen features, on speakers it never heard?

Shape alphabet: N examples, T frames, D features, S samples.

The classifier is standardisation and multinomial logistic regression with an L2 penalty. Standardisation, penalty,
layer and weights come from the training groups alone; a group (a speaker) is tested by a classifier that saw nothing
of it. Two controls, `mfcc_statistics` and `log_mel_statistics`, need no model: features below them are not worth one.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypedDict

import jax
import numpy as np

from speechjax import machine
from speechjax.audio.features import log_mel, mfcc
from speechjax.errors import UserError
from speechjax.evals import _logistic

# Inverse penalties (scikit-learn's C), strongest penalty first: each fit starts from the one before.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# The penalty where two groups leave no third one to choose it on.
_DEFAULT_STRENGTH = 1e-2
# Largest gradient component of the mean loss at which a fit ends, times sqrt(C): coarse where penalties a factor of 10
# apart are compared, finer for the classifier that is scored.  Weak penalties need small gradients: a fit that is
# stopped early is a fit with a stronger penalty, and would be taken for a good one.  On spoken digits (D = 65, 400,
# 1280) a tenth of both chooses the same penalties (but between two as good) and moves no speaker by more than 0.4
# points, the mean over speakers by 0.2.
_COARSE, _FINE = 3e-5, 3e-6
_MAX_ITERATIONS = 1000
_BATCH_SAMPLES = 1 << 20


class ProbeResult(TypedDict):
    """Outcome of one probe seed: % correct per tested group and their mean, and how the classifiers came about.

    `layers` is the accuracy of every layer by itself, with the penalty that is best for it.
    """

    seed: int
    mean: float
    accuracy: dict[str, float]
    strength: dict[str, float]
    layer: dict[str, int]
    layers: list[dict[str, float]]
    unconverged: int


def pool(frames: np.ndarray) -> np.ndarray:
    """Five statistics of the (valid) frames: [T, D] -> float64 [5 D].

    Mean and standard deviation, then the means over the first, middle and last third: what was said, and in which
    order.  Every row of a table is pooled alike.  Raises UserError if there is no frame.
    """
    if len(frames) == 0:
        raise UserError("a recording without a single frame cannot be pooled: leave it out")
    frames = np.asarray(frames, np.float64)
    bounds = [len(frames) * third // 3 for third in range(4)]
    thirds = [frames[a : max(b, a + 1)].mean(axis=0) for a, b in itertools.pairwise(bounds)]
    return np.concatenate([frames.mean(axis=0), frames.std(axis=0), *thirds])


def leave_one_group_out(
    features: np.ndarray | Sequence[np.ndarray],
    labels: Sequence[str] | np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    held_out: Sequence[str] | None = None,
    seed: int = 0,
    train_share: float = 0.9,
) -> ProbeResult:
    """Test each group (or those in `held_out`) with a classifier trained on all the others.

    features: [N, D], or a list of L layers, each with a D of its own; labels, groups: [N] names. `seed` draws the
    `train_share` of the examples that may be trained on; every example of a tested group is tested. Layer and penalty
    (of `STRENGTHS`) of each classifier are those with the best log likelihood in a second leave-one-group-out among its
    training groups (accuracy is too coarse a criterion: it picks another penalty for every seed). A layer's penalties
    are weakened until the likelihood falls for every tested group; what would come after is not tried. With two groups
    in all, it is the last layer and a fixed penalty. `unconverged` counts the scored classifiers that reached the
    iteration limit.

    Raises UserError for arrays that do not match or are not finite, fewer than two groups, a group in `held_out` that
    does not exist, and a label of a tested group that the training groups lack.
    """
    from threadpoolctl import threadpool_limits

    layers = [np.asarray(x, np.float32) for x in ([features] if isinstance(features, np.ndarray) else features)]
    labels, groups = np.asarray(labels, str), np.asarray(groups, str)
    tested = _tested_groups(layers, labels, groups, held_out)
    kept = np.zeros(len(labels), bool)
    kept[np.random.default_rng(seed).permutation(len(labels))[: round(train_share * len(labels))]] = True
    for group in tested:
        inside = groups == group
        _check_labels(group, set(labels[inside].tolist()), set(labels[kept & ~inside].tolist()))
    task = _Task(*np.unique(labels, return_inverse=True), groups, kept, tested)
    # One BLAS thread a layer: threads of a pool wait for each other in busy loops.
    with threadpool_limits(1), ThreadPoolExecutor(machine.threads()) as workers:
        probed = list(workers.map(lambda layer: _Layer(layer, task), layers))
    last = len(probed) - 1
    chosen = {g: max(range(len(probed)), key=lambda k: probed[k].likelihood[g]) if task.pairs else last for g in tested}
    accuracy = {group: probed[layer].accuracy[group] for group, layer in chosen.items()}
    return ProbeResult(
        seed=seed,
        mean=float(np.mean(list(accuracy.values()))),
        accuracy=accuracy,
        strength={group: probed[layer].strength[group] for group, layer in chosen.items()},
        layer=chosen,
        layers=[layer.accuracy for layer in probed],
        unconverged=sum(not probed[layer].converged[group] for group, layer in chosen.items()),
    )


def mfcc_statistics(audio: Sequence[np.ndarray], *, sample_rate: int = 16000) -> np.ndarray:
    """Control without a model: 13 MFCC (26 mel bands, 25 ms windows, 10 ms apart), pooled to float64 [N, 65].

    audio: N waveforms [S], float in [-1, 1] or int16. Raises UserError for an empty one.
    """
    return _statistics(_mfcc, audio, sample_rate)


def log_mel_statistics(audio: Sequence[np.ndarray], *, sample_rate: int = 16000) -> np.ndarray:
    """Control without a model: 80 log-mel bands (25 ms windows, 10 ms apart), pooled to float64 [N, 400].

    audio: N waveforms [S], float in [-1, 1] or int16. Raises UserError for an empty one.
    """
    return _statistics(_log_mel, audio, sample_rate)


def _tested_groups(
    layers: Sequence[np.ndarray], labels: np.ndarray, groups: np.ndarray, held_out: Sequence[str] | None
) -> list[str]:
    for features in layers:
        if features.ndim != 2 or not len(features) == len(labels) == len(groups):
            raise UserError(
                "a probe needs features [N, D] with N labels and N groups, "
                f"not {features.shape}, {labels.shape} and {groups.shape}"
            )
    if not all(np.isfinite(features).all() for features in layers):
        raise UserError("the features to probe contain NaN or infinity: the model that made them has diverged")
    names = sorted(set(groups.tolist()))
    if len(names) < 2:
        raise UserError(f"leave-one-group-out needs at least 2 groups (speakers); there is only {', '.join(names)}")
    unknown = sorted(set(held_out or ()) - set(names))
    if unknown:
        raise UserError(f"no group {', '.join(unknown)} to hold out; there are {', '.join(names)}")
    return names if held_out is None else list(dict.fromkeys(held_out))


def _check_labels(group: str, wanted: set[str], trained: set[str]) -> None:
    missing = sorted(wanted - trained)
    if missing:
        raise UserError(
            f"without group {group!r} no training example has the label {', '.join(map(repr, missing))}: "
            "hold out another group, or leave these examples out"
        )
    if len(trained) < 2:
        raise UserError(f"without group {group!r} all training examples have the same label: nothing to tell apart")


class _Task(NamedTuple):
    """What a layer is probed for: `classes` [K] and the class of each example [N], their groups, which may train."""

    classes: np.ndarray
    answers: np.ndarray
    groups: np.ndarray
    kept: np.ndarray
    tested: list[str]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Groups left out together: without a and b, b is scored when choosing for a, and a when choosing for b."""
        names = sorted(set(self.groups.tolist()))
        found = {(min(a, b), max(a, b)) for a in self.tested for b in names if a != b}
        return sorted(found) if len(names) > 2 else []


class _Layer:
    """One layer probed: for each tested group the likelihood of the best penalty, that penalty, the accuracy with it.

    The classifiers of all pairs, and of all tested groups, are fitted side by side.
    """

    def __init__(self, features: np.ndarray, task: _Task):
        self.task, self.pairs = task, task.pairs
        left_out = [*self.pairs, *((group,) for group in task.tested)]
        train = np.array([task.kept & ~np.isin(task.groups, groups) for groups in left_out])
        self.problem = _logistic.Problem(features, task.answers, len(task.classes), train)
        self.likelihood = dict.fromkeys(task.tested, -np.inf)
        self.strength = dict.fromkeys(task.tested, _DEFAULT_STRENGTH)
        starts = self._choose() if self.pairs else {}
        self.accuracy, self.converged = self._score(starts)

    def _choose(self) -> dict[str, _logistic.Fits]:
        """Sets likelihood and strength; returns the classifiers of each group's pairs at that strength."""
        which, fits, starts = np.arange(len(self.pairs)), None, {}
        rising = set(self.task.tested)
        for strength in STRENGTHS:
            fits = self._fit(which, np.full(len(which), strength), _COARSE, fits)
            found = self._likelihoods(which, fits)
            for group in sorted(rising):
                value = float(np.mean(found[group]))
                if value > self.likelihood[group]:
                    mine = [j for j, k in enumerate(which) if group in self.pairs[k]]
                    self.likelihood[group], self.strength[group], starts[group] = (
                        value,
                        strength,
                        fits.take(np.array(mine)),
                    )
                else:
                    rising.remove(group)
            going = np.array([bool(rising.intersection(self.pairs[k])) for k in which])
            which, fits = which[going], fits.take(going)
            if not rising:
                break
        return starts

    def _likelihoods(self, which: np.ndarray, fits: _logistic.Fits) -> dict[str, list[float]]:
        """{tested group: mean log likelihood of each other group, left out with it}, in nats."""
        found: dict[str, list[float]] = {group: [] for group in self.task.tested}
        everything = self.problem.log_probabilities(which, fits)
        right = np.take_along_axis(everything, self.task.answers[:, None, None], axis=2)[..., 0]
        # One example judged impossible (probability 0 in float32) must not outvote all others.
        right = np.maximum(right, np.log(np.finfo(np.float32).eps))
        for column, k in enumerate(which):
            for choosing, scored in itertools.permutations(self.pairs[k]):
                if choosing in found:
                    found[choosing].append(float(right[self.task.groups == scored, column].mean()))
        return found

    def _score(self, starts: dict[str, _logistic.Fits]) -> tuple[dict[str, float], dict[str, bool]]:
        """Accuracy in % of each tested group with the classifier of all others, and whether that converged."""
        tested = self.task.tested
        which = len(self.pairs) + np.arange(len(tested))
        start = None
        if starts:  # the mean of its pairs: nearly there
            weights, bias = (
                np.stack([getattr(starts[g], f).mean(axis=0) for g in tested]) for f in ("weights", "bias")
            )
            start = _logistic.Fits(weights, bias, np.zeros(len(tested), bool))
        fits = self._fit(which, np.array([self.strength[group] for group in tested]), _FINE, start)
        guesses = self.problem.log_probabilities(which, fits).argmax(axis=2)
        accuracy = {}
        for column, group in enumerate(tested):
            inside = self.task.groups == group
            accuracy[group] = float(100.0 * np.mean(guesses[inside, column] == self.task.answers[inside]))
        return accuracy, dict(zip(tested, fits.converged.tolist(), strict=True))

    def _fit(
        self, which: np.ndarray, strengths: np.ndarray, tolerance: float, start: _logistic.Fits | None
    ) -> _logistic.Fits:
        return self.problem.fit(which, strengths, tolerance / np.sqrt(strengths), start, _MAX_ITERATIONS)


@functools.partial(jax.jit, static_argnums=2)
def _mfcc(audio: jax.Array, lengths: jax.Array, sample_rate: int) -> tuple[jax.Array, jax.Array]:
    window, hop = sample_rate // 40, sample_rate // 100
    return mfcc(audio, lengths, sample_rate=sample_rate, n_fft=window, hop=hop, n_mels=26)


@functools.partial(jax.jit, static_argnums=2)
def _log_mel(audio: jax.Array, lengths: jax.Array, sample_rate: int) -> tuple[jax.Array, jax.Array]:
    return log_mel(audio, lengths, sample_rate=sample_rate, n_fft=sample_rate // 40, hop=sample_rate // 100)


def _statistics(
    extract: Callable[..., tuple[jax.Array, jax.Array]],
    audio: Sequence[np.ndarray],
    sample_rate: int,
) -> np.ndarray:
    rows: list[np.ndarray] = [np.empty(0)] * len(audio)
    for indices, batch, lengths in _padded_batches(audio, sample_rate):
        frames, n_frames = map(np.asarray, extract(batch, lengths, sample_rate))
        for row, index in enumerate(indices):
            rows[index] = pool(frames[row, : n_frames[row]])
    return np.stack(rows)


def _padded_batches(
    audio: Sequence[np.ndarray], sample_rate: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(indices, batch, lengths): durations doubling from half a second, one batch size for each, so few shapes."""
    lengths = np.array([len(waveform) for waveform in audio], np.int32)
    if (lengths == 0).any():
        raise UserError(f"recording {int(np.argmin(lengths))} holds no samples: leave it out")
    doublings = np.ceil(np.log2(np.maximum(lengths / (sample_rate / 2), 1.0))).astype(int)
    for bucket in np.unique(doublings):
        samples = (sample_rate // 2) << int(bucket)
        size = max(1, _BATCH_SAMPLES // samples)
        members = np.flatnonzero(doublings == bucket)
        for indices in np.split(members, range(size, len(members), size)):
            batch = np.zeros((size, samples), np.float32)
            for row, index in enumerate(indices):
                full_scale = 32768.0 if audio[index].dtype == np.int16 else 1.0
                batch[row, : lengths[index]] = audio[index] / full_scale
            yield indices, batch, np.pad(lengths[indices], (0, size - len(indices)))

"""Linear probe: how much of a label can a linear classifier read from frozen features, on speakers it never heard?

Shape alphabet: N examples, T frames, D features, S samples.

The classifier is standardisation and multinomial logistic regression with an L2 penalty. Standardisation, penalty,
layer and weights come from the training groups alone; a group (a speaker) is tested by a classifier that saw nothing
of it. Two controls, `mfcc_statistics` and `log_mel_statistics`, need no model: features below them are not worth one.
"""

import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypedDict

import jax
import numpy as np

from speechjax.audio.features import log_mel, mfcc
from speechjax.errors import UserError

# Inverse penalties (scikit-learn's C), strongest penalty first: each fit starts from the one before.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# The penalty where two groups leave no third one to choose it on.
_DEFAULT_STRENGTH = 1e-2
# Largest gradient component of the mean loss at which a fit ends: coarse where penalties a factor of 10 apart are
# compared, finer for the classifier that is scored. On spoken digits (D = 65, 160, 1024) 1e-6 for both chooses the
# same penalties and moves no speaker by more than 0.4 points, the mean over speakers by 0.1.
_COARSE, _FINE = 1e-3, 1e-4
_MAX_ITERATIONS = 1000
_BATCH_SAMPLES = 1 << 20


class ProbeResult(TypedDict):
    """Outcome of one probe seed: % correct per tested group and their mean, and how the classifiers came about."""

    seed: int
    mean: float
    accuracy: dict[str, float]
    strength: dict[str, float]
    layer: dict[str, int]
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
    features: np.ndarray,
    labels: Sequence[str] | np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    held_out: Sequence[str] | None = None,
    seed: int = 0,
    train_share: float = 0.9,
) -> ProbeResult:
    """Test each group (or those in `held_out`) with a classifier trained on all the others.

    features: [N, D], or [N, L, D] of L layers; labels, groups: [N] names. `seed` draws the `train_share` of the
    examples that may be trained on; every example of a tested group is tested. Layer and penalty (of `STRENGTHS`) of
    each classifier are those with the best log likelihood in a second leave-one-group-out among its training groups
    (accuracy is too coarse a criterion: it picks another penalty for every seed); with two groups in all, the last
    layer and a fixed penalty. `unconverged` counts the scored classifiers that reached the iteration limit.

    Raises UserError for arrays that do not match or are not finite, fewer than two groups, a group in `held_out` that
    does not exist, and a label of a tested group that the training groups lack.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    features, labels, groups = np.asarray(features, np.float32), np.asarray(labels, str), np.asarray(groups, str)
    features = features[:, None] if features.ndim == 2 else features
    tested = _tested_groups(features, labels, groups, held_out)
    kept = np.zeros(len(labels), bool)
    kept[np.random.default_rng(seed).permutation(len(labels))[: round(train_share * len(labels))]] = True
    for group in tested:
        inside = groups == group
        _check_labels(group, set(labels[inside].tolist()), set(labels[kept & ~inside].tolist()))

    def fit(layer, left_out, strengths, tolerance):
        return _fit_and_score(features[:, layer], labels, groups, kept, left_out, strengths, tolerance)

    layers = range(features.shape[1])
    names = sorted(set(groups.tolist()))
    # Leaving out a and b scores b when choosing for a, and a when choosing for b: one fit serves both.
    pairs = sorted({tuple(sorted((a, b))) for a in tested for b in names if a != b}) if len(names) > 2 else []
    # One BLAS thread a fit: the pools of numpy and scipy wait for each other in busy loops, at seven times the cost.
    with threadpool_limits(1), warnings.catch_warnings(), ThreadPoolExecutor(_cpu_count()) as workers:
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted in `unconverged`
        jobs = list(itertools.product(pairs, layers))
        curves = list(workers.map(lambda job: fit(job[1], job[0], STRENGTHS, _COARSE), jobs))
        chosen = {group: _best(group, curves, len(layers)) for group in tested}
        scores = list(workers.map(lambda g: fit(chosen[g][0], [g], [chosen[g][1]], _FINE)[g][0], tested))
    accuracy = {group: score.accuracy for group, score in zip(tested, scores, strict=True)}
    return ProbeResult(
        seed=seed,
        mean=float(np.mean(list(accuracy.values()))),
        accuracy=accuracy,
        strength={group: strength for group, (_, strength) in chosen.items()},
        layer={group: layer for group, (layer, _) in chosen.items()},
        unconverged=sum(not score.converged for score in scores),
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
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, held_out: Sequence[str] | None
) -> list[str]:
    if features.ndim != 3 or not len(features) == len(labels) == len(groups):
        raise UserError(
            "a probe needs features [N, D] or [N, L, D] with N labels and N groups, "
            f"not {features.shape}, {labels.shape} and {groups.shape}"
        )
    if not np.isfinite(features).all():
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


class _Score(NamedTuple):
    log_likelihood: float  # mean over the group's examples, in nats
    accuracy: float  # %
    converged: bool


def _fit_and_score(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    kept: np.ndarray,
    left_out: Sequence[str],
    strengths: Sequence[float],
    tolerance: float,
) -> dict[str, list[_Score]]:
    """Scores of every group left out by the classifiers of ascending `strengths`, trained on all the others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train = kept & ~np.isin(groups, left_out)
    scores: dict[str, list[_Score]] = {group: [] for group in left_out}
    if len(set(labels[train].tolist())) < 2:  # two groups short, one label may remain: then no penalty is better
        return {group: [_Score(0.0, 0.0, True)] * len(strengths) for group in left_out}
    scaler = StandardScaler().fit(features[train])
    trained = scaler.transform(features[train])
    tests = {group: (scaler.transform(features[groups == group]), labels[groups == group]) for group in left_out}
    classifier = LogisticRegression(tol=tolerance, max_iter=_MAX_ITERATIONS, warm_start=True)
    for strength in strengths:
        classifier.set_params(C=strength).fit(trained, labels[train])
        converged = bool(classifier.n_iter_.max() < _MAX_ITERATIONS)
        for group, (inputs, answers) in tests.items():
            is_answer = answers[:, None] == classifier.classes_[None]
            probabilities = classifier.predict_proba(inputs)
            accuracy = 100.0 * np.mean(is_answer[np.arange(len(answers)), probabilities.argmax(axis=1)])
            # One example judged impossible (probability 0 in float32) must not outvote all others.
            log_probabilities = np.log(np.maximum(probabilities, np.finfo(np.float32).eps))
            likelihood = np.sum(log_probabilities, where=is_answer) / len(answers)
            scores[group].append(_Score(float(likelihood), float(accuracy), converged))
    return scores


def _best(group: str, curves: Sequence[Mapping[str, Sequence[_Score]]], layers: int) -> tuple[int, float]:
    """(layer, penalty) for testing `group`; `curves` go through the layers pair by pair."""
    found = [
        [score.log_likelihood for score in curve[name]]
        for curve in curves
        if group in curve
        for name in curve
        if name != group
    ]
    if not found:
        return layers - 1, _DEFAULT_STRENGTH
    likelihoods = np.reshape(found, (-1, layers, len(STRENGTHS))).mean(axis=0)
    layer, strength = np.unravel_index(likelihoods.argmax(), likelihoods.shape)
    return int(layer), STRENGTHS[strength]


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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

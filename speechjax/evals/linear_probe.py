"""Linear probe: how much of a label can a linear classifier read from frozen features, on speakers it never heard?

Shape alphabet: N examples, T frames, D features, S samples.

The classifier is standardisation and multinomial logistic regression with an L2 penalty. Standardisation, penalty
and weights come from the training groups alone; a group (a speaker) is tested by a classifier that saw nothing of
it. Two controls, `mfcc_statistics` and `log_mel_statistics`, need no model: features below them are not worth one.
"""

import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.audio.features import deltas, log_mel, mfcc
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
    unconverged: int


def pool(frames: np.ndarray) -> np.ndarray:
    """Mean and standard deviation over the (valid) frames: [T, D] -> float64 [2 D].

    Raises UserError if there is no frame.
    """
    if len(frames) == 0:
        raise UserError("a recording without a single frame cannot be pooled: leave it out")
    frames = np.asarray(frames, np.float64)
    return np.concatenate([frames.mean(axis=0), frames.std(axis=0)])


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

    features: [N, D]; labels, groups: [N] names. `seed` draws the `train_share` of the examples that may be trained
    on; every example of a tested group is tested. The penalty of each classifier is the one of `STRENGTHS` with the
    best log likelihood in a second leave-one-group-out among its training groups (accuracy is too coarse a criterion:
    it picks another penalty for every seed); with two groups in all it is fixed. `unconverged` counts the scored
    classifiers that reached the iteration limit.

    Raises UserError for arrays that do not match or are not finite, fewer than two groups, a group in `held_out` that
    does not exist, and a label of a tested group that the training groups lack.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    features, labels, groups = np.asarray(features, np.float32), np.asarray(labels, str), np.asarray(groups, str)
    tested = _tested_groups(features, labels, groups, held_out)
    kept = np.zeros(len(labels), bool)
    kept[np.random.default_rng(seed).permutation(len(labels))[: round(train_share * len(labels))]] = True
    for group in tested:
        inside = groups == group
        _check_labels(group, set(labels[inside].tolist()), set(labels[kept & ~inside].tolist()))

    fit = functools.partial(_fit_and_score, features, labels, groups, kept)
    names = sorted(set(groups.tolist()))
    # Leaving out a and b scores b when choosing for a, and a when choosing for b: one fit serves both.
    pairs = sorted({tuple(sorted((a, b))) for a in tested for b in names if a != b}) if len(names) > 2 else []
    # One BLAS thread a fit: the pools of numpy and scipy wait for each other in busy loops, at seven times the cost.
    with threadpool_limits(1), warnings.catch_warnings(), ThreadPoolExecutor(_cpu_count()) as workers:
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted in `unconverged`
        curves = list(workers.map(lambda pair: fit(pair, STRENGTHS, _COARSE), pairs))
        strength = {group: _best_strength(group, curves) for group in tested}
        scores = list(workers.map(lambda group: fit([group], [strength[group]], _FINE)[group][0], tested))
    accuracy = {group: score.accuracy for group, score in zip(tested, scores, strict=True)}
    return ProbeResult(
        seed=seed,
        mean=float(np.mean(list(accuracy.values()))),
        accuracy=accuracy,
        strength=strength,
        unconverged=sum(not score.converged for score in scores),
    )


def format_rows(results: Mapping[str, Sequence[ProbeResult]]) -> tuple[list[str], list[list[str]]]:
    """Table of several feature sets, each probed with one or more seeds: column names and rows of cells.

    A row is name, mean % over groups and seeds, standard deviation of that mean over seeds ("-" for a single seed),
    and the mean % of every group ("-" where it was not tested).
    """
    groups = sorted({group for seeds in results.values() for result in seeds for group in result["accuracy"]})
    rows = []
    for name, seeds in results.items():
        means = [result["mean"] for result in seeds]
        row = [name, f"{np.mean(means):.1f}", f"{np.std(means, ddof=1):.1f}" if len(means) > 1 else "-"]
        for group in groups:
            values = [result["accuracy"][group] for result in seeds if group in result["accuracy"]]
            row.append(f"{np.mean(values):.1f}" if values else "-")
        rows.append(row)
    return ["features", "mean %", "std", *groups], rows


def mfcc_statistics(audio: Sequence[np.ndarray], *, sample_rate: int = 16000) -> np.ndarray:
    """Control without a model: 65 statistics of 13 MFCC (26 mel bands, 25 ms windows, 10 ms apart), float64 [N, 65].

    Per coefficient: the means over the first, middle and last third, the standard deviation, and that of the second
    time derivative. The thirds keep the order of the sounds, which statistics of the whole recording lose.
    audio: N waveforms [S], float in [-1, 1] or int16. Raises UserError for an empty one.
    """

    def statistics(frames: np.ndarray) -> np.ndarray:
        cepstra, curvatures = np.split(frames.astype(np.float64), 2, axis=1)
        bounds = [len(cepstra) * third // 3 for third in range(4)]
        thirds = [cepstra[a : max(b, a + 1)].mean(axis=0) for a, b in itertools.pairwise(bounds)]
        return np.concatenate([*thirds, cepstra.std(axis=0), curvatures.std(axis=0)])

    return _statistics(_mfcc_and_curvature, audio, sample_rate, statistics)


def log_mel_statistics(audio: Sequence[np.ndarray], *, sample_rate: int = 16000) -> np.ndarray:
    """Control without a model: mean and standard deviation of 80 log-mel bands (25 ms, 10 ms), float64 [N, 160].

    audio: N waveforms [S], float in [-1, 1] or int16. Raises UserError for an empty one.
    """
    return _statistics(_log_mel, audio, sample_rate, pool)


def _tested_groups(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, held_out: Sequence[str] | None
) -> list[str]:
    if features.ndim != 2 or not len(features) == len(labels) == len(groups):
        raise UserError(
            "a probe needs features [N, D] with N labels and N groups, "
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


def _best_strength(group: str, curves: Sequence[Mapping[str, Sequence[_Score]]]) -> float:
    others = [curve[name] for curve in curves if group in curve for name in curve if name != group]
    if not others:
        return _DEFAULT_STRENGTH
    likelihoods = [[score.log_likelihood for score in curve] for curve in others]
    return STRENGTHS[int(np.mean(likelihoods, axis=0).argmax())]


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.partial(jax.jit, static_argnums=2)
def _mfcc_and_curvature(audio: jax.Array, lengths: jax.Array, sample_rate: int) -> tuple[jax.Array, jax.Array]:
    cepstra, n_frames = mfcc(
        audio, lengths, sample_rate=sample_rate, n_fft=sample_rate // 40, hop=sample_rate // 100, n_mels=26
    )
    return jnp.concatenate([cepstra, deltas(cepstra, n_frames, order=2)[0]], axis=-1), n_frames


@functools.partial(jax.jit, static_argnums=2)
def _log_mel(audio: jax.Array, lengths: jax.Array, sample_rate: int) -> tuple[jax.Array, jax.Array]:
    return log_mel(audio, lengths, sample_rate=sample_rate, n_fft=sample_rate // 40, hop=sample_rate // 100)


def _statistics(
    extract: Callable[..., tuple[jax.Array, jax.Array]],
    audio: Sequence[np.ndarray],
    sample_rate: int,
    summarise: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    rows: list[np.ndarray] = [np.empty(0)] * len(audio)
    for indices, batch, lengths in _padded_batches(audio, sample_rate):
        frames, n_frames = map(np.asarray, extract(batch, lengths, sample_rate))
        for row, index in enumerate(indices):
            rows[index] = summarise(frames[row, : n_frames[row]])
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

"""How well discrete units agree with phones: numbers from one table of joint counts, in numpy.

Shapes: P phones, K units.  A table counts frames, `counts[p, k]` those of phone p with unit k, so tables of parts of a
corpus add up.  The measures are those of HuBERT (Hsu et al. 2021, arXiv 2106.07447, section IV-D): they depend on the
number of units and on the set of phones, so compare only where both agree.
"""

import numpy as np


def joint_counts(phones: np.ndarray, units: np.ndarray, n_phones: int, n_units: int) -> np.ndarray:
    """int64 [P, K]: frames of every phone and unit; frames where either is negative (unknown) do not count.

    phones, units: integers of one shape, a frame each.  Raises ValueError for other shapes, and for numbers that are
    not below `n_phones` and `n_units`.
    """
    phones, units = np.asarray(phones), np.asarray(units)
    if phones.shape != units.shape:
        raise ValueError(f"phones {phones.shape} and units {units.shape} must have one shape")
    known = (phones >= 0) & (units >= 0)
    p, k = phones[known].astype(np.int64), units[known].astype(np.int64)
    if p.size and (p.max() >= n_phones or k.max() >= n_units):
        raise ValueError(f"phone {p.max()} or unit {k.max()} is beyond the table of {n_phones} x {n_units}")
    return np.bincount(p * n_units + k, minlength=n_phones * n_units).reshape(n_phones, n_units)


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` [...] are proportional to; nan without counts."""
    total = counts.sum()
    if not total:
        return float("nan")
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum())


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy: how many units, evenly used, would be as varied; nan without counts."""
    return float(np.exp(entropy(counts)))


def pnmi(counts: np.ndarray) -> float:
    """Phone-normalised mutual information MI(phone; unit) / H(phone) of a table [P, K], 0 to 1.

    The share of the uncertainty about a frame's phone that its unit takes away.  nan where there is none: no counts, or
    a single phone.
    """
    uncertainty = entropy(counts.sum(axis=1))
    if not uncertainty > 0:
        return float("nan")
    shared = uncertainty + entropy(counts.sum(axis=0)) - entropy(counts)
    return float(np.clip(shared / uncertainty, 0.0, 1.0))  # rounding may leave it just outside


def phone_purity(counts: np.ndarray) -> float:
    """Accuracy of the best map from units to phones, 0 to 1: each frame taken for the likeliest phone of its unit."""
    return _share(counts.max(axis=0, initial=0), counts)


def cluster_purity(counts: np.ndarray) -> float:
    """Share of the frames that have the likeliest unit of their phone, 0 to 1; falls as phones are split up."""
    return _share(counts.max(axis=1, initial=0), counts)


def _share(best: np.ndarray, counts: np.ndarray) -> float:
    total = counts.sum()
    return float(best.sum() / total) if total else float("nan")

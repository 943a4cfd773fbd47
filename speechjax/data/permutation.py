"""Shuffling without memory: where one index goes in a pseudorandom permutation, computed for that index alone.

Everything is integer arithmetic of 64 bits, so every machine and every numpy draws the same numbers.
"""

from collections.abc import Sequence

import numpy as np

Words = Sequence[int | np.integer | np.ndarray]

_ROUNDS = 10
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: an odd step that visits every integer
_ROUND_KEYS = _GOLDEN * np.arange(1, _ROUNDS + 1, dtype=np.uint64)


def hashed(key: Words) -> np.ndarray:
    """A hash of a tuple of integers, uint64; integer arrays among them broadcast to an array of hashes [>= 1].

    After every word the finalizer of SplitMix64, a bijection (Steele, Lea and Flood 2014, figure 16).
    """
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _mix(state ^ (np.asarray(word).astype(np.uint64) + _GOLDEN))
    return state


def uniform(below: int | np.ndarray, key: Words) -> np.ndarray:
    """Integers from 0 to `below` - 1 (at most 2**32), int64, as a function of the key alone; broadcasts like it."""
    return _scaled(hashed(key), np.asarray(below).astype(np.uint64)).astype(np.int64)


def permute(index: np.ndarray, n: int | np.ndarray, key: Words) -> np.ndarray:
    """Images (int64 [I]) of `index` under a pseudorandom bijection of 0..n-1 for each `key`; n up to 2**60.

    `n` and the key's words may be arrays that broadcast with `index` [I]: one call then serves many permutations.
    A Feistel network over pairs (left below a, right below b), repeated for the images from n to a * b - 1 (Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5).  About 0.15 us an index on one
    core of a CPU.
    """
    index, n = np.atleast_1d(np.asarray(index, np.int64)), np.atleast_1d(np.asarray(n, np.int64))
    # One more than a * b >= n asks for: halves of two values mix so slowly that pairs of five items came out uneven.
    a = np.ceil(np.sqrt(n)).astype(np.int64) + 1
    settings = [a.astype(np.uint64), (-(-n // a) + 1).astype(np.uint64), hashed(key)]
    image = _network(index.astype(np.uint64), *settings)
    limit = n.astype(np.uint64)
    while (outside := image >= limit).any():
        again = [x if x.size == 1 else np.broadcast_to(x, image.shape)[outside] for x in settings]
        image[outside] = _network(image[outside], *again)
    return image.astype(np.int64)


def _network(x: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The Feistel network on 0..a*b-1: each half in turn is shifted by a hash of the other."""
    right, left = np.divmod(x, a)
    for one, other in _ROUND_KEYS.reshape(-1, 2):
        left = _wrapped(left + _scaled(_mix(right ^ (key + one)), a), a)
        right = _wrapped(right + _scaled(_mix(left ^ (key + other)), b), b)
    return right * a + left


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _scaled(x: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The upper 32 bits of `x` scaled down to 0..below-1: no division, and a bias of below / 2**32 at most."""
    return ((x >> np.uint64(32)) * below) >> np.uint64(32)


def _wrapped(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """x mod n for x < 2 n."""
    return np.where(x >= n, x - n, x)

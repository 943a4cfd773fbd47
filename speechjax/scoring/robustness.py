"""What a score is worth in noise and in rooms: conditions to hear the test set under.

A condition turns a batch into one that is heard under it.  What is added to a recording depends on its samples and the
seed, not on the batch, the row or the host it is in, and is the same noise at every level: points of a curve differ in
the level alone.

Shapes: B batch, S samples, P voices, R samples of a room response.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.audio.augment import fit, row_keys, split_keys
from speechjax.audio.augment_filters import convolve_response, decaying_response
from speechjax.audio.augment_mixing import add_noise, colored_noise, loop
from speechjax.errors import UserError

Batch = Mapping[str, Any]

CLEAN, WHITE, BABBLE, REVERBERATION = KINDS = ("clean", "white", "babble", "reverberation")
_FULL_SCALE = 32767 / 32768


class Condition(NamedTuple):
    """`apply(batch)` is the batch under this condition; `level` is an SNR in dB or a reverberation time in s."""

    name: str
    kind: str
    level: float
    apply: Callable[[Batch], dict[str, Any]]


def conditions(
    *, white: Sequence[float] = (), babble: Sequence[float] = (), reverberation: Sequence[float] = (),
    voices: Batch | None = None, talkers: int = 6, direct_db: float = 0.0, seed: int = 0, sample_rate: int = 16000,
) -> list[Condition]:  # fmt: skip
    """ "clean" and then white noise and babble at SNRs in dB, and rooms of reverberation times in s.

    A batch is numpy: audio int16 [B, S], lengths int32 [B], perhaps mean and std float32 [B], which become those of the
    changed audio, and whatever else stays.  The SNR is of mean powers over the whole row, pauses included; where the
    sum would exceed full scale the whole row becomes quieter.  Silent and empty rows stay as they are.

    Babble is `talkers` other recordings, all equally loud, drawn from a batch `voices` (audio int16 [P, S], lengths),
    never the recording itself.  A room is Polack's statistical model, its impulse `direct_db` above all the rest in
    energy (0: at the critical distance); labels in time stay where they were.
    Raises UserError for babble without enough different voices, and for a reverberation time that is not positive.
    """
    made = [Condition(CLEAN, CLEAN, math.nan, lambda batch: dict(batch))]
    for snr in white:
        made.append(_condition(f"white {snr:g} dB", WHITE, snr, seed, lambda *row, snr=snr: _white(*row, _db(snr))))
    if babble:
        pool = _pool(voices, talkers)
        for snr in babble:
            mix = functools.partial(_babble, pool=pool, talkers=talkers, snr_db=_db(snr))
            made.append(_condition(f"babble {snr:g} dB", BABBLE, snr, seed, mix))
    for t60 in reverberation:
        if not t60 > 0:
            raise UserError(f"a reverberation time of {t60} s: give more than 0")
        room = functools.partial(_reverberant, t60=t60, direct_db=direct_db, sample_rate=sample_rate)
        made.append(_condition(f"T60 {t60:g} s", REVERBERATION, t60, seed, room))
    return made


def _db(value: float) -> jax.Array:
    return jnp.float32(value)  # an argument, not a constant: one compilation for all levels


def _condition(name: str, kind: str, level: float, seed: int, change: Callable[..., jax.Array]) -> Condition:
    def apply(batch: Batch) -> dict[str, Any]:
        if "starts" in batch:
            raise ValueError("conditions want one recording a row, not filled rows")
        audio, lengths = np.asarray(batch["audio"]), np.asarray(batch["lengths"])
        marks = _fingerprints(audio, lengths)
        keys = row_keys(seed, KINDS.index(kind), jnp.asarray(marks))
        heard = np.array(change(jnp.asarray(audio), jnp.asarray(lengths), keys, jnp.asarray(marks)), np.float64)
        loudest = np.abs(heard).max(axis=1, keepdims=True, initial=0.0)
        heard *= np.minimum(1.0, _FULL_SCALE / np.maximum(loudest, _FULL_SCALE))
        pcm = np.round(heard * 32768).astype(np.int16)
        return {**batch, "audio": pcm, **(_statistics(batch, pcm) if "mean" in batch else {})}

    return Condition(name, kind, float(level), apply)


def _fingerprints(audio: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint32 [B]: the same for the same samples, wherever they are."""
    if audio.dtype != np.int16:
        raise ValueError(f"conditions want int16 audio, not {audio.dtype}")
    return np.array([zlib.crc32(row[:n].tobytes()) for row, n in zip(audio, lengths, strict=True)], np.uint32)


def _statistics(batch: Batch, pcm: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and standard deviation of each row, which a front end normalises by; empty rows keep theirs."""
    found = {name: np.array(batch[name], np.float32) for name in ("mean", "std")}
    for r, n in enumerate(np.asarray(batch["lengths"])):
        if n:
            row = pcm[r, :n].astype(np.float64) / 32768
            found["mean"][r], found["std"][r] = row.mean(), row.std()
    return found


# ---- noise


@jax.jit
def _white(audio: jax.Array, lengths: jax.Array, keys: jax.Array, marks: jax.Array, snr_db: jax.Array) -> jax.Array:
    del marks
    return add_noise(audio, lengths, colored_noise(keys, audio.shape[1]), snr_db)[0]


class _Pool(NamedTuple):
    """Recordings to make babble of; `gains` [P] make them equally loud."""

    audio: jax.Array
    lengths: jax.Array
    gains: jax.Array
    marks: jax.Array


def _pool(voices: Batch | None, talkers: int) -> _Pool:
    if voices is None:
        raise UserError("babble is made of other recordings: give `voices`, a batch of them")
    audio, lengths = np.asarray(voices["audio"]), np.asarray(voices["lengths"])
    marks = _fingerprints(audio, lengths)
    powers = np.array([np.sum((row[:n] / 32768) ** 2) / max(n, 1) for row, n in zip(audio, lengths, strict=True)])
    audible = np.flatnonzero(powers > 0)
    rows = audible[np.unique(marks[audible], return_index=True)[1]]
    if talkers < 1 or len(rows) <= talkers:
        raise UserError(
            f"babble of {talkers} talkers needs {max(talkers, 1) + 1} different recordings that are not silent, "
            f"`voices` holds {len(rows)}: give more, or fewer talkers (1 at least)"
        )
    gains = np.asarray(powers[rows] ** -0.5, np.float32)
    return _Pool(*(jnp.asarray(array) for array in (audio[rows], lengths[rows], gains, marks[rows])))


@functools.partial(jax.jit, static_argnames="talkers")
def _babble(
    audio: jax.Array, lengths: jax.Array, keys: jax.Array, marks: jax.Array, *, pool: _Pool, talkers: int,
    snr_db: jax.Array,
) -> jax.Array:  # fmt: skip
    choice_keys, start_keys = split_keys(keys, 2)
    draw = jax.vmap(lambda key: jax.random.uniform(key, (len(pool.marks),)))(choice_keys)
    order = jnp.argsort(jnp.where(marks[:, None] == pool.marks[None], jnp.inf, draw), axis=1)

    def join(noise: jax.Array, talker: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        voice, own_keys = talker
        length = pool.lengths[voice]
        starts = jax.vmap(lambda key, end: jax.random.randint(key, (), 0, end, end.dtype))(own_keys, length)
        return noise + pool.gains[voice][:, None] * loop(pool.audio[voice], length, starts, audio.shape[1]), None

    each = order[:, :talkers].T, split_keys(start_keys, talkers)
    noise, _ = jax.lax.scan(join, jnp.zeros(audio.shape, jnp.float32), each)
    return add_noise(audio, lengths, noise, snr_db)[0]


# ---- rooms


@functools.partial(jax.jit, static_argnames=("t60", "direct_db", "sample_rate"))
def _reverberant(
    audio: jax.Array, lengths: jax.Array, keys: jax.Array, marks: jax.Array, *, t60: float, direct_db: float,
    sample_rate: int,
) -> jax.Array:  # fmt: skip
    del marks
    responses = decaying_response(keys, math.ceil(t60 * sample_rate), t60, direct_db, sample_rate=sample_rate)
    return fit(convolve_response(audio, lengths, responses)[0], audio.shape[1])

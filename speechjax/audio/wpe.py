"""Dereverberation by weighted prediction error (WPE), on the device.

Shape alphabet: B batch, D microphones, S samples, T frames, F frequency bins, P = taps * D predictors.

Late reverberation is what the past of all microphones predicts of the present, `delay` frames ahead: it is subtracted.
The prediction is a least-squares fit weighted by the inverse power of the result, hence the iterations (Nakatani et
al., 2010, "Speech dereverberation based on variance-normalized delayed linear prediction"; Yoshioka and Nakatani,
2012, for several microphones). Frequencies are independent of each other.

Precision: the textbook solves normal equations, whose condition number on speech exceeds what float32 holds: nara_wpe
itself is wrong by 1 % of the largest value in complex64, and by 20 % in the worst frequency. Here the regression's
residual is found by Gram-Schmidt, which never squares the condition number, and float32 is enough (agreement with
nara_wpe in float64 to 1e-5 of the largest value on speech).
"""

import functools

import jax
import jax.numpy as jnp

from speechjax.audio.spectrum import istft, stft

_POWER_RANGE = 1e-10  # of a frequency's frames: quieter ones weigh no more than that


def wpe(
    spectrum: jax.Array, lengths: jax.Array, *, taps: int = 10, delay: int = 3, iterations: int = 3
) -> tuple[jax.Array, jax.Array]:
    """Removes late reverberation from a spectrum; equals `nara_wpe.wpe.wpe_v8` on the valid frames.

    spectrum: complex [B, D, T, F], of every microphone what `stft` returns. lengths: [B] int32, frames.
    taps: predicting frames of each microphone. delay: frames from the latest of them to the predicted one.
    Returns complex [B, D, T, F], and the lengths. A row with at most P + delay frames, in which anything can be
    predicted, is returned as it is. Memory: (P + D) times the spectrum, and P * iterations times that for a gradient.
    Raises ValueError for taps, delay or iterations below 1.
    """
    if min(taps, delay, iterations) < 1:
        raise ValueError(f"WPE needs taps, delay and iterations of at least 1, not {taps}, {delay} and {iterations}")
    n_frames = spectrum.shape[2]
    valid = jnp.arange(n_frames, dtype=lengths.dtype)[None] < lengths[:, None]
    spectrum = jnp.where(valid[:, None, :, None], spectrum, jnp.zeros((), spectrum.dtype))
    present = spectrum.transpose(0, 3, 1, 2)
    one_bin = functools.partial(_one_bin, taps=taps, delay=delay, iterations=iterations)
    result = jax.vmap(jax.vmap(one_bin, (0, None)))(present, valid).transpose(0, 2, 3, 1)
    enough = lengths > taps * spectrum.shape[1] + delay
    return jnp.where(enough[:, None, None, None], result, spectrum), lengths


def dereverberate(
    audio: jax.Array, lengths: jax.Array, *, n_fft: int = 512, hop: int = 128,
    taps: int = 10, delay: int = 3, iterations: int = 3,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`wpe` from waveform to waveform.

    audio: [B, D, S], float in [-1, 1] or int16 PCM. lengths: [B] int32, samples.
    Returns float [B, D, S] and the lengths. Raises what `wpe` and `istft` raise.
    """
    microphones = jax.vmap(functools.partial(stft, n_fft=n_fft, hop=hop), (1, None), (1, None))
    spectrum, _ = wpe(*microphones(audio, lengths), taps=taps, delay=delay, iterations=iterations)
    back = functools.partial(istft, samples=audio.shape[2], n_fft=n_fft, hop=hop)
    return jax.vmap(back, (1, None), (1, None))(spectrum, lengths)


def _one_bin(present: jax.Array, valid: jax.Array, *, taps: int, delay: int, iterations: int) -> jax.Array:
    """present: complex [D, T], zero where not `valid` [T]. Returns its unpredictable part [D, T]."""
    microphones, n_frames = present.shape
    padded = jnp.pad(present, ((0, 0), (delay + taps - 1, 0)))
    past = jnp.concatenate([padded[:, lag : lag + n_frames] for lag in range(taps)])
    # Padding has a future: the last valid frames predict it.
    past = jnp.where(valid[None], past, jnp.zeros((), past.dtype))

    def iterate(_, estimate: jax.Array) -> jax.Array:
        power = jnp.mean(jnp.square(estimate.real) + jnp.square(estimate.imag), axis=0)
        power = jnp.maximum(power, _POWER_RANGE * jnp.max(power))
        # A frequency without any power weighs its frames alike.
        deviation = jnp.sqrt(jnp.where(power > 0, power, 1.0))[None].astype(present.dtype)
        weighted = jnp.concatenate([past, present]) / deviation
        return _residual(weighted, microphones) * deviation

    return jax.lax.fori_loop(0, iterations, iterate, present)


def _residual(rows: jax.Array, n_targets: int) -> jax.Array:
    """What of the last `n_targets` rows [P + D, T] no linear combination of the others reaches, [D, T].

    Modified Gram-Schmidt on the augmented matrix, which for least squares is as stable as Householder's QR (Björck,
    1967); the coefficients themselves are never needed.
    """
    squares = _norm(rows)
    rank_tolerance = (16.0 * float(jnp.finfo(squares.dtype).eps)) ** 2 * squares

    def project(k, rows: jax.Array) -> jax.Array:
        row = rows[k]
        square = jnp.sum(jnp.square(row.real) + jnp.square(row.imag))
        # What is left of a row that earlier rows explain is rounding noise, not a direction.
        independent = square > rank_tolerance[k]
        scale = jnp.where(independent, 1.0 / jnp.where(independent, square, 1.0), 0.0)
        coefficients = jnp.sum(rows * jnp.conj(row)[None], axis=1, keepdims=True) * scale.astype(rows.dtype)
        return rows - coefficients * row[None]

    return jax.lax.fori_loop(0, len(rows) - n_targets, project, rows)[-n_targets:]


def _norm(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(rows.real) + jnp.square(rows.imag), axis=1)

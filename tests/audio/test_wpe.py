"""Dereverberation against nara_wpe, and what it is for: a synthetic room's echo becomes weaker."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sounds import noise_and_tone, padded, reverberant, speech

from speechjax.audio.spectrum import stft
from speechjax.audio.wpe import dereverberate, wpe


def _spectra(sounds: list[np.ndarray], microphones: int, *, n_fft: int, hop: int, sample_rate: int):
    """Reverberant spectra complex128 [B, D, T, F] with noise as padding, and frames [B]."""
    rooms = [reverberant(sound, microphones, sample_rate=sample_rate) for sound in sounds]
    with jax.enable_x64(True):
        spectra = [stft(room, np.full(microphones, room.shape[1], np.int32), n_fft=n_fft, hop=hop)[0] for room in rooms]
    n_frames = np.array([s.shape[1] for s in spectra], np.int32)
    batch = 3 * np.random.default_rng(2).normal(size=(len(rooms), microphones, n_frames.max() + 5, n_fft // 2 + 1))
    batch = batch.astype(np.complex128)
    for row, found in zip(batch, spectra, strict=True):
        row[:, : found.shape[1]] = found
    return batch, n_frames


def _nara(spectrum: np.ndarray, **keywords) -> np.ndarray:
    """spectrum: [D, T, F]."""
    reference = pytest.importorskip("nara_wpe.wpe")
    return reference.wpe_v8(spectrum.transpose(2, 0, 1), **keywords).transpose(1, 2, 0)


def _check_against_nara(batch, n_frames, **keywords) -> None:
    # Relative to the largest value.  Float32: measured up to 3e-6 on speech; nara_wpe's own float32 is off by 1e-2.
    # Float64: measured up to 1e-8, which is the reference's error in normal equations of condition 1e9.
    for dtype, tolerance in ((np.complex64, 1e-5), (np.complex128, 1e-7)):
        with jax.enable_x64(dtype == np.complex128):
            ours, lengths = jax.jit(functools.partial(wpe, **keywords))(batch.astype(dtype), n_frames)
            assert ours.dtype == dtype
        np.testing.assert_array_equal(lengths, n_frames)
        for row, n in enumerate(n_frames):
            theirs = _nara(batch[row, :, :n], **keywords)
            scale = np.abs(theirs).max()
            np.testing.assert_allclose(ours[row, :, :n], theirs, rtol=0, atol=tolerance * scale)
            assert not np.any(ours[row, :, n:])
            assert np.abs(theirs - batch[row, :, :n]).max() > 0.01 * scale, "nothing to remove, or this test is deaf"


@pytest.mark.parametrize(
    ("microphones", "keywords"),
    [(1, dict(taps=10, delay=3, iterations=3)), (3, dict(taps=4, delay=2, iterations=2))],
)
def test_synthetic_sound_agrees_with_nara(microphones, keywords):
    sounds = [x for x in noise_and_tone(6001) if len(x) > 1000]
    _check_against_nara(*_spectra(sounds, microphones, n_fft=64, hop=32, sample_rate=8000), **keywords)


@pytest.mark.slow
@pytest.mark.parametrize("microphones", [1, 2])
def test_real_speech_agrees_with_nara(real_speech, microphones):
    digits, sentences = speech(real_speech, seconds=1.3)
    keywords = dict(taps=10 // microphones, delay=3, iterations=3)
    _check_against_nara(*_spectra(digits, microphones, n_fft=128, hop=32, sample_rate=8000), **keywords)
    _check_against_nara(*_spectra(sentences[1:2], microphones, n_fft=512, hop=128, sample_rate=16000), **keywords)


@pytest.mark.parametrize("wrong", [{"taps": 5}, {"delay": 2}, {"iterations": 2}])
def test_the_tolerance_notices_another_setting(wrong):
    batch, n_frames = _spectra(noise_and_tone(4001)[:1], 2, n_fft=64, hop=32, sample_rate=8000)
    right = dict(taps=6, delay=3, iterations=3)
    ours, _ = wpe(batch.astype(np.complex64), n_frames, **(right | wrong))
    n = n_frames[0]
    theirs = _nara(batch[0, :, :n], **right)
    assert np.abs(ours[0, :, :n] - theirs).max() > 1e-3 * np.abs(theirs).max()


def test_the_echo_becomes_weaker():
    # Bursts with silences between: what sounds in the silences is the room.
    rng = np.random.default_rng(11)
    time = np.arange(24000)
    dry = 0.2 * rng.standard_normal(24000) * (time % 4000 < 1500) * rng.uniform(0.3, 1, 6).repeat(4000)
    wet = reverberant(dry, 2, sample_rate=8000, seconds=0.4)
    function = jax.jit(functools.partial(dereverberate, n_fft=512, hop=128, taps=10, delay=2))
    clean, out_lengths = function(wet.astype(np.float32)[None], np.array([24000], np.int32))
    clean = np.asarray(clean)
    assert out_lengths == 24000
    assert clean.shape == (1, 2, 24000)
    late = (time % 4000 > 2000) & (time % 4000 < 3500)
    # Measured: 1.6 % of the late energy, 0.50 of the distance.
    assert np.sum(np.square(clean[0][:, late])) < 0.03 * np.sum(np.square(wet[:, late]))
    assert np.sum(np.square(clean[0, 0] - dry)) < 0.6 * np.sum(np.square(wet[0] - dry))


def test_padding_is_not_heard_and_gradients_are_finite():
    rng = np.random.default_rng(12)
    lengths = jnp.array([40, 31, 9, 0], jnp.int32)
    audio = rng.normal(size=(4, 2, 45, 3, 2)).astype(np.float32)
    audio[1, :, :, 1] = 0  # a frequency without any sound
    audio[1, 1] = audio[1, 0]  # and two microphones that hear the same

    def total(parts):
        out, _ = wpe(jax.lax.complex(parts[..., 0], parts[..., 1]), lengths, taps=4, delay=2, iterations=2)
        return jnp.sum(jnp.sin(out.real) + jnp.cos(out.imag)), out

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, out), gradient = step(audio)
    beyond = np.arange(45)[:, None, None] >= np.asarray(lengths)[:, None, None, None, None]
    assert np.isfinite(out).all()
    assert np.isfinite(gradient).all()
    assert not np.any(np.where(beyond, gradient, 0))
    assert np.any(gradient[0])
    # Ten frames do not determine 8 coefficients and 2 frames of delay: the row is as it was.
    np.testing.assert_array_equal(out[2, :, :9], audio[2, :, :9, :, 0] + 1j * audio[2, :, :9, :, 1])
    (_, again), gradient_again = step(np.where(beyond, np.float32(np.inf), audio))
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(gradient, gradient_again)
    assert not np.array_equal(wpe(audio[..., 0] + 1j * audio[..., 1], lengths + 1, taps=4, delay=2)[0], out)


def test_the_gradient_is_the_slope():
    rng = np.random.default_rng(13)
    with jax.enable_x64(True):
        parts = jnp.asarray(rng.normal(size=(2, 1, 1, 30, 2)))
        step = jnp.asarray(rng.normal(size=parts.shape))

        def total(parts):
            out, _ = wpe(jax.lax.complex(parts[0], parts[1]), jnp.array([30], jnp.int32), taps=3, delay=1)
            return jnp.sum(jnp.sin(out.real))

        slope = jnp.vdot(jax.grad(total)(parts), step)
        difference = (total(parts + 1e-5 * step) - total(parts - 1e-5 * step)) / 2e-5
    # Central differences: the third derivative times 1e-10, and 1e-16 / 1e-5 of rounding.
    np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_two_equal_microphones_count_as_one():
    batch, n_frames = _spectra(noise_and_tone(4001)[:1], 1, n_fft=64, hop=32, sample_rate=8000)
    batch = batch.astype(np.complex64)
    one, _ = wpe(batch, n_frames)
    two, _ = wpe(np.concatenate([batch, batch], axis=1), n_frames)
    # Where nara_wpe would divide by rounding errors.  As above, float32.
    np.testing.assert_allclose(two[:, 1:], one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_int16_is_read_as_fractions_of_full_scale():
    batch, lengths = padded(noise_and_tone(3001))
    pcm = np.rint(np.clip(batch, -0.9, 0.9) * 32768).astype(np.int16)[:, None]
    function = jax.jit(functools.partial(dereverberate, n_fft=64, hop=16, taps=3))
    np.testing.assert_array_equal(function(pcm, lengths)[0], function(pcm / np.float32(32768), lengths)[0])


def test_settings_below_one_are_refused():
    for wrong in ({"taps": 0}, {"delay": 0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="at least 1, not"):
            wpe(jnp.zeros((1, 1, 20, 3), jnp.complex64), jnp.array([20], jnp.int32), **wrong)

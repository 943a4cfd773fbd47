"""Each feature convention against the tool it is named after, and the same maths once more in float64 numpy."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from sounds import noise_and_tone, padded, speech

from speechjax.audio import features
from speechjax.audio.mel import HTK, KALDI, SLANEY, mel_filters

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "whisper_mel.npz"
# One signal is shorter than a window on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:n_fft=.* is too large for input signal:UserWarning")
# (sample rate, window, hop, mel bands)
SETTINGS = {16000: (16000, 400, 160, 80), 8000: (8000, 200, 80, 40)}
EPS = float(np.finfo(np.float32).eps)


def _ours(function, signals, setting, **more):
    sample_rate, n_fft, hop, n_mels = setting
    keywords = dict(sample_rate=sample_rate, n_fft=n_fft, hop=hop, n_mels=n_mels, **more)
    values, n_frames = jax.jit(lambda x, n: function(x, n, **keywords))(*padded(signals))
    for row, frames in zip(np.asarray(values), n_frames, strict=True):
        assert not np.any(row[frames:])
    return [np.asarray(row[:frames]) for row, frames in zip(values, n_frames, strict=True)]


def _kaldi(signal, setting, *, cepstra: bool = False) -> np.ndarray:
    knf = pytest.importorskip("kaldi_native_fbank")
    sample_rate, n_fft, hop, n_mels = setting
    options = knf.MfccOptions() if cepstra else knf.FbankOptions()
    options.frame_opts.samp_freq = sample_rate
    options.frame_opts.frame_length_ms, options.frame_opts.frame_shift_ms = (
        1000 * n_fft / sample_rate,
        1000 * hop / sample_rate,
    )
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = n_mels
    if cepstra:
        options.use_energy = False
    online = (knf.OnlineMfcc if cepstra else knf.OnlineFbank)(options)
    online.accept_waveform(sample_rate, (signal * 32768).tolist())
    online.input_finished()
    frames = [online.get_frame(i) for i in range(online.num_frames_ready)]
    return np.stack(frames) if frames else np.zeros((0, 13 if cepstra else n_mels), np.float32)


def _kaldi_float64(signal, setting) -> np.ndarray:
    sample_rate, n_fft, hop, n_mels = setting
    window = np.hanning(n_fft) ** 0.85
    size = 2 ** int(np.ceil(np.log2(n_fft)))
    mel = 1127 * np.log(1 + np.arange(size // 2 + 1) * sample_rate / size / 700)
    edges = np.linspace(1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + sample_rate / 2 / 700), n_mels + 2)
    filters = np.stack([np.interp(mel, edges[i : i + 3], [0, 1, 0]) for i in range(n_mels)])
    result = []
    for start in range(0, len(signal) - n_fft + 1, hop):
        frame = 32768 * signal[start : start + n_fft].astype(np.float64)
        frame -= frame.mean()
        frame = np.array([x - 0.97 * before for x, before in zip(frame, [frame[0], *frame], strict=False)])
        result.append(np.log(np.maximum(filters @ np.abs(np.fft.rfft(frame * window, size)) ** 2, EPS)))
    return np.stack(result)


def _whisper_float64(signal, n_mels: int) -> np.ndarray:
    """The extractor's steps by librosa and numpy."""
    spectrum = librosa.stft(signal.astype(np.float64), n_fft=400, hop_length=160, pad_mode="reflect")[:, :-1]
    mel = librosa.filters.mel(sr=16000, n_fft=400, n_mels=n_mels, dtype=np.float64) @ np.abs(spectrum) ** 2
    decades = np.log10(np.maximum(mel, 1e-10))
    return (np.maximum(decades, decades.max() - 8) + 4).T / 4


def _librosa_htk(signal, setting) -> np.ndarray:
    sample_rate, n_fft, hop, n_mels = setting
    mel = librosa.feature.melspectrogram(
        y=signal, sr=sample_rate, n_fft=n_fft, hop_length=hop, n_mels=n_mels, htk=True, norm=None
    )
    return librosa.power_to_db(mel).T


def _check_log_power(ours, theirs, *, per_neper: float) -> None:
    """Relative 1e-4, and where a band is far below its own frame's loudest, the rounding of the loudest.

    An FFT in float32 puts an error of about one eps of the loudest amplitude everywhere: relative to a band's own
    amplitude eps * sqrt(loudest / own power).  Measured: 0.8 eps for Kaldi's own code, 0.8 against ours; allowed 2.
    """
    assert ours.shape == theirs.shape
    below = (theirs.max(axis=1, keepdims=True) - theirs) / per_neper
    allowed = 1e-4 * np.abs(theirs) + per_neper * 2 * EPS * np.exp(below / 2)
    np.testing.assert_array_less(np.abs(ours - theirs), allowed + 1e-9)


def _check_kaldi(signals, sample_rate: int) -> None:
    setting = SETTINGS[sample_rate]
    for signal, ours in zip(signals, _ours(features.log_mel, signals, setting, convention="kaldi"), strict=True):
        theirs = _kaldi(signal, setting)
        if len(ours) or len(theirs):
            _check_log_power(ours, theirs, per_neper=1.0)


def _check_kaldi_cepstra(signals, sample_rate: int) -> None:
    setting = (*SETTINGS[sample_rate][:3], 23)
    for signal, ours in zip(signals, _ours(features.mfcc, signals, setting, convention="kaldi"), strict=True):
        theirs = _kaldi(signal, setting, cepstra=True)
        # Of the largest: one band's rounding errors reach all coefficients, multiplied by a lifter of up to 12.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(initial=0.0))


def test_kaldi_on_synthetic_sound():
    for samples, sample_rate in ((9001, 16000), (4001, 8000)):
        noise, tone, loud_and_quiet, short = noise_and_tone(samples)
        _check_kaldi([noise, tone, loud_and_quiet, short], sample_rate)
        # Most bands of a tone's spectrum are rounding errors, and so are all of its cepstra.
        _check_kaldi_cepstra([noise, loud_and_quiet, short], sample_rate)


def test_kaldi_on_real_speech(real_speech):
    digits, sentences = speech(real_speech)
    for signals, sample_rate in ((digits, 8000), (sentences, 16000)):
        _check_kaldi(signals, sample_rate)
        _check_kaldi_cepstra(signals, sample_rate)


def test_kaldi_in_double_precision_equals_the_formula():
    signal = noise_and_tone(3001)[2].astype(np.float64)
    with jax.enable_x64(True):
        function = jax.jit(functools.partial(features.log_mel, convention="kaldi"))
        ours, _ = function(jnp.asarray(signal)[None], jnp.array([len(signal)], jnp.int32))
        assert ours.dtype == jnp.float64
    # The worst band is 1e5 in amplitude below the loudest: 1e5 x 1e-16 x the FFT's growth.
    np.testing.assert_allclose(ours[0], _kaldi_float64(signal, SETTINGS[16000]), rtol=0, atol=1e-9)


def test_whisper_equals_the_published_extractor():
    golden = np.load(GOLDEN)
    audio = jnp.asarray(golden["audio"])
    silence = jnp.zeros(9600, jnp.int16)
    cases = [("mel_80", audio, 80), ("mel_128", audio, 128), ("mel_80_of_170", audio[:170], 80)]
    # The first 60 of 3000 frames do not notice where the silence ends.
    cases.append(("mel_80_of_30_s", jnp.concatenate([audio, silence]), 80))
    for name, sound, n_mels in cases:
        function = jax.jit(functools.partial(features.log_mel, convention="whisper", n_mels=n_mels))
        ours, frames = function(sound[None], jnp.array([len(sound)], jnp.int32))
        theirs = golden[name].T
        assert frames[0] == len(sound) // 160
        # Quarter decades: 1e-4 relative of a power is 1e-5 here, with 60 to 80 dB of range 2e-5 (float32 FFT).
        np.testing.assert_allclose(ours[0, : len(theirs)], theirs, rtol=1e-4, atol=2e-5)


def _check_whisper(signals) -> None:
    for n_mels in (80, 128):
        for signal, ours in zip(
            signals, _ours(features.log_mel, signals, (16000, 400, 160, n_mels), convention="whisper"), strict=True
        ):
            # Zero crossings of the logarithm have no relative error: 1e-4 of the range 2 stands in for it.
            np.testing.assert_allclose(ours, _whisper_float64(signal, n_mels), rtol=1e-4, atol=1e-4)


def test_whisper_on_synthetic_sound():
    _check_whisper(noise_and_tone())


def test_whisper_on_real_speech(real_speech):
    _check_whisper(speech(real_speech)[1])


def _check_htk(signals, sample_rate: int) -> None:
    setting = SETTINGS[sample_rate]
    mel = _ours(features.log_mel, signals, setting, convention="htk")
    cepstra = _ours(features.mfcc, signals, setting, convention="htk")
    for signal, ours, our_cepstra in zip(signals, mel, cepstra, strict=True):
        theirs = _librosa_htk(signal, setting)
        _check_log_power(ours, theirs, per_neper=10 / np.log(10))
        theirs = librosa.feature.mfcc(S=theirs.T, n_mfcc=13).T
        np.testing.assert_allclose(our_cepstra, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_htk_on_synthetic_sound():
    _check_htk(noise_and_tone(), 16000)


def test_htk_on_real_speech(real_speech):
    digits, sentences = speech(real_speech)
    _check_htk(digits, 8000)
    _check_htk(sentences, 16000)


@pytest.mark.parametrize("one", features.CONVENTIONS)
@pytest.mark.parametrize("other", features.CONVENTIONS)
def test_no_convention_passes_for_another(one, other):
    if one == other:
        return
    signal = noise_and_tone(4001)[:1]
    a, b = (_ours(features.log_mel, signal, SETTINGS[16000], convention=name)[0] for name in (one, other))
    assert a.shape != b.shape or np.abs(a - b).max() > 0.1


@pytest.mark.parametrize("changed", [{"frame_pre_emphasis": 0.95}, {"power_of_two": False}, {"window": np.hanning}])
def test_kaldis_tolerance_notices_a_detail(monkeypatch, changed):
    monkeypatch.setitem(features.CONVENTIONS, "kaldi", features.CONVENTIONS["kaldi"]._replace(**changed))
    with pytest.raises(AssertionError):
        _check_kaldi(noise_and_tone()[:1], 16000)


def test_the_banks_are_those_of_the_tools():
    with np.errstate(all="raise"):
        for bank, htk, norm in ((SLANEY, False, "slaney"), (HTK, True, None)):
            expected = librosa.filters.mel(sr=16000, n_fft=512, n_mels=40, htk=htk, norm=norm, dtype=np.float64).T
            np.testing.assert_allclose(mel_filters(16000, 512, 40, bank), expected, rtol=1e-9, atol=1e-12)
    # Kaldi's sides are straight in mel: each bin between two centres is shared without loss.
    shared = mel_filters(16000, 512, 40, KALDI).sum(axis=1)[6:240]
    np.testing.assert_allclose(shared, 1.0, rtol=1e-12)


@pytest.mark.parametrize("convention", features.CONVENTIONS)
def test_the_static_length_is_the_length_of_a_full_row(convention):
    function = functools.partial(features.log_mel, convention=convention, n_mels=20)
    framing = features.CONVENTIONS[convention].framing
    interesting = np.array([0, 1, 159, 160, 199, 399, 400, 401, 559, 560, 561, 1601], np.int32)
    _, frames = jax.jit(function)(jnp.ones((len(interesting), 1601)), interesting)
    assert frames.dtype == jnp.int32
    for samples, dynamic in zip(interesting.tolist(), frames, strict=True):
        row = jax.ShapeDtypeStruct((1, samples), jnp.float32)
        static = jax.eval_shape(function, row, jax.ShapeDtypeStruct((1,), jnp.int32))[0].shape[1]
        assert static == dynamic == features.out_len(samples, framing=framing)


@pytest.mark.parametrize("convention", features.CONVENTIONS)
def test_whatever_lies_in_the_padding_neither_value_nor_gradient_changes(convention):
    signals = [*noise_and_tone(2001), np.zeros(900, np.float32), np.zeros(0, np.float32)]
    lengths = padded(signals)[1]

    def total(audio, lengths):
        values, _ = features.log_mel(audio, lengths, convention=convention, n_mels=20)
        return jnp.sum(jnp.sin(values)), values

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, values), gradient = step(padded(signals)[0], lengths)
    assert np.isfinite(gradient).all()
    assert np.any(gradient)
    for row, n in zip(np.asarray(gradient), lengths, strict=True):
        assert not np.any(row[n:])
    for fill in (1e4, np.inf):
        (_, again), gradient_again = step(padded(signals, fill)[0], lengths)
        np.testing.assert_array_equal(values, again)
        np.testing.assert_array_equal(gradient, gradient_again)
    (_, longer), _ = step(padded(signals)[0], lengths + 160)
    assert not np.array_equal(values, longer), "a hop more of padding must be audible, or this test is deaf"


@pytest.mark.parametrize("convention", ["kaldi", "whisper"])
def test_int16_is_read_as_fractions_of_full_scale(convention):
    pcm = np.random.default_rng(3).integers(-32768, 32767, (2, 2001), np.int16)
    lengths = np.array([2001, 1321], np.int32)
    function = jax.jit(lambda x, n: features.log_mel(x, n, convention=convention)[0])
    np.testing.assert_array_equal(function(pcm, lengths), function(pcm / np.float32(32768), lengths))


def test_mistakes_are_named():
    audio, lengths = jnp.ones((1, 800)), jnp.array([800], jnp.int32)
    with pytest.raises(ValueError, match="no feature convention 'slaney': use one of librosa, htk, kaldi, whisper"):
        features.log_mel(audio, lengths, convention="slaney")
    with pytest.raises(ValueError, match="no MFCC of convention 'whisper'"):
        features.mfcc(audio, lengths, convention="whisper")
    with pytest.raises(ValueError, match="150 mel bands at 16000 Hz need a longer FFT than 512"):
        features.log_mel(audio, lengths, convention="kaldi", n_mels=150)

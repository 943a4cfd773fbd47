"""Audio files of every kind that users have, really written: what is decoded, and what is refused why."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.data.decode import BadAudio, decode, to_pcm16


def tone(rate: int = 16_000, seconds: float = 1.5, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def noise(samples: int = 48_000, seed: int = 0) -> np.ndarray:
    """int16: not to be guessed from its first half, and exact in 16 bit files."""
    return np.random.default_rng(seed).integers(-9_000, 9_000, samples).astype(np.int16)


def write(path: Path, audio: np.ndarray, rate: int = 16_000, **options) -> Path:
    soundfile.write(path, audio, rate, **options)
    return path


def frequency(pcm: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))
    return float(np.argmax(spectrum)) * 16_000 / len(pcm)


# ---- decoded


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_pitch_level_and_length(tmp_path, rate):
    audio = tone(rate, seconds=1.37)
    pcm = decode(write(tmp_path / "a.wav", audio, rate))
    assert pcm.dtype == np.int16
    assert pcm.ndim == 1
    assert abs(len(pcm) - np.ceil(len(audio) * 16_000 / rate)) <= 1
    assert abs(frequency(pcm) - 440) <= 16_000 / len(pcm)  # one bin
    middle = pcm[2_000:-2_000] / 32_768
    assert np.std(middle) == pytest.approx(0.3 / np.sqrt(2), rel=0.01)  # edges ring, and the tone is not whole periods


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff", "a.au", "a.caf", "a.w64", "wrong_extension.mp3"])
def test_16_khz_pcm_is_bit_exact(tmp_path, name):
    path = tmp_path / name
    write(path, noise(), format="WAV" if "wrong" in name else None)
    np.testing.assert_array_equal(decode(path), noise())


@pytest.mark.parametrize("subtype", ["PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wide_and_float_samples_are_scaled(tmp_path, subtype):
    """libsndfile read as int16 turns float files into zeros without a word."""
    path = write(tmp_path / "a.wav", noise() / 32_768, subtype=subtype)
    if subtype == "FLOAT":
        assert not soundfile.read(path, dtype="int16")[0].any(), "the trap is gone: this test proves nothing"
    np.testing.assert_allclose(decode(path), noise(), atol=1)  # the files' own rounding


def test_float_overshoot_clips(tmp_path):
    pcm = decode(write(tmp_path / "a.wav", 4 * tone(), subtype="FLOAT"))
    assert (pcm.max(), pcm.min()) == (32_767, -32_768)
    assert abs(frequency(pcm) - 440) < 1


def test_stereo_is_averaged(tmp_path):
    left, right = noise(seed=1).astype(np.float64), noise(seed=2).astype(np.float64)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1).astype(np.int16))
    np.testing.assert_array_equal(decode(path), np.rint((left + right) / 2))


def test_very_short_is_fine_here(tmp_path):
    assert len(decode(write(tmp_path / "a.wav", tone(seconds=0.05)))) == 800


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3_000), min_size=1, max_size=8), st.sampled_from([8_000, 16_000, 44_100]))
def test_blocks_do_not_matter(sizes, rate):
    audio = (noise(sum(sizes)) / np.float32(32_768))[:, None]
    blocks = np.split(audio, np.cumsum(sizes)[:-1])
    whole = [audio]
    if len(np.unique(audio)) > 1:
        np.testing.assert_array_equal(to_pcm16(blocks, rate), to_pcm16(whole, rate))


@pytest.mark.parametrize(("name", "size"), [("ffmpeg", 0xFFFFFFFF), ("sox", 0x7FFFF000), ("arecord", 0x80000000)])
def test_streaming_wav_headers_are_legal(tmp_path, name, size):
    data = bytearray(write(tmp_path / "a.wav", noise()).read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(data)
    np.testing.assert_array_equal(decode(tmp_path / "a.wav"), noise())


def streamed(flac: bytes) -> bytes:
    """The 36 bits of STREAMINFO that hold the number of samples set to 0, as an encoder writes to a pipe."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


def test_streamed_flac(tmp_path):
    path = write(tmp_path / "a.flac", noise())
    path.write_bytes(streamed(path.read_bytes()))
    assert soundfile.info(path).frames > 1 << 60
    np.testing.assert_array_equal(decode(path), noise())


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_part_of_a_file(tmp_path, name):
    path = write(tmp_path / name, noise())
    np.testing.assert_array_equal(decode(path, 0.5, 1.25), noise()[8_000:28_000])
    np.testing.assert_array_equal(decode(path, 2.0), noise()[32_000:])
    np.testing.assert_array_equal(decode(path, 0.0, 3.01), noise())  # a duration rounded up
    with pytest.raises(BadAudio, match="shorter than its stated duration"):
        decode(path, 2.0, 1.5)
    with pytest.raises(BadAudio, match="offset beyond the end"):
        decode(path, 4.0, 1.0)


def test_two_hours_stream(tmp_path):
    """Whole-file float arrays would take four times the result."""
    minute = noise(8_000 * 60)
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 8_000, 1, "PCM_16") as file:
        for k in range(120):
            file.write(minute if k % 2 else 0 * minute)
    program = (
        "import resource, sys; from speechjax.data.decode import decode\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); pcm = decode(sys.argv[1]); print(len(pcm), pcm.nbytes, peak() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "long.wav")]
    samples, size, grown = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert samples == 2 * 3600 * 16_000
    assert grown < size + 60e6


# ---- refused


def cut(path: Path, keep: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


FORMATS = {
    "a.wav": {},
    "float.wav": {"subtype": "FLOAT"},
    "a.rf64": {"format": "RF64"},
    "a.aiff": {},
    "a.au": {},
    "a.flac": {},
    "a.ogg": {},
    "a.opus": {"format": "OGG", "subtype": "OPUS"},
    "a.mp3": {},
}


@pytest.mark.parametrize("name", FORMATS)
def test_truncated(tmp_path, name):
    path = write(tmp_path / name, noise(5 * 16_000) / 32_768, **FORMATS[name])
    assert len(decode(path)) == 5 * 16_000  # whole, it is accepted
    cut(path)
    with pytest.raises(BadAudio, match=r"^truncated$"):
        decode(path)


def bad_flac_frame(path: Path) -> None:
    data = bytearray(write(path, noise()).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2_000] = bytes(2_000)
    path.write_bytes(data)


def truncated_streamed_flac(path: Path) -> None:
    path.write_bytes(streamed(write(path, noise()).read_bytes()))
    cut(path)


def mp3_without_length(path: Path) -> None:
    """Variable bit rate, first frame (which holds the length) gone: libsndfile would deliver less than half."""
    quiet_then_loud = np.concatenate([noise(160_000) / 1e6, noise(160_000) / 32_768])
    data = write(path, quiet_then_loud, bitrate_mode="VARIABLE", compression_level=0.5).read_bytes()
    path.write_bytes(data[data.index(data[:2], 40) :])


def with_value(value: float):
    def writer(path: Path) -> None:
        audio = tone()
        audio[1_000] = value
        write(path, audio, subtype="FLOAT")

    return writer


BAD = {
    "zero_bytes.wav": (lambda p: p.write_bytes(b""), "empty file"),
    "text.wav": (lambda p: p.write_text("not audio at all " * 99), "not audio"),
    "random.flac": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(9_999)), "not audio"),
    "header_only.wav": (lambda p: write(p, np.zeros(0)), "no samples"),
    "nan.wav": (with_value(np.nan), "NaN or infinite samples"),
    "inf.wav": (with_value(-np.inf), "NaN or infinite samples"),
    "never_scaled.wav": (lambda p: write(p, noise().astype(np.float32), subtype="FLOAT"), "far beyond full scale"),
    "silent.wav": (lambda p: write(p, np.zeros(16_000)), "silent"),
    "constant.wav": (lambda p: write(p, np.full(16_000, 0.1)), "silent"),
    "opposite_channels.wav": (lambda p: write(p, np.stack([tone(), -tone()], 1), subtype="FLOAT"), "silent"),
    "rate.wav": (lambda p: write(p, tone(), 100), "sample rate out of range"),
    "corrupt.flac": (bad_flac_frame, "truncated"),
    "streamed.flac": (truncated_streamed_flac, "truncated"),
    "no_length.mp3": (mp3_without_length, "MP3 without a length header"),
    "folder.wav": (lambda p: p.mkdir(), "not a file"),
    "pipe.wav": (os.mkfifo, "not a file"),
    "absent.wav": (lambda p: None, "no such file"),
    "dangling.wav": (lambda p: p.symlink_to("nowhere.wav"), "no such file"),
    "circle.wav": (lambda p: p.symlink_to("circle.wav"), "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    writer, reason = BAD[name]
    writer(tmp_path / name)
    with pytest.raises(BadAudio, match=reason):
        decode(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(tmp_path):
    write(tmp_path / "a.wav", tone()).chmod(0)
    with pytest.raises(BadAudio, match="no permission"):
        decode(tmp_path / "a.wav")

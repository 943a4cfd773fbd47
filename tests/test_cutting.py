"""Windows and pieces of recordings against the whole, and how files are read block by block."""

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.cutting import Level, Pieces, Windows
from speechjax.data.decode import BadAudio, decode, pcm_blocks
from tests.speaking import EXTRA, HOP, RATE, write


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 900), st.integers(1, 30), st.integers(0, 8), st.integers(1, 5), st.integers(0, 12),
    st.lists(st.integers(1, 200), min_size=1, max_size=5),
)  # fmt: skip
def test_windows_have_every_frame_once_and_the_context_they_promise(samples, step, ahead, align, more, blocks):
    hop, extra, size = 4, 3, step + ahead + align + more
    audio = np.arange(samples, dtype=np.int16)
    cutter, done, at, n = Windows(hop, extra, size=size, step=step, ahead=ahead, first=size, align=align), 0, 0, 0
    windows = []
    while at < samples:
        windows += cutter.hear(audio[at : at + blocks[n % len(blocks)]])
        at, n = at + blocks[n % len(blocks)], n + 1
        assert len(cutter._pcm) // 2 <= (size + step) * hop + extra + max(blocks), "memory"
    total = max((samples - extra) // hop, 0)
    for window in [*windows, cutter.finish()]:
        assert window.start + window.low == done
        assert window.start % align == 0
        done = window.start + window.high
        np.testing.assert_array_equal(window.audio, audio[window.start * hop :][: len(window.audio)])
        heard = max((len(window.audio) - extra) // hop, 0)
        assert heard <= size
        assert window.low >= (size - step - ahead - align + 1 if window.start else 0)
        assert heard - window.high >= (0 if window.last else ahead)
    assert done == total


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 900), st.integers(1, 60), st.integers(1, 300))
def test_pieces_are_the_whole(samples, size, block):
    hop, extra = 4, 3
    audio = np.random.default_rng(samples).integers(-999, 999, samples).astype(np.int16)
    cutter, done = Pieces(hop, extra, size=size), 0
    pieces = [piece for at in range(0, samples, block) for piece in cutter.hear(audio[at : at + block])]
    for piece in [*pieces, cutter.finish()]:
        assert (piece.start, piece.low) == (done, 0)
        assert piece.high <= size
        done += piece.high
        np.testing.assert_array_equal(piece.audio, audio[piece.start * hop :][: len(piece.audio)])
    assert done == max((samples - extra) // hop, 0)


def test_pieces_are_cut_where_it_is_quiet():
    audio = np.random.default_rng(0).normal(0, 3000, 10 * RATE).astype(np.int16)
    for second in (3.5, 7.2):  # 0.4 s of quiet around these
        audio[int((second - 0.2) * RATE) : int((second + 0.2) * RATE)] //= 50
    cutter = Pieces(HOP, EXTRA, size=450)
    pieces = [*cutter.hear(audio), cutter.finish()]
    assert [piece.start * HOP / RATE for piece in pieces] == pytest.approx([0, 3.5, 7.2], abs=0.06)


@pytest.mark.parametrize(("rate", "channels", "kind"), [(16_000, 1, "wav"), (44_100, 2, "flac"), (8_000, 1, "ogg")])
def test_blocks_are_what_decoding_at_once_gives(tmp_path, rate, channels, kind):
    audio = 0.1 * np.random.default_rng(0).normal(size=(rate * 9, channels))
    soundfile.write(tmp_path / f"a.{kind}", audio, rate)
    blocks = list(pcm_blocks(tmp_path / f"a.{kind}"))
    whole = decode(tmp_path / f"a.{kind}")
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    level = Level()
    for block in blocks:
        level.hear(block)
    exact = whole / 32768
    assert (level.mean, level.std) == pytest.approx((exact.mean(), exact.std()), rel=1e-9)


def test_samples_never_scaled_are_refused_as_in_training(tmp_path):
    audio = 3000 * np.random.default_rng(0).normal(size=RATE)
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    with pytest.raises(BadAudio, match="samples far beyond full scale"):
        list(pcm_blocks(tmp_path / "a.wav"))
    soundfile.write(tmp_path / "a.wav", audio / 3000, RATE, subtype="FLOAT")  # a little beyond is allowed
    assert sum(map(len, pcm_blocks(tmp_path / "a.wav"))) == RATE


def test_silence_can_be_transcribed_and_damage_cannot(tmp_path):
    silent = write(tmp_path / "silent.wav", np.zeros(5000, np.int16))
    assert sum(map(len, pcm_blocks(silent))) == 5000
    (tmp_path / "cut.wav").write_bytes(silent.read_bytes()[:4000])
    (tmp_path / "text.wav").write_text("this is no audio")
    (tmp_path / "empty.wav").touch()
    for name, reason in (
        ("cut", "truncated"),
        ("text", "not audio"),
        ("empty", "empty file"),
        ("gone", "no such file"),
    ):
        with pytest.raises(BadAudio, match=reason):
            list(pcm_blocks(tmp_path / f"{name}.wav"))

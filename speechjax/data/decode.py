"""Audio files to PCM: what libsndfile reads becomes int16 mono at 16 kHz, or a `BadAudio` that says why not.

libsndfile forgives what training must not: it reads half a WAV without a word, hands on NaN, and turns
float samples into zeros when asked for int16. So the container's own promise is checked first, and samples
are always read as float.
"""

import errno
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000
EXTENSIONS = frozenset(".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .snd .caf .w64 .rf64 .sph .nist".split())

_BLOCK = 1 << 18  # samples over all channels held at a time
_LOWEST_RATE, _HIGHEST_RATE = 4_000, 384_000
_LOUDEST = 16.0  # float audio may overshoot full scale a little; beyond this it was never scaled to ±1
_UNKNOWN = 0x7FFFF000  # sizes from here up are placeholders that streaming writers leave in headers
_MP3_FRAME = 1_152


class BadAudio(Exception):  # noqa: N818 - a verdict on a file, not a failure of the program
    """A recording that cannot be used; the message is a short reason, equal for equal faults."""


class _ForwardReader(soundfile.SoundFile):
    """soundfile seeks after each read of a seekable file; a FLAC of unknown length fails so at its end."""

    def seekable(self) -> bool:
        return False


def decode(path: str | os.PathLike[str], offset: float = 0.0, duration: float | None = None) -> np.ndarray:
    """A recording, or `duration` seconds of it from `offset` seconds on, as int16 [samples] mono at 16 kHz.

    Holds one block of the file and the result in memory. Raises `BadAudio` for what cannot be trained on; any
    other failure of the storage (OSError) passes through.
    """
    return _useful(pcm_blocks(path, offset, duration))


def pcm_blocks(
    path: str | os.PathLike[str], offset: float = 0.0, duration: float | None = None
) -> Iterator[np.ndarray]:
    """What `decode` gives, block by block as it is read, int16 [samples]; no samples, or only silence, are no fault.

    Raises as `decode` does, at the first block or where a later one shows what is wrong.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadAudio("not a file")
        with open(path, "rb", buffering=0) as raw:
            if os.fstat(raw.fileno()).st_size == 0:
                raise BadAudio("empty file")
            if not _is_complete(raw):
                raise BadAudio("truncated")
            raw.seek(0)
            try:
                file = _ForwardReader(raw.fileno(), closefd=False)
            except soundfile.LibsndfileError as error:
                raise BadAudio("not audio") from error
            with file:
                yield from _pcm16(_read_blocks(file, raw, offset, duration), file.samplerate)
    except PermissionError as error:
        raise BadAudio("no permission to read") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise BadAudio("no such file") from error
        raise


def for_soundfile(path: str) -> Any:
    """The name of a file as soundfile takes it: one that is not UTF-8 only as bytes, which its annotations deny."""
    return os.fsencode(path)


def raw_pcm_offset(path: str | os.PathLike[str]) -> int | None:
    """Bytes before the samples of a WAV file that holds 16 bit mono at 16 kHz; None for every other file."""
    with open(path, "rb", buffering=0) as raw:
        head = raw.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return None
        plain = False
        while len(chunk := raw.read(8)) == 8:
            name, length = struct.unpack("<4sI", chunk)
            start = raw.tell()
            if name == b"data":
                return start if plain else None
            if name == b"fmt ":
                plain = raw.read(16)[:16] == struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
            raw.seek(start + length + length % 2)
        return None


def to_pcm16(blocks: Iterable[np.ndarray], rate: int) -> np.ndarray:
    """int16 [samples] mono at 16 kHz from float32 blocks [samples, channels] at `rate` Hz with full scale ±1.

    Channels are averaged; soxr HQ resamples (aliases below -130 dB); ceil(n · 16000 / rate) samples come out.
    Raises `BadAudio` on NaN or infinity, samples far beyond full scale, no samples, and digital silence.
    """
    return _useful(_pcm16(blocks, rate))


def _useful(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Blocks of int16 as one array; `BadAudio` where there is nothing to hear."""
    pcm = bytearray()  # grows in place; a list of blocks would hold a long recording twice
    for block in blocks:
        pcm += block.data
    samples = np.frombuffer(pcm, np.int16)
    if not samples.size:
        raise BadAudio("no samples")
    if samples.min() == samples.max():
        raise BadAudio("silent")
    return samples


def _pcm16(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """The blocks of `to_pcm16`, one for each and one for what the resampler still has."""
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        raise BadAudio("sample rate out of range")
    resampler = None
    if rate != SAMPLE_RATE:
        resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        peak = max(np.max(block), -np.min(block))
        if not np.isfinite(peak):
            raise BadAudio("NaN or infinite samples")
        if peak > _LOUDEST:
            raise BadAudio("samples far beyond full scale")
        mono = block.mean(axis=1, dtype=np.float32)
        yield _quantize(mono if resampler is None else resampler.resample_chunk(mono))
    if resampler is not None:
        yield _quantize(resampler.resample_chunk(np.zeros(0, np.float32), last=True))


def _quantize(mono: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(mono * 32_768), -32_768, 32_767).astype(np.int16)


def _read_blocks(file: _ForwardReader, raw: BinaryIO, offset: float, duration: float | None) -> Iterator[np.ndarray]:
    """Float32 blocks [samples, channels] of the wanted part; `BadAudio` if there is less than promised."""
    if offset:
        try:
            file.seek(round(offset * file.samplerate))
        except soundfile.LibsndfileError as error:
            raise BadAudio("offset beyond the end") from error
    wanted = None if duration is None else round(duration * file.samplerate)
    frames = 8 * _MP3_FRAME if file.format == "MP3" else max(1, _BLOCK // file.channels)
    buffer = np.empty((frames, file.channels), np.float32)
    done = 0
    while wanted is None or done < wanted:
        room = len(buffer) if wanted is None else min(len(buffer), wanted - done)
        try:
            block = file.read(out=buffer[:room])
        except soundfile.LibsndfileError as error:
            raise BadAudio("truncated") from error
        if not len(block):
            break
        done += len(block)
        yield block
    if wanted is not None:
        if done < wanted - 0.1 * file.samplerate:  # durations in manifests are rounded
            raise BadAudio("shorter than its stated duration")
    elif not offset:
        _check_length(file, raw, done)


def _check_length(file: _ForwardReader, raw: BinaryIO, done: int) -> None:
    """Raises `BadAudio` when the `done` samples read to the end of the file cannot be all of it."""
    if file.frames >= 1 << 62:  # a streamed FLAC does not say
        return
    tolerance = 0
    if file.format == "MP3":
        # Without a length header libsndfile guesses from the first bit rate and stops there, so of a file
        # with a variable bit rate much may be left unread.
        tolerance = 8 * _MP3_FRAME + file.frames // 50
        size = os.fstat(raw.fileno()).st_size
        if size - raw.tell() > size // 8:
            raise BadAudio("MP3 without a length header")
    if done < file.frames - tolerance:
        raise BadAudio("truncated")


def _is_complete(raw: BinaryIO) -> bool:
    """Whether the file holds as much as its container announces; true where that announces nothing."""
    size = os.fstat(raw.fileno()).st_size
    head = raw.read(12)
    if head[:4] == b"OggS":
        return _ogg_is_complete(raw, size)
    if head[:4] == b".snd" and len(head) == 12:
        start, length = struct.unpack(">II", head[4:])
        return length >= _UNKNOWN or start + length <= size
    order = {b"RIFF": "<", b"RF64": "<", b"RIFX": ">", b"FORM": ">"}
    if head[:4] not in order:
        return True
    large = 0
    while len(chunk := raw.read(8)) == 8:
        name, length = struct.unpack(order[head[:4]] + "4sI", chunk)
        start = raw.tell()
        if name == b"ds64":
            large = int.from_bytes(raw.read(16)[8:], "little")
        if name in (b"data", b"SSND"):
            if length >= _UNKNOWN:
                length = large
            return start + length <= size + 44  # some writers count their header in
        raw.seek(start + length + length % 2)
    return True


def _ogg_is_complete(raw: BinaryIO, size: int) -> bool:
    """Whether the last page is whole and marked as the end of its stream (RFC 3533, section 6)."""
    raw.seek(max(0, size - (1 << 17)))  # a page has at most 65,307 bytes
    tail = raw.read(1 << 17)
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return False
    lacing = page[27 : 27 + page[26]]
    return len(page) >= 27 + page[26] + sum(lacing)

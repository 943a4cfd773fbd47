"""The process that owns eSpeak NG: one JSON request a line on stdin, one JSON header line and raw PCM on stdout.

A request {"verb": "speak" | "phonemize", "text", "name" of the voice, ...} is answered in one of the two ways.

Run as a script by `speechjax.data.espeak`. It imports the standard library only, so it starts in 20 ms and may fork.
eSpeak NG keeps state between utterances that nothing resets (the phase of its pitch flutter, the random numbers of
breath, the gain control), so each request is served by a fork of the freshly initialised process: what was said
before cannot be heard. A text that crashes the library costs that one answer.
"""

import ctypes
import json
import os
import sys

SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback, no threads
OPTIONS = 0x0001 | 0x0002 | 0x8000  # phoneme events, named in IPA; return on an error instead of exit()
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4  # espeak_PARAMETER
END_OF_LIST, PHONEME = 0, 7  # espeak_EVENT_TYPE
UTF8, BY_CHARACTER = 1, 1
IN_IPA = 2 | ord("_") << 8  # phoneme mode: IPA names, with "_" between them


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; the last field is a union whose 8 bytes hold the phoneme's name."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_ubyte * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def _initialise(library: str, data: str) -> tuple[ctypes.CDLL, int]:
    """The loaded library and its sample rate in Hz. Raises OSError where either path is no good."""
    espeak = ctypes.CDLL(library)
    espeak.espeak_SetSynthCallback.argtypes = [_CALLBACK]
    espeak.espeak_SetSynthCallback.restype = None
    espeak.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
        ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    espeak.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
    espeak.espeak_TextToPhonemes.restype = ctypes.c_char_p
    espeak.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    # The library truncates paths at 160 bytes, and a virtual environment's is easily longer: pass a relative one.
    os.chdir(os.path.dirname(data))
    sample_rate = espeak.espeak_Initialize(SYNCHRONOUS, 0, os.path.basename(data).encode(), OPTIONS)
    # Initialisation seeds its generator with the time of day.
    espeak.espeak_ng_SetRandSeed(1)
    if sample_rate <= 0:
        raise OSError(f"eSpeak NG cannot read {data}")
    return espeak, sample_rate


def _speak(espeak: ctypes.CDLL, request: dict) -> tuple[dict, bytes]:
    """The answer's header and its int16 samples."""
    pcm, phonemes = bytearray(), []

    def receive(samples, count, events) -> int:
        if count:
            pcm.extend(ctypes.string_at(samples, 2 * count))
        i = 0
        while events[i].type != END_OF_LIST:
            if events[i].type == PHONEME:
                name = bytes(events[i].name).split(b"\0")[0].decode("utf-8", "ignore")
                phonemes.append((name, events[i].sample))
            i += 1
        return 0

    # At the default volume, 100, the louder voices saturate.
    settings = {VOLUME: 60, RATE: request["rate"], PITCH: request["pitch"], RANGE: request["range"]}
    for parameter, value in settings.items():
        espeak.espeak_SetParameter(parameter, value, 0)
    callback = _CALLBACK(receive)
    espeak.espeak_SetSynthCallback(callback)
    text = request["text"].encode()
    if espeak.espeak_Synth(text, len(text) + 1, 0, BY_CHARACTER, 0, UTF8, None, None) != 0:
        return {"error": f"failed to speak {request['text']!r}"}, b""
    espeak.espeak_Synchronize()
    return {"bytes": len(pcm), "phonemes": phonemes}, bytes(pcm)


def _phonemize(espeak: ctypes.CDLL, request: dict) -> tuple[dict, bytes]:
    """The answer's header, with one string a clause: words separated by spaces, their phonemes by "_"; no samples."""
    text = ctypes.create_string_buffer(request["text"].encode())
    rest, clauses = ctypes.c_void_p(ctypes.addressof(text)), []
    while rest.value is not None:
        clauses.append(espeak.espeak_TextToPhonemes(ctypes.byref(rest), UTF8, IN_IPA).decode())
    return {"phonemes": clauses}, b""


def _serve(espeak: ctypes.CDLL, request: dict) -> tuple[dict, bytes]:
    if espeak.espeak_SetVoiceByName(request["name"].encode()) != 0:
        return {"error": f"has no voice {request['name']!r}"}, b""
    return {"speak": _speak, "phonemize": _phonemize}[request["verb"]](espeak, request)


def _answer(header: dict, pcm: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + pcm)
    sys.stdout.buffer.flush()


def main(library: str, data: str) -> None:
    """Answers requests until stdin closes; the first line says whether the library loaded, and its sample rate."""
    try:
        espeak, sample_rate = _initialise(library, data)
    except OSError as error:
        return _answer({"error": str(error)})
    _answer({"sample_rate": sample_rate})
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(*_serve(espeak, json.loads(line)))
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            _answer({"error": f"crashed on {line.strip()}"})


if __name__ == "__main__":
    main(*sys.argv[1:])

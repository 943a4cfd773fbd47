"""Makes test beds of single spoken digits: connected digits, and a keyword in clips and in a long noisy stream.

    python -m tests.real.digits connected --fsdd=FSDD --out=DIR --speakers=theo,yweweler --count=200
    python -m tests.real.digits clips --fsdd=FSDD --out=DIR --speakers=george,jackson --speech=manifest:train.jsonl
    python -m tests.real.digits stream --fsdd=FSDD --out=DIR --speakers=theo --speech=manifest:test.jsonl --minutes=30

FSDD is a folder of the Free Spoken Digit Dataset, <digit>_<speaker>_<index>.wav.  Each writes DIR/manifest.jsonl and
the audio it names, 16 kHz.

connected  strings of 3 to 7 digits of one speaker with pauses of up to 0.2 s; `text` is their words
clips      1 s each, cut anywhere so that a digit is whole: `label` is the keyword, or "other" for all other digits, for
           other speech (--speech, half of the clips) and for noise alone (a tenth)
stream     one recording: other speech, other digits and pauses in turn, keywords among them, `events` says where

Clips and stream have pink noise under them, of clips at 0 to 20 dB below the speech, of the stream at 10 dB.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile

from speechjax.data.records import open_records

RATE = 16000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEVEL = 0.05  # RMS of speech


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bed", choices=("connected", "clips", "stream"))
    add("--fsdd", required=True)
    add("--out", required=True, type=Path)
    add("--speakers", required=True, help="with commas between")
    add("--speech", default="", help="source of other speech")
    add("--speech-include", default="", metavar="REGEX", help="the recordings of it that are used")
    add("--speech-exclude", default="", metavar="REGEX")
    add("--keyword", default="seven", choices=WORDS)
    add("--count", type=int, default=1000, help="strings or clips (default: %(default)s)")
    add("--minutes", type=float, default=30.0, help="of the stream (default: %(default)s)")
    add("--events", type=int, default=60, help="keywords in the stream (default: %(default)s)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    digits = read_digits(args.fsdd, args.speakers.split(","))
    speech = read_speech(args.speech, args.speech_include, args.speech_exclude) if args.speech else []
    (args.out / "audio").mkdir(parents=True, exist_ok=True)
    made = dict(connected=connected, clips=clips, stream=stream)[args.bed](args, rng, digits, speech)
    with (args.out / "manifest.jsonl").open("w") as lines:
        for number, (audio, fields) in enumerate(made):
            name = f"audio/{args.bed}_{number:05d}.wav"
            soundfile.write(args.out / name, audio.clip(-1, 1), RATE, subtype="PCM_16")
            entry = dict(audio_filepath=name, duration=len(audio) / RATE, **fields)
            print(json.dumps(entry), file=lines)


def read_digits(folder: str, speakers: list[str]) -> dict[str, list[list[np.ndarray]]]:
    """Of every speaker and digit the recordings, float in [-1, 1), of one loudness."""
    pattern = rf"\d_({'|'.join(speakers)})_"
    records = open_records(f"folder:{folder}", min_seconds=0.1, max_bad_share=0.0, include=pattern)
    found: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in WORDS] for name in speakers}
    for i in range(len(records)):
        digit, speaker, _ = Path(records.id(i)).name.split("_")
        found[speaker][int(digit)].append(levelled(records.read(i)))
    return found


def read_speech(source: str, include: str, exclude: str) -> list[np.ndarray]:
    records = open_records(source, min_seconds=0.2, max_bad_share=0.0, include=include, exclude=exclude)
    return [levelled(records.read(i)) for i in range(len(records))]


def levelled(audio: np.ndarray) -> np.ndarray:
    audio = audio.astype(np.float64) / 2**15
    return audio * LEVEL / max(np.sqrt(np.mean(audio**2)), 1e-5)


def pink(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Noise whose power falls by 3 dB an octave, RMS 1."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    noise = np.fft.irfft(spectrum, samples)
    return noise / np.sqrt(np.mean(noise**2))


def gain(snr: float) -> float:
    return LEVEL * 10 ** (-snr / 20)


def pick(rng: np.random.Generator, own: list):
    return own[rng.integers(len(own))]


def connected(args, rng, digits, speech):
    for _ in range(args.count):
        speaker = pick(rng, sorted(digits))
        numbers = rng.integers(10, size=rng.integers(3, 8))
        pieces = [np.zeros(rng.integers(RATE // 5))]
        for n in numbers:
            pieces += [pick(rng, digits[speaker][n]), np.zeros(rng.integers(RATE // 5))]
        audio = np.concatenate(pieces)
        audio += gain(30) * pink(rng, len(audio))
        yield audio, dict(text=" ".join(WORDS[n] for n in numbers), speaker=speaker)


def clips(args, rng, digits, speech):
    keyword = WORDS.index(args.keyword)
    for _ in range(args.count):
        audio, kind = np.zeros(RATE), rng.choice(["keyword", "digit", "speech", "noise"], p=[0.2, 0.2, 0.5, 0.1])
        if kind == "speech" and speech:
            own = pick(rng, speech)
            start = rng.integers(max(len(own) - RATE, 1))
            audio[: len(own[start : start + RATE])] = own[start : start + RATE]
        elif kind in ("keyword", "digit"):
            n = keyword if kind == "keyword" else pick(rng, [d for d in range(10) if d != keyword])
            own = pick(rng, digits[pick(rng, sorted(digits))][n])[:RATE]
            start = rng.integers(RATE - len(own) + 1)
            audio[start : start + len(own)] = own
        audio += gain(rng.uniform(0, 20)) * pink(rng, RATE)
        yield audio, dict(label=args.keyword if kind == "keyword" else "other")


def stream(args, rng, digits, speech):
    keyword = WORDS.index(args.keyword)
    audio, events = gain(10) * pink(rng, round(args.minutes * 60 * RATE)), []
    slot = len(audio) // args.events  # a keyword in each, other things around it
    for k in range(args.events):
        word = pick(rng, digits[pick(rng, sorted(digits))][keyword])
        here, end = k * slot, (k + 1) * slot
        at = here + rng.integers(slot - len(word))
        audio[at : at + len(word)] += word
        events.append([args.keyword, at / RATE, (at + len(word)) / RATE])
        while here < end:
            here += rng.integers(RATE // 4, 2 * RATE)  # a pause
            n = pick(rng, [d for d in range(10) if d != keyword])
            others = speech if speech and rng.random() < 0.5 else digits[pick(rng, sorted(digits))][n]
            own = pick(rng, others)
            if here + len(own) > end:
                break
            clear = here + len(own) < at - RATE // 4 or here > at + len(word) + RATE // 4
            if clear:
                audio[here : here + len(own)] += own
            here += len(own)
    yield audio, dict(events=events)


if __name__ == "__main__":
    main()

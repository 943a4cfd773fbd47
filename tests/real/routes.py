"""A real run: one recogniser through every export, the same recordings transcribed in each stack, one table.

    python tests/real/routes.py write --workdir=runs/asr --out=DIR          # all formats that can be written here
    python tests/real/routes.py try --workdir=runs/asr --out=DIR --manifest=test.jsonl --pattern='7(\\.\\w+)?$'
    python tests/real/routes.py table --out=DIR

`try` runs those stacks that are installed where it is called, and adds to DIR/results.json; so it may be called once
with TensorFlow, ONNX Runtime and LiteRT and once more where torch and transformers are.  Error rates are against the
manifest's texts as the run's vocabulary normalises them.  Latencies are of one recording at a time, the export and the
run in turn, medians over all recordings after one of each length was heard.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile

from speechjax import export
from speechjax.adapter_files import read_vocabulary
from speechjax.decode import ctc
from speechjax.formats import trial
from speechjax.pretrained import Pretrained
from speechjax.runs import open_run
from speechjax.scoring import words

ROUTES = [
    (kind, dtype) for kind, (_, dtypes) in export.FORMATS.items() if kind != "peft" for dtype in dtypes
]  # fmt: skip


def write(args: argparse.Namespace) -> None:
    for kind, dtype in ROUTES:
        out = args.out / f"{kind}-{dtype}"
        if out.exists():
            continue
        try:
            export.run([f"--workdir={args.workdir}", f"--format={kind}", f"--dtype={dtype}", f"--out={out}",
                        "--no-check"])  # fmt: skip
        except Exception as error:
            print(f"{out.name}: {type(error).__name__}: {error}")


def recordings(args: argparse.Namespace, normalize: Any) -> dict[str, tuple[np.ndarray, str]]:
    """{name: (audio [S] at 16 kHz, normalised text)}."""
    import re

    found = {}
    for line in args.manifest.read_text("utf-8").splitlines():
        entry = json.loads(line)
        path = args.manifest.parent / entry["audio_filepath"]
        if re.search(args.pattern, path.stem):
            audio, rate = soundfile.read(path, dtype="float32")
            assert rate == 16000
            found[path.stem] = audio, normalize(entry["text"])
    return dict(list(found.items())[: args.count or None])


def try_all(args: argparse.Namespace) -> None:
    run = open_run(args.workdir, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    model = Pretrained(run.task, run.variables, read_vocabulary(run.workdir), args.workdir)
    tokenizer = model.tokenizer
    speech = recordings(args, lambda text: tokenizer.decode(tokenizer.encode(text)))
    ours = trial.answers(run)
    greedy = jax.jit(ctc.greedy)

    def heard(answer: Any, audio: np.ndarray) -> tuple[np.ndarray, str]:
        # Lengths of 2 s, 4 s and so on, so that few programs are compiled; the rest is padding.
        padded = np.pad(audio, (0, -len(audio) % 32000))
        found = answer(padded[None], np.array([len(audio)], np.int32))
        logits = np.asarray(found["logits"], np.float32)[:, : model.frames(len(audio))]
        best = greedy(logits, np.array([logits.shape[1]], np.int32))
        return logits[0], tokenizer.decode(np.asarray(best.tokens)[0, 0, : int(best.lengths[0, 0])])

    reference = {name: heard(ours, audio) for name, (audio, _) in speech.items()}
    results = json.loads(file.read_text()) if (file := args.out / "results.json").exists() else {}
    results["here"] = dict(errors=error_rates(speech, {k: v[1] for k, v in reference.items()}), files=len(speech))
    for kind, dtype in ROUTES:
        folder = args.out / f"{kind}-{dtype}"
        if not folder.exists() or (args.only and args.only not in (kind, folder.name)):
            continue
        try:
            theirs = trial.loader(kind)(folder)
        except trial.MissingLibraryError as error:
            print(f"{folder.name}: {error}")
            continue
        found = {name: heard(theirs, audio) for name, (audio, _) in speech.items()}
        times = []
        for audio, _ in list(speech.values())[:40]:
            padded, length = np.pad(audio, (0, -len(audio) % 32000))[None], np.array([len(audio)], np.int32)
            times.append((trial.timed(ours, padded, length), trial.timed(theirs, padded, length)))
        off = [float(np.abs(found[k][0] - reference[k][0]).max()) for k in speech]
        agree = [float((found[k][0].argmax(1) == reference[k][0].argmax(1)).mean()) for k in speech]
        medians = np.median(np.array(times), axis=0)
        ratios = np.percentile([b / a for a, b in times], [25, 50, 75])
        results[folder.name] = dict(
            same=sum(found[k][1] == reference[k][1] for k in speech), files=len(speech), difference=max(off),
            frames_agree=float(np.mean(agree)), errors=error_rates(speech, {k: v[1] for k, v in found.items()}),
            bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
            model_bytes=max(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
            ms=[round(1000 * float(t), 1) for t in medians], ratio=[round(float(r), 2) for r in ratios],
        )  # fmt: skip
        print(folder.name, results[folder.name], flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


def error_rates(speech: dict[str, tuple[np.ndarray, str]], said: dict[str, str]) -> dict[str, float]:
    """{"word": rate, "character": rate} over all recordings."""
    found = {}
    for name, split in (("word", words.words), ("character", words.characters)):
        aligned = words.align([split(text) for _, text in speech.values()], [split(said[k]) for k in speech])
        found[name] = float(np.sum(aligned.errors) / np.sum(aligned.lengths))
    return found


def table(args: argparse.Namespace) -> None:
    results = json.loads((args.out / "results.json").read_text())
    here = results.pop("here")
    print(f"{here['files']} recordings; character error rate here {100 * here['errors']['character']:.2f} %\n")
    print(
        "| export | same texts | largest difference | frames agree | CER % | MB | model / float32 | ms, here | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in results.items():
        whole = results.get(f"{name.split('-')[0]}-float32", row)["model_bytes"]
        low, middle, high = row["ratio"]
        cells = [
            name, f"{row['same']} of {row['files']}", f"{row['difference']:.1e}", f"{100 * row['frames_agree']:.2f} %",
            f"{100 * row['errors']['character']:.2f}", f"{row['bytes'] / 1e6:.2f}", f"{row['model_bytes'] / whole:.2f}",
            f"{row['ms'][1]:.0f}, {row['ms'][0]:.0f}", f"{middle} ({low} to {high})",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "try", "table"))
    parser.add_argument("--workdir")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--pattern", default=".")
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    {"write": write, "try": try_all, "table": table}[given.what](given)

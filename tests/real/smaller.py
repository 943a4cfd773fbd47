"""A real run: smaller models beside the one they come from; size, latency and error rates in one table.

    python tests/real/smaller.py --manifest=test.jsonl runs/asr runs/asr=int8 runs/pruned runs/distilled

The first is what the others are compared with; =int8 rounds weights, =int8d computes dense layers in int8 too,
=bfloat16 and =float16 store weights so.  Latencies are of 5 s of audio, all models in turn, 20 rounds.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from routes import error_rates, recordings

from speechjax.adapter_files import read_vocabulary
from speechjax.decode import ctc
from speechjax.formats import flat, quantize, trial
from speechjax.pretrained import Pretrained
from speechjax.runs import open_run
from speechjax.scoring import bootstrap, words

ROUNDS = 20


def open_one(spec: str) -> tuple[Pretrained, int, int]:
    """(model, bytes of its weights, parameters)."""
    workdir, _, dtype = spec.partition("=")
    run = open_run(workdir, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with tempfile.TemporaryDirectory() as folder:
        size = flat.write(run, Path(folder) / "x", dtype=(dtype or "float32").removesuffix("d")).stat().st_size
        found = flat.read(Path(folder) / "x")
    count = sum(x.size for x in jax.tree.leaves(found.params))
    variables = {"params": found.params, **found.extra}
    if dtype == "int8d":
        variables = quantize.pack(found.task, variables)
    return Pretrained(found.task, variables, read_vocabulary(run.workdir), spec), size, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--pattern", default=".")
    parser.add_argument("--count", type=int, default=0)
    args = parser.parse_args()
    models = {spec: open_one(spec) for spec in args.models}
    tokenizer = next(iter(models.values()))[0].tokenizer
    speech = recordings(args, lambda text: tokenizer.decode(tokenizer.encode(text)))
    greedy, rows, answers = jax.jit(ctc.greedy), {}, {}
    for spec, (model, size, count) in models.items():
        program = jax.jit(lambda v, b, model=model: model.task.apply(v, b, method="answer")["logits"])

        def answer(audio, lengths, program=program, model=model, spec=spec):
            batch = {"audio": audio, "lengths": lengths}
            if spec.endswith("=int8d"):
                with quantize.int8_dense():
                    return np.asarray(program(model.variables, batch))
            return np.asarray(program(model.variables, batch))

        said = {}
        for name, (audio, _) in speech.items():
            padded = np.pad(audio, (0, -len(audio) % 32000))
            logits = answer(padded[None], np.array([len(audio)], np.int32))[:, : model.frames(len(audio))]
            best = greedy(logits, np.array([logits.shape[1]], np.int32))
            said[name] = model.tokenizer.decode(np.asarray(best.tokens)[0, 0, : int(best.lengths[0, 0])])
        rates = error_rates(speech, said)
        aligned = words.align([words.characters(text) for _, text in speech.values()],
                              [words.characters(said[k]) for k in speech])  # fmt: skip
        limits = bootstrap.interval(aligned.errors, aligned.lengths)
        rows[spec] = dict(bytes=size, parameters=count, cer=rates["character"], low=limits.low, high=limits.high)
        answers[spec] = answer
    audio, lengths = trial.noise(1, 5.0)
    times = np.array([[trial.timed(answer, audio, lengths) for answer in answers.values()] for _ in range(ROUNDS)])
    ratios = times / times[:, :1]
    first = next(iter(rows.values()))
    print(
        "| model | parameters | file, of float32 | CER % (95 %) | change | ms | ratio |\n|---|---|---|---|---|---|---|"
    )
    for k, (spec, row) in enumerate(rows.items()):
        low, middle, high = np.percentile(ratios[:, k], [25, 50, 75])
        print(f"| {spec} | {row['parameters']:,} | {row['bytes'] / 1e6:.2f} MB, {row['bytes'] / first['bytes']:.3f} | "
              f"{100 * row['cer']:.2f} ({100 * row['low']:.1f} to {100 * row['high']:.1f}) | "
              f"{100 * (row['cer'] / first['cer'] - 1):+.2f} % | {1000 * np.median(times[:, k]):.1f} | "
              f"{middle:.2f} ({low:.2f} to {high:.2f}) |")  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

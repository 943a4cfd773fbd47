"""Writes kenlm_{3,4}.arpa.gz and kenlm.json: models that KenLM's `lmplz` trains, and what `kenlm` says of texts.

Needs KenLM with `lmplz` on the PATH and its Python package (`pip install kenlm==0.3.0`, whose source archive has
lmplz's sources), then `python tests/golden/make_kenlm.py`.  Of order 3 on text enough for discounts of every order; of
order 4 with `--discount_fallback` on the first texts alone.  lmplz takes the count of the very last n-gram it sorts,
which ends in the word that appeared last, for its number of contexts; that word occurs once, so both are 1.
"""

import gzip
import json
import subprocess
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
FEW = 12  # texts of the model of order 4
QUERIES = [[], ["nie", "gehört"]]  # texts of none, and of unknown words


def make_texts() -> list[list[str]]:
    """Texts of a random bigram model over words that Zipf's law holds for, and one of a word of its own."""
    rng = np.random.default_rng(3)
    size = 400
    spelled = ["".join(rng.choice(list("abdeiklmnoörstuü"), 2 + k // 40)) for k in range(size)]
    share = 1 / np.arange(1, size + 1) ** 1.2
    after = [rng.permutation(size) for _ in range(size)]
    texts = []
    for _ in range(400):
        word, text = 0, []
        for _ in range(rng.integers(1, 10)):
            word = after[word % 7][rng.choice(size, p=share / share.sum())]
            text.append(spelled[word])
        texts.append(text)
    return [*texts, ["zuletzt"]]


def main() -> None:
    import kenlm  # pyright: ignore[reportMissingImports]

    texts = make_texts()
    queries = [*texts[-20:], *(text[::-1] for text in texts[:20]), *QUERIES]
    scores = {}
    for order, own, options in ((3, texts, []), (4, texts[:FEW], ["--discount_fallback"])):
        lines = "".join(" ".join(text) + "\n" for text in own)
        arpa = subprocess.run(["lmplz", f"-o{order}", *options], input=lines.encode(), capture_output=True, check=True)
        path = FOLDER / f"kenlm_{order}.arpa.gz"
        path.write_bytes(gzip.compress(arpa.stdout, mtime=0))
        model = kenlm.Model(str(path))
        scores[order] = [[entry[0] for entry in model.full_scores(" ".join(text))] for text in queries]
        print(path.name, path.stat().st_size // 1024, "KiB")
    golden = {"texts": texts, "few": FEW, "queries": queries, "scores": scores}
    (FOLDER / "kenlm.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

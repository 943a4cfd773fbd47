"""What fairseq's checkpoints know beyond an encoder: letters of a CTC head, HuBERT's projection and codes.

Shapes: D width, P projection, V codes.
"""

import json
from typing import Any

import numpy as np

from speechjax.formats.fairseq import Checkpoint
from speechjax.formats.names import Arrays

_SPECIAL = 4  # rows before the clusters: <s>, <pad>, </s>, <unk>


def tokenizer_files(found: Checkpoint) -> dict[str, bytes]:
    """The vocabulary of a CTC model as a tokenizer of `transformers` has it; nothing where the file does not say.

    fairseq's blank is its <s>, the first output; its <pad>, the second, is never said, and becomes <s> here.
    """
    letters = found.about.get("vocabulary")
    if not letters or len(letters) < _SPECIAL:
        return {}
    config = dict(pad_token=letters[0], bos_token=letters[1], eos_token="</s>", unk_token="<unk>")
    ids = {letter: i for i, letter in enumerate(letters)}
    return {name: json.dumps(content).encode() for name, content in (("vocab.json", ids),
                                                                      ("tokenizer_config.json", config))}  # fmt: skip


def hubert_head(found: Checkpoint) -> Arrays:
    """Our leaves of HuBERT's head, {} where there is none or several: code k is cluster k.

    "project/kernel" [D, P], "project/bias" [P], "code_vectors" [V, P].
    """
    others = found.others
    wanted = ("final_proj.weight", "final_proj.bias", "label_embs_concat")
    codes = found.about.get("codes") or []
    if any(name not in others for name in wanted) or len(codes) > 1:
        return {}
    weight, bias, vectors = (others[name] for name in wanted)
    if vectors.shape[1] != len(weight):  # a projection for each of several dictionaries
        return {}
    return {
        "project/kernel": np.asarray(weight.T, order="C"), "project/bias": bias,
        "code_vectors": _by_cluster(vectors, codes[0] if codes else []),
    }  # fmt: skip


def _by_cluster(vectors: np.ndarray, symbols: list[Any]) -> np.ndarray:
    """Rows in the order of their clusters, which dictionaries have in that of their frequency."""
    clusters = [(int(s), row) for row, s in enumerate(map(str, symbols)) if row >= _SPECIAL and s.isdecimal()]
    if len(symbols) == len(vectors) and sorted(c for c, _ in clusters) == list(range(len(clusters))):
        return np.asarray(vectors[[row for _, row in sorted(clusters)]], order="C")
    return np.asarray(vectors[_SPECIAL:], order="C")

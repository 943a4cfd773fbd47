"""Stored miniatures of `transformers`: their weights and what their models answer, for machines without torch.

tests/golden/make_hf_families.py writes the file.  Of every variant it holds the encoder's weights once and each head's
beside; names are those of the encoder alone, "ForCTC/lm_head.weight" those of heads.  Weights are exact in float16.

Shapes: N numbers of all arrays of a kind, one after the other.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parents[1] / "golden" / "hf_families.npz"
# Every family, norm of the front end, place of the layers' norms and kind of positions.
COVERED = (
    "wav2vec2-group-post", "hubert-layer-pre", "wavlm-group-pre", "data2vec-audio", "conformer-relative",
    "conformer-rotary", "bert",
)  # fmt: skip
# The miniatures' eleven tokens, in our order: so that no class of a head moves.
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"abcdef")
VOCABULARY = json.dumps({word: i for i, word in enumerate(WORDS)}).encode()
PREPROCESSOR = json.dumps(dict(do_normalize=False, stride=2)).encode()


def pack(arrays: Mapping[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    """{names and shapes as JSON, numbers [N]}: files of many small arrays are mostly headers."""
    table = [[name, array.shape] for name, array in arrays.items()]
    numbers = np.concatenate([array.astype(dtype).ravel() for array in arrays.values()])
    return dict(table=np.array(json.dumps(table)), numbers=numbers)


def unpack(table: np.ndarray, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """What `pack` was given, as float32."""
    shapes = json.loads(str(table))
    ends = np.cumsum([np.prod(shape, dtype=int) for _, shape in shapes])
    parts = np.split(numbers.astype(np.float32), ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


@functools.cache
def _read(name: str, what: str) -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return unpack(file[f"{name}/{what}/table"], file[f"{name}/{what}/numbers"])


def _of(arrays: Mapping[str, np.ndarray], suffix: str) -> dict[str, np.ndarray]:
    """What belongs to the encoder, and to one class."""
    named = {name: name.split("/") for name in arrays}
    return {parts[-1]: arrays[name] for name, parts in named.items() if parts[0] in (suffix, parts[-1])}


def weights(name: str, suffix: str) -> dict[str, np.ndarray]:
    """The state of a class, an encoder's names without a prefix."""
    return _of(_read(name, "weights"), suffix)


def answers(name: str, suffix: str) -> dict[str, np.ndarray]:
    """What the class answers to `hf_models.make_inputs`, see `hf_models.their_answers`."""
    return _of(_read(name, "answers"), suffix)

"""Damaged folders of `transformers`: a value or one clear line, whatever was changed."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import as_run, write_folder

from speechjax.errors import UserError
from speechjax.formats import hf, imports

ODD = (
    None, True, False, 0, -1, 1, 3, 2**31, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x", "../x", "gelu", [],
    [None], [1, 2], ["a"], {}, {"a": 1}, {"name": "x"},
)  # fmt: skip
FILES = ("config.json", "preprocessor_config.json", "vocab.json", "tokenizer_config.json", hf.OURS)


def paths(tree: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of all values in a JSON text, branches too."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in inside for path in ((*where, key), *paths(value, (*where, key)))]


def changed_text(rng: np.random.Generator, content: bytes) -> bytes:
    """JSON with a value or two odd, gone, or those of others."""
    tree = json.loads(content)
    for _ in range(rng.integers(1, 3)):
        places = paths(tree)
        if not places:
            break
        *above, key = places[rng.integers(len(places))]
        inner = tree
        for step in above:
            inner = inner[step]
        kind = rng.integers(4)
        if kind == 0:
            del inner[key]
        elif kind == 1:
            other = tree
            for step in places[rng.integers(len(places))]:
                other = other[step]
            inner[key] = copy.deepcopy(other)
        else:
            inner[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    return json.dumps(tree).encode()


def changed_bytes(rng: np.random.Generator, content: bytes, end: int) -> bytes:
    """A few bytes before `end` others, or the file cut or repeated there."""
    if rng.integers(4) == 0:
        at = int(rng.integers(end))
        return content[:at] + (content[at // 2 :] if rng.integers(2) else b"")
    data = bytearray(content)
    for at in rng.integers(0, end, rng.integers(1, 4)):
        data[at] = rng.choice([rng.integers(256), *b'0123456789"{}[],-eFI'])
    return bytes(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """As saved by transformers, and by us with speechjax.json and a head that is beside."""
    root = tmp_path_factory.mktemp("fuzz")
    found = [
        write_folder(root / "ctc", "hubert-layer-pre", "ForCTC"),
        write_folder(root / "conformer", "conformer-relative", "ForXVector"),
    ]
    hf.write(as_run(found[0], root / "run"), root / "ours", encoder_only=True)
    return [*found, root / "ours"]


def mutations(rng: np.random.Generator, folder: Path) -> tuple[str, bytes]:
    """(name of a file, other content)."""
    there = [name for name in FILES if (folder / name).is_file()]
    name = (there + ["model.safetensors"] * 2)[rng.integers(len(there) + 2)]
    content = (folder / name).read_bytes()
    if name.endswith(".json") and rng.integers(3):
        return name, changed_text(rng, content)
    header = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else len(content)
    return name, changed_bytes(rng, content, header)


@pytest.mark.parametrize(("count", "tried"), [(75, 3), pytest.param(1500, 300, marks=pytest.mark.slow)])
def test_mutations_are_models_or_one_line(folders, tmp_path, count, tried):
    """`tried` of those that can be read are models too: tracing one takes longer than all the rest."""
    rng = np.random.default_rng(count)
    said: list[str] = []
    for i in range(count):
        folder, copied = folders[i % len(folders)], tmp_path / str(i)
        name, content = mutations(rng, folder)
        shutil.copytree(folder, copied)
        (copied / name).write_bytes(content)
        try:
            config, leaves, _ = imports.as_run(hf.read(copied))
            said.append("")
            if said.count("") <= tried:
                imports.variables(config, leaves)
        except UserError as error:
            said.append(str(error))
        shutil.rmtree(copied)
    assert not [text for text in said if "\n" in text]
    assert 3 < said.count("") < 0.8 * count

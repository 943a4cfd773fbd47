"""Results on disk, found again by what they were computed from."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.logs import replace_file


def folder(cache_dir: str) -> Path:
    """Where results lie: in `cache_dir`, by default $SPEECHJAX_CACHE, else ~/.cache/speechjax."""
    return Path(cache_dir or os.environ.get("SPEECHJAX_CACHE") or "~/.cache/speechjax").expanduser() / "evals"


def digest(arrays: Sequence[np.ndarray], options: Any, sources: Sequence[str]) -> str:
    """Name of what is computed from `arrays` with `options` (JSON) by the code in the files `sources`."""
    found = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    for source in sources:
        found.update(Path(source).read_bytes())
    return found.hexdigest()


def cached(where: Path, name: str, compute: Callable[[], Any]) -> Any:
    """What lies in `where` under `name`, else `compute()`, kept for the next time: anything that JSON holds.

    A cache that cannot be read or written costs time, never the result.
    """
    path = where / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass
    found = compute()
    try:
        where.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(found).encode())
    except OSError:
        pass
    return found

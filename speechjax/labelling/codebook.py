"""A codebook in a folder: codebook.npz (plain arrays) and codebook.json (what the numbers mean), known by a digest.

Shapes: K codes, D dimensions.
"""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speechjax.data.shard_writer import write_json
from speechjax.errors import UserError
from speechjax.logs import replace_file
from speechjax.models import kmeans

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Codebook:
    """`centroids` float32 [K, D] of the `features` that a definition (JSON) describes.

    `counts` [K]: the points each was fitted to.  `fit` (JSON): how it was made, and of what.
    """

    centroids: np.ndarray
    counts: np.ndarray
    features: dict[str, Any]
    fit: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the units of a recording: the centroids and the definition of the features."""
        sha = hashlib.sha256(json.dumps(self.features, sort_keys=True).encode())
        sha.update(json.dumps([list(self.centroids.shape)]).encode())
        sha.update(np.ascontiguousarray(self.centroids, "<f4").tobytes())
        return sha.hexdigest()

    def assign(self, features: jax.Array) -> jax.Array:
        """The unit of every frame: [..., D] -> int32 [...].  Raises ValueError for features of another width."""
        if features.shape[-1] != self.centroids.shape[1]:
            raise ValueError(f"features of {features.shape[-1]} dimensions, a codebook of {self.centroids.shape[1]}")
        return kmeans.assign(features, jax.numpy.asarray(self.centroids))

    def save(self, folder: Path) -> None:
        """Writes both files; the JSON last, so that a codebook that is there is whole."""
        replace_file(folder / "codebook.npz", arrays_to_bytes(centroids=self.centroids, counts=self.counts))
        content = {"format": FORMAT, "digest": self.digest, "features": self.features, "fit": self.fit}
        write_json(folder / "codebook.json", content)


def load_codebook(folder: Path) -> Codebook | None:
    """The codebook in a folder, None where there is none; UserError where it is damaged."""
    path = folder / "codebook.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["format"] != FORMAT:
            raise UserError(f"{path} has format {info['format']}, this version reads {FORMAT}: fit it again")
        arrays = arrays_from_bytes((folder / "codebook.npz").read_bytes())
        found = Codebook(arrays["centroids"], arrays["counts"], info["features"], info["fit"])
        whole = found.digest == info["digest"]
    except FileNotFoundError as error:
        if not path.exists():
            return None
        raise UserError(f"{error.filename} is missing; fit the codebook again in another folder") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); fit the codebook again in another folder") from error
    if not whole:
        raise UserError(f"{folder}: codebook.npz is not the one that codebook.json describes; fit it again elsewhere")
    return found


def arrays_to_bytes(**arrays: np.ndarray) -> bytes:
    """What np.load(..., allow_pickle=False) reads; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def arrays_from_bytes(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)

"""Folders of `transformers`, run by transformers itself: what `speechjax.export` tries its exports with.

Shapes: B batch, S samples.  Needs torch and transformers, imported when first needed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.errors import UserError
from speechjax.formats.serving import SAMPLE_RATE, Loaded


def load(folder: Path) -> Loaded:
    """The class that the folder names, from raw audio; one row at a time, since its group norm leaks between rows.

    Raises UserError where transformers finds weights that are missing, or that it has no place for: it would draw the
    first at random and forget the others, and not stop.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    if wrong := {kind: sorted(found)[:3] for kind, found in info.items() if found}:
        raise UserError(f"{folder}: transformers does not load it whole: {wrong}")
    if name.endswith("ForPreTraining"):  # whose head needs masks
        model, name = model.base_model, "Model"
    model = model.eval().float()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)

    def answer(audio: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        rows = []
        for row, n in zip(audio, lengths, strict=True):
            inputs = extractor(row[:n], sampling_rate=SAMPLE_RATE, return_tensors="pt", return_attention_mask=True)
            with torch.no_grad():
                rows.append(_named(name, model(**inputs)))
        return {key: _stacked([row[key] for row in rows]) for key in rows[0]}

    return answer


def _named(name: str, out: Any) -> dict[str, np.ndarray]:
    """What our tasks call their outputs."""
    if name.endswith("ForXVector"):
        vector = out.embeddings.numpy()
        return {"embedding": vector / np.linalg.norm(vector, axis=1, keepdims=True)}
    if name.endswith("ForCTC"):
        return {"logits": out.logits.numpy()}
    if name.endswith("Classification"):
        return {"scores": out.logits.numpy()}
    return {"frames": out.last_hidden_state.numpy()}


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of different lengths, padded with zeros."""
    if rows[0].ndim < 3:
        return np.concatenate(rows)
    longest = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, 0), (0, longest - row.shape[1]), (0, 0))) for row in rows])

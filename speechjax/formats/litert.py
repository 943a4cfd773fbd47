"""LiteRT (TensorFlow Lite): one file for phones and other small machines.

Shapes: B batch, S samples, T frames.

Its shapes are fixed: the file has a signature for each of a few lengths of audio, "samples_S", of one row, with
`audio` float32 [1, S] and `lengths` int32 [1].  Whoever calls it pads with zeros to the next of them; `lengths` hides
them, so the answer is that of the audio alone.  The signatures share their weights.  With dimensions left open the
largest models took six times as long.  TensorFlow converts; to run it only LiteRT is needed.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechjax.errors import UserError
from speechjax.formats import saved_model
from speechjax.formats.jaxprs import dft
from speechjax.formats.serving import SAMPLE_RATE, Loaded, checked, open_served, read_about, write_about

KIND = "litert"
DTYPES = {"float32": 4, "float16": 2, "int8": 1}  # bytes of a weight
_LARGEST = 2_000_000_000  # bytes of one file; flatbuffers end at 2 GiB
_MODEL = "model.tflite"


def write(run: Any, folder: Path, *, dtype: str = "float32", seconds: Sequence[float] = (4.0, 16.0)) -> Path:
    """Writes what `run` answers to audio of up to `seconds` into `folder`, which is made; the path of the file.

    `dtype` is that of the weights; with "int8" large products are computed in int8 too, their inputs quantized as they
    come.  Raises UserError for other types, lengths of no frame, more weights than a file can hold, and where
    TensorFlow is missing.
    """
    tf = saved_model.tensorflow()
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
    served = open_served(run, unroll=True)
    hop, extra = served.about["hop"], served.about["extra"]
    lengths = sorted({round(s * SAMPLE_RATE) for s in seconds})
    if not lengths or lengths[0] < hop + extra:
        raise UserError(f"seconds {tuple(seconds)}: a frame takes {(hop + extra) / SAMPLE_RATE:g} s")
    size = DTYPES[dtype] * sum(leaf.size for leaf in served.weights.values())
    if size > _LARGEST:
        raise UserError(
            f"LiteRT's files end at 2 GB, and these weights are {size / 1e9:.1f} GB of {dtype}: export them in "
            "a smaller type, or to another format"
        )
    shapes = {f"samples_{S}": (1, S) for S in lengths}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        saved_model.save(served, Path(partial), shapes, fft=dft)
        converter = tf.lite.TFLiteConverter.from_saved_model(partial, signature_keys=list(shapes))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if dtype != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16] if dtype == "float16" else []
        content = converter.convert()
    (folder / _MODEL).write_bytes(content)
    write_about(folder, KIND, served, dtype=dtype, samples=lengths)
    return folder / _MODEL


def load(folder: Path) -> Loaded:
    """The function that `write` left in `folder`, row by row; UserError where it cannot be read.

    The function raises UserError for audio that is longer than the longest signature.
    """
    library = _library()
    about = read_about(folder, KIND)
    try:
        interpreter = library.Interpreter(model_content=(folder / _MODEL).read_bytes())
        runners = {S: interpreter.get_signature_runner(f"samples_{S}") for S in about["samples"]}
        hop, extra = int(about["hop"]), int(about["extra"])
        framed = {name: shape.index("T") for name, (_, shape) in about["outputs"].items() if "T" in shape}
    except Exception as error:  # whatever a reader of foreign bytes raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{folder} cannot be read ({reason}); export the run anew") from error

    def call(audio: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        audio, lengths = checked(audio, lengths)
        S = audio.shape[1]
        long_enough = [samples for samples in runners if samples >= S]
        if not long_enough:
            raise UserError(
                f"audio of {S / SAMPLE_RATE:g} s, and {folder} is for {max(runners) / SAMPLE_RATE:g} s at most: cut "
                "it, or export the run for longer audio"
            )
        run, samples = runners[min(long_enough)], min(long_enough)
        padded = np.pad(audio, ((0, 0), (0, samples - S)))
        rows = [run(audio=row[None], lengths=length[None]) for row, length in zip(padded, lengths, strict=True)]
        found = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        frames = lambda x: x.shape[1] * (max(S - extra, 0) // hop) // ((samples - extra) // hop)  # noqa: E731
        return {name: x[:, : frames(x)] if name in framed else x for name, x in found.items()}

    return call


def _library() -> Any:
    try:
        from ai_edge_litert import interpreter  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("LiteRT is not installed: run `pip install ai-edge-litert`") from None
    return interpreter

"""ONNX: one file for onnxruntime and all that reads its format, and for sherpa-onnx where a run has learnt CTC.

Shapes: B batch, S samples, T frames, V vocabulary.

`model.onnx` takes `audio` float32 [B, S] and `audio_lengths` int32 [B], any B and S, and gives the answers by name.
Without `audio_lengths` every row is as long as it can be.  The graph is made from the program that JAX traces, equation
by equation (see onnx_rules.py): it computes what the model's own code does, whatever the model.

sherpa-onnx reads `model.onnx` with `tokens.txt` beside it as a model of the kind "omnilingual ASR" (tried with 2.0.1):
raw audio in, logits of CTC out, one recording at a time.  It gives every recording mean 0 and variance 1 first; front
ends with `normalize`, and those that normalise what they make of it, do not mind, others may.  Times that it tells are
those of frames of 20 ms.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speechjax.errors import UserError
from speechjax.formats import onnx_rules  # noqa: F401 - registers them
from speechjax.formats.onnx_graph import IR, OPSET, Graph, Wire, element, library, proto
from speechjax.formats.onnx_translator import Known, Translator
from speechjax.formats.serving import Loaded, Served, checked, open_served, read_about, shapes_of, symbols, write_about

KIND = "onnx"
DTYPES = ("float32", "float16", "int8")
_SPACE = "\u2581"
_LARGEST = 1_900_000_000  # bytes of one file; messages of protocol buffers end at 2 GB
_MODEL, _TOKENS = "model.onnx", "tokens.txt"
_AUDIO, _LENGTHS = "audio", "audio_lengths"  # inputs; an output may be called lengths too, which ONNX forbids


def write(run: Any, folder: Path, *, dtype: str = "float32") -> Path:
    """Writes what `run` answers into `folder`, which is made; the path of the file.

    `dtype` is that of the weights.  With "int8" products with weights are computed in int8 too, their other factors
    quantized as they come; with "float16" all is computed in float32.  Raises UserError for other types, for what ONNX
    cannot express, and where a library is missing.
    """
    onnx = library()
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
    served = open_served(run, unroll=True)
    model = _model(served, dtype)
    spelling = _sherpa_tokens(served)
    about = {key: served.about[key] for key in ("task", "step", "digest", "sample_rate", "hop", "extra")}
    if spelling:
        about |= {"model_type": "omnilingual-asr", "vocab_size": len(spelling), "version": 1}
    onnx.helper.set_model_props(model, {key: str(value) for key, value in about.items()})
    folder.mkdir(parents=True, exist_ok=True)
    # Not the message's own ByteSize, which makes it, and cannot make one that is too large.
    item = lambda kind: onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize  # noqa: E731
    apart = sum(item(x.data_type) * math.prod(x.dims) for x in model.graph.initializer) > _LARGEST
    onnx.save_model(model, str(folder / _MODEL), save_as_external_data=apart, location=f"{_MODEL}.data")
    if spelling:
        lines = [f"{symbol} {i}\n" for i, symbol in enumerate(spelling)]
        (folder / _TOKENS).write_text("".join(lines), encoding="utf-8")
    write_about(folder, KIND, served, dtype=dtype)
    return folder / _MODEL


def load(folder: Path) -> Loaded:
    """The function that `write` left in `folder`, on the CPU; UserError where it cannot be read."""
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("onnxruntime is not installed: run `pip install 'speechjax[onnx]'`") from None
    read_about(folder, KIND)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # not that `audio_lengths` has a value where it is not given
    try:
        session: Any = onnxruntime.InferenceSession(str(folder / _MODEL), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{folder / _MODEL} cannot be read ({reason}); export the run anew") from error
    names = [output.name for output in session.get_outputs()]

    def call(audio: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        audio, lengths = checked(audio, lengths)
        return dict(zip(names, session.run(names, {_AUDIO: audio, _LENGTHS: lengths}), strict=True))

    return call


def _model(served: Served, dtype: str) -> Any:
    """The message of the model; what has frames comes first among its outputs, as sherpa-onnx expects logits."""
    audio, lengths = symbols()
    program, shapes = jax.make_jaxpr(served.answer, return_shape=True)(shapes_of(served.weights), audio, lengths)
    graph = Graph(dtype)
    for axis, symbol in enumerate(audio.shape):
        graph.define_size(str(symbol), _AUDIO, axis)
    translator = Translator(graph)
    weights = [Known(served.weights[name], weight=True) for name in sorted(served.weights)]
    given = [Wire(_AUDIO, audio.shape, np.dtype(np.float32)), _valid(translator, *audio.shape)]
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # others multiply less exactly
        found = translator.run(program, [*weights, *given])
    said = served.about["outputs"]
    for name, x in zip(sorted(shapes), found, strict=True):
        graph.give(translator.full(x, shapes[name].shape).name, name)
    helper = library().helper
    info = lambda name, kind, shape: helper.make_tensor_value_info(name, element(kind), shape)  # noqa: E731
    inputs = [info(_AUDIO, np.float32, ["B", "S"]), info(_LENGTHS, np.int32, ["B"])]
    outputs = [info(name, *said[name]) for name in sorted(said, key=lambda name: "T" not in said[name][1])]
    return helper.make_model(
        proto(graph, inputs, outputs), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR,
        producer_name="speechjax",
    )  # fmt: skip


def _valid(t: Translator, B: Any, S: Any) -> Wire:
    """Valid samples of each row, int32 [B]: all, where nobody says."""
    t.graph.constants[_LENGTHS] = np.asarray([-1], np.int32)  # an input with a value need not be given
    given, kind = Wire(_LENGTHS, (B,), np.dtype(np.int32)), np.dtype(np.int32)
    whole = t.emit("Cast", [t.graph.size(S)], (1,), kind, to=element(kind))
    unsaid = t.emit("Less", [given, Known(np.zeros((), np.int32))], (B,), bool)
    # [1] where nobody says, which JAX knows nothing of.
    return t.emit("Expand", [t.emit("Where", [unsaid, whole, given], (B,), kind), t.graph.sizes([B])], (B,), kind)


def _sherpa_tokens(served: Served) -> list[str]:
    """Symbols as sherpa-onnx wants them, the blank first; none where it could not spell what the run says.

    It puts them side by side and has spaces as U+2581.  Bytes it knows only at other ids than ours.
    """
    words = served.vocabulary.get("vocab.json")
    kind = json.loads(words)["kind"] if words and "logits" in served.about["outputs"] else ""
    tokens = served.about["tokens"][1:]
    if kind == "characters":
        tokens = [token.replace(" ", _SPACE) for token in tokens]
    elif kind == "phonemes":
        tokens = [*tokens[:3], *(_SPACE + token for token in tokens[3:])]
    elif kind != "sentencepiece":
        return []
    return [] if any(len(token.split()) != 1 for token in tokens) else ["<blk>", *tokens]

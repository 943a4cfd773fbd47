"""TensorFlow SavedModel: for TensorFlow Serving, and on the way to LiteRT.

Shapes: B batch, S samples.

The signature `serving_default` takes `audio` float32 [B, S] and `lengths` int32 [B], any B and S, and gives the answers
by name.  The program inside is XLA's (jax2tf's native serialisation), so TensorFlow runs it without JAX on the
platforms it was lowered for; the weights are variables, because a graph may not be larger than 2 GB.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from speechjax.errors import UserError
from speechjax.formats.jaxprs import without
from speechjax.formats.serving import Loaded, Served, checked, open_served, read_about, write_about

KIND = "saved_model"
PLATFORMS = ("cpu", "cuda", "tpu")
_SIGNATURE = "serving_default"
# TensorFlow 2.21 cannot read what JAX 0.10 makes of erf, an operation its StableHLO does not have yet.
_NEWER = {"erf": lambda x, **_: (1 - lax.erfc(x.astype(jnp.float32))).astype(x.dtype)}


def write(run: Any, folder: Path, *, dtype: str = "float32") -> Path:
    """Writes what `run` answers into `folder`, which is made; the path of the program.

    `dtype`: see `open_served`.  Raises UserError as that does, and where TensorFlow is missing.
    """
    tensorflow()
    served = open_served(run, dtype=dtype)
    save(served, folder)
    write_about(folder, KIND, served, platforms=PLATFORMS)
    return folder / "saved_model.pb"


def load(folder: Path) -> Loaded:
    """The function that `write` left in `folder`; UserError where it cannot be read."""
    tf = tensorflow()
    read_about(folder, KIND)
    try:
        model = tf.saved_model.load(str(folder))
        answer = model.signatures[_SIGNATURE]
    except Exception as error:  # whatever a reader of foreign bytes raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{folder} cannot be read ({reason}); export the run anew") from error

    def call(audio: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        audio, lengths = checked(audio, lengths)
        found = answer(audio=tf.constant(audio), lengths=tf.constant(lengths))
        return {name: x.numpy() for name, x in found.items()}

    call.model = model  # type: ignore[attr-defined] - the variables of a signature live only as long as this
    return call


def save(served: Served, folder: Path, shapes: Mapping[str, tuple[int, int]] | None = None, **rules: Callable) -> None:
    """Writes a SavedModel with one signature for any B and S, or with those of `shapes`, {name: (B, S)}.

    `rules` are those of `without`, for what runs it.
    """
    tf = tensorflow()
    from jax.experimental import jax2tf

    answer = without(served.answer, _NEWER | rules)
    names = sorted(served.weights)
    module = tf.Module()
    module.weights = [tf.Variable(served.weights[name], trainable=False) for name in names]

    def signature(B: int | None, S: int | None) -> Any:
        convert: dict[str, Any] = dict(with_gradient=False)
        if B is None:
            convert |= dict(
                polymorphic_shapes=[None, "B, S", "B"], polymorphic_constraints=("B >= 1", "S >= 1"),
                native_serialization_platforms=PLATFORMS,
            )  # fmt: skip
        run = jax2tf.convert(answer, **convert)
        specs = [tf.TensorSpec([B, S], tf.float32, "audio"), tf.TensorSpec([B], tf.int32, "lengths")]
        call = lambda audio, lengths: run(dict(zip(names, module.weights, strict=True)), audio, lengths)  # noqa: E731
        return tf.function(call, autograph=False, input_signature=specs)

    wanted = shapes or {_SIGNATURE: (None, None)}
    found = {name: signature(*shape) for name, shape in wanted.items()}
    module.functions = list(found.values())
    tf.saved_model.save(module, str(folder), signatures=found)


def tensorflow() -> Any:
    """The library; UserError where it is not installed."""
    try:
        import tensorflow
    except ImportError:
        raise UserError("TensorFlow is not installed: run `pip install tensorflow-cpu`") from None
    return tensorflow

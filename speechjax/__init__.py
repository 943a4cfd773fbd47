"""speechjax: self-supervised pretraining of speech encoders in JAX and Flax.

`speechjax.load(FOLDER)` opens a trained model in a program; see speechjax/pretrained.py.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechjax.pretrained import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load`, imported when first asked for: verbs that need no JAX start without it."""
    if name == "load":
        from speechjax.pretrained import load

        return load
    raise AttributeError(f"module 'speechjax' has no attribute {name!r}")

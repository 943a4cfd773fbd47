"""Programs as JAX traces them: equations without calls inside calls, and primitives that give way to others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from speechjax.errors import UserError

# Where the program of a call stands among its parameters; for a pass forward they all mean: do this.
_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
}


def called(equation: Any) -> Any:
    """The program that a call runs, as a closed jaxpr; None for an equation that is no call."""
    inside = equation.params.get(_CALLS.get(equation.primitive.name, ""))
    return core.ClosedJaxpr(inside, ()) if isinstance(inside, core.Jaxpr) else inside


def without(function: Callable, rules: Mapping[str, Callable]) -> Callable:
    """`function`, with primitives replaced wherever they are: {name: of the equation's inputs and parameters}."""

    def call(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), _run(program, jax.tree.leaves(args), rules))

    return call


def _run(program: Any, args: Sequence[Any], rules: Mapping[str, Callable]) -> list[Any]:
    known: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    known.update(zip(program.jaxpr.invars, args, strict=True))
    value = lambda atom: atom.val if isinstance(atom, core.Literal) else known[atom]  # noqa: E731
    for equation in program.jaxpr.eqns:
        inputs = [value(atom) for atom in equation.invars]
        if (inside := called(equation)) is not None:
            outputs = _run(inside, inputs, rules)
        elif rule := rules.get(equation.primitive.name):
            outputs = [rule(*inputs, **equation.params)]
        else:
            params = {k: _rewritten(v, rules) for k, v in equation.params.items()}
            outputs = equation.primitive.bind(*inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        known.update(zip(equation.outvars, outputs, strict=True))
    return [value(atom) for atom in program.jaxpr.outvars]


def _rewritten(value: Any, rules: Mapping[str, Callable]) -> Any:
    """Bodies of loops and branches, rewritten too; anything else as it is."""
    if isinstance(value, core.ClosedJaxpr):
        return jax.make_jaxpr(lambda *args: _run(value, args, rules))(*value.in_avals)
    if isinstance(value, tuple) and any(isinstance(item, core.ClosedJaxpr) for item in value):
        return tuple(_rewritten(item, rules) for item in value)
    return value


def dft_matrices(N: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part of the Fourier transform of N real numbers, float64 [N, N // 2 + 1] each."""
    turns = np.outer(np.arange(N), np.arange(N // 2 + 1)) % N * (2 * np.pi / N)
    return np.cos(turns), -np.sin(turns)


def dft(x: jax.Array, *, fft_type: Any, fft_lengths: Sequence[int], **_: Any) -> jax.Array:
    """What takes the place of "fft" where runtimes have none, or not of all lengths: a product, [..., N] -> [..., F].

    Of spectra of real frames, the only ones in front ends.  N is a few hundred: a small part of all work.
    """
    if fft_type != jax.lax.FftType.RFFT:
        raise UserError(f"this model has a Fourier transform, {fft_type}, that this format does not know")
    exact = jax.lax.Precision.HIGHEST
    return jax.lax.complex(
        *(jnp.dot(x, jnp.asarray(part, x.dtype), precision=exact) for part in dft_matrices(*fft_lengths))
    )

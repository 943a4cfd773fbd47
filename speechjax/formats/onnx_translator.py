"""From JAX's equations to ONNX's nodes; the rules, one a primitive, are in onnx_rules.py.

What depends on nothing but weights is computed here and now, and becomes a constant, unless it would be larger than
what it is made of.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend import core

from speechjax.errors import UserError
from speechjax.formats.jaxprs import called
from speechjax.formats.onnx_graph import Graph, Wire

_PARTS = ("slice", "pad", "concatenate", "stack", "split", "gather")  # together their results may be much larger
_GROWTH, _TINY = 1.25, 1 << 14  # a constant may be so much larger than what it is made of, or have so many bytes


@dataclass(frozen=True, eq=False)
class Known:
    """A constant; `weight`: made of weights, not of tables."""

    value: np.ndarray
    weight: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype


@dataclass(frozen=True)
class Spectrum:
    """A complex value."""

    real: Any
    imag: Any


# Of primitives: (translator, equation, inputs) -> output, or outputs; of functions by name: (translator, inputs).
RULES: dict[str, Callable] = {}
CALLS: dict[str, Callable] = {}


def rule(*names: str) -> Callable:
    """Registers the rule of primitives."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Translator:
    """Writes programs into a graph."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def run(self, program: Any, inputs: Sequence[Any]) -> list[Any]:
        """Outputs of a closed jaxpr; UserError for a primitive without a rule."""
        constants = (Known(np.asarray(value)) for value in program.consts)
        known: dict[Any, Any] = dict(zip(program.jaxpr.constvars, constants, strict=True))
        known.update(zip(program.jaxpr.invars, inputs, strict=True))

        def value(atom: Any) -> Any:
            if not isinstance(atom, core.Literal):
                return known[atom]
            aval: Any = atom.aval
            return Known(np.asarray(atom.val, aval.dtype))

        for equation in program.jaxpr.eqns:
            given = [value(atom) for atom in equation.invars]
            known.update(zip(equation.outvars, self._outputs(equation, given), strict=True))
        return [value(atom) for atom in program.jaxpr.outvars]

    def _outputs(self, equation: Any, given: list[Any]) -> list[Any]:
        name = equation.primitive.name
        if (inside := called(equation)) is not None:
            by_name = CALLS.get(equation.params.get("name", ""))
            return [by_name(self, *given)] if by_name else self.run(inside, given)
        if all(isinstance(x, Known) for x in given) and (found := _folded(equation, given)) is not None:
            return found
        if name not in RULES:
            raise UserError(f"this model has {name!r}, which the ONNX export does not know; other formats do")
        found = RULES[name](self, equation, *given)
        return found if isinstance(found, list) else [found]

    def wire(self, x: Any, *, channels: int = -1) -> Wire:
        """`x` in the graph."""
        if isinstance(x, Wire):
            return x
        return Wire(self.graph.constant(x.value, weight=x.weight, channels=channels), x.shape, x.dtype)

    def emit(self, op: str, inputs: Sequence[Any], shape: Sequence[Any], dtype: Any, **attributes: Any) -> Wire:
        """A node of one output; inputs are values, or names."""
        names = [x if isinstance(x, str) else self.wire(x).name for x in inputs]
        return Wire(self.graph.add(op, *names, **attributes), tuple(shape), np.dtype(dtype))

    def full(self, x: Any, shape: Sequence[Any]) -> Wire:
        """`x` with every axis as wide as it is in JAX."""
        x = self.wire(x)
        return x if same(x.shape, shape) else self.emit("Expand", [x, self.graph.sizes(shape)], shape, x.dtype)

    def reshape(self, x: Any, shape: Sequence[Any]) -> Wire:
        """`x`, which is full, in another shape.  Sizes are constants where they can be: 0 keeps one, -1 is the rest."""
        x = self.wire(x)
        if same(x.shape, shape):
            return x
        kept = [i < len(x.shape) and not is_int(dim) and same([x.shape[i]], [dim]) for i, dim in enumerate(shape)]
        target = [0 if keep else dim for keep, dim in zip(kept, shape, strict=True)]
        if len(unknown := [i for i, dim in enumerate(target) if not is_int(dim)]) == 1:
            target[unknown[0]] = -1
        return self.emit("Reshape", [x, self.graph.sizes(target)], shape, x.dtype)

    def transpose(self, x: Any, order: Sequence[int]) -> Wire | Known:
        """Axes of `x` in another order."""
        if list(order) == sorted(order):
            return x
        if isinstance(x, Known):
            return Known(np.transpose(x.value, order), x.weight)
        return self.emit("Transpose", [x], [x.shape[i] for i in order], x.dtype, perm=list(map(int, order)))

    def cut(
        self, x: Any, axes: Sequence[int], starts: Any, ends: Any, shape: Sequence[Any], steps: Sequence[int] = ()
    ) -> Wire:
        """A slice of `x`; starts and ends are sizes, or the name of what holds them."""
        names = [self.wire(x).name] + [s if isinstance(s, str) else self.graph.sizes(s) for s in (starts, ends)]
        names += [self.graph.integers(axes), self.graph.integers(steps or [1] * len(axes))]
        return self.emit("Slice", names, shape, x.dtype)


def is_int(dim: Any) -> bool:
    return isinstance(dim, int | np.integer)


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are the same for all values of their symbols."""
    return len(a) == len(b) and all(x is y or str(x) == str(y) for x, y in zip(a, b, strict=True))


def _folded(equation: Any, given: list[Known]) -> list[Known] | None:
    """Outputs of an equation of constants, or None where the graph has to compute them."""
    shapes = [var.aval.shape for var in equation.outvars]
    if equation.primitive.name in _PARTS and any(x.value.nbytes > _TINY for x in given):
        return None
    if not all(is_int(dim) for shape in shapes for dim in shape) or equation.primitive.name in ("dim_as_value", "fft"):
        return None
    size = sum(math.prod(shape) * var.aval.dtype.itemsize for shape, var in zip(shapes, equation.outvars, strict=True))
    if size > max(_GROWTH * sum(x.value.nbytes for x in given), _TINY):
        return None
    found = equation.primitive.bind(*(x.value for x in given), **equation.params)
    found = found if equation.primitive.multiple_results else [found]
    weight = any(x.weight for x in given)
    return [Known(np.asarray(x), weight) for x in found]

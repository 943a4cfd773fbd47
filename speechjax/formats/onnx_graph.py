"""ONNX graphs as they are built: nodes, constants, and sizes that are known only when the graph runs.

A size is an int, or a symbolic dimension of JAX (jax.export), of which the graph computes the value from the shape of
its input.  Equal nodes are one, and what no output needs is left out.
"""

import ast
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speechjax.errors import UserError

OPSET, IR = 18, 8  # the oldest in which all of what is used has its present form: runtimes on phones lag behind
_SMALL = 1024  # elements: constants below are stored as they are, whatever the type of the rest


@dataclass(frozen=True)
class Wire:
    """A value that the graph computes; axes along which it does not vary may be 1 wide, whatever they are in JAX."""

    name: str
    shape: tuple[Any, ...]
    dtype: np.dtype


@dataclass
class Node:
    """`needs` are names that graphs inside the node, in `attributes`, take from around it."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    needs: tuple[str, ...] = ()


@dataclass
class Graph:
    """`weights` is how large weights are stored: "float32", "float16" or "int8"; computed is in float32 anyway.

    With "int8" products with weights are computed in int8, their other factor quantized when the graph runs.
    `outer` is the graph around that of a loop: constants and sizes are there.
    """

    weights: str = "float32"
    outer: "Graph | None" = None
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    _known: dict[Any, Any] = field(default_factory=dict)
    _names: Any = field(default_factory=itertools.count)
    _sizes: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> "Graph":
        return self.outer.root if self.outer else self

    def inner(self) -> "Graph":
        """A graph inside this one."""
        return Graph(self.weights, self)

    def name(self, hint: str) -> str:
        """A new one."""
        return f"{hint}_{next(self.root._names)}"

    def add(self, op: str, *inputs: str, outputs: int = 1, needs: Iterable[str] = (), **attributes: Any) -> Any:
        """Names of the outputs of a node, or the name where there is one; an equal node is not added again."""
        key = (op, inputs, outputs, repr(sorted(attributes.items())))
        if key not in self._known:
            names = tuple(self.name(op) for _ in range(outputs))
            self.nodes.append(Node(op, inputs, names, attributes, tuple(needs)))
            self._known[key] = names
        return self._known[key] if outputs > 1 else self._known[key][0]

    def give(self, name: str, output: str) -> str:
        """`name` leaves the graph as `output`."""
        self.nodes.append(Node("Identity", (name,), (output,), {}))
        return output

    def constant(self, value: Any, *, weight: bool = False, channels: int = -1, hint: str = "constant") -> str:
        """The name of an array; large ones that are a `weight` are stored as `weights` says.

        In int8 every entry of the axis `channels` has its own scale.
        """
        root, value = self.root, np.asarray(value)
        content = hashlib.sha256(np.ascontiguousarray(value).data).digest()
        key = (value.shape, str(value.dtype), content, weight and root.weights != "float32", channels)
        if key not in root._known:
            root._known[key] = root._store(value, weight, channels, hint)
        return root._known[key]

    def integers(self, values: Sequence[Any]) -> str:
        """The name of int64 [n]."""
        return self.constant(np.asarray(values, np.int64), hint="integers")

    def _store(self, value: np.ndarray, weight: bool, channels: int, hint: str) -> str:
        name = self.name(hint)
        if not weight or value.size < _SMALL or value.dtype != np.float32 or self.weights == "float32":
            self.constants[name] = value
            return name
        if self.weights == "float16":
            self.constants[name] = value.astype(np.float16)
            return self.add("Cast", name, to=1)
        channels %= value.ndim
        axes = tuple(axis for axis in range(value.ndim) if axis != channels)
        scale = np.maximum(np.abs(value).max(axis=axes), 1e-12) / 127
        wide = scale.reshape([-1 if axis == channels else 1 for axis in range(value.ndim)])
        self.constants[name] = np.rint(value / wide).astype(np.int8)
        self.constants[name + "_scale"] = scale.astype(np.float32)
        self.constants[name + "_zero"] = np.zeros(scale.shape, np.int8)
        return self.add("DequantizeLinear", name, name + "_scale", name + "_zero", axis=channels)

    def product(self, x: str, matrix: np.ndarray) -> str:
        """[..., K] times a weight [K, N]."""
        if self.weights != "int8" or matrix.size < _SMALL:
            return self.add("MatMul", x, self.constant(matrix, weight=True, hint="weight"))
        # Unsigned on both sides: some processors lose the upper bits of unsigned times signed.
        scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12) / 127
        stored = self.constant((np.rint(matrix / scale) + 128).astype(np.uint8), hint="weight")
        # A scale for each row: with one for all of them (DynamicQuantizeLinear) quiet frames lose what they say.
        one = lambda value: self.constant(np.float32(value))  # noqa: E731
        largest = self.add("ReduceMax", self.add("Abs", x), self.integers([-1]), keepdims=1)
        unit = self.add("Div", self.add("Max", largest, one(np.finfo(np.float32).tiny * 127)), one(127))
        rounded = self.add("Add", self.add("Round", self.add("Div", x, unit)), one(128))
        zero = self.constant(np.uint8(128))
        whole = self.add("Cast", self.add("MatMulInteger", self.add("Cast", rounded, to=2), stored, zero, zero), to=1)
        return self.add("Mul", self.add("Mul", whole, unit), self.constant(scale.astype(np.float32), hint="scale"))

    def define_size(self, symbol: str, source: str, axis: int) -> None:
        """A symbolic dimension is the size of an axis of an input."""
        shape = self.add("Shape", source)
        self._sizes[symbol] = self.add("Gather", shape, self.integers([axis]), axis=0)

    def size(self, dim: Any) -> str:
        """The name of a size, int64 [1]."""
        if isinstance(dim, int | np.integer):
            return self.integers([dim])
        root = self.root
        if (text := str(dim)) not in root._sizes:
            root._sizes[text] = root._compute(ast.parse(text.replace("^", "**"), mode="eval").body)
        return root._sizes[text]

    def _compute(self, tree: ast.expr) -> str:
        """What a symbolic dimension says, as JAX prints it; all of its parts are at least 0 where they are divided."""
        match tree:
            case ast.Constant(value=int() as value):
                return self.size(value)
            case ast.Name(id=name) if name in self._sizes:
                return self._sizes[name]
            case ast.UnaryOp(op=ast.USub(), operand=inside):
                return self.add("Neg", self._compute(inside))
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if power > 1:
                return self._compute(ast.BinOp(left, ast.Mult(), ast.BinOp(left, ast.Pow(), ast.Constant(power - 1))))
            case ast.BinOp(left=left, op=ast.Pow()):
                return self._compute(left)
            case ast.BinOp(left=left, op=op, right=right):
                return self.add(_OPERATORS[type(op)], self._compute(left), self._compute(right))
            case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
                return self.add(_FUNCTIONS[name], *map(self._compute, args))
        raise UserError(
            f"this model has a size {ast.unparse(tree)}, which the ONNX export does not know; other formats do"
        )

    def sizes(self, dims: Sequence[Any]) -> str:
        """The name of sizes side by side, int64 [n]."""
        if all(isinstance(dim, int | np.integer) for dim in dims):
            return self.integers(dims)
        return self.root.add("Concat", *map(self.size, dims), axis=0)

    def needed(self, outputs: Iterable[str]) -> tuple[list[Node], set[str]]:
        """(nodes that `outputs` need, in order; all names that they take)."""
        wanted, kept = set(outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs):
                kept.append(node)
                wanted.update(node.inputs, node.needs)
        return kept[::-1], wanted


_OPERATORS = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
_FUNCTIONS = {"floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min"}


def element(dtype: Any) -> int:
    """ONNX's number of a type."""
    return library().helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def proto(graph: Graph, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """The message of a graph from those of its inputs and outputs, with the constants that it needs."""
    onnx = library()
    nodes, wanted = graph.needed(value.name for value in outputs)
    messages = [onnx.helper.make_node(n.op, n.inputs, n.outputs, n.outputs[0], **n.attributes) for n in nodes]
    constants = [onnx.numpy_helper.from_array(v, name) for name, v in graph.constants.items() if name in wanted]
    return onnx.helper.make_graph(messages, "speechjax", list(inputs), list(outputs), constants)


def library() -> Any:
    """onnx; UserError where it is not installed."""
    try:
        import onnx
    except ImportError:
        raise UserError("onnx is not installed: run `pip install 'speechjax[onnx]'`") from None
    return onnx

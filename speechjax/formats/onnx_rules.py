"""One rule for each of JAX's primitives that a pass forward of a model here has: see onnx_translator.py."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from speechjax.errors import UserError
from speechjax.formats.jaxprs import dft_matrices
from speechjax.formats.onnx_graph import Node, Wire, element, library, proto
from speechjax.formats.onnx_translator import CALLS, RULES, Known, Spectrum, Translator, rule, same


def _together(*shapes: Sequence[Any]) -> tuple[Any, ...]:
    """The shape of an elementwise operation."""
    rank = max(map(len, shapes))
    columns = zip(*([1] * (rank - len(shape)) + list(shape) for shape in shapes), strict=True)
    return tuple(next((dim for dim in column if not same([dim], [1])), 1) for column in columns)


def _elementwise(op: str, **attributes: Any) -> Callable:
    def emit(t: Translator, equation: Any, *xs: Any) -> Wire:
        return t.emit(op, xs, _together(*(x.shape for x in xs)), equation.outvars[0].aval.dtype, **attributes)

    return emit


for _name, _op in {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow", "neg": "Neg",
    "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tanh": "Tanh", "erf": "Erf",
    "logistic": "Sigmoid", "floor": "Floor", "ceil": "Ceil", "sign": "Sign", "not": "Not", "and": "And", "or": "Or",
    "xor": "Xor", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
}.items():  # fmt: skip
    RULES[_name] = _elementwise(_op)
RULES["rem"] = _elementwise("Mod", fmod=1)


@rule("stop_gradient", "copy")
def _identity(t: Translator, equation: Any, *xs: Any) -> list[Any]:
    return list(xs)


@rule("ne")
def _not_equal(t: Translator, equation: Any, a: Any, b: Any) -> Wire:
    equal = t.emit("Equal", [a, b], _together(a.shape, b.shape), bool)
    return t.emit("Not", [equal], equal.shape, bool)


@rule("square", "integer_pow")
def _power(t: Translator, equation: Any, x: Any) -> Wire:
    power = equation.params.get("y", 2)
    found = x = t.wire(x)
    for _ in range(abs(power) - 1):
        found = t.emit("Mul", [found, x], x.shape, x.dtype)
    return found if power > 0 else t.emit("Reciprocal", [found], x.shape, x.dtype)


@rule("rsqrt")
def _rsqrt(t: Translator, equation: Any, x: Any) -> Wire:
    return t.emit("Reciprocal", [t.emit("Sqrt", [x], x.shape, x.dtype)], x.shape, x.dtype)


@rule("clamp")
def _clamp(t: Translator, equation: Any, low: Any, x: Any, high: Any) -> Wire:
    above = t.emit("Max", [x, low], _together(x.shape, low.shape), x.dtype)
    return t.emit("Min", [above, high], _together(above.shape, high.shape), x.dtype)


@rule("select_n")
def _select(t: Translator, equation: Any, which: Any, *cases: Any) -> Wire:
    if which.dtype != bool or len(cases) != 2:
        raise UserError("this model selects among more than two cases, which the ONNX export does not know")
    shape = _together(which.shape, *(x.shape for x in cases))
    if cases[0].dtype == bool:  # runtimes have Where for numbers only
        this = t.emit("And", [which, cases[1]], _together(which.shape, cases[1].shape), bool)
        other = t.emit("And", [t.emit("Not", [which], which.shape, bool), cases[0]], shape, bool)
        return t.emit("Or", [this, other], shape, bool)
    return t.emit("Where", [which, cases[1], cases[0]], shape, cases[0].dtype)


@rule("convert_element_type")
def _convert(t: Translator, equation: Any, x: Any) -> Any:
    dtype = equation.outvars[0].aval.dtype
    return x if x.dtype == dtype else t.emit("Cast", [x], x.shape, dtype, to=element(dtype))


@rule("dim_as_value")
def _size(t: Translator, equation: Any) -> Wire:
    dtype = equation.outvars[0].aval.dtype
    scalar = t.emit("Reshape", [t.graph.size(equation.params["dim"]), t.graph.integers([])], (), np.int64)
    return t.emit("Cast", [scalar], (), dtype, to=element(dtype))


@rule("iota")
def _iota(t: Translator, equation: Any) -> Wire:
    shape, axis, dtype = (equation.params[key] for key in ("shape", "dimension", "dtype"))
    end = t.emit("Reshape", [t.graph.size(shape[axis]), t.graph.integers([])], (), np.int64)
    row = t.emit("Range", [t.graph.constant(np.int64(0)), end, t.graph.constant(np.int64(1))], (shape[axis],), np.int64)
    row = t.emit("Cast", [row], row.shape, dtype, to=element(dtype))
    return t.reshape(row, [dim if i == axis else 1 for i, dim in enumerate(shape)])


@rule("broadcast_in_dim")
def _broadcast(t: Translator, equation: Any, x: Any) -> Wire:
    """Only axes of width 1 are added: what takes the result either does not mind, or widens them (`full`)."""
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    kept = dict(zip(places, x.shape, strict=True))
    return t.reshape(x, [kept.get(i, 1) for i in range(len(shape))])


@rule("reshape")
def _reshape(t: Translator, equation: Any, x: Any) -> Wire:
    return t.reshape(t.full(x, equation.invars[0].aval.shape), equation.outvars[0].aval.shape)


@rule("squeeze", "expand_dims")
def _squeeze(t: Translator, equation: Any, x: Any) -> Wire:
    gone = equation.params["dimensions"]
    return t.reshape(x, [dim for i, dim in enumerate(x.shape) if i not in gone])


@rule("transpose")
def _transpose(t: Translator, equation: Any, x: Any) -> Any:
    return t.transpose(t.wire(x), equation.params["permutation"])


@rule("concatenate")
def _concatenate(t: Translator, equation: Any, *xs: Any) -> Wire:
    wide = [t.full(x, var.aval.shape) for x, var in zip(xs, equation.invars, strict=True)]
    aval = equation.outvars[0].aval
    return t.emit("Concat", wide, aval.shape, aval.dtype, axis=equation.params["dimension"])


@rule("stack")
def _stack(t: Translator, equation: Any, *xs: Any) -> Wire:
    aval, axis = equation.outvars[0].aval, equation.params["axis"]
    one = [*aval.shape[:axis], 1, *aval.shape[axis + 1 :]]
    rows = [t.reshape(t.full(x, v.aval.shape), one) for x, v in zip(xs, equation.invars, strict=True)]
    return t.emit("Concat", rows, aval.shape, aval.dtype, axis=axis)


@rule("split")
def _split(t: Translator, equation: Any, x: Any) -> list[Wire]:
    axis, x, start, found = equation.params["axis"], t.full(x, equation.invars[0].aval.shape), 0, []
    for size, var in zip(equation.params["sizes"], equation.outvars, strict=True):
        found.append(t.cut(x, [axis], [start], [start + size], var.aval.shape))
        start += size
    return found


@rule("slice")
def _slice(t: Translator, equation: Any, x: Any) -> Wire:
    shape, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    starts, ends = equation.params["start_indices"], equation.params["limit_indices"]
    steps = equation.params["strides"] or (1,) * len(shape)
    axes = [i for i in range(len(shape)) if not (same([starts[i], ends[i]], [0, shape[i]]) and steps[i] == 1)]
    pick = lambda values: [values[i] for i in axes]  # noqa: E731
    return t.cut(t.full(x, shape), axes, pick(starts), pick(ends), out, pick(steps)) if axes else x


@rule("rev")
def _reverse(t: Translator, equation: Any, x: Any) -> Wire:
    axes, shape = equation.params["dimensions"], equation.invars[0].aval.shape
    ends = np.iinfo(np.int64).min
    return t.cut(t.full(x, shape), axes, [-1] * len(axes), [ends] * len(axes), shape, [-1] * len(axes))


@rule("pad")
def _pad(t: Translator, equation: Any, x: Any, filler: Any) -> Any:
    aval, config = equation.invars[0].aval, equation.params["padding_config"]
    if any(inside for _, _, inside in config):
        raise UserError("this model pads between elements, which the ONNX export does not know")
    ends = [low for low, _, _ in config] + [high for _, high, _ in config]
    if same(ends, [0] * len(ends)):
        return x
    names = [t.full(x, aval.shape), t.graph.sizes(ends), filler]
    return t.emit("Pad", names, equation.outvars[0].aval.shape, aval.dtype)


def _reduction(op: str) -> Callable:
    def emit(t: Translator, equation: Any, x: Any) -> Wire:
        aval, axes = equation.outvars[0].aval, t.graph.integers(equation.params["axes"])
        return t.emit(op, [t.full(x, equation.invars[0].aval.shape), axes], aval.shape, aval.dtype, keepdims=0)

    return emit


for _name, _op in {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}.items():
    RULES[_name] = _reduction(_op)


@rule("argmax")
def _argmax(t: Translator, equation: Any, x: Any) -> Wire:
    aval, (axis,) = equation.outvars[0].aval, equation.params["axes"]
    found = t.emit("ArgMax", [t.full(x, equation.invars[0].aval.shape)], aval.shape, np.int64, axis=axis, keepdims=0)
    return t.emit("Cast", [found], aval.shape, aval.dtype, to=element(aval.dtype))


@rule("cumsum")
def _cumsum(t: Translator, equation: Any, x: Any) -> Wire:
    aval, axis = equation.outvars[0].aval, t.graph.constant(np.int64(equation.params["axis"]))
    return t.emit(
        "CumSum", [t.full(x, aval.shape), axis], aval.shape, aval.dtype, reverse=int(equation.params["reverse"])
    )


@rule("fft")
def _fft(t: Translator, equation: Any, x: Any) -> Spectrum:
    if equation.params["fft_type"] != jax.lax.FftType.RFFT:
        raise UserError("this model has a Fourier transform that the ONNX export does not know")
    x, shape = t.full(x, equation.invars[0].aval.shape), equation.outvars[0].aval.shape
    parts = dft_matrices(*equation.params["fft_lengths"])
    return Spectrum(*(t.emit("MatMul", [x, Known(part.astype(np.float32))], shape, np.float32) for part in parts))


@rule("real")
def _real(t: Translator, equation: Any, x: Spectrum) -> Any:
    return x.real


@rule("imag")
def _imag(t: Translator, equation: Any, x: Spectrum) -> Any:
    return x.imag


@rule("conv_general_dilated")
def _conv(t: Translator, equation: Any, x: Any, kernel: Any) -> Wire:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    if any(d != 1 for d in params["lhs_dilation"]) or params["batch_group_count"] != 1:
        raise UserError("this model has a transposed convolution, which the ONNX export does not know")
    x = t.transpose(t.full(x, equation.invars[0].aval.shape), numbers.lhs_spec)
    kernel = t.wire(t.transpose(kernel, numbers.rhs_spec), channels=0)
    out, shape = numbers.out_spec, equation.outvars[0].aval.shape
    low, high = zip(*params["padding"], strict=True)
    y = t.emit(
        "Conv", [x, kernel], [shape[i] for i in out], x.dtype, strides=list(params["window_strides"]),
        pads=[*map(int, low), *map(int, high)], dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )  # fmt: skip
    return t.transpose(y, np.argsort(out))  # type: ignore[return-value]


@rule("dot_general")
def _dot(t: Translator, equation: Any, a: Any, b: Any) -> Any:
    """A product of stacks of matrices: the axes of each factor come as shared, own and summed over."""
    (sum_a, sum_b), (both_a, both_b) = equation.params["dimension_numbers"]
    shape_a, shape_b = (var.aval.shape for var in equation.invars)
    aval = equation.outvars[0].aval
    own_a = [i for i in range(len(shape_a)) if i not in (*sum_a, *both_a)]
    own_b = [i for i in range(len(shape_b)) if i not in (*sum_b, *both_b)]
    exact = equation.params["precision"] is not None and jax.lax.Precision.HIGHEST in equation.params["precision"]
    if isinstance(b, Known) and not both_b and tuple(sum_a) == (len(shape_a) - 1,) and len(own_b) == 1:
        matrix = np.transpose(b.value, (*sum_b, *own_b))
        if b.weight and not exact:
            return Wire(t.graph.product(t.full(a, shape_a).name, matrix), aval.shape, aval.dtype)
        return t.emit("MatMul", [t.full(a, shape_a), Known(matrix, b.weight)], aval.shape, aval.dtype)
    pick = lambda shape, axes: [shape[i] for i in axes]  # noqa: E731
    left = t.transpose(_wide(t, a, shape_a), [*both_a, *own_a, *sum_a])
    right = t.transpose(_wide(t, b, shape_b), [*both_b, *sum_b, *own_b])
    shared, inner = pick(shape_a, both_a), _times(pick(shape_a, sum_a))
    rows, columns = _times(pick(shape_a, own_a)), _times(pick(shape_b, own_b))
    left, right = t.reshape(left, [*shared, rows, inner]), t.reshape(right, [*shared, inner, columns])
    y = t.emit("MatMul", [left, right], [*shared, rows, columns], aval.dtype)
    return t.reshape(y, aval.shape)


def _wide(t: Translator, x: Any, shape: Sequence[Any]) -> Any:
    return x if isinstance(x, Known) else t.full(x, shape)


def _times(dims: Sequence[Any]) -> Any:
    return math.prod(dims) if dims else 1


@rule("gather")
def _gather(t: Translator, equation: Any, x: Any, indices: Any) -> Any:
    """Three kinds: a slice, entries of one axis, and entries of one axis row by row."""
    params, numbers = equation.params, equation.params["dimension_numbers"]
    x_shape, out = equation.invars[0].aval.shape, equation.outvars[0].aval
    sizes, places = params["slice_sizes"], numbers.start_index_map
    i_shape = equation.invars[1].aval.shape
    x = t.full(x, x_shape)
    indices = t.full(indices, i_shape)
    indices = t.emit("Cast", [indices], indices.shape, np.int64, to=element(np.int64))
    whole = [i for i in range(len(x_shape)) if not same([sizes[i]], [x_shape[i]])]
    if len(i_shape) == 1 and not numbers.collapsed_slice_dims and set(whole) <= set(places):
        ends = t.graph.add("Add", indices.name, t.graph.sizes([sizes[i] for i in places]))
        return t.cut(x, places, indices.name, ends, out.shape)
    if len(places) == 1 and numbers.collapsed_slice_dims == places:
        (axis,), batch = places, numbers.operand_batching_dims
        if params["mode"] != jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS:
            last = t.graph.add("Sub", t.graph.size(x_shape[axis]), t.graph.integers([1]))
            above = t.graph.add("Max", indices.name, t.graph.integers([0]))
            indices = Wire(t.graph.add("Min", above, last), i_shape, np.dtype(np.int64))
        rest, trailing = [i for i in range(len(x_shape)) if i != axis], len(i_shape) - 1
        if not batch and same([x_shape[i] for i in rest], [sizes[i] for i in rest]):
            if numbers.offset_dims == (*range(axis), *range(axis + trailing, len(out.shape))):
                return t.emit("Gather", [x, t.reshape(indices, i_shape[:-1])], out.shape, out.dtype, axis=axis)
        by_row = batch == (0,) == numbers.start_indices_batching_dims and axis == 1
        if by_row and numbers.offset_dims == tuple(range(trailing, len(out.shape))):
            return t.emit("GatherND", [x, indices], out.shape, out.dtype, batch_dims=1)
    raise UserError(f"this model gathers in a way that the ONNX export does not know ({numbers})")


@rule("scan")
def _scan(t: Translator, equation: Any, *given: Any) -> list[Wire]:
    """ONNX's Scan: what changes from step to step is in the graph inside, everything else it sees outside."""
    params, body, helper = equation.params, equation.params["jaxpr"], library().helper
    consts, carried = params["num_consts"], params["num_carry"]
    info = lambda x: helper.make_tensor_value_info(x.name, element(x.dtype), None)  # noqa: E731
    wide = [x if isinstance(x, Known) else t.full(x, v.aval.shape) for x, v in zip(given, equation.invars, strict=True)]
    inside = Translator(t.graph.inner())
    steps = [Wire(t.graph.name("step"), aval.shape, aval.dtype) for aval in body.in_avals[consts:]]
    found = inside.run(body, [*wide[:consts], *steps])
    found = [inside.full(x, aval.shape) for x, aval in zip(found, body.out_avals, strict=True)]
    # Names of its own: neither those of its inputs nor of what is outside, and none twice.
    ends = [Wire(inside.graph.give(x.name, t.graph.name("step")), x.shape, x.dtype) for x in found]
    message = proto(inside.graph, [info(x) for x in steps], [info(x) for x in ends])
    _, needs = inside.graph.needed(x.name for x in ends)
    direction = int(params["reverse"])
    names = tuple(t.graph.name("Scan") for _ in ends)
    attributes = dict(
        body=message, num_scan_inputs=len(steps) - carried, scan_input_directions=[direction] * (len(steps) - carried),
        scan_output_directions=[direction] * (len(ends) - carried),
    )  # fmt: skip
    inputs = tuple(t.wire(x).name for x in wide[consts:])
    t.graph.nodes.append(Node("Scan", inputs, names, attributes, tuple(needs)))
    return [Wire(n, v.aval.shape, v.aval.dtype) for n, v in zip(names, equation.outvars, strict=True)]


def _gelu(t: Translator, x: Any) -> Wire:
    """In the form that runtimes know and compute at once."""
    x, number = t.wire(x), lambda value: Known(np.asarray(value, np.float32))
    inner = t.emit("Erf", [t.emit("Div", [x, number(math.sqrt(2))], x.shape, x.dtype)], x.shape, x.dtype)
    twice = t.emit("Mul", [x, t.emit("Add", [inner, number(1)], x.shape, x.dtype)], x.shape, x.dtype)
    return t.emit("Mul", [twice, number(0.5)], x.shape, x.dtype)


CALLS["gelu"] = _gelu

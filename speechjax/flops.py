"""How much arithmetic the training of a config is: multiplications and additions of its model, whatever runs it.

Counted are the products that the losses are traced to: dot products and convolutions, two operations for each
multiplication with its addition, also those in float32; and Fourier transforms, 2.5 N log2 N of N real numbers.
Elementwise work (norms, activations, depthwise convolutions) is not, nor what only metrics need.  The backward pass
repeats a product once for each of its factors that a gradient flows into: so a layer that learns counts three times,
one on the audio itself twice, a teacher or a frozen layer once.  What `remat` computes again does not count, nor does
the optimizer.  This is the count of model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B),
without its shortcuts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from speechjax import config as configs
from speechjax.data.plan import Shape, Spec
from speechjax.errors import UserError
from speechjax.optim import detach
from speechjax.step import init_state, stream_keys

PARTS: tuple[str, ...] = ("frontend", "positions", "linear", "attention", "head")

Count = dict[str, float]  # operations of every part


def train_flops(config: Any, samples: int) -> float:
    """FLOPs that one more utterance of `samples` samples is to a batch in training, forward and backward."""
    return sum(parts(config, samples).values())


def parts(config: Any, samples: int) -> Count:
    """`train_flops` by part of the model: "frontend", "positions", "linear", "attention" and "head".

    "linear" are the layers' products with weights and the projection before them, "attention" those of queries, keys
    and values, "head" everything outside the encoder.
    """
    from speechjax.ahead.batch import task_spec

    task = configs.make_task(config)
    # What a batch needs once, such as keys of relative positions, belongs to no utterance.
    two, four = (batch_flops(config, task_spec(config, task, Shape(rows, samples))) for rows in (2, 4))
    return {part: (four[part] - two[part]) / 2 for part in PARTS}


def batch_flops(config: Any, spec: Spec) -> Count:
    """FLOPs of a training step on a batch of {name: (shape, dtype)}, by part, forward and backward."""
    plain = config.copy_and_resolve_references()
    with plain.unlocked():  # kernels hide their products
        plain.model.attention = {**config.model.get("attention", {"positions": "none"}), "impl": "xla"}
    task = configs.make_task(plain)
    still = detach(config.optim.freeze)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec.items()}
    state = jax.eval_shape(lambda: init_state(task, optax.identity(), 0, batch))

    def forward(params, extra, batch):
        variables, step = {"params": still(params), **extra}, jnp.int32(0)
        rngs = stream_keys(task, 0, step)
        (losses, _), _ = task.apply(variables, batch, step=step, train=True, rngs=rngs, mutable=["sums"])
        return losses

    return count(forward, state.params, state.extra, batch)


def count(function: Callable, params: Any, *args: Any) -> Count:
    """FLOPs, by part, of a function of arrays or shapes and of its gradient with respect to `params`.

    Raises UserError for a loop of unknown length that has products inside.
    """
    program = jax.make_jaxpr(function)(params, *args)
    trainable = len(jax.tree.leaves(params))
    learns = [i < trainable for i in range(len(program.jaxpr.invars))]
    found: Count = dict.fromkeys(PARTS, 0.0)

    def add(path: str, flops: float, batched: bool) -> None:
        found[_part(path, batched)] += flops

    _walk(program.jaxpr, learns, "", 1.0, add)
    return found


def _part(path: str, batched: bool) -> str:
    """Where in the model a product is; `batched`: whether it has batch dimensions, as no product with weights has."""
    names = path.split("/")
    if any(name.split(".")[0] == "front" for name in names):
        return "frontend"
    if "positions" in names:
        return "positions"
    if "attention" in names and "transformer" in names and batched:
        return "attention"
    return "linear" if "transformer" in names or names[-1] == "projection" else "head"


# ---- programs


def _walk(
    program: core.Jaxpr, learns: Sequence[bool], path: str, times: float, add: Callable[[str, float, bool], None]
) -> list[bool]:
    """Adds up the products that the outputs of a program need; whether a gradient flows into each of the outputs.

    `learns` says it of the inputs.
    """
    known = dict(zip(program.invars, learns, strict=True))
    flows = lambda atom: not isinstance(atom, core.Literal) and known.get(atom, False)  # noqa: E731
    for equation in _needed(program):
        inputs = [flows(atom) for atom in equation.invars]
        outputs = _follow(equation, inputs, f"{path}/{equation.source_info.name_stack}", times, add)
        for atom, flowing in zip(equation.outvars, outputs, strict=True):
            known[atom] = flowing and jnp.issubdtype(atom.aval.dtype, jnp.inexact)
    return [flows(atom) for atom in program.outvars]


def _needed(program: core.Jaxpr) -> list[Any]:
    """The equations that the outputs are made of: not those of metrics, which the losses do not need."""
    used, found = {atom for atom in program.outvars if isinstance(atom, core.Var)}, []
    for equation in reversed(program.eqns):
        if not used.isdisjoint(equation.outvars):
            used.update(atom for atom in equation.invars if isinstance(atom, core.Var))
            found.append(equation)
    return found[::-1]


def _follow(equation: Any, inputs: list[bool], path: str, times: float, add: Callable) -> list[bool]:
    """Adds up what an equation computes; whether a gradient flows out of each of its outputs."""
    name, params = equation.primitive.name, equation.params
    if name in _OPERATIONS:
        batched = name == "dot_general" and bool(params["dimension_numbers"][1][0])
        add(path, times * _OPERATIONS[name](equation) * (1 + sum(inputs)), batched)
    elif name == "scan":
        return _scan(equation, inputs, path, times, add)
    elif name == "cond":
        branches = []
        for branch in params["branches"]:
            found: list[tuple[str, float, bool]] = []
            outputs = _walk(branch.jaxpr, inputs[1:], path, times, lambda *one, found=found: found.append(one))
            branches.append((sum(flops for _, flops, _ in found), found, outputs))
        for one in max(branches, key=lambda branch: branch[0])[1]:
            add(*one)
        return [any(flowing) for flowing in zip(*(outputs for *_, outputs in branches), strict=True)]
    elif name != "stop_gradient" and (inside := _inside(equation)):
        if len(inside) == 1 and len(inside[0].invars) == len(inputs):
            return _walk(inside[0], inputs, path, times, add)
        if any(map(_multiplies, inside)):
            raise UserError(f"the FLOPs of this model cannot be counted: it computes products inside {name!r}, {path}")
    return [name != "stop_gradient" and any(inputs)] * len(equation.outvars)


def _scan(equation: Any, inputs: list[bool], path: str, times: float, add: Callable) -> list[bool]:
    """Every turn costs what one does; a gradient that flows out of a turn flows into the next."""
    params = equation.params
    body, consts, carried = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
    inputs, outputs = list(inputs), []
    for _ in range(carried + 1):
        outputs = _walk(body, inputs, path, 0.0, lambda *_: None)
        joined = [a or b for a, b in zip(inputs[consts : consts + carried], outputs, strict=False)]
        if joined == inputs[consts : consts + carried]:
            break
        inputs[consts : consts + carried] = joined
    return _walk(body, inputs, path, times * params["length"], add)


def _inside(equation: Any) -> list[core.Jaxpr]:
    """The programs that an equation runs."""
    values = jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: isinstance(x, _PROGRAMS))
    return [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in values if isinstance(x, _PROGRAMS)]


_PROGRAMS = (core.Jaxpr, core.ClosedJaxpr)


def _multiplies(program: core.Jaxpr) -> bool:
    return any(e.primitive.name in _OPERATIONS or any(map(_multiplies, _inside(e))) for e in program.eqns)


# ---- one product


def _of_dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _of_conv(equation: Any) -> float:
    """Taps that meet padding count, zeros between the inputs of a transposed convolution do not."""
    params = equation.params
    numbers, kernel = params["dimension_numbers"], equation.invars[1].aval.shape
    taps = math.prod(kernel[i] for i in numbers.rhs_spec[1:])  # inputs of a group times the spatial extent
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps / math.prod(params["lhs_dilation"])


def _of_fft(equation: Any) -> float:
    numbers, lengths = equation.invars[0].aval, equation.params["fft_lengths"]
    real = {jax.lax.FftType.RFFT, jax.lax.FftType.IRFFT}
    N = math.prod(lengths)
    transforms = math.prod(numbers.shape[: len(numbers.shape) - len(lengths)])
    return transforms * (2.5 if equation.params["fft_type"] in real else 5.0) * N * float(np.log2(N))


_OPERATIONS = {"dot_general": _of_dot, "conv_general_dilated": _of_conv, "fft": _of_fft}

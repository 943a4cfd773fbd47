"""Structured pruning: encoders without the attention heads, hidden units and layers that matter least.

Every layer keeps equally many heads and units, its own most important ones, so shapes stay static and layers can be
stacked.  Parameters are flat here, `encoder/transformer/layer3/...`, with layers one by one.

Importance of a head or a unit is, to first order, how much the loss would change without it: |sum x dL/dx| over its
outputs x in a row, averaged over rows (heads: Michel et al. 2019, arXiv 1905.10650, equation 2; units: Molchanov et al.
2017, arXiv 1611.06440, section 2.2).  That of a layer is the same of what it adds to its input.  Without data it is the
product of the norms of what goes into a head or a unit and of what comes out.

Shapes: B rows, T frames, D width, L layers, H heads, E head width, N hidden units.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from speechjax.errors import UserError
from speechjax.models.block import Block
from speechjax.models.relative import AttentionOptions, alibi_slopes
from speechjax.paths import restacked, unstacked
from speechjax.step import ratio, stream_keys

BLOCKS = ("transformer", "conformer")  # with heads and feed-forward branches
_OUT, _DOWN = re.compile(r"(^|/)attention/out$"), re.compile(r"(^|/)(?P<branch>mlp\d*)_down$")
_LAYER = re.compile(r"^(?P<before>.*transformer/)layer(?P<number>\d+)/(?P<part>.*)$")
# Parts of a layer that have heads, as blocks of E along an axis, or one by one; and hidden units.
_IN_HEADS = re.compile(r"^attention/(query|key|value|distance)/(kernel|bias)$")
_FROM_HEADS = re.compile(r"^attention/out/kernel$")
_OF_HEADS = re.compile(r"^attention/(content|distance)_bias$")
_INTO_UNITS = re.compile(r"^(?P<branch>mlp\d*)_up/(kernel|bias)$")
_FROM_UNITS = re.compile(r"^(?P<branch>mlp\d*)_down/kernel$")
_GATE = "prune_gate"  # a leaf of ones that multiplies what may go

Flat = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Importance:
    """At least 0 and comparable within a layer: `heads` [L, H], `units` {branch: [L, N]}, `layers` [L] (None: unknown).

    Branches are "mlp", of conformers "mlp1" and "mlp2".
    """

    heads: np.ndarray
    units: dict[str, np.ndarray]
    layers: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays, in its order: numbers of layers [K]; of each of these heads [K, h], and units {branch: [K, n]}.

    `model` is what is other in the model block.
    """

    layers: list[int]
    heads: np.ndarray
    units: dict[str, np.ndarray]
    model: dict[str, Any]

    def kept(self, importance: Importance) -> list[dict[str, float]]:
        """How much of the importance stays, by layer: {"heads" or a branch: share}."""
        parts = {"heads": (importance.heads, self.heads)}
        parts |= {branch: (importance.units[branch], numbers) for branch, numbers in self.units.items()}
        return [
            {name: float(_shares(of[layer])[stays[k]].sum()) for name, (of, stays) in parts.items() if of.size}
            for k, layer in enumerate(self.layers)
        ]


def weight_norms(params: Mapping[str, Any], model: Mapping[str, Any]) -> Importance:
    """Importance by weights alone: what of a head's values or a unit comes in, times what goes out; layers unknown."""
    flat = _single(params)
    L, H = model["layers"], model["heads"]
    heads, units = np.zeros((L, H if _has_parts(model) else 0)), {}
    for name, leaf in flat.items():
        found = _LAYER.match(name)
        if not found or not name.startswith("encoder/"):
            continue
        layer, part = int(found["number"]), found["part"]
        norm = lambda of, axis: np.sqrt(np.sum(np.asarray(flat[of], np.float64) ** 2, axis=axis))  # noqa: E731
        if _FROM_HEADS.match(part):
            value = name.replace("/out/", "/value/")
            by_head = lambda x: np.sqrt(np.sum(x.reshape(H, -1) ** 2, axis=1))  # noqa: E731
            heads[layer] = by_head(norm(name, 1)) * by_head(norm(value, 0))
        elif match := _FROM_UNITS.match(part):
            rows = units.setdefault(match["branch"], np.zeros((L, len(leaf))))
            rows[layer] = norm(name, 1) * norm(name.replace("_down/", "_up/"), 0)
    return Importance(heads, units, None)


class Gradients:
    """Importance by the loss of a task on batches; one program a shape of batch."""

    def __init__(self, task: Any, variables: Mapping[str, Any], model: Mapping[str, Any], *, step: int, seed: int):
        self._task, self._model, self._step, self._seed = task, model, jnp.int32(step), seed
        self._params: Flat = flatten_dict(dict(variables["params"]), sep="/")
        self._extra = {name: part for name, part in variables.items() if name != "params"}
        self._gates = self._places()
        self._gradients = jax.jit(self._of_batch)

    def __call__(self, batches: Iterable[Mapping[str, Any]]) -> Importance:
        """The mean over all rows of `batches`; UserError where there was nothing to hear."""
        total: dict[str, np.ndarray] = {}
        rows = 0
        for number, batch in enumerate(batches):
            sums, heard = jax.device_get(self._gradients(self._params, self._extra, batch, jnp.int32(number)))
            total = {name: value.astype(np.float64) + total.get(name, 0) for name, value in sums.items()}
            rows += int(heard)
        if not rows or not all(np.isfinite(value).all() for value in total.values()):
            raise UserError("the loss taught nothing of what matters: were there recordings? try other --config.data")
        mean = {name: value / rows for name, value in total.items()}
        L = self._model["layers"]
        stacked: dict[str, np.ndarray] = unstacked(mean)
        of = lambda layer, part: stacked[f"encoder/transformer/layer{layer}/{part}{_GATE}"]  # noqa: E731
        branches = sorted(
            {match["branch"] for name in stacked if (match := _DOWN.search(name.removesuffix(f"/{_GATE}")))}
        )
        has_heads = any(_OUT.search(name.removesuffix(f"/{_GATE}")) for name in stacked)
        return Importance(
            np.stack([of(i, "attention/out/") for i in range(L)]) if has_heads else np.zeros((L, 0)),
            {branch: np.stack([of(i, f"{branch}_down/") for i in range(L)]) for branch in branches},
            np.stack([of(i, "") for i in range(L)]),
        )

    def _places(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """{path of a gate: (layers that a scan stacks, or 0; its shape for one row)}."""
        found: dict[str, tuple[int, tuple[int, ...]]] = {}
        for name, leaf in self._params.items():
            at = re.match(r"encoder/transformer/layer(s|\d+)(?=/)", name)
            module = name.removesuffix("/kernel")
            if not at:
                continue
            depth = self._model["layers"] if at[1] == "s" else 0
            found[f"{at[0]}/{_GATE}"] = depth, ()
            if name.endswith("/kernel") and _OUT.search(module):
                found[f"{module}/{_GATE}"] = depth, (self._model["heads"],)
            elif name.endswith("/kernel") and _DOWN.search(module):
                found[f"{module}/{_GATE}"] = depth, (leaf.shape[-2],)
        return found

    def _of_batch(self, params, extra, batch, number):
        B = len(batch["lengths"])
        ones = {n: jnp.ones((*((depth,) if depth else ()), B, *shape)) for n, (depth, shape) in self._gates.items()}
        rngs = stream_keys(self._task, self._seed, number)

        def loss(gates):
            whole = {"params": unflatten_dict(params | gates, sep="/"), **extra}
            with nn.intercept_methods(_through_gates):
                losses, _ = self._task.apply(whole, batch, step=self._step, train=False, rngs=rngs)
            return sum(ratio(pair) for pair in losses.values())

        slopes = jax.grad(loss)(ones)
        heard = jnp.sum(jnp.any(batch["lengths"].reshape(B, -1) > 0, axis=1))
        # A row's gate meets all its frames, so its gradient is their sum of x dL/dx.
        rows = {name: 1 if depth else 0 for name, (depth, _) in self._gates.items()}
        return {name: jnp.sum(jnp.abs(slope), axis=rows[name]) for name, slope in slopes.items()}, heard


def _through_gates(inner, args, kwargs, context):
    """Multiplies heads, hidden units and what a layer adds by their gates, where there are some."""
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, nn.Dense | Block):
        return inner(*args, **kwargs)
    if not module.has_variable("params", _GATE):
        return inner(*args, **kwargs)
    gate: Any = module.get_variable("params", _GATE)
    x = args[0]
    gate = jnp.repeat(gate, len(x) // len(gate), axis=0)  # data2vec 2.0 hears every row several times, side by side
    if isinstance(module, nn.Dense):
        parts = x.reshape(*x.shape[:2], gate.shape[1], -1) * gate[:, None, :, None].astype(x.dtype)
        return inner(parts.reshape(x.shape), *args[1:], **kwargs)
    y, mlp = inner(*args, **kwargs)
    return x + (y - x) * gate[:, None, None].astype(y.dtype), mlp


def plan(
    importance: Importance, model: Mapping[str, Any], *, heads: int = 0, mlp: int = 0,
    layers: int | Sequence[int] = 0,
) -> Plan:  # fmt: skip
    """What stays of a model block: `heads` and `mlp` units a layer, `layers` by number or as many; 0: all.

    Raises UserError for what is not there, or cannot go.
    """
    L, H, N = model["layers"], model["heads"], model["mlp"]
    _refuse(model, heads, mlp)
    for flag, value, there in (("heads", heads, H), ("mlp", mlp, N)):
        if value and not 0 < value <= there:
            raise UserError(f"--{flag}={value}: there are {there}, so keep 1 to {there}")
    stay = _layers(importance, layers, L)
    chosen = importance.heads[stay]
    attention = AttentionOptions(**model.get("attention", {}))
    if attention.positions in ("alibi", "buckets"):
        # The layers share a bias for each head, so they lose the same ones.
        chosen = np.broadcast_to(_shares(chosen).sum(axis=0), chosen.shape)
    kept = _most(chosen, heads or chosen.shape[1])
    units = {branch: _most(of[stay], mlp or of.shape[1]) for branch, of in importance.units.items()}
    other: dict[str, Any] = dict(layers=len(stay))
    if _has_parts(model):
        E = model.get("head_width", 0) or model["width"] // H
        count = kept.shape[1]
        other |= dict(heads=count, mlp=mlp or N, head_width=0 if count * E == model["width"] else E)
    found = Plan(stay, kept, units, other)
    if all(model.get(key, 0) == value for key, value in other.items()):
        raise UserError("nothing would be removed: keep fewer with --heads, --mlp or --layers")
    return found


def cut(variables: Mapping[str, Any], model: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Variables of a task, as nested dicts, without what `plan` leaves out; NumPy arrays.

    The encoder's transformer becomes smaller wherever it is: among the parameters, in its batch statistics, as the
    moving average that is its teacher (not the teacher of a distillation, which is another model).
    """
    flat: Flat = flatten_dict(dict(variables), sep="/")
    H, stacked = model["heads"], model["scan"]
    ours = {name for name in flat if re.match(r"(\w+/encoder|teacher)/transformer/", name)}
    number = {old: new for new, old in enumerate(plan.layers)}
    found: Flat = {}
    for name, leaf in unstacked({name: np.asarray(flat[name]) for name in ours}).items():
        match = _LAYER.match(name)
        if match is None:
            found[name] = _shared(name, leaf, plan)
        elif (old := int(match["number"])) in number:
            new = number[old]
            found[f"{match['before']}layer{new}/{match['part']}"] = _less(match["part"], leaf, plan, new, H)
    if stacked:
        found = restacked(found, {name: None for name in ours})
    rest = {name: leaf for name, leaf in flat.items() if name not in ours}
    if (name := "params/layer_weights") in rest:  # the input of the first layer, and the output of each
        rest[name] = np.asarray(rest[name])[[0, *(layer + 1 for layer in plan.layers)]]
    return unflatten_dict(rest | found, sep="/")


def _less(part: str, leaf: np.ndarray, plan: Plan, layer: int, heads: int) -> np.ndarray:
    """A leaf of a layer that stays."""
    if _OF_HEADS.match(part):
        return leaf[plan.heads[layer]]
    if _IN_HEADS.match(part):
        by_head = leaf.reshape(*leaf.shape[:-1], heads, -1)[..., plan.heads[layer], :]
        return by_head.reshape(*leaf.shape[:-1], -1)
    if _FROM_HEADS.match(part):
        return leaf.reshape(heads, -1, leaf.shape[-1])[plan.heads[layer]].reshape(-1, leaf.shape[-1])
    if match := _INTO_UNITS.match(part):
        return leaf[..., plan.units[match["branch"]][layer]]
    if match := _FROM_UNITS.match(part):
        return leaf[plan.units[match["branch"]][layer]]
    return leaf


def _shared(name: str, leaf: np.ndarray, plan: Plan) -> np.ndarray:
    """A leaf of the transformer that no layer owns: of the bias that all share, the heads that stay."""
    if name.endswith("attention_bias/table"):
        return leaf[:, plan.heads[0]]
    if name.endswith("attention_bias/scale"):
        # The slopes follow from how many heads there are; the learned scales make up for that.
        old, new = alibi_slopes(len(leaf)), alibi_slopes(plan.heads.shape[1])
        return (np.maximum(leaf, 0) * old).astype(leaf.dtype)[plan.heads[0]] / new.astype(leaf.dtype)
    return leaf


def _refuse(model: Mapping[str, Any], heads: int, mlp: int) -> None:
    """UserError for models whose parts cannot go."""
    if model.get("adapters"):
        raise UserError("the run has adapters: merge them first (python -m speechjax.adapter merge)")
    block, attention = model.get("block", {"name": "transformer"})["name"], model.get("attention", {})
    if (heads or mlp) and not _has_parts(model):
        raise UserError(f"--{'heads' if heads else 'mlp'}: blocks of the kind {block!r} have none; prune --layers")
    for option, value in (("gated", True), ("positions", "rotary_inputs")):
        if heads and attention.get(option) == value:
            raise UserError(
                f"--heads={heads}: with config.model.attention.{option}={value!r} every head hears its own part of the "
                "input, so none can go; prune --mlp or --layers"
            )


def _has_parts(model: Mapping[str, Any]) -> bool:
    return model.get("block", {"name": "transformer"})["name"] in BLOCKS


def _layers(importance: Importance, layers: int | Sequence[int], there: int) -> list[int]:
    """Numbers of the layers that stay."""
    if isinstance(layers, int):
        if not 0 <= layers <= there:
            raise UserError(f"--layers={layers}: there are {there}, so keep 1 to {there}")
        if layers in (0, there):
            return list(range(there))
        if importance.layers is None:
            raise UserError(
                f"--layers={layers}: weight norms say nothing of whole layers; use --importance=loss, or name those to "
                "keep, --layers=0,2"
            )
        return _most(importance.layers[None], layers)[0].tolist()
    if not layers or any(not 0 <= layer < there for layer in layers) or list(layers) != sorted(set(layers)):
        text = ",".join(map(str, layers))
        raise UserError(f"--layers={text}: name layers of 0 to {there - 1} to keep, in their order and once each")
    return list(layers)


def _most(importance: np.ndarray, count: int) -> np.ndarray:
    """The `count` most important of each row, in their order: [R, M] -> int [R, count]; of equals, the first."""
    return np.sort(np.argsort(-importance, axis=1, kind="stable")[:, :count], axis=1)


def _shares(importance: np.ndarray) -> np.ndarray:
    """Importance as shares of all of a layer; even ones where there is none."""
    total = importance.sum(axis=-1, keepdims=True)
    return np.where(total > 0, importance / np.where(total > 0, total, 1), 1 / max(importance.shape[-1], 1))


def _single(params: Mapping[str, Any]) -> Flat:
    """Flat parameters, layers one by one."""
    return unstacked(flatten_dict(dict(params), sep="/"))

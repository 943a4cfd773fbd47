"""Parameter-efficient fine-tuning: small learned parts beside the parameters of a transformer that stays as it is.

A block of `config.model.adapters` is {"kind", "name"} and options of its kind, for example
{"kind": "lora", "name": "digits", "targets": "attention/(query|value)$", "rank": 8, "alpha": 16.0, "dropout": 0.0}.
While the encoder runs, from its projection on, the calls of the modules that a kind has to do with are intercepted, and
its leaves live in the scope of those modules, `.../attention/query/lora_digits_a` beside `.../attention/query/kernel`.
So no layer knows of adapters, and parameters with adapters are those without and some leaves more.  Blocks nest in
their order: the first is next to the module, each of the others sees the module as those before it have made it.

Which leaves learn is `trainable_pattern`; to train nothing else of the encoder, config.optim.freeze is
((trainable_pattern(adapters), 0, 0), ("^encoder/", 0, -1)).

Shapes: B batch, T frames, D width of an input, E of an output, R rank or bottleneck, P prefix, H heads, L layers that a
scan stacks.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speechjax.errors import UserError
from speechjax.models.attention import SelfAttention
from speechjax.models.layers import fan_in_uniform, gelu

ACTIVATIONS = {"gelu": gelu, "relu": nn.relu, "swish": nn.swish}
_ATTENTION = (SelfAttention, r"(^|/)attention$")
_INNER = (nn.Dense, r"(^|/)mlp\d*_up$")  # what makes the hidden layer of a feed-forward branch
_OUTER = (nn.Dense, r"(^|/)mlp\d*_down$")  # what takes it
_IN_TRANSFORMER = r"(^|/)transformer/([^/]+/)*"
_WITH_LEAVES = "(lora|ia3|houlsby|parallel|prefix)"  # kinds that add some
ADAPTER_LEAF = rf"/{_WITH_LEAVES}_[A-Za-z0-9-]+_[a-z_]+$"  # of any kind and name

Flat = dict[str, Any]  # {"/"-joined path: array}
Site = tuple[type, str]  # class and path regex of modules


@dataclass(frozen=True)
class Host:
    """The module whose call is intercepted: its path, whether this is training, and notes of one adapter's calls."""

    module: nn.Module
    path: str
    train: bool
    notes: dict[str, jax.Array]


@dataclass(frozen=True)
class Adapter:
    """The base of a kind; its fields are the options of the block.

    Each of `sites` must find modules to change.  `call` stands in for a call of such a module, which is `inner`.
    `trains_also` is a regex of parameters of the base that learn too.
    """

    name: str

    kind: ClassVar[str]
    trains_also: ClassVar[str] = ""

    def __post_init__(self):
        # No "_", which ends the name in the names of leaves.
        self.check("name", re.fullmatch(r"[A-Za-z0-9-]+", str(self.name)), "letters, digits and -")

    def check(self, option: str, right: Any, wanted: str) -> None:
        """UserError unless `right`."""
        if not right:
            raise UserError(f"config.model.adapters: {self}: {option}={getattr(self, option)!r} must be {wanted}")

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"

    def sites(self) -> tuple[Site, ...]:
        return ()

    def finds(self, module: nn.Module, path: str) -> list[Site]:
        """Those of its sites that this module is."""
        return [site for site in self.sites() if isinstance(module, site[0]) and _is(site, path)]

    @property
    def own(self) -> str:
        """Regex of the leaves it adds; group "site" is the path of the module, "part" which of them."""
        return rf"^(?P<site>.*)/{self.kind}_{self.name}_(?P<part>[a-z_]+)$"

    def param(self, host: Host, part: str, init: Any, shape: tuple[int, ...], like: jax.Array) -> jax.Array:
        """A leaf, float32 in the module's scope, of the type of `like`."""
        return host.module.param(f"{self.kind}_{self.name}_{part}", init, shape).astype(like.dtype)

    def call(self, host: Host, inner: Callable[..., jax.Array], *args: Any, **kwargs: Any) -> jax.Array:
        raise NotImplementedError

    def fold(self, kernel: np.ndarray, bias: Any, parts: Flat, path: str, back: bool) -> tuple[np.ndarray, Any]:
        """Kernel [..., D, E] and bias [..., E] (or None) that do what the adapter did to them, or `back`; float64."""
        raise UserError(
            f"{self} is no change of weights that are there, so it cannot be merged: keep it in config.model.adapters"
        )


@dataclass(frozen=True)
class Lora(Adapter):
    """W x + (alpha / rank) B A x (Hu et al. 2021, arXiv 2106.09685, section 4.1), on dense layers.

    B begins at zero; A as in the published code, uniform within 1/sqrt(D), where the paper has a Gaussian.  Dropout is
    that of A's input.  By default on queries and values, the paper's choice.
    """

    targets: str = "attention/(query|value)$"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    kind = "lora"

    def __post_init__(self):
        super().__post_init__()
        try:
            re.compile(self.targets)
        except re.error as error:
            self.check("targets", False, f"a regex: {error}")
        self.check("rank", self.rank >= 1, "at least 1")
        self.check("alpha", self.alpha > 0, "above 0")
        self.check("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")

    def sites(self):
        return ((nn.Dense, self.targets),)

    def call(self, host, inner, x):
        y = inner(x)
        a = self.param(host, "a", fan_in_uniform(x.shape[-1]), (x.shape[-1], self.rank), y)
        b = self.param(host, "b", nn.initializers.zeros, (self.rank, y.shape[-1]), y)
        if self.dropout:
            x = nn.Dropout(self.dropout, name=f"{self.kind}_{self.name}_dropout")(x, deterministic=not host.train)
        return y + jnp.dot(jnp.dot(x.astype(y.dtype), a), b) * (self.alpha / self.rank)

    def fold(self, kernel, bias, parts, path, back):
        a, b = parts["a"], parts["b"]
        if a.shape != (*kernel.shape[:-1], self.rank) or b.shape != (*kernel.shape[:-2], self.rank, kernel.shape[-1]):
            raise UserError(f"{path}: {self} of rank {self.rank} has shapes {a.shape}, {b.shape}, not {kernel.shape}'s")
        change = np.matmul(a.astype(np.float64), b.astype(np.float64)) * (self.alpha / self.rank)
        return (kernel - change if back else kernel + change), bias


@dataclass(frozen=True)
class IA3(Adapter):
    """Learned scales, one at first, on keys, values and hidden activations of the feed-forward branches.

    Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """

    kind = "ia3"

    def sites(self):
        return ((nn.Dense, r"attention/key$"), (nn.Dense, r"attention/value$"), _OUTER)

    def call(self, host, inner, x):
        ones = nn.initializers.ones
        if _is(_OUTER, host.path):
            return inner(x * self.param(host, "scale", ones, x.shape[-1:], x)[None, None])
        y = inner(x)
        return y * self.param(host, "scale", ones, y.shape[-1:], y)[None, None]

    def fold(self, kernel, bias, parts, path, back):
        scale, of_input = parts["scale"].astype(np.float64), _is(_OUTER, path)
        if scale.shape != (*kernel.shape[:-2], kernel.shape[-2 if of_input else -1]):
            raise UserError(f"{path}: {self} has scales of shape {scale.shape}, the kernel is {kernel.shape}")
        if back and not scale.all():
            raise UserError(f"{path}: {self} has a scale of zero, so what it was merged into cannot be brought back")
        scale = 1 / scale if back else scale
        if of_input:
            return kernel * scale[..., :, None], bias
        return kernel * scale[..., None, :], (None if bias is None else bias * scale)


@dataclass(frozen=True)
class Houlsby(Adapter):
    """A bottleneck with a residual connection after attention and after every feed-forward branch.

    Houlsby et al. 2019, arXiv 1902.00751, section 2.1: before the residual sum of the layer, y + up(f(down(y))), and
    the layer norms of the transformer learn too.  Both matrices begin as in the published code, a truncated Gaussian
    of standard deviation 1e-3, so the adapter is near identity.  There it comes after the branch's dropout, here
    before it.
    """

    width: int = 64
    activation: str = "gelu"

    kind = "houlsby"
    trains_also = rf"{_IN_TRANSFORMER}([^/]+_)?norm/(scale|bias)$"

    def __post_init__(self):
        super().__post_init__()
        self.check("width", self.width >= 1, "at least 1")
        self.check("activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")

    def sites(self):
        return (_ATTENTION, _OUTER)

    def call(self, host, inner, *args, **kwargs):
        y = inner(*args, **kwargs)
        D, R, zeros = y.shape[-1], self.width, nn.initializers.zeros
        near_zero = nn.initializers.truncated_normal(1e-3)
        hidden = jnp.dot(y, self.param(host, "down", near_zero, (D, R), y))
        hidden = ACTIVATIONS[self.activation](hidden + self.param(host, "down_bias", zeros, (R,), y)[None, None])
        change = jnp.dot(hidden, self.param(host, "up", near_zero, (R, D), y))
        return y + change + self.param(host, "up_bias", zeros, (D,), y)[None, None]


@dataclass(frozen=True)
class Parallel(Adapter):
    """A bottleneck beside every feed-forward branch: its input x adds scale * up(relu(down(x))) to its output.

    The scaled parallel adapter of He et al. 2022, arXiv 2110.04366, table 1 and section 4.6, without dropout.  As in
    the published code up begins at zero, down uniform within 1/sqrt(D), and the scale is fixed.
    """

    width: int = 64
    scale: float = 4.0

    kind = "parallel"

    def __post_init__(self):
        super().__post_init__()
        self.check("width", self.width >= 1, "at least 1")
        self.check("scale", self.scale > 0, "above 0")

    def sites(self):
        return (_INNER, _OUTER)

    def call(self, host, inner, x):
        # Its halves meet input and output of the branch at the two dense layers, and live there.
        y, R, zeros = inner(x), self.width, nn.initializers.zeros
        if _is(_INNER, host.path):
            D = x.shape[-1]
            hidden = jnp.dot(x.astype(y.dtype), self.param(host, "down", fan_in_uniform(D), (D, R), y))
            hidden = nn.relu(hidden + self.param(host, "down_bias", zeros, (R,), y)[None, None])
            host.notes[host.path.removesuffix("up")] = hidden
            return y
        hidden, E = host.notes.pop(host.path.removesuffix("down")), y.shape[-1]
        change = jnp.dot(hidden, self.param(host, "up", zeros, (R, E), y))
        return y + self.scale * (change + self.param(host, "up_bias", zeros, (E,), y)[None, None])


@dataclass(frozen=True)
class Prefix(Adapter):
    """Learned keys and values of every layer that all queries see (Li and Liang 2021, arXiv 2101.00190, section 4).

    The vectors themselves are learned, as in P-tuning v2 (arXiv 2110.07602), where the first paper has a network make
    them in training.  They have no position: nothing is added to their products, and rotary angles do not turn them.
    A fresh prefix changes what comes out, since it takes its share of every softmax.
    """

    length: int = 16

    kind = "prefix"

    def __post_init__(self):
        super().__post_init__()
        self.check("length", self.length >= 1, "at least 1")

    def sites(self):
        return (_ATTENTION,)

    def call(self, host, inner, x, *args, prefix=None, **kwargs):
        attend: Any = host.module
        shape = (self.length, attend.heads, attend.head_width or x.shape[-1] // attend.heads)
        init = nn.initializers.normal(0.02)
        mine = [self.param(host, part, init, shape, x) for part in ("keys", "values")]
        if prefix is not None:
            mine = [jnp.concatenate(both) for both in zip(mine, prefix, strict=True)]
        return inner(x, *args, prefix=tuple(mine), **kwargs)


@dataclass(frozen=True)
class Bias(Adapter):
    """Nothing new: the biases of the transformer learn (BitFit, Ben Zaken et al. 2022, arXiv 2106.10199)."""

    kind = "bias"
    trains_also = rf"{_IN_TRANSFORMER}(?!{_WITH_LEAVES}_)([^/]+_)?bias$"


KINDS = {kind.kind: kind for kind in (Lora, IA3, Houlsby, Parallel, Prefix, Bias)}


def _is(site: Site, path: str) -> bool:
    return re.search(site[1], path) is not None


def parse(blocks: Sequence[Mapping[str, Any]]) -> list[Adapter]:
    """The adapters of `config.model.adapters`; UserError for what is no kind, no option, no value or twice there."""
    found: list[Adapter] = []
    for block in blocks:
        options = dict(block)
        kind = KINDS.get(options.pop("kind", ""))
        if kind is None:
            raise UserError(f"config.model.adapters: {dict(block)} needs a kind, one of {', '.join(KINDS)}")
        allowed = [f.name for f in fields(kind)]
        if unknown := sorted(set(options) - set(allowed)):
            raise UserError(f"config.model.adapters: {kind.kind} has no {unknown[0]!r}; allowed: {', '.join(allowed)}")
        if "name" not in options:
            raise UserError(f"config.model.adapters: {kind.kind} needs a name, which its parameters will bear")
        for f in fields(kind)[1:]:
            value = options.get(f.name, f.default)
            if type(value) is not type(f.default) and not (type(value) is int and type(f.default) is float):
                wanted = type(f.default).__name__
                raise UserError(f"config.model.adapters: {kind.kind}: {f.name}={value!r} must be of type {wanted}")
        found.append(kind(**options))
    names = [adapter.name for adapter in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"config.model.adapters: two are named {twice[0]!r}; give each a name of its own")
    return found


def blocks_of(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    """What `parse` makes adapters of, every option named."""
    return [{"kind": adapter.kind, **asdict(adapter)} for adapter in adapters]


def trainable_pattern(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Regex of the parameters of an encoder that learn with these adapters; UserError where there are none."""
    adapters = parse(blocks)
    if not adapters:
        raise UserError("config.model.adapters is empty: name one, or train all parameters")
    own = [rf"/{a.kind}_{a.name}_[a-z_]+$" for a in adapters if a.sites()]
    return "|".join([*own, *(a.trains_also for a in adapters if a.trains_also)])


@contextmanager
def adapted(blocks: Sequence[Mapping[str, Any]], *, train: bool) -> Iterator[None]:
    """What is called inside runs with these adapters.

    Raises UserError, once they have run, for an adapter that has found no module to change.
    """
    adapters = parse(blocks)
    if not adapters:
        yield
        return
    notes: list[dict[str, jax.Array]] = [{} for _ in adapters]
    wanted = [(adapter, site) for adapter in adapters for site in adapter.sites()]
    seen: dict[str, type] = {}

    def intercept(inner, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__" or not isinstance(module, nn.Dense | SelfAttention):
            return inner(*args, **kwargs)
        seen[re.sub(r"layer\d+", "layer*", path)] = type(module)
        for i, adapter in enumerate(adapters):
            if found := adapter.finds(module, path):
                wanted[:] = [(a, site) for a, site in wanted if a is not adapter or site not in found]
                inner = partial(adapter.call, Host(module, path, train, notes[i]), inner)
        return inner(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield
    if wanted:
        adapter, (kind, regex) = wanted[0]
        there = [path for path, its in seen.items() if its is kind] or list(seen)
        what = "dense layer" if kind is nn.Dense else "attention"
        raise UserError(f"config.model.adapters: {adapter} finds no {what} named {regex}; there are {', '.join(there)}")

"""Every kind of adapter by its formula, on a layer small enough to write down; prefixes by hand."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from speechjax.models.adapters import ADAPTER_LEAF, adapted
from speechjax.models.attention import SelfAttention, attention
from speechjax.models.layers import gelu
from speechjax.models.relative import rotate
from tests.drawing import draw_params

D, MLP, H = 16, 24, 4
KINDS: dict[str, dict[str, Any]] = {
    "lora": dict(kind="lora", name="low", targets="attention/(query|value)$|mlp_", rank=3, alpha=6.0),
    "ia3": dict(kind="ia3", name="scales"),
    "houlsby": dict(kind="houlsby", name="serial", width=5),
    "parallel": dict(kind="parallel", name="beside", width=5, scale=2.0),
    "prefix": dict(kind="prefix", name="front", length=3),
}


def without_adapters(params: Any) -> Any:
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({k: v for k, v in flat.items() if not re.search(ADAPTER_LEAF, k)}, sep="/")


class Layer(nn.Module):
    """Attention and a feed-forward branch as blocks name them: x -> both outputs."""

    @nn.compact
    def __call__(self, x, lengths):
        hidden = gelu(nn.Dense(MLP, name="mlp_up")(x))
        branch = nn.Dense(D, name="mlp_down")(hidden)
        return SelfAttention(H, name="attention")(x, lengths, train=False), branch


@pytest.fixture(scope="module")
def layer():
    """(run, [B, T, D] frames, lengths): `run(*blocks)` -> outputs, parameters as float64."""
    x = np.random.default_rng(1).normal(size=(2, 6, D)).astype(np.float32)
    lengths = np.array([6, 4], np.int32)

    def outputs(*blocks: dict[str, Any], params: Any = None):
        def apply(method, *args):
            with adapted(blocks, train=False):
                return method(*args, x, lengths)

        if params is None:
            params = draw_params(jax.eval_shape(lambda: apply(Layer().init, jax.random.key(0)))["params"])
        out = jax.jit(lambda p: apply(Layer().apply, {"params": p}))(params)
        return [np.asarray(y, np.float64) for y in out], params

    return outputs, x.astype(np.float64), lengths


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def by_hand(p, x, lengths, *, q=None, k=None, v=None):
    """Attention [B, T, D] from its projections, row by row and head by head; a prefix where there is one."""
    q, k, v = (dense(p[n], x) if y is None else y for n, y in (("query", q), ("key", k), ("value", v)))
    E, y = D // H, np.zeros_like(x)
    for b, n in enumerate(lengths):
        for h in range(H):
            at = slice(h * E, (h + 1) * E)
            keys, values = k[b, :n, at], v[b, :n, at]
            if "prefix_front_keys" in p:
                keys = np.concatenate([p["prefix_front_keys"][:, h], keys])
                values = np.concatenate([p["prefix_front_values"][:, h], values])
            weights = np.exp(q[b, :, at] @ keys.T / np.sqrt(E))
            y[b, :, at] = weights / weights.sum(axis=1, keepdims=True) @ values
    return dense(p["out"], y)


def bottleneck(p, name, x, activation):
    hidden = np.asarray(activation(x @ p[f"{name}_down"] + p[f"{name}_down_bias"]), np.float64)
    return hidden @ p[f"{name}_up"] + p[f"{name}_up_bias"]


def gelu64(x):
    return np.asarray(gelu(jnp.asarray(x, jnp.float32)))


def lora_formula(p, x, lengths):
    low = lambda p, x: dense(p, x) + 6 / 3 * x @ p["lora_low_a"] @ p["lora_low_b"]  # noqa: E731
    attend = by_hand(p["attention"], x, lengths, **{n[0]: low(p["attention"][n], x) for n in ("query", "value")})
    return attend, low(p["mlp_down"], gelu64(low(p["mlp_up"], x)))


def ia3_formula(p, x, lengths):
    scaled = {n[0]: dense(p["attention"][n], x) * p["attention"][n]["ia3_scales_scale"] for n in ("key", "value")}
    hidden = gelu64(dense(p["mlp_up"], x)) * p["mlp_down"]["ia3_scales_scale"]
    return by_hand(p["attention"], x, lengths, **scaled), dense(p["mlp_down"], hidden)


def houlsby_formula(p, x, lengths):
    attend, branch = by_hand(p["attention"], x, lengths), dense(p["mlp_down"], gelu64(dense(p["mlp_up"], x)))
    return tuple(
        y + bottleneck(p[at], "houlsby_serial", y, gelu64) for at, y in (("attention", attend), ("mlp_down", branch))
    )


def parallel_formula(p, x, lengths):
    branch = dense(p["mlp_down"], gelu64(dense(p["mlp_up"], x)))
    more = bottleneck(p["mlp_up"] | p["mlp_down"], "parallel_beside", x, lambda z: np.maximum(z, 0))
    return by_hand(p["attention"], x, lengths), branch + 2.0 * more


def prefix_formula(p, x, lengths):
    return by_hand(p["attention"], x, lengths), dense(p["mlp_down"], gelu64(dense(p["mlp_up"], x)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_formula(layer, kind):
    outputs, x, lengths = layer
    ours, params = outputs(KINDS[kind])
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    theirs = globals()[f"{kind}_formula"](exact, x, lengths)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)  # float32 against float64
    plain, _ = outputs(params=without_adapters(params))
    differ = [np.abs(a - b).max() for a, b in zip(ours, plain, strict=True)]
    # A drawn adapter changes what it has to do with; the branch it has nothing to do with, not at all.
    assert [d > 1e-2 for d in differ] == {"parallel": [False, True], "prefix": [True, False]}.get(kind, [True, True])


# ---- prefixes and what else attention knows


@pytest.mark.parametrize("options", [{}, dict(chunk=2), dict(chunk=2, left=0)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_prefix_is_seen_by_every_frame(options, packed):
    """Against keys and values put in front by hand, whatever else a frame may see."""
    B, T, E, P = 2, 7, 4, 3
    rng = np.random.default_rng(0)
    q, k, v, other = rng.normal(size=(4, B, T, H, E)).astype(np.float32)
    keys, values = rng.normal(size=(2, P, H, E)).astype(np.float32)
    rows: Any = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2]] if packed else [7, 4], np.int32)
    ours = jax.jit(lambda: attention(q, k, v, lengths=rows, prefix=(other, keys, values), **options))()
    valid = rows if packed else (np.arange(T) < rows[:, None]).astype(np.int32)
    checked = 0
    for b, t in np.argwhere(valid > 0):
        same = np.flatnonzero(valid[b] == valid[b, t])
        chunk = options.get("chunk", T)
        behind = (t - same[0]) // chunk - (same - same[0]) // chunk
        seen = same[(behind >= 0) & (behind <= (0 if "left" in options else T))]
        for h in range(H):
            logits = np.concatenate([keys[:, h] @ other[b, t, h], k[b, seen, h] @ q[b, t, h]]).astype(np.float64) / 2
            weights = np.exp(logits) / np.exp(logits).sum()
            expected = weights @ np.concatenate([values[:, h], v[b, seen, h]])
            np.testing.assert_allclose(ours[b, t, h], expected, atol=1e-6)  # float32
            checked += 1
    assert checked == H * (valid > 0).sum()


@pytest.mark.parametrize("positions", ["none", "rotary", "alibi", "relative"])
def test_a_prefix_has_no_position(positions, random_params):
    """Packed or alone, an utterance gets the same: nothing of the prefix hangs on where a frame is."""
    module = SelfAttention(H, options=dict(positions=positions))
    x = np.random.default_rng(0).normal(size=(1, 7, D)).astype(np.float32)
    prefix = tuple(jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, H, D // H)), jnp.float32))
    bias = jnp.zeros((H, 7, 7)) if positions == "alibi" else None
    ids: Any = np.array([[1, 1, 1, 2, 2, 2, 2]], np.int32)
    params = random_params(module, x, ids, train=False, bias=bias)

    def go(x, ids, prefix):
        cut = None if bias is None else bias[:, : x.shape[1], : x.shape[1]]
        return module.apply({"params": params}, x, ids, train=False, bias=cut, prefix=prefix)

    together, alone = jax.jit(go)(x, ids, prefix), jax.jit(go)(x[:, 3:], ids[:, 3:], prefix)
    np.testing.assert_allclose(together[:, 3:], alone, atol=1e-6)  # float32, other shapes
    assert np.abs(go(x, ids, None) - together).max() > 0.05, "negative control: the prefix is seen"
    if positions == "rotary":  # what would happen if the angles turned the queries that meet it
        q, k, v = (
            np.asarray(dense(jax.tree.map(np.asarray, params["query"]), x)).reshape(1, 1, 7, H, D // H).repeat(3, 0)
        )
        turned = attention(rotate(q), rotate(k), v, lengths=ids, prefix=(rotate(jnp.asarray(q)), *prefix))
        first = attention(
            rotate(q[:, 3:]), rotate(k[:, 3:]), v[:, 3:], lengths=ids[:, 3:],
            prefix=(rotate(jnp.asarray(q[:, 3:])), *prefix),
        )  # fmt: skip
        assert np.abs(turned[:, 3:] - first).max() > 1e-2, "negative control"

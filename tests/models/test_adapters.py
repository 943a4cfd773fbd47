"""Adapters in encoders, with and without scan, merged and not: what they change, what learns, what is refused."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from speechjax import optim
from speechjax.errors import UserError
from speechjax.models.adapter_merge import merge, unmerge
from speechjax.models.adapters import ADAPTER_LEAF, blocks_of, parse, trainable_pattern
from tests.choice import some
from tests.drawing import draw_params

D, MLP, H = 16, 24, 4
LORA = dict(kind="lora", name="low", targets="attention/(query|value)$|mlp_", rank=3, alpha=6.0)
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "ia3": dict(kind="ia3", name="scales"),
    "houlsby": dict(kind="houlsby", name="serial", width=5),
    "parallel": dict(kind="parallel", name="beside", width=5, scale=2.0),
    "prefix": dict(kind="prefix", name="front", length=3),
    "bias": dict(kind="bias", name="fit"),
}
BATCH: Any = dict(
    audio=np.random.default_rng(0).integers(-9000, 9000, (2, 300)).astype(np.int16),
    lengths=np.array([300, 170], np.int32),
)


@pytest.fixture(scope="session")
def small(tiny_encoder):
    """An encoder of width 16 with these adapters."""

    def make(*adapters: dict[str, Any], **settings: Any):
        sizes: dict[str, Any] = dict(width=D, mlp=MLP, heads=H, positions=dict(name="none"))
        return tiny_encoder(frontend=dict(channels=(8, 8, 8)), adapters=adapters, **(sizes | settings))

    return make


def shapes_of(encoder) -> dict[str, Any]:
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), BATCH))["params"]
    return flatten_dict(shapes, sep="/")


def drawn(encoder) -> Any:
    return draw_params(unflatten_dict(shapes_of(encoder), sep="/"))


def run(encoder, params, batch=BATCH) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, b: encoder.apply({"params": p}, b).frames)(params, batch))


def without_adapters(params: Any) -> Any:
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({k: v for k, v in flat.items() if not re.search(ADAPTER_LEAF, k)}, sep="/")


@pytest.mark.parametrize("kind", some(KINDS, ["lora", "prefix"]))
def test_fresh_adapters_change_nothing(small, kind):
    """Exactly, but for houlsby, which is published as near identity, and prefixes, which take part from the start."""
    encoder, plain = small(KINDS[kind], layers=1), small(layers=1)
    params = jax.jit(lambda: encoder.init(jax.random.key(3), BATCH))()["params"]
    ours, base = run(encoder, params), run(plain, without_adapters(params))
    if kind in ("houlsby", "prefix"):
        change = np.abs(ours - base).max()
        assert 0 < change < 1e-4 if kind == "houlsby" else change > 1e-3
    else:
        np.testing.assert_array_equal(ours, base)
    if kind != "bias":
        assert np.abs(run(encoder, drawn(encoder)) - run(plain, without_adapters(drawn(encoder)))).max() > 1e-2, (
            "negative control"
        )


LEARNING = [*((kind, True) for kind in KINDS), ("lora", False)]


@pytest.mark.parametrize(("kind", "scan"), some(LEARNING, [("lora", True), ("prefix", True)]))
def test_what_is_named_learns_and_nothing_else(small, kind, scan):
    encoder = small(KINDS[kind], scan=scan, remat=scan)
    pattern = trainable_pattern([KINDS[kind]])
    params = {"encoder": drawn(encoder), "head": jnp.asarray(np.random.default_rng(2).normal(size=D), jnp.float32)}
    freeze = ((pattern, 0, 0), ("^encoder/", 0, -1))
    tx, _ = optim.make_optimizer(
        steps=9, learning_rate=0.01, warmup=0, b1=0.9, b2=0.98, eps=1e-12, weight_decay=((".*", 0.1),), clip_norm=1.0,
        freeze=freeze,
    )  # fmt: skip

    def loss(params):
        frames = encoder.apply({"params": params["encoder"]}, BATCH).frames
        return jnp.mean((frames @ params["head"] - jnp.arange(frames.shape[1], dtype=jnp.float32)[None]) ** 2)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    new, state, grads = step(params, tx.init(params))
    new, _, _ = step(new, state)
    before, after, grads = (flatten_dict(tree, sep="/") for tree in (params, new, grads))
    learns = {name for name in before if re.search(pattern, name)}
    added = {name for name in before if re.search(ADAPTER_LEAF, name)}
    assert added <= learns
    if kind == "bias":
        assert learns == {n for n in before if n.startswith("encoder/transformer/") and n.endswith("bias")}
    elif kind == "houlsby":
        norms = {n for n in before if re.search(r"encoder/transformer/.*norm/(scale|bias)$", n)}
        assert len(norms) == 6  # two a layer, stacked, and one before
        assert learns == added | norms
    else:
        assert learns == added
    for name in before:
        if name in learns or name == "head":
            # The softmax does not know the keys' bias, so its gradient is rounding.
            assert name.endswith("key/bias") or np.abs(grads[name]).max() > 1e-7, name
            axes = tuple(range(1, before[name].ndim))
            moved = np.abs(np.asarray(after[name]) - np.asarray(before[name])).max(axis=axes if scan else None)
            assert (moved > 0).all(), name
        else:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    if kind not in ("houlsby", "bias"):
        with pytest.raises(UserError, match="fits no parameter"):
            tx.init({"encoder": without_adapters(params["encoder"])})


STACK = (
    LORA,
    KINDS["ia3"],
    dict(kind="lora", name="second", targets="attention/(value|out)$", rank=2, alpha=3.0),
    KINDS["parallel"],
    KINDS["houlsby"],
    KINDS["prefix"],
    dict(kind="prefix", name="more", length=2),
)


def test_a_scan_does_what_separate_layers_do(small):
    apart, stacked = small(*STACK), small(*STACK, scan=True, remat=True)
    params = flatten_dict(drawn(apart), sep="/")
    together: dict[str, Any] = {k: v for k, v in params.items() if "/layer" not in k}
    for name in params:
        if "/layer0/" in name:
            together[name.replace("/layer0/", "/layers/")] = jnp.stack([
                params[name.replace("/layer0/", f"/layer{i}/")] for i in range(2)
            ])  # fmt: skip
    assert {k: v.shape for k, v in together.items()} == {k: v.shape for k, v in shapes_of(stacked).items()}
    ours, theirs = run(stacked, unflatten_dict(together, sep="/")), run(apart, unflatten_dict(params, sep="/"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32
    together["transformer/layers/mlp_down/lora_low_b"] = together["transformer/layers/mlp_down/lora_low_b"][::-1]
    assert np.abs(run(stacked, unflatten_dict(together, sep="/")) - theirs).max() > 1e-3, "negative control"


@pytest.mark.parametrize("block", some(["transformer", "conformer"], ["transformer"]))
def test_padding_changes_nothing(small, block):
    settings = dict(block=dict(name="conformer", kernel=5), norm="pre") if block == "conformer" else {}
    stack = [b | dict(targets="mlp1_up$") if block == "conformer" and b["kind"] == "lora" else b for b in STACK]
    encoder = small(*stack, **settings)
    params, audio = drawn(encoder), BATCH["audio"]
    inside = np.arange(audio.shape[1])[None] < BATCH["lengths"][:, None]
    noise = np.where(inside, audio, -audio[::-1])
    base = run(encoder, params)
    np.testing.assert_array_equal(run(encoder, params, BATCH | dict(audio=noise)), base)
    assert np.abs(run(encoder, params, BATCH | dict(audio=-audio[::-1])) - base).max() > 1e-3, "negative control"


def test_bfloat16_keeps_the_leaves_in_float32(small):
    encoder = small(*STACK, dtype="bfloat16", scan=True, remat=True)
    assert {x.dtype for x in shapes_of(encoder).values()} == {jnp.dtype("float32")}
    out = jax.eval_shape(lambda: encoder.apply({"params": drawn(encoder)}, BATCH, hidden=True))
    assert {x.dtype for x in (out.frames, *out.hidden)} == {jnp.dtype("bfloat16")}
    exact = run(encoder.clone(dtype="float32"), drawn(encoder))
    np.testing.assert_allclose(run(encoder, drawn(encoder)).astype(np.float32), exact, atol=0.2)  # 8 bits, two layers


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("lora", 2 * (2 * 3 * (D + D) + 2 * 3 * (D + MLP))),
        ("ia3", 2 * (2 * D + MLP)),
        ("houlsby", 2 * 2 * (2 * D * 5 + D + 5)),  # 2 m d + d + m each: section 2.1
        ("parallel", 2 * (2 * D * 5 + D + 5)),
        ("prefix", 2 * 2 * 3 * D),
        ("bias", 0),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_number_of_parameters(small, kind, count, scan):
    more, base = shapes_of(small(KINDS[kind], scan=scan)), shapes_of(small(scan=scan))
    assert sum(v.size for k, v in more.items() if k not in base) == count
    assert {k: v.shape for k, v in more.items() if k in base} == {k: v.shape for k, v in base.items()}


def test_dropout_of_lora_is_that_of_its_input(small):
    encoder = small(LORA | dict(dropout=0.5), layers=1)
    params = drawn(encoder)
    train = jax.jit(
        lambda p, k: encoder.apply({"params": p}, BATCH, train=True, rngs={"dropout": jax.random.key(k)}).frames
    )
    assert np.abs(train(params, 0) - train(params, 1)).max() > 1e-2
    np.testing.assert_array_equal(run(encoder, params), run(small(LORA, layers=1), params))
    silent = jax.tree_util.tree_map_with_path(lambda path, x: x * float(path[-1].key != "lora_low_b"), params)
    np.testing.assert_array_equal(train(silent, 0), train(silent, 1), "the layer's own input is dropped too")


# ---- merging


MERGED = STACK[:3]


@pytest.mark.parametrize("scan", [False, True])
def test_merged_is_what_it_was(small, scan):
    encoder, plain = small(*MERGED, scan=scan), small(scan=scan)
    params = drawn(encoder)
    merged = merge(params, MERGED)
    assert {k: v.shape for k, v in flatten_dict(merged, sep="/").items()} == {
        k: v.shape for k, v in shapes_of(plain).items()
    }
    ours = run(encoder, params)
    np.testing.assert_allclose(run(plain, merged), ours, atol=1e-5)  # float32
    for wrong in ([LORA | dict(alpha=7.0), *MERGED[1:]], MERGED[::-1]):
        assert np.abs(run(plain, merge(params, wrong)) - ours).max() > 1e-3, "negative control: scale, order"
    assert merge({"encoder": params}, MERGED)["encoder"].keys() == merged.keys()

    back = unmerge(merged, MERGED, flatten_dict(params, sep="/"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, dict(params))
    np.testing.assert_allclose(run(encoder, back), ours, atol=1e-5)  # float32


def test_two_loras_are_one_of_both_ranks(small):
    pair = [dict(kind="lora", name=n, targets="query$", rank=r, alpha=float(r)) for n, r in (("one", 2), ("two", 3))]
    one = [dict(kind="lora", name="all", targets="query$", rank=5, alpha=5.0)]
    params = flatten_dict(drawn(small(*pair)), sep="/")
    joined = {k: v for k, v in params.items() if not re.search(ADAPTER_LEAF, k)}
    for i in range(2):
        at = f"transformer/layer{i}/attention/query/lora"
        for part, axis in (("a", 1), ("b", 0)):
            both = [params[f"{at}_{name}_{part}"] for name in ("one", "two")]
            joined[f"{at}_all_{part}"] = jnp.concatenate(both, axis=axis)
    ours = run(small(*pair), unflatten_dict(params, sep="/"))
    np.testing.assert_allclose(ours, run(small(*one), unflatten_dict(joined, sep="/")), atol=1e-6)  # float32
    alone = {k: v for k, v in params.items() if "lora_two" not in k}
    assert np.abs(ours - run(small(pair[0]), unflatten_dict(alone, sep="/"))).max() > 1e-3, "negative control"


def test_what_cannot_be_merged_is_named(small):
    for kind in ("houlsby", "parallel", "prefix"):
        with pytest.raises(UserError, match=f"{kind} '.*' is no change of weights.*keep it in config.model.adapters"):
            merge(drawn(small(KINDS[kind])), [KINDS[kind]])
    params = drawn(small(*MERGED))
    with pytest.raises(UserError, match=r"ia3_scales_scale belongs to an adapter that was not named"):
        merge(params, [MERGED[0], MERGED[2]])
    with pytest.raises(UserError, match=r"lora 'absent' is not among the parameters"):
        merge(params, [dict(kind="lora", name="absent")])
    with pytest.raises(UserError, match=r"lora 'low' of rank 9 has shapes \(16, 3\), \(3, 16\)"):
        merge(params, [LORA | dict(rank=9), *MERGED[1:]])
    bias = [KINDS["bias"]]
    plain = drawn(small())
    jax.tree.map(np.testing.assert_array_equal, merge(plain, bias), dict(plain))
    with pytest.raises(UserError, match="bias 'fit' replaced the biases"):
        unmerge(plain, bias, {})
    zeros = {k: v * 0 for k, v in flatten_dict(drawn(small(MERGED[1])), sep="/").items()}
    with pytest.raises(UserError, match="a scale of zero"):
        unmerge(plain, [MERGED[1]], zeros)


# ---- mistakes


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dict(name="x"), r"needs a kind, one of lora, ia3, houlsby, parallel, prefix, bias"),
        (dict(kind="dora", name="x"), r"'dora'.*needs a kind"),
        (dict(kind="lora"), r"lora needs a name"),
        (dict(kind="lora", name="a_b"), r"lora 'a_b': name='a_b' must be letters, digits and -"),
        (dict(kind="lora", name="x", width=3), r"lora has no 'width'; allowed: name, targets, rank, alpha, dropout"),
        (dict(kind="lora", name="x", rank=0), r"lora 'x': rank=0 must be at least 1"),
        (dict(kind="lora", name="x", rank="8"), r"lora: rank='8' must be of type int"),
        (dict(kind="lora", name="x", alpha=0), r"alpha=0 must be above 0"),
        (dict(kind="lora", name="x", dropout=1.0), r"dropout=1.0 must be at least 0 and below 1"),
        (dict(kind="lora", name="x", targets="("), r"targets='\(' must be a regex"),
        (dict(kind="houlsby", name="x", activation="tanh"), r"activation='tanh' must be one of gelu, relu, swish"),
        (dict(kind="parallel", name="x", scale=-1.0), r"scale=-1.0 must be above 0"),
        (dict(kind="prefix", name="x", length=0), r"length=0 must be at least 1"),
    ],
)
def test_mistakes_are_named(block, message):
    with pytest.raises(UserError, match=message):
        parse([block])


def test_targets_that_fit_nothing_are_named(small):
    there = r"there are projection, transformer/layer\*/attention/query, .*mlp_down"
    for targets in ("atention", "attention$"):
        with pytest.raises(UserError, match=rf"lora 'x' finds no dense layer named {re.escape(targets)}; {there}"):
            shapes_of(small(dict(kind="lora", name="x", targets=targets)))


@pytest.mark.parametrize("kind", ["ia3", "houlsby", "parallel", "prefix"])
def test_a_block_that_cannot_host_a_kind_says_so(small, kind):
    with pytest.raises(UserError, match=rf"{kind} '\w+' finds no .*there are projection, transformer/layer\*/input"):
        shapes_of(small(KINDS[kind], block=dict(name="gru")))
    hosted = shapes_of(small(dict(kind="lora", name="x", targets="input$"), block=dict(name="gru")))
    assert "transformer/layer0/input/lora_x_a" in hosted


def test_blocks_name_every_option_and_names_are_used_once():
    assert blocks_of(parse([dict(kind="lora", name="x")])) == [
        dict(kind="lora", name="x", targets="attention/(query|value)$", rank=8, alpha=16.0, dropout=0.0)
    ]
    with pytest.raises(UserError, match="two are named 'low'"):
        parse([LORA, dict(kind="ia3", name="low")])
    with pytest.raises(UserError, match=r"adapters is empty"):
        trainable_pattern([])

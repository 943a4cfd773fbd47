"""What published conformers have and Gulati's have not: no biases, batch norm, clipped distances, a causal convolution.

Parity with `transformers` is in tests/formats/; here each option is held against a loop or a formula.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.models.attention import SelfAttention
from speechjax.models.conformer import ConformerLayer, ConvModule
from speechjax.models.relative import rotate


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LENGTHS = np.array([7, 4], np.int32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_clipped_distances_are_those_of_a_loop(random_params):
    x = noise(2, 7, 8)
    module = SelfAttention(2, options=dict(positions="shaw", before=2, after=1))
    params = random_params(module, x, LENGTHS, train=False)
    ours = np.asarray(module.apply({"params": params}, x, LENGTHS, train=False))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    assert p["distance_table"].shape == (4, 4)

    def attend(clip):
        q, k, v = (
            (x @ p[n]["kernel"] + p[n]["bias"]).reshape(2, 7, 2, 4).astype(np.float64)
            for n in ("query", "key", "value")
        )
        out = np.zeros((2, 7, 8))
        for b in range(2):
            for h in range(2):
                for t in range(LENGTHS[b]):
                    scores = np.array([
                        q[b, t, h] @ (k[b, s, h] + p["distance_table"][min(max(s - t, -2), clip) + 2]) / 2
                        for s in range(LENGTHS[b])
                    ])  # fmt: skip
                    out[b, t, 4 * h : 4 * h + 4] = softmax(scores) @ v[b, : LENGTHS[b], h]
        return out @ p["out"]["kernel"] + p["out"]["bias"]

    expected, other = attend(1), attend(0)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(ours[b, :n], expected[b, :n], atol=2e-5)
        assert np.abs(ours[b, :n] - other[b, :n]).max() > 1e-3, "negative control: clipped elsewhere"


def test_rotated_inputs_are_what_queries_and_keys_are_made_of(random_params):
    x = noise(2, 7, 8)
    plain, turned = (SelfAttention(2, options=dict(positions=kind)) for kind in ("none", "rotary_inputs"))
    params = random_params(plain, x, LENGTHS, train=False)
    ours = turned.apply({"params": params}, x, LENGTHS, train=False)
    # Of values made from the same inputs, attention over rotated ones is plain attention with other queries and keys.
    q = rotate(jnp.asarray(x).reshape(2, 7, 2, 4)).reshape(2, 7, 8)
    dense = lambda name, y: y @ params[name]["kernel"] + params[name]["bias"][None, None]  # noqa: E731
    heads = lambda y: y.reshape(2, 7, 2, 4)  # noqa: E731
    scores = jnp.einsum("bthe,bshe->bhts", heads(dense("query", q)), heads(dense("key", q))) / 2
    valid = jnp.arange(7)[None] < jnp.asarray(LENGTHS)[:, None]
    weights = jax.nn.softmax(jnp.where(valid[:, None, None], scores, -1e30))
    y = jnp.einsum("bhts,bshe->bthe", weights, heads(dense("value", jnp.asarray(x)))).reshape(2, 7, 8)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(np.asarray(ours)[b, :n], np.asarray(dense("out", y))[b, :n], atol=2e-5)


def test_batch_norm_knows_running_statistics_and_learns_from_valid_frames_only():
    x = noise(2, 7, 8)
    module = ConvModule(3, "batch", False, bias=False)
    variables = module.init(jax.random.key(0), x, LENGTHS, True)
    assert set(variables["params"]) == {"pointwise_in", "depthwise_kernel", "norm", "pointwise_out"}
    assert set(variables["params"]["pointwise_in"]) == {"kernel"}
    state = {"norm": dict(mean=jnp.full(8, 0.3), variance=jnp.full(8, 2.0))}
    run = lambda x, train: module.apply(  # noqa: E731
        {"params": variables["params"], "batch_stats": state}, x, LENGTHS, train, mutable="sums"
    )
    quiet, silent = run(x, False)
    assert not silent
    _, sums = run(x, True)
    padded = x.copy()
    padded[1, 4:] = 100.0
    _, same = run(padded, True)
    np.testing.assert_array_equal(sums["sums"]["norm"]["moments"], same["sums"]["norm"]["moments"])
    shifted = module.apply(
        {"params": variables["params"], "batch_stats": {"norm": dict(mean=jnp.zeros(8), variance=jnp.full(8, 2.0))}},
        x, LENGTHS, False,
    )  # fmt: skip
    assert np.abs(np.asarray(quiet - shifted)).max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_a_causal_convolution_under_whole_attention(causal, random_params):
    """What changes in the first frame when the last does: only attention tells it, here of one chunk a frame."""
    layer = ConvModule(5, "layer", causal, bias=False)
    x = noise(1, 7, 8)
    lengths = np.array([7], np.int32)
    params = random_params(layer, x, lengths, False)
    later = x.copy()
    later[0, 4] += 1
    a, b = (np.asarray(layer.apply({"params": params}, y, lengths, False)) for y in (x, later))
    assert (np.abs(a - b)[0, :4].max() > 1e-4) == (not causal)


def test_leaks_are_leaks(random_params):
    x = noise(2, 7, 8)
    padded = x.copy()
    padded[1, 4:] += 1
    for leaky in (False, True):
        layer = ConvModule(5, "layer", False, leaky=leaky)
        params = random_params(layer, x, LENGTHS, False)
        a, b = (np.asarray(layer.apply({"params": params}, y, LENGTHS, False)) for y in (x, padded))
        assert (np.abs(a - b)[1, :4].max() > 1e-4) == leaky


def test_mistakes_are_named():
    shared = dict(
        heads=2, mlp=12, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, dtype=jnp.float32
    )
    with pytest.raises(UserError, match=r"activation='relu'.*swish, gelu"):
        ConformerLayer(**shared, norm="none", activation="relu").init(jax.random.key(0), noise(2, 7, 8), LENGTHS, False)
    with pytest.raises(UserError, match=r"before=-1"):
        SelfAttention(2, options=dict(positions="shaw", before=-1)).init(
            jax.random.key(0), noise(2, 7, 8), LENGTHS, train=False
        )

"""Self-attention against loops over rows and heads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.models.attention import SelfAttention, attention

B, T, H, E = 3, 7, 2, 4
LENGTHS: Any = np.array([7, 3, 0], np.int32)


@pytest.fixture(scope="module")
def qkv():
    return np.random.default_rng(0).normal(size=(3, B, T, H, E)).astype(np.float32)


def test_attention_is_softmax_over_valid_keys(qkv):
    y = np.asarray(jax.jit(lambda qkv: attention(*qkv, lengths=LENGTHS))(qkv))
    q, k, v = np.asarray(qkv, np.float64)
    for b, n in enumerate(LENGTHS[:2]):
        for h in range(H):
            logits = q[b, :, h] @ k[b, :n, h].T / np.sqrt(E)
            weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(y[b, :, h], weights @ v[b, :n, h], atol=1e-6)  # float32


def test_padded_keys_change_nothing_and_valid_ones_do(qkv):
    run = jax.jit(lambda qkv: attention(*qkv, lengths=LENGTHS))
    padded, valid = np.zeros_like(qkv), np.zeros_like(qkv)
    padded[:, 1, 3:], valid[1:, 1, 2] = 5, 5
    base, noisy, other = (np.asarray(run(qkv + change))[1, :3] for change in (0, padded, valid))
    np.testing.assert_array_equal(base, noisy)
    assert np.abs(base - other).max() > 0.1, "negative control"


def test_segments_of_a_packed_row_do_not_see_each_other(qkv):
    ids = np.array([[1, 1, 1, 2, 2, 2, 2], [0, 1, 0, 2, 2, 0, 3], [0] * 7], np.int32)
    run = jax.jit(lambda ids: attention(*qkv, lengths=ids))
    y = np.asarray(run(ids))
    assert np.isfinite(y).all()
    q, k, v = np.asarray(qkv, np.float64)
    for b, h, t in np.argwhere(np.repeat(ids[:, None] > 0, H, axis=1)):
        seen = ids[b] == ids[b, t]
        weights = np.exp(k[b, seen, h] @ q[b, t, h] / np.sqrt(E))
        np.testing.assert_allclose(y[b, t, h], weights @ v[b, seen, h] / weights.sum(), atol=1e-6)  # float32
    assert np.abs(run((ids > 0).astype(np.int32)) - y)[0].max() > 0.1, "negative control: one segment"


def test_an_empty_row_stays_finite_also_backward(qkv):
    def loss(qkv):
        return jnp.sum(attention(*qkv, lengths=LENGTHS) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(qkv)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_softmax_runs_in_float32(qkv):
    jaxpr, out = jax.make_jaxpr(lambda x: attention(*x, lengths=LENGTHS), return_shape=True)(jnp.bfloat16(qkv))
    assert "f32[3,2,7,7] = exp" in str(jaxpr)
    assert out.dtype == jnp.bfloat16


def test_self_attention_projects_heads(random_params):
    D = H * E
    module = SelfAttention(heads=H)
    x = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    params = random_params(module, x, LENGTHS, train=False)
    dense = lambda name, x: np.asarray(x) @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])  # noqa: E731
    qkv = np.stack([dense(name, x).reshape(B, T, H, E) for name in ("query", "key", "value")])
    mixed = jax.jit(lambda qkv: attention(*qkv, lengths=LENGTHS))(qkv)
    ours = jax.jit(lambda x: module.apply({"params": params}, x, LENGTHS, train=False))(x)
    np.testing.assert_allclose(ours, dense("out", np.asarray(mixed).reshape(B, T, D)), atol=1e-5)  # float32
    assert params["query"]["kernel"].shape == (D, D)

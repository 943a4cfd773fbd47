"""Self-attention against loops over rows and heads."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.models.attention import SelfAttention, attention

B, T, H, E = 3, 7, 2, 4
LENGTHS = jnp.array([7, 3, 0], jnp.int32)


@pytest.fixture(scope="module")
def qkv():
    return jax.random.normal(jax.random.key(0), (3, B, T, H, E))


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
    base = run(qkv)
    padded = run(qkv.at[:, 1, 3:].add(5.0))
    np.testing.assert_array_equal(base[1, :3], padded[1, :3])
    assert np.abs(base - run(qkv.at[1:, 1, 2].add(5.0)))[1, :3].max() > 0.1, "negative control"


def test_an_empty_row_stays_finite_also_backward(qkv):
    def loss(qkv):
        return jnp.sum(attention(*qkv, lengths=LENGTHS) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(qkv)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_softmax_runs_in_float32(qkv):
    text = str(jax.make_jaxpr(lambda x: attention(*x, lengths=LENGTHS))(qkv.astype(jnp.bfloat16)))
    assert "f32[3,2,7,7] = exp" in text
    out = jax.eval_shape(lambda: attention(*qkv.astype(jnp.bfloat16), lengths=LENGTHS))
    assert out.dtype == jnp.bfloat16


def test_dropout_acts_on_the_weights_in_training_only(qkv):
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, qkv, deterministic):
            return attention(*qkv, lengths=LENGTHS, dropout=nn.Dropout(0.5), deterministic=deterministic)

    ones = qkv.at[2].set(1.0)
    apply = lambda deterministic, seed: Dropped().apply(  # noqa: E731
        {}, ones, deterministic, rngs={"dropout": jax.random.key(seed)}
    )
    run = jax.jit(apply, static_argnums=0)
    np.testing.assert_allclose(run(True, 0), 1, rtol=1e-6)
    assert np.asarray(run(False, 0)).std() > 0.1
    np.testing.assert_array_equal(run(False, 0), run(False, 0))
    assert (np.asarray(run(False, 0)) != np.asarray(run(False, 1))).any()


def test_self_attention_projects_heads(random_params):
    D = H * E
    module = SelfAttention(heads=H)
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    params = random_params(module, x, LENGTHS, train=False)
    dense = lambda name, x: np.asarray(x) @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    qkv = np.stack([dense(name, x).reshape(B, T, H, E) for name in ("query", "key", "value")])
    mixed = jax.jit(lambda qkv: attention(*qkv, lengths=LENGTHS))(qkv)
    ours = jax.jit(lambda x: module.apply({"params": params}, x, LENGTHS, train=False))(x)
    np.testing.assert_allclose(ours, dense("out", mixed.reshape(B, T, D)), atol=1e-5)  # float32
    assert params["query"]["kernel"].shape == (D, D)

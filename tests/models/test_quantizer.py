"""The Gumbel quantizer against closed forms in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from speechjax.models.quantizer import GumbelQuantizer, perplexity

N, G, V, DIM, WIDTH = 5, 2, 6, 8, 4
QUANTIZER = GumbelQuantizer(codebooks=G, codes=V, dim=DIM)


@pytest.fixture(scope="module")
def setting(random_params):
    """Parameters, input [N, WIDTH] and fixed Gumbel noise [N, G, V]."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(2 * rng.normal(size=(N, WIDTH)), jnp.float32)
    noise = jnp.asarray(rng.gumbel(size=(N, G, V)), jnp.float32)
    return random_params(QUANTIZER, x, jnp.float32(1), train=False), x, noise


def apply(params, x, temperature, seed, train) -> Any:
    rngs = {"gumbel": jax.random.key(seed)}
    return QUANTIZER.apply({"params": params}, x, temperature, train=train, rngs=rngs)


jit_apply = jax.jit(apply, static_argnames="train")


def quantize(params, x, temperature=1.0, *, train, seed=0):
    return jit_apply(params, x, jnp.float32(temperature), seed, train)


def quantize_with(noise, monkeypatch):
    """`quantize` in training with this noise instead of drawn noise."""
    monkeypatch.setattr(jax.random, "gumbel", lambda key, shape: noise)
    return lambda params, x, temperature: apply(params, x, jnp.float32(temperature), 0, True)


def logits_of(params, x) -> np.ndarray:
    kernel, bias = (np.asarray(params["logits"][k], np.float64) for k in ("kernel", "bias"))
    return (np.asarray(x, np.float64) @ kernel + bias).reshape(len(x), G, V)


def soft_choice(params, x, noise, temperature) -> np.ndarray:
    z = (logits_of(params, x) + np.asarray(noise, np.float64)) / temperature
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def look_up(params, codes) -> np.ndarray:
    book = np.asarray(params["codebook"])
    return np.stack([np.concatenate([book[g, row[g]] for g in range(G)]) for row in np.asarray(codes)])


def test_evaluation_takes_the_likeliest_codeword_of_each_codebook(setting):
    params, x, _ = setting
    out = quantize(params, x, train=False)
    logits = logits_of(params, x)
    np.testing.assert_array_equal(out.codes, logits.argmax(axis=-1))
    assert out.codes.dtype == jnp.int32
    np.testing.assert_array_equal(out.vectors, look_up(params, out.codes))
    np.testing.assert_allclose(out.probs, soft_choice(params, x, 0, 1), atol=1e-6)  # float32
    other = quantize(params, x, temperature=9.0, train=False)
    np.testing.assert_array_equal(out.codes, other.codes)


def test_training_chooses_by_noise_but_returns_codewords_and_noiseless_probabilities(setting, monkeypatch):
    params, x, noise = setting
    out = jax.jit(quantize_with(noise, monkeypatch))(params, x, 2.0)
    np.testing.assert_array_equal(out.codes, soft_choice(params, x, noise, 2.0).argmax(axis=-1))
    assert (np.asarray(out.codes) != logits_of(params, x).argmax(axis=-1)).any(), "the noise must matter"
    np.testing.assert_array_equal(out.vectors, look_up(params, out.codes))
    np.testing.assert_allclose(out.probs, soft_choice(params, x, 0, 1), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradient_is_that_of_the_soft_choice(setting, monkeypatch, temperature):
    params, x, noise = setting
    choose = quantize_with(noise, monkeypatch)
    weight = np.random.default_rng(0).normal(size=(N, DIM))

    def hard(x):
        return jnp.sum(choose(params, x, temperature).vectors * jnp.asarray(weight, jnp.float32))

    def soft(x, temperature):
        choice = soft_choice(params, x, noise, temperature)
        return np.sum(np.einsum("ngv,gvc->ngc", choice, np.asarray(params["codebook"])).reshape(N, DIM) * weight)

    def finite_differences(temperature):
        point, step = np.asarray(x, np.float64), 1e-5
        gradient = np.zeros_like(point)
        for i in np.ndindex(*point.shape):
            shift = np.zeros_like(point)
            shift[i] = step
            gradient[i] = (soft(point + shift, temperature) - soft(point - shift, temperature)) / (2 * step)
        return gradient

    ours, expected = np.asarray(jax.jit(jax.grad(hard))(x)), finite_differences(temperature)
    scale = np.abs(expected).max()
    assert scale > 0.01
    np.testing.assert_allclose(ours, expected, atol=1e-5 * scale)  # float32
    assert np.abs(ours - finite_differences(temperature * 1.3)).max() > 0.05 * scale, "negative control"


def test_gradient_of_the_codebook_goes_to_the_chosen_codewords(setting, monkeypatch):
    params, x, noise = setting
    choose = quantize_with(noise, monkeypatch)
    loss = lambda p: jnp.sum(choose(p, x, 2.0).vectors)  # noqa: E731
    gradient = np.asarray(jax.jit(jax.grad(loss))(params)["codebook"])
    codes = soft_choice(params, x, noise, 2.0).argmax(axis=-1)
    expected = np.stack([np.bincount(codes[:, g], minlength=V) for g in range(G)])
    np.testing.assert_allclose(gradient, np.broadcast_to(expected[..., None], gradient.shape), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_codes_are_drawn_from_the_softmax_at_any_temperature(setting, temperature):
    """The maximum of logits plus Gumbel noise is a draw from their softmax; temperature only shapes the gradient."""
    params, x, _ = setting
    many = jnp.broadcast_to(x[:1], (4000, WIDTH))
    codes = np.asarray(quantize(params, many, temperature, train=True, seed=3).codes)
    for g in range(G):
        expected = soft_choice(params, x[:1], 0, 1)[0, g] * len(codes)
        seen = np.bincount(codes[:, g], minlength=V)
        often = expected > 5  # where chi-square holds
        assert stats.chisquare(seen[often], expected[often] * seen[often].sum() / expected[often].sum()).pvalue > 1e-3
        assert stats.chisquare(seen, np.full(V, len(codes) / V)).pvalue < 1e-9, "negative control: not uniform"


def test_noise_follows_the_key(setting):
    params, x, _ = setting
    first, again, other = (quantize(params, x, 2.0, train=True, seed=s).codes for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_float32_whatever_comes_in(setting):
    params, x, _ = setting
    out = jax.eval_shape(lambda: quantize(params, x.astype(jnp.bfloat16), train=True))
    assert out.vectors.dtype == out.probs.dtype == jnp.float32


def test_perplexity_counts_the_codes_in_use():
    uniform = jnp.full((V,), 1 / V)
    half = jnp.array([0.5, 0.5, 0, 0, 0, 0])
    values = perplexity(jnp.stack([uniform, jnp.eye(V)[2], half]))
    np.testing.assert_allclose(values, [V, 1, 2], rtol=1e-6)  # float32


def test_perplexity_gradient():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    entropy = -np.sum(p * np.log(p))
    expected = -np.exp(entropy) * (np.log(p) + 1)
    np.testing.assert_allclose(jax.jit(jax.grad(perplexity))(jnp.asarray(p, jnp.float32)), expected, rtol=1e-5)


def test_perplexity_gradient_is_finite_where_a_code_has_probability_zero():
    """A softmax underflows to zero, so this happens: log(0) times zero must not become NaN."""

    def through_softmax(logits):
        return perplexity(jax.nn.softmax(logits))

    logits = jnp.array([0.0, 1.0, -200.0])
    assert jax.nn.softmax(logits)[2] == 0
    slope = jax.jit(jax.grad(through_softmax))
    gradient = np.asarray(slope(logits))
    np.testing.assert_allclose(gradient[:2], slope(logits[:2]), rtol=1e-5)
    assert gradient[2] == 0


@pytest.mark.parametrize("probs", [np.zeros(V), np.eye(V)[0]], ids=["nothing masked", "one code"])
def test_perplexity_is_finite_at_the_edges(probs):
    value, gradient = jax.jit(jax.value_and_grad(perplexity))(jnp.asarray(probs, jnp.float32))
    assert value == 1
    assert np.isfinite(gradient).all()

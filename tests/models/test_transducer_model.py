"""Predictors and joiner of transducers: whole texts and token by token, against loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.models.transducer import TransducerNetwork
from tests.drawing import draw_params

V, J, P, D = 7, 6, 5, 4
TEXT = np.array([[4, 5, 4, 6], [6, 4, 0, 0]], np.int32)
KINDS = {"ghodsi": ("stateless", 1), "two": ("stateless", 2), "three": ("stateless", 3), "lstm": ("lstm", 2)}


def network(kind: str = "two", durations: tuple[int, ...] = ()) -> TransducerNetwork:
    name, depth = KINDS[kind]
    return TransducerNetwork(
        classes=V, durations=durations, predictor=name, predictor_width=P, predictor_depth=depth, width=J
    )


def everything(net: TransducerNetwork, x: Any, tokens: Any) -> Any:
    return net.joint()(net.frames(x)[:, :, None], net.texts(tokens)[:, None])


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    """By kind: noise in the shapes that `init` makes, far from linear."""
    found = {}
    for kind in KINDS:
        init = lambda kind=kind: network(kind, (0, 1)).init(  # noqa: E731
            jax.random.key(0), noise(2, 3, D), TEXT, method=everything
        )
        found[kind] = jax.tree.map(lambda p: 2 * np.asarray(p), draw_params(jax.eval_shape(init)["params"]))
    return found


def texts(kind: str, params: Any, tokens: Any) -> Any:
    return np.asarray(network(kind, (0, 1)).apply({"params": params[kind]}, tokens, method="texts"))


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_is_the_whole_text(kind, params):
    net, variables = network(kind, (0, 1)), {"params": params[kind]}
    whole = texts(kind, params, TEXT)
    assert whole.shape == (2, 5, J)

    @jax.jit
    def spelled(shape_of):
        state, g = net.apply(variables, shape_of.shape, method="begin")
        found = [g]
        for u in range(4):
            tokens = jnp.broadcast_to(TEXT[:, None, u], (2, 3))  # three beams
            state, g = net.apply(variables, state, tokens, method="step")
            found.append(g)
        return jnp.stack(found, axis=2)

    steps = np.asarray(spelled(np.zeros((2, 3))))
    for beam in range(3):
        np.testing.assert_allclose(steps[:, beam], whole, atol=1e-6)  # the same float32 products, in other shapes


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_prefix_sees(kind, params):
    """All before it and nothing after; of those, a stateless predictor the last `predictor_depth`."""
    whole = texts(kind, params, TEXT)
    for changed in range(4):
        other = TEXT.copy()
        other[:, changed] = 3
        differs = (np.abs(texts(kind, params, other) - whole) > 1e-6).any(axis=(0, 2))
        reach = 4 if kind == "lstm" else KINDS[kind][1]
        assert differs.tolist() == [changed < u <= changed + reach for u in range(5)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_lstm_is_gravess(params):
    """Two layers, one token after another, in float64; the gates are i, f, g, o as Hochreiter's with forget gates."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["lstm"])
    x = p["embedding"]["embedding"][[0, *TEXT[0]]]
    for layer in range(2):
        cell, h, c, out = p[f"recurrent_{layer}"]["cell"], np.zeros(P), np.zeros(P), []
        for frame in x:
            gates = {
                k: frame @ cell[f"i{k}"]["kernel"] + h @ cell[f"h{k}"]["kernel"] + cell[f"h{k}"]["bias"] for k in "ifgo"
            }
            c = sigmoid(gates["f"]) * c + sigmoid(gates["i"]) * np.tanh(gates["g"])
            h = sigmoid(gates["o"]) * np.tanh(c)
            out.append(h)
        x = np.array(out)
    np.testing.assert_allclose(texts("lstm", params, TEXT)[0], x @ p["text_projection"]["kernel"], atol=2e-6)  # float32


def test_stateless_is_an_embedding_or_a_convolution(params):
    p = params["ghodsi"]
    expected = p["embedding"]["embedding"][np.array([0, 4, 5, 4, 6])] @ p["text_projection"]["kernel"]
    np.testing.assert_allclose(texts("ghodsi", params, TEXT)[0], expected, atol=1e-6)
    assert "convolution" not in p
    p = params["three"]
    x = np.asarray(p["embedding"]["embedding"])[[0, 0, 0, *TEXT[0]]]
    kernel = np.asarray(p["convolution"]["kernel"]).reshape(3, P, P)
    hidden = [sum(x[u + i] @ kernel[i] for i in range(3)) + p["convolution"]["bias"] for u in range(5)]
    expected = np.maximum(np.array(hidden), 0) @ p["text_projection"]["kernel"]
    np.testing.assert_allclose(texts("three", params, TEXT)[0], expected, atol=1e-6)


def test_the_joint_is_one_hidden_layer(params):
    p, x = params["two"], noise(2, 3, D)
    logits = network("two", (0, 1)).apply({"params": p}, x, TEXT, method=everything)
    assert logits.shape == (2, 3, 5, V + 2), "durations beside the tokens"
    f = x @ p["frame_projection"]["kernel"] + p["frame_projection"]["bias"]
    g = texts("two", params, TEXT)
    expected = np.tanh(f[1, 2] + g[1, 4]) @ p["kernel"] + p["bias"]
    np.testing.assert_allclose(logits[1, 2, 4], expected, atol=1e-5)


def test_mistakes_are_named():
    for changes in (dict(predictor="gru"), dict(predictor_depth=0)):
        net = network().clone(**changes)
        with pytest.raises(UserError, match=r"config\.task\.predictor=.*choose from stateless, lstm, with a depth"):
            net.init(jax.random.key(0), noise(2, 3, D), TEXT, method=everything)

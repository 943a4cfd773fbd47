"""The decoder: whole sequences against a plain reference, token by token against whole, and what it must not see."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.models.decoder import Memory, TransformerDecoder, make_decoder
from tests.drawing import draw_params

B, U, T, V = 3, 6, 5, 11
BLOCK: dict[str, Any] = dict(
    width=16, layers=2, heads=2, mlp=24, norm="pre", tied=False, dropout=0.0, attention_dropout=0.0
)
LENGTHS = np.array([5, 2, 0], np.int32)
KINDS = {
    "pre": (dict(), True),
    "post": (dict(norm="post", tied=True), True),
    "language model": (dict(tied=True), False),
}


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and frames of another width than the decoder's."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, (B, U)).astype(np.int32), rng.normal(size=(B, T, 12)).astype(np.float32)


@functools.cache
def made(kind: str) -> tuple[TransformerDecoder, Any, Any]:
    """(decoder, its parameters, `run(tokens, frames, train=False, key=0)` -> logits) of one of KINDS."""
    changes, listens = KINDS[kind]
    decoder = make_decoder(BLOCK | changes, classes=V, listens=listens, dtype="float32")

    # What creates the parameters is both: reading the frames, and the tokens.
    def whole(decoder, tokens, frames, lengths, train):
        memory = decoder.listen(frames, lengths) if listens else None
        return decoder(tokens, memory, train=train)

    keys = {"params": jax.random.key(0)}
    shapes = jax.eval_shape(lambda: decoder.init(keys, *inputs(), LENGTHS, False, method=whole))["params"]
    params = draw_params(shapes)

    @functools.partial(jax.jit, static_argnums=2)
    def run(tokens, frames, train=False, key=0):
        rngs = {"dropout": jax.random.key(key)}
        return decoder.apply({"params": params}, tokens, frames, LENGTHS, train, rngs=rngs, method=whole)

    return decoder, params, run


def memory_of(kind: str, frames: np.ndarray) -> Memory | None:
    decoder, params, _ = made(kind)
    if not KINDS[kind][1]:
        return None
    out: Any = jax.jit(lambda f: decoder.apply({"params": params}, f, LENGTHS, method="listen"))(frames)
    return out


# ------------------------------------------------------------------------------------------- reference


def normed(x: np.ndarray, p: Any) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(x: np.ndarray, p: Any) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def attended(x: np.ndarray, y: np.ndarray, p: Any, causal: bool) -> np.ndarray:
    """[U, D] to [S, D], heads one after the other."""
    q, k, v = dense(x, p["query"]), dense(y, p["key"]), dense(y, p["value"])
    out = np.zeros((len(x), q.shape[1]))
    size = q.shape[1] // BLOCK["heads"]
    for h in range(BLOCK["heads"]):
        own = slice(h * size, (h + 1) * size)
        for t in range(len(x)):
            seen = slice(0, t + 1 if causal else len(y))
            weights = np.exp(k[seen, own] @ q[t, own] / np.sqrt(size))
            out[t, own] = weights @ v[seen, own] / weights.sum()
    return dense(out, p["out"])


def reference(kind: str, tokens: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Logits of one row in float64: [U], [T, any] (valid frames only) -> [U, V]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), made(kind)[1])
    pre, D = (BLOCK | KINDS[kind][0])["norm"] == "pre", BLOCK["width"]
    rates = 10000.0 ** (-np.arange(D // 2) / (D // 2))
    angle = np.arange(len(tokens))[:, None] * rates
    x = p["embedding"][tokens] * np.sqrt(D) + np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    for i in range(BLOCK["layers"]):
        layer = p[f"layer{i}"]
        branches = [("attention_norm", lambda y: attended(y, y, layer["attention"], True))]  # noqa: B023
        if KINDS[kind][1]:
            branches += [("listening_norm", lambda y: attended(y, frames, layer["listening"], False))]  # noqa: B023
        up, down = layer["mlp_up"], layer["mlp_down"]
        branches += [("mlp_norm", lambda y: dense(np.maximum(dense(y, up), 0), down))]  # noqa: B023
        for norm, branch in branches:
            x = x + branch(normed(x, layer[norm])) if pre else normed(x + branch(x), layer[norm])
    x = normed(x, p["out_norm"]) if pre else x
    return x @ p["embedding"].T if (BLOCK | KINDS[kind][0])["tied"] else dense(x, p["out"])


@pytest.mark.parametrize("kind", KINDS)
def test_whole_sequences_are_the_published_transformer(kind):
    tokens, frames = inputs()
    logits = np.asarray(made(kind)[2](tokens, frames))
    assert logits.dtype == np.float32
    for b, n in enumerate(LENGTHS[:2]):
        expected = reference(kind, tokens[b], frames[b, :n].astype(np.float64))
        np.testing.assert_allclose(logits[b], expected, atol=2e-5)  # float32
        assert np.abs(expected - reference(kind, tokens[b][::-1], frames[b, :n])).max() > 0.1, "negative control"


# ------------------------------------------------------------------------------------------- token by token


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_is_the_whole_sequence(kind):
    """Two hypotheses a row, the second of which waits at times, beside noise in the padding of the frames."""
    decoder, params, run = made(kind)
    (first, frames), (second, _) = inputs(), inputs(1)
    noisy = np.where(np.arange(T)[None, :, None] < LENGTHS[:, None, None], frames, 50 * frames[::-1])
    memory = memory_of(kind, noisy)
    step = jax.jit(lambda t, c: decoder.apply({"params": params}, t, c, memory, method="step"))
    cache: Any = decoder.start(B, 2, U)
    found, read = np.full((2, B, U, V), np.nan, np.float32), [0, 0]
    for now in range(2 * U - 2):
        waits = (now >= U, now % 2 == 1 or now < 2)
        token = [np.full(B, -1) if w else x[:, n] for x, n, w in zip((first, second), read, waits, strict=True)]
        logits, cache = step(np.stack(token, axis=1).astype(np.int32), cache)
        for k, wait in enumerate(waits):
            if not wait:
                found[k, :, read[k]] = logits[:, k]
                read[k] += 1
    assert read == [U, U - 2]
    assert cache.position.tolist() == [[U, U - 2]] * B
    for tokens, logits, n in zip((first, second), found, read, strict=True):
        expected = np.asarray(run(tokens, frames))
        np.testing.assert_allclose(logits[:, :n], expected[:, :n], atol=1e-5)  # float32, sums in another order
    assert np.abs(found[0, :, :4] - found[1, :, :4]).max() > 0.1, "negative control: other tokens"


def test_a_cache_follows_hypotheses_that_change_places():
    decoder, params, _ = made("pre")
    tokens, frames = inputs()
    memory = memory_of("pre", frames)
    step = jax.jit(lambda t, c: decoder.apply({"params": params}, t, c, memory, method="step"))
    both = np.stack([tokens, inputs(1)[0]], axis=1)  # [B, K, U]
    cache: Any = decoder.start(B, 2, U)
    for u in range(3):
        _, cache = step(both[:, :, u], cache)
    swapped = jax.tree.map(lambda x: x[:, ::-1], cache)
    last = both[:, :, 3]
    kept, moved = (np.asarray(step(t, c)[0]) for t, c in ((last, cache), (last[:, ::-1], swapped)))
    np.testing.assert_allclose(moved[:, ::-1], kept, atol=1e-6)
    assert np.abs(np.asarray(step(last[:, ::-1], cache)[0])[:, ::-1] - kept).max() > 0.1, "negative control"


def test_more_tokens_than_there_is_room_for_leave_the_cache_alone():
    decoder, params, _ = made("language model")
    cache: Any = decoder.start(B, 1, 2)
    step = jax.jit(lambda t, c: decoder.apply({"params": params}, t, c, None, method="step"))
    for u in range(3):
        before = cache
        _, cache = step(inputs()[0][:, u : u + 1], cache)
    np.testing.assert_array_equal(cache.keys[1], before.keys[1])
    assert cache.position.tolist() == [[3]] * B


# ------------------------------------------------------------------------------------------- what is seen


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_later_and_no_padding_is_seen(kind):
    run = made(kind)[2]
    tokens, frames = inputs()
    quiet = np.asarray(run(tokens, frames))
    later = tokens.copy()
    later[:, 4:] = 10**6 * (1 - 2 * (np.arange(B)[:, None] % 2))  # ids that no vocabulary has
    found = np.asarray(run(later, frames))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:, :4], quiet[:, :4])
    assert np.abs(found[:, 4:] - quiet[:, 4:]).max() > 0.01, "negative control"
    noise = np.where(np.arange(T)[None, :, None] < LENGTHS[:, None, None], frames, 50 * frames[::-1])
    np.testing.assert_array_equal(run(tokens, noise), quiet)
    if KINDS[kind][1]:
        heard = frames.copy()
        heard[:, 0] += 1
        other = np.asarray(run(tokens, heard))
        assert (np.abs(other - quiet).max(axis=(1, 2)) > 0.01).tolist() == [True, True, False], "row 2 has no frames"


def test_dropout_is_for_training():
    changes = dict(tied=True, dropout=0.5, attention_dropout=0.5)
    decoder = make_decoder(BLOCK | changes, classes=V, listens=False, dtype="float32")
    _, params, _ = made("language model")
    tokens, _ = inputs()

    @functools.partial(jax.jit, static_argnums=0)
    def apply(train, key):
        rngs = {"dropout": jax.random.key(key)}
        return decoder.apply({"params": params}, tokens, None, train=train, rngs=rngs)

    np.testing.assert_array_equal(apply(False, 0), apply(False, 1))
    assert np.abs(np.asarray(apply(True, 0)) - np.asarray(apply(True, 1))).max() > 0.1


def test_in_bfloat16_the_logits_are_float32():
    decoder = make_decoder(BLOCK | dict(tied=True), classes=V, listens=False, dtype="bfloat16")
    _, params, run = made("language model")
    tokens, frames = inputs()
    logits: Any = jax.jit(lambda t: decoder.apply({"params": params}, t, None, train=False))(tokens)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - np.asarray(run(tokens, frames)))
    assert 1e-4 < error.max() < 0.15, "eight bits, and not none"


def test_mistakes_are_named():
    def make(**changes):
        decoder = make_decoder(BLOCK | changes, classes=V, listens=False, dtype="float32")
        return jax.eval_shape(lambda: decoder.init(jax.random.key(0), inputs()[0], None, train=False))

    with pytest.raises(UserError, match=r"decoder\.norm='both': choose pre or post"):
        make(norm="both")
    with pytest.raises(UserError, match=r"decoder\.width=15 must be"):
        make(width=15)
    with pytest.raises(UserError, match=r"unknown or missing: \['layres'\]"):
        make(layres=2)
    with pytest.raises(UserError, match=r"unknown or missing: \['heads'\]"):
        make_decoder({k: v for k, v in BLOCK.items() if k != "heads"}, classes=V, listens=False, dtype="float32")
    decoder, params, _ = made("pre")
    with pytest.raises(ValueError, match="needs a memory"):
        decoder.apply({"params": params}, inputs()[0], None, train=False)

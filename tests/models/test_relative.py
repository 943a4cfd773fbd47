"""Positions inside attention against loops over queries and keys, and which keys a chunk sees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.models.attention import SelfAttention, attention
from speechjax.models.relative import (
    AttentionOptions,
    SharedBias,
    alibi_slopes,
    distance_buckets,
    relative_shift,
    rotate,
)

B, T, H, E = 2, 9, 2, 6
D = H * E
LENGTHS: Any = np.array([9, 4], np.int32)
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
BUCKETS = dict(positions="buckets", buckets=8, max_distance=6)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_relative_shift_looks_up_the_distance(frames):
    scores = np.random.default_rng(frames).normal(size=(3, 2, frames, 2 * frames - 1)).astype(np.float32)
    shifted = np.asarray(jax.jit(relative_shift)(scores))
    assert shifted.shape == (3, 2, frames, frames)
    for t in range(frames):
        for s in range(frames):
            np.testing.assert_array_equal(shifted[..., t, s], scores[..., t, frames - 1 + s - t])


# ---- each kind by its formula.  A formula gets (params of attention, of the shared bias, frames [T, D], queries and
# keys [T, E] of head h) and gives the logits [T, T]; key and query meet at (t, s) one by one.


def each(frames, logit):
    return np.array([[logit(t, s) for s in range(frames)] for t in range(frames)])


def sinusoid(position, width):
    angle = position * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)])


def none(p, shared, x, q, k, h):
    return q @ k.T / np.sqrt(E)


def rotary(p, shared, x, q, k, h):
    """As complex numbers: the pair of a frequency is one number, and only the angle between two frames is left."""
    a, b = (z[:, : E // 2] + 1j * z[:, E // 2 :] for z in (q, k))
    frequency = 10000.0 ** (-np.arange(E // 2) / (E // 2))
    return each(len(x), lambda t, s: np.sum(a[t] * np.conj(b[s]) * np.exp(1j * (t - s) * frequency)).real / np.sqrt(E))


def alibi(p, shared, x, q, k, h):
    slope = max(shared["scale"][h], 0) * 2.0 ** (-8 * (h + 1) / H)
    return none(p, shared, x, q, k, h) - each(len(x), lambda t, s: slope * abs(t - s))


def bucket(distance):
    """Eight buckets, distance 6: a side has 0, 1, then [2, 3.46), [3.46, ...); keys to the right start at 4."""
    return (4 if distance > 0 else 0) + {0: 0, 1: 1, 2: 2, 3: 2}.get(abs(distance), 3)


def buckets(p, shared, x, q, k, h):
    return none(p, shared, x, q, k, h) + each(len(x), lambda t, s: shared["table"][bucket(s - t), h])


def gated(p, shared, x, q, k, h):
    def gate(t):
        scores = x[t, h * E : (h + 1) * E] @ p["gate"]["kernel"] + p["gate"]["bias"]
        update, reset = 1 / (1 + np.exp(-scores.reshape(2, 4).sum(axis=1)))
        return update * (reset * p["gate_scale"][h] - 1) + 2

    return none(p, shared, x, q, k, h) + each(len(x), lambda t, s: gate(t) * shared["table"][bucket(s - t), h])


def relative(p, shared, x, q, k, h):
    """Transformer-XL's terms (a) to (d)."""

    def logit(t, s):
        by_distance = (sinusoid(t - s, D) @ p["distance"]["kernel"])[h * E : (h + 1) * E]
        content, distance = q[t] + p["content_bias"][h], q[t] + p["distance_bias"][h]
        return (content @ k[s] + distance @ by_distance) / np.sqrt(E)

    return each(len(x), logit)


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "none": (dict(positions="none"), none),
    "rotary": (dict(positions="rotary"), rotary),
    "alibi": (dict(positions="alibi"), alibi),
    "buckets": (BUCKETS, buckets),
    "gated": (BUCKETS | dict(gated=True), gated),
    "relative": (dict(positions="relative"), relative),
}


@pytest.mark.parametrize("kind", KINDS)
def test_self_attention_is_its_formula(random_params, kind):
    options, formula = KINDS[kind]
    module, shared_module = SelfAttention(H, options=options), SharedBias(H, AttentionOptions(**options))
    params = random_params(module, X, LENGTHS, train=False, bias=jnp.zeros((H, T, T)))
    shapes = jax.eval_shape(lambda: shared_module.init(jax.random.key(0), T))
    shared = random_params(shared_module, T) if shapes else {}
    # Large enough to matter, also with one sign wrong.
    params, shared = jax.tree.map(lambda a: 2 * a, (params, shared))

    @jax.jit
    def run(x):
        bias = shared_module.apply({"params": shared}, T)
        assert (bias is None) == (kind in ("none", "rotary", "relative"))
        return module.apply({"params": params}, x, LENGTHS, train=False, bias=bias)

    y = np.asarray(run(X))
    p, tables = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, shared))
    x = X.astype(np.float64)
    flipped = 0.0
    for b, n in enumerate(LENGTHS):
        q, k, v = (
            (x[b, :n] @ p[name]["kernel"] + p[name]["bias"]).reshape(n, H, E) for name in ("query", "key", "value")
        )
        mixed, mirrored = np.zeros((2, n, H, E))
        for h in range(H):
            logits = formula(p, tables, x[b, :n], q[:, h], k[:, h], h)
            weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            mixed[:, h] = weights @ v[:, h]
            # The same frames in reverse order: every distance has the other sign.
            other = formula(p, tables, x[b, :n][::-1], q[::-1, h], k[::-1, h], h)[::-1, ::-1]
            mirrored[:, h] = np.exp(other) / np.exp(other).sum(axis=1, keepdims=True) @ v[:, h]
        out = lambda z, n=n: z.reshape(n, D) @ p["out"]["kernel"] + p["out"]["bias"]  # noqa: E731
        np.testing.assert_allclose(y[b, :n], out(mixed), atol=3e-5)  # float32 of values up to 10
        flipped = max(flipped, np.abs(out(mirrored) - out(mixed)).max())
    if kind in ("none", "alibi"):
        assert flipped < 1e-9, "without direction"
    else:
        assert flipped > 0.01, "negative control: left is not right"


@pytest.mark.parametrize("kind", ["gated", "relative"])
def test_fresh_biases_are_mild(kind):
    """Gate 1 from sigmoids of nearly 0, so 1.75; no preference of contents or distances."""
    module = SelfAttention(H, options=KINDS[kind][0])
    init = lambda: module.init(jax.random.key(0), X, LENGTHS, train=False, bias=jnp.zeros((H, T, T)))["params"]  # noqa: E731
    params = jax.jit(init)()
    if kind == "gated":
        np.testing.assert_array_equal(params["gate_scale"], 1)
        assert 0.01 < np.std(params["gate"]["kernel"]) < 0.03
        assert not np.any(params["gate"]["bias"])
    else:
        assert not np.any(params["content_bias"])
        assert not np.any(params["distance_bias"])


def test_alibi_slopes_of_every_number_of_heads():
    np.testing.assert_allclose(alibi_slopes(8), 0.5 ** np.arange(1, 9))
    twelve = [*0.5 ** np.arange(1, 9), 0.5**0.5, 0.5**1.5, 0.5**2.5, 0.5**3.5]
    np.testing.assert_allclose(alibi_slopes(12), twelve)
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])


def test_a_negative_alibi_scale_favours_nothing_far():
    bias = SharedBias(2, AttentionOptions(positions="alibi")).apply({"params": {"scale": jnp.array([-3.0, 1.0])}}, 4)
    assert not np.any(bias[0])
    assert np.all(np.asarray(bias[1])[0, 1:] < 0)


def test_buckets_of_a_hand_made_table():
    far = [-100, -7, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 7]
    np.testing.assert_array_equal(distance_buckets(np.array(far), 8, 6), [bucket(d) for d in far])
    sides = distance_buckets(np.arange(-1000, 1001), 320, 800)
    assert sides.min() == 0
    assert sides.max() == 319
    np.testing.assert_array_equal(sides[:1000][::-1] + 160, sides[1001:])


def test_rotation_is_exact_far_into_a_row_also_of_bfloat16():
    """Two frames at distance 3, at the start and 3000 frames later: in bfloat16 angles they would not match."""
    x = np.random.default_rng(1).normal(size=(1, 1, 1, 8)).astype(np.float32)
    turned = np.asarray(jax.jit(lambda x: rotate(jnp.broadcast_to(x, (1, 3004, 1, 8))))(x))[0, :, 0]
    near, far = turned[0] @ turned[3], turned[3000] @ turned[3003]
    assert near == pytest.approx(far, abs=2e-3)  # float32 angles of 3000 radians: 2e-4, times the norm of 8
    assert abs(near - turned[0] @ turned[0]) > 0.1, "negative control: another distance"
    half = rotate(jnp.bfloat16(np.broadcast_to(x, (1, 3004, 1, 8))))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32)[0, :, 0], turned, atol=0.03)  # one rounding in, one out


# ---- chunks


def visible(lengths: Any, **context: int) -> np.ndarray:
    """Which keys [B, T, T] get weight, by what reaches the output from values that name their frame."""
    q = jnp.ones((len(lengths), 7, 1, 7))
    v = jnp.broadcast_to(jnp.eye(7)[None, :, None], q.shape)
    return np.asarray(jax.jit(lambda n: attention(q, q, v, lengths=n, **context))(lengths))[:, :, 0] > 0


@pytest.mark.parametrize(
    ("chunk", "left"), [(0, -1), (1, -1), (1, 0), (1, 2), (2, -1), (2, 0), (3, 1), (7, 0), (100, -1)]
)
def test_chunks_see_themselves_and_the_past(chunk, left):
    lengths = np.array([7, 5], np.int32)
    ids = np.array([[1, 1, 1, 0, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1]], np.int32)
    for given in (lengths, ids):
        seen = visible(given, chunk=chunk, left=left)
        for b in range(2):
            row = np.where(np.arange(7) < given[b], 1, 0) if given.ndim == 1 else given[b]
            for t in np.flatnonzero(row):
                start = np.flatnonzero(row == row[t])[0]
                for s in range(7):
                    expected = row[s] == row[t]
                    if chunk:
                        behind = (t - start) // chunk - (s - start) // chunk
                        expected = expected and behind >= 0 and (left < 0 or behind <= left)
                    assert seen[b, t, s] == expected, (b, t, s)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(positions="rope"), r"positions='rope'.*rotary, .*alibi"),
        (dict(gated=True), "gated=True needs positions='buckets', not 'none'"),
        (dict(positions="buckets", buckets=6), "buckets=6 must be a multiple of 4"),
        (dict(positions="buckets", buckets=8, max_distance=2), "max_distance=2 more"),
        (dict(chunk=-1), "chunk=-1"),
        (dict(left=3), "left needs a chunk"),
        (dict(chunk=2, left=-2), "left=-2"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message) as caught:
        AttentionOptions(**options)
    assert "config.model.attention" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [(5, {}, r"width=12 is no multiple.*heads=5"), (4, dict(positions="rotary"), "even width of a head, not 3")],
)
def test_heads_that_do_not_fit_are_named(heads, options, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: SelfAttention(heads, options=options).init(jax.random.key(0), X, LENGTHS, train=False))

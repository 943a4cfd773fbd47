"""Every kind of positions in a stack of layers: packed rows, limited context, longer rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.models.transformer import Transformer
from tests.choice import some

T, D, CHUNK = 32, 16, 4
# Segments of packed rows start at multiples of four frames; after a gap, of one frame, up to the last.
RUNS = [[(0, 5), (8, 9), (12, 32)], [(4, 30)]]
IDS = np.zeros((2, T), np.int32)
for row, runs in zip(IDS, RUNS, strict=True):
    for number, (start, stop) in enumerate(runs, start=1):
        row[start:stop] = number
PLACES = [(b, start, stop) for b, runs in enumerate(RUNS) for start, stop in runs]
X, OTHER = np.random.default_rng(0).normal(size=(2, 2, T, D)).astype(np.float32)
NONE = dict(name="none")
CONV = dict(name="conv", kernel=6, groups=2)
DEEP = dict(name="conv", kernel=5, groups=2, depth=3)
KINDS: dict[str, dict[str, Any]] = {
    "conv": dict(positions=CONV),
    "deep conv": dict(positions=DEEP, norm="pre"),
    "sinusoidal": dict(positions=dict(name="sinusoidal")),
    "rotary": dict(attention=dict(positions="rotary")),
    "alibi": dict(attention=dict(positions="alibi")),
    "gated buckets": dict(attention=dict(positions="buckets", gated=True, buckets=8, max_distance=12)),
    "relative": dict(attention=dict(positions="relative")),
    "conformer": dict(block=dict(name="conformer", kernel=5), norm="pre", attention=dict(positions="relative")),
    "gru": dict(block=dict(name="gru")),
    "blstm": dict(block=dict(name="blstm")),
}
# What looks ahead unless told not to.
CAUSAL = ("conv", "deep conv", "relative", "conformer", "blstm")


def make(attention: dict[str, Any] | None = None, chunk: int = 0, left: int = -1, **settings: Any) -> Transformer:
    tiny: dict[str, Any] = dict(
        layers=2, heads=2, mlp=24, norm="post", positions=NONE, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, layerdrop=0.0, scan=True, remat=False, dtype=jnp.float32,
    )  # fmt: skip
    return Transformer(**(tiny | settings), attention=(attention or {}) | dict(chunk=chunk, left=left))


@pytest.fixture(scope="module")
def runner(random_params):
    """(kind, **context) -> jitted x, lengths -> frames; the same parameters whatever the context."""

    @functools.cache
    def build(kind: str, **context: int):
        params = random_params(make(**KINDS[kind]), X, np.array([T, T], np.int32), train=False)
        params = jax.tree.map(lambda a: 2 * a, params)  # attention that prefers something
        model: Any = make(**KINDS[kind], **context)
        run = jax.jit(lambda x, n: model.apply({"params": params}, x, n, train=False)[0])
        return lambda x, n: np.asarray(run(x, np.asarray(n, np.int32)))

    return build


PACKED = [(kind, {}) for kind in KINDS] + [(kind, dict(chunk=3, left=1)) for kind in CAUSAL]


@pytest.mark.parametrize(
    ("kind", "context"), some(PACKED, [PACKED[0], PACKED[3], PACKED[-2]]),
    ids=[f"{k}, chunks" if c else k for k, c in PACKED],
)  # fmt: skip
def test_a_segment_of_a_packed_row_is_as_alone(runner, kind, context):
    run = runner(kind, **context)
    packed = run(X, IDS)
    alone = np.random.default_rng(1).normal(size=(len(PLACES), T, D)).astype(np.float32)  # noise in the padding
    for row, (b, start, stop) in zip(alone, PLACES, strict=True):
        row[: stop - start] = X[b, start:stop]
    lengths = [stop - start for _, start, stop in PLACES]
    apart = run(alone, lengths)
    assert (packed[IDS == 0] == 0).all()
    for row, n, (b, start, stop) in zip(apart, lengths, PLACES, strict=True):
        # float32 of values up to 10 through two layers; rotary angles differ by the start of the segment.
        np.testing.assert_allclose(packed[b, start:stop], row[:n], atol=5e-5)
        assert (row[n:] == 0).all()
    mixed = run(X, [T, T])
    assert np.abs(mixed[0, 12:32] - packed[0, 12:32]).max() > 0.01, "negative control: without ids they mix"


@pytest.mark.parametrize("kind", KINDS)
def test_position_matters(runner, kind):
    """Negative control of the kinds: without positions a stack does not know the order of its frames."""
    order = np.roll(np.arange(T)[::-1], 5)  # reversed alone would be the same to a symmetric bias
    run = runner(kind)
    assert np.abs(run(X[:, order], [T, T])[:, np.argsort(order)] - run(X, [T, T])).max() > 0.01


@pytest.mark.parametrize(("kind", "chunk"), [(kind, chunk) for kind in CAUSAL for chunk in (1, CHUNK)])
def test_no_frame_sees_beyond_its_chunk(runner, kind, chunk):
    run = runner(kind, chunk=chunk)
    base, cut = run(X, [T, 21]), 4 * CHUNK
    frame = np.arange(T)[None, :, None]
    changed = np.where(frame >= cut, OTHER, X)
    after = run(changed, [T, 21])
    np.testing.assert_array_equal(after[:, :cut], base[:, :cut])
    assert np.abs(after - base)[0, cut:].max(axis=-1).min() > 0.01, "frames of the future themselves change"
    full = runner(kind)
    assert np.abs(full(changed, [T, 21])[:, :cut] - full(X, [T, 21])[:, :cut]).max() > 0.01, "negative control"
    last = np.where(frame == cut - 1, OTHER, X)
    seen = np.abs(run(last, [T, 21]) - base)[:, cut - CHUNK : cut].max(axis=(0, 2)) > 1e-5
    assert seen.tolist() == [chunk > 1] * (CHUNK - 1) + [True], "the last frame of a chunk is seen by all of it"


def test_left_limits_how_far_back_frames_see(runner):
    changed = np.where(np.arange(T)[None, :, None] < 2 * CHUNK, OTHER, X)
    for left, sees in ((-1, True), (0, False), (1, True)):
        run = runner("relative", chunk=CHUNK, left=left)
        difference = np.abs(run(changed, [T, T]) - run(X, [T, T]))
        # Two layers of one chunk reach two chunks back, so chunks 4 to 7 never see chunks 0 and 1.
        assert (difference[:, 4 * CHUNK :].max() > 1e-5) == (left == -1)
        assert (difference[:, 2 * CHUNK : 4 * CHUNK].max() > 1e-5) == sees


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_row_changes_nothing(runner, kind):
    """Noise after the utterance, and more of it; through the stack of convolutions padding would come back in."""
    run = runner(kind)
    short = run(X[:, :20], [20, 13])
    long = run(X, [20, 13])
    np.testing.assert_allclose(long[:, :20], short, atol=5e-5)  # float32, sums of other lengths
    noise = X.copy()
    noise[0, 20:], noise[1, 13:] = 7, -7
    np.testing.assert_array_equal(run(noise, [20, 13]), long)
    if kind != "gru":  # which sees no later frame
        assert np.abs(run(X, [T, 13])[0, :20] - long[0, :20]).max() > 0.01, "negative control"


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_parameters_biases_and_softmax_in_float32(kind):
    model: Any = make(**KINDS[kind], dtype=jnp.bfloat16, scan=False)
    x = jnp.bfloat16(X)
    init = lambda: model.init_with_output(jax.random.key(0), x, jnp.asarray(IDS), train=False, hidden="mlp")  # noqa: E731
    (frames, mlps), variables = jax.eval_shape(init)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {y.dtype for y in (frames, *mlps)} == {jnp.dtype("bfloat16")}
    jaxpr = str(jax.make_jaxpr(init)())
    assert ("f32[2,2,32,32] = exp" in jaxpr) == (kind not in ("gru", "blstm"))
    assert "bf16[2,2,32,32] = exp" not in jaxpr

"""Block masks with exact counts, and a transformer that sees only visible frames, against one that hides the others."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from speechjax.models.layers import LayerNorm
from speechjax.models.positions import ConvPositions
from speechjax.models.relative import AttentionOptions, SharedBias
from speechjax.models.transformer import Transformer, TransformerLayer
from speechjax.models.visible import ConvDecoder, attend_visible, block_mask, masked_counts
from tests.drawing import draw_params

T, D, H = 19, 16, 4
LENGTHS = np.array([19, 12, 7, 0], np.int32)


# ------------------------------------------------------------------------------------------- masks


def test_masks_have_exactly_their_share_of_every_utterance():
    lengths = np.arange(60, dtype=np.int32)
    for prob in (0.5, 0.55):
        mask = np.asarray(block_mask(jax.random.key(0), jnp.asarray(lengths), 59, prob=prob, span=5, adjust=0.05))
        np.testing.assert_array_equal(mask.sum(1), [int(prob * t) for t in lengths])
        np.testing.assert_array_equal(mask.sum(1), masked_counts(59, prob)[lengths])
        assert not (mask & (np.arange(59) >= lengths[:, None])).any()


def test_masks_come_in_blocks_and_everywhere():
    """Runs of masked frames are far longer than single frames drawn at random, and no frame is spared."""
    lengths = jnp.full(400, 100, jnp.int32)
    mask = np.asarray(block_mask(jax.random.key(1), lengths, 100, prob=0.5, span=5, adjust=0.05))
    runs = mask.sum() / (mask[:, 0].sum() + (mask[:, 1:] & ~mask[:, :-1]).sum())
    # At random runs are 1 / (1 - 0.5) = 2 long; spans of 5, some touching, and single frames added later: over 3.
    assert runs > 3
    share = mask.mean(0)
    assert share[10:-10].min() > 0.35
    assert share[10:-10].max() < 0.65
    assert share[[0, -1]].min() > 0.2, "the ends too: a span's centre may be the first frame"
    assert (mask[0] != mask[1]).any(), "every row has a mask of its own"


# ------------------------------------------------------------------------------------------- visible frames


class Holder(nn.Module):
    """Binds a transformer, as a task does."""

    options: dict[str, Any]

    def setup(self):
        self.transformer = Transformer(**self.options)

    def __call__(self, x, lengths, mask, slots, keys):
        if self.is_initializing():
            self.transformer(x, lengths, train=False)
        return attend_visible(self.transformer, x, lengths, mask, slots, keys)


def holder(**changes):
    options = dict(
        layers=2, heads=H, mlp=24, norm="post", positions=dict(kernel=3, groups=4, depth=2), dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, scan=False, remat=False, dtype=jnp.float32,
        attention=dict(positions="alibi"), block=dict(name="transformer"),
    )  # fmt: skip
    return Holder(options | changes)


def inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, T, D)).astype(np.float32)
    mask = np.array(block_mask(jax.random.key(3), jnp.asarray(LENGTHS), T, prob=0.5, span=3, adjust=0.05))
    return jnp.asarray(x), jnp.asarray(LENGTHS), jnp.asarray(mask), T - int(masked_counts(T, 0.5)[T])


def hidden_keys(params, x, lengths, mask, norm):
    """The same with nothing cut out: masked frames are zero, and attention, at full length, may not look at them."""
    visible = (jnp.arange(T)[None] < lengths[:, None]) & ~mask
    x = jnp.where(visible[..., None], x, 0.0)
    conv = ConvPositions(kernel=3, groups=4, depth=2)
    x = x + conv.apply({"params": params["positions"]}, x, lengths)
    if norm == "post":
        x = LayerNorm().apply({"params": params["norm"]}, x)
    options = AttentionOptions(positions="alibi")
    bias = SharedBias(H, options).apply({"params": params["attention_bias"]}, T)
    layer = TransformerLayer(
        heads=H, mlp=24, norm=norm, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
        dtype=jnp.float32, attention=dict(positions="alibi"),
    )  # fmt: skip
    for i in range(2):  # "segment" 1 are the visible frames
        x, _ = layer.apply({"params": params[f"layer{i}"]}, x, visible.astype(jnp.int32), False, bias)
    if norm == "pre":
        x = LayerNorm().apply({"params": params["norm"]}, x)
    return np.asarray(jnp.where(visible[..., None], x, 0.0))


@pytest.fixture(scope="module", params=["post", "pre"])
def model(request):
    module = holder(norm=request.param)
    x, lengths, mask, slots = inputs()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, lengths, mask, slots, {}))["params"]
    params = draw_params(shapes)
    run = jax.jit(lambda params, x, mask: module.apply({"params": params}, x, lengths, mask, slots, {}))
    return request.param, params, run


def test_cutting_out_equals_hiding(model):
    """Distances included: ALiBi counts the frames between two visible ones, masked or not."""
    norm, params, run = model
    x, lengths, mask, _ = inputs()
    out = np.asarray(run(params, x, mask))
    reference = hidden_keys(params["transformer"], x, lengths, mask, norm)
    np.testing.assert_allclose(out, reference, atol=2e-5)  # float32, sums over fewer terms
    assert np.abs(out).max() > 0.5
    steep = {**params["transformer"], "attention_bias": {"scale": 5 * jnp.ones(H)}}
    assert np.abs(hidden_keys(steep, x, lengths, mask, norm) - out).max() > 1e-3, "negative control: distances matter"


def test_what_is_masked_is_not_seen_and_comes_back_as_zero(model):
    _, params, run = model
    x, _, mask, _ = inputs()
    out = np.asarray(run(params, x, mask))
    cut = np.asarray(mask) | (np.arange(T) >= LENGTHS[:, None])
    assert (out[cut] == 0).all()
    np.testing.assert_array_equal(out, run(params, jnp.where(cut[..., None], 1e3, x), mask))
    assert (np.asarray(run(params, x + 0.1, mask)) != out).any(), "negative control: visible frames"


# ------------------------------------------------------------------------------------------- decoder


def test_decoder_against_xla_convolutions():
    x, lengths, _, _ = inputs()
    decoder = ConvDecoder(depth=3, width=8, kernel=5, groups=2, dtype=jnp.float32)
    params = draw_params(jax.eval_shape(lambda: decoder.init(jax.random.key(0), x, lengths))["params"])
    out = decoder.apply({"params": params}, x, lengths)
    valid = (jnp.arange(T)[None] < lengths[:, None])[..., None]
    y = x
    for i in range(3):
        y = jnp.where(valid, y, 0.0)
        g, k, c = 2, 5, y.shape[-1]
        kernel = params[f"conv{i}_kernel"].reshape(g, k, c // g, 4).transpose(1, 2, 0, 3).reshape(k, c // g, 8)
        z = lax.conv_general_dilated(
            y, kernel, (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC"), feature_group_count=g
        ) + params[f"conv{i}_bias"].reshape(1, 1, -1)  # fmt: skip
        z = (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 1e-5)
        z = jax.nn.gelu(z, approximate=False)
        y = z if i == 0 else y + z
    expected = y @ params["out"]["kernel"] + params["out"]["bias"].reshape(1, 1, -1)
    np.testing.assert_allclose(np.asarray(out)[np.asarray(valid)[..., 0]], expected[valid[..., 0]], atol=2e-5)


def test_decoder_does_not_see_padding():
    x, lengths, _, _ = inputs()
    decoder = ConvDecoder(depth=3, width=8, kernel=5, groups=2, dtype=jnp.float32)
    params = draw_params(jax.eval_shape(lambda: decoder.init(jax.random.key(0), x, lengths))["params"])
    inside = np.arange(T) < LENGTHS[:, None]
    noisy = jnp.where(inside[..., None], x, 1e3)
    a, b = (np.asarray(decoder.apply({"params": params}, z, lengths))[inside] for z in (x, noisy))
    np.testing.assert_array_equal(a, b)

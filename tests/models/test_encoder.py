"""The speech encoder: padding, hidden states, masking, precision."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError

SAMPLES, FRAMES = 500, 24
LENGTHS = np.array([500, 261, 0], np.int32)
KINDS: dict[str, dict[str, Any]] = {
    "base": dict(norm="post"),
    "large": dict(norm="pre", frontend=dict(norm="layer", bias=True, normalize=True)),
}


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """int16 [3, S], noise in the padding too."""
    return np.random.default_rng(0).integers(-9000, 9000, (3, SAMPLES)).astype(np.int16)


@pytest.fixture(scope="module", params=KINDS)
def model(request, tiny_encoder, random_params, audio):
    """(encoder, parameters, jitted `run(audio, lengths)` with hidden states)."""
    encoder = tiny_encoder(**KINDS[request.param])
    params = random_params(encoder, dict(audio=audio, lengths=LENGTHS))
    run = jax.jit(lambda a, n: encoder.apply({"params": params}, dict(audio=a, lengths=n), hidden=True))
    return encoder, params, run


def test_hidden_states_are_the_first_input_and_every_layer(model, audio):
    encoder, params, run = model
    frames, lengths, hidden = run(audio, LENGTHS)
    assert frames.shape == (3, FRAMES, 64)
    assert len(hidden) == encoder.layers + 1
    np.testing.assert_array_equal(lengths, [24, 12, 0])
    assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.pairwise(hidden))
    last = np.asarray(hidden[-1], np.float64)
    if encoder.norm == "post":
        np.testing.assert_array_equal(frames, hidden[-1])
    else:
        scale, bias = (np.asarray(params["transformer"]["norm"][k]) for k in ("scale", "bias"))
        normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(frames[0], (normed * scale + bias)[0], atol=1e-5)  # float32
        assert np.abs(frames - hidden[-1]).max() > 0.1
    without = jax.eval_shape(lambda: encoder.apply({"params": params}, dict(audio=audio, lengths=LENGTHS)))
    assert without.hidden == []


def test_padding_changes_nothing(model, audio):
    _, _, run = model
    base = run(audio, LENGTHS)
    outside = np.arange(FRAMES)[None] >= base.lengths[:, None]
    for state in [base.frames, *base.hidden]:
        assert (np.asarray(state)[outside] == 0).all()
        assert np.isfinite(state).all()
    noise = np.where(np.arange(SAMPLES) < LENGTHS[:, None], audio, -audio[::-1])
    assert (noise != audio).any()
    jax.tree.map(np.testing.assert_array_equal, base, run(noise, LENGTHS))
    changed = audio.copy()
    changed[1, 130] += 5000
    frames = run(changed, LENGTHS).frames
    np.testing.assert_array_equal(frames[0], base.frames[0])
    difference = np.abs(np.asarray(frames) - np.asarray(base.frames))[1, :12].max(axis=-1)
    assert difference.min() > 1e-5, "negative control: a valid sample reaches every frame by attention"


def test_a_longer_row_changes_nothing(model, audio):
    """The same utterances in a bucket of 680 samples; other shapes, other summation order: float32."""
    _, _, run = model
    longer = np.concatenate([audio, audio[:, :180]], axis=1)
    for a, b in zip(run(audio, LENGTHS).hidden, run(longer, LENGTHS).hidden, strict=True):
        np.testing.assert_allclose(a, b[:, :FRAMES], atol=2e-5)
    cut = np.asarray(run(longer, LENGTHS + np.array([40, 0, 0], np.int32)).frames)
    assert np.abs(cut[0, :FRAMES] - run(audio, LENGTHS).frames[0]).max() > 1e-2, "negative control"


def test_masked_frames_are_replaced_by_the_embedding(tiny_encoder, random_params, audio):
    encoder = tiny_encoder(layers=1)
    params = random_params(encoder, dict(audio=audio, lengths=LENGTHS))
    mask = np.zeros((3, FRAMES), bool)
    mask[0, 3:6] = True

    @jax.jit
    def masked(features_noise):
        def body(encoder, batch):
            features, lengths = encoder.extract(batch)
            features = encoder.feature_norm(features) + features_noise
            return encoder.contextualize(features, lengths, mask=mask, train=False)

        return encoder.apply({"params": params}, dict(audio=audio, lengths=LENGTHS), method=body)

    clean = masked(np.zeros((3, FRAMES, 1), np.float32))
    noise = np.where(mask, 7, 0)[..., None].astype(np.float32)
    np.testing.assert_array_equal(masked(noise).frames, clean.frames)
    noise[0, 6] = 7
    seen = np.asarray(masked(noise).frames)
    assert np.abs(seen - clean.frames)[0].max() > 1e-2, "negative control: an unmasked frame"


def test_bfloat16_keeps_parameters_and_norms_in_float32(tiny_encoder, audio):
    encoder = tiny_encoder(dtype="bfloat16", frontend=dict(norm="layer", bias=True), norm="pre")
    batch = dict(audio=audio, lengths=LENGTHS)
    out, variables = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), batch, hidden=True))
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {x.dtype for x in [out.frames, *out.hidden]} == {jnp.dtype("bfloat16")}


def test_a_spectral_encoder_is_embed_of_inputs(tiny_encoder, random_params):
    """A task may change the frames between the halves; without that, the halves are the whole."""
    encoder = tiny_encoder()
    encoder = encoder.clone(frontend=dict(name="mel", n_mels=8, factor=2))
    audio = np.random.default_rng(0).integers(-9000, 9000, (2, 4000)).astype(np.int16)
    batch = dict(audio=audio, lengths=np.array([4000, 2500], np.int32))
    params = random_params(encoder, batch)

    @jax.jit
    def run(batch, shift):
        def halves(encoder, batch):
            x, lengths = encoder.inputs(batch)
            return x, encoder.embed(x + shift, lengths), encoder.extract(batch)

        return encoder.apply({"params": params}, batch, method=halves)

    x, (features, lengths), (whole, whole_lengths) = run(batch, 0.0)
    assert x.dtype == jnp.float32
    assert (encoder.subsampling(), features.shape[1]) == (2, x.shape[1] // 2)
    np.testing.assert_array_equal(features, whole)
    np.testing.assert_array_equal(lengths, whole_lengths)
    assert np.abs(run(batch, 1.0)[1][0] - whole).max() > 0.1, "negative control"
    with pytest.raises(UserError, match=r"packed row.*data\.fill=False"):
        run(batch | dict(starts=np.zeros((2, 1), np.int32), lengths=np.array([[4000], [2500]], np.int32)), 0.0)


def test_a_waveform_encoder_has_no_frames_to_mask(tiny_encoder, audio):
    batch = dict(audio=audio, lengths=LENGTHS)
    for method, args in (("inputs", (batch,)), ("embed", (jnp.zeros((1, 4, 2)), jnp.array([4])))):
        with pytest.raises(UserError, match=r"config\.model\.frontend\.name='waveform'.*mel, mfcc or patch"):
            jax.eval_shape(lambda m=method, a=args: tiny_encoder().init(jax.random.key(0), *a, method=m))
    with pytest.raises(UserError, match=r"config\.model\.frontend"):
        tiny_encoder().subsampling()


@pytest.mark.parametrize("scan", [False, True])
def test_positions_and_attention_of_the_config_reach_the_layers(tiny_encoder, audio, scan):
    """By the parameters they bring; those of other parts keep their names."""
    batch = dict(audio=audio, lengths=LENGTHS)
    paths = lambda **settings: {  # noqa: E731
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(lambda: tiny_encoder(scan=scan, **settings).init(jax.random.key(0), batch))["params"]
        )
    }
    plain, layer = paths(), "transformer/layers" if scan else "transformer/layer1"
    bias = {"transformer/attention_bias/table"}
    assert paths(attention=dict(positions="buckets")) == plain | bias
    gated = paths(attention=dict(positions="buckets", gated=True))
    assert gated >= plain | bias | {f"{layer}/attention/gate_scale", f"{layer}/attention/gate/kernel"}
    assert paths(attention=dict(positions="rotary", chunk=2)) == plain
    assert f"{layer}/attention/distance/kernel" in paths(attention=dict(positions="relative"))
    assert paths(positions=dict(name="none")) == {p for p in plain if "transformer/positions" not in p}
